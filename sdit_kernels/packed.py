"""Spikes kept as bits: the context ``packed_spikes``, and what it knows about tensors.

A tensor is known by its storage and version: ``_known`` holds a weak reference to the storage, its version, and a description
of its elements. The ops note their spikes there (``note_spikes``). A mode, which sees PyTorch's operators, notes the results of
operators that only move or cast elements. When autograd saves a known tensor, the hook packs its storage.
"""

import functools
import importlib
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, memory, tuning
from ._torch import (
    OperatorMode,
    UntracedMode,
    compiler_callback,
    dispatch_mode_count,
    innermost_hooks,
    is_tracing,
    pop_hooks,
    push_hooks,
    skip_frames,
    transforms_active,
    without_modes,
)
from .dtypes import DATA_DTYPES, state_dtype
from .levels import BINARY, decode, encode
from .reference.pack import Window, bits_of

_PACKED_DTYPES = (*DATA_DTYPES, torch.uint8, torch.int8, torch.bool)  # what the kernels take
_SMALL = 4096  # bytes; a tensor with fewer is kept as it is
_MOST = 256  # values of a table
_PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


@functools.cache
def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"sdit_kernels.{backend}.pack")


# --- which values the elements of a tensor can have -------------------------------------------------------------------------


class Values:
    """A table of values. Code i stands for the multiple first + i of a unit; the last code may stand for NaN.

    table: the values in the dtype of the tensor. inverse: 1 / unit. It is enough to find the code of a value: the values are
    multiples of the unit, rounded to the dtype.
    """

    def __init__(self, table: Tensor, first: int, inverse: float, nan: bool):
        self.table, self.first, self.inverse, self.nan = table, first, inverse, nan
        self.n = table.numel()
        self.last = first + self.n - 1 - nan  # the greatest multiple
        self.has_zero = first <= 0 <= self.last
        self.is_binary = table.tolist() == [0, 1]
        self._on = {table.device: table}
        self._cast: dict[torch.dtype, Values | None] = {table.dtype: self}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self.table.to(device)
        return self._on[device]

    def cast(self, dtype: torch.dtype) -> "Values | None":
        """Return the values after a cast of the tensor. None: the cast changes values, or the tensor takes few bytes."""
        if dtype not in self._cast:
            found = None
            if dtype not in _PACKED_DTYPES:
                pass
            elif dtype.is_floating_point or (
                not self.nan and torch.equal(self.table.to(dtype).to(self.table.dtype), self.table)
            ):
                found = _unless_wide(self.table.to(dtype), self.first, self.inverse, self.nan)
            self._cast[dtype] = found
        return self._cast[dtype]


def _unless_wide(table, first, inverse, nan):
    """Return the Values, or None if a code takes as many bits as an element."""
    wide = table.numel() > _MOST or bits_of(table.numel()) >= 8 * table.itemsize
    return None if wide else Values(table, first, inverse, nan)


@functools.lru_cache(maxsize=512)
def _multiples(first: int, last: int, scale: float, divisor: int, nan: bool, dtype: torch.dtype) -> Values | None:
    """Return the multiples first to last of scale / divisor, rounded as the ops round them."""
    if last - first + 1 + nan > _MOST or max(-first, last) >= _MOST:
        return None
    state = state_dtype(dtype)
    table = (torch.arange(first, last + 1, dtype=state, device="cpu") * scale / divisor).to(dtype)
    if nan:
        table = torch.cat([table, table.new_full((1,), math.nan)])
    return _unless_wide(table, first, divisor / scale, nan)


@functools.lru_cache(maxsize=512)
def spike_values(levels: str, dtype: torch.dtype, steps: int | None) -> Values | None:
    """Return the values of spikes with these levels, as ``encode`` returns them; with ``steps``, of their mean over time."""
    kind, *rest = decode(levels)
    (lo, hi), scale = ((0, 1), 1.0) if kind == "binary" else ((-1, 1), 1.0) if kind == "ternary" else (rest[0], rest[2])
    if steps is not None and steps > 1:
        if math.frexp(scale)[0] != 0.5:  # a sum of multiples of the scale is exact only if it is a power of two
            return None
        lo, hi = lo * steps, hi * steps
    # Binary and ternary spikes come from comparisons, which a NaN fails. Integer levels keep a NaN.
    return _multiples(lo, hi, scale, steps or 1, kind == "integer" and dtype.is_floating_point, dtype)


@functools.lru_cache(maxsize=512)
def _sum_of(a: Values, b: Values) -> Values | None:
    """Return the values of the sum of two tensors: exact if both are multiples of the same power of two."""
    scale = 1 / a.inverse
    if a.inverse != b.inverse or math.frexp(scale)[0] != 0.5:
        return None
    return _multiples(a.first + b.first, a.last + b.last, scale, 1, a.nan or b.nan, a.table.dtype)


# --- packed data ------------------------------------------------------------------------------------------------------------


def _allocate(shape, dtype, backend, like):
    """Return memory for elements that a backward pass restores."""
    return memory.empty_again(shape, dtype) if backend == "cpu" else memory.empty_contiguous(shape, dtype, like)


class _Bits:
    """The elements of a storage as codes.

    readers: how many operators have saved the storage and not yet read it. On the CPU, the tensor that was restored for the
    first stays until the last one reads it: q, k and v of an attention have the same input, and so have a block and its
    shortcut. On a GPU they may run on different streams.
    """

    __slots__ = ("__weakref__", "backend", "dtype", "readers", "restored", "values", "words")

    def __init__(self, words, values, backend, dtype):
        self.words, self.values, self.backend, self.dtype = words, values, backend, dtype
        self.readers, self.restored = 0, None

    def read(self, shape) -> Tensor:
        """Restore the elements for one of the readers."""
        self.readers -= 1
        t, version = self.restored or (None, 0)
        if t is None or t._version != version:
            t = self.restore(shape)
        self.restored = (t, t._version) if self.readers > 0 and self.backend == "cpu" else None
        return t if t.shape == shape else t.view(shape)

    def restore(self, shape) -> Tensor:
        t = _allocate(shape, self.dtype, self.backend, self.words)
        _kernels(self.backend).unpack(self.words, self.values, t, tuning.current())
        return t


def _pack_values(flat, values, backend, parts=1):
    words, exact = _kernels(backend).pack(flat, values, tuning.current(), parts)
    return _Bits(words, values, backend, flat.dtype) if exact else None


class _Codes:
    """The indices of a max-pooling as places in their windows."""

    __slots__ = ("__weakref__", "bits", "shape", "window")

    def __init__(self, bits, shape, window):
        self.bits, self.shape, self.window = bits, shape, window

    def restore(self, shape) -> Tensor:
        codes = self.bits.restore((math.prod(shape),))
        flat = memory.empty_contiguous(codes.shape, torch.int64, codes)
        _kernels(self.bits.backend).window_indices(codes, self.shape, self.window, flat, tuning.current())
        return flat.view(shape)


class _Narrow:
    """Integers in a narrower dtype."""

    __slots__ = ("__weakref__", "flat")

    def __init__(self, flat):
        self.flat = flat

    def restore(self, shape) -> Tensor:
        return self.flat.long().view(shape)


class Indices(NamedTuple):
    """The elements of a tensor of indices of a pooling over planes with so many elements."""

    plane: int
    shape: tuple  # as in reference.pack.window_codes
    window: Window | None  # None: the windows have different sizes

    def pack(self, flat, backend):
        n = self.window.size[0] * self.window.size[1] if self.window else _MOST + 1
        if n > _MOST:
            dtype = torch.int16 if self.plane <= 1 << 15 else torch.int32
            return _Narrow(flat.to(dtype)) if self.plane <= 1 << 31 else None
        codes, exact = _kernels(backend).window_codes(flat, self.shape, self.window, tuning.current())
        values = _multiples(0, max(n, 2) - 1, 1.0, 1, False, torch.uint8)
        if not exact or values is None:  # 129 to 256 places take 8 bits
            return _Codes(_Plain(codes, backend), self.shape, self.window) if exact else None
        return _Codes(_pack_values(codes, values, backend), self.shape, self.window)


class _Plain(NamedTuple):
    """Codes of 8 bits."""

    codes: Tensor
    backend: str

    def restore(self, shape) -> Tensor:
        return self.codes.view(shape)


class Counts(NamedTuple):
    """The elements of a tensor are integers from 0 to 32,767 times a power of two: sums of products of spikes."""

    unit: float
    most: int  # the greatest integer

    def pack(self, flat, backend):
        numbers, exact = _kernels(backend).pack_counts(flat, self.unit, tuning.current())
        return _Multiples(numbers, self.unit, backend, flat.dtype) if exact else None

    def cast(self, dtype: torch.dtype) -> "Counts | None":
        return self if dtype in (torch.float32, torch.float64) else None


class _Multiples:
    """Numbers of 16 bits and their unit."""

    __slots__ = ("__weakref__", "backend", "dtype", "numbers", "unit")

    def __init__(self, numbers, unit, backend, dtype):
        self.numbers, self.unit, self.backend, self.dtype = numbers, unit, backend, dtype

    def restore(self, shape) -> Tensor:
        t = _allocate(shape, self.dtype, self.backend, self.numbers)
        _kernels(self.backend).unpack_counts(self.numbers, self.unit, t, tuning.current())
        return t


# --- known tensors ----------------------------------------------------------------------------------------------------------


class _Known(weakref.ref):
    """A weak reference to a storage, and what is known about its elements."""

    __slots__ = ("dtype", "key", "kind", "nbytes", "packed", "parts", "version")
    key: int
    nbytes: int
    version: int
    dtype: torch.dtype
    kind: "Values | Counts | Indices"
    packed: "weakref.ref | None"
    parts: int  # as in cpu/pack.py


_known: dict[int, _Known] = {}  # by id(storage). A storage keeps its Python object while it lives


def _forget(reference):
    if _known.get(reference.key) is reference:
        del _known[reference.key]


def _find(t: Tensor) -> _Known | None:
    """Return what is known about the storage of t, if t still has the version that was noted."""
    if type(t) not in _PLAIN_TENSOR_TYPES or t.layout is not torch.strided:
        return None
    storage = t.untyped_storage()
    known = _known.get(id(storage))
    if known is None or known() is not storage or known.dtype != t.dtype or t._version != known.version or t.is_neg():
        return None
    return known


def _values_at(t: Any) -> Values | None:
    known = _find(t) if isinstance(t, Tensor) else None
    return known.kind if known is not None and type(known.kind) is Values else None


def _numbers_at(t: Any) -> "Values | Counts | None":
    known = _find(t) if isinstance(t, Tensor) else None
    return known.kind if known is not None and type(known.kind) in (Values, Counts) else None


def _note(t: Tensor, kind: "Values | Counts | Indices", parts: int = 1) -> None:
    if type(t) not in _PLAIN_TENSOR_TYPES or t.is_inference() or t.is_meta:
        return
    storage = t.untyped_storage()
    size = storage.nbytes()
    if size and size == t.numel() * t.itemsize:  # t covers the storage
        key = id(storage)
        known = _known[key] = _Known(storage, _forget)
        known.key, known.nbytes, known.version, known.dtype = key, size, t._version, t.dtype
        known.kind, known.packed, known.parts = kind, None, parts


def note_spikes(s: Tensor, levels: Any = None, steps: int | None = None, parts: int | None = None) -> None:
    """Inside packed_spikes, note that s is the spikes of an op, or with ``steps`` their mean over so many time steps.

    parts: as in cpu/pack.py; None: the time steps.
    """
    if _local.depth and not transforms_active() and not is_tracing():
        values = spike_values(BINARY if levels is None else encode(levels), s.dtype, steps)
        if values is not None:
            _note(s, values, 1 if steps is not None else parts or s.shape[0])


def note_same(out: Tensor, source: Tensor) -> None:
    """Note that out has values of source only."""
    if _local.depth:
        _note_same(out, (source,), None)


# --- what autograd saves ----------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """A view of a packed storage."""

    packed: Any
    size: torch.Size
    stride: tuple
    offset: int
    elements: int  # of the storage


def _pack_storage(known: _Known, t: Tensor):
    """Return the packed storage of t. All tensors that share the storage share it. None: an element is not as noted."""
    packed = None if known.packed is None else known.packed()
    if packed is None:
        n, kind, backend = known.nbytes // t.itemsize, known.kind, dispatch.choose(t.device)
        with without_modes():
            flat = t  # the CPU kernel takes only its address
            if backend != "cpu" or type(kind) is not Values or t.numel() != n or not t.is_contiguous():
                flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage(), 0, (n,), (1,))
            packed = _pack_values(flat, kind, backend, known.parts) if type(kind) is Values else kind.pack(flat, backend)
        known.packed = None if packed is None else weakref.ref(packed)
    return packed


def _pack(t):
    known = _find(t)
    if known is not None and known.nbytes >= _SMALL and not is_tracing():
        packed = _pack_storage(known, t)
        if packed is not None:
            if type(packed) is _Bits:
                packed.readers += 1
            return _Saved(packed, t.size(), t.stride(), t.storage_offset(), known.nbytes // t.itemsize)
        _known.pop(known.key, None)
    return t, None if t.is_inference() else t._version


def _unpack(saved):
    if type(saved) is _Saved:
        packed, size, stride, offset, n = saved
        restore = packed.read if type(packed) is _Bits else packed.restore
        t = restore(size if size.numel() == n else (n,))
        return t if t.stride() == stride else t.as_strided(size, stride, offset)
    t, version = saved
    if version is not None and t._version != version:  # autograd does not check this where hooks are active
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{t.type()} {list(t.shape)}] is at version {t._version}; expected version {version} instead"
        )
    return t


_HOOKS = torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def apply_without_hooks(apply: Callable, tensors: tuple, rest: tuple, data: int) -> Any:
    """Call apply(*tensors, rest) of an autograd.Function. Our hooks see what it saves only if one of the first ``data`` tensors
    is known.

    They take 5 us per tensor in both passes together.
    """
    given = 0
    for t in tensors:
        given += t is not None
    hooks = innermost_hooks(True) if _local.depth and given > 2 else None
    if hooks is None or hooks[0] is not _pack or pop_hooks is None or push_hooks is None:
        return apply(*tensors, rest)
    for t in tensors[:data]:
        if t is not None and id(t.untyped_storage()) in _known:
            return apply(*tensors, rest)
    pop_hooks()
    try:
        return apply(*tensors, rest)
    finally:
        push_hooks(_pack, _unpack)


# --- operators that move elements -------------------------------------------------------------------------------------------

_aten = torch.ops.aten


def _note_same(out, args, kwargs):
    values = _numbers_at(args[0])
    if values is not None and out.dtype == args[0].dtype:
        _note(out, values)


def _note_cast(out, args, kwargs):
    values = _numbers_at(args[0])
    if values is not None and (values := values.cast(out.dtype)) is not None:
        _note(out, values)


def _note_joined(out, args, kwargs):
    values = _values_at(args[0][0])
    if values is not None and all(_values_at(t) is values for t in args[0][1:]):
        _note(out, values)


def _note_padded(out, args, kwargs):
    """Zeros are added."""
    values = _values_at(args[0])
    if values is not None and values.has_zero:
        _note(out, values)


def _note_padded_with(out, args, kwargs):
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if value == 0 and math.copysign(1, value) > 0:
        _note_padded(out, args, kwargs)


def _note_relu(out, args, kwargs):
    values = _values_at(args[0])
    if values is not None and (values.first >= 0 or values.has_zero):
        _note(out, values)


def _note_sum(out, args, kwargs):
    a, b = _values_at(args[0]), _values_at(args[1])
    if a is not None and b is not None and kwargs.get("alpha", 1) == 1 and a.table.dtype == b.table.dtype:
        values = _sum_of(a, b)
        if values is not None:
            _note(out, values)


def _unit_of(a: "Values | Counts") -> tuple[float, int] | None:
    """Return (unit, greatest multiple) of values that are multiples of a power of two and not negative, or None."""
    if type(a) is Counts:
        return a.unit, a.most
    unit = 1 / a.inverse
    return (unit, a.last) if a.first >= 0 and not a.nan and math.frexp(unit)[0] == 0.5 else None


def _note_multiples(out, unit, most):
    """Note that the elements of out are multiples of a power of two, from 0 to ``most``."""
    values = _multiples(0, most, unit, 1, False, out.dtype) if most < _MOST else None
    if values is not None:
        _note(out, values)
    elif most < 1 << 14 and out.dtype in (torch.float32, torch.float64):
        _note(out, Counts(unit, most))


def _note_matmul(out, args, kwargs):
    """The sums are exact in any order: integers below 2^14, times a power of two. TF32 may round them to other integers."""
    a, b = _numbers_at(args[0]), _numbers_at(args[1])
    if a is not None and b is not None and (a := _unit_of(a)) is not None and (b := _unit_of(b)) is not None:
        _note_multiples(out, a[0] * b[0], a[1] * b[1] * args[0].shape[-1])


def _note_scaled(out, args, kwargs):
    a, factor = _numbers_at(args[0]), args[1]
    a = None if a is None else _unit_of(a)
    if a is not None and factor > 0 and math.frexp(factor)[0] == 0.5:
        _note_multiples(out, a[0] * factor, a[1])


def _note_product(out, args, kwargs):
    """A binary tensor times values that are not negative; 0 times a negative value is -0."""
    if isinstance(args[1], (int, float)):
        return _note_scaled(out, args, kwargs)
    a, b = _values_at(args[0]), _values_at(args[1])
    if a is not None and b is not None and a.table.dtype == b.table.dtype:
        values = b if a.is_binary else a if b.is_binary else None
        if values is not None and values.first >= 0 and values.has_zero:
            _note(out, values)


def _pair(value):
    value = tuple(value)
    return (*value, *value)[:2]


def _note_pool(out, args, kwargs):
    """max_pool2d_with_indices(x, size, stride=[], padding=0, dilation=1, ceil_mode=False)"""
    x, (pooled, indices) = args[0], out
    _note_same(pooled, args, kwargs)
    stride, padding, dilation = (*args[2:5], *((), (0,), (1,))[max(len(args) - 2, 0) :])[:3]
    size = _pair(args[1])
    window = Window(size, _pair(stride) if stride else size, _pair(padding), _pair(dilation), x.shape[-1])
    planes = indices.shape[:-2].numel()
    if indices.is_contiguous():
        shape = planes, *indices.shape[-2:], 1
    elif indices.dim() == 4 and indices.is_contiguous(memory_format=torch.channels_last):
        shape = indices.shape[0], *indices.shape[-2:], indices.shape[1]
    else:
        return
    _note(indices, Indices(x.shape[-2:].numel(), shape, window))


def _note_narrow(axes, out, args, kwargs):
    """A pooling whose windows are not all alike, over so many axes."""
    _note_same(out[0], args, kwargs)
    _note(out[1], Indices(args[0].shape[-axes:].numel(), (), None))


_rules: dict[Any, Callable[..., None]] = {
    **dict.fromkeys(
        (
            _aten.clone.default, _aten.index_select.default, _aten.index.Tensor, _aten.gather.default, _aten.repeat.default,
            _aten.roll.default, _aten.flip.default, _aten.take.default, _aten.masked_select.default,
        ),
        _note_same,
    ),
    _aten._to_copy.default: _note_cast,
    _aten.cat.default: _note_joined,
    _aten.stack.default: _note_joined,
    _aten.constant_pad_nd.default: _note_padded_with,
    _aten.im2col.default: _note_padded,
    _aten.relu.default: _note_relu,
    _aten.add.Tensor: _note_sum,
    _aten.mul.Tensor: _note_product,
    _aten.mul.Scalar: _note_scaled,
    _aten.mm.default: _note_matmul,
    _aten.bmm.default: _note_matmul,
    _aten.max_pool2d_with_indices.default: _note_pool,
    _aten.adaptive_max_pool2d.default: functools.partial(_note_narrow, 2),
    _aten.max_pool3d_with_indices.default: functools.partial(_note_narrow, 3),
}  # fmt: skip


_RULES = {id(function): rule for function, rule in _rules.items()}  # an operator computes its hash in Python


def _dispatch(function, args, kwargs):
    out = function(*args, **kwargs or {})
    rule = _RULES.get(id(function))
    if rule is not None and not is_tracing():
        rule(out, args, kwargs or {})
    return out


@functools.cache
def _untraced():
    return torch.compiler.disable(_dispatch)


class _Mode(OperatorMode):
    """See PyTorch's operators, and note the results of those in _RULES."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if compiler_callback() is not None:  # or it would trace what runs here
            return _untraced()(function, args, kwargs)
        out = function(*args, **kwargs or {})  # repeats the code of _dispatch, because this runs for every operator
        rule = _RULES.get(id(function))
        if rule is not None and not is_tracing():
            rule(out, args, kwargs or {})
        return out


class _ModeBesideCompiler(UntracedMode):
    """The same where the compiler is loaded, if it cannot skip the frames of _Mode."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _dispatch(function, args, kwargs)


# --- the context ------------------------------------------------------------------------------------------------------------


class _Local(threading.local):
    depth = 0  # how many of the thread's contexts are active

    def __init__(self):
        self.entered: list[bool] = []  # per context, True if it is active
        self.modes = _Mode(), _ModeBesideCompiler()
        self.mode = self.modes[0]


_local = _Local()


def unseen():
    """Return a context in which the mode of packed_spikes does not see the operators: each then takes 3 to 10 us less."""
    return nullcontext() if not _local.depth or has_other_modes() else without_modes()


def has_other_modes() -> bool:
    """True if a mode other than the mode of packed_spikes must see the operators."""
    count = dispatch_mode_count()
    return count is True or count > (_local.depth > 0)  # True: this version of PyTorch does not tell the number


class packed_spikes:  # noqa: N801, a context manager is called like a function
    """Keep spikes as bits for the backward pass, in this block.

    A layer that reads spikes, such as a convolution or a matrix multiplication, keeps them for its backward pass. In this block
    it keeps their codes: 1 bit per binary spike, 2 bits per ternary spike, ceil(log2(n)) bits per spike of n levels. The
    backward pass restores them exactly, so gradients stay the same bit for bit. It may run inside or after the block::

        bits kept per spike = ceil(log2(number of values)),    instead of 32 in float32, 16 in bfloat16

    The spikes of all ops and modules of this package are known, also means over time, and tensors made of them by copies,
    views, casts, concatenation, padding, ReLU, max-pooling, sums and products of spikes. Layers with the same input share its
    bits. The indices that max_pool2d keeps take ceil(log2(size of the window)) bits instead of 64. All other tensors stay as
    they are, and so do spikes that were changed in place, and tensors of less than 4 KiB.

    The block may be nested and entered again, and ``packed_spikes()`` decorates functions. It belongs to one thread. Other
    hooks on saved tensors, such as activation checkpointing, act instead of it inside their own blocks. Inside the transforms
    of torch.func and torch.jit.trace it does nothing. torch.func.grad, vjp, jacrev and hessian raise PyTorch's error if they
    are called inside the block. Functions compiled by torch.compile run there without compilation; with fullgraph=True they
    raise PyTorch's error. Each operator of PyTorch takes about 3 us longer in the block.

    Raises:
        RuntimeError: torch.compile with fullgraph=True compiles the ``with`` statement.
        TypeError: the decorated object is not a function, or is a generator or coroutine function.

    Example:
        >>> import torch
        >>> from sdit_kernels import lif, packed_spikes
        >>> linear = torch.nn.Linear(384, 384)
        >>> with packed_spikes():
        ...     y = linear(lif(torch.randn(4, 8, 394, 384)))  # linear keeps 0.6 MB instead of 19.4 MB
        >>> y.sum().backward()
    """

    def __enter__(self) -> "packed_spikes":
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "packed_spikes() cannot be entered in a function that torch.compile compiles, because nothing is compiled "
                "inside it: call the function without torch.compile, or leave packed_spikes() out"
            )
        active = not transforms_active() and not is_tracing()
        if active:
            _HOOKS.__enter__()
            if not _local.depth:
                _local.mode = _local.modes["torch._dynamo" in sys.modules and not skip_frames(_Mode.__torch_dispatch__)]
                _local.mode.__enter__()
            _local.depth += 1
        _local.entered.append(active)
        return self

    def __exit__(self, *error) -> None:
        if _local.entered.pop():
            _local.depth -= 1
            if not _local.depth:
                _local.mode.__exit__(*error)
            _HOOKS.__exit__(*error)

    def __call__(self, function: Callable) -> Callable:
        """Return the function, run in this context."""
        if not callable(function):
            raise TypeError(f"packed_spikes() decorates a function, got {type(function).__name__}")
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function) or inspect.isclass(function):
            raise TypeError(
                f"packed_spikes() decorates a function that runs when it is called, got {function!r}: use a with statement "
                "in it"
            )

        @functools.wraps(function)
        def run(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return run
