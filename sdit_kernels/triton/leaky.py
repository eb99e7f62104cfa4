"""Leaky in Triton, as triton/lif.py: a program holds a tile of neurons in registers while the steps go by.

The walk back holds the membrane before every step and computes the charge from it once more. Arithmetic follows
reference/leaky.py operation by operation, compiled without fused multiply-adds.
"""

import triton
import triton.language as tl

from ..reference.lif import state_dtype
from .lif import (
    _STATES,
    _launch_backward,
    _launch_forward,
    _parameter,
    _per_channel,
    _store_sums,
    _tile,
    surrogate_derivative,
)

_RESETS = {"subtract": 0, "zero": 1, "none": 2}


@triton.jit
def _charge(x, v, k, th, RESET: tl.constexpr):
    """h, and what the membrane before the step has left to decay."""
    tl.static_assert(RESET <= 2, "unknown reset")
    left = tl.where(v > th, 0.0, v) if RESET == 1 else v
    h = k * left + x
    return tl.where(v > th, h - th, h) if RESET == 0 else h, left


@triton.jit
def _after(h, v, th, RESET: tl.constexpr, DELAY: tl.constexpr):
    """The membrane after the step; ``v`` is that before it."""
    if DELAY:
        return h
    elif RESET == 0:
        return h - (tl.where(h > th, 1.0, 0.0) - tl.where(v > th, 1.0, 0.0)).to(h.dtype) * th
    else:
        return tl.where(h > th, tl.where(v > th, h, 0.0), tl.where(v > th, h + h, h))


@triton.jit(do_not_specialize=["T", "R"])
def leaky_forward_kernel(
    x_ptr, s_ptr, v_ptr, v_final_ptr, seq_ptr, keep_ptr, beta_ptr, theta_ptr,
    T, R, C, x_t, x_r, s_t, s_r, v_r, v_final_r, seq_t, seq_r, keep_t, keep_r, beta: "fp64", theta: "fp64",
    K: tl.constexpr, LONG: tl.constexpr, RESET: tl.constexpr, DELAY: tl.constexpr,
    BETA_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    block, row, first, cols, mask_c = _tile(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    k_ = _parameter(beta_ptr, beta, first + cols, mask_c, BETA_CHANNELS, STATE)
    th = _parameter(theta_ptr, theta, first + cols, mask_c, THETA_CHANNELS, STATE)
    if v_ptr is None:
        v = tl.zeros([BR, BC], STATE)
    else:
        v = tl.load(v_ptr + first + rows * v_r + cols, mask=mask, other=0.0).to(STATE)
    segments = tl.cdiv(T, K) if LONG else 1
    for i in range(segments):
        segment = tl.cast(i, tl.int64)
        t0 = segment * K
        if keep_ptr is not None:
            if segment > 0:
                tl.store(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, v, mask=mask)
        xs = ()
        for k in tl.static_range(K):
            m = mask & (t0 + k < T) if LONG else mask
            xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
        for k in tl.static_range(K):
            h, left = _charge(xs[k].to(STATE), v, k_, th, RESET)
            m = mask & (t0 + k < T) if LONG else mask
            spike = tl.where(h > th, 1.0, 0.0).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + (t0 + k) * s_t + rows * s_r + cols, spike, mask=m)
            after = _after(h, v, th, RESET, DELAY)
            v = tl.where(t0 + k < T, after, v) if LONG else after
            if seq_ptr is not None:
                tl.store(seq_ptr + first + (t0 + k) * seq_t + rows * seq_r + cols, v, mask=m)
    if v_final_ptr is not None:
        tl.store(v_final_ptr + first + rows * v_final_r + cols, v, mask=mask)


@triton.jit(do_not_specialize=["T", "R", "group"])
def leaky_backward_kernel(
    x_ptr, v_ptr, keep_ptr, g_ptr, g_v_ptr, g_seq_ptr, dx_ptr, dv_ptr, dbeta_ptr, dtheta_ptr, beta_ptr, theta_ptr,
    T, R, C, group, x_t, x_r, v_r, keep_t, keep_r, g_t, g_r, g_c, g_v_r, g_seq_t, g_seq_r, dx_t, dx_r, dv_r,
    beta: "fp64", theta: "fp64", alpha: "fp64",
    K: tl.constexpr, LONG: tl.constexpr, RESET: tl.constexpr, DELAY: tl.constexpr, KIND: tl.constexpr,
    BETA_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    block, row, first, cols, mask_c = _tile(R, C, group, BR, BC)
    k_ = _parameter(beta_ptr, beta, first + cols, mask_c, BETA_CHANNELS, STATE)
    th = _parameter(theta_ptr, theta, first + cols, mask_c, THETA_CHANNELS, STATE)
    a = tl.full([], alpha, STATE)
    sum_beta = tl.zeros([BR, BC], STATE)
    sum_theta = tl.zeros([BR, BC], STATE)
    for i in range(1 if dbeta_ptr is None else group):
        rows = row + i * BR + tl.arange(0, BR)[:, None]
        mask = mask_c & (rows < R)
        if g_v_ptr is None:
            carry = tl.zeros([BR, BC], STATE)
        else:
            carry = tl.load(g_v_ptr + first + rows * g_v_r + cols, mask=mask, other=0.0)
        segments = tl.cdiv(T, K) if LONG else 1
        for j in range(segments):
            segment = tl.cast(segments - 1 - j, tl.int64)
            t0 = segment * K
            if v_ptr is None:
                v = tl.zeros([BR, BC], STATE)
            else:
                v = tl.load(v_ptr + first + rows * v_r + cols, mask=mask, other=0.0).to(STATE)
            if LONG:
                if segment > 0:
                    v = tl.load(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, mask=mask, other=0.0)
            left_steps = T - t0  # for the loads; the stores compare t0 + k with T, or the masks of all steps would be kept
            xs = ()
            gs = ()
            for k in tl.static_range(K):
                m = mask & (k < left_steps) if LONG else mask
                xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
                if g_ptr is not None:
                    gs = gs + (tl.load(g_ptr + (t0 + k) * g_t + rows * g_r + (first + cols) * g_c, mask=m, other=0.0),)
            vs = ()
            for k in tl.static_range(K):  # rebuild the membranes
                vs = vs + (v,)
                if k < K - 1:
                    h, left = _charge(xs[k].to(STATE), v, k_, th, RESET)
                    v = _after(h, v, th, RESET, DELAY)
            for k in tl.static_range(K - 1, -1, -1):  # walk back
                m = mask & (t0 + k < T) if LONG else mask
                before = vs[k]
                h, left = _charge(xs[k].to(STATE), before, k_, th, RESET)
                reset = tl.where(before > th, 1.0, 0.0).to(STATE)
                fired = tl.where(h > th, 1.0, 0.0).to(STATE)
                if g_seq_ptr is not None:
                    carry += tl.load(g_seq_ptr + first + (t0 + k) * g_seq_t + rows * g_seq_r + cols, mask=m, other=0.0)
                through = gs[k].to(STATE) if g_ptr is not None else tl.zeros([BR, BC], STATE)  # reaches the step function
                dh = carry
                if not DELAY:
                    through -= carry * (th if RESET == 0 else h)
                    if RESET == 1:
                        dh = tl.where(h > th, tl.where(before > th, carry, 0.0), tl.where(before > th, carry + carry, carry))
                slope = surrogate_derivative(h - th, a, KIND)
                through = tl.where(slope == 0.0, 0.0, through * slope)  # an infinite h is hidden by the reset
                dh = dh + through
                if dbeta_ptr is not None:
                    sum_beta += tl.where(m, dh * left, 0.0) if LONG else dh * left
                    if RESET == 0:
                        through = tl.where(before > th, through + dh, through)
                        if not DELAY:
                            through += (fired - reset) * carry
                    sum_theta -= tl.where(m, through, 0.0) if LONG else through
                tl.store(dx_ptr + first + (t0 + k) * dx_t + rows * dx_r + cols, dh.to(dx_ptr.dtype.element_ty), mask=m)
                before_t = tl.where(before > th, 0.0, dh * k_) if RESET == 1 else dh * k_
                carry = tl.where(t0 + k < T, before_t, carry) if LONG else before_t
        if dv_ptr is not None:
            tl.store(dv_ptr + first + rows * dv_r + cols, carry.to(dv_ptr.dtype.element_ty), mask=mask)
    _store_sums(dbeta_ptr, dtheta_ptr, sum_beta, sum_theta, block, C, first, cols, mask_c, BETA_CHANNELS, THETA_CHANNELS)


def _flags(neuron, beta, v_threshold, dtype):
    return dict(
        RESET=_RESETS[neuron.reset],
        DELAY=neuron.reset_delay or neuron.reset == "none",
        BETA_CHANNELS=_per_channel(beta),
        THETA_CHANNELS=_per_channel(v_threshold),
        STATE=_STATES[state_dtype(dtype)],
    )


def leaky_forward(x, v, beta, v_threshold, neuron, s, v_final, v_seq, checkpoint):
    """Fill s, and v_final, v_seq, checkpoint where they are given. x is not empty."""
    flags = _flags(neuron, beta, v_threshold, x.dtype)
    numbers = neuron.beta, neuron.v_threshold
    _launch_forward(leaky_forward_kernel, x, v, beta, v_threshold, s, v_final, v_seq, checkpoint, *numbers, **flags)


def leaky_backward(g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, neuron, dx, dv, parameters):
    """Fill dx and, where given, dv; return, if ``parameters``, sums of d beta and d theta. x is not empty."""
    return _launch_backward(
        leaky_backward_kernel, g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, neuron, dx, dv, parameters, neuron.beta,
        neuron.v_threshold, **_flags(neuron, beta, v_threshold, x.dtype),
    )  # fmt: skip
