"""Reuse the memory of freed outputs for new large outputs on the CPU.

The C library returns large blocks to the system when they are freed, and gets zeroed pages back. For a memory-bound op that
takes longer than the op itself. This pool keeps freed blocks in huge pages and reuses the newest first. It holds at most a
sixteenth of the machine's memory, or ``SDIT_KERNELS_CPU_POOL_MB`` megabytes (0: none). torch allocates all other tensors: small
ones, tensors on other devices or on systems other than Linux, and tensors in deterministic mode, which fills new memory.

A smaller tensor that lives shortly, such as spikes that a backward pass restores, takes the memory of the last tensor of its
shape, if that is free again (``empty_again``). This saves a call of the C library.

Blocks begin at different cache lines of a page. On an Intel Xeon, kernels that walk through many tensors side by side, such as
wkv's, were slower where all of them began at multiples of 256 bytes.
"""

import contextlib
import ctypes
import itertools
import math
import mmap
import os
import sys
import threading
import weakref

import torch
from torch import Tensor

from ._torch import storage_users

LARGE = 4 << 20  # bytes; the C library keeps smaller blocks
_PAGE = 2 << 20  # a huge page; sizes are rounded up to it
_LINES, _SKIP = 64, 37  # cache lines of a small page, and from one block's place in it to the next: no common divisor


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
        self.limit = limit  # maximum bytes of all idle blocks
        self._idle = []  # (bytes, block, place), the newest last
        self._numbers = itertools.count()
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self):
        self._lock = threading.RLock()  # reentrant: a finalizer may run while the same thread holds the lock

    def take(self, size: int) -> memoryview:
        """Return ``size`` bytes of writable, uninitialised memory. They return to the pool when nothing refers to them."""
        rounded = -(-size // _PAGE) * _PAGE
        block, place = self._reuse(rounded) or self._make(rounded)
        view = memoryview(block)[place : place + size]
        weakref.finalize(view, self._give_back, rounded, block, place).atexit = False
        return view

    def _make(self, rounded):
        """Return new memory, and the place in it where a tensor begins."""
        block = mmap.mmap(-1, rounded + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        first = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % _PAGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # the kernel may lack huge pages
                block.madvise(mmap.MADV_HUGEPAGE, first, rounded)
                block.madvise(mmap.MADV_NOHUGEPAGE, first + rounded)  # a tensor reaches at most a small page into the rest
        return block, first + next(self._numbers) * _SKIP % _LINES * 64

    def _reuse(self, rounded):
        with self._lock:
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i][0] == rounded:
                    return self._idle.pop(i)[1:]

    def _give_back(self, rounded, block, place):
        with self._lock:
            self._idle.append((rounded, block, place))
            while self._idle and sum(size for size, *_ in self._idle) > self.limit:
                self._idle.pop(0)


pool = _Pool(_limit_from_environment())
_PLAIN = (Tensor, torch.nn.Parameter)
_CPU = torch.empty(0, dtype=torch.float32, device="cpu")


def _serves(like: Tensor, size: int) -> bool:
    return pool.limit > 0 and size >= LARGE and like.device.type == "cpu" and not torch.are_deterministic_algorithms_enabled()


def empty_strided(shape, stride, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Allocate an uninitialised dense tensor on the device of ``like``."""
    if type(like) in _PLAIN:  # the sizes of a fake tensor may be symbolic
        size = math.prod(shape) * dtype.itemsize
        if _serves(like, size):
            try:
                block = torch.frombuffer(pool.take(size), dtype=dtype)
            except OSError:  # out of memory: torch raises a better error
                pass
            else:
                return torch.empty(0, dtype=dtype, device=like.device).set_(block.untyped_storage(), 0, shape, stride)
    return torch.empty_strided(shape, stride, dtype=dtype, device=like.device)


def empty_contiguous(shape, dtype: torch.dtype, like: Tensor) -> Tensor:
    if type(like) in _PLAIN:
        if math.prod(shape) * dtype.itemsize >= LARGE:
            stride = [1]
            for n in shape[:0:-1]:
                stride.append(stride[-1] * n)
            return empty_strided(shape, stride[::-1], dtype, like)
        if shape == like.shape:  # 0.5 us faster
            return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty(shape, dtype=dtype, device=like.device)


class _Recent(threading.local):
    def __init__(self):
        self.kept: dict[tuple, tuple] = {}  # by shape and dtype: (tensor, its storage, how many use the storage)
        self.size = 0


_recent = _Recent()
_MOST_RECENT = 16 << 20  # bytes that a thread keeps for ``empty_again``


def empty_again(shape, dtype: torch.dtype) -> Tensor:
    """Allocate a contiguous tensor on the CPU that lives shortly; see the top of this file."""
    found = _recent.kept.get((shape, dtype))
    if found is not None and storage_users(found[1]._cdata) == found[2]:
        return found[0].detach()
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE or not pool.limit or storage_users is None or torch.are_deterministic_algorithms_enabled():
        return empty_contiguous(shape, dtype, _CPU)
    t = torch.empty(shape, dtype=dtype, device="cpu")
    if _recent.size + size > _MOST_RECENT:
        _recent.kept.clear()
        _recent.size = 0
    _recent.size += size if (shape, dtype) not in _recent.kept else 0
    storage = t.untyped_storage()
    _recent.kept[shape, dtype] = t, storage, storage_users(storage._cdata)
    return t.detach()


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a tensor like the dense x, in the memory order of x."""
    if type(x) in _PLAIN and x.numel() * dtype.itemsize >= LARGE:
        return empty_strided(x.shape, x.stride(), dtype, x)
    return torch.empty_like(x, dtype=dtype)
