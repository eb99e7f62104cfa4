"""How a (T, ...) tensor of any strides is seen by the LIF kernels: T steps x R rows x C columns, columns contiguous.

LIF is elementwise but for time (and for parameters per channel of the last axis), so any dense order of the other axes will do:
outputs take the order of x, and x is read in place whenever one row stride can describe it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory
from .tuning import Tuning

STRIDE = 16  # steps between the membranes kept for the backward pass; T <= STRIDE keeps none


class Layout(NamedTuple):
    order: tuple | None  # the axes after T, outermost first; None: as they are, and everything contiguous
    R: int
    C: int


def _dense(x: Tensor) -> bool:
    """x fills its memory, and T is not its innermost axis."""
    axes = sorted((stride, size, axis) for axis, (stride, size) in enumerate(zip(x.stride(), x.shape)) if size != 1)
    expected = 1
    for stride, size, _ in axes:
        if stride != expected:
            return False
        expected *= size
    return not axes or axes[0][2] != 0


def empty_like(x: Tensor, dtype: torch.dtype, per_channel: bool) -> Tensor:
    """An output for x: in x's own memory order where it is dense, else contiguous."""
    if x.is_contiguous() or (not per_channel and x.numel() > 0 and _dense(x)):
        return memory.empty_like(x, dtype)
    return memory.empty_contiguous(x.shape, dtype, x)


def empty_state_like(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A state for one step of ``out``, axes in the same memory order."""
    if out.is_contiguous() or out.numel() == 0:
        return memory.empty_contiguous(out.shape[1:], dtype, out)
    return memory.empty_like(out.select(0, 0), dtype)


def empty_states_like(out: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """``steps`` such states, one after the other."""
    step = empty_state_like(out, dtype).stride()
    shape = (steps, *out.shape[1:])
    return memory.empty_strided(shape, (math.prod(out.shape[1:]), *step), dtype, out)


def _view(t: Tensor, order, shape) -> Tensor | None:
    """t as ``shape`` = (T, R, C) with contiguous columns, or None."""
    try:
        view = t.permute(0, *order).view(shape)
    except RuntimeError:
        return None
    return view if shape[2] == 1 or view.stride(2) == 1 else None


def layout_of(x: Tensor, out: Tensor, per_channel: bool) -> Layout:
    """The view that serves ``out`` and, if there is one, x as well. x must not be empty."""
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
    """The same for tensors without the T axis."""
    if x.is_contiguous():
        return _contiguous(x, x.numel(), per_channel)
    return layout_of(x.unsqueeze(0), out.unsqueeze(0), per_channel)


def _contiguous(x, size, per_channel):
    columns = x.shape[-1] if per_channel else size
    return Layout(None, size // columns, columns)


def place(layout: Layout, t: Tensor) -> tuple[Tensor, int, int]:
    """(tensor to keep alive, stride of T, stride of R); copies where no view serves."""
    if t.is_contiguous() and layout.order is None:
        return t, layout.R * layout.C, layout.C
    order = layout.order or range(1, t.dim())
    shape = (t.shape[0], layout.R, layout.C)
    view = _view(t, order, shape)
    if view is None:
        view = t.permute(0, *order).reshape(shape).contiguous()
    return view, view.stride(0), view.stride(1)


def place_state(layout: Layout, v: Tensor) -> tuple[Tensor, int]:
    """The same for a tensor without the T axis."""
    if v.is_contiguous() and layout.order is None:
        return v, layout.C
    view, _, stride = place(layout, v.unsqueeze(0))
    return view, stride


def wkv_rows(B: int, L: int, sequences: int | None, tokens: int) -> int:
    """Rows of a WKV checkpoint, or of another table, with one row per tile of so many ``tokens``.

    Sequence b of a batch has rows b * ceil(L / tokens) and up; packed sequence n, which starts at token s, has rows
    s // tokens + n and up.
    """
    return B * -(-L // tokens) if sequences is None else L // tokens + sequences


def sequences(t: Tensor) -> Tensor:
    """(..., L, C), not empty, as (B, L, C) with contiguous channels; copies where no view serves."""
    t = t.detach().reshape(-1, *t.shape[-2:])
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def same_strides(tensors: list) -> list:
    """The tensors, copied unless their strides agree."""
    return tensors if len({t.stride() for t in tensors}) == 1 else [t.contiguous() for t in tensors]


def spiking_tile(T: int, backend: str, tuning: Tuning) -> int:
    """Tokens between the scan states that spiking_wkv keeps: what its backward pass can hold, in registers or in a cache."""
    pairs = tuning.spiking_pairs_cpu if backend == "cpu" else tuning.spiking_pairs_triton
    tokens = min(pairs, tuning.wkv_checkpoint_tokens)
    while tokens > 2 and tokens * T > pairs:
        tokens //= 2
    return tokens
