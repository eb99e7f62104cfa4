"""What the launchers of CPU kernels share: addresses and strides, parameters of neurons, the launch over T steps.

A kernel takes a tensor as one tuple (address, *strides), and tensors with the same role as a tuple of these. A contiguous
tensor is its address alone. The ``placed`` functions return (tensor, this tuple): the tensor may be a copy, so the launcher
must hold it until the kernel returns. All of this runs in front of every kernel, where a Python call more costs 0.1 us.
"""

import torch

from ..dtypes import state_dtype
from ..layout import layout_of, row_view, step_view
from .intrinsics import CODES, state_code

FORWARD_COLUMNS = 1024  # that a forward task of a neuron holds
BACKWARD_COLUMNS = 256  # that a backward task holds: LIF_CHECKPOINT_STEPS tiles of them are 16 KiB
_GROUPS = 64  # at most so many partial sums per channel


def address(t):
    return 0 if t is None else t.data_ptr()


def addresses(tensors):
    """Of contiguous tensors; (0, 0) where there are none."""
    return (0, 0) if tensors is None else tuple(map(address, tensors))


def placed(layout, t):
    """(t, (address, stride of T, stride of R))"""
    if t is None:
        return None, (0, 0, 0)
    t, step, row = row_view(layout, t)
    return t, (t.data_ptr(), step, row)


def placed_state(layout, t):
    """The same for a tensor without the T axis: (t, (address, stride of R))."""
    if t is None:
        return None, (0, 0)
    t, row = step_view(layout, t)
    return t, (t.data_ptr(), row)


def placed_gradient(layout, g, like):
    """The same for an upstream gradient: strides of T and R, factor of the column offset. One repeated value stays one tile."""
    if g is None or (g.numel() > BACKWARD_COLUMNS and not any(g.stride())):
        value = like.new_zeros(()) if g is None else g.as_strided((), ()).to(like.dtype)
        value = value.repeat(BACKWARD_COLUMNS)
        return value, (value.data_ptr(), 0, 0, 0)
    g, step, row = row_view(layout, g.to(like.dtype))
    return g, (g.data_ptr(), step, row, 1)


def placed_rows(t, axes=2):
    """The same for a tensor whose last axis holds the channels: strides of all other axes. It is copied where channels are not
    contiguous, one row where all rows are alike."""
    if t is None:
        return None, (0,) * (1 + axes)
    *strides, c = t.stride()
    if c == 1 or t.shape[-1] == 1:
        return t, (t.data_ptr(), *strides)
    if not any(strides):
        t = t[(0,) * axes].contiguous()
        return t, (t.data_ptr(), *strides)
    return placed_rows(t.contiguous(), axes)


class Parameters:
    """tau and v_threshold as a kernel takes them, r = 1/tau and theta: their ``values``, or the ``addresses`` of one value per
    channel."""

    def __init__(self, tau, v_threshold, neuron, dtype):
        self._dtype, self._alive = dtype, []
        r, r_address = self.number_or_address(None if tau is None else 1.0 / tau.detach().to(dtype), 1.0 / neuron.tau)
        theta = None if v_threshold is None else v_threshold.detach().to(dtype)
        theta, theta_address = self.number_or_address(theta, neuron.v_threshold)
        self.values, self.addresses = (r, theta), (r_address, theta_address)
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


def launch_forward(kernel, p, x, v, s, v_final, v_seq, checkpoint, *numbers):
    """Run a forward kernel over T steps of a neuron whose parameters are p."""
    layout = layout_of(x, s, p.per_channel)
    x, x_ = placed(layout, x)
    v, v_ = placed_state(layout, v)
    s, s_ = placed(layout, s)
    v_final, v_final_ = placed_state(layout, v_final)
    v_seq, v_seq_ = placed(layout, v_seq)
    checkpoint, checkpoint_ = placed(layout, checkpoint)
    kernel(
        x.numel(), x.shape[0], layout.R, layout.C, (x_, v_), (s_, v_final_, v_seq_, checkpoint_), *p.values, p.addresses,
        *numbers,
    )  # fmt: skip


def launch_backward(kernel, p, g, g_v, g_seq, x, v, checkpoint, dx, dv, parameters, *numbers):
    """Run a backward kernel; the sums of the parameters' gradients, if ``parameters``."""
    state = state_dtype(x.dtype)
    layout = layout_of(x, dx, p.per_channel)
    g, g_ = placed_gradient(layout, g, x)
    g_v, g_v_ = placed_state(layout, None if g_v is None else g_v.to(state))
    g_seq, g_seq_ = placed(layout, None if g_seq is None else g_seq.to(state))
    x, x_ = placed(layout, x)
    v, v_ = placed_state(layout, v)
    checkpoint, checkpoint_ = placed(layout, checkpoint if checkpoint.numel() else None)
    dx, dx_ = placed(layout, dx)
    dv, dv_ = placed_state(layout, dv)
    group, groups, sums = p.partial_sums(layout, parameters)
    kernel(
        2 * x.numel(), x.shape[0], layout.R, layout.C, group, groups, (x_, v_, checkpoint_), (g_, g_v_, g_seq_), (dx_, dv_),
        addresses(sums), *p.values, p.addresses, *numbers,
    )  # fmt: skip
    return sums


def codes(x, v):
    """Of x and of the membrane that enters, which, where there is none, is of the state type."""
    code = CODES[x.dtype]
    return code, state_code(code) if v is None else CODES[v.dtype]
