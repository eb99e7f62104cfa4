"""Leaky in Triton, built like triton/lif.py: a program holds a tile of neurons in registers over all steps.

The backward pass holds the membrane before every step and recomputes the charge h from it. Arithmetic follows
reference/leaky.py operation by operation, compiled without fused multiply-adds.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..layout import LIF_CHECKPOINT_STEPS
from ..surrogate import SURROGATES
from .lif import surrogate_derivative
from .tiles import is_per_channel, launch_steps_backward, launch_steps_forward, load_parameter, store_sums, tile_of_program

_RESETS = {"subtract": 0, "zero": 1, "none": 2}


class Flags(NamedTuple):
    """Compile-time constants of the leaky kernels."""

    RESET: int  # id in _RESETS
    DELAY: bool  # the reset happens in the step after the spike
    BETA_CHANNELS: bool  # beta is one element per column
    THETA_CHANNELS: bool
    K: int  # steps held in registers
    LONG: bool  # T > K
    KIND: int = 0  # id of the surrogate in SURROGATES


@triton.jit
def _charge(x, v, k, th, RESET: tl.constexpr):
    """Return (h, the part of the membrane that decays in this step)."""
    tl.static_assert(RESET <= 2, "unknown reset")
    decaying = tl.where(v > th, 0.0, v) if RESET == 1 else v
    h = k * decaying + x
    return tl.where(v > th, h - th, h) if RESET == 0 else h, decaying


@triton.jit
def _reset_membrane(h, v, th, RESET: tl.constexpr, DELAY: tl.constexpr):
    """Return the membrane after a step from the charge h and the membrane v before the step."""
    if DELAY:
        return h
    elif RESET == 0:
        return h - (tl.where(h > th, 1.0, 0.0) - tl.where(v > th, 1.0, 0.0)).to(h.dtype) * th
    else:
        return tl.where(h > th, tl.where(v > th, h, 0.0), tl.where(v > th, h + h, h))


@triton.jit(do_not_specialize=["T", "R"])
def leaky_forward_kernel(
    inputs, outputs, parameters, T, R, C, beta: "fp64", theta: "fp64",
    F: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    x_ptr, x_t, x_r = inputs[0]
    v_ptr, v_r = inputs[1]
    s_ptr, s_t, s_r = outputs[0]
    v_final_ptr, v_final_r = outputs[1]
    seq_ptr, seq_t, seq_r = outputs[2]
    keep_ptr, keep_t, keep_r = outputs[3]
    beta_ptr, theta_ptr = parameters
    K: tl.constexpr = F.K
    block, row, first, cols, mask_c = tile_of_program(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    k_ = load_parameter(beta_ptr, beta, first + cols, mask_c, F.BETA_CHANNELS, STATE)
    th = load_parameter(theta_ptr, theta, first + cols, mask_c, F.THETA_CHANNELS, STATE)
    if v_ptr is None:
        v = tl.zeros([BR, BC], STATE)
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
            h, decaying = _charge(xs[k].to(STATE), v, k_, th, F.RESET)
            m = mask & (t0 + k < T) if F.LONG else mask
            spike = tl.where(h > th, 1.0, 0.0).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + (t0 + k) * s_t + rows * s_r + cols, spike, mask=m)
            after = _reset_membrane(h, v, th, F.RESET, F.DELAY)
            v = tl.where(t0 + k < T, after, v) if F.LONG else after
            if seq_ptr is not None:
                tl.store(seq_ptr + first + (t0 + k) * seq_t + rows * seq_r + cols, v, mask=m)
    if v_final_ptr is not None:
        tl.store(v_final_ptr + first + rows * v_final_r + cols, v, mask=mask)


@triton.jit(do_not_specialize=["T", "R", "group"])
def leaky_backward_kernel(
    inputs, upstream, gradients, parameters, T, R, C, group, beta: "fp64", theta: "fp64", alpha: "fp64",
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
    dbeta_ptr, dtheta_ptr = gradients[2]
    beta_ptr, theta_ptr = parameters
    K: tl.constexpr = F.K
    block, row, first, cols, mask_c = tile_of_program(R, C, group, BR, BC)
    k_ = load_parameter(beta_ptr, beta, first + cols, mask_c, F.BETA_CHANNELS, STATE)
    th = load_parameter(theta_ptr, theta, first + cols, mask_c, F.THETA_CHANNELS, STATE)
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
        segments = tl.cdiv(T, K) if F.LONG else 1
        for j in range(segments):
            segment = tl.cast(segments - 1 - j, tl.int64)
            t0 = segment * K
            if v_ptr is None:
                v = tl.zeros([BR, BC], STATE)
            else:
                v = tl.load(v_ptr + first + rows * v_r + cols, mask=mask, other=0.0).to(STATE)
            if F.LONG:
                if segment > 0:
                    v = tl.load(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, mask=mask, other=0.0)
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
            vs = ()
            for k in tl.static_range(K):  # recompute the membranes
                vs = vs + (v,)
                if k < K - 1:
                    h, decaying = _charge(xs[k].to(STATE), v, k_, th, F.RESET)
                    v = _reset_membrane(h, v, th, F.RESET, F.DELAY)
            for k in tl.static_range(K - 1, -1, -1):  # backward pass
                m = mask & (t0 + k < T) if F.LONG else mask
                before = vs[k]
                h, decaying = _charge(xs[k].to(STATE), before, k_, th, F.RESET)
                reset = tl.where(before > th, 1.0, 0.0).to(STATE)
                fired = tl.where(h > th, 1.0, 0.0).to(STATE)
                if g_seq_ptr is not None:
                    carry += tl.load(g_seq_ptr + first + (t0 + k) * g_seq_t + rows * g_seq_r + cols, mask=m, other=0.0)
                ds = gs[k].to(STATE) if g_ptr is not None else tl.zeros([BR, BC], STATE)  # gradient of the spike
                dh = carry
                if not F.DELAY:
                    ds -= carry * (th if F.RESET == 0 else h)
                    if F.RESET == 1:
                        dh = tl.where(h > th, tl.where(before > th, carry, 0.0), tl.where(before > th, carry + carry, carry))
                slope = surrogate_derivative(h - th, a, F.KIND)
                dz = tl.where(slope == 0.0, 0.0, ds * slope)  # the reset hides an infinite h
                dh = dh + dz
                if dbeta_ptr is not None:
                    sum_beta += tl.where(m, dh * decaying, 0.0) if F.LONG else dh * decaying
                    if F.RESET == 0:
                        dz = tl.where(before > th, dz + dh, dz)
                        if not F.DELAY:
                            dz += (fired - reset) * carry
                    sum_theta -= tl.where(m, dz, 0.0) if F.LONG else dz
                tl.store(dx_ptr + first + (t0 + k) * dx_t + rows * dx_r + cols, dh.to(dx_ptr.dtype.element_ty), mask=m)
                before_t = tl.where(before > th, 0.0, dh * k_) if F.RESET == 1 else dh * k_
                carry = tl.where(t0 + k < T, before_t, carry) if F.LONG else before_t
        if dv_ptr is not None:
            tl.store(dv_ptr + first + rows * dv_r + cols, carry.to(dv_ptr.dtype.element_ty), mask=mask)
    store_sums(dbeta_ptr, dtheta_ptr, sum_beta, sum_theta, block, C, first, cols, mask_c, F.BETA_CHANNELS, F.THETA_CHANNELS)


def _flags(neuron, beta, v_threshold, T, KIND=0):
    channels = is_per_channel(beta), is_per_channel(v_threshold)
    long, delay = T > LIF_CHECKPOINT_STEPS, neuron.reset_delay or neuron.reset == "none"
    return Flags(_RESETS[neuron.reset], delay, *channels, min(T, LIF_CHECKPOINT_STEPS), long, KIND)


def leaky_forward(x, v, beta, v_threshold, neuron, s, v_final, v_seq, checkpoint, tuning):
    """Fill s, and v_final, v_seq and checkpoint if given. x must not be empty."""
    numbers, flags = (neuron.beta, neuron.v_threshold), _flags(neuron, beta, v_threshold, x.shape[0])
    launch_steps_forward(leaky_forward_kernel, x, v, beta, v_threshold, s, v_final, v_seq, checkpoint, numbers, flags, tuning)


def leaky_backward(g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, neuron, dx, dv, parameters, tuning):
    """Fill dx, and dv if given. If ``parameters``, return partial sums of d beta and d theta. x must not be empty."""
    flags = _flags(neuron, beta, v_threshold, x.shape[0], SURROGATES[neuron.surrogate].id)
    return launch_steps_backward(
        leaky_backward_kernel, g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, dx, dv, parameters,
        (neuron.beta, neuron.v_threshold, neuron.alpha), flags, tuning,
    )  # fmt: skip
