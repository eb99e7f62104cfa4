"""lif_rate without a loop over time steps.

Under a constant current and a hard reset, the rate is a step function of the current. So the kernel compares the current with a
table of edges.
"""

import functools

import numpy as np
import torch

from ..neuron import LIF
from .intrinsics import SIZES, load, num, sigmoid, state_code, store, tile
from .kernel import Kernel, share


@functools.cache
def kernel(X, O, GATE):
    S = state_code(X)
    xb, ob = SIZES[X], SIZES[O]
    BLOCK = 1024

    def lif_rate_staircase(part, R, C, inputs, output, levels, edges, values):
        (x, x_r), (gate, gate_r), (y, y_r) = inputs
        out, out_r = output
        zero = num(0.0, S)
        chunks = (C + BLOCK - 1) // BLOCK
        for task in share(R * chunks, part):
            row = task // chunks
            c = (task - row * chunks) * BLOCK
            n = min(BLOCK, C - c)
            current, rate = tile(BLOCK, S), tile(BLOCK, S)
            for i in range(n):
                xi = load(x + (row * x_r + c) * xb, i, X)
                if GATE:
                    xi = sigmoid(load(gate + (row * gate_r + c) * xb, i, X), S) * xi
                store(current, i, xi, S)
                store(rate, i, zero, S)
            for level in range(0, levels, 4):
                e0, e1 = load(edges, level, S), load(edges, level + 1, S)
                e2, e3 = load(edges, level + 2, S), load(edges, level + 3, S)
                r0, r1 = load(values, level, S), load(values, level + 1, S)
                r2, r3 = load(values, level + 2, S), load(values, level + 3, S)
                for i in range(n):
                    xi, ri = load(current, i, S), load(rate, i, S)
                    ri = r0 if xi >= e0 else ri
                    ri = r1 if xi >= e1 else ri
                    ri = r2 if xi >= e2 else ri
                    ri = r3 if xi >= e3 else ri
                    store(rate, i, ri, S)
            target = out + (row * out_r + c) * ob
            if y != 0:
                for i in range(n):
                    store(target, i, load(y + (row * y_r + c) * ob, i, O) + load(rate, i, S), O)
            else:
                for i in range(n):
                    store(target, i, load(rate, i, S), O)

    return Kernel(lif_rate_staircase, f"lif_rate_staircase_{X}{O}{GATE:d}")


def table(T, variant, state, counts):
    """Return (levels, edges, values), which state the rate of a LIF neuron as a step function of its current, or None."""
    if variant.neuron is not LIF or len(variant.flags) > 3:  # spikes with levels
        return None
    soft, decay, _ = variant.flags
    return None if soft else _table(T, variant.values, decay, state, counts)


@functools.lru_cache(maxsize=256)
@np.errstate(all="ignore")  # extreme numbers give infinities and NaN; the comparisons below reject them
def _table(T, values, decay, state, counts):
    """Return the table of a LIF neuron with a hard reset. values: its r, v_threshold and v_reset.

    The membrane starts at v_reset and returns to it at every spike. So a constant current causes a spike every n steps, T // n
    in all, where n is the number of steps to the first spike. The rate has one edge for each distinct T // n.

    An edge must be exact in floating point. So this function runs the recurrence for every float near the calculated edge,
    within several times the largest rounding error. It returns None if the recurrence does not have one clean step there; then
    lif_rate runs the loop over time steps.
    """
    float_, int_ = (np.float32, np.int32) if state == torch.float32 else (np.float64, np.int64)
    r, theta, reset = map(float_, values)
    if not values[2] < values[1]:
        return None
    edges, rates = [], []
    for n in range(T, 0, -1):
        if edges and T // n == rates[-1]:
            continue
        grown = 1 - (1 - float(r)) ** n if r else float(n)  # h after n steps is reset + grown * (x - reset)
        if grown == 0:  # 1 - r has rounded to 1
            return None
        rise = float(theta) - float(reset)
        edge = float(reset) + rise / grown if decay else rise * (float(r) or 1.0) / grown
        slope = grown if decay else grown / (float(r) or 1.0)
        scale = max(abs(edge), abs(float(theta)), abs(float(reset)))
        reach = 16 * (n + 2) * scale * np.finfo(float_).eps / slope
        if not (abs(edge) > 0 and reach / np.spacing(float_(abs(edge))) <= 1 << 15 and reach <= abs(edge) / 4):
            return None
        near = np.asarray([edge], float_).view(int_) + np.arange(-int(1 << 15), (1 << 15) + 1, dtype=int_)
        x = near.view(float_)
        x = np.sort(x[np.abs(x.astype(np.float64) - edge) <= reach])
        v, fired = np.full_like(x, reset), np.zeros(x.shape, bool)
        for _ in range(n):
            h = v + (x - (v - reset)) * r if decay else v - (v - reset) * r + x
            fired |= h >= theta
            v = np.where(h >= theta, reset, h)
        if not fired.any() or fired[0] or not fired[fired.argmax() :].all():
            return None
        edges.append(x[fired.argmax()])
        rates.append(T // n)
    if any(b < a for a, b in zip(edges, edges[1:])):
        return None
    pad = -len(edges) % 4
    edges = np.asarray(edges + [np.nan] * pad, float_)  # no current reaches NaN, not even infinity
    rates = np.asarray(rates + [0] * pad, float_)
    return len(edges), edges, rates if counts else rates / float_(T)
