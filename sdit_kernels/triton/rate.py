"""A neuron under a constant current over T steps, in Triton: its mean number of spikes. Built like triton/neuron.py."""

import torch
import triton
import triton.language as tl

from ..layout import LIF_CHECKPOINT_STEPS, layout_of_step, step_view
from ..neuron.trace import HUGE
from .neuron import as_integer, as_number, as_tiles, bind, flags_of, load_parameters, load_states, values_of
from .tiles import Grid, divide, gradient_view, maybe_step_view, store_sums, tile_of_program

_HUGE_32, _HUGE_64 = map(tl.constexpr, HUGE)
step = tangent = None  # the printed functions of a neuron; see bind


@triton.jit
def _current(x_ptr, gate_ptr, x_at, gate_at, mask, STATE: tl.constexpr):
    """Return (current, x, sigmoid(gate)); without a gate the last value is 1."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(STATE)
    if gate_ptr is None:
        return x, x, 1.0
    else:
        e = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(STATE)
        p = 1.0 / (1.0 + tl.exp(-tl.abs(e)))
        p = tl.where(e >= 0.0, p, tl.exp(-tl.abs(e)) * p)
        return p * x, x, p


def rate_forward_kernel(
    inputs, out, parameters, T, R, C, n0: "fp64", n1: "fp64", n2: "fp64", n3: "fp64",
    F: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_r = inputs[0]
    gate_ptr, gate_r = inputs[1]
    residual_ptr, residual_r = inputs[2]
    out_ptr, out_r = out
    K: tl.constexpr = F.K
    STATE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, row, first, cols, mask_c = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    p = load_parameters(parameters, (n0, n1, n2, n3), first + cols, mask_c, F, STATE)
    current, x, open_ = _current(x_ptr, gate_ptr, first + rows * x_r + cols, first + rows * gate_r + cols, mask, STATE)
    states = load_states(inputs[3], p, first, rows, cols, mask, F, STATE)
    count = tl.zeros([BR, BC], STATE)
    if K > 0:
        for _ in tl.static_range(K):
            spike, after = step(current, states, p)
            count += as_number(spike, STATE)
            states = as_tiles(after, current)
    else:
        for _ in range(T):
            spike, after = step(current, states, p)
            count += as_number(spike, STATE)
            states = as_tiles(after, current)
    at = first + rows * out_r + cols
    if F.COUNTS:
        tl.store(out_ptr + at, as_integer(count, out_ptr.dtype.element_ty), mask=mask)
    else:
        if K > 0 and (K & (K - 1)) == 0:
            rate = count * (1.0 / K)
        else:
            rate = divide(count, tl.zeros([BR, BC], STATE) + T)
        if residual_ptr is not None:
            rate = tl.load(residual_ptr + first + rows * residual_r + cols, mask=mask, other=0.0).to(STATE) + rate
        tl.store(out_ptr + at, rate.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add(a, b):
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i] + b[i],)
    return total


def rate_backward_kernel(
    inputs, upstream, gradients, parameters, T, R, C, group,
    n0: "fp64", n1: "fp64", n2: "fp64", n3: "fp64", alpha: "fp64",
    F: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Propagate the tangents forward in time together with the states.

    This is cheap because a neuron has one input and one output. No step is stored, so the memory does not grow with T.
    """
    x_ptr, x_r = inputs[0]
    gate_ptr, gate_r = inputs[1]
    g_ptr, g_r, g_c = upstream
    dx_ptr, dx_r = gradients[0]
    dgate_ptr, dgate_r = gradients[1]
    sums = gradients[2]
    K: tl.constexpr = F.K
    STATE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block, row, first, cols, mask_c = tile_of_program(R, C, group, BR, BC)
    p = load_parameters(parameters, (n0, n1, n2, n3), first + cols, mask_c, F, STATE)
    a = tl.full([], alpha, STATE)
    huge: tl.constexpr = _HUGE_64 if tl.float64 == STATE else _HUGE_32
    totals = ()
    if sums is not None:
        for n in tl.static_range(len(sums)):  # noqa: B007
            totals = totals + (tl.zeros([BR, BC], STATE),)
    for i in range(1 if sums is None else group):
        rows = row + i * BR + tl.arange(0, BR)[:, None]
        mask = mask_c & (rows < R)
        g = tl.load(g_ptr + rows * g_r + (first + cols) * g_c, mask=mask, other=0.0).to(STATE)
        current, x, open_ = _current(x_ptr, gate_ptr, first + rows * x_r + cols, first + rows * gate_r + cols, mask, STATE)
        current = tl.where(current > huge, huge, tl.where(current < -huge, -huge, current))  # NaN stays
        states = load_states(inputs[2], p, first, rows, cols, mask, F, STATE)
        zero = tl.zeros([BR, BC], STATE)
        moving = ()  # the derivatives of the states along x and the parameters
        found = ()  # the derivatives of the number of spikes
        for n in tl.static_range(1 if sums is None else 1 + len(sums)):  # noqa: B007
            found = found + (zero,)
            for _ in tl.static_range(len(states)):
                moving = moving + (zero,)
        if K > 0:
            for _ in tl.static_range(K):
                after, ds, moved = tangent(current, states, p, moving, a)
                states, moving, found = as_tiles(after, current), as_tiles(moved, current), _add(found, ds)
            g = g * (1.0 / K)
        else:
            for _ in range(T):
                after, ds, moved = tangent(current, states, p, moving, a)
                states, moving, found = as_tiles(after, current), as_tiles(moved, current), _add(found, ds)
            g = g / T
        d = tl.where(found[0] == 0.0, 0.0, g * found[0])
        if gate_ptr is not None:
            dgate = (d * x * open_ * (1.0 - open_)).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + first + rows * dgate_r + cols, dgate, mask=mask)
            d = d * open_
        tl.store(dx_ptr + first + rows * dx_r + cols, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if sums is not None:
            added = ()
            for n in tl.static_range(len(sums)):
                d = found[n + 1]  # an infinite g times 0 is 0
                added = added + (totals[n] + tl.where(mask & (d != 0.0), g * d, 0.0),)
            totals = added
    if sums is not None:
        store_sums(sums, totals, block, C, first, cols, mask_c, F)


# --- launchers: the same signatures as in cpu/rate.py ------------------------------------------------------------------------


def rate_forward(variant, x, residual, gate, parameters, T, out, tuning):
    """Fill out with residual + rate, or with the spike counts if out is uint8. x must not be empty."""
    K = T if T <= LIF_CHECKPOINT_STEPS else 0
    flags = flags_of(variant, parameters, K, COUNTS=out.dtype == torch.uint8)
    layout = layout_of_step(x, out, flags.PER_CHANNEL)
    tensors, numbers = values_of(variant, parameters, x)
    starts = ((None, 0),) * len(variant.neuron.states)
    inputs = step_view(layout, x), maybe_step_view(layout, gate), maybe_step_view(layout, residual), starts
    Grid(tuning, layout, x.dtype, False, flags.PER_CHANNEL).launch(
        bind(rate_forward_kernel, f"{variant.neuron.name}_rate_forward_kernel", variant.neuron, variant.flags), x.device,
        inputs, step_view(layout, out), tensors, T, layout.R, layout.C, *numbers, F=flags,
    )  # fmt: skip


def rate_backward(variant, g, x, gate, parameters, T, dx, dgate, with_parameters, tuning):
    """Fill dx, and dgate if given. If ``with_parameters``, return a partial sum per parameter. x must not be empty."""
    neuron, flags = variant.neuron, flags_of(variant, parameters, T if T <= LIF_CHECKPOINT_STEPS else 0)
    layout = layout_of_step(x, dx, flags.PER_CHANNEL)
    g, _, g_r, g_c = gradient_view(layout, g.unsqueeze(0), g.dtype)
    grid = Grid(tuning, layout, x.dtype, with_parameters, flags.PER_CHANNEL)
    sums = grid.partial_sums(layout, flags.KINDS[: len(parameters)], x) if with_parameters else None
    tensors, numbers = values_of(variant, parameters, x)
    starts = ((None, 0),) * len(neuron.states)
    grid.launch(
        bind(
            rate_backward_kernel, f"{neuron.name}_rate_backward_kernel", neuron, variant.flags, variant.surrogate,
            with_parameters,
        ),
        x.device, (step_view(layout, x), maybe_step_view(layout, gate), starts), (g, g_r, g_c),
        (step_view(layout, dx), maybe_step_view(layout, dgate), sums), tensors, T, layout.R, layout.C, grid.group,
        *numbers, variant.alpha, F=flags,
    )  # fmt: skip
    return sums
