"""One step of neurons with integer levels whose thresholds are a norm of the token, without initial states.

Here h = x, so nothing has to be recomputed. A task processes rows. In the backward pass it reads a row three times, from the L1
cache: for the norm, the gradient without it, and the gradient through it. The kernels of all neurons (neuron.py) give the same
spikes and take two to three times as long.
"""

import functools

from ..neuron import LIF
from ..neuron.trace import HUGE
from .intrinsics import CODES, F64, SIZES, num, state_code, store, tile
from .kernel import Kernel, share
from .vector import LANES, inside, level, norm_of_row, sign, vec, vload, vset, vstore, vstore_exact, vsum


def fits(variant, p, steps, *states) -> bool:
    """True if these kernels serve the neuron. states: its states, before or after the step, or their gradients, if any."""
    if variant.neuron is not LIF or not variant.norm or len(variant.flags) <= 3 or variant.flags[3] != "integer":
        return False
    decay, r = variant.flags[1], p.numbers[0]
    return steps == 1 and not p.per_channel and (r == 1 or not decay) and not any(t is not None for t in states)


@functools.cache
def _forward_kernel(X, O, norm, EXACT):
    """EXACT: the scale is 1, so the spikes are integers, which O holds exactly."""
    S = state_code(X)
    xb, ob = SIZES[X], SIZES[O]
    V, V1, W, W1, Y, Y1 = vec(X, LANES), vec(X, 1), vec(S, LANES), vec(S, 1), vec(O, LANES), vec(O, 1)
    norm_of_row_ = norm_of_row(norm, X)

    def one_step_forward(part, R, C, x_, s_, factor_, lo, hi, scale):
        (x, x_r), (s, s_r) = x_, s_
        factor, whole = num(factor_, S), C // LANES * LANES
        for row in share(R, part):
            xs, ss = x + row * x_r * xb, s + row * s_r * ob
            theta = norm_of_row_(xs, C) * factor
            for i in range(0, whole, LANES):
                z = vload(xs, i, V) / vset(theta, W)
                c = level(z, vset(lo, W), vset(hi, W), W)
                if EXACT:
                    vstore_exact(ss, i, c, Y)
                else:
                    vstore(ss, i, c * vset(scale, W), Y)
            for i in range(whole, C):
                z = vload(xs, i, V1) / vset(theta, W1)
                vstore(ss, i, level(z, vset(lo, W1), vset(hi, W1), W1) * vset(scale, W1), Y1)

    return Kernel(one_step_forward, f"one_step_forward_{X}{O}{norm}{EXACT:d}")


@functools.cache
def _backward_kernel(X, G, norm, THROUGH, COLUMNS):
    """G: the storage code of the upstream gradient. THROUGH: dx includes the norm. COLUMNS: the most columns of a row."""
    S = state_code(X)
    xb, gb, RMS, MOST = SIZES[X], SIZES[G], norm == "rms", HUGE[S == F64]
    V, V1, W, W1, U, U1 = vec(X, LANES), vec(X, 1), vec(S, LANES), vec(S, 1), vec(G, LANES), vec(G, 1)
    norm_of_row_ = norm_of_row(norm, X)

    def one_step_backward(part, R, C, x_, g_, dx_, sums, factor_, low, high, scale):
        (x, x_r), (g, g_r), (dx, dx_r) = x_, g_, dx_
        factor, whole = num(factor_, S), C // LANES * LANES
        row_d = tile(COLUMNS, S)
        for row in share(R, part):
            xs, gs, dxs = x + row * x_r * xb, g + row * g_r * gb, dx + row * dx_r * xb
            norm_ = norm_of_row_(xs, C)
            theta = norm_ * factor
            unit = num(1.0, S) / theta
            total, rest = vset(0.0, W), vset(0.0, W1)
            for i in range(0, whole, LANES):
                z = vload(xs, i, V) / vset(theta, W)
                d = vload(gs, i, U) * vset(scale, W) * vset(unit, W)
                d = inside(z, vset(low, W), vset(high, W), d, W)
                total = total + inside(z, vset(low, W), vset(high, W), d * z, W)
                vstore(row_d, i, d, W)
            for i in range(whole, C):
                z = vload(xs, i, V1) / vset(theta, W1)
                d = vload(gs, i, U1) * vset(scale, W1) * vset(unit, W1)
                d = inside(z, vset(low, W1), vset(high, W1), d, W1)
                rest = rest + inside(z, vset(low, W1), vset(high, W1), d * z, W1)
                vstore(row_d, i, d, W1)
            d_theta = -(vsum(total) + vsum(rest))
            if sums != 0:
                store(sums, row, d_theta * norm_, S)
            through = THROUGH and norm_ < num(MOST, S)  # not if the norm is not finite
            slope = d_theta * factor / ((norm_ if RMS else num(1.0, S)) * num(C * 1.0, S))
            for i in range(0, whole, LANES):
                d = vload(row_d, i, W)
                if through:
                    xi = vload(xs, i, V)
                    d = d + vset(slope, W) * (xi if RMS else sign(xi, W))
                vstore(dxs, i, d, V)
            for i in range(whole, C):
                d = vload(row_d, i, W1)
                if through:
                    xi = vload(xs, i, V1)
                    d = d + vset(slope, W1) * (xi if RMS else sign(xi, W1))
                vstore(dxs, i, d, V1)

    return Kernel(one_step_backward, f"one_step_backward_{X}{G}{norm}{THROUGH:d}{COLUMNS}")


def forward(variant, p, layout, x, s, x_, s_):
    """Fill s, of a float dtype. x_ and s_: address and stride of rows."""
    _, _, _, _, (lo, hi), _, scale = variant.flags
    _forward_kernel(CODES[x.dtype], CODES[s.dtype], variant.norm, scale == 1)(
        x.numel(), layout.R, layout.C, x_, s_, p.numbers[1], float(lo), float(hi), float(scale)
    )


def backward(variant, p, layout, x, g, x_, g_, dx_, sums, columns):
    """Fill dx, and sums, one partial gradient of the threshold's factor per row, if its address is not 0."""
    _, _, _, _, (lo, hi), window, scale = variant.flags
    low, high = window or (lo, hi)
    _backward_kernel(CODES[x.dtype], CODES[g.dtype], variant.norm, variant.differentiates_norm, columns)(
        2 * x.numel(), layout.R, layout.C, x_, g_, dx_, sums, p.numbers[1], float(low), float(high), float(scale)
    )
