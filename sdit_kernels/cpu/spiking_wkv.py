"""WKV scans that drive LIF neurons, on the CPU. A task is a block of channels of one sequence, walked tile of tokens by tile.

Within a tile the simulation steps come one after the other: the scan of step t takes its state up where the tile before left it
and leaves a tile of currents, which goes at once into the tokens' membranes. The scans are those of cpu/wkv.py, with vectors of
channels in registers; the neurons are loops over channels, which LLVM vectorises, as in cpu/lif.py.

A state enters a tile with its exponent rounded to one number, in the forward pass as in the backward pass, which rebuilds tile
by tile from the entry states in ``checkpoint``: both do the same operations in the same order, so every spike comes out again.
"""

import functools

import numba
import numpy as np
import torch

from ..layout import PAIRS, spiking_tile
from ..surrogate import SURROGATES
from .lif import _charge, _fill, _Parameters, _reset, _surrogate
from .runtime import CODES, SIZES, Kernel, load, num, state_code, store, tile
from .vector import LANES, fma, kind, vload, vlog, vset, vstore, where_at_least, where_equal, where_less
from .wkv import _address, _channels, _entry, _gap, _gate, _include, _place, _rounded, _weights

_WIDTH = 8  # vectors of channels that a forward task holds, and one more for the last channels
_BACK = 4  # the same of a backward task
_A, _B, _KEEP, _NEW, _SELF, _SEEN, _Y, _OPEN, _SLOPE = range(9)  # what a tile leaves for the walk back, per step and token
# state before the token, weights that include it, weights of token and state in y, y, sigmoid(r) and its derivative

_inline = numba.njit(forceinline=True, error_model="numpy")


@_inline
def _drive(ka, m, a, b, k, v, w, u, W):
    """Numerator and denominator of y, and the weights of the state and of the token in them."""
    half = vset(0.5, W)
    old, new = _weights(fma(m, w, k - ka) + u, W)
    z = fma(old, b, new)
    return fma(new, v, old * a), where_less(z, half, half, z), old, new  # z is 0 where nothing is seen, else about 1 or more


@_inline
def _neuron(x, v, leak, th, vr, zero, one, soft, decay):
    """(h, spike, v after it) of one step."""
    h, _ = _charge(x, v, leak, vr, soft, decay)
    return h, where_at_least(h, th, one, zero), where_at_least(h, th, h - th if soft else vr, h)


@functools.cache
def _forward_kernel(X, M, lanes, GATE, RATE, SOFT, DECAY, PER_CHANNEL):
    V, S = kind(X, lanes), state_code(X)
    W, MV, xb, sb = kind(S, lanes), kind(M, lanes), SIZES[X], SIZES[S]
    ROW = (_WIDTH + 1) * lanes
    AREA, COUNTS = PAIRS["cpu"] * ROW, PAIRS["cpu"] * ROW if RATE else 1

    def spiking_wkv_forward(
        T, B, L, C, tokens, blocks, k, k_t, k_b, k_l, v, v_t, v_b, v_l, r, r_t, r_b, r_l, w_, u_, ybar, lse, m0, m0_b, m0_l,
        states, rows, field, keep, out, ybar1, lse1, m1, leak_, leaks, theta_, thetas, reset_,
    ):  # fmt: skip
        for task in numba.prange(B * blocks):
            batch = task // blocks
            begin, vectors = _channels(C, lanes, task - batch * blocks, blocks)
            membrane, counts = tile(AREA, S), tile(COUNTS, S)
            leak, th, vr, steps = vset(leak_, W), vset(theta_, W), vset(reset_, W), vset(float(T), W)
            zero, one = vset(0.0, W), vset(1.0, W)
            for i in range((L + tokens - 1) // tokens):
                first = i * tokens
                size = min(tokens, L - first)
                for t in range(T):
                    user = (t * B + batch) * C
                    entry = states + ((t * B + batch) * rows + (i if keep else i & 1)) * C * sb
                    leave = states + ((t * B + batch) * rows + (i + 1 if keep else (i + 1) & 1)) * C * sb
                    kt = k + (t * k_t + batch * k_b + first * k_l) * xb
                    vt = v + (t * v_t + batch * v_b + first * v_l) * xb
                    rt = r + (t * r_t + batch * r_b + first * r_l) * xb
                    st = out + ((t * B + batch) * L + first) * C * xb
                    for j in range(vectors):
                        c, slot = min((begin + j) * lanes, C - lanes), j * lanes
                        w, u = vload(w_, c, W), vload(u_, c, W)
                        if PER_CHANNEL:
                            leak = vload(leaks, c, W) if leaks != 0 else vset(leak_, W)
                            th = vload(thetas, c, W) if thetas != 0 else vset(theta_, W)
                        if t == 0:
                            for l in range(size):
                                x = vload(m0, batch * m0_b + (first + l) * m0_l + c, MV) if m0 != 0 else vr
                                vstore(membrane, l * ROW + slot, x, W)
                                if RATE:
                                    vstore(counts, l * ROW + slot, zero, W)
                        if i == 0:
                            ka, a, b = _entry(ybar, lse, user + c, W)
                            if keep:
                                vstore(entry, c, a, W)
                                vstore(entry, field + c, b, W)
                                vstore(entry, 2 * field + c, ka, W)
                        else:
                            a, b, ka = vload(entry, c, W), vload(entry, field + c, W), vload(entry, 2 * field + c, W)
                        m = zero
                        for l in range(size):
                            key, value = vload(kt, l * k_l + c, V), vload(vt, l * v_l + c, V)
                            y, z, _, _ = _drive(ka, m, a, b, key, value, w, u, W)
                            if GATE:
                                up, down, _ = _gate(vload(rt, l * r_l + c, V), W)
                                y, z = y * up, z * down
                            ka, m, a, b, _, _ = _include(ka, m, a, b, key, value, w, W)
                            x = vload(membrane, l * ROW + slot, W)
                            _, s, x = _neuron(y * (one / z), x, leak, th, vr, zero, one, SOFT, DECAY)
                            vstore(membrane, l * ROW + slot, x, W)
                            if RATE:
                                vstore(counts, l * ROW + slot, vload(counts, l * ROW + slot, W) + s, W)
                            else:
                                vstore(st, l * C + c, s, V)
                        if first + size < L:
                            a, b, ka = _rounded(ka, m, a, b, w, W)
                            vstore(leave, c, a, W)
                            vstore(leave, field + c, b, W)
                            vstore(leave, 2 * field + c, ka, W)
                        elif ybar1 != 0:
                            o = fma(zero - m, w, ka) + vlog(b)
                            vstore(ybar1, user + c, where_equal(b, zero, zero, a / b), W)
                            vstore(lse1, user + c, where_equal(b, zero, vset(-np.inf, W), o), W)
                for j in range(vectors):
                    c, slot = min((begin + j) * lanes, C - lanes), j * lanes
                    for l in range(size):
                        at = (batch * L + first + l) * C + c
                        if RATE:
                            vstore(out, at, vload(counts, l * ROW + slot, W) / steps, V)
                        if m1 != 0:
                            vstore(m1, at, vload(membrane, l * ROW + slot, W), W)

    return Kernel(
        spiking_wkv_forward, f"spiking_wkv_forward_{X}{M}_{lanes}{GATE:d}{RATE:d}{SOFT:d}{DECAY:d}{PER_CHANNEL:d}"
    )  # fmt: skip


@functools.cache
def _backward_kernel(X, M, lanes, GATE, RATE, SOFT, DECAY, DETACH, KIND, PER_CHANNEL, PARAMETERS):
    V, S = kind(X, lanes), state_code(X)
    W, xb, mb, sb = kind(S, lanes), SIZES[X], SIZES[M], SIZES[S]
    ROW = (_BACK + 1) * lanes
    AREA, CHANNELS, SUMS = PAIRS["cpu"] * ROW, ROW if PER_CHANNEL else 1, ROW if PARAMETERS else 1
    FIELDS = 9 if GATE else 7

    def spiking_wkv_backward(
        T, B, L, C, tokens, blocks, workers, work, k, k_t, k_b, k_l, v, v_t, v_b, v_l, r, r_t, r_b, r_l, w_, u_, m0, m0_b, m0_l,
        states, rows, field, g, g_t, g_b, g_l, g_ybar, g_lse, g_m, dk, dv, dr, d_ybar, d_lse, d_m, dw, du, d_leak, d_theta,
        leak_, leaks_, theta_, thetas_, reset_, alpha_,
    ):  # fmt: skip
        vr, alpha, nil, unit, steps = num(reset_, S), num(alpha_, S), num(0.0, S), num(1.0, S), num(float(T), S)
        area = tokens * ROW
        for worker in numba.prange(workers):
            history = work + worker * T * ((FIELDS + 1) * area + 2 * ROW) * sb
            charge = history + T * FIELDS * area * sb
            adjoint = charge + T * area * sb  # P and Q of every step
            current, start, carry = tile(AREA, S), tile(AREA, S), tile(AREA, S)
            sum_w, sum_u, sum_leak, sum_th = tile(ROW, S), tile(ROW, S), tile(SUMS, S), tile(SUMS, S)
            leaks, ths = tile(CHANNELS, S), tile(CHANNELS, S)
            leak, th = num(leak_, S), num(theta_, S)
            zero, one = vset(0.0, W), vset(1.0, W)
            for task in range(B * blocks * worker // workers, B * blocks * (worker + 1) // workers):
                batch = task // blocks
                begin, vectors = _channels(C, lanes, task - batch * blocks, blocks)
                c0 = begin * lanes
                n = min(C, (begin + vectors) * lanes) - c0
                _fill(sum_w, ROW, 0, 0, nil, S, S)
                _fill(sum_u, ROW, 0, 0, nil, S, S)
                if PARAMETERS:
                    _fill(sum_leak, n, 0, 0, nil, S, S)
                    _fill(sum_th, n, 0, 0, nil, S, S)
                if PER_CHANNEL:
                    _fill(leaks, n, leaks_, c0, leak, S, S)
                    _fill(ths, n, thetas_, c0, th, S, S)
                for i in range((L - 1) // tokens, -1, -1):
                    first = i * tokens
                    size = min(tokens, L - first)
                    for l in range(size):
                        _fill(start + l * ROW * sb, n, m0, batch * m0_b + (first + l) * m0_l + c0, vr, M, S)
                        _fill(carry + l * ROW * sb, n, g_m, (batch * L + first + l) * C + c0, nil, S, S)
                    for t in range(T):  # rebuild
                        user = (t * B + batch) * C
                        entry = states + ((t * B + batch) * rows + i) * C * sb
                        kt = k + (t * k_t + batch * k_b + first * k_l) * xb
                        vt = v + (t * v_t + batch * v_b + first * v_l) * xb
                        rt = r + (t * r_t + batch * r_b + first * r_l) * xb
                        past, ht, Pt = history + t * FIELDS * area * sb, charge + t * area * sb, adjoint + 2 * t * ROW * sb
                        for j in range(vectors):
                            c = min((begin + j) * lanes, C - lanes)
                            w, u = vload(w_, c, W), vload(u_, c, W)
                            a, b, ka = vload(entry, c, W), vload(entry, field + c, W), vload(entry, 2 * field + c, W)
                            m = zero
                            for l in range(size):
                                slot = l * ROW + c - c0
                                key, value = vload(kt, l * k_l + c, V), vload(vt, l * v_l + c, V)
                                vstore(past, _A * area + slot, a, W)
                                vstore(past, _B * area + slot, b, W)
                                y, z, old, new = _drive(ka, m, a, b, key, value, w, u, W)
                                x, inverse = y, one / z
                                if GATE:
                                    up, down, e = _gate(vload(rt, l * r_l + c, V), W)
                                    x, both = y * up, one / (z * down)
                                    vstore(current, slot, x * both, W)
                                    inverse, share = both * down, both * z
                                    vstore(past, _OPEN * area + slot, up * share, W)
                                    vstore(past, _SLOPE * area + slot, e * share * share, W)
                                else:
                                    vstore(current, slot, x * inverse, W)
                                vstore(past, _SEEN * area + slot, old * inverse, W)
                                vstore(past, _SELF * area + slot, new * inverse, W)
                                vstore(past, _Y * area + slot, y * inverse, W)
                                ka, m, a, b, A, E = _include(ka, m, a, b, key, value, w, W)
                                vstore(past, _KEEP * area + slot, A, W)
                                vstore(past, _NEW * area + slot, E, W)
                            slot = j * lanes
                            if first + size < L:  # the tile that follows counts from its exponent rounded
                                gap = _gap(ka, m, vload(entry, 2 * field + C + c, W), w, W)
                                P, Q = vload(Pt, slot, W) * gap, vload(Pt, ROW + slot, W) * gap
                            else:
                                gy = vload(g_ybar, user + c, W) if g_ybar != 0 else zero
                                gl = vload(g_lse, user + c, W) if g_lse != 0 else zero
                                z = where_equal(b, zero, zero, one / b)
                                P, Q = gy * z, (gl - gy * (a * z)) * z
                            vstore(Pt, slot, P, W)
                            vstore(Pt, ROW + slot, Q, W)
                        for l in range(size):
                            ct, hl = current + l * ROW * sb, ht + l * ROW * sb
                            before = start + l * ROW * sb if t == 0 else hl - area * sb
                            for c in range(n):
                                if PER_CHANNEL:
                                    leak, th = load(leaks, c, S), load(ths, c, S)
                                x = load(before, c, S)
                                if t > 0:
                                    x = _reset(x, th, vr, SOFT)
                                h, _ = _charge(load(ct, c, S), x, leak, vr, SOFT, DECAY)
                                store(ct, c, h, S)
                            _fill(hl, n, ct, 0, nil, S, S)
                    for t in range(T - 1, -1, -1):  # walk back
                        user = (t * B + batch) * C
                        past, ht, Pt = history + t * FIELDS * area * sb, charge + t * area * sb, adjoint + 2 * t * ROW * sb
                        for l in range(size):
                            gt = g + (t * g_t + batch * g_b + (first + l) * g_l + c0) * xb
                            ct, kept, hl = carry + l * ROW * sb, current + l * ROW * sb, ht + l * ROW * sb
                            before = start + l * ROW * sb if t == 0 else hl - area * sb
                            y_, open_ = past + (_Y * area + l * ROW) * sb, past + (_OPEN * area + l * ROW) * sb
                            for c in range(n):
                                if PER_CHANNEL:
                                    leak, th = load(leaks, c, S), load(ths, c, S)
                                h, ds, dvc = load(hl, c, S), load(gt, c, X), load(ct, c, S)
                                if RATE:
                                    ds = ds / steps
                                fired = h >= th
                                slope = _surrogate(KIND, h - th, alpha, S)
                                if DETACH:
                                    q = nil
                                elif SOFT:
                                    q = -th
                                else:
                                    q = vr - h
                                through = ds + dvc * q  # what reaches the step function
                                dh = through * slope + (dvc if SOFT or not fired else nil)
                                if PARAMETERS:
                                    x = load(before, c, S)
                                    if t > 0:
                                        x = _reset(x, th, vr, SOFT)
                                    rest = x if SOFT else x - vr
                                    x = load(y_, c, S) * load(open_, c, S) if GATE else load(y_, c, S)
                                    store(sum_leak, c, load(sum_leak, c, S) + dh * (x - rest if DECAY else -rest), S)
                                    x = through * slope
                                    if SOFT:
                                        x = x + (dvc if fired else nil)
                                    store(sum_th, c, load(sum_th, c, S) - x, S)
                                store(kept, c, dh * leak if DECAY else dh, S)
                                store(ct, c, dh * (unit - leak), S)
                        vt = v + (t * v_t + batch * v_b + first * v_l) * xb
                        target = ((t * B + batch) * L + first) * C * xb
                        for j in range(vectors):
                            c = min((begin + j) * lanes, C - lanes)
                            own_slot = j * lanes
                            P, Q, in_w, in_u = vload(Pt, own_slot, W), vload(Pt, ROW + own_slot, W), zero, zero
                            for l in range(size - 1, -1, -1):
                                slot = l * ROW + c - c0
                                gt, y, value = (
                                    vload(current, slot, W),
                                    vload(past, _Y * area + slot, W),
                                    vload(vt, l * v_l + c, V),
                                )
                                if GATE:
                                    vstore(dr + target, l * C + c, gt * y * vload(past, _SLOPE * area + slot, W), V)
                                    gt = gt * vload(past, _OPEN * area + slot, W)
                                A, E = vload(past, _KEEP * area + slot, W), vload(past, _NEW * area + slot, W)
                                gs, gp = gt * vload(past, _SELF * area + slot, W), gt * vload(past, _SEEN * area + slot, W)
                                own = gs * (value - y)
                                vstore(dv + target, l * C + c, fma(E, P, gs), V)
                                vstore(dk + target, l * C + c, fma(E, fma(P, value, Q), own), V)
                                a, b = vload(past, _A * area + slot, W), vload(past, _B * area + slot, W)
                                in_w, in_u = fma(A, fma(P, a, Q * b), in_w), in_u + own
                                P, Q = fma(A, P, gp), A * Q - gp * y
                            vstore(Pt, own_slot, P, W)
                            vstore(Pt, ROW + own_slot, Q, W)
                            vstore(sum_w, own_slot, vload(sum_w, own_slot, W) + in_w, W)
                            vstore(sum_u, own_slot, vload(sum_u, own_slot, W) + in_u, W)
                            if i == 0 and d_ybar != 0:
                                a, b = vload(past, _A * area + c - c0, W), vload(past, _B * area + c - c0, W)
                                vstore(d_ybar, user + c, P * b, W)
                                vstore(d_lse, user + c, fma(P, a, Q * b), W)
                    if d_m != 0:
                        for l in range(size):
                            for c in range(n):
                                store(d_m + ((batch * L + first + l) * C + c0 + c) * mb, 0, load(carry + l * ROW * sb, c, S), M)
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    vstore(dw, batch * C + c, vload(sum_w, j * lanes, W), W)
                    vstore(du, batch * C + c, vload(sum_u, j * lanes, W), W)
                if PARAMETERS:
                    _fill(d_leak + (batch * C + c0) * sb, n, sum_leak, 0, nil, S, S)
                    _fill(d_theta + (batch * C + c0) * sb, n, sum_th, 0, nil, S, S)

    flags = f"{X}{M}_{lanes}{GATE:d}{RATE:d}{SOFT:d}{DECAY:d}{DETACH:d}{KIND}{PER_CHANNEL:d}{PARAMETERS:d}"
    return Kernel(spiking_wkv_backward, f"spiking_wkv_backward_{flags}")


# --- launchers: the same signatures as in triton/spiking_wkv.py -------------------------------------------------------------


def _spread(B, C, lanes, width):
    """Blocks of channels per sequence: wide ones read whole cache lines, but every thread wants some."""
    whole = C // lanes
    width = max(2, min(width, B * whole // (4 * torch.get_num_threads())))
    return max(1, -(-whole // width))


def spiking_wkv_forward(
    k, v, r, w, u, ybar, lse, membrane, tau, v_threshold, neuron, rate, out, ybar_out, lse_out, membrane_out, checkpoint
):
    """Fill out, and the final states and the checkpoint where they are given. k is not empty."""
    T, B, L, C = k.shape
    lanes = LANES if C >= LANES else 1
    p = _Parameters(tau, v_threshold, neuron, w.dtype)
    states = w.new_empty(3, T * B * 2, C) if checkpoint is None else checkpoint
    (k, *k_), (v, *v_), (r, *r_) = (_place(t, 3) for t in (k, v, r))
    membrane, *m_ = _place(membrane, 2)
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    _forward_kernel(
        CODES[k.dtype], CODES[w.dtype if membrane is None else membrane.dtype], lanes, r is not None, rate,
        neuron.v_reset is None, neuron.decay_input, p.per_channel,
    )(
        2 * T * B * L * C, T, B, L, C, spiking_tile(T, "cpu"), _spread(B, C, lanes, _WIDTH), k.data_ptr(), *k_,
        v.data_ptr(), *v_, _address(r), *r_, w.data_ptr(), u.data_ptr(), _address(ybar), _address(lse), _address(membrane), *m_,
        states.data_ptr(), states.shape[1] // (T * B), states.stride(0), checkpoint is not None, out.data_ptr(),
        _address(ybar_out), _address(lse_out), _address(membrane_out), *p.r, *p.theta, neuron.v_reset or 0.0,
    )  # fmt: skip


def spiking_wkv_backward(
    g, g_ybar, g_lse, g_membrane, k, v, r, w, u, membrane, tau, v_threshold, checkpoint, neuron, rate, parameters,
    dk, dv, dr, d_ybar, d_lse, d_membrane,
):  # fmt: skip
    """Fill the gradients that are given; return (dw, du, sums of d 1/tau and d v_threshold), (B, C) each. k is not empty."""
    T, B, L, C = k.shape
    lanes, tokens = LANES if C >= LANES else 1, spiking_tile(T, "cpu")
    p = _Parameters(tau, v_threshold, neuron, w.dtype)
    dw, du = w.new_empty(2, B, C)
    sums = w.new_empty(2, B, C) if parameters else None
    blocks = _spread(B, C, lanes, _BACK)
    workers = min(torch.get_num_threads(), B * blocks)
    work = w.new_empty(workers, T, 10 * tokens + 2, (_BACK + 1) * lanes)
    g = k.new_zeros(()).expand(k.shape) if g is None else g.to(k.dtype)
    (k, *k_), (v, *v_), (r, *r_), (g, *g_) = (_place(t, 3) for t in (k, v, r, g.expand(k.shape)))
    membrane, *m_ = _place(membrane, 2)
    upstream = [None if t is None else t.to(w.dtype).contiguous() for t in (g_ybar, g_lse, g_membrane)]
    _backward_kernel(
        CODES[k.dtype], CODES[w.dtype if membrane is None else membrane.dtype], lanes, r is not None, rate,
        neuron.v_reset is None, neuron.decay_input, neuron.detach_reset, SURROGATES[neuron.surrogate].id, p.per_channel,
        parameters,
    )(
        4 * T * B * L * C, T, B, L, C, tokens, blocks, workers, work.data_ptr(), k.data_ptr(), *k_, v.data_ptr(), *v_,
        _address(r), *r_, w.data_ptr(), u.data_ptr(), _address(membrane), *m_, checkpoint.data_ptr(),
        checkpoint.shape[1] // (T * B), checkpoint.stride(0), g.data_ptr(), *g_, *map(_address, upstream), dk.data_ptr(),
        dv.data_ptr(), _address(dr), _address(d_ybar), _address(d_lse), _address(d_membrane), dw.data_ptr(), du.data_ptr(),
        *((0, 0) if sums is None else map(_address, sums)), *p.r, *p.theta, neuron.v_reset or 0.0, neuron.alpha,
    )  # fmt: skip
    return dw, du, sums
