"""Repeat a known call of an operator without its Python code.

Before a kernel runs, Python looks at strides, allocates outputs, computes sizes and builds 25 to 50 arguments. For small
tensors this takes longer than the kernel. All of it follows from the shapes, strides, dtypes and alignments of the tensors and
from the other arguments. So ``repeatable`` keeps, per set of these, what a call did: a function that allocates, calls PyTorch's
operators and launches, and nothing else. The next call with the same set runs this function on its tensors.

While a call is recorded, a mode sees all operators of PyTorch. The call is kept only if they are known to read no values into
Python, and if every address among the arguments of a launch belongs to a known tensor.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import memory, tuning
from ._torch import OperatorMode, as_function, dispatch_mode_count, without_modes

_ONCE, _NEVER = "seen once", "cannot be repeated"
_TENSORS = {Tensor, torch.nn.Parameter}
# No memory of a process has a lower address. If integers may be addresses, a call with a greater size is not kept.
_LEAST_ADDRESS = 1 << 20
# For AMD, Triton also specialises on tensors whose storage is below 2 GiB.
_LARGE_STORAGE = 1 << 31 if torch.version.hip else None

# Per backend, a function that returns what a launch depends on besides its arguments, or None if no call may be repeated.
environments: dict[str, Callable[[], tuple | None]] = {}


class _Local(threading.local):
    recording: "_Recording | None" = None  # of the function that runs on this thread

    def __init__(self):
        self.scratch: list[tuple[int, int, Tensor]] = []  # memory for the calls of this thread: (bytes, address, owner)


_local = _Local()


# --- what a call did --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    run: Callable[[list[Tensor], list[int]], Any]  # of the given tensors and their addresses
    hooks: tuple[Sequence, ...]  # as long as one of them is not empty, the call is not repeated
    tuning: Any  # kept alive, because the key holds its address


_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip
_SET = _aten.set_.source_Storage_storage_offset
_VIEWS = {
    _aten.alias.default, _aten.as_strided.default, _aten.detach.default, _aten.expand.default, _aten.permute.default,
    _aten.select.int, _aten.slice.Tensor, _aten.squeeze.dim, _aten.t.default, _aten.transpose.int, _aten.unbind.int,
    _aten.unsqueeze.default, _aten.view.default, _aten.view.dtype, _aten._unsafe_view.default,
}  # fmt: skip
# Operators that read no values into Python and draw no random numbers.
_COMPUTATIONS = {
    _aten._to_copy.default, _aten.add.Tensor, _aten.add_.Tensor, _aten.clone.default, _aten.copy_.default, _aten.div.Scalar,
    _aten.div.Tensor, _aten.fill_.Scalar, _aten.full.default, _aten.mul.Scalar, _aten.mul.Tensor, _aten.mul_.Tensor,
    _aten.neg.default, _aten.new_zeros.default, _aten.pow.Tensor_Scalar, _aten.reciprocal.default, _aten.sqrt.default,
    _aten.stack.default, _aten.sub.Tensor, _aten.sum.IntList_out, _aten.sum.default, _aten.sum.dim_IntList, _aten.zero_.default,
    _aten.zeros.default, _aten.zeros_like.default,
}  # fmt: skip


class _Unknown(Exception):
    """A call cannot be repeated."""


_LINE = 64  # bytes between which scratch memory is aligned
_MOST_SCRATCH = 1 << 20  # bytes that a thread keeps


def _take_scratch(size: int) -> tuple[int, int, Tensor]:
    """Return (bytes, address, owner) of memory for one call. Two launches of a call may be interrupted by another call."""
    if _local.scratch and _local.scratch[-1][0] >= size:
        return _local.scratch.pop()
    _local.scratch.clear()
    owner = torch.empty(size + _LINE, dtype=torch.uint8, device="cpu")
    return size, -(-owner.data_ptr() // _LINE) * _LINE, owner


class _Recording(OperatorMode):
    """Sees the operators of a call, and gets its launches from ``note_launch``. Prints the call as the code of a function.

    In this code, g0, g1, .. are the given tensors, m0, m1, .. the tensors that the call makes, p0, q0, .. the addresses of
    these, and c0, c1, .. constants. Tensors that only CPU kernels use are places in one scratch memory.
    """

    def __init__(self, tensors):
        super().__init__()
        self.given, self.steps, self.hooks, self.is_complete = tensors, [], [], True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function in _ALLOCATIONS:
            self.steps.append((None, out, (), {}))
        elif function in _COMPUTATIONS:
            self.steps.append((function, out, args, kwargs or {}))
        elif function is _SET and self.steps and self.steps[-1][1] is out:
            pass  # memory.py gives the tensor that it has just allocated its memory
        elif function not in _VIEWS:
            self.is_complete = False
        return out

    def finish(self, found):
        """Return the call that did what was recorded, or None."""
        if not self.is_complete:
            return None
        self._owners = [(f"g{i}", f"p{i}", t) for i, t in enumerate(self.given)]
        self._constants: dict[str, Any] = {}
        names, addresses = ("".join(f"{name}, " for name in column) for column in list(zip(*self._owners))[:2])
        lines = [f"{names}= given", f"{addresses}= addresses"]
        returned = self._allocate_as_returned(found)
        self._scratch, self._scratch_size = self._find_scratch(returned), 0
        try:
            steps = [line for step in self.steps for line in self._print(*step)]
            if self._scratch_size:
                lines.append(f"_, scratch, _ = taken = {self._constant(_take_scratch)}({self._scratch_size})")
                steps.append(f"{self._constant(_local)}.scratch.append(taken)")
            lines += [*steps, f"return {self._print_output(returned)}"]
        except _Unknown:
            return None
        code = "def call(given, addresses):\n" + "".join(f"    {line}\n" for line in lines)
        exec(code, self._constants)
        return _Call(self._constants["call"], tuple(self.hooks), tuning.current())

    def _find_scratch(self, returned):
        """Return the addresses of the small storages on the CPU that the call makes, and that only launches use."""
        made, used = set(), set()
        for function, out, args, kwargs in self.steps:
            if function is None and out.device.type == "cpu" and out.is_contiguous() and out.nbytes:
                made.add(out.untyped_storage().data_ptr())
            elif function is note_launch and not kwargs["integers"]:  # takes tensors
                return set()
            elif function is not note_launch:
                used.update(_storages((out, args, tuple(kwargs.values()))))
        return made - used - set(_storages(returned))

    def _print(self, function, out, args, kwargs):
        """Return the lines of a step, and enter the tensor that it makes."""
        if function is note_launch:
            printed = [self._print_address(a, **kwargs) for a in args]
            return [f"{self._constant(out)}({', '.join(printed)})"]
        value = self._print_allocation(out)
        if function is not None:
            given = [self._print_tensors(a) for a in args] + [f"{k}={self._print_tensors(a)}" for k, a in kwargs.items()]
            value = f"{self._constant(as_function(function))}({', '.join(given)})"
            if any(self._holds(t, out) for _, _, t in self._owners):  # in place
                return [value]
        if function is None and out.data_ptr() % 16:
            raise _Unknown
        i = len(self._owners)
        if function is None and out.untyped_storage().data_ptr() in self._scratch:
            at, size = self._scratch_size, -(-out.nbytes // _LINE) * _LINE
            if at + size <= _MOST_SCRATCH:
                self._scratch_size += size
                self._owners.append((f"m{i}", f"q{i}", out))
                return [f"q{i} = scratch + {at}"]
        self._owners.append((f"m{i}", f"q{i}", out))
        return [f"m{i} = {value}", f"q{i} = m{i}.data_ptr()"]

    def _print_allocation(self, t):
        """Return an expression that allocates a tensor like t."""
        if t.device.type == "cpu" and t.nbytes >= memory.LARGE:
            dtype, like = self._constant(t.dtype), self._owners[0][0]
            return f"{self._constant(memory.empty_strided)}({tuple(t.shape)}, {t.stride()}, {dtype}, {like})"
        how = f"dtype={self._constant(t.dtype)}, device={self._constant(t.device)}"
        if not t.is_contiguous():
            return f"{self._constant(torch.empty_strided)}({tuple(t.shape)}, {t.stride()}, {how})"
        for name, _, like in self._owners:
            if name[0] == "g" and like.shape == t.shape and like.dtype == t.dtype and like.is_contiguous():
                return f"{self._constant(torch.empty_like)}({name})"  # 0.5 us faster than empty
        return f"{self._constant(torch.empty)}({tuple(t.shape)}, {how})"

    def _print_address(self, value, integers):
        """Return an expression for an argument of a launch, in which addresses stand for tensors. integers: see note_launch."""
        if type(value) is tuple:
            return f"({''.join(f'{self._print_address(item, integers)}, ' for item in value)})"
        if isinstance(value, Tensor):
            return self._find_address(value.data_ptr(), value.untyped_storage().data_ptr())
        if integers and type(value) is int and value >= _LEAST_ADDRESS:
            return self._find_address(value)
        if type(value) in (int, bool, NoneType) or (type(value) is float and math.isfinite(value)):
            return repr(value)  # Python joins literals to constant tuples
        return self._constant(value)

    def _find_address(self, address, storage=None):
        same = {p for _, p, t in self._owners if t.data_ptr() == address}
        if len(same) == 1:
            return same.pop()
        inside = []
        for _, p, t in self._owners:
            start = t.untyped_storage().data_ptr()
            if start <= address < start + t.untyped_storage().nbytes() and storage in (None, start):
                inside.append((p, t.data_ptr()))
        if same or len(inside) != 1:
            raise _Unknown
        ((p, start),) = inside
        return f"{p} + {address - start}"

    def _print_tensors(self, value):
        """Return an expression for an argument of an operator."""
        if isinstance(value, tuple | list):
            items = "".join(f"{self._print_tensors(item)}, " for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items})"
        if not isinstance(value, Tensor):
            return self._constant(value)
        same = {name for name, _, t in self._owners if _geometry(t) == _geometry(value)}
        if len(same) == 1:
            return same.pop()
        owners = [(name, t) for name, _, t in self._owners if self._holds(t, value) and t.dtype == value.dtype]
        if same or len(owners) != 1:
            raise _Unknown
        ((name, t),) = owners
        offset = value.storage_offset() - t.storage_offset()
        return f"{name}.as_strided({tuple(value.shape)}, {value.stride()}, {name}.storage_offset() + {offset})"

    def _allocate_as_returned(self, found):
        """Let a step that allocates a tensor of which a view is returned allocate the view."""
        for t in found if isinstance(found, tuple | list) else (found,):
            for i, (function, out, *rest) in enumerate(self.steps if t is not None else ()):
                is_whole = function is None and self._holds(out, t) and t.dtype == out.dtype and t.numel() == out.numel()
                if is_whole and t.is_contiguous() and out.is_contiguous():
                    self.steps[i] = (None, t, *rest)
        return found

    def _print_output(self, found):
        if isinstance(found, tuple | list):
            items = "".join(f"{self._print_output(t)}, " for t in found)
            return f"[{items}]" if isinstance(found, list) else f"({items})"
        if found is None:
            return "None"
        same = {name for name, _, t in self._owners if _geometry(t) == _geometry(found)}
        if len(same) != 1 or (name := same.pop())[0] == "g":
            raise _Unknown
        return name

    def _holds(self, t, other):
        return isinstance(other, Tensor) and t.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

    def _constant(self, value):
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


def _storages(tree):
    """Yield the addresses of the storages of all tensors in nested tuples and lists."""
    if isinstance(tree, Tensor):
        yield tree.untyped_storage().data_ptr()
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _storages(item)


def _geometry(t):
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def note_launch(start: Callable[..., object], args: tuple, hooks: Sequence = (), integers: bool = False) -> None:
    """Note that start(*args) launched a kernel. start may get addresses in place of the tensors in args.

    hooks: as long as it is not empty, the call is not repeated. integers: integers in args may be addresses.
    """
    if _local.recording is not None:
        _local.recording.steps.append((note_launch, start, args, {"integers": integers}))
        _local.recording.hooks.append(hooks)


def is_recording() -> bool:
    return _local.recording is not None


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


def repeatable(function, tensor_count: int, most_calls: int = 4096):
    """Return the function, which repeats known calls.

    Its arguments are so many tensors or None, then values that are not tensors, of which the last is the backend. A call is
    recorded when it is seen for the second time, so shapes that come once cost little. most_calls: how many are kept.
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
                torch.empty(0, dtype=torch.float32, device="cpu")
                recording.is_complete = len(recording.steps) == 1  # False: a context hides operators from modes
                recording.steps.clear()
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
        try:
            call = calls.get(key)
        except TypeError:  # PyTorch's dispatcher gives several numbers as a list
            values = tuple(tuple(value) if type(value) is list else value for value in args[tensor_count:])
            key = *key[:2], values, *key[3:]
            call = calls.get(key)
        if type(call) is _Call:
            for hooks in call.hooks:
                if hooks:
                    return run_plainly(args)
            if dispatch_mode_count() > 0:
                with without_modes():
                    return call.run(tensors, addresses)
            return call.run(tensors, addresses)
        if call is _NEVER:
            return run_plainly(args)
        if len(calls) >= most_calls:
            calls.clear()
        if call is None:
            calls[key] = _ONCE
            return run_plainly(args)
        return record(key, args, tensors)

    return run
