"""Code that the launchers of CPU kernels share: addresses and strides, neuron parameters, the launch over T steps.

A kernel takes a tensor as one tuple (address, *strides), and a group of tensors with the same role as a tuple of these. A
contiguous tensor is only its address. The ``placed`` functions return (tensor, this tuple). The tensor may be a copy, so the
launcher must hold it until the kernel returns. R is the number of rows and C the number of columns of a step (see
../layout.py). All of this runs before every kernel, and each Python call costs 0.1 us.
"""

import torch

from ..dtypes import state_dtype
from ..layout import layout_of, row_view, step_view
from .intrinsics import CODES, state_code

FORWARD_COLUMNS = 1024  # the most columns of a forward task of a neuron
BACKWARD_COLUMNS = 256  # the most columns of a backward task, which keeps LIF_CHECKPOINT_STEPS steps of them: 16 KiB
_GROUPS = 64  # the most partial sums per channel


def address(t):
    return 0 if t is None else t.data_ptr()


def addresses(tensors):
    """Return the addresses of contiguous tensors, or (0, 0) if there are no tensors."""
    return (0, 0) if tensors is None else tuple(map(address, tensors))


def placed(layout, t):
    """Return (t, (address, stride of T, stride of R))."""
    if t is None:
        return None, (0, 0, 0)
    t, step, row = row_view(layout, t)
    return t, (t.data_ptr(), step, row)


def placed_state(layout, t):
    """Return (t, (address, stride of R)) of a tensor without the T axis."""
    if t is None:
        return None, (0, 0)
    t, row = step_view(layout, t)
    return t, (t.data_ptr(), row)


def placed_gradient(layout, g, like):
    """Return (g, (address, stride of T, stride of R, factor of the column offset)) of an upstream gradient.

    If g repeats one value, the result holds this value for the columns of one task, not for all elements.
    """
    if g is None or (g.numel() > BACKWARD_COLUMNS and not any(g.stride())):
        value = like.new_zeros(()) if g is None else g.as_strided((), ()).to(like.dtype)
        value = value.repeat(BACKWARD_COLUMNS)
        return value, (value.data_ptr(), 0, 0, 0)
    g, step, row = row_view(layout, g.to(like.dtype))
    return g, (g.data_ptr(), step, row, 1)


def placed_rows(t, axes=2):
    """Return (t, (address, strides of all axes except the last)) of a tensor whose last axis holds the channels.

    The function copies t if its channels are not contiguous. If all rows are the same memory, it copies only one row.
    """
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
    """The parameters r = 1/tau and theta = v_threshold for a kernel.

    ``values`` holds the two numbers. ``addresses`` holds the addresses of one value per channel, or 0.
    """

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
        """Return (rows per group, number of groups, partial sums or None). A task processes a block of columns of one group.

        The partial sums have the shape (2, groups, C) if a parameter has one value per channel, otherwise (2, tasks).
        """
        group = -(-layout.R // _GROUPS) if wanted else 1
        groups = -(-layout.R // group)
        if not wanted:
            return group, groups, None
        shape = (groups, layout.C) if self.per_channel else (groups * -(-layout.C // BACKWARD_COLUMNS),)
        return group, groups, torch.empty((2, *shape), dtype=self._dtype, device="cpu")


def launch_forward(kernel, p, x, v, s, v_final, v_seq, checkpoint, *numbers):
    """Run a forward kernel over T steps of a neuron with the parameters p."""
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
    """Run a backward kernel. If ``parameters``, return partial sums of the parameter gradients."""
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
    """Return the storage codes of x and of the initial membrane v. Without v, the second is the code of the state type."""
    code = CODES[x.dtype]
    return code, state_code(code) if v is None else CODES[v.dtype]
