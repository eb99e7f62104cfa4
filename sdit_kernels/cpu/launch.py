"""What the launchers of CPU kernels share: addresses and strides, parameters of neurons, the launch over T steps."""

import torch

from ..dtypes import state_dtype
from ..layout import layout_of, row_view, step_view
from .intrinsics import CODES, state_code

FORWARD_COLUMNS = 1024  # that a forward task of a neuron holds
BACKWARD_COLUMNS = 256  # that a backward task holds: LIF_CHECKPOINT_STEPS tiles of them are 16 KiB
_GROUPS = 64  # at most so many partial sums per channel


def address(t):
    return 0 if t is None else t.data_ptr()


def place_rows(t, axes=2):
    """(tensor to keep alive, strides of all its axes but the channels); copied where channels are not contiguous, one row where
    all rows are alike."""
    if t is None:
        return None, *[0] * axes
    *strides, c = t.stride()
    if c == 1 or t.shape[-1] == 1:
        return t, *strides
    if not any(strides):
        return t[(0,) * axes].contiguous(), *strides
    return place_rows(t.contiguous(), axes)


class Parameters:
    """tau and v_threshold as a kernel takes them: r = 1/tau and theta, each one number or the address of one per channel."""

    def __init__(self, tau, v_threshold, neuron, dtype):
        self._dtype, self._alive = dtype, []
        self.r = self.number_or_address(None if tau is None else 1.0 / tau.detach().to(dtype), 1.0 / neuron.tau)
        self.theta = self.number_or_address(None if v_threshold is None else v_threshold.detach().to(dtype), neuron.v_threshold)
        self.per_channel = bool(self._alive)

    def number_or_address(self, p, value):
        if p is None or p.numel() == 1:
            return value if p is None else p.item(), 0
        self._alive.append(p.contiguous())
        return 0.0, self._alive[-1].data_ptr()

    def partial_sums(self, layout, wanted):
        """Rows per task, number of such groups, and where wanted their sums: (2, groups, C) per channel, else (2, tasks)."""
        group = -(-layout.R // _GROUPS) if wanted else 1
        groups = -(-layout.R // group)
        if not wanted:
            return group, groups, None
        shape = (groups, layout.C) if self.per_channel else (groups * -(-layout.C // BACKWARD_COLUMNS),)
        return group, groups, torch.empty((2, *shape), dtype=self._dtype, device="cpu")


def gradient(layout, g, like):
    """(tensor, strides of T and R, factor of the column offset) of an upstream gradient; one repeated value stays one tile."""
    if g is None or (g.numel() > BACKWARD_COLUMNS and not any(g.stride())):
        value = like.new_zeros(()) if g is None else g.as_strided((), ()).to(like.dtype)
        return value.repeat(BACKWARD_COLUMNS), 0, 0, 0
    return *row_view(layout, g.to(like.dtype)), 1


def launch_forward(kernel, p, x, v, s, v_final, v_seq, checkpoint, *numbers):
    """Run a forward kernel over T steps of a neuron whose parameters are p."""
    layout = layout_of(x, s, p.per_channel)
    x, x_t, x_r = row_view(layout, x)
    s, s_t, s_r = row_view(layout, s)
    v_r = v1_r = seq_t = seq_r = keep_t = keep_r = 0
    if checkpoint is not None:
        checkpoint, keep_t, keep_r = row_view(layout, checkpoint)
    if v is not None:
        v, v_r = step_view(layout, v)
    if v_final is not None:
        v_final, v1_r = step_view(layout, v_final)
    if v_seq is not None:
        v_seq, seq_t, seq_r = row_view(layout, v_seq)
    kernel(
        x.numel(), x.shape[0], layout.R, layout.C, x.data_ptr(), x_t, x_r, s.data_ptr(), s_t, s_r, address(v), v_r,
        address(v_final), v1_r, address(v_seq), seq_t, seq_r, address(checkpoint), keep_t, keep_r, *p.r, *p.theta, *numbers,
    )  # fmt: skip


def launch_backward(kernel, p, g, g_v, g_seq, x, v, checkpoint, dx, dv, parameters, *numbers):
    """Run a backward kernel; the sums of the parameters' gradients, if ``parameters``."""
    state = state_dtype(x.dtype)
    layout = layout_of(x, dx, p.per_channel)
    g, g_t, g_r, g_c = gradient(layout, g, x)
    x, x_t, x_r = row_view(layout, x)
    dx, dx_t, dx_r = row_view(layout, dx)
    v_r = dv_r = gv_r = gseq_t = gseq_r = keep_t = keep_r = 0
    if checkpoint.numel():
        checkpoint, keep_t, keep_r = row_view(layout, checkpoint)
    if v is not None:
        v, v_r = step_view(layout, v)
    if dv is not None:
        dv, dv_r = step_view(layout, dv)
    if g_v is not None:
        g_v, gv_r = step_view(layout, g_v.to(state))
    if g_seq is not None:
        g_seq, gseq_t, gseq_r = row_view(layout, g_seq.to(state))
    group, groups, sums = p.partial_sums(layout, parameters)
    kernel(
        2 * x.numel(), x.shape[0], layout.R, layout.C, group, groups, x.data_ptr(), x_t, x_r, address(v), v_r,
        address(checkpoint), keep_t, keep_r, g.data_ptr(), g_t, g_r, g_c, address(g_v), gv_r, address(g_seq), gseq_t, gseq_r,
        dx.data_ptr(), dx_t, dx_r, address(dv), dv_r, *((0, 0) if sums is None else map(address, sums)),
        *p.r, *p.theta, *numbers,
    )  # fmt: skip
    return sums


def codes(x, v):
    """Of x and of the membrane that enters, which, where there is none, is of the state type."""
    code = CODES[x.dtype]
    return code, state_code(code) if v is None else CODES[v.dtype]
