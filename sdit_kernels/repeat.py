"""Repeat a known call of an operator without its Python code.

Before a kernel runs, Python looks at strides, allocates outputs, computes sizes and builds 25 to 50 arguments. For small
tensors this takes longer than the kernel. All of it follows from the shapes, strides, dtypes and alignments of the tensors and from the
other arguments. So ``repeatable`` keeps, per set of these, the allocations and launches of a call. The next call with the same
set allocates, fills in the addresses and launches.

While a call is recorded, a mode sees all operators of PyTorch. The call is kept only if they allocate tensors or make views,
and if every address among the arguments of a launch belongs to a known tensor. So a call that reads, copies or computes
anything runs its Python code every time.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from ._torch import OperatorMode, dispatch_mode_count, without_modes

_MOST_CALLS = 4096  # calls that are kept per function
_ONCE, _NEVER = "seen once", "cannot be repeated"
_TENSORS = {Tensor, torch.nn.Parameter}
_LEAST_ADDRESS = 1 << 20  # no memory of a process has a lower address; a call with a greater size is not kept
# For AMD, Triton also specialises on tensors whose storage is below 2 GiB.
_LARGE_STORAGE = 1 << 31 if torch.version.hip else None

# Per backend, a function that returns what a launch depends on besides its arguments, or None if no call may be repeated.
environments: dict[str, Callable[[], tuple | None]] = {}


class _Local(threading.local):
    recording: "_Recording | None" = None  # of the function that runs on this thread


_local = _Local()


# --- what a call did --------------------------------------------------------------------------------------------------------


class _Launch(NamedTuple):
    start: Callable[..., object]
    arguments: Callable[[list[int], list[int]], tuple]  # of the addresses of the given and of the allocated tensors
    hooks: Sequence  # as long as it is not empty, the call is not repeated


class _Call(NamedTuple):
    allocations: tuple[Callable[[list[Tensor]], Tensor], ...]
    launches: tuple[_Launch, ...]
    returned: Callable[[list[Tensor]], Any]
    tuning: Any  # kept alive, because the key holds its address


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_VIEWS = {
    _aten.alias.default, _aten.as_strided.default, _aten.detach.default, _aten.expand.default, _aten.permute.default,
    _aten.select.int, _aten.slice.Tensor, _aten.squeeze.dim, _aten.t.default, _aten.transpose.int, _aten.unbind.int,
    _aten.unsqueeze.default, _aten.view.default, _aten.view.dtype,
}  # fmt: skip


class _Recording(OperatorMode):
    """Sees the operators of a call, and gets its launches from ``note_launch``."""

    def __init__(self, tensors):
        super().__init__()
        self.given, self.made, self.launches = tensors, [], []
        self.is_complete = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function in _ALLOCATIONS:
            self.made.append(out)
        elif function not in _VIEWS:
            self.is_complete = False
        return out

    def finish(self, found):
        """Return the call that did what was recorded, or None."""
        if not self.is_complete or any(t.data_ptr() % 16 for t in self.made):
            return None
        self._owners = [(f"a[{i}]", t) for i, t in enumerate(self.given)] + [(f"m[{i}]", t) for i, t in enumerate(self.made)]
        launches = []
        for start, args, hooks in self.launches:
            constants: list = []
            source = self._source(args, constants)
            if source is None:
                return None
            launches.append(_Launch(start, eval(f"lambda a, m: {source}", {"c": tuple(constants)}), hooks))
        returned = self._source_of_output(found)
        if returned is None:
            return None
        allocations = tuple(map(self._allocation, self.made))
        return _Call(allocations, tuple(launches), eval(f"lambda m: {returned}"), tuning.current())

    def _source(self, value, constants):
        """Return an expression for an argument, None if it holds an unknown address. c: the constants in it."""
        if type(value) is tuple:
            items = [self._source(item, constants) for item in value]
            return None if None in items else f"({''.join(f'{item}, ' for item in items)})"
        if isinstance(value, Tensor):
            return self._owner(value.data_ptr(), value.untyped_storage().data_ptr())
        if type(value) is int and value >= _LEAST_ADDRESS:
            return self._owner(value)
        constants.append(value)
        return f"c[{len(constants) - 1}]"

    def _owner(self, address, storage=None):
        same = {name for name, t in self._owners if t.data_ptr() == address}
        if len(same) == 1:
            return same.pop()
        inside = []
        for name, t in self._owners:
            start = t.untyped_storage().data_ptr()
            if start <= address < start + t.untyped_storage().nbytes() and storage in (None, start):
                inside.append((name, t.data_ptr()))
        if same or len(inside) != 1:
            return None
        ((name, start),) = inside
        return f"{name} + {address - start}"

    def _source_of_output(self, found):
        if isinstance(found, tuple | list):
            items = [self._source_of_output(t) for t in found]
            if None in items:
                return None
            return f"[{', '.join(items)}]" if isinstance(found, list) else f"({''.join(f'{item}, ' for item in items)})"
        if found is None:
            return "None"
        same = [i for i, t in enumerate(self.made) if t.data_ptr() == found.data_ptr() and t.dtype == found.dtype]
        if len(same) != 1:
            return None
        (i,) = same
        t = self.made[i]
        if (t.shape, t.stride()) != (found.shape, found.stride()):
            if t.numel() != found.numel() or not (t.is_contiguous() and found.is_contiguous()):
                return None
            self.made[i] = found  # a view of all of t
        return f"m[{i}]"

    def _allocation(self, t):
        """Return a function of the given tensors that allocates a tensor like t."""
        shape, stride, dtype, device = tuple(t.shape), t.stride(), t.dtype, t.device
        if not t.is_contiguous():
            return lambda given: torch.empty_strided(shape, stride, dtype=dtype, device=device)
        for i, like in enumerate(self.given):
            if like.shape == t.shape and like.dtype == dtype and like.is_contiguous():
                return lambda given: torch.empty_like(given[i])  # 0.5 us faster than empty
        return lambda given: torch.empty(shape, dtype=dtype, device=device)


def note_launch(start: Callable[..., object], args: tuple, hooks: Sequence = ()) -> None:
    """Note that start(*args) launched a kernel. Tensors and addresses in args may be replaced by other addresses."""
    if _local.recording is not None:
        _local.recording.launches.append((start, args, hooks))


def refuse() -> None:
    """Note that the running call cannot be repeated."""
    if _local.recording is not None:
        _local.recording.is_complete = False


# --- repeated calls ---------------------------------------------------------------------------------------------------------


_all_calls: list[dict] = []


def forget() -> None:
    """Forget all calls, for tools that change Triton's driver or caches."""
    for calls in _all_calls:
        calls.clear()


def repeatable(function, tensor_count: int):
    """Return the function, which repeats known calls.

    Its arguments are so many tensors or None, then values that are not tensors, of which the last is the backend. A call is
    recorded when it is seen for the second time, so shapes that come once cost little.
    """
    calls: dict[tuple, _Call | str] = {}
    _all_calls.append(calls)

    def run_plainly(args):
        if dispatch_mode_count() > 0:  # the mode of packed_spikes need not see the operators inside
            with without_modes():
                return function(*args)
        return function(*args)

    def record(key, args, tensors):
        _local.recording = recording = _Recording(tensors)
        try:
            with recording:
                found = function(*args)
        finally:
            _local.recording = None
        calls[key] = recording.finish(found) or _NEVER
        return found

    @functools.wraps(function)
    def run(*args):
        if _local.recording is not None:
            return function(*args)
        environment = environments.get(args[-1])
        environment = None if environment is None else environment()
        if environment is None:
            return run_plainly(args)
        key, tensors, addresses = [environment, id(tuning.current()), args[tensor_count:]], [], []
        for t in args[:tensor_count]:
            if t is None:
                key.append(None)
            elif type(t) in _TENSORS:
                address = t.data_ptr()
                key += t.shape, t.stride(), t.dtype, address & 15
                if _LARGE_STORAGE is not None:
                    key.append(t.untyped_storage().nbytes() >= _LARGE_STORAGE)
                tensors.append(t)
                addresses.append(address)
            else:
                return run_plainly(args)
        key.append(tensors[0].device)
        key = tuple(key)
        call = calls.get(key)
        if type(call) is _Call:
            for launch in call.launches:
                if launch.hooks:
                    return run_plainly(args)
            if dispatch_mode_count() > 0:
                with without_modes():
                    return repeat(call, tensors, addresses)
            return repeat(call, tensors, addresses)
        if call is _NEVER:
            return run_plainly(args)
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        if call is None:
            calls[key] = _ONCE
            return run_plainly(args)
        return record(key, args, tensors)

    def repeat(call, tensors, addresses):
        made = [allocate(tensors) for allocate in call.allocations]
        made_addresses = [t.data_ptr() for t in made]
        for start, arguments, _ in call.launches:
            start(*arguments(addresses, made_addresses))
        return call.returned(made)

    return run
