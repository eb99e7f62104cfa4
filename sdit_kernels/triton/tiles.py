"""Helpers that several Triton files share: dtypes, tiles, strides, parameters and the sums of their gradients.

The Python code of a launcher runs before every kernel, so its time matters. triton.cdiv and triton.next_power_of_2 first
unwrap their arguments for compiled code, which takes several times as long as the arithmetic; this file has its own versions.

A kernel takes a tensor and its strides as one tuple, and tensors with the same role as a tuple of these tuples. Triton
specialises on the content of a tuple as on other arguments. Sizes that change from call to call are separate arguments, because
do_not_specialize does not reach into tuples. Real numbers are separate arguments, because in a tuple they become float32. All
flags are one record F. The dtype STATE is not in F, because hooks of Triton's compiler write constants as JSON, where a record
cannot hold a dtype.
"""

import functools

import torch
import triton
import triton.language as tl

from ..dtypes import state_dtype
from ..layout import row_view, step_view
from .launch import launch

# A thread of a backward pass holds fewer values than this; compile_report.py finds register spills above it.
_MAX_HELD_VALUES = 128
# Kinds of parameters: one value; a value per channel; a value per token, at every step the same or another one.
SINGLE, CHANNEL, TOKEN, STEP = range(4)
STATES = {torch.float32: tl.float32, torch.float64: tl.float64}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def warps_of(threads: int) -> int:
    """Number of warps for this many threads on the current device. The interpreter has no warps; 4 is Triton's default."""
    if triton.knobs.runtime.interpret:
        return 4
    size = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // size) if size > 1 else 1


@functools.cache
def all_registers() -> dict[str, int]:
    """Options for a kernel that needs many registers. Otherwise NVIDIA's assembler spills some to hold one more program."""
    interpreted = triton.knobs.runtime.interpret
    return {} if interpreted or triton.runtime.driver.active.get_current_target().backend != "cuda" else {"maxnreg": 255}


class Grid:
    """Tile sizes, BR rows times BC columns, and the number of programs.

    A thread makes one access of 16 bytes. Rows are grouped, so that partial sums are few.

    Tile sizes depend only on the variant of the kernel and, if there are rows, on C. So a new batch size does not compile a new
    kernel. ``held``: values per neuron that a thread holds; if they exceed its registers, the tile
    shrinks and a thread reads 8 or 4 bytes at a time. ``parameters``: whether gradients of parameters are wanted.
    ``per_channel``: the columns are channels, even if there is a single row. ``whole_rows``: a tile holds all columns, with as
    many threads as they need.
    """

    def __init__(self, tuning, layout, dtype, parameters, per_channel=False, held=0, whole_rows=False):
        self.threads = tuning.elementwise_threads
        elements = self.threads * 16 // dtype.itemsize
        while held * elements // self.threads >= _MAX_HELD_VALUES:
            elements //= 2
        if whole_rows and elements < layout.C:
            self.threads *= power_of_2(layout.C) // elements
            elements = power_of_2(layout.C)
        flat = layout.R == 1 and not per_channel
        self.BC = elements if flat else min(power_of_2(layout.C), elements)
        self.BR = 1 if flat else elements // self.BC
        self._column_blocks, row_blocks = cdiv(layout.C, self.BC), cdiv(layout.R, self.BR)
        self.group = cdiv(self._column_blocks * row_blocks, tuning.sum_programs) if parameters else 1
        self.groups = cdiv(row_blocks, self.group)
        self.programs = self._column_blocks * self.groups

    def partial_sums(self, layout, kinds, like, steps=1, per_channel=None):
        """Return partial sums of the gradients of parameters. kinds: their kinds. per_channel: one has several values."""
        shape = (self.groups, layout.C) if (any(kinds) if per_channel is None else per_channel) else (self.programs,)
        tokens = self._column_blocks, layout.R
        shapes = {SINGLE: shape, CHANNEL: shape, TOKEN: tokens, STEP: (tokens[0], steps * layout.R)}
        # Separate tensors, not parts of one: the address of a part is aligned for some batch sizes only, and Triton compiles
        # another kernel for an unaligned address.
        return tuple(torch.empty(shapes[kind], dtype=state_dtype(like.dtype), device=like.device) for kind in kinds)

    def launch(self, kernel, device, *args, **flags):
        flags |= dict(BR=self.BR, BC=self.BC, num_warps=warps_of(self.threads), enable_fp_fusion=False)
        launch(kernel, self.programs, device, *args, **flags)


def kind_of(p, axes=0):
    """Return what load_parameter needs to know of a parameter for data with so many axes, T included."""
    if p is None:
        return SINGLE
    if p.dim() > 1:
        return STEP if p.dim() == axes else TOKEN
    return SINGLE if p.numel() == 1 else CHANNEL


def is_per_channel(p):
    """True if p has several values: rows and columns are then tokens and channels."""
    return p is not None and (p.numel() > 1 or p.dim() > 1)


def maybe_row_view(layout, t):
    return (None, 0, 0) if t is None else row_view(layout, t)


def maybe_step_view(layout, t):
    return (None, 0) if t is None else step_view(layout, t)


def gradient_view(layout, g, dtype):
    """Return (tensor, strides of T, R and C) of an upstream gradient. A single repeated value is read in place."""
    if g is None:
        return None, 0, 0, 0
    g = g.to(dtype)
    return (g, 0, 0, 0) if not any(g.stride()) else (*row_view(layout, g), 1)


def contiguous(p):
    return None if p is None else p.detach().contiguous()


def as_bytes(t):
    return t.view(torch.uint8) if t.dtype == torch.bool else t


# --- in kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def as_tensors(a, b):
    """Return a and b as tensors of one type. One of them may be a number."""
    if not isinstance(a, tl.tensor):
        return tl.full([], a, b.dtype), b
    elif not isinstance(b, tl.tensor):
        return a, tl.full([], b, a.dtype)
    else:
        return a, b


@triton.jit
def divide(a, b):
    """a / b rounded to nearest. ``/`` on float32 is approximate on NVIDIA GPUs."""
    a, b = as_tensors(a, b)
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def load_parameter(ptr, value, cols, mask, CHANNELS: tl.constexpr, STATE: tl.constexpr):
    """Load a parameter in the state type: a number, a scalar tensor, or one element per column, (1, BC)."""
    if ptr is None:
        return tl.full([], value, STATE)
    elif CHANNELS:
        return tl.load(ptr + cols, mask=mask, other=1.0).to(STATE)
    else:
        return tl.load(ptr).to(STATE)


@triton.jit
def norm_of_rows(x, C, NORM: tl.constexpr):
    """Return sqrt(mean of x^2 + 1e-6) of each row, or if NORM is 2, mean of |x| + 1e-6; (BR, 1). Not finite counts as huge.

    The sum is a sum of integers: x is divided by the power of 2 below the greatest |x| and rounded to 50 bits. So the result
    does not depend on the distribution of columns over threads, which differs between the forward and the backward kernel.
    """
    WIDE: tl.constexpr = x.dtype == tl.float64
    size = tl.abs(x)
    greatest = tl.max(size.to(tl.int64 if WIDE else tl.int32, bitcast=True), 1)[:, None]  # ordered as the numbers; NaN is last
    exponent = greatest & (0x7FF0000000000000 if WIDE else 0x7F800000)
    exponent = tl.maximum(exponent, 0x0370000000000000 if WIDE else 0x1B800000)  # 2^-968, 2^-72
    unit = exponent.to(x.dtype, bitcast=True)
    inverse = ((0x7FE0000000000000 if WIDE else 0x7F000000) - exponent).to(x.dtype, bitcast=True)
    z = size * inverse
    total = tl.sum((z * (z * 1125899906842624.0 if NORM == 1 else 1125899906842624.0)).to(tl.int64), 1)[:, None]  # 2^50
    mean = total.to(x.dtype) * divide(1.0, tl.full([], C, x.dtype) * 1125899906842624.0) * unit
    norm = (mean * unit if NORM == 1 else mean) + tl.full([], 1e-6, x.dtype)
    if NORM == 1:
        norm = tl.sqrt_rn(norm) if x.dtype == tl.float32 else tl.sqrt(norm)
    most = tl.full([], 1e300 if WIDE else 1e30, x.dtype)
    return tl.where(norm < most, norm, most)


@triton.jit
def slope_of_norm(x, norm, C, NORM: tl.constexpr):
    """Return the derivative of the norm of a row along x, 0 where the norm is not finite."""
    width = tl.full([], C, x.dtype)
    if NORM == 1:
        slope = x * divide(1.0, width * norm)
    else:
        slope = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype) * divide(1.0, width)
    most = tl.full([], 1e300 if x.dtype == tl.float64 else 1e30, x.dtype)
    return tl.where(norm < most, slope, 0.0)


@triton.jit
def tile_of_program(R, C, group, BR: tl.constexpr, BC: tl.constexpr):
    """Return (index of the row group, first row, first column, columns within the tile, mask of columns) of this program."""
    chunks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    block = pid // chunks
    first = (pid % chunks).to(tl.int64) * BC
    cols = tl.arange(0, BC)[None, :]
    return block, block.to(tl.int64) * group * BR, first, cols, first + cols < C


@triton.jit
def store_sums(pointers, sums, block, C, first, cols, mask_c, F: tl.constexpr):
    """Store this program's partial sums: one row per group of rows for parameters per channel, else one number."""
    for i in tl.static_range(len(pointers)):
        if F.SUM_KINDS[i] <= 1:  # otherwise the sums per token are stored already
            if F.PER_CHANNEL:
                at = pointers[i] + block.to(tl.int64) * C + first + cols
                tl.store(at, tl.sum(sums[i], 0)[None, :], mask=mask_c)
            else:
                tl.store(pointers[i] + tl.program_id(0), tl.sum(tl.sum(sums[i], 1), 0))
