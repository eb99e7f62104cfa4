"""WKV on the CPU. A vector of channels keeps its scan state in registers during a tile of tokens.

A segment is a run of tokens of one sequence. A tile is a run of TILE tokens of a segment. A task processes one segment and one
block of channels, which is a few cache lines wide, tile by tile. "serial": a segment is a whole sequence. "chunked": a segment
is some tiles, and the forward pass has three kernels. The first computes a summary of each segment as if the sequence began
there. The second scans the summaries and gives each segment its entry state. The third computes the outputs. The backward pass
does the same with the adjoint state, the gradient with respect to the scan state.

If C is not a multiple of the lanes of a vector, the last vector overlaps the vector before it. Both belong to the same task and
compute the same values. If C is less than a vector, a vector has one lane.

The checkpoint ``keep`` holds the scan state at the entry of each tile, as (a, b, o). cpu/scan.py defines the state
(ka, m, a, b), its arithmetic and shared-maximum tiles.
"""

import functools

import numpy as np
import torch

from ..layout import wkv_rows
from . import scan
from .compiler import inline
from .intrinsics import CODES, SIZES, load_int, prefetch, state_code, tile
from .kernel import Kernel, share
from .launch import address, placed_rows
from .vector import (
    LANES,
    fma,
    vec,
    vexp,
    vload,
    vlog,
    vset,
    vstore,
    where_equal,
    where_less,
)

_BLOCK = 8  # the most vectors that a task holds; the last task of a segment holds one more for the last channels
# A segment is a row of int64 with these fields. _TILE_ROW: the row of its first tile in the checkpoint. _IS_FIRST, _IS_LAST: 1
# for the first and for the last segment of a sequence.
_FIELDS = 7
_BATCH, _FIRST_TOKEN, _TOKENS, _TILE_ROW, _SEQUENCE, _IS_FIRST, _IS_LAST = range(_FIELDS)


# --- kernels ----------------------------------------------------------------------------------------------------------------


@functools.cache
def _summary_kernel(X, lanes, BOTH):
    """Compute the summary of each segment: the state (a, b, ka, m) after its own tokens, with the shape (D, 4, S, C).

    The first segment of a sequence begins with the user's state, all others begin with an empty state. D is the number of
    directions, S is the number of segments.
    """
    V, S = vec(X, lanes), state_code(X)
    W, xb, sb = vec(S, lanes), SIZES[X], SIZES[S]

    def wkv_summary(part, segments, count, C, blocks, inputs, w_, state, summary):
        (k, k_b, k_l), (v, v_b, v_l) = inputs
        ybar, lse = state
        for task in share(count * blocks, part):
            segment = task // blocks
            at = segment * _FIELDS
            batch, t0 = load_int(segments, at + _BATCH), load_int(segments, at + _FIRST_TOKEN)
            n = load_int(segments, at + _TOKENS)
            first, last = load_int(segments, at + _IS_FIRST), load_int(segments, at + _IS_LAST)
            begin, vectors = scan.channels(C, lanes, task - segment * blocks, blocks)
            ktile, vtile = k + (batch * k_b + t0 * k_l) * xb, v + (batch * v_b + t0 * v_l) * xb
            for side in range(2 if BOTH else 1):
                if (last if side == 0 else first) == 1:
                    continue
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    w = vload(w_, c, W)
                    user = first == 1 and side == 0
                    ka, a, b = scan.user_state(ybar if user else 0, lse, load_int(segments, at + _SEQUENCE) * C + c, W)
                    m = vset(0.0, W)
                    for i in range(n):
                        t = i if side == 0 else n - 1 - i
                        kt, vt = vload(ktile, t * k_l + c, V), vload(vtile, t * v_l + c, V)
                        ka, m, a, b, _, _ = scan.include_token(ka, m, a, b, kt, vt, w, W)
                    target = summary + ((side * 4 * count + segment) * C + c) * sb
                    step = count * C
                    vstore(target, 0, a, W)
                    vstore(target, step, b, W)
                    vstore(target, 2 * step, ka, W)
                    vstore(target, 3 * step, m, W)

    return Kernel(wkv_summary, f"wkv_summary_{X}_{lanes}{BOTH:d}")


@functools.cache
def _scan_kernel(S, lanes, BOTH, TILE):
    """Scan the summaries and write the entry states of the segments to the checkpoint, except at the start of a sequence.

    The scan is serial over segments, because it is about 1/500 of the work.
    """
    W, sb = vec(S, lanes), SIZES[S]

    def wkv_scan(part, segments, count, C, w_, summary, keep, rows):
        vectors = (C + lanes - 1) // lanes
        for task in share(vectors * (2 if BOTH else 1), part):
            side = task // vectors
            c = min((task - side * vectors) * lanes, C - lanes)
            w = vload(w_, c, W)
            ka, m, a, b = vset(0.0, W), vset(0.0, W), vset(0.0, W), vset(0.0, W)
            for i in range(count):
                segment = i if side == 0 else count - 1 - i
                at = segment * _FIELDS
                n, row = load_int(segments, at + _TOKENS), load_int(segments, at + _TILE_ROW)
                is_start = load_int(segments, at + _IS_FIRST if side == 0 else at + _IS_LAST) == 1
                is_end = load_int(segments, at + _IS_LAST if side == 0 else at + _IS_FIRST) == 1
                step = count * C
                source = summary + ((side * 4 * count + segment) * C + c) * sb
                if not is_start:
                    if side == 1:
                        row = row + (n + TILE - 1) // TILE - 1
                    target = keep + ((side * 3 * rows + row) * C + c) * sb
                    a1, b1, o = scan.with_rounded_exponent(ka, m, a, b, w, W)
                    vstore(target, 0, a1, W)
                    vstore(target, rows * C, b1, W)
                    vstore(target, 2 * rows * C, o, W)
                if not is_end:
                    a2, b2 = vload(source, 0, W), vload(source, step, W)
                    ka2, m2 = vload(source, 2 * step, W), vload(source, 3 * step, W)
                    if is_start:
                        ka, m, a, b = ka2, m2, a2, b2
                    else:
                        m = m - vset(float(n), W)
                        ka, m, a, b, _, _ = scan.join(ka, m, a, b, ka2, m2, a2, b2, w, W)
                        ka, m, a, b = scan.rebase_exponent(ka, m, a, b, w, W)

    return Kernel(wkv_scan, f"wkv_scan_{TILE}_{S}_{lanes}{BOTH:d}")


@functools.cache
def _forward_kernel(X, lanes, GATE, BOTH, TILE):
    """Compute the outputs, the state after the last token, and, if ``keep`` is given, the checkpoint."""
    V, S = vec(X, lanes), state_code(X)
    W, xb, sb = vec(S, lanes), SIZES[X], SIZES[S]
    STATE = (_BLOCK + 1) * lanes
    line = lanes * xb
    RIGHT, CONSTANTS = (TILE * lanes, 1) if BOTH else (1, (TILE + 2) * STATE)

    @inline
    def write(out, at, y, z, r, r_at):
        z = z + vset(scan.LEAST, W)  # so that y is 0 if the scan has seen nothing: then y and z are 0
        if GATE:
            over, _ = scan.gate(vload(r, r_at, V), W)
            z = z * over
        vstore(out, at, y / z, V)

    def wkv_forward(part, segments, count, C, blocks, inputs, parameters, state, output, final_state, keep, rows):
        (k, k_b, k_l), (v, v_b, v_l), (r, r_b, r_l) = inputs
        w_, u_ = parameters
        ybar, lse = state
        out, out_b, out_l = output
        ybar1, lse1 = final_state
        for task in share(count * blocks, part):
            segment = task // blocks
            at = segment * _FIELDS
            batch, t0 = load_int(segments, at + _BATCH), load_int(segments, at + _FIRST_TOKEN)
            n = load_int(segments, at + _TOKENS)
            row, sequence = load_int(segments, at + _TILE_ROW), load_int(segments, at + _SEQUENCE)
            first, last = load_int(segments, at + _IS_FIRST), load_int(segments, at + _IS_LAST)
            begin, vectors = scan.channels(C, lanes, task - segment * blocks, blocks)
            tiles = (n + TILE - 1) // TILE
            kas, ms, as_, bs = tile(STATE, S), tile(STATE, S), tile(STATE, S), tile(STATE, S)
            constants, highs, lows = tile(CONSTANTS, S), tile(STATE, S), tile(STATE, S)
            rk, rm, ra, rb = tile(RIGHT, S), tile(RIGHT, S), tile(RIGHT, S), tile(RIGHT, S)
            k0, v0 = k + (batch * k_b + t0 * k_l) * xb, v + (batch * v_b + t0 * v_l) * xb
            r0, out0 = r + (batch * r_b + t0 * r_l) * xb, out + (batch * out_b + t0 * out_l) * xb
            zero = vset(0.0, W)
            side = 3 * rows * C * sb
            if BOTH:  # compute the states that enter the tiles from the right
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    w = vload(w_, c, W)
                    ka, a, b = scan.user_state(0, 0, 0, W)
                    m = zero
                    for i in range(tiles):
                        kept = keep + side + ((row + tiles - 1 - i) * C + c) * sb
                        if i == 0 and last == 0:
                            a, b, ka = vload(kept, 0, W), vload(kept, rows * C, W), vload(kept, 2 * rows * C, W)
                        else:
                            ka, m, a, b = scan.rebase_exponent(ka, m, a, b, w, W)
                            a1, b1, o = scan.with_rounded_exponent(ka, m, a, b, w, W)
                            vstore(kept, 0, a1, W)
                            vstore(kept, rows * C, b1, W)
                            vstore(kept, 2 * rows * C, o, W)
                        start = (tiles - 1 - i) * TILE
                        for t in range(min(n, start + TILE) - 1, start - 1, -1):
                            kt, vt = vload(k0, t * k_l + c, V), vload(v0, t * v_l + c, V)
                            ka, m, a, b, _, _ = scan.include_token(ka, m, a, b, kt, vt, w, W)
            for j in range(vectors):
                c = min((begin + j) * lanes, C - lanes)
                if first == 1:
                    ka, a, b = scan.user_state(ybar, lse, sequence * C + c, W)
                else:
                    kept = keep + (row * C + c) * sb
                    a, b, ka = vload(kept, 0, W), vload(kept, rows * C, W), vload(kept, 2 * rows * C, W)
                vstore(kas, j * lanes, ka, W)
                vstore(ms, j * lanes, zero, W)
                vstore(as_, j * lanes, a, W)
                vstore(bs, j * lanes, b, W)
                w, u = vload(w_, c, W), vload(u_, c, W)
                if not BOTH and n > 0 and scan.allows_shared_max(w, u, W):
                    scan.store_tile_constants(constants + j * (TILE + 2) * lanes * sb, TILE, w, u, lanes, W)
                    high, low = scan.extremes(k0 + c * xb, k_l, min(n, TILE), V)
                    vstore(highs, j * lanes, high, W)
                    vstore(lows, j * lanes, low, W)
            for i in range(tiles):
                start = i * TILE
                end = min(n, start + TILE)
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    w, u = vload(w_, c, W), vload(u_, c, W)
                    kt0, vt0 = k0 + (start * k_l + c) * xb, v0 + (start * v_l + c) * xb
                    rt0, ot0 = r0 + (start * r_l + c) * xb, out0 + (start * out_l + c) * xb
                    if BOTH:
                        kept = keep + side + ((row + i) * C + c) * sb
                        a, b, ka = vload(kept, 0, W), vload(kept, rows * C, W), vload(kept, 2 * rows * C, W)
                        m = zero
                        for t in range(end - start - 1, -1, -1):
                            slot = t * lanes
                            vstore(rk, slot, ka, W)
                            vstore(rm, slot, m, W)
                            vstore(ra, slot, a, W)
                            vstore(rb, slot, b, W)
                            ka, m, a, b, _, _ = scan.include_token(
                                ka, m, a, b, vload(kt0, t * k_l, V), vload(vt0, t * v_l, V), w, W
                            )  # fmt: skip
                    ka, m = vload(kas, j * lanes, W), vload(ms, j * lanes, W)
                    a, b = vload(as_, j * lanes, W), vload(bs, j * lanes, W)
                    if n > scan.FAR:
                        ka, m, a, b = scan.rebase_exponent(ka, m, a, b, w, W)
                    if keep != 0 and (i > 0 or first == 1):
                        kept = keep + ((row + i) * C + c) * sb
                        a1, b1, o = scan.with_rounded_exponent(ka, m, a, b, w, W)
                        vstore(kept, 0, a1, W)
                        vstore(kept, rows * C, b1, W)
                        vstore(kept, 2 * rows * C, o, W)
                    shared_max, top, since, entry = False, zero, zero, zero
                    if not BOTH and scan.allows_shared_max(w, u, W):
                        high, low = vload(highs, j * lanes, W), vload(lows, j * lanes, W)
                        shared_max, top, since, entry = scan.enter_shared_max_tile(
                            vload(kt0, 0, V), high, low, TILE, ka, m, b, w, W
                        )
                        if end < n:  # compute the extreme keys of the next tile now, so that it does not wait
                            high, low = scan.extremes(kt0 + TILE * k_l * xb, k_l, min(n - end, TILE), V)
                            vstore(highs, j * lanes, high, W)
                            vstore(lows, j * lanes, low, W)
                    for t in range(TILE, TILE + end - start):  # the next tile's rows
                        prefetch(kt0 + (TILE + t) * k_l * xb, line, 0)  # one tile further, as its extremes are found above
                        prefetch(vt0 + t * v_l * xb, line, 0)
                        if GATE:
                            prefetch(rt0 + t * r_l * xb, line, 0)
                    if shared_max:
                        own_constants = constants + j * (TILE + 2) * lanes * sb
                        ka, m, a, b = top, since, a * entry, b * entry
                        bonus, decay = vload(own_constants, 0, W), vload(own_constants, lanes, W)
                        for t in range(end - start):
                            E = vexp(fma(m, w, vload(kt0, t * k_l, V) - ka), W) * vload(own_constants, (t + 2) * lanes, W)
                            Ev = E * vload(vt0, t * v_l, V)
                            write(ot0, t * out_l, fma(bonus, Ev, a), fma(bonus, E, b), rt0, t * r_l)
                            a, b = fma(decay, a, Ev), fma(decay, b, E)
                        last_key = vload(kt0, (end - start - 1) * k_l, V)
                        ka, m, a, b = scan.exit_shared_max_tile(last_key, end - start, TILE, ka, m, a, b, w, W)
                    else:
                        for t in range(end - start):
                            kt, vt = vload(kt0, t * k_l, V), vload(vt0, t * v_l, V)
                            if BOTH:
                                slot = t * lanes
                                ka1, m1, a1, b1, _, _ = scan.join(
                                    ka, m, a, b, vload(rk, slot, W), vload(rm, slot, W), vload(ra, slot, W),
                                    vload(rb, slot, W), w, W,
                                )  # fmt: skip
                            else:
                                ka1, m1, a1, b1 = ka, m, a, b
                            old, new = scan.pair_weights(fma(m1, w, kt - ka1) + u, W)
                            write(ot0, t * out_l, fma(new, vt, old * a1), fma(old, b1, new), rt0, t * r_l)
                            ka, m, a, b, _, _ = scan.include_token(ka, m, a, b, kt, vt, w, W)
                    vstore(kas, j * lanes, ka, W)
                    vstore(ms, j * lanes, m, W)
                    vstore(as_, j * lanes, a, W)
                    vstore(bs, j * lanes, b, W)
            if ybar1 != 0 and last == 1:
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    ka, m = vload(kas, j * lanes, W), vload(ms, j * lanes, W)
                    a, b = vload(as_, j * lanes, W), vload(bs, j * lanes, W)
                    o = fma(zero - m, vload(w_, c, W), ka) + vlog(b)
                    vstore(ybar1, sequence * C + c, where_equal(b, zero, zero, a / b), W)
                    vstore(lse1, sequence * C + c, where_equal(b, zero, vset(-np.inf, W), o), W)

    return Kernel(wkv_forward, f"wkv_forward_{TILE}_{X}_{lanes}{GATE:d}{BOTH:d}")


# Values that the backward pass recomputes per token, indexed by: (a, b) before the token (_A, _B); the weights that include it
# (_KEEP, _NEW: A, E); the weights of the token and of the state in the output (_SELF, _SEEN); the output (_Y). The names with R
# are the same values of the state from the right, and _RK, _RM are (ka, m) of this state.
_A, _B, _KEEP, _NEW, _SELF, _SEEN, _Y, _RA, _RB, _RKEEP, _RNEW, _RSEEN, _RK, _RM = range(14)


@inline
def _recompute_tile(n, kt0, k_l, vt0, v_l, left, right, rows, C, w, u, constants, h, lanes, V, W, BOTH, sb, TILE):
    """Recompute a tile of n tokens from its entry states and fill ``h``. Return (ka, m, a, b, rka, rm, factor, mean).

    The function subtracts ``mean`` from all values v; it is their weighted mean in the entry state. (ka, m, a, b) is the last
    state from the left, (rka, rm) is the exponent of the last state from the right. factor is the number by which a
    shared-maximum tile multiplies a and b at its entry.
    """
    zero, one, size = vset(0.0, W), vset(1.0, W), TILE * lanes
    rka, rm = zero, zero
    a, b, ka = vload(left, 0, W), vload(left, rows * C, W), vload(left, 2 * rows * C, W)
    mean = scan.finite(where_equal(b, zero, zero, a / b), W)
    if BOTH:
        ra, rb, rka = vload(right, 0, W), vload(right, rows * C, W), vload(right, 2 * rows * C, W)
        mean = where_equal(b, zero, scan.finite(where_equal(rb, zero, zero, ra / rb), W), mean)
        ra = fma(zero - mean, rb, ra)
        for i in range(n):
            t = n - 1 - i
            at = t * lanes
            vstore(h, _RA * size + at, ra, W)
            vstore(h, _RB * size + at, rb, W)
            vstore(h, _RK * size + at, rka, W)
            vstore(h, _RM * size + at, rm, W)
            rka, rm, ra, rb, A, E = scan.include_token(
                rka, rm, ra, rb, vload(kt0, t * k_l, V), vload(vt0, t * v_l, V) - mean, w, W
            )
            vstore(h, _RKEEP * size + at, A, W)
            vstore(h, _RNEW * size + at, E, W)
    a = fma(zero - mean, b, a)
    m, shared_max, top, entry = zero, False, zero, one
    if not BOTH and scan.allows_shared_max(w, u, W):
        high, low = scan.extremes(kt0, k_l, n, V)
        shared_max, top, _, entry = scan.enter_shared_max_tile(vload(kt0, 0, V), high, low, TILE, ka, zero, b, w, W)
    if shared_max:
        bonus, decay, m = (
            vload(constants, 0, W),
            vload(constants, lanes, W),
            scan.by_decay(w, TILE, vset(-float(n), W), zero, W),
        )
        ka, a, b = top, a * entry, b * entry
        for t in range(n):
            v, at = vload(vt0, t * v_l, V) - mean, t * lanes
            E = vexp(vload(kt0, t * k_l, V) - ka, W) * vload(constants, (t + 2) * lanes, W)
            new = bonus * E
            z = b + new
            z = where_equal(z, zero, zero, one / z)  # weight and gradient are 0 if the scan has seen nothing
            new = new * z
            vstore(h, _SEEN * size + at, z, W)
            vstore(h, _SELF * size + at, new, W)
            vstore(h, _Y * size + at, fma(new, v, z * a), W)
            vstore(h, _A * size + at, a, W)
            vstore(h, _B * size + at, b, W)
            vstore(h, _KEEP * size + at, decay, W)
            vstore(h, _NEW * size + at, E, W)
            a, b = fma(decay, a, E * v), fma(decay, b, E)
    else:
        entry = one
        for t in range(n):
            k, v, at = vload(kt0, t * k_l, V), vload(vt0, t * v_l, V) - mean, t * lanes
            if BOTH:
                ka1, m1, a1, b1, l_weight, r_weight = scan.join(
                    ka, m, a, b, vload(h, _RK * size + at, W), vload(h, _RM * size + at, W), vload(h, _RA * size + at, W),
                    vload(h, _RB * size + at, W), w, W,
                )  # fmt: skip
            else:
                ka1, m1, a1, b1 = ka, m, a, b
            old, new = scan.pair_weights(fma(m1, w, k - ka1) + u, W)
            z = fma(old, b1, new)
            z = where_equal(z, zero, zero, one / z)
            old, new = old * z, new * z
            if BOTH:
                vstore(h, _SEEN * size + at, old * l_weight, W)
                vstore(h, _RSEEN * size + at, old * r_weight, W)
            else:
                vstore(h, _SEEN * size + at, old, W)
            vstore(h, _SELF * size + at, new, W)
            vstore(h, _Y * size + at, fma(new, v, old * a1), W)
            vstore(h, _A * size + at, a, W)
            vstore(h, _B * size + at, b, W)
            ka, m, a, b, A, E = scan.include_token(ka, m, a, b, k, v, w, W)
            vstore(h, _KEEP * size + at, A, W)
            vstore(h, _NEW * size + at, E, W)
    return ka, m, a, b, rka, rm, entry, mean


@inline
def _upstream(g, index, r, r_index, V, W, GATE):
    """Return the gradient with respect to y, the output before the gate."""
    x = vload(g, index, V)
    if GATE:
        over, _ = scan.gate(vload(r, r_index, V), W)
        x = x / over
    return x


@functools.cache
def _backward_kernel(X, lanes, GATE, BOTH, SUMMARY, TILE):
    """Compute dk, dv, dr, d ybar, d lse and sums of dw and du. With SUMMARY, compute only the adjoint state of each segment.

    The adjoint (P, Q) is the gradient with respect to the state (a, b) at a fixed exponent. At the edge of a tile, this is the
    exponent o in the checkpoint. SUMMARY writes (P, Q) of each segment as (D, 2, S, C), with D directions and S segments.

    The adjoint of the state from the right enters a segment from the left. BOTH computes it in a loop of its own, which stores
    it per tile in ``right_keep`` (2, rows, C). The second loop goes from right to left, recomputes it from there, and computes
    all other gradients.

    dk and dw contain the differences P v + Q and P a + Q b. If values are far from 0, their rounding errors exceed these
    differences. So the kernel subtracts the mean at the entry of a tile from all values of the tile, and adds P times the mean
    to Q.
    """
    V, S = vec(X, lanes), state_code(X)
    W, xb, sb = vec(S, lanes), SIZES[X], SIZES[S]
    HISTORY = TILE * lanes * (14 if BOTH else 7)
    SUMS = (_BLOCK + 1) * lanes
    SIZE = TILE * lanes
    CONSTANTS = 1 if BOTH else (TILE + 2) * SUMS
    line = lanes * xb

    def wkv_backward(
        part, segments, count, C, blocks, inputs, parameters, state, keep, rows, upstream, adjoint, right_keep, gradients, sums
    ):  # fmt: skip
        (k, k_b, k_l), (v, v_b, v_l), (r, r_b, r_l) = inputs
        w_, u_ = parameters
        ybar, lse = state
        (g, g_b, g_l), (g_ybar, g_lse) = upstream
        (dk, dv, dr, d_b, d_l), (d_ybar, d_lse) = gradients
        dw, du = sums
        for task in share(count * blocks, part):
            segment = task // blocks
            at = segment * _FIELDS
            batch, t0 = load_int(segments, at + _BATCH), load_int(segments, at + _FIRST_TOKEN)
            n = load_int(segments, at + _TOKENS)
            row, sequence = load_int(segments, at + _TILE_ROW), load_int(segments, at + _SEQUENCE)
            first, last = load_int(segments, at + _IS_FIRST), load_int(segments, at + _IS_LAST)
            begin, vectors = scan.channels(C, lanes, task - segment * blocks, blocks)
            tiles = (n + TILE - 1) // TILE
            h, constants = tile(HISTORY, S), tile(CONSTANTS, S)
            Ps, Qs, means, dws, dus = tile(SUMS, S), tile(SUMS, S), tile(SUMS, S), tile(SUMS, S), tile(SUMS, S)
            k0, v0 = k + (batch * k_b + t0 * k_l) * xb, v + (batch * v_b + t0 * v_l) * xb
            r0, g0 = r + (batch * r_b + t0 * r_l) * xb, g + (batch * g_b + t0 * g_l) * xb
            d0 = (batch * d_b + t0 * d_l) * xb
            zero = vset(0.0, W)
            side = 3 * rows * C * sb
            if BOTH:  # the adjoint of the state from the right
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    w, u = vload(w_, c, W), vload(u_, c, W)
                    P, Q, past = zero, zero, zero
                    if not SUMMARY and adjoint != 0 and first == 0:
                        P = vload(adjoint, (2 * count + segment) * C + c, W)
                        Q = vload(adjoint, (3 * count + segment) * C + c, W)
                    for i in range(tiles):
                        start = i * TILE
                        size = min(TILE, n - start)
                        left = keep + ((row + i) * C + c) * sb
                        _, _, _, _, rka, rm, _, mean = _recompute_tile(
                            size, k0 + (start * k_l + c) * xb, k_l, v0 + (start * v_l + c) * xb, v_l, left, left + side, rows,
                            C, w, u, 0, h, lanes, V, W, BOTH, sb, TILE,
                        )  # fmt: skip
                        Q, past = fma(mean - past, P, Q), mean
                        if not SUMMARY:
                            vstore(right_keep, (row + i) * C + c, P, W)
                            vstore(right_keep, (rows + row + i) * C + c, Q, W)
                        if i > 0 or first == 0:
                            gap = scan.rounding_factor(rka, rm, vload(left + side, (2 * rows - 1) * C, W), w, W)
                            P, Q = P * gap, Q * gap
                        for t in range(size):
                            gt = _upstream(
                                g0, (start + t) * g_l + c, r0, (start + t) * r_l + c, V, W, GATE
                            )  # fmt: skip
                            A, gp = vload(h, _RKEEP * SIZE + t * lanes, W), gt * vload(h, _RSEEN * SIZE + t * lanes, W)
                            P, Q = fma(A, P, gp), A * Q - gp * vload(h, _Y * SIZE + t * lanes, W)
                    if SUMMARY:
                        vstore(adjoint, (2 * count + segment) * C + c, P, W)
                        vstore(adjoint, (3 * count + segment) * C + c, fma(zero - past, P, Q), W)
            for j in range(vectors):
                c = min((begin + j) * lanes, C - lanes)
                P, Q = zero, zero
                if not SUMMARY and adjoint != 0 and last == 0:
                    P, Q = vload(adjoint, segment * C + c, W), vload(adjoint, (count + segment) * C + c, W)
                vstore(Ps, j * lanes, P, W)
                vstore(Qs, j * lanes, Q, W)
                vstore(means, j * lanes, zero, W)
                vstore(dws, j * lanes, zero, W)
                vstore(dus, j * lanes, zero, W)
                w, u = vload(w_, c, W), vload(u_, c, W)
                if not BOTH and scan.allows_shared_max(w, u, W):
                    scan.store_tile_constants(constants + j * (TILE + 2) * lanes * sb, TILE, w, u, lanes, W)
            for i_ in range(tiles):
                i = tiles - 1 - i_
                start = i * TILE
                size = min(TILE, n - start)
                for j in range(vectors):
                    c = min((begin + j) * lanes, C - lanes)
                    w, u = vload(w_, c, W), vload(u_, c, W)
                    left = keep + ((row + i) * C + c) * sb
                    for t in range(start - TILE, start - TILE + size):  # the next tile's rows
                        prefetch(k0 + (t * k_l + c) * xb, line, 0)
                        prefetch(v0 + (t * v_l + c) * xb, line, 0)
                        if GATE:
                            prefetch(r0 + (t * r_l + c) * xb, line, 0)
                    for t in range(start, start + size):  # rows that are used after the tile is recomputed
                        prefetch(g0 + (t * g_l + c) * xb, line, 0)
                        if not SUMMARY:
                            prefetch(dk + d0 + (t * d_l + c) * xb, line, 1)
                            prefetch(dv + d0 + (t * d_l + c) * xb, line, 1)
                    ka, m, a, b, rka, rm, entry, mean = _recompute_tile(
                        size, k0 + (start * k_l + c) * xb, k_l, v0 + (start * v_l + c) * xb, v_l, left, left + side, rows, C,
                        w, u, constants + j * (TILE + 2) * lanes * sb, h, lanes, V, W, BOTH, sb, TILE,
                    )  # fmt: skip
                    sum_w, sum_u = zero, zero
                    if BOTH and not SUMMARY:  # overwrite (A, E) with the terms of dk and dv from the right state
                        P, Q = vload(right_keep, (row + i) * C + c, W), vload(right_keep, (rows + row + i) * C + c, W)
                        if i > 0 or first == 0:
                            gap = scan.rounding_factor(rka, rm, vload(left + side, (2 * rows - 1) * C, W), w, W)
                            P, Q = P * gap, Q * gap
                        for t in range(size):
                            slot = t * lanes
                            gt = _upstream(g0, (start + t) * g_l + c, r0, (start + t) * r_l + c, V, W, GATE)
                            A, E = vload(h, _RKEEP * SIZE + slot, W), vload(h, _RNEW * SIZE + slot, W)
                            vt = vload(v0, (start + t) * v_l + c, V) - mean
                            vstore(h, _RNEW * SIZE + slot, E * P, W)
                            vstore(h, _RKEEP * SIZE + slot, E * fma(P, vt, Q), W)
                            a1, b1 = vload(h, _RA * SIZE + slot, W), vload(h, _RB * SIZE + slot, W)
                            sum_w = fma(A, fma(P, a1, Q * b1), sum_w)
                            gp = gt * vload(h, _RSEEN * SIZE + slot, W)
                            P, Q = fma(A, P, gp), A * Q - gp * vload(h, _Y * SIZE + slot, W)
                    P, Q = vload(Ps, j * lanes, W), vload(Qs, j * lanes, W)
                    Q = fma(mean - vload(means, j * lanes, W), P, Q)
                    vstore(means, j * lanes, mean, W)
                    if i < tiles - 1 or last == 0:
                        gap = scan.rounding_factor(ka, m, vload(left, (2 * rows + 1) * C, W), w, W)
                        P, Q = P * gap, Q * gap
                    elif g_ybar != 0:
                        gy, gl = vload(g_ybar, sequence * C + c, W), vload(g_lse, sequence * C + c, W)
                        z = where_equal(b, zero, zero, vset(1.0, W) / b)
                        P = gy * z
                        Q = (gl - gy * (a * z)) * z
                    for t_ in range(size):
                        t = size - 1 - t_
                        slot, token = t * lanes, start + t
                        gt = vload(g0, token * g_l + c, V)
                        y = vload(h, _Y * SIZE + slot, W)
                        if GATE:
                            over, e = scan.gate(vload(r0, token * r_l + c, V), W)
                            over = vset(1.0, W) / over
                            if not SUMMARY:
                                vstore(dr + d0, token * d_l + c, gt * (y + mean) * (e * over) * over, V)
                            gt = gt * over
                        A = vload(h, _KEEP * SIZE + slot, W)
                        if not SUMMARY:
                            E, vt = vload(h, _NEW * SIZE + slot, W), vload(v0, token * v_l + c, V) - mean
                            gs = gt * vload(h, _SELF * SIZE + slot, W)
                            own = gs * (vt - y)
                            dvt, dkt = fma(E, P, gs), fma(E, fma(P, vt, Q), own)
                            if BOTH:
                                dvt = dvt + vload(h, _RNEW * SIZE + slot, W)
                                dkt = dkt + vload(h, _RKEEP * SIZE + slot, W)
                            vstore(dv + d0, token * d_l + c, dvt, V)
                            vstore(dk + d0, token * d_l + c, dkt, V)
                            a1, b1 = vload(h, _A * SIZE + slot, W), vload(h, _B * SIZE + slot, W)
                            sum_w = fma(A, fma(P, a1, Q * b1), sum_w)
                            sum_u = sum_u + own
                        gp = gt * vload(h, _SEEN * SIZE + slot, W)
                        P, Q = fma(A, P, gp), A * Q - gp * y
                    vstore(Ps, j * lanes, P * entry, W)
                    vstore(Qs, j * lanes, Q * entry, W)
                    if not SUMMARY:
                        vstore(dws, j * lanes, vload(dws, j * lanes, W) + sum_w, W)
                        vstore(dus, j * lanes, vload(dus, j * lanes, W) + sum_u, W)
            for j in range(vectors):
                c = min((begin + j) * lanes, C - lanes)
                P, Q, mean = vload(Ps, j * lanes, W), vload(Qs, j * lanes, W), vload(means, j * lanes, W)
                if SUMMARY:
                    vstore(adjoint, segment * C + c, P, W)
                    vstore(adjoint, (count + segment) * C + c, fma(zero - mean, P, Q), W)
                else:
                    vstore(dw, segment * C + c, vload(dws, j * lanes, W), W)
                    vstore(du, segment * C + c, vload(dus, j * lanes, W), W)
                    if d_ybar != 0 and first == 1:
                        spot = sequence * C + c
                        Q = fma(P, vload(ybar, spot, W) - mean, Q)
                        if n == 0:  # without tokens, the final state is the initial state
                            P = vload(g_ybar, spot, W) if g_ybar != 0 else zero
                            Q = vload(g_lse, spot, W) if g_ybar != 0 else zero
                        o, empty = vload(lse, spot, W), vset(-np.inf, W)
                        vstore(d_ybar, spot, where_equal(o, empty, zero, P), W)
                        vstore(d_lse, spot, where_equal(o, empty, zero, Q), W)

    return Kernel(wkv_backward, f"wkv_backward_{TILE}_{X}_{lanes}{GATE:d}{BOTH:d}{SUMMARY:d}")


@functools.cache
def _adjoint_kernel(S, lanes, BOTH, TILE):
    """Scan the adjoint states of the segments and write the adjoint that enters each segment.

    Segments at the end of a sequence get none (the right side: segments at its beginning).
    """
    W, sb = vec(S, lanes), SIZES[S]

    def wkv_adjoint(part, segments, count, C, w_, keep, rows, own, entering):
        vectors = (C + lanes - 1) // lanes
        for task in share(vectors * (2 if BOTH else 1), part):
            side = task // vectors
            c = min((task - side * vectors) * lanes, C - lanes)
            w, zero = vload(w_, c, W), vset(0.0, W)
            P, Q = zero, zero
            for i in range(count):
                segment = count - 1 - i if side == 0 else i
                at = segment * _FIELDS
                n, row = load_int(segments, at + _TOKENS), load_int(segments, at + _TILE_ROW)
                tiles = (n + TILE - 1) // TILE
                spot = (side * 2 * count + segment) * C + c
                if load_int(segments, at + _IS_LAST if side == 0 else at + _IS_FIRST) == 1:
                    P, Q = vload(own, spot, W), vload(own, spot + count * C, W)
                    continue
                vstore(entering, spot, P, W)
                vstore(entering, spot + count * C, Q, W)
                exponents = keep + (side * 3 + 2) * rows * C * sb
                before = vload(exponents, (row if side == 0 else row + tiles - 1) * C + c, W)
                after = vload(exponents, (row + tiles if side == 0 else row - 1) * C + c, W)
                d = scan.exponent_error(before, vset(-float(n), W), after, w, W)
                decay = vexp(where_less(zero, d, zero, d), W)
                decay = fma(decay, where_less(zero, d, d, zero), decay)  # d > 0 is a rounding error: e^d = 1 + d
                P = fma(decay, P, vload(own, spot, W))
                Q = fma(decay, Q, vload(own, spot + count * C, W))

    return Kernel(wkv_adjoint, f"wkv_adjoint_{TILE}_{S}_{lanes}{BOTH:d}")


# --- launchers --------------------------------------------------------------------------------------------------------------


def _segments_of(batch, begin, tokens, row, sequence, step, tile_tokens):
    """Yield the segments of one sequence. An empty sequence has one segment without tokens, which passes its state on."""
    last = max(0, -(-tokens // step) - 1)
    for i in range(last + 1):
        size = min(step, tokens - i * step)
        yield batch, begin + i * step, size, row + i * step // tile_tokens, sequence, i == 0, i == last


@functools.lru_cache(maxsize=256)
def _dense_segments(B, L, step, tile_tokens):
    tiles = -(-L // tile_tokens)
    return _table(s for b in range(B) for s in _segments_of(b, 0, L, b * tiles, b, step, tile_tokens))


def _table(segments):
    """Return (address, number of segments, array). The caller must keep the array until the kernel returns."""
    table = np.array(list(segments), dtype=np.int64)
    return table.ctypes.data, len(table), table


def _segments(k, cu_seqlens, chunked, tuning):
    (B, L, _), tokens = k.shape, tuning.wkv_checkpoint_tokens
    step = tuning.wkv_segment_tiles * tokens if chunked else max(L, 1)
    if cu_seqlens is None:
        return _dense_segments(B, L, step, tokens)
    ends = cu_seqlens.tolist()
    pieces = enumerate(zip(ends, ends[1:]))
    return _table(s for i, (a, b) in pieces for s in _segments_of(0, a, b - a, a // tokens + i, i, step, tokens))


def _chunked(algorithm, k):
    """Return True to cut sequences into chunks. "auto": serial is parallel over channels and wins unless they are few."""
    B, L, C = k.shape
    return algorithm == "chunked" or (algorithm == "auto" and B * C <= 32 and L >= 4096)


def _count_blocks(count, C, lanes):
    """Return the number of channel blocks per segment. Wide blocks read whole cache lines, but every thread needs several."""
    whole = C // lanes
    width = max(2, min(_BLOCK, count * whole // (4 * torch.get_num_threads())))
    return max(1, -(-whole // width))


def wkv_forward(
    k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, cu_seqlens, max_seqlen, bidirectional, algorithm, out, ybar_out,
    lse_out, checkpoint, tuning,
):  # fmt: skip
    """Fill out, and ybar_out, lse_out and checkpoint if they are given. k is not empty. ybar_out may be ybar, lse_out lse."""
    w, u = scan.parameters(decay, bonus, decay_is_log_of_rate, k)
    C, dtype, tokens = k.shape[2], w.dtype, tuning.wkv_checkpoint_tokens
    X, lanes = CODES[k.dtype], LANES if k.shape[2] >= LANES else 1
    table, count, _alive = _segments(k, cu_seqlens, _chunked(algorithm, k), tuning)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunked = count > (sequences or k.shape[0])
    rows = wkv_rows(*k.shape[:2], sequences, tokens)
    if checkpoint is None and (chunked or bidirectional):
        checkpoint = torch.empty((2 if bidirectional else 1, 3, rows, C), dtype=dtype, device=w.device)
    (k, k_), (v, v_), (r, r_), (_, out_) = map(placed_rows, (k, v, r, out))
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    state = address(ybar), address(lse)
    blocks = _count_blocks(count, C, lanes)
    work = out.numel()
    if chunked:
        summary = torch.empty((2 if bidirectional else 1, 4, count, C), dtype=dtype, device=w.device)
        _summary_kernel(X, lanes, bidirectional)(
            work, table, count, C, blocks, (k_, v_), w.data_ptr(), state, summary.data_ptr()
        )  # fmt: skip
        _scan_kernel(state_code(X), lanes, bidirectional, tokens)(
            0, table, count, C, w.data_ptr(), summary.data_ptr(), checkpoint.data_ptr(), rows
        )  # fmt: skip
    _forward_kernel(X, lanes, r is not None, bidirectional, tokens)(
        work, table, count, C, blocks, (k_, v_, r_), (w.data_ptr(), u.data_ptr()), state, out_,
        (address(ybar_out), address(lse_out)), address(checkpoint), rows,
    )  # fmt: skip


def wkv_backward(
    g, g_ybar, g_lse, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, checkpoint, cu_seqlens, max_seqlen,
    bidirectional, algorithm, dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse, tuning,
):  # fmt: skip
    """Fill dk and dv, and, if they are given, dr, d_decay with d_bonus, and d_ybar with d_lse. k is not empty."""
    w, u = scan.parameters(decay, bonus, decay_is_log_of_rate, k)
    C, dtype, tokens = k.shape[2], w.dtype, tuning.wkv_checkpoint_tokens
    X, lanes = CODES[k.dtype], LANES if k.shape[2] >= LANES else 1
    table, count, _alive = _segments(k, cu_seqlens, _chunked(algorithm, k), tuning)
    sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunked = count > (sequences or k.shape[0])
    rows, sides = checkpoint.shape[2], 2 if bidirectional else 1
    g = k.new_zeros((1, 1, 1)).expand(k.shape) if g is None else g.to(k.dtype)
    (k, k_), (v, v_), (r, r_), (g, g_), (_, (_, *d_)) = map(placed_rows, (k, v, r, g, dk))
    if g_ybar is not None or g_lse is not None:
        present = g_lse if g_ybar is None else g_ybar
        g_ybar, g_lse = (present.new_zeros(present.shape) if s is None else s.contiguous() for s in (g_ybar, g_lse))
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    blocks = _count_blocks(count, C, lanes)
    work = 4 * dk.numel()
    dw, du = torch.empty((2, count, C), dtype=dtype, device=w.device)
    right_keep = torch.empty((2, rows, C), dtype=dtype, device=w.device) if bidirectional else None
    gradients = (dk.data_ptr(), dv.data_ptr(), address(dr), *d_), (address(d_ybar), address(d_lse))

    def launch(summary, adjoint):
        _backward_kernel(X, lanes, r is not None, bidirectional, summary, tokens)(
            work, table, count, C, blocks, (k_, v_, r_), (w.data_ptr(), u.data_ptr()), (address(ybar), address(lse)),
            checkpoint.data_ptr(), rows, (g_, (address(g_ybar), address(g_lse))), address(adjoint), address(right_keep),
            gradients, (dw.data_ptr(), du.data_ptr()),
        )  # fmt: skip

    adjoint = None
    if chunked:
        own, adjoint = torch.empty((2, sides, 2, count, C), dtype=dtype, device=w.device)
        launch(True, own)
        _adjoint_kernel(state_code(X), lanes, bidirectional, tokens)(
            0, table, count, C, w.data_ptr(), checkpoint.data_ptr(), rows, own.data_ptr(), adjoint.data_ptr()
        )  # fmt: skip
    launch(False, adjoint)
    if d_decay is not None:
        scan.parameter_sums(dw, du, w, decay_is_log_of_rate, d_decay, d_bonus)
