"""LIF in Triton. A program holds a tile of neurons (rows x columns, columns contiguous) in registers while the steps go by.

All loads of a stretch of up to K steps are issued before the first is used. The walk back needs the charge h of every step: it
is rebuilt in registers, from v, or for T > STRIDE from the membranes that the forward pass left in ``keep``. Arithmetic follows
reference/lif.py operation by operation, compiled without fused multiply-adds; parameter gradients are summed per program and
then over programs, never by atomics.

Numbers arrive as "fp64" and are rounded once to the state type; sizes that change from call to call are not specialised on.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ..layout import STRIDE, layout_of, layout_of_step, place, place_state
from ..reference.lif import state_dtype
from ..surrogate import SURROGATES
from . import cdiv, launch, power_of_2

_THREADS = 128
_PROGRAMS = 2048  # programs over which the rows are spread where parameter gradients are summed
_KEPT = 128  # fewer values than this are kept per thread for the walk back: compile_report.py finds spills beyond
_ALPHA_PI_HALF: tl.constexpr = tl.constexpr(math.pi / 2)
_INVERSE_ROOT_PI: tl.constexpr = tl.constexpr(1 / math.sqrt(math.pi))


@triton.jit
def surrogate_derivative(z, alpha, KIND: tl.constexpr):
    """ds/dz; KIND is the id in the table of surrogates."""
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


@triton.jit
def _charge(x, v, r, v_reset, SOFT: tl.constexpr, DECAY: tl.constexpr):
    """h, and the membrane's distance from rest."""
    rest = v if SOFT else v - v_reset
    h = v + (x - rest) * r if DECAY else v - rest * r + x
    return h, rest


@triton.jit
def _reset(h, theta, v_reset, SOFT: tl.constexpr):
    return tl.where(h >= theta, h - theta if SOFT else v_reset, h)


@triton.jit
def _reset_at(h, z, v_reset, SOFT: tl.constexpr):
    """The same from z = h - theta, bit for bit, for the walk back.

    Written as above, every step would be one of the first pass, which compilers then keep instead: too many for the registers.
    """
    return tl.where(z >= 0.0, z if SOFT else v_reset, h)


@triton.jit
def _divide(a, b):
    """a / b rounded to nearest: ``/`` on float32 is approximate on NVIDIA."""
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def _parameter(ptr, value, cols, mask, CHANNELS: tl.constexpr, STATE: tl.constexpr):
    """A number, a scalar tensor, or one element per column, (1, BC) in the state type."""
    if ptr is None:
        return tl.full([], value, STATE)
    elif CHANNELS:
        return tl.load(ptr + cols, mask=mask, other=1.0).to(STATE)
    else:
        return tl.load(ptr).to(STATE)


@triton.jit
def _leak(tau_ptr, r, cols, mask, CHANNELS: tl.constexpr, STATE: tl.constexpr):
    """r = 1/tau."""
    p = _parameter(tau_ptr, r, cols, mask, CHANNELS, STATE)
    return p if tau_ptr is None else _divide(tl.full(p.shape, 1.0, STATE), p)


@triton.jit
def _tile(R, C, group, BR: tl.constexpr, BC: tl.constexpr):
    """(index of the row group, first row, columns, mask of columns) of this program."""
    chunks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    block = pid // chunks
    first = (pid % chunks).to(tl.int64) * BC
    cols = tl.arange(0, BC)[None, :]
    return block, block.to(tl.int64) * group * BR, first, cols, first + cols < C


@triton.jit(do_not_specialize=["T", "R"])
def lif_forward_kernel(
    x_ptr, s_ptr, v_ptr, v_final_ptr, seq_ptr, keep_ptr, tau_ptr, theta_ptr,
    T, R, C, x_t, x_r, s_t, s_r, v_r, v_final_r, seq_t, seq_r, keep_t, keep_r,
    r: "fp64", theta: "fp64", v_reset: "fp64",
    K: tl.constexpr, LONG: tl.constexpr, SOFT: tl.constexpr, DECAY: tl.constexpr,
    TAU_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    block, row, first, cols, mask_c = _tile(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    r_ = _leak(tau_ptr, r, first + cols, mask_c, TAU_CHANNELS, STATE)
    th = _parameter(theta_ptr, theta, first + cols, mask_c, THETA_CHANNELS, STATE)
    reset = tl.full([], v_reset, STATE)
    if v_ptr is None:
        v = tl.zeros([BR, BC], STATE) + reset
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
            h, rest = _charge(xs[k].to(STATE), v, r_, reset, SOFT, DECAY)
            m = mask & (t0 + k < T) if LONG else mask
            spike = tl.where(h >= th, 1.0, 0.0).to(s_ptr.dtype.element_ty)
            tl.store(s_ptr + first + (t0 + k) * s_t + rows * s_r + cols, spike, mask=m)
            after = _reset(h, th, reset, SOFT)
            v = tl.where(t0 + k < T, after, v) if LONG else after
            if seq_ptr is not None:
                tl.store(seq_ptr + first + (t0 + k) * seq_t + rows * seq_r + cols, v, mask=m)
    if v_final_ptr is not None:
        tl.store(v_final_ptr + first + rows * v_final_r + cols, v, mask=mask)


@triton.jit(do_not_specialize=["T", "R", "group"])
def lif_backward_kernel(
    x_ptr, v_ptr, keep_ptr, g_ptr, g_v_ptr, g_seq_ptr, dx_ptr, dv_ptr, dr_ptr, dtheta_ptr, tau_ptr, theta_ptr,
    T, R, C, group, x_t, x_r, v_r, keep_t, keep_r, g_t, g_r, g_c, g_v_r, g_seq_t, g_seq_r, dx_t, dx_r, dv_r,
    r: "fp64", theta: "fp64", v_reset: "fp64", alpha: "fp64",
    K: tl.constexpr, LONG: tl.constexpr, SOFT: tl.constexpr, DECAY: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr,
    TAU_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    block, row, first, cols, mask_c = _tile(R, C, group, BR, BC)
    r_ = _leak(tau_ptr, r, first + cols, mask_c, TAU_CHANNELS, STATE)
    th = _parameter(theta_ptr, theta, first + cols, mask_c, THETA_CHANNELS, STATE)
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
        segments = tl.cdiv(T, K) if LONG else 1
        for j in range(segments):
            segment = tl.cast(segments - 1 - j, tl.int64)
            t0 = segment * K
            if v_ptr is None:
                start = tl.zeros([BR, BC], STATE) + reset
            else:
                start = tl.load(v_ptr + first + rows * v_r + cols, mask=mask, other=0.0).to(STATE)
            if LONG:
                if segment > 0:
                    start = tl.load(keep_ptr + first + (segment - 1) * keep_t + rows * keep_r + cols, mask=mask, other=0.0)
            left = T - t0  # for the loads; the stores compare t0 + k with T, or the masks of all steps would be kept
            xs = ()
            gs = ()
            for k in tl.static_range(K):
                m = mask & (k < left) if LONG else mask
                xs = xs + (tl.load(x_ptr + first + (t0 + k) * x_t + rows * x_r + cols, mask=m, other=0.0),)
                if g_ptr is not None:
                    gs = gs + (tl.load(g_ptr + (t0 + k) * g_t + rows * g_r + (first + cols) * g_c, mask=m, other=0.0),)
            hs = ()
            v = start
            for k in tl.static_range(K):  # rebuild the charge
                h, rest = _charge(xs[k].to(STATE), v, r_, reset, SOFT, DECAY)
                hs = hs + (h,)
                v = _reset(h, th, reset, SOFT)
            for k in tl.static_range(K - 1, -1, -1):  # walk back
                m = mask & (t0 + k < T) if LONG else mask
                h = hs[k]
                z = h - th
                fired = z >= 0.0  # as h >= th; see _reset_at
                if g_seq_ptr is not None:
                    carry += tl.load(g_seq_ptr + first + (t0 + k) * g_seq_t + rows * g_seq_r + cols, mask=m, other=0.0)
                slope = surrogate_derivative(z, a, KIND)
                through = gs[k].to(STATE) if g_ptr is not None else tl.zeros([BR, BC], STATE)  # reaches the step function
                if not DETACH:
                    through += carry * (-th if SOFT else reset - h)
                through = tl.where(slope == 0.0, 0.0, through * slope)  # an infinite h is hidden by the reset
                dh = through + (carry if SOFT else tl.where(fired, 0.0, carry))
                if dr_ptr is not None:
                    before = _reset_at(hs[k - 1], hs[k - 1] - th, reset, SOFT) if k > 0 else start
                    rest = before if SOFT else before - reset
                    sum_r += tl.where(m, dh * (xs[k].to(STATE) - rest if DECAY else -rest), 0.0)
                    d_theta = through
                    if SOFT:
                        d_theta += tl.where(fired, carry, 0.0)
                    sum_theta -= tl.where(m, d_theta, 0.0)
                dx = dh * r_ if DECAY else dh
                tl.store(dx_ptr + first + (t0 + k) * dx_t + rows * dx_r + cols, dx.to(dx_ptr.dtype.element_ty), mask=m)
                before_t = dh * (1.0 - r_)
                carry = tl.where(t0 + k < T, before_t, carry) if LONG else before_t
        if dv_ptr is not None:
            tl.store(dv_ptr + first + rows * dv_r + cols, carry.to(dv_ptr.dtype.element_ty), mask=mask)
    _store_sums(dr_ptr, dtheta_ptr, sum_r, sum_theta, block, C, first, cols, mask_c, TAU_CHANNELS, THETA_CHANNELS)


@triton.jit
def _store_sums(
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


@triton.jit
def _current(x_ptr, gate_ptr, x_at, gate_at, mask, STATE: tl.constexpr):
    """(current, x, sigmoid(gate)); the last is 1 where there is no gate."""
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
    x_ptr, gate_ptr, residual_ptr, out_ptr, tau_ptr, theta_ptr, T, R, C, x_r, gate_r, residual_r, out_r,
    r: "fp64", theta: "fp64", v_reset: "fp64",
    K: tl.constexpr, SOFT: tl.constexpr, DECAY: tl.constexpr, COUNTS: tl.constexpr,
    TAU_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    block, row, first, cols, mask_c = _tile(R, C, 1, BR, BC)
    rows = row + tl.arange(0, BR)[:, None]
    mask = mask_c & (rows < R)
    r_ = _leak(tau_ptr, r, first + cols, mask_c, TAU_CHANNELS, STATE)
    th = _parameter(theta_ptr, theta, first + cols, mask_c, THETA_CHANNELS, STATE)
    reset = tl.full([], v_reset, STATE)
    current, x, p = _current(x_ptr, gate_ptr, first + rows * x_r + cols, first + rows * gate_r + cols, mask, STATE)
    v = tl.zeros([BR, BC], STATE) + reset
    count = tl.zeros([BR, BC], STATE)
    if K > 0:
        for _ in tl.static_range(K):
            h, rest = _charge(current, v, r_, reset, SOFT, DECAY)
            count += (h >= th).to(STATE)
            v = _reset(h, th, reset, SOFT)
    else:
        for _ in range(T):
            h, rest = _charge(current, v, r_, reset, SOFT, DECAY)
            count += (h >= th).to(STATE)
            v = _reset(h, th, reset, SOFT)
    at = first + rows * out_r + cols
    if COUNTS:
        tl.store(out_ptr + at, count.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if K > 0 and (K & (K - 1)) == 0:
            rate = count * (1.0 / K)
        else:
            rate = _divide(count, tl.zeros([BR, BC], STATE) + T)
        if residual_ptr is not None:
            rate = tl.load(residual_ptr + first + rows * residual_r + cols, mask=mask, other=0.0).to(STATE) + rate
        tl.store(out_ptr + at, rate.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tangent(d_v, d_h, d_through, slope, fired, q, SOFT: tl.constexpr):
    """(d s, d v after the reset) for a tangent d h of the charge; d_through is that of h - theta."""
    ds = slope * d_through
    return ds, (d_h if SOFT else tl.where(fired, 0.0, d_h)) + q * ds


@triton.jit
def _rate_step(
    state, current, r_, th, reset, a, PARAMETERS: tl.constexpr,
    SOFT: tl.constexpr, DECAY: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One step of membrane and tangents. state = (v, v_x, s_x, v_r, s_r, v_th, s_th); v_x is dv/dx, s_x the sum of ds/dx."""
    v, v_x, s_x, v_r, s_r, v_th, s_th = state
    h, rest = _charge(current, v, r_, reset, SOFT, DECAY)
    fired = h >= th
    slope = surrogate_derivative(h - th, a, KIND)
    if DETACH:
        q = tl.zeros_like(h)
    else:
        greatest: tl.constexpr = 3.4028234663852886e38 if h.dtype == tl.float32 else 1.7976931348623157e308
        q = tl.zeros_like(h) - th if SOFT else tl.minimum(reset - h, greatest)  # times a slope of 0 where h is -inf
    leak = 1.0 - r_
    h_x = v_x * leak + (r_ if DECAY else 1.0)
    ds, v_x = _tangent(v_x, h_x, h_x, slope, fired, q, SOFT)
    s_x += ds
    if PARAMETERS:
        h_r = v_r * leak + (current - rest if DECAY else -rest)
        ds, v_r = _tangent(v_r, h_r, h_r, slope, fired, q, SOFT)
        s_r += ds
        h_th = v_th * leak
        ds, v_th = _tangent(v_th, tl.where(fired, h_th - 1.0, h_th) if SOFT else h_th, h_th - 1.0, slope, fired, q, SOFT)
        s_th += ds
    return _reset(h, th, reset, SOFT), v_x, s_x, v_r, s_r, v_th, s_th


@triton.jit(do_not_specialize=["T", "R", "group"])
def lif_rate_backward_kernel(
    x_ptr, gate_ptr, g_ptr, dx_ptr, dgate_ptr, dr_ptr, dtheta_ptr, tau_ptr, theta_ptr,
    T, R, C, group, x_r, gate_r, g_r, g_c, dx_r, dgate_r,
    r: "fp64", theta: "fp64", v_reset: "fp64", alpha: "fp64",
    K: tl.constexpr, SOFT: tl.constexpr, DECAY: tl.constexpr, DETACH: tl.constexpr, KIND: tl.constexpr,
    TAU_CHANNELS: tl.constexpr, THETA_CHANNELS: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One input and one output per neuron: tangents run along with the state, so no step is kept, whatever T."""
    block, row, first, cols, mask_c = _tile(R, C, group, BR, BC)
    r_ = _leak(tau_ptr, r, first + cols, mask_c, TAU_CHANNELS, STATE)
    th = _parameter(theta_ptr, theta, first + cols, mask_c, THETA_CHANNELS, STATE)
    reset, a = tl.full([], v_reset, STATE), tl.full([], alpha, STATE)
    PARAMETERS: tl.constexpr = dr_ptr is not None
    sum_r = tl.zeros([BR, BC], STATE)
    sum_theta = tl.zeros([BR, BC], STATE)
    for i in range(1 if dr_ptr is None else group):
        rows = row + i * BR + tl.arange(0, BR)[:, None]
        mask = mask_c & (rows < R)
        g = tl.load(g_ptr + rows * g_r + (first + cols) * g_c, mask=mask, other=0.0).to(STATE)
        current, x, p = _current(x_ptr, gate_ptr, first + rows * x_r + cols, first + rows * gate_r + cols, mask, STATE)
        zero = tl.zeros([BR, BC], STATE)
        state = (zero + reset, zero, zero, zero, zero, zero, zero)
        if K > 0:
            for _ in tl.static_range(K):
                state = _rate_step(state, current, r_, th, reset, a, PARAMETERS, SOFT, DECAY, DETACH, KIND)
            g = g * (1.0 / K)
        else:
            for _ in range(T):
                state = _rate_step(state, current, r_, th, reset, a, PARAMETERS, SOFT, DECAY, DETACH, KIND)
            g = g / T
        s_x, s_th = state[2], state[6]
        if not SOFT:  # the reset hides an infinite current: it fires at every step, where no surrogate has a gradient
            s_x = tl.where(current == float("inf"), 0.0, s_x)
            s_th = tl.where(current == float("inf"), 0.0, s_th)
        d = tl.where(s_x == 0.0, 0.0, g * s_x)
        if gate_ptr is not None:
            dgate = (d * x * p * (1.0 - p)).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + first + rows * dgate_r + cols, dgate, mask=mask)
            d = d * p
        tl.store(dx_ptr + first + rows * dx_r + cols, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if PARAMETERS:
            sum_r += tl.where(mask, g * state[4], 0.0)
            sum_theta += tl.where(mask, g * s_th, 0.0)
    _store_sums(dr_ptr, dtheta_ptr, sum_r, sum_theta, block, C, first, cols, mask_c, TAU_CHANNELS, THETA_CHANNELS)


# --- launchers: the same signatures as in cpu/lif.py ------------------------------------------------------------------------

_STATES = {torch.float32: tl.float32, torch.float64: tl.float64}


@functools.cache
def _warps(threads: int) -> int:
    """So many threads in warps of the device's size; the interpreter has none."""
    if triton.knobs.runtime.interpret:
        return 4
    size = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // size) if size > 1 else 1


class _Grid:
    """Tiles of one 16-byte access per thread, and rows grouped so that partial sums stay few.

    Tile sizes depend on the kernel's variant and on C alone (where there are rows), so that no batch size compiles anew. Where
    more values per neuron are ``kept`` than a thread has registers for, its accesses are of 8 or 4 bytes. ``per_channel``: the
    columns are channels, even of a single row.
    """

    def __init__(self, layout, dtype, parameters, per_channel=False, kept=0):
        elements = _THREADS * 16 // dtype.itemsize
        while kept * elements // _THREADS >= _KEPT:
            elements //= 2
        flat = layout.R == 1 and not per_channel
        self.BC = elements if flat else min(power_of_2(layout.C), elements)
        self.BR = 1 if flat else elements // self.BC
        chunks, blocks = cdiv(layout.C, self.BC), cdiv(layout.R, self.BR)
        self.group = cdiv(chunks * blocks, _PROGRAMS) if parameters else 1
        self.groups = cdiv(blocks, self.group)
        self.programs = chunks * self.groups

    def partial_sums(self, layout, per_channel, like):
        shape = (self.groups, layout.C) if per_channel else (self.programs,)
        # not two halves of one: where the second begins would be aligned for some batches only, and kernels compile for it
        return tuple(torch.empty(shape, dtype=state_dtype(like.dtype), device=like.device) for _ in range(2))

    def launch(self, kernel, device, *args, **flags):
        flags |= dict(BR=self.BR, BC=self.BC, num_warps=_warps(_THREADS), enable_fp_fusion=False)
        launch(kernel, self.programs, device, *args, **flags)


def _per_channel(p):
    return p is not None and p.numel() > 1


def _placed(layout, t):
    return (None, 0, 0) if t is None else place(layout, t)


def _placed_state(layout, t):
    return (None, 0) if t is None else place_state(layout, t)


def _gradient(layout, g, dtype):
    """(tensor, strides of T, R and C) of an upstream gradient; one repeated value is read in place."""
    if g is None:
        return None, 0, 0, 0
    g = g.to(dtype)
    return (g, 0, 0, 0) if not any(g.stride()) else (*place(layout, g), 1)


def _time(T):
    """K and LONG: steps held in registers, and whether there are more."""
    return dict(K=min(T, STRIDE), LONG=T > STRIDE)


def _flags(neuron, tau, v_threshold, dtype):
    return dict(
        SOFT=neuron.v_reset is None,
        DECAY=neuron.decay_input,
        TAU_CHANNELS=_per_channel(tau),
        THETA_CHANNELS=_per_channel(v_threshold),
        STATE=_STATES[state_dtype(dtype)],
    )


def _numbers(neuron):
    return 1.0 / neuron.tau, neuron.v_threshold, neuron.v_reset or 0.0


def _contiguous(p):
    return None if p is None else p.detach().contiguous()


def _bytes(t):
    return t.view(torch.uint8) if t.dtype == torch.bool else t


def _launch_forward(kernel, x, v, first, v_threshold, s, v_final, v_seq, checkpoint, *numbers, **flags):
    """Launch a forward kernel over T steps of a neuron whose parameters are ``first`` (tau or beta) and v_threshold."""
    per_channel = _per_channel(first) or _per_channel(v_threshold)
    layout = layout_of(x, s, per_channel)
    T = x.shape[0]
    x, x_t, x_r = place(layout, x)
    s, s_t, s_r = place(layout, _bytes(s))
    v, v_r = _placed_state(layout, v)
    v_final, v_final_r = _placed_state(layout, v_final)
    v_seq, seq_t, seq_r = _placed(layout, v_seq)
    checkpoint, keep_t, keep_r = _placed(layout, checkpoint)
    _Grid(layout, x.dtype, False, per_channel).launch(
        kernel, x.device, x, s, v, v_final, v_seq, checkpoint, _contiguous(first), _contiguous(v_threshold),
        T, layout.R, layout.C, x_t, x_r, s_t, s_r, v_r, v_final_r, seq_t, seq_r, keep_t, keep_r,
        *numbers, **_time(T), **flags,
    )  # fmt: skip


def _launch_backward(
    kernel, g, g_v, g_seq, x, v, first, v_threshold, checkpoint, neuron, dx, dv, parameters, *numbers, **flags
):  # fmt: skip
    """Launch a backward kernel; the sums of the parameters' gradients, if ``parameters``."""
    per_channel = _per_channel(first) or _per_channel(v_threshold)
    layout = layout_of(x, dx, per_channel)
    T, state = x.shape[0], state_dtype(x.dtype)
    g, g_t, g_r, g_c = _gradient(layout, g, x.dtype)
    x, x_t, x_r = place(layout, x)
    dx, dx_t, dx_r = place(layout, dx)
    v, v_r = _placed_state(layout, v)
    dv, dv_r = _placed_state(layout, dv)
    checkpoint, keep_t, keep_r = _placed(layout, checkpoint if checkpoint.numel() else None)
    g_v, g_v_r = _placed_state(layout, None if g_v is None else g_v.to(state))
    g_seq, g_seq_t, g_seq_r = _placed(layout, None if g_seq is None else g_seq.to(state))
    grid = _Grid(layout, x.dtype, parameters, per_channel, kept=min(T, STRIDE) * (2 if parameters else 1))
    sums = grid.partial_sums(layout, per_channel, x) if parameters else None
    grid.launch(
        kernel, x.device, x, v, checkpoint, g, g_v, g_seq, dx, dv, *(sums if parameters else (None, None)),
        _contiguous(first), _contiguous(v_threshold), T, layout.R, layout.C, grid.group,
        x_t, x_r, v_r, keep_t, keep_r, g_t, g_r, g_c, g_v_r, g_seq_t, g_seq_r, dx_t, dx_r, dv_r,
        *numbers, neuron.alpha, KIND=SURROGATES[neuron.surrogate].id, **_time(T), **flags,
    )  # fmt: skip
    return sums


def lif_forward(x, v, tau, v_threshold, neuron, s, v_final, v_seq, checkpoint):
    """Fill s, and v_final, v_seq, checkpoint where they are given. x is not empty."""
    flags = _flags(neuron, tau, v_threshold, x.dtype)
    _launch_forward(lif_forward_kernel, x, v, tau, v_threshold, s, v_final, v_seq, checkpoint, *_numbers(neuron), **flags)


def lif_backward(g, g_v, g_seq, x, v, tau, v_threshold, checkpoint, neuron, dx, dv, parameters):
    """Fill dx and, where given, dv; return, if ``parameters``, sums of d r and d theta. x is not empty."""
    return _launch_backward(
        lif_backward_kernel, g, g_v, g_seq, x, v, tau, v_threshold, checkpoint, neuron, dx, dv, parameters, *_numbers(neuron),
        DETACH=neuron.detach_reset, **_flags(neuron, tau, v_threshold, x.dtype),
    )  # fmt: skip


def lif_rate_forward(x, residual, gate, tau, v_threshold, T, neuron, out):
    """Fill out with residual + rate, or, where out is uint8, with the counts. x is not empty."""
    flags = _flags(neuron, tau, v_threshold, x.dtype)
    per_channel = flags["TAU_CHANNELS"] or flags["THETA_CHANNELS"]
    layout = layout_of_step(x, out, per_channel)
    x, x_r = place_state(layout, x)
    gate, gate_r = _placed_state(layout, gate)
    residual, residual_r = _placed_state(layout, residual)
    out, out_r = place_state(layout, out)
    grid = _Grid(layout, x.dtype, False, per_channel)
    grid.launch(
        lif_rate_forward_kernel, x.device, x, gate, residual, out, _contiguous(tau), _contiguous(v_threshold),
        T, layout.R, layout.C, x_r, gate_r, residual_r, out_r, *_numbers(neuron),
        K=T if T <= STRIDE else 0, COUNTS=out.dtype == torch.uint8, **flags,
    )  # fmt: skip


def lif_rate_backward(g, x, gate, tau, v_threshold, T, neuron, dx, dgate, parameters):
    """Fill dx and, where given, dgate; return, if ``parameters``, sums of d r and d theta. x is not empty."""
    flags = _flags(neuron, tau, v_threshold, x.dtype)
    per_channel = flags["TAU_CHANNELS"] or flags["THETA_CHANNELS"]
    layout = layout_of_step(x, dx, per_channel)
    g, _, g_r, g_c = _gradient(layout, g.unsqueeze(0), g.dtype)
    x, x_r = place_state(layout, x)
    gate, gate_r = _placed_state(layout, gate)
    dx, dx_r = place_state(layout, dx)
    dgate, dgate_r = _placed_state(layout, dgate)
    grid = _Grid(layout, x.dtype, parameters, per_channel)
    sums = grid.partial_sums(layout, per_channel, x) if parameters else None
    grid.launch(
        lif_rate_backward_kernel, x.device, x, gate, g, dx, dgate, *(sums if parameters else (None, None)),
        _contiguous(tau), _contiguous(v_threshold), T, layout.R, layout.C, grid.group,
        x_r, gate_r, g_r, g_c, dx_r, dgate_r, *_numbers(neuron), neuron.alpha,
        K=T if T <= STRIDE else 0, DETACH=neuron.detach_reset, KIND=SURROGATES[neuron.surrogate].id, **flags,
    )  # fmt: skip
    return sums
