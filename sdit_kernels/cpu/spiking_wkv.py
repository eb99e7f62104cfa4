"""WKV scans that drive LIF neurons, on the CPU.

A task processes a block of channels of one sequence, tile by tile. A tile is a run of tokens. Within a tile, a loop goes over
the time steps. The scan of time step t continues from its state after the previous tile, and its output at each token drives
the membrane of that token. The state of a vector of channels stays in registers during a tile, as in cpu/wkv.py.

The checkpoint holds the scan state at the entry of each tile, with its exponent rounded to one number (see cpu/scan.py). The
forward pass uses these rounded states too. The backward pass recomputes each tile from them, with the same operations in the
same order, so it gets the same spikes. It finishes one vector of channels of a tile before the next, so it holds the
recomputed values of one vector only.
"""

import functools

import numpy as np
import torch

from ..layout import spiking_tile
from ..neuron import trace
from ..surrogate import SURROGATES
from . import scan
from .compiler import inline
from .intrinsics import CODES, SIZES, load, num, prefetch, state_code, store, tile
from .kernel import Kernel, share
from .launch import Parameters, address, placed_rows
from .neuron import generate
from .vector import LANES, fma, vec, vexp, vload, vlog, vset, vstore, where_equal, where_less

_WIDTH = 8  # the most vectors that a forward task holds; the last task of a sequence holds one more for the last channels
_BACK = 6  # the same limit for a backward task
# Values that the backward pass recomputes per time step and token, indexed by: (a, b) before the token (_A, _B); the weight of
# the token in the state (_NEW), and of the state in y (_SEEN); the tape of the neuron (_TAPE); the weight of the state in the
# next state (_KEEP), and of the token in y (_SELF); with a gate, sigmoid(r) and its derivative (_OPEN, _SLOPE); and last the
# current, if the neuron's pullback uses it. With a shared maximum, _KEEP and _SELF follow from others and are not stored.
_A, _B, _NEW, _SEEN, _TAPE, _KEEP, _SELF, _OPEN, _SLOPE = range(9)


@functools.cache
def _fields(gate, code, with_parameters):
    return (9 if gate else 7) + trace(*code).plan(with_parameters).uses_x


@inline
def _enter_tile(constants, k, k_l, n, tokens, ka, b, w, u, V, W):
    """Return (shared_max, exponent, factor, U, D) of a tile. factor converts a and b to the exponent; see cpu/scan.py."""
    one = vset(1.0, W)
    if scan.allows_shared_max(w, u, W):
        high, low = scan.extremes(k, k_l, n, V)
        shared_max, top, _, entry = scan.enter_shared_max_tile(vload(k, 0, V), high, low, tokens, ka, vset(0.0, W), b, w, W)
        if shared_max:
            return True, top, entry, vload(constants, 0, W), vload(constants, W // 8, W)
    return False, ka, one, one, one


@inline
def _step(shared_max, growth, bonus, decay, ka, m, a, b, k, v, w, u, W):
    """Include one token. Return the numerator and denominator of y, the weights of the state and of the token in both, the
    state (ka, m, a, b) after the token, and the weights (A, E) of the update."""
    if shared_max:
        E = vexp(k - ka, W) * growth
        Ev = E * v
        y, z = fma(bonus, Ev, a), fma(bonus, E, b)
        return y, z, vset(1.0, W), bonus * E, ka, m, fma(decay, a, Ev), fma(decay, b, E), decay, E
    old, new = scan.pair_weights(fma(m, w, k - ka) + u, W)
    half, y, z = vset(0.5, W), fma(new, v, old * a), fma(old, b, new)
    z = where_less(z, half, half, z)  # avoids 0 / 0: z is 0 if the scan has seen nothing, otherwise about 1 or more
    ka, m, a, b, A, E = scan.include_token(ka, m, a, b, k, v, w, W)
    return y, z, old, new, ka, m, a, b, A, E


@inline
def _neuron_parameters(numbers, addresses, c, W):
    """Return the parameters of the neurons of the channels from c on."""
    r, th, reset = numbers[:3]
    rs, ths, _ = addresses
    return vload(rs, c, W) if rs != 0 else vset(r, W), vload(ths, c, W) if ths != 0 else vset(th, W), vset(reset, W)


@functools.cache
def _forward_kernel(X, M, lanes, GATE, RATE, code, PER_CHANNEL, TILE):
    V, S = vec(X, lanes), state_code(X)
    W, MV, xb, sb = vec(S, lanes), vec(M, lanes), SIZES[X], SIZES[S]
    ROW = (_WIDTH + 1) * lanes
    AREA, COUNTS, CONSTANTS = TILE * ROW, TILE * ROW if RATE else 1, (TILE + 2) * ROW
    (neuron,) = generate(code, W, 0, False, ("step",))

    @inline
    def token(
        shared_max, growth, bonus, decay, ka, m, a, b, k, v, r, membrane, counts, s_, l, k_l, v_l, r_l, C, c, slot, w, u, p
    ):  # fmt: skip
        key, value = vload(k, l * k_l + c, V), vload(v, l * v_l + c, V)
        y, z, _, _, ka, m, a, b, _, _ = _step(shared_max, growth, bonus, decay, ka, m, a, b, key, value, w, u, W)
        if GATE:
            over, _ = scan.gate(vload(r, l * r_l + c, V), W)
            z = z * over
        slot = l * ROW + slot
        s, after = neuron(y * (vset(1.0, W) / z), (vload(membrane, slot, W),), p)
        vstore(membrane, slot, after[0], W)
        if RATE:
            vstore(counts, slot, vload(counts, slot, W) + s, W)
        else:
            vstore(s_, l * C + c, s, V)
        return ka, m, a, b

    def spiking_wkv_forward(
        part, T, B, L, C, cut, inputs, checkpoint, keep, weights, state, outputs, numbers, per_channel
    ):  # fmt: skip
        tokens, blocks = cut
        (k, k_t, k_b, k_l), (v, v_t, v_b, v_l), (r, r_t, r_b, r_l), (m0, m0_b, m0_l) = inputs
        states, rows, field = checkpoint
        w_, u_ = weights
        ybar, lse = state
        out, ybar1, lse1, m1 = outputs
        for task in share(B * blocks, part):
            batch = task // blocks
            begin, vectors = scan.channels(C, lanes, task - batch * blocks, blocks)
            membrane, counts, constants = tile(AREA, S), tile(COUNTS, S), tile(CONSTANTS, S)
            p, start, steps = _neuron_parameters(numbers, (0, 0, 0), 0, W), vset(numbers[3], W), vset(float(T), W)
            zero, one = vset(0.0, W), vset(1.0, W)
            for j in range(vectors):
                c = min((begin + j) * lanes, C - lanes)
                w, u = vload(w_, c, W), vload(u_, c, W)
                if scan.allows_shared_max(w, u, W):
                    scan.store_tile_constants(constants + j * (TILE + 2) * lanes * sb, tokens, w, u, lanes, W)
            for i in range((L + tokens - 1) // tokens):
                first = i * tokens
                size = min(tokens, L - first)
                for t in range(T):
                    user = (t * B + batch) * C
                    entry = states + ((t * B + batch) * rows + (i if keep else i & 1)) * C * sb
                    exit_ = states + ((t * B + batch) * rows + (i + 1 if keep else (i + 1) & 1)) * C * sb
                    kt = k + (t * k_t + batch * k_b + first * k_l) * xb
                    vt = v + (t * v_t + batch * v_b + first * v_l) * xb
                    rt = r + (t * r_t + batch * r_b + first * r_l) * xb
                    st = out + ((t * B + batch) * L + first) * C * xb
                    for j in range(vectors):
                        c, slot = min((begin + j) * lanes, C - lanes), j * lanes
                        w, u = vload(w_, c, W), vload(u_, c, W)
                        if PER_CHANNEL:
                            p = _neuron_parameters(numbers, per_channel, c, W)
                        if t == 0:
                            for l in range(size):
                                x = vload(m0, batch * m0_b + (first + l) * m0_l + c, MV) if m0 != 0 else start
                                vstore(membrane, l * ROW + slot, x, W)
                                if RATE:
                                    vstore(counts, l * ROW + slot, zero, W)
                        if i == 0:
                            ka, a, b = scan.user_state(ybar, lse, user + c, W)
                            if keep:
                                vstore(entry, c, a, W)
                                vstore(entry, field + c, b, W)
                                vstore(entry, 2 * field + c, ka, W)
                        else:
                            a, b, ka = vload(entry, c, W), vload(entry, field + c, W), vload(entry, 2 * field + c, W)
                        m, own_constants = zero, constants + j * (TILE + 2) * lanes * sb
                        shared_max, ka, entered, bonus, decay = _enter_tile(
                            own_constants, kt + c * xb, k_l, size, tokens, ka, b, w, u, V, W
                        )
                        a, b = a * entered, b * entered
                        for l in range(size):
                            ahead = (l + tokens) * xb
                            prefetch(kt + (c * xb + ahead * k_l), lanes * xb, 0)
                            prefetch(vt + (c * xb + ahead * v_l), lanes * xb, 0)
                            if GATE:
                                prefetch(rt + (c * xb + ahead * r_l), lanes * xb, 0)
                        if shared_max:
                            for l in range(size):
                                growth = vload(own_constants, (l + 2) * lanes, W)
                                ka, m, a, b = token(
                                    True, growth, bonus, decay, ka, m, a, b, kt, vt, rt, membrane, counts, st, l, k_l, v_l,
                                    r_l, C, c, slot, w, u, p,
                                )  # fmt: skip
                            ka, m, a, b = scan.exit_shared_max_tile(
                                vload(kt, (size - 1) * k_l + c, V), size, tokens, ka, m, a, b, w, W
                            )
                        else:
                            for l in range(size):
                                ka, m, a, b = token(
                                    False, one, one, one, ka, m, a, b, kt, vt, rt, membrane, counts, st, l, k_l, v_l, r_l, C, c,
                                    slot, w, u, p,
                                )  # fmt: skip
                        if first + size < L:
                            a, b, ka = scan.with_rounded_exponent(ka, m, a, b, w, W)
                            vstore(exit_, c, a, W)
                            vstore(exit_, field + c, b, W)
                            vstore(exit_, 2 * field + c, ka, W)
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
        spiking_wkv_forward, f"spiking_wkv_{neuron.__name__}_{TILE}_{X}{M}_{lanes}{GATE:d}{RATE:d}{PER_CHANNEL:d}"
    )  # fmt: skip


@functools.cache
def _backward_kernel(X, M, lanes, GATE, RATE, code, kind, PER_CHANNEL, PARAMETERS, TILE):
    V, S = vec(X, lanes), state_code(X)
    W, MV, xb, sb = vec(S, lanes), vec(M, lanes), SIZES[X], SIZES[S]
    ROW, FIELDS = (_BACK + 1) * lanes, _fields(GATE, code, PARAMETERS)
    CONSTANTS, CURRENT = (TILE + 2) * ROW, FIELDS - 1
    _, _, _, USES_X, USES_STATES = trace(*code).plan(PARAMETERS)
    record, pullback = generate(code, W, kind, PARAMETERS, ("record", "pullback"))

    @inline
    def recompute_token(
        shared_max, growth, bonus, decay, here, ka, m, a, b, k, v, r, membrane, l, k_l, v_l, r_l, c, w, u, p
    ):  # fmt: skip
        one = vset(1.0, W)
        key, value = vload(k, l * k_l + c, V), vload(v, l * v_l + c, V)
        vstore(here, _A * lanes, a, W)
        vstore(here, _B * lanes, b, W)
        y, z, old, new, ka, m, a, b, A, E = _step(shared_max, growth, bonus, decay, ka, m, a, b, key, value, w, u, W)
        if GATE:
            over, e = scan.gate(vload(r, l * r_l + c, V), W)
            both = one / (z * over)
            x, inverse, share = y * both, both * over, both * z
            vstore(here, _OPEN * lanes, share, W)
            vstore(here, _SLOPE * lanes, e * share * share, W)
        else:
            inverse = one / z
            x = y * inverse
        vstore(here, _SEEN * lanes, old * inverse, W)
        vstore(here, _NEW * lanes, E, W)
        if not shared_max:
            vstore(here, _KEEP * lanes, A, W)
            vstore(here, _SELF * lanes, new * inverse, W)
        if USES_X:
            vstore(here, CURRENT * lanes, x, W)
        tape, after = record(x, (vload(membrane, 0, W),), p)
        vstore(here, _TAPE * lanes, tape[0], W)
        vstore(membrane, 0, after[0], W)
        return ka, m, a, b

    @inline
    def differentiate_token(
        shared_max, bonus, decay, here, P, Q, in_w, in_u, in_leak, in_th, g, g_l, v, v_l, dk, dv, dr, target, carries, m0,
        at_m0, g_m, d_m, at, past_step, l, C, c, t, T, steps, start, alpha, p,
    ):  # fmt: skip
        """Return the adjoint and the sums after a token. at: the place of the token in the gradients of the membranes."""
        zero, value = vset(0.0, W), vload(v, l * v_l + c, V)
        a, b = vload(here, _A * lanes, W), vload(here, _B * lanes, W)
        seen, E = vload(here, _SEEN * lanes, W), vload(here, _NEW * lanes, W)
        self = bonus * E * seen if shared_max else vload(here, _SELF * lanes, W)
        y = fma(self, value, seen * a)
        # the backward pass of the neuron
        ds = vload(g, l * g_l + c, V)
        if RATE:
            ds = ds / steps
        if t < T - 1:
            carry = vload(carries, l * lanes, W)
        else:
            carry = vload(g_m, at, W) if g_m != 0 else zero
        before = zero
        if USES_STATES:
            if t > 0:
                before = vload(here - past_step, _TAPE * lanes, W)
            else:
                before = vload(m0, at_m0, MV) if m0 != 0 else start
        x = vload(here, CURRENT * lanes, W) if USES_X else zero
        dy, d_before, d_p = pullback((vload(here, _TAPE * lanes, W),), x, (before,), p, ds, (carry,), alpha)
        if PARAMETERS:
            in_leak, in_th = in_leak + d_p[0], in_th + d_p[1]
        if t > 0:
            vstore(carries, l * lanes, d_before[0], W)
        elif d_m != 0:
            vstore(d_m, at, d_before[0], MV)
        if GATE:
            vstore(dr + target, l * C + c, dy * y * vload(here, _SLOPE * lanes, W), V)
            dy = dy * vload(here, _OPEN * lanes, W)
        # the backward pass of the scan
        A = decay if shared_max else vload(here, _KEEP * lanes, W)
        gs, gp = dy * self, dy * seen
        own = gs * (value - y)
        vstore(dv + target, l * C + c, fma(E, P, gs), V)
        vstore(dk + target, l * C + c, fma(E, fma(P, value, Q), own), V)
        in_w, in_u = fma(A, fma(P, a, Q * b), in_w), in_u + own
        return fma(A, P, gp), A * Q - gp * y, in_w, in_u, in_leak, in_th

    def spiking_wkv_backward(
        part, T, B, L, C, cut, work, inputs, weights, upstream, gradients, sums, numbers, per_channel
    ):  # fmt: skip
        tokens, blocks, workers = cut
        (k, k_t, k_b, k_l), (v, v_t, v_b, v_l), (r, r_t, r_b, r_l), (m0, m0_b, m0_l), (states, rows, field) = inputs
        w_, u_ = weights
        (g, g_t, g_b, g_l), (g_ybar, g_lse, g_m) = upstream
        (dk, dv, dr), (d_ybar, d_lse, d_m) = gradients
        (dw, du), (d_leak, d_theta) = sums
        area = tokens * lanes
        for worker in share(workers, part):
            past_step = FIELDS * area * sb
            history = work + worker * (T * (FIELDS * area + 2 * ROW + 2 * lanes) + area) * sb
            carries = history + T * past_step  # the membranes of the tile, then the gradients with respect to them
            adjoint = carries + area * sb  # the adjoint (P, Q) of every time step: the gradient with respect to (a, b)
            sum_w, sum_u, sum_leak, sum_th = tile(ROW, S), tile(ROW, S), tile(ROW, S), tile(ROW, S)
            constants, entries = tile(CONSTANTS, S), adjoint + 2 * T * ROW * sb
            modes = entries + T * lanes * sb  # per time step, 1 in a tile with a shared maximum
            line = lanes * xb
            p, start, alpha = _neuron_parameters(numbers, (0, 0, 0), 0, W), vset(numbers[3], W), vset(numbers[4], W)
            zero, one, steps = vset(0.0, W), vset(1.0, W), vset(float(T), W)
            for task in range(B * blocks * worker // workers, B * blocks * (worker + 1) // workers):
                batch = task // blocks
                begin, vectors = scan.channels(C, lanes, task - batch * blocks, blocks)
                for j in range(vectors):
                    for total in (sum_w, sum_u, sum_leak, sum_th):
                        vstore(total, j * lanes, zero, W)
                    c = min((begin + j) * lanes, C - lanes)
                    w, u = vload(w_, c, W), vload(u_, c, W)
                    if scan.allows_shared_max(w, u, W):
                        scan.store_tile_constants(constants + j * (TILE + 2) * lanes * sb, tokens, w, u, lanes, W)
                for i in range((L - 1) // tokens, -1, -1):
                    first = i * tokens
                    size = min(tokens, L - first)
                    for j in range(vectors):
                        c, slot = min((begin + j) * lanes, C - lanes), j * lanes
                        w, u, own_constants = vload(w_, c, W), vload(u_, c, W), constants + j * (TILE + 2) * lanes * sb
                        if PER_CHANNEL:
                            p = _neuron_parameters(numbers, per_channel, c, W)
                        for t in range(T):  # recompute the tile
                            user = (t * B + batch) * C
                            entry = states + ((t * B + batch) * rows + i) * C * sb
                            kt = k + (t * k_t + batch * k_b + first * k_l) * xb
                            vt = v + (t * v_t + batch * v_b + first * v_l) * xb
                            rt = r + (t * r_t + batch * r_b + first * r_l) * xb
                            gt = g + (t * g_t + batch * g_b + first * g_l) * xb
                            target = ((t * B + batch) * L + first) * C * xb
                            past, Pt = history + t * past_step, adjoint + 2 * t * ROW * sb
                            for n in range(3):  # the state before the previous tile
                                prefetch(entry + (n * field - C + c) * sb, lanes * sb, 0)
                            a, b, ka = vload(entry, c, W), vload(entry, field + c, W), vload(entry, 2 * field + c, W)
                            m = zero
                            shared_max, ka, entered, bonus, decay = _enter_tile(
                                own_constants, kt + c * xb, k_l, size, tokens, ka, b, w, u, V, W
                            )
                            vstore(entries, t * lanes, entered, W)
                            store(modes, t * lanes, num(1.0 if shared_max else 0.0, S), S)
                            a, b = a * entered, b * entered
                            for l in range(size):
                                here, membrane = past + l * lanes * FIELDS * sb, carries + l * lanes * sb
                                if t == 0:
                                    x = vload(m0, batch * m0_b + (first + l) * m0_l + c, MV) if m0 != 0 else start
                                    vstore(membrane, 0, x, W)
                                for_next = (l - tokens) * xb
                                prefetch(kt + (c * xb + for_next * k_l), line, 0)
                                prefetch(vt + (c * xb + for_next * v_l), line, 0)
                                if GATE:
                                    prefetch(rt + (c * xb + for_next * r_l), line, 0)
                                prefetch(gt + (l * g_l + c) * xb, line, 0)
                                prefetch(dk + target + (l * C + c) * xb, line, 1)
                                prefetch(dv + target + (l * C + c) * xb, line, 1)
                                if GATE:
                                    prefetch(dr + target + (l * C + c) * xb, line, 1)
                                if shared_max:
                                    growth = vload(own_constants, (l + 2) * lanes, W)
                                    ka, m, a, b = recompute_token(
                                        True, growth, bonus, decay, here, ka, m, a, b, kt, vt, rt, membrane, l, k_l, v_l, r_l,
                                        c, w, u, p,
                                    )  # fmt: skip
                                else:
                                    ka, m, a, b = recompute_token(
                                        False, one, one, one, here, ka, m, a, b, kt, vt, rt, membrane, l, k_l, v_l, r_l, c, w,
                                        u, p,
                                    )  # fmt: skip
                            if shared_max:
                                m = scan.by_decay(w, tokens, vset(-float(size), W), zero, W)
                            if first + size < L:  # the next tile uses the rounded exponent
                                gap = scan.rounding_factor(ka, m, vload(entry, 2 * field + C + c, W), w, W)
                                P, Q = vload(Pt, slot, W) * gap, vload(Pt, ROW + slot, W) * gap
                            elif g_ybar != 0 or g_lse != 0:
                                gy = vload(g_ybar, user + c, W) if g_ybar != 0 else zero
                                gl = vload(g_lse, user + c, W) if g_lse != 0 else zero
                                z = where_equal(b, zero, zero, one / b)
                                P, Q = gy * z, (gl - gy * (a * z)) * z
                            else:  # do not multiply 0 by a state, which may be infinite
                                P, Q = zero, zero
                            vstore(Pt, slot, P, W)
                            vstore(Pt, ROW + slot, Q, W)
                        in_w, in_u, in_leak, in_th = zero, zero, zero, zero
                        for t in range(T - 1, -1, -1):  # compute the gradients
                            user = (t * B + batch) * C
                            past, Pt = history + t * past_step, adjoint + 2 * t * ROW * sb
                            vt = v + (t * v_t + batch * v_b + first * v_l) * xb
                            gt = g + (t * g_t + batch * g_b + first * g_l) * xb
                            target = ((t * B + batch) * L + first) * C * xb
                            P, Q = vload(Pt, slot, W), vload(Pt, ROW + slot, W)
                            if load(modes, t * lanes, S) != 0:
                                bonus, decay = vload(own_constants, 0, W), vload(own_constants, lanes, W)
                                for l in range(size - 1, -1, -1):
                                    here, at = past + l * lanes * FIELDS * sb, (batch * L + first + l) * C + c
                                    at_m0 = batch * m0_b + (first + l) * m0_l + c
                                    P, Q, in_w, in_u, in_leak, in_th = differentiate_token(
                                        True, bonus, decay, here, P, Q, in_w, in_u, in_leak, in_th, gt, g_l, vt, v_l, dk, dv,
                                        dr, target, carries, m0, at_m0, g_m, d_m, at, past_step, l, C, c, t, T, steps, start,
                                        alpha, p,
                                    )  # fmt: skip
                            else:
                                for l in range(size - 1, -1, -1):
                                    here, at = past + l * lanes * FIELDS * sb, (batch * L + first + l) * C + c
                                    at_m0 = batch * m0_b + (first + l) * m0_l + c
                                    P, Q, in_w, in_u, in_leak, in_th = differentiate_token(
                                        False, one, one, here, P, Q, in_w, in_u, in_leak, in_th, gt, g_l, vt, v_l, dk, dv, dr,
                                        target, carries, m0, at_m0, g_m, d_m, at, past_step, l, C, c, t, T, steps, start, alpha,
                                        p,
                                    )  # fmt: skip
                            if i == 0 and d_ybar != 0:
                                a, b = vload(past, _A * lanes, W), vload(past, _B * lanes, W)
                                vstore(d_ybar, user + c, P * b, W)
                                vstore(d_lse, user + c, fma(P, a, Q * b), W)
                            entered = vload(entries, t * lanes, W)
                            P, Q = P * entered, Q * entered
                            vstore(Pt, slot, P, W)
                            vstore(Pt, ROW + slot, Q, W)
                        vstore(sum_w, slot, vload(sum_w, slot, W) + in_w, W)
                        vstore(sum_u, slot, vload(sum_u, slot, W) + in_u, W)
                        if PARAMETERS:
                            vstore(sum_leak, slot, vload(sum_leak, slot, W) + in_leak, W)
                            vstore(sum_th, slot, vload(sum_th, slot, W) + in_th, W)
                for j in range(vectors):
                    at, slot = batch * C + min((begin + j) * lanes, C - lanes), j * lanes
                    vstore(dw, at, vload(sum_w, slot, W), W)
                    vstore(du, at, vload(sum_u, slot, W), W)
                    if PARAMETERS:
                        vstore(d_leak, at, vload(sum_leak, slot, W), W)
                        vstore(d_theta, at, vload(sum_th, slot, W), W)

    flags = f"{TILE}_{X}{M}_{lanes}{GATE:d}{RATE:d}{kind}{PER_CHANNEL:d}{PARAMETERS:d}"
    return Kernel(spiking_wkv_backward, f"spiking_wkv_{pullback.__name__}_{flags}")


# --- launchers: the same signatures as in triton/spiking_wkv.py -------------------------------------------------------------


def _count_blocks(B, C, lanes, width):
    """Return the number of channel blocks per sequence. Wide blocks read whole cache lines, but every thread needs several."""
    whole = C // lanes
    width = max(2, min(width, B * whole // (4 * torch.get_num_threads())))
    return max(1, -(-whole // width))


def spiking_wkv_forward(
    k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, membrane, parameters, variant, rate, out, ybar_out, lse_out,
    membrane_out, checkpoint, tuning,
):  # fmt: skip
    """Fill out, and the final states and the checkpoint if they are given. k is not empty."""
    w, u = scan.parameters(decay, bonus, decay_is_log_of_rate, k)
    T, B, L, C = k.shape
    lanes = LANES if C >= LANES else 1
    p = Parameters(variant, parameters, w.dtype)
    states = w.new_empty(3, T * B * 2, C) if checkpoint is None else checkpoint
    (k, k_), (v, v_), (r, r_) = (placed_rows(t, 3) for t in (k, v, r))
    membrane, membrane_ = placed_rows(membrane)
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    _forward_kernel(
        CODES[k.dtype], CODES[w.dtype if membrane is None else membrane.dtype], lanes, r is not None, rate, p.code,
        p.per_channel, tuning.wkv_checkpoint_tokens,
    )(
        2 * T * B * L * C, T, B, L, C, (spiking_tile(T, "cpu", tuning), _count_blocks(B, C, lanes, _WIDTH)),
        (k_, v_, r_, membrane_), (states.data_ptr(), states.shape[1] // (T * B), states.stride(0)), checkpoint is not None,
        (w.data_ptr(), u.data_ptr()), (address(ybar), address(lse)),
        (out.data_ptr(), address(ybar_out), address(lse_out), address(membrane_out)), p.numbers, p.addresses,
    )  # fmt: skip


def spiking_wkv_backward(
    g, g_ybar, g_lse, g_membrane, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, membrane, parameters, checkpoint,
    variant, rate, with_parameters, dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse, d_membrane, tuning,
):  # fmt: skip
    """Fill the gradients that are given. k is not empty. Return partial sums of d r and d v_threshold, or None.

    The kernel reads the initial state from the checkpoint, not from ybar and lse.
    """
    w, u = scan.parameters(decay, bonus, decay_is_log_of_rate, k)
    T, B, L, C = k.shape
    lanes, tokens = LANES if C >= LANES else 1, spiking_tile(T, "cpu", tuning)
    p = Parameters(variant, parameters, w.dtype)
    dw, du = w.new_empty(2, B, C)
    sums = w.new_empty(2, B, C) if with_parameters else None
    blocks = _count_blocks(B, C, lanes, _BACK)
    workers = min(torch.get_num_threads(), B * blocks)
    fields = _fields(r is not None, p.code, with_parameters)
    work = w.new_empty(workers, T * (fields * tokens + 2 * (_BACK + 1) + 2) + tokens, lanes)
    g = k.new_zeros(()).expand(k.shape) if g is None else g.to(k.dtype)
    (k, k_), (v, v_), (r, r_), (g, g_) = (placed_rows(t, 3) for t in (k, v, r, g.expand(k.shape)))
    membrane, membrane_ = placed_rows(membrane)
    checkpoint_ = checkpoint.data_ptr(), checkpoint.shape[1] // (T * B), checkpoint.stride(0)
    upstream = [None if t is None else t.to(w.dtype).contiguous() for t in (g_ybar, g_lse, g_membrane)]
    _backward_kernel(
        CODES[k.dtype], CODES[w.dtype if membrane is None else membrane.dtype], lanes, r is not None, rate, p.code,
        SURROGATES[variant.surrogate].id, p.per_channel, with_parameters, tuning.wkv_checkpoint_tokens,
    )(
        4 * T * B * L * C, T, B, L, C, (tokens, blocks, workers), work.data_ptr(), (k_, v_, r_, membrane_, checkpoint_),
        (w.data_ptr(), u.data_ptr()), (g_, tuple(map(address, upstream))),
        ((dk.data_ptr(), dv.data_ptr(), address(dr)), (address(d_ybar), address(d_lse), address(d_membrane))),
        ((dw.data_ptr(), du.data_ptr()), (0, 0) if sums is None else (sums[0].data_ptr(), sums[1].data_ptr())), p.numbers,
        p.addresses,
    )  # fmt: skip
    scan.parameter_sums(dw, du, w, decay_is_log_of_rate, d_decay, d_bonus)
    return sums
