"""LIF in Triton. A program holds a tile of neurons (rows x columns, columns contiguous) in registers over all steps.

The kernel issues all loads of a segment of up to K steps before it uses the first. The backward pass needs the charge h of
every step. It recomputes h in registers, from v, or for T > LIF_CHECKPOINT_STEPS from the membranes that the forward pass
stored in ``keep``. Arithmetic follows reference/lif.py operation by operation, compiled without fused multiply-adds. Parameter
gradients are summed per program and then over programs, never by atomics.

Numbers arrive as "fp64" and are rounded once to the state type. Triton does not specialise on sizes that change from call to
call.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dtypes import state_dtype
from ..layout import LIF_CHECKPOINT_STEPS, layout_of_step, step_view
from ..surrogate import SURROGATES
from .tiles import (
    STATES,
    Grid,
    contiguous,
    divide,
    gradient_view,
    is_per_channel,
    launch_steps_backward,
    launch_steps_forward,
    load_parameter,
    maybe_step_view,
    store_sums,
    tile_of_program,
)

_ALPHA_PI_HALF: tl.constexpr = tl.constexpr(math.pi / 2)
_INVERSE_ROOT_PI: tl.constexpr = tl.constexpr(1 / math.sqrt(math.pi))


@triton.jit
def surrogate_derivative(z, alpha, KIND: tl.constexpr):
    """Surrogate gradient ds/dz; KIND is the id in SURROGATES."""
    tl.static_assert(KIND <= 8, "unknown surrogate")
    m = tl.abs(z)
    if KIND == 0:
        q = _ALPHA_PI_HALF * alpha * z
        return 0.5 * alpha / (1.0 + q * q)
    elif KIND == 1:
        e = tl.exp(-alpha * m)
        return alpha * e / ((1.0 + e) * (1.0 + e))
    elif KIND == 2:
        p = alpha - alpha * alpha * m
        return tl.where(p < 0.0, 0.0, p)  # not maximum: a NaN stays
    elif KIND == 3:
        return 0.5 * alpha * tl.exp(-alpha * m)
    elif KIND == 4:
        q = 1.0 + alpha * m
        return 0.5 * alpha / (q * q)
    elif KIND == 5:
        q = 1.0 + m
        return alpha / (q * q)
    elif KIND == 6:
        q = alpha * z
        return _INVERSE_ROOT_PI * alpha * tl.exp(-q * q)
    elif KIND == 7:
        return tl.where(m < 0.5 / alpha, alpha, 0.0)
    else:
        q = 1.0 + alpha * m
        return 1.0 / (q * q)


class Flags(NamedTuple):
    """Compile-time constants of the lif and lif_rate kernels."""

    SOFT: bool  # the reset subtracts the threshold
    DECAY: bool  # the leak divides the input too
    TAU_CHANNELS: bool  # tau is one element per column
    THETA_CHANNELS: bool
    K: int  # steps held in registers; lif_rate: T if the loop over steps is unrolled, else 0
    LONG: bool = False  # T > K
    DETACH: bool = False  # no gradient through the reset
    KIND: int = 0  # id of the surrogate in SURROGATES
    COUNTS: bool = False  # lif_rate returns the number of spikes, not their mean


@triton.jit
def charge(x, v, r, v_reset, SOFT: tl.constexpr, DECAY: tl.constexpr):
    """Return (charge h, distance of the membrane from its resting value)."""
    rest = v if SOFT else v - v_reset
    h = v + (x - rest) * r if DECAY else v - rest * r + x
    return h, rest


@triton.jit
def reset_membrane(h, theta, v_reset, SOFT: tl.constexpr):
    return tl.where(h >= theta, h - theta if SOFT else v_reset, h)


@triton.jit
def reset_membrane_at(h, z, v_reset, SOFT: tl.constexpr):
    """Same as reset_membrane, bit for bit, computed from z = h - theta for the backward pass.

    With reset_membrane, the compiler would recognise the values of the recomputed forward pass and keep them in registers
    instead of computing them again: too many values, which spill.
    """
    return tl.where(z >= 0.0, z if SOFT else v_reset, h)


@triton.jit
def load_leak(tau_ptr, r, cols, mask, CHANNELS: tl.constexpr, STATE: tl.constexpr):
    """Load r = 1/tau."""
    p = load_parameter(tau_ptr, r, cols, mask, CHANNELS, STATE)
    return p if tau_ptr is None else divide(tl.full(p.shape, 1.0, STATE), p)


@triton.jit(do_not_specialize=["T", "R"])
def lif_forward_kernel(
    inputs, outputs, parameters, T, R, C, r: "fp64", theta: "fp64", v_reset: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_t, x_r = inputs[0]
    v_ptr, v_r = inputs[1]
    s_ptr, s_t, s_r = outputs[0]
    v_final_ptr, v_final_r = outputs[1]
    seq_ptr, seq_t, seq_r = outputs[2]
    keep_ptr, keep_t, keep_r = outputs[3]
    tau_ptr, theta_ptr = parameters
    K: tl.constexpr = F.K
    block, row, first, cols, mask_c = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    r_ = load_leak(tau_ptr, r, first + cols, mask_c, F.TAU_CHANNELS, STATE)
    th = load_parameter(theta_ptr, theta, first + cols, mask_c, F.THETA_CHANNELS, STATE)
    reset = tl.full([], v_reset, STATE)
    if v_ptr is None:
        v = tl.zeros([BR, BC], STATE) + reset
    else:
        v = tl.load(v_ptr + first + rows * v_r + cols, mask=mask, other=0.0).to(STATE)
    segments = tl.cdiv(T, K) if F.LONG else 1
    for i in range(segments):
        segment = tl.cast(i, tl.int64)
        t0 = segment * K
        if keep_ptr is not None:
            if segment > 0:
                tl.store(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, v, mask=mask)
        xs = ()
        for k in tl.static_range(K):
            m = mask & (t0 + k < T) if F.LONG else mask
            xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
        for k in tl.static_range(K):
            h, rest = charge(xs[k].to(STATE), v, r_, reset, F.SOFT, F.DECAY)
            m = mask & (t0 + k < T) if F.LONG else mask
            spike = tl.where(h >= th, 1.0, 0.0).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + (t0 + k) * s_t + rows * s_r + cols, spike, mask=m)
            after = reset_membrane(h, th, reset, F.SOFT)
            v = tl.where(t0 + k < T, after, v) if F.LONG else after
            if seq_ptr is not None:
                tl.store(seq_ptr + first + (t0 + k) * seq_t + rows * seq_r + cols, v, mask=m)
    if v_final_ptr is not None:
        tl.store(v_final_ptr + first + rows * v_final_r + cols, v, mask=mask)


@triton.jit(do_not_specialize=["T", "R", "group"])
def lif_backward_kernel(
    inputs, upstream, gradients, parameters, T, R, C, group, r: "fp64", theta: "fp64", v_reset: "fp64", alpha: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_t, x_r = inputs[0]
    v_ptr, v_r = inputs[1]
    keep_ptr, keep_t, keep_r = inputs[2]
    g_ptr, g_t, g_r, g_c = upstream[0]
    g_v_ptr, g_v_r = upstream[1]
    g_seq_ptr, g_seq_t, g_seq_r = upstream[2]
    dx_ptr, dx_t, dx_r = gradients[0]
    dv_ptr, dv_r = gradients[1]
    dr_ptr, dtheta_ptr = gradients[2]
    tau_ptr, theta_ptr = parameters
    K: tl.constexpr = F.K
    block, row, first, cols, mask_c = tile_of_program(R, C, group, BR, BC)
    r_ = load_leak(tau_ptr, r, first + cols, mask_c, F.TAU_CHANNELS, STATE)
    th = load_parameter(theta_ptr, theta, first + cols, mask_c, F.THETA_CHANNELS, STATE)
    reset, a = tl.full([], v_reset, STATE), tl.full([], alpha, STATE)
    sum_r = tl.zeros([BR, BC], STATE)
    sum_theta = tl.zeros([BR, BC], STATE)
    for i in range(1 if dr_ptr is None else group):
        rows = row + i * BR + tl.arange(0, BR)[:, None]
        mask = mask_c & (rows < R)
        if g_v_ptr is None:
            carry = tl.zeros([BR, BC], STATE)
        else:
            carry = tl.load(g_v_ptr + first + rows * g_v_r + cols, mask=mask, other=0.0)
        segments = tl.cdiv(T, K) if F.LONG else 1
        for j in range(segments):
            segment = tl.cast(segments - 1 - j, tl.int64)
            t0 = segment * K
            if v_ptr is None:
                start = tl.zeros([BR, BC], STATE) + reset
            else:
                start = tl.load(v_ptr + first + rows * v_r + cols, mask=mask, other=0.0).to(STATE)
            if F.LONG:
                if segment > 0:
                    start = tl.load(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, mask=mask, other=0.0)
            # Loads compare with this, stores compare t0 + k with T. With one comparison for both, the compiler would keep the
            # masks of all steps in registers.
            steps_left = T - t0
            xs = ()
            gs = ()
            for k in tl.static_range(K):
                m = mask & (k < steps_left) if F.LONG else mask
                xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
                if g_ptr is not None:
                    gs = gs + (tl.load(g_ptr + (t0 + k) * g_t + rows * g_r + (first + cols) * g_c, mask=m, other=0.0),)
            hs = ()
            v = start
            for k in tl.static_range(K):  # recompute the charge
                h, rest = charge(xs[k].to(STATE), v, r_, reset, F.SOFT, F.DECAY)
                hs = hs + (h,)
                v = reset_membrane(h, th, reset, F.SOFT)
            for k in tl.static_range(K - 1, -1, -1):  # backward pass
                m = mask & (t0 + k < T) if F.LONG else mask
                h = hs[k]
                z = h - th
                fired = z >= 0.0  # equals h >= th; see reset_membrane_at
                if g_seq_ptr is not None:
                    carry += tl.load(g_seq_ptr + first + (t0 + k) * g_seq_t + rows * g_seq_r + cols, mask=m, other=0.0)
                slope = surrogate_derivative(z, a, F.KIND)
                ds = gs[k].to(STATE) if g_ptr is not None else tl.zeros([BR, BC], STATE)  # gradient of the spike
                if not F.DETACH:
                    ds += carry * (-th if F.SOFT else reset - h)
                dz = tl.where(slope == 0.0, 0.0, ds * slope)  # the reset hides an infinite h
                dh = dz + (carry if F.SOFT else tl.where(fired, 0.0, carry))
                if dr_ptr is not None:
                    before = reset_membrane_at(hs[k - 1], hs[k - 1] - th, reset, F.SOFT) if k > 0 else start
                    rest = before if F.SOFT else before - reset
                    sum_r += tl.where(m, dh * (xs[k].to(STATE) - rest if F.DECAY else -rest), 0.0)
                    d_theta = dz
                    if F.SOFT:
                        d_theta += tl.where(fired, carry, 0.0)
                    sum_theta -= tl.where(m, d_theta, 0.0)
                dx = dh * r_ if F.DECAY else dh
                tl.store(dx_ptr + first + (t0 + k) * dx_t + rows * dx_r + cols, dx.to(dx_ptr.dtype.element_ty), mask=m)
                before_t = dh * (1.0 - r_)
                carry = tl.where(t0 + k < T, before_t, carry) if F.LONG else before_t
        if dv_ptr is not None:
            tl.store(dv_ptr + first + rows * dv_r + cols, carry.to(dv_ptr.dtype.element_ty), mask=mask)
    store_sums(dr_ptr, dtheta_ptr, sum_r, sum_theta, block, C, first, cols, mask_c, F.TAU_CHANNELS, F.THETA_CHANNELS)


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


@triton.jit(do_not_specialize=["T", "R"])
def lif_rate_forward_kernel(
    inputs, out, parameters, T, R, C, r: "fp64", theta: "fp64", v_reset: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_r = inputs[0]
    gate_ptr, gate_r = inputs[1]
    residual_ptr, residual_r = inputs[2]
    out_ptr, out_r = out
    tau_ptr, theta_ptr = parameters
    K: tl.constexpr = F.K
    block, row, first, cols, mask_c = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    r_ = load_leak(tau_ptr, r, first + cols, mask_c, F.TAU_CHANNELS, STATE)
    th = load_parameter(theta_ptr, theta, first + cols, mask_c, F.THETA_CHANNELS, STATE)
    reset = tl.full([], v_reset, STATE)
    current, x, p = _current(x_ptr, gate_ptr, first + rows * x_r + cols, first + rows * gate_r + cols, mask, STATE)
    v = tl.zeros([BR, BC], STATE) + reset
    count = tl.zeros([BR, BC], STATE)
    if K > 0:
        for _ in tl.static_range(K):
            h, rest = charge(current, v, r_, reset, F.SOFT, F.DECAY)
            count += (h >= th).to(STATE)
            v = reset_membrane(h, th, reset, F.SOFT)
    else:
        for _ in range(T):
            h, rest = charge(current, v, r_, reset, F.SOFT, F.DECAY)
            count += (h >= th).to(STATE)
            v = reset_membrane(h, th, reset, F.SOFT)
    at = first + rows * out_r + cols
    if F.COUNTS:
        tl.store(out_ptr + at, count.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if K > 0 and (K & (K - 1)) == 0:
            rate = count * (1.0 / K)
        else:
            rate = divide(count, tl.zeros([BR, BC], STATE) + T)
        if residual_ptr is not None:
            rate = tl.load(residual_ptr + first + rows * residual_r + cols, mask=mask, other=0.0).to(STATE) + rate
        tl.store(out_ptr + at, rate.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tangent(d_h, d_through, slope, fired, q, SOFT: tl.constexpr):
    """Return the tangents (d s, d v after the reset) for the tangents d_h of the charge and d_through of h - theta."""
    ds = slope * d_through
    return ds, (d_h if SOFT else tl.where(fired, 0.0, d_h)) + q * ds


@triton.jit
def _rate_step(state, current, bounded, r_, th, reset, a, PARAMETERS: tl.constexpr, F: tl.constexpr):
    """Advance the membrane and its tangents by one step.

    state = (v, v_x, s_x, v_r, s_r, v_th, s_th): v_x is dv/dx, s_x is the sum of ds/dx over the steps. The others are the same
    for r and theta.
    """
    v, v_x, s_x, v_r, s_r, v_th, s_th = state
    h, rest = charge(bounded, v, r_, reset, F.SOFT, F.DECAY)
    fired = h >= th
    slope = surrogate_derivative(h - th, a, F.KIND)
    q = tl.zeros_like(h) if F.DETACH else (tl.zeros_like(h) - th if F.SOFT else reset - h)
    if F.KIND == 7 and not (F.DETACH or F.SOFT):  # the derivative of rect is 0 even where h is NaN, and 0 * q must be 0 there
        q = tl.minimum(q, 1e38)  # the lesser, and 1e38 for a NaN
    leak = 1.0 - r_
    h_x = v_x * leak + (r_ if F.DECAY else 1.0)
    ds, v_x = _tangent(h_x, h_x, slope, fired, q, F.SOFT)
    s_x += ds
    if PARAMETERS:
        h_r = v_r * leak + (current - rest if F.DECAY else -rest)
        ds, v_r = _tangent(h_r, h_r, slope, fired, q, F.SOFT)
        s_r += ds
        h_th = v_th * leak
        ds, v_th = _tangent(tl.where(fired, h_th - 1.0, h_th) if F.SOFT else h_th, h_th - 1.0, slope, fired, q, F.SOFT)
        s_th += ds
    return reset_membrane(h, th, reset, F.SOFT), v_x, s_x, v_r, s_r, v_th, s_th


@triton.jit(do_not_specialize=["T", "R", "group"])
def lif_rate_backward_kernel(
    inputs, upstream, gradients, parameters, T, R, C, group, r: "fp64", theta: "fp64", v_reset: "fp64", alpha: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Propagate the tangents forward in time together with the membrane.

    This is cheap because a neuron has one input and one output. No step is stored, so the memory does not grow with T.
    """
    x_ptr, x_r = inputs[0]
    gate_ptr, gate_r = inputs[1]
    g_ptr, g_r, g_c = upstream
    dx_ptr, dx_r = gradients[0]
    dgate_ptr, dgate_r = gradients[1]
    dr_ptr, dtheta_ptr = gradients[2]
    tau_ptr, theta_ptr = parameters
    K: tl.constexpr = F.K
    block, row, first, cols, mask_c = tile_of_program(R, C, group, BR, BC)
    r_ = load_leak(tau_ptr, r, first + cols, mask_c, F.TAU_CHANNELS, STATE)
    th = load_parameter(theta_ptr, theta, first + cols, mask_c, F.THETA_CHANNELS, STATE)
    reset, a = tl.full([], v_reset, STATE), tl.full([], alpha, STATE)
    PARAMETERS: tl.constexpr = dr_ptr is not None
    sum_r = tl.zeros([BR, BC], STATE)
    sum_theta = tl.zeros([BR, BC], STATE)
    for i in range(1 if dr_ptr is None else group):
        rows = row + i * BR + tl.arange(0, BR)[:, None]
        mask = mask_c & (rows < R)
        g = tl.load(g_ptr + rows * g_r + (first + cols) * g_c, mask=mask, other=0.0).to(STATE)
        current, x, p = _current(x_ptr, gate_ptr, first + rows * x_r + cols, first + rows * gate_r + cols, mask, STATE)
        # A hard reset hides an infinite current: the neuron fires in every step, and every surrogate gradient is 0 there. A
        # current of 1e30 gives the same result without infinities.
        bounded = current if F.SOFT else tl.where(current > 1e30, 1e30, current)
        zero = tl.zeros([BR, BC], STATE)
        state = (zero + reset, zero, zero, zero, zero, zero, zero)
        if K > 0:
            for _ in tl.static_range(K):
                state = _rate_step(state, current, bounded, r_, th, reset, a, PARAMETERS, F)
            g = g * (1.0 / K)
        else:
            for _ in range(T):
                state = _rate_step(state, current, bounded, r_, th, reset, a, PARAMETERS, F)
            g = g / T
        d = tl.where(state[2] == 0.0, 0.0, g * state[2])
        if gate_ptr is not None:
            dgate = (d * x * p * (1.0 - p)).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + first + rows * dgate_r + cols, dgate, mask=mask)
            d = d * p
        tl.store(dx_ptr + first + rows * dx_r + cols, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if PARAMETERS:
            sum_r += tl.where(mask & (state[4] != 0.0), g * state[4], 0.0)  # not an infinite g times 0
            sum_theta += tl.where(mask & (state[6] != 0.0), g * state[6], 0.0)
    store_sums(dr_ptr, dtheta_ptr, sum_r, sum_theta, block, C, first, cols, mask_c, F.TAU_CHANNELS, F.THETA_CHANNELS)


# --- launchers: the same signatures as in cpu/lif.py ------------------------------------------------------------------------


def flags_of(neuron, tau, v_threshold, K, **flags):
    channels = is_per_channel(tau), is_per_channel(v_threshold)
    return Flags(neuron.v_reset is None, neuron.decay_input, *channels, K, **flags)


def numbers_of(neuron):
    return 1.0 / neuron.tau, neuron.v_threshold, neuron.v_reset or 0.0


def lif_forward(x, v, tau, v_threshold, neuron, s, v_final, v_seq, checkpoint, tuning):
    """Fill s, and v_final, v_seq and checkpoint if given. x must not be empty."""
    T = x.shape[0]
    flags = flags_of(neuron, tau, v_threshold, min(T, LIF_CHECKPOINT_STEPS), LONG=T > LIF_CHECKPOINT_STEPS)
    launch_steps_forward(
        lif_forward_kernel, x, v, tau, v_threshold, s, v_final, v_seq, checkpoint, numbers_of(neuron), flags, tuning
    )


def lif_backward(g, g_v, g_seq, x, v, tau, v_threshold, checkpoint, neuron, dx, dv, parameters, tuning):
    """Fill dx, and dv if given. If ``parameters``, return partial sums of d r and d theta. x must not be empty."""
    T, kind = x.shape[0], SURROGATES[neuron.surrogate].id
    flags = flags_of(
        neuron, tau, v_threshold, min(T, LIF_CHECKPOINT_STEPS), LONG=T > LIF_CHECKPOINT_STEPS, DETACH=neuron.detach_reset,
        KIND=kind,
    )  # fmt: skip
    return launch_steps_backward(
        lif_backward_kernel, g, g_v, g_seq, x, v, tau, v_threshold, checkpoint, dx, dv, parameters,
        (*numbers_of(neuron), neuron.alpha), flags, tuning,
    )  # fmt: skip


def lif_rate_forward(x, residual, gate, tau, v_threshold, T, neuron, out, tuning):
    """Fill out with residual + rate, or with the spike counts if out is uint8. x must not be empty."""
    flags = flags_of(neuron, tau, v_threshold, T if T <= LIF_CHECKPOINT_STEPS else 0, COUNTS=out.dtype == torch.uint8)
    per_channel = flags.TAU_CHANNELS or flags.THETA_CHANNELS
    layout = layout_of_step(x, out, per_channel)
    Grid(tuning, layout, x.dtype, False, per_channel).launch(
        lif_rate_forward_kernel, x.device,
        (step_view(layout, x), maybe_step_view(layout, gate), maybe_step_view(layout, residual)), step_view(layout, out),
        (contiguous(tau), contiguous(v_threshold)), T, layout.R, layout.C, *numbers_of(neuron),
        F=flags, STATE=STATES[state_dtype(x.dtype)],
    )  # fmt: skip


def lif_rate_backward(g, x, gate, tau, v_threshold, T, neuron, dx, dgate, parameters, tuning):
    """Fill dx, and dgate if given. If ``parameters``, return partial sums of d r and d theta. x must not be empty."""
    K, kind = T if T <= LIF_CHECKPOINT_STEPS else 0, SURROGATES[neuron.surrogate].id
    flags = flags_of(neuron, tau, v_threshold, K, DETACH=neuron.detach_reset, KIND=kind)
    per_channel = flags.TAU_CHANNELS or flags.THETA_CHANNELS
    layout = layout_of_step(x, dx, per_channel)
    g, _, g_r, g_c = gradient_view(layout, g.unsqueeze(0), g.dtype)
    grid = Grid(tuning, layout, x.dtype, parameters, per_channel)
    sums = grid.partial_sums(layout, per_channel, x) if parameters else None
    grid.launch(
        lif_rate_backward_kernel, x.device, (step_view(layout, x), maybe_step_view(layout, gate)), (g, g_r, g_c),
        (step_view(layout, dx), maybe_step_view(layout, dgate), sums or (None, None)),
        (contiguous(tau), contiguous(v_threshold)), T, layout.R, layout.C, grid.group,
        *numbers_of(neuron), neuron.alpha, F=flags, STATE=STATES[state_dtype(x.dtype)],
    )  # fmt: skip
    return sums
