"""Helpers that several Triton files share: dtypes, tiles, strides, launches, parameters and the sums of their gradients.

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
from ..layout import LIF_CHECKPOINT_STEPS, layout_of, row_view, step_view

# A thread of a backward pass holds fewer values than this; compile_report.py finds register spills above it.
_MAX_HELD_VALUES = 128
STATES = {torch.float32: tl.float32, torch.float64: tl.float64}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def launch(kernel, programs, device, *args, **flags):
    """Launch with the tensors' device as the current one, because Triton uses the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **flags)
    else:
        kernel[(programs,)](*args, **flags)


@functools.cache
def warps_of(threads: int) -> int:
    """Number of warps for this many threads on the current device. The interpreter has no warps; 4 is Triton's default."""
    if triton.knobs.runtime.interpret:
        return 4
    size = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // size) if size > 1 else 1


class Grid:
    """Tile sizes, BR rows times BC columns, and the number of programs.

    A thread makes one access of 16 bytes. Rows are grouped, so that partial sums are few.

    Tile sizes depend only on the variant of the kernel and, if there are rows, on C. So a new batch size does not compile a new
    kernel. ``held``: values per neuron that a thread holds; if they exceed its registers, the tile
    shrinks and a thread reads 8 or 4 bytes at a time. ``parameters``: whether gradients of parameters are wanted.
    ``per_channel``: the columns are channels, even if there is a single row.
    """

    def __init__(self, tuning, layout, dtype, parameters, per_channel=False, held=0):
        self.threads = tuning.elementwise_threads
        elements = self.threads * 16 // dtype.itemsize
        while held * elements // self.threads >= _MAX_HELD_VALUES:
            elements //= 2
        flat = layout.R == 1 and not per_channel
        self.BC = elements if flat else min(power_of_2(layout.C), elements)
        self.BR = 1 if flat else elements // self.BC
        column_blocks, row_blocks = cdiv(layout.C, self.BC), cdiv(layout.R, self.BR)
        self.group = cdiv(column_blocks * row_blocks, tuning.sum_programs) if parameters else 1
        self.groups = cdiv(row_blocks, self.group)
        self.programs = column_blocks * self.groups

    def partial_sums(self, layout, per_channel, like):
        shape = (self.groups, layout.C) if per_channel else (self.programs,)
        # Two tensors, not two halves of one: the address of the second half is aligned for some batch sizes only, and Triton
        # compiles another kernel for an unaligned address.
        return tuple(torch.empty(shape, dtype=state_dtype(like.dtype), device=like.device) for _ in range(2))

    def launch(self, kernel, device, *args, **flags):
        flags |= dict(BR=self.BR, BC=self.BC, num_warps=warps_of(self.threads), enable_fp_fusion=False)
        launch(kernel, self.programs, device, *args, **flags)


def is_per_channel(p):
    return p is not None and p.numel() > 1


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


def launch_steps_forward(kernel, x, v, first, v_threshold, s, v_final, v_seq, checkpoint, numbers, flags, tuning):
    """Launch a forward kernel over T steps of a neuron whose parameters are ``first`` (tau or beta) and v_threshold."""
    per_channel = is_per_channel(first) or is_per_channel(v_threshold)
    layout = layout_of(x, s, per_channel)
    outputs = (
        row_view(layout, as_bytes(s)), maybe_step_view(layout, v_final), maybe_row_view(layout, v_seq),
        maybe_row_view(layout, checkpoint),
    )  # fmt: skip
    Grid(tuning, layout, x.dtype, False, per_channel).launch(
        kernel, x.device, (row_view(layout, x), maybe_step_view(layout, v)), outputs, (contiguous(first),
        contiguous(v_threshold)), x.shape[0], layout.R, layout.C, *numbers, F=flags, STATE=STATES[state_dtype(x.dtype)],
    )  # fmt: skip


def launch_steps_backward(
    kernel, g, g_v, g_seq, x, v, first, v_threshold, checkpoint, dx, dv, parameters, numbers, flags, tuning
):  # fmt: skip
    """Launch a backward kernel. If ``parameters``, return the partial sums of the gradients of the parameters."""
    per_channel = is_per_channel(first) or is_per_channel(v_threshold)
    layout = layout_of(x, dx, per_channel)
    T, state = x.shape[0], state_dtype(x.dtype)
    inputs = row_view(layout, x), maybe_step_view(layout, v), maybe_row_view(layout, checkpoint if checkpoint.numel() else None)
    g_v, g_seq = (None if t is None else t.to(state) for t in (g_v, g_seq))
    upstream = gradient_view(layout, g, x.dtype), maybe_step_view(layout, g_v), maybe_row_view(layout, g_seq)
    grid = Grid(tuning, layout, x.dtype, parameters, per_channel, held=min(T, LIF_CHECKPOINT_STEPS) * (2 if parameters else 1))
    sums = grid.partial_sums(layout, per_channel, x) if parameters else None
    grid.launch(
        kernel, x.device, inputs, upstream, (row_view(layout, dx), maybe_step_view(layout, dv), sums or (None, None)),
        (contiguous(first), contiguous(v_threshold)), T, layout.R, layout.C, grid.group,
        *numbers, F=flags, STATE=STATES[state],
    )  # fmt: skip
    return sums


# --- in kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """a / b rounded to nearest. ``/`` on float32 is approximate on NVIDIA GPUs."""
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
def tile_of_program(R, C, group, BR: tl.constexpr, BC: tl.constexpr):
    """Return (index of the row group, first row, first column, columns within the tile, mask of columns) of this program."""
    chunks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    block = pid // chunks
    first = (pid % chunks).to(tl.int64) * BC
    cols = tl.arange(0, BC)[None, :]
    return block, block.to(tl.int64) * group * BR, first, cols, first + cols < C


@triton.jit
def store_sums(
    dr_ptr, dtheta_ptr, sum_r, sum_theta, block, C, first, cols, mask_c,
    TAU_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store this program's partial sums of d r and d theta: one row per group for a parameter per channel, else one number."""
    if dr_ptr is not None:
        if TAU_CHANNELS or THETA_CHANNELS:
            at = block.to(tl.int64) * C + first + cols
            tl.store(dr_ptr + at, tl.sum(sum_r, 0)[None, :], mask=mask_c)
            tl.store(dtheta_ptr + at, tl.sum(sum_theta, 0)[None, :], mask=mask_c)
        else:
            tl.store(dr_ptr + tl.program_id(0), tl.sum(tl.sum(sum_r, 1), 0))
            tl.store(dtheta_ptr + tl.program_id(0), tl.sum(tl.sum(sum_theta, 1), 0))
