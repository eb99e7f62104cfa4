"""Large outputs on the CPU come from blocks that earlier outputs have given back.

The C library returns large blocks to the system when they are freed and gets them back as zeroed pages: for an op that is bound
by memory, that costs more than the op. Freed blocks are kept here instead, in huge pages, newest first, up to a limit: a
sixteenth of the machine's memory, or ``SDIT_KERNELS_CPU_POOL_MB`` (0: none). What is asked of torch otherwise: small tensors,
other devices, other systems than Linux, and deterministic mode, which fills new memory.
"""

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes; what is smaller the C library keeps
_PAGE = 2 << 20  # a huge page: what sizes are rounded up to


def _limit_from_environment() -> int:
    if sys.platform != "linux":
        return 0
    text = os.environ.get("SDIT_KERNELS_CPU_POOL_MB")
    if text is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16
    try:
        megabytes = int(text)
    except ValueError:
        megabytes = -1
    if megabytes < 0:
        raise ValueError(f"SDIT_KERNELS_CPU_POOL_MB must be a number of megabytes, 0 or more; got {text!r}")
    return megabytes << 20


class _Pool:
    def __init__(self, limit: int):
        self.limit = limit  # bytes that idle blocks may hold
        self._idle = []  # (bytes, block), the newest last
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self):
        self._lock = threading.RLock()  # a finalizer may run inside another's critical section, in the same thread

    def take(self, size: int) -> memoryview:
        """Writable memory of ``size`` bytes, uninitialised; it comes back by itself when nobody refers to it."""
        rounded = -(-size // _PAGE) * _PAGE
        block = self._reuse(rounded)
        if block is None:
            block = mmap.mmap(-1, rounded + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    block.madvise(mmap.MADV_HUGEPAGE)
        start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % _PAGE
        view = memoryview(block)[start : start + size]
        weakref.finalize(view, self._give_back, rounded, block).atexit = False
        return view

    def _reuse(self, rounded):
        with self._lock:
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i][0] == rounded:
                    return self._idle.pop(i)[1]

    def _give_back(self, rounded, block):
        with self._lock:
            self._idle.append((rounded, block))
            while self._idle and sum(size for size, _ in self._idle) > self.limit:
                self._idle.pop(0)


pool = _Pool(_limit_from_environment())
_PLAIN = (Tensor, torch.nn.Parameter)


def _serves(like: Tensor, size: int) -> bool:
    return pool.limit > 0 and size >= _LARGE and like.device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()


def empty_strided(shape, stride, dtype: torch.dtype, like: Tensor) -> Tensor:
    """An uninitialised tensor on the device of ``like`` that fills its memory."""
    if type(like) in _PLAIN:  # a fake tensor's sizes may be symbols
        size = math.prod(shape) * dtype.itemsize
        if _serves(like, size):
            try:
                block = torch.frombuffer(pool.take(size), dtype=dtype)
            except OSError:  # no memory left for one: torch says so better
                pass
            else:
                return torch.empty(0, dtype=dtype, device=like.device).set_(block.untyped_storage(), 0, shape, stride)
    return torch.empty_strided(shape, stride, dtype=dtype, device=like.device)


def empty_contiguous(shape, dtype: torch.dtype, like: Tensor) -> Tensor:
    if type(like) in _PLAIN and math.prod(shape) * dtype.itemsize >= _LARGE:
        stride = [1]
        for n in shape[:0:-1]:
            stride.append(stride[-1] * n)
        return empty_strided(shape, stride[::-1], dtype, like)
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """For an x that fills its memory, in its order."""
    if type(x) in _PLAIN and x.numel() * dtype.itemsize >= _LARGE:
        return empty_strided(x.shape, x.stride(), dtype, x)
    return torch.empty_like(x, dtype=dtype)
