"""Map a (T, ...) tensor of any strides to T steps x R rows x C contiguous columns, the shape that the LIF kernels use.

LIF is elementwise except over time, and except for parameters per channel of the last axis. So the kernels may visit the other
axes in any dense order. The output takes the memory order of x. The kernels read x in place if one row stride describes it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory
from .tuning import Tuning

LIF_CHECKPOINT_STEPS = 16  # steps between the membranes that the backward pass starts from; for T <= 16 there are none
# lif's kernels compute the norm that makes the thresholds up to these sizes; beyond them, a pass over x precedes the kernel.
# Triton: bytes of all steps of a row, in the dtype of the arithmetic. A program holds them in registers, without spills.
NORM_BYTES_TRITON = 16384
NORM_COLUMNS_CPU = 4096  # a task holds 17 steps of a row on its stack: 272 KiB, or 544 KiB of float64


class Layout(NamedTuple):
    order: tuple | None  # the axes after T, outermost first; None: the tensors are contiguous
    R: int
    C: int


def _dense(x: Tensor) -> bool:
    """True if x is dense (no gaps, no overlap) and T is not the fastest-varying axis."""
    axes = sorted((stride, size, axis) for axis, (stride, size) in enumerate(zip(x.stride(), x.shape)) if size != 1)
    expected = 1
    for stride, size, _ in axes:
        if stride != expected:
            return False
        expected *= size
    return not axes or axes[0][2] != 0


def empty_like(x: Tensor, dtype: torch.dtype, per_channel: bool) -> Tensor:
    """Allocate an output for x: in the memory order of x if x is dense, else contiguous."""
    if x.is_contiguous() or (not per_channel and x.numel() > 0 and _dense(x)):
        return memory.empty_like(x, dtype)
    return memory.empty_contiguous(x.shape, dtype, x)


def empty_state_like(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a state for one step of ``out``, in the same memory order."""
    if out.is_contiguous() or out.numel() == 0:
        return memory.empty_contiguous(out.shape[1:], dtype, out)
    return memory.empty_like(out.select(0, 0), dtype)


def empty_states_like(out: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """Allocate the states of ``steps`` steps, one after the other."""
    step = empty_state_like(out, dtype).stride()
    shape = (steps, *out.shape[1:])
    return memory.empty_strided(shape, (math.prod(out.shape[1:]), *step), dtype, out)


def _view(t: Tensor, order, shape) -> Tensor | None:
    """Return t as a view of shape (T, R, C) with contiguous columns, or None if t has no view of that shape."""
    try:
        view = t.permute(0, *order).view(shape)
    except RuntimeError:
        return None
    return view if shape[2] == 1 or view.stride(2) == 1 else None


def layout_of(x: Tensor, out: Tensor, per_channel: bool) -> Layout:
    """Find rows and columns that are a view of ``out`` and, if possible, of x too. x must not be empty."""
    steps = x.shape[0]
    if x.is_contiguous():
        return _contiguous(x, x.numel() // steps, per_channel)
    axes = range(1, x.dim())
    order = tuple(axes) if per_channel else tuple(sorted(axes, key=lambda a: (-out.stride(a), a)))
    sizes = [x.shape[a] for a in order]
    found = None
    for split in (len(sizes) - 1,) if per_channel else range(len(sizes) + 1):
        candidate = Layout(order, math.prod(sizes[:split]), math.prod(sizes[split:]))
        shape = (steps, *candidate[1:])
        if _view(out, order, shape) is None:
            continue
        if _view(x, order, shape) is not None:
            return candidate
        found = found or candidate
    return found


def layout_of_step(x: Tensor, out: Tensor, per_channel: bool) -> Layout:
    """Same as layout_of, for tensors without the T axis."""
    if x.is_contiguous():
        return _contiguous(x, x.numel(), per_channel)
    return layout_of(x.unsqueeze(0), out.unsqueeze(0), per_channel)


def _contiguous(x, size, per_channel):
    columns = x.shape[-1] if per_channel else size
    return Layout(None, size // columns, columns)


def row_view(layout: Layout, t: Tensor) -> tuple[Tensor, int, int]:
    """Return (tensor to keep alive, stride of T, stride of R). Copies t if a view is impossible."""
    if t.is_contiguous() and layout.order is None:
        return t, layout.R * layout.C, layout.C
    order = layout.order or range(1, t.dim())
    shape = (t.shape[0], layout.R, layout.C)
    view = _view(t, order, shape)
    if view is None:
        view = t.permute(0, *order).reshape(shape).contiguous()
    return view, view.stride(0), view.stride(1)


def step_view(layout: Layout, v: Tensor) -> tuple[Tensor, int]:
    """Same as row_view, for a tensor without the T axis: (tensor, stride of R)."""
    if v.is_contiguous() and layout.order is None:
        return v, layout.C
    view, _, stride = row_view(layout, v.unsqueeze(0))
    return view, stride


def wkv_rows(B: int, L: int, sequences: int | None, tokens: int) -> int:
    """Number of rows of a table, such as a WKV checkpoint, with one row per tile of ``tokens`` tokens.

    The rows of sequence b of a batch start at b * ceil(L / tokens). The rows of packed sequence n, which starts at token s,
    start at s // tokens + n.
    """
    return B * -(-L // tokens) if sequences is None else L // tokens + sequences


def sequences(t: Tensor) -> Tensor:
    """Reshape a nonempty (..., L, C) to (B, L, C) with contiguous channels. Copies if a view is impossible."""
    t = t.detach().reshape(-1, *t.shape[-2:])
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def same_strides(tensors: list) -> list:
    """Return the tensors with equal strides: contiguous copies if the strides differ."""
    return tensors if len({t.stride() for t in tensors}) == 1 else [t.contiguous() for t in tensors]


def spiking_tile(T: int, backend: str, tuning: Tuning) -> int:
    """Tokens between two checkpoints of spiking_wkv: as many as its backward pass can hold, in registers or in a cache."""
    pairs = tuning.spiking_pairs_cpu if backend == "cpu" else tuning.spiking_pairs_triton
    tokens = min(pairs, tuning.wkv_checkpoint_tokens)
    while tokens > 2 and tokens * T > pairs:
        tokens //= 2
    return tokens


def norm_columns(backend: str, T: int, itemsize: int) -> int:
    """The most channels for which lif's kernel computes the norm of x. itemsize: of the dtype of the arithmetic.

    Triton: 1024 for T <= 4, 512 for T <= 8, 256 for T <= 16; float64: 512, 256 and none.
    """
    if backend == "cpu":
        return NORM_COLUMNS_CPU
    return NORM_BYTES_TRITON // itemsize // max(4, 1 << (T - 1).bit_length()) if T * itemsize <= 64 else 0


def sum_over_steps(partial: Tensor, p: Tensor | None, T: int) -> Tensor:
    """Return the partial sums of a parameter's gradient, (1, number of values), from its gradients per step and row."""
    if p is None or p.numel() == 1:
        return partial.sum().reshape(1)
    return partial.view(1, -1) if p.numel() == partial.numel() else partial.view(T, -1).sum(0, keepdim=True)


class ChannelLayout(NamedTuple):
    """The memory order of outputs whose channels lie on any axis: T x B x C x S values, or T x B x C without an inner axis."""

    order: tuple  # the axes after T, outermost first
    B: int  # the product of the axes before the channels
    C: int
    S: int | None  # the product of the axes behind them, in rows of contiguous values; None: the channels are contiguous
    inner: int = 1  # S, if a row holds the values of all channels

    def with_long_rows(self) -> "ChannelLayout":
        """Return the layout of the same tensors as T x B x (C S) values."""
        return self if self.S is None else self._replace(S=None, inner=self.S)

    def empty(self, like: Tensor, dtype: torch.dtype, steps: int | None) -> Tensor:
        """Allocate an output for x, or with other steps, or a state without the T axis (steps=None)."""
        sizes, strides, stride = like.shape[1:], [0] * (like.dim() - 1), 1
        for axis in reversed(self.order):
            strides[axis - 1] = stride
            stride *= max(sizes[axis - 1], 1)
        first = () if steps is None else (steps,)
        if strides == sorted(strides, reverse=True):
            return memory.empty_contiguous((*first, *sizes), dtype, like)
        return memory.empty_strided((*first, *sizes), (*(stride for _ in first), *strides), dtype, like)

    def view(self, t: Tensor) -> Tensor:
        """Return a tensor with the axes of x as (T, B, C, S) or (T, B, C), in place if one stride of rows describes it."""
        rows = t.permute(0, *self.order)
        rows = rows.reshape(t.shape[0], self.B, self.C * self.inner, *(() if self.S is None else (self.S,)))
        if rows.is_contiguous() or not any(rows.stride()):
            return rows
        shape = rows.shape[0], rows.shape[1:-1].numel(), rows.shape[-1]
        return rows if _view(rows, range(1, rows.dim()), shape) is not None else rows.contiguous()

    def state(self, t: Tensor) -> Tensor:
        return self.view(t.unsqueeze(0)).squeeze(0)

    def spread(self, p: Tensor) -> Tensor:
        """Return a value per channel, (C,), or per step and channel, (T, C), as parameter of a neuron for such a view."""
        if self.inner > 1:
            return p.unsqueeze(-1).expand(self.C, self.inner).reshape(-1)
        if self.S is None:
            return p.contiguous()
        p = p.unsqueeze(-1).unsqueeze(-3)
        return p.expand(*p.shape[:-3], self.B, self.C, 1)

    def gather(self, d: Tensor) -> Tensor:
        """Sum a gradient that has the shape of ``spread`` over the values of each channel."""
        if self.inner > 1:
            return d.view(self.C, self.inner).sum(-1)
        return d if self.S is None else d.sum(-3).squeeze(-1)


def channel_layout(x: Tensor, axis: int, per_step: bool) -> ChannelLayout:
    """Choose the memory order of outputs for x, (T, ..), with channels on ``axis``.

    It is the order of x if x is dense and T is its outermost axis, else the order of a contiguous tensor.

    per_step: parameters have a value per step and channel, so channels must not be the innermost axis.
    """
    order = list(range(1, x.dim()))
    if not x.is_contiguous() and x.numel() and _dense(x) and x.shape[0] * x.stride(0) == x.numel():
        order.sort(key=lambda a: (-x.stride(a), a))
    if per_step and math.prod(x.shape[a] for a in order[order.index(axis) + 1 :]) == 1:
        order.remove(axis)
        order.insert(0, axis)
    at = order.index(axis)
    inner = math.prod(x.shape[a] for a in order[at + 1 :])
    outer = math.prod(x.shape[a] for a in order[:at])
    return ChannelLayout(tuple(order), outer, x.shape[axis], None if inner == 1 and not per_step else inner)
