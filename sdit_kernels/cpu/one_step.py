"""The backward pass of one step of neurons with integer levels whose thresholds are a norm of the token, without initial states.

Here h = x, so the kernel needs no tape. A task processes rows, each in three passes over the L1 cache: the norm, the gradient
without it, and the gradient through it. The kernel of all neurons (neuron.py) takes about three times as long.
"""

import functools

from ..neuron import LIF
from ..neuron.trace import HUGE
from .intrinsics import CODES, F64, SIZES, load, num, state_code, store, sum_tile, tile
from .kernel import Kernel, share
from .vector import LANES, inside, norm_of_row, sign, vec, vload, vset, vstore


def fits(variant, p, steps, states, upstream) -> bool:
    """True if this kernel serves the neuron. ``upstream`` are the gradients of states and of their sequences."""
    if variant.neuron is not LIF or not variant.norm or len(variant.flags) <= 3 or variant.flags[3] != "integer":
        return False
    decay, r = variant.flags[1], p.numbers[0]
    return steps == 1 and not p.per_channel and (r == 1 or not decay) and all(t is None for t in (*states, *upstream))


@functools.cache
def _kernel(X, norm, THROUGH, COLUMNS):
    """THROUGH: dx includes the norm. COLUMNS: the most columns of a row."""
    S = state_code(X)
    xb, RMS, MOST = SIZES[X], norm == "rms", HUGE[S == F64]
    V, V1, W, W1 = vec(X, LANES), vec(X, 1), vec(S, LANES), vec(S, 1)
    norm_of_row_, PARTIAL = norm_of_row(norm, X), 2 * LANES

    def one_step_backward(part, R, C, x_, g_, dx_, sums, factor_, low, high, scale):
        (x, x_r), (g, g_r), (dx, dx_r) = x_, g_, dx_
        factor, whole = num(factor_, S), C // LANES * LANES
        row_d, partial = tile(COLUMNS, S), tile(PARTIAL, S)
        for row in share(R, part):
            xs, gs, dxs = x + row * x_r * xb, g + row * g_r * xb, dx + row * dx_r * xb
            norm_ = norm_of_row_(xs, C)
            theta = norm_ * factor
            unit = num(1.0, S) / theta
            total, rest = vset(0.0, W), vset(0.0, W1)
            for i in range(0, whole, LANES):
                z = vload(xs, i, V) / vset(theta, W)
                d = vload(gs, i, V) * vset(scale, W) * vset(unit, W)
                d = inside(z, vset(low, W), vset(high, W), d, W)
                total = total + inside(z, vset(low, W), vset(high, W), d * z, W)
                vstore(row_d, i, d, W)
            for i in range(whole, C):
                z = vload(xs, i, V1) / vset(theta, W1)
                d = vload(gs, i, V1) * vset(scale, W1) * vset(unit, W1)
                d = inside(z, vset(low, W1), vset(high, W1), d, W1)
                rest = rest + inside(z, vset(low, W1), vset(high, W1), d * z, W1)
                vstore(row_d, i, d, W1)
            vstore(partial, 0, total, W)
            vstore(partial, LANES, rest, W1)
            d_theta = -(sum_tile(partial, LANES, LANES, S) + load(partial, LANES, S))
            if sums != 0:
                store(sums, row, d_theta * norm_, S)
            slope = num(0.0, S)
            if THROUGH and norm_ < num(MOST, S):
                slope = d_theta * factor / ((norm_ if RMS else num(1.0, S)) * num(C * 1.0, S))
            for i in range(0, whole, LANES):
                d = vload(row_d, i, W)
                if THROUGH:
                    xi = vload(xs, i, V)
                    d = d + vset(slope, W) * (xi if RMS else sign(xi, W))
                vstore(dxs, i, d, V)
            for i in range(whole, C):
                d = vload(row_d, i, W1)
                if THROUGH:
                    xi = vload(xs, i, V1)
                    d = d + vset(slope, W1) * (xi if RMS else sign(xi, W1))
                vstore(dxs, i, d, V1)

    return Kernel(one_step_backward, f"one_step_backward_{X}{norm}{THROUGH:d}{COLUMNS}")


def run(variant, p, layout, x, x_, g_, dx_, sums, columns):
    """Fill dx, and sums, one partial gradient of the threshold's factor per row, if its address is not 0."""
    _, _, _, _, (lo, hi), window, scale = variant.flags
    low, high = window or (lo, hi)
    _kernel(CODES[x.dtype], variant.norm, variant.differentiates_norm, columns)(
        2 * x.numel(), layout.R, layout.C, x_, g_, dx_, sums, p.numbers[1], float(low), float(high), float(scale)
    )
