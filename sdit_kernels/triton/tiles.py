"""What the kernels and launchers of several files share: dtypes, tiles, placement, launches, parameters and their sums.

Launchers run in Python in front of every kernel, so they count: triton.cdiv and triton.next_power_of_2 unwrap their arguments
for compiled code first, which costs several times what they compute.

A tensor and its strides are one argument of a kernel, a tuple; tensors with the same role are a tuple of these. Triton
specialises on the content of a tuple as on other arguments. Sizes that change from call to call stay outside, because
do_not_specialize does not reach into tuples. Real numbers stay outside, because in a tuple they become float32. All flags are
one record F. The dtype STATE is not in it, because hooks of Triton's compiler write constants as JSON, where a record
cannot hold a dtype.
"""

import functools

import torch
import triton
import triton.language as tl

from ..dtypes import state_dtype
from ..layout import STRIDE, layout_of, place, place_state

_KEPT = 128  # fewer values than this are kept per thread for the walk back: compile_report.py finds spills beyond
STATES = {torch.float32: tl.float32, torch.float64: tl.float64}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is n or more."""
    return 1 << (n - 1).bit_length()


def launch(kernel, programs, device, *args, **flags):
    """Triton launches on the current device; make that the tensors'."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **flags)
    else:
        kernel[(programs,)](*args, **flags)


@functools.cache
def warps_of(threads: int) -> int:
    """So many threads in warps of the device's size; the interpreter has none."""
    if triton.knobs.runtime.interpret:
        return 4
    size = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // size) if size > 1 else 1


class Grid:
    """Tiles of one 16-byte access per thread, and rows grouped so that partial sums stay few.

    Tile sizes depend on the kernel's variant and on C alone (where there are rows), so that no batch size compiles anew. Where
    more values per neuron are ``kept`` than a thread has registers for, its accesses are of 8 or 4 bytes. ``per_channel``: the
    columns are channels, even of a single row.
    """

    def __init__(self, tuning, layout, dtype, parameters, per_channel=False, kept=0):
        self.threads = tuning.elementwise_threads
        elements = self.threads * 16 // dtype.itemsize
        while kept * elements // self.threads >= _KEPT:
            elements //= 2
        flat = layout.R == 1 and not per_channel
        self.BC = elements if flat else min(power_of_2(layout.C), elements)
        self.BR = 1 if flat else elements // self.BC
        chunks, blocks = cdiv(layout.C, self.BC), cdiv(layout.R, self.BR)
        self.group = cdiv(chunks * blocks, tuning.sum_programs) if parameters else 1
        self.groups = cdiv(blocks, self.group)
        self.programs = chunks * self.groups

    def partial_sums(self, layout, per_channel, like):
        shape = (self.groups, layout.C) if per_channel else (self.programs,)
        # not two halves of one: where the second begins would be aligned for some batches only, and kernels compile for it
        return tuple(torch.empty(shape, dtype=state_dtype(like.dtype), device=like.device) for _ in range(2))

    def launch(self, kernel, device, *args, **flags):
        flags |= dict(BR=self.BR, BC=self.BC, num_warps=warps_of(self.threads), enable_fp_fusion=False)
        launch(kernel, self.programs, device, *args, **flags)


def is_per_channel(p):
    return p is not None and p.numel() > 1


def placed(layout, t):
    return (None, 0, 0) if t is None else place(layout, t)


def placed_state(layout, t):
    return (None, 0) if t is None else place_state(layout, t)


def placed_gradient(layout, g, dtype):
    """(tensor, strides of T, R and C) of an upstream gradient; one repeated value is read in place."""
    if g is None:
        return None, 0, 0, 0
    g = g.to(dtype)
    return (g, 0, 0, 0) if not any(g.stride()) else (*place(layout, g), 1)


def contiguous(p):
    return None if p is None else p.detach().contiguous()


def as_bytes(t):
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def launch_steps_forward(kernel, x, v, first, v_threshold, s, v_final, v_seq, checkpoint, numbers, flags, tuning):
    """Launch a forward kernel over T steps of a neuron whose parameters are ``first`` (tau or beta) and v_threshold."""
    per_channel = is_per_channel(first) or is_per_channel(v_threshold)
    layout = layout_of(x, s, per_channel)
    outputs = place(layout, as_bytes(s)), placed_state(layout, v_final), placed(layout, v_seq), placed(layout, checkpoint)
    Grid(tuning, layout, x.dtype, False, per_channel).launch(
        kernel, x.device, (place(layout, x), placed_state(layout, v)), outputs, (contiguous(first), contiguous(v_threshold)),
        x.shape[0], layout.R, layout.C, *numbers, F=flags, STATE=STATES[state_dtype(x.dtype)],
    )  # fmt: skip


def launch_steps_backward(
    kernel, g, g_v, g_seq, x, v, first, v_threshold, checkpoint, dx, dv, parameters, numbers, flags, tuning
):  # fmt: skip
    """Launch a backward kernel; the sums of the parameters' gradients, if ``parameters``."""
    per_channel = is_per_channel(first) or is_per_channel(v_threshold)
    layout = layout_of(x, dx, per_channel)
    T, state = x.shape[0], state_dtype(x.dtype)
    inputs = place(layout, x), placed_state(layout, v), placed(layout, checkpoint if checkpoint.numel() else None)
    g_v, g_seq = (None if t is None else t.to(state) for t in (g_v, g_seq))
    upstream = placed_gradient(layout, g, x.dtype), placed_state(layout, g_v), placed(layout, g_seq)
    grid = Grid(tuning, layout, x.dtype, parameters, per_channel, kept=min(T, STRIDE) * (2 if parameters else 1))
    sums = grid.partial_sums(layout, per_channel, x) if parameters else None
    grid.launch(
        kernel, x.device, inputs, upstream, (place(layout, dx), placed_state(layout, dv), sums or (None, None)),
        (contiguous(first), contiguous(v_threshold)), T, layout.R, layout.C, grid.group,
        *numbers, F=flags, STATE=STATES[state],
    )  # fmt: skip
    return sums


# --- in kernels --------------------------------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """a / b rounded to nearest: ``/`` on float32 is approximate on NVIDIA."""
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def load_parameter(ptr, value, cols, mask, CHANNELS: tl.constexpr, STATE: tl.constexpr):
    """A number, a scalar tensor, or one element per column, (1, BC) in the state type."""
    if ptr is None:
        return tl.full([], value, STATE)
    elif CHANNELS:
        return tl.load(ptr + cols, mask=mask, other=1.0).to(STATE)
    else:
        return tl.load(ptr).to(STATE)


@triton.jit
def tile_of_program(R, C, group, BR: tl.constexpr, BC: tl.constexpr):
    """(index of the row group, first row, columns, mask of columns) of this program."""
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
    """This program's share of d r and d theta: a row per group where there is a parameter per channel, else one number."""
    if dr_ptr is not None:
        if TAU_CHANNELS or THETA_CHANNELS:
            at = block.to(tl.int64) * C + first + cols
            tl.store(dr_ptr + at, tl.sum(sum_r, 0)[None, :], mask=mask_c)
            tl.store(dtheta_ptr + at, tl.sum(sum_theta, 0)[None, :], mask=mask_c)
        else:
            tl.store(dr_ptr + tl.program_id(0), tl.sum(tl.sum(sum_r, 1), 0))
            tl.store(dtheta_ptr + tl.program_id(0), tl.sum(tl.sum(sum_theta, 1), 0))
