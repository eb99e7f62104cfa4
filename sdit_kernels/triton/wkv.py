"""The WKV scan in Triton. A thread holds one channel and walks tiles of TILE tokens, whose loads all precede their first use.

One channel a thread, so that a warp reads 128 bytes of float32 side by side: with two, the walk back needs twice its 140
registers and the chip fills half as well; addresses and loads, which two would share, are a fifth of the instructions.

Three kernels. ``wkv_forward_kernel`` and ``wkv_backward_kernel`` walk a chunk of tiles, with or without outputs;
``wkv_combine_kernel`` scans what they say of whole chunks. "serial" is one walk with one chunk as long as the sequence, which
reads and writes everything once. "chunked" cuts the sequence so that the chip fills: walk from nothing and leave a summary,
scan the summaries (which makes each the state at its chunk's entry), walk again from there. The walk back needs nothing new:
its carry is linear in what enters, so a summary is a factor and what is added. A scan over tokens inside a program
(tl.associative_scan) would read k and v once instead of twice, but exchanges two or three values per token between lanes, and
cannot cut a sequence into more programs than B*C / BC; the second read often hits L2.

Bidirectional: the states that enter every tile, from the left and from the right, are made first, by two walks; then each tile
combines them with its own tokens. The walk back likewise.

The walk back keeps nine values per token in registers: compile_report.py finds 248 registers for 16 tokens, and spills with a
gate, but 95 to 170 for 8. So it holds 8, and the second half of a tile of 16 rebuilds its state over the first.

Range: a token far above the state weighs up to 2^60, so that float32 values must stay below 2^67; and a gate of r < -47 on such
a token may give 0.

Exponents: o[t] = ka + n w, where ka is the key that holds the maximum and n counts the tokens since. An
exponential is taken of one rounded difference, (k - ka) - n w by fused multiply-add, so that no error grows with the length.
Exponentials are base 2 and reciprocals the square of rsqrt, because both are one instruction on every GPU, where exp
and / are several (/ is ten on AMD); rsqrt.approx twice is within 2^-21.9, div.full within 2 ulp.

A state that has seen no key is a = b = 0 with the exponent _NONE, so that no difference of infinities arises. A token behind
the end of its sequence is one with k = -inf, v = g = 0. Parameter gradients are summed per program and then over programs,
never by atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import layout
from ..dtypes import state_dtype
from .tiles import STATES, cdiv, launch, warps_of

_AHEAD: tl.constexpr = tl.constexpr(8)  # summaries loaded before the first is used
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_NONE: tl.constexpr = tl.constexpr(-1e38)  # the exponent of an empty state; times log2(e) it is a number yet
_STEEPEST: tl.constexpr = tl.constexpr(-1e20)  # as in reference/wkv.py
_HIGHEST: tl.constexpr = tl.constexpr(60.0)  # beside a token of weight 2^60 float32 sees no state of 2^31; |v| < 2^67 then
_TINY: tl.constexpr = tl.constexpr(1e-9)  # a denominator is at least 1, or 0 where nothing was seen: then y = 0 / _TINY


# --- the arithmetic of a token -----------------------------------------------------------------------------------------------


@triton.jit
def reciprocal(x):
    if x.dtype == tl.float32:
        root = tl.rsqrt(x)
        return root * root
    else:
        return 1.0 / x


@triton.jit
def _gap(k, state, w):
    """k - o."""
    _, _, ka, n = state
    return tl.fma(n, -w, k - ka)


@triton.jit
def pair_weights(d):
    """(A, E): weights of an old and a new term whose exponent is greater by d; the greater of them is 1."""
    e = tl.exp2(tl.abs(d) * -LOG2E)
    return tl.where(d > 0.0, e, 1.0), tl.where(d > 0.0, 1.0, e)


@triton.jit
def _advance(k, v, state, w):
    """(state after the token, A, E): a <- A a + E v, b <- A b + E. One of A and E is 1."""
    a, b, ka, n = state
    d = _gap(k, state, w) - w  # k - (o + w)
    new = d > 0.0
    A, E = pair_weights(d)
    return (A * a + E * v, A * b + E, tl.where(new, k, ka), tl.where(new, 0.0, n + 1.0)), A, E


@triton.jit
def own_weight(gap, u2):
    """e^(u + k - o), the token's weight in its output, and no more than where the state's is none; u2 = u log2(e)."""
    x = tl.fma(gap, tl.full(gap.shape, LOG2E, gap.dtype), u2)
    highest: tl.constexpr = _HIGHEST if x.dtype == tl.float32 else 2 * _HIGHEST
    return tl.exp2(tl.minimum(x, highest, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _weights_of_three(k, left, right, w, u2):
    """The same of two states and the token. Differences come before products: a product of 1e20 that the compiler fuses into a
    difference with its own rounded value leaves what rounding took, and that is no small number."""
    a, b, ka, n = left
    a_, b_, ka_, n_ = right
    masked = k == -float("inf")
    origin = tl.where(masked, 0.0, k)
    x = tl.fma(-n, w, origin - ka)  # how far below the token's key
    x_ = tl.fma(-n_, w, origin - ka_)
    own = tl.where(masked, -_NONE, u2 * -_LN2)
    m = tl.minimum(tl.minimum(x, x_), tl.minimum(own, 1e30))  # where nothing was seen, far above all three
    return tl.exp2((m - x) * LOG2E), tl.exp2((m - x_) * LOG2E), tl.exp2((m - own) * LOG2E)


@triton.jit
def at_least_tiny(x):
    return tl.where(x < _TINY, _TINY, x)  # a NaN stays; a maximum that keeps it takes one more instruction on AMD


@triton.jit
def _mean(k, v, state, right, w, u2, BOTH: tl.constexpr):
    """(numerator, denominator, weight of the state, of that from the right, of the token) of y."""
    if BOTH:
        e, e_, own = _weights_of_three(k, state, right, w, u2)
        return e * state[0] + e_ * right[0] + own * v, at_least_tiny(e * state[1] + e_ * right[1] + own), e, e_, own
    else:
        own = own_weight(_gap(k, state, w), u2)
        one = tl.full(own.shape, 1.0, own.dtype)
        return state[0] + own * v, at_least_tiny(state[1] + own), one, one, own


# --- places ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _program(C, chunks, BC: tl.constexpr, AGAIN: tl.constexpr = False):
    """(sequence, chunk, channels, mask) of this program; programs beside each other have channels beside each other.

    AGAIN: the same once more, from what no compiler knows to be the same (the grid has one axis; a place on the second is 0),
    so that what is needed behind a loop alone is found there, and not held, or spilt, all through it.
    """
    nought = tl.program_id(1) if AGAIN else 0
    blocks = tl.cdiv(C + nought, BC)
    pid = tl.program_id(0) + nought
    cols = (pid % blocks) * BC + tl.arange(0, BC)
    pid = pid // blocks
    return (pid // chunks).to(tl.int64), pid % chunks, cols, cols < C


@triton.jit
def _sequence(cu_ptr, n, L):
    """(first token, number of tokens) of sequence n."""
    if cu_ptr is None:
        return tl.full([], 0, tl.int64), L.to(tl.int64)
    else:
        first = tl.load(cu_ptr + n).to(tl.int64)
        return first, tl.load(cu_ptr + n + 1).to(tl.int64) - first


@triton.jit
def _row(cu_ptr, n, first, L, tokens):
    """Row of the first piece of ``tokens`` tokens of sequence n; see layout.wkv_rows."""
    return n * tl.cdiv(L, tokens) if cu_ptr is None else first // tokens + n


@triton.jit
def _at(ptr, t, stride, cols):
    return ptr + t * stride + cols


@triton.jit
def _tokens(ptr, t, stride, cols, mask, left, other, WHOLE: tl.constexpr, N: tl.constexpr):
    """N tokens from t on; what ``left`` or more are behind t are not there, unless all are: WHOLE."""
    found = ()
    if N > 0:
        p = _at(ptr, t, stride, cols)
        for j in tl.static_range(N):
            found = found + (tl.load(p, mask=mask) if WHOLE else tl.load(p, mask=mask & (j < left), other=other),)
            p += stride
    return found


@triton.jit
def _walk(k_ptr, v_ptr, t, k_l, v_l, cols, mask, left, state, w, LEFTWARDS: tl.constexpr, N: tl.constexpr):
    """The state after N tokens from t on."""
    ks = _tokens(k_ptr, t, k_l, cols, mask, left, -float("inf"), False, N)
    vs = _tokens(v_ptr, t, v_l, cols, mask, left, 0.0, False, N)
    for j in tl.static_range(N - 1 if LEFTWARDS else 0, -1 if LEFTWARDS else N, -1 if LEFTWARDS else 1):
        state, A, E = _advance(ks[j].to(w.dtype), vs[j].to(w.dtype), state, w)
    return state


@triton.jit
def _load_three(ptr, at, plane, mask):
    x = tl.load(ptr + at, mask=mask, other=0.0)
    y = tl.load(ptr + plane + at, mask=mask, other=0.0)
    return x, y, tl.load(ptr + 2 * plane + at, mask=mask, other=0.0)


@triton.jit
def store_three(ptr, at, plane, mask, x, y, z):
    tl.store(ptr + at, x, mask=mask)
    tl.store(ptr + plane + at, y, mask=mask)
    tl.store(ptr + 2 * plane + at, z, mask=mask)


@triton.jit
def load_state(ptr, at, plane, mask):
    a, b, o = _load_three(ptr, at, plane, mask)
    return a, b, o, tl.zeros_like(a)


@triton.jit
def _near_one(x):
    """exp(x) of a rounding error; it is no small number only where o is so great that a state means nothing."""
    return tl.exp2(tl.minimum(tl.maximum(x, -1.0), 1.0) * LOG2E)


@triton.jit
def _lost(o, state, w):
    """e^(what o, which is ka + n w rounded, lost), up to 2e-6 from 1 at o = 50."""
    _, _, ka, n = state
    back = o - ka
    return _near_one((ka - (o - back)) + tl.fma(n, w, -back))


@triton.jit
def rounded_exponent(state, w):
    """o, which is ka + n w rounded, and e^(what that lost)."""
    _, _, ka, n = state
    o = tl.fma(n, w, ka)
    return o, _lost(o, state, w)


@triton.jit
def rounded_state(state, w):
    """(a, b, o). What o loses in rounding goes to a and b."""
    o, rest = rounded_exponent(state, w)
    return state[0] * rest, state[1] * rest, o


@triton.jit
def _store_state(ptr, at, plane, mask, state, w):
    a, b, o = rounded_state(state, w)
    store_three(ptr, at, plane, mask, a, b, o)


@triton.jit
def load_user_state(ybar_ptr, lse_ptr, at, mask, like):
    """The state that the user gave, or an empty one."""
    zero = tl.zeros_like(like)
    if ybar_ptr is None:
        return zero, zero, zero + _NONE, zero
    else:
        lse = tl.load(lse_ptr + at, mask=mask, other=0.0)
        ybar = tl.load(ybar_ptr + at, mask=mask, other=0.0)
        empty = lse == -float("inf")
        return tl.where(empty, 0.0, ybar), tl.where(empty, zero, zero + 1.0), tl.where(empty, _NONE, lse), zero


@triton.jit
def _exp(x):
    """e^x, and no more than e^60, which is past what a decay may be; no infinity, whose rounding error is none."""
    x = tl.minimum(x, 60.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    if x.dtype == tl.float32:  # as 2^y, with what y = x log2(e) loses in rounding
        y = x * LOG2E
        lost = tl.fma(x, tl.full(x.shape, LOG2E, x.dtype), -y) + x * 1.925963033500212e-8
        power = tl.exp2(y)
        return tl.fma(power, lost * _LN2, power)
    else:
        return tl.exp(x)


@triton.jit
def _decay(w_ptr, cols, mask, RAW: tl.constexpr, STATE: tl.constexpr):
    """w = -exp(time_decay), or as given, not so low that n w could overflow."""
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(STATE)
    if RAW:
        w = -_exp(w)
    return tl.maximum(w, _STEEPEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_parameters(w_ptr, u_ptr, cols, mask, RAW: tl.constexpr, STATE: tl.constexpr):
    """w and u log2(e), u greater than an empty state's exponent or -inf."""
    u = tl.load(u_ptr + cols, mask=mask, other=0.0).to(STATE)
    u = tl.where((u < 0.1 * _NONE) & (u > -float("inf")), 0.1 * _NONE, u)
    return _decay(w_ptr, cols, mask, RAW, STATE), u * LOG2E


class Flags(NamedTuple):
    """What a kernel of wkv is compiled for."""

    BC: int  # channels of a program
    TILE: int  # tokens
    RAW: bool  # w is -exp(time_decay)
    LEFTWARDS: bool = False  # walk from the last token to the first
    RIGHTWARDS: bool = False  # the same of the backward pass, which walks leftwards otherwise
    HELD: int = 0  # tokens that the backward pass holds in registers
    CARRY: bool = False  # combine carries of the backward pass, not states


# --- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tile(
    k_ptr, v_ptr, r_ptr, start_ptr, right_ptr, out_ptr, keep_ptr, k_l, v_l, r_l, out_l, C, plane, row, tile, length, cols, mask,
    state, w, u2, WHOLE: tl.constexpr, LEFTWARDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The state after a tile. WHOLE: the sequence does not end in it, so that its tokens need no masks."""
    BOTH: tl.constexpr = right_ptr is not None
    HALF: tl.constexpr = TILE // 2
    t0 = tile * TILE
    left = tl.minimum(length - t0, TILE).to(tl.int32)
    at = (row + tile) * C + cols
    ks = _tokens(k_ptr, t0, k_l, cols, mask, left, -float("inf"), WHOLE, TILE)
    vs = _tokens(v_ptr, t0, v_l, cols, mask, left, 0.0, WHOLE, TILE)
    rs = _tokens(r_ptr, t0, r_l, cols, mask, left, 0.0, WHOLE, 0 if r_ptr is None else HALF)  # the others later: registers
    if keep_ptr is not None:
        _store_state(keep_ptr, at, plane, mask, state, w)
    rights = ()  # the states to the right of the tile's tokens, last token first
    if BOTH:
        state = load_state(start_ptr, at, plane, mask)
        right = load_state(right_ptr, at, plane, mask)
        for j in tl.static_range(TILE - 1, -1, -1):
            rights = rights + (right,)
            right, _, _ = _advance(ks[j].to(w.dtype), vs[j].to(w.dtype), right, w)
    if out_ptr is not None:
        out_at = _at(out_ptr, t0, out_l, cols)
    for j in tl.static_range(TILE - 1 if LEFTWARDS else 0, -1 if LEFTWARDS else TILE, -1 if LEFTWARDS else 1):
        k, v = ks[j].to(w.dtype), vs[j].to(w.dtype)
        if r_ptr is not None and j == HALF:
            rs = rs + _tokens(r_ptr, t0 + HALF, r_l, cols, mask, left - HALF, 0.0, WHOLE, HALF)
        if out_ptr is not None:
            num, den, _, _, _ = _mean(k, v, state, rights[TILE - 1 - j] if BOTH else state, w, u2, BOTH)
            if r_ptr is not None:
                den *= 1.0 + tl.exp2(rs[j].to(w.dtype) * -LOG2E)
            y = (num * reciprocal(den)).to(out_ptr.dtype.element_ty)
            tl.store(out_at, y, mask=mask if WHOLE else mask & (j < left))
            out_at += out_l
        state, _, _ = _advance(k, v, state, w)
    return state


@triton.jit(do_not_specialize=["L", "tiles_per_chunk", "chunks", "plane", "start_plane"])
def wkv_forward_kernel(
    inputs, parameters, sequences, entering, outputs, L, C, tiles_per_chunk, chunks, plane, start_plane,
    F: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Walk the tiles of a chunk; what is None is neither read nor written.

    start: the state that enters each chunk, else the user's; with ``right``, start and right are those of every tile. out: y.
    keep: the state that enters each tile. exit: the state after the chunk.
    """
    k_ptr, k_b, k_l = inputs[0]
    v_ptr, v_b, v_l = inputs[1]
    r_ptr, r_b, r_l = inputs[2]
    w_ptr, u_ptr = parameters
    cu_ptr, ybar_ptr, lse_ptr = sequences
    start_ptr, right_ptr = entering
    out_ptr, out_b, out_l = outputs[0]
    ybar_out_ptr, lse_out_ptr, keep_ptr, exit_ptr = outputs[1]
    LEFTWARDS: tl.constexpr = F.LEFTWARDS
    TILE: tl.constexpr = F.TILE
    BOTH: tl.constexpr = right_ptr is not None
    sequence, chunk, cols, mask = _program(C, chunks, F.BC)
    first, length = _sequence(cu_ptr, sequence, L)
    tiles = tl.cdiv(length, TILE)
    begin = chunk.to(tl.int64) * tiles_per_chunk
    end = tl.minimum(begin + tiles_per_chunk, tiles)
    row = _row(cu_ptr, sequence, first, L, TILE)
    chunk_row = _row(cu_ptr, sequence, first, L, TILE * tl.cast(tiles_per_chunk, tl.int64)) + chunk
    w, u2 = load_parameters(w_ptr, u_ptr, cols, mask, F.RAW, STATE)
    if start_ptr is None or BOTH:
        state = load_user_state(ybar_ptr, lse_ptr, sequence * C + cols, mask, w)
    else:
        state = load_state(start_ptr, chunk_row * C + cols, start_plane, mask & (begin < tiles))
        if not LEFTWARDS:  # so that a sequence of no token, which has no chunk, hands its state on
            user = load_user_state(ybar_ptr, lse_ptr, sequence * C + cols, mask & (chunk == 0), w)
            a = tl.where(chunk == 0, user[0], state[0])
            b = tl.where(chunk == 0, user[1], state[1])
            state = a, b, tl.where(chunk == 0, user[2], state[2]), state[3]
    k_ptr += sequence * k_b + first * k_l
    v_ptr += sequence * v_b + first * v_l
    if r_ptr is not None:
        r_ptr += sequence * r_b + first * r_l
    if out_ptr is not None:
        out_ptr += sequence * out_b + first * out_l
    whole = tl.maximum(begin, tl.minimum(end, length // TILE))  # behind it, one tile that the sequence does not fill
    if LEFTWARDS:
        for tile in range(whole, end):
            state = _forward_tile(
                k_ptr, v_ptr, r_ptr, start_ptr, right_ptr, out_ptr, keep_ptr, k_l, v_l, r_l, out_l, C, plane, row, tile,
                length, cols, mask, state, w, u2, False, LEFTWARDS, TILE,
            )  # fmt: skip
    for i in range(begin, whole):
        state = _forward_tile(
            k_ptr, v_ptr, r_ptr, start_ptr, right_ptr, out_ptr, keep_ptr, k_l, v_l, r_l, out_l, C, plane, row,
            begin + whole - 1 - i if LEFTWARDS else i, length, cols, mask, state, w, u2, True, LEFTWARDS, TILE,
        )  # fmt: skip
    if not LEFTWARDS:
        for tile in range(whole, end):
            state = _forward_tile(
                k_ptr, v_ptr, r_ptr, start_ptr, right_ptr, out_ptr, keep_ptr, k_l, v_l, r_l, out_l, C, plane, row, tile,
                length, cols, mask, state, w, u2, False, LEFTWARDS, TILE,
            )  # fmt: skip
    if exit_ptr is not None:
        _store_state(exit_ptr, chunk_row * C + cols, start_plane, mask & (begin < tiles), state, w)
    if ybar_out_ptr is not None:
        last = mask & (end == tiles) & ((begin < tiles) | (chunk == 0))
        a, b, ka, n = state
        seen = b != 0.0
        b = tl.where(seen, b, 1.0)
        o = tl.fma(n - (tiles * TILE - length).to(w.dtype), w, ka)
        at = sequence * C + cols
        tl.store(ybar_out_ptr + at, tl.where(seen, a / b, a), mask=last)
        tl.store(lse_out_ptr + at, tl.where(seen, o + tl.log(b), -float("inf")), mask=last)


@triton.jit(do_not_specialize=["L", "tiles_per_chunk", "plane"])
def wkv_combine_kernel(rows_ptr, w_ptr, sequences, L, C, tiles_per_chunk, plane, F: tl.constexpr, STATE: tl.constexpr):
    """Turn the summary of each chunk into what enters it, in place: a state, or the walk back's carry (P, Q, factor)."""
    cu_ptr, ybar_ptr, lse_ptr = sequences
    CARRY: tl.constexpr = F.CARRY
    LEFTWARDS: tl.constexpr = F.LEFTWARDS
    sequence, chunk, cols, mask = _program(C, 1, F.BC)
    first, length = _sequence(cu_ptr, sequence, L)
    span = F.TILE * tl.cast(tiles_per_chunk, tl.int64)
    chunks = tl.cdiv(length, span)
    row = _row(cu_ptr, sequence, first, L, span)
    w = _decay(w_ptr, cols, mask, F.RAW, STATE)
    steps = span.to(w.dtype)
    zero = tl.zeros_like(w)
    state = (zero, zero, zero, zero) if CARRY else load_user_state(ybar_ptr, lse_ptr, sequence * C + cols, mask, w)
    for i in range(0, tl.cdiv(chunks, _AHEAD)):
        found = ()
        for j in tl.static_range(_AHEAD):
            c = i * _AHEAD + j
            at = (row + (chunks - 1 - c if LEFTWARDS else c)) * C + cols
            found = found + (_load_three(rows_ptr, at, plane, mask & (c < chunks)),)
        for j in tl.static_range(_AHEAD):
            c = i * _AHEAD + j
            at = (row + (chunks - 1 - c if LEFTWARDS else c)) * C + cols
            m = mask & (c < chunks)
            a, b, o = found[j]
            if CARRY:
                tl.store(rows_ptr + at, state[0], mask=m)
                tl.store(rows_ptr + plane + at, state[1], mask=m)
                state = o * state[0] + a, o * state[1] + b, zero, zero
            else:
                _store_state(rows_ptr, at, plane, m, state, w)
                a_, b_, ka, n = state
                n += steps
                d = tl.fma(-n, w, o - ka)
                A, E = pair_weights(d)
                state = A * a_ + E * a, A * b_ + E * b, tl.where(d > 0.0, o, ka), tl.where(d > 0.0, 0.0, n)


@triton.jit
def _rescaled(P, Q, F, state, o, w, border):
    """A carry P e^o, from the exponent o of the checkpoint behind a tile to that at which the tile, walked again, arrives."""
    factor = tl.where(state[1] != 0.0, _lost(o, state, w), 0.0)
    factor = tl.where(border, factor, 1.0)
    return P * factor, Q * factor, F * factor


@triton.jit(do_not_specialize=["L", "tiles_per_chunk", "chunks", "plane", "start_plane", "keep_plane"])
def wkv_backward_kernel(
    upstream, inputs, parameters, sequences, entering, carries, gradients,
    L, C, tiles_per_chunk, chunks, plane, start_plane, keep_plane, F: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Walk a chunk by parts of HELD tokens with the carry, last part first (RIGHTWARDS: that of the states from the right,
    first part first).

    state, right: the states that enter each tile, from where those of a part are rebuilt. start: the carry that enters each
    chunk; with ``start_left``, start (from the right) and start_left are those of every part. keep: the carry that enters each
    part. exit: the carry after the chunk, and the factor by which it grows with the one that enters. Where a carry crosses
    from tile to tile its scale is the exponent in the checkpoint.
    """
    g_ptr, g_b, g_l = upstream[0]
    g_ybar_ptr, g_lse_ptr = upstream[1]
    k_ptr, k_b, k_l = inputs[0]
    v_ptr, v_b, v_l = inputs[1]
    r_ptr, r_b, r_l = inputs[2]
    w_ptr, u_ptr = parameters
    cu_ptr, ybar_ptr, lse_ptr = sequences
    state_ptr, right_ptr = entering
    start_ptr, start_left_ptr, keep_ptr, exit_ptr = carries
    dk_ptr, dk_b, dk_l = gradients[0]
    dv_ptr, dv_b, dv_l = gradients[1]
    dr_ptr, dr_b, dr_l = gradients[2]
    d_ybar_ptr, d_lse_ptr, dw_ptr, du_ptr = gradients[3]
    RIGHTWARDS: tl.constexpr = F.RIGHTWARDS
    HELD: tl.constexpr = F.HELD
    TILE: tl.constexpr = F.TILE
    BC: tl.constexpr = F.BC
    BOTH: tl.constexpr = right_ptr is not None
    OUT: tl.constexpr = dk_ptr is not None
    DOWN: tl.constexpr = OUT or not RIGHTWARDS  # the carry of the states from the left
    UP: tl.constexpr = BOTH and (OUT or RIGHTWARDS)
    PARTS: tl.constexpr = TILE // HELD
    sequence, chunk, cols, mask = _program(C, chunks, BC)
    first, length = _sequence(cu_ptr, sequence, L)
    length = length.to(L.dtype)
    parts = tl.cdiv(length, HELD)
    parts_per_chunk = tiles_per_chunk * PARTS
    begin = chunk * parts_per_chunk
    end = tl.minimum(begin + parts_per_chunk, parts)
    row = _row(cu_ptr, sequence, first, L, TILE)
    part_row = _row(cu_ptr, sequence, first, L, HELD)
    chunk_row = _row(cu_ptr, sequence, first, L, HELD * tl.cast(parts_per_chunk, tl.int64)) + chunk
    zero = tl.zeros([BC], STATE)
    P, Q, factor = zero, zero, zero + 1.0
    P_, Q_ = zero, zero
    if start_ptr is not None and start_left_ptr is None:
        P = tl.load(start_ptr + chunk_row * C + cols, mask=mask & (begin < parts), other=0.0)
        Q = tl.load(start_ptr + start_plane + chunk_row * C + cols, mask=mask & (begin < parts), other=0.0)
    if g_ybar_ptr is not None:  # what enters from behind the last token, until the state there is known: as it was given
        last = mask & (end == parts)
        P += tl.load(g_ybar_ptr + sequence * C + cols, mask=last, other=0.0)
        Q += tl.load(g_lse_ptr + sequence * C + cols, mask=last, other=0.0)
    if g_ptr is not None:
        g_ptr += sequence * g_b + first * g_l
    k_ptr += sequence * k_b + first * k_l
    v_ptr += sequence * v_b + first * v_l
    if r_ptr is not None:
        r_ptr += sequence * r_b + first * r_l
    if OUT:
        dk_ptr += sequence * dk_b + first * dk_l
        dv_ptr += sequence * dv_b + first * dv_l
        if r_ptr is not None:
            dr_ptr += sequence * dr_b + first * dr_l
    sum_w = zero
    sum_u = zero
    o_behind = zero
    if DOWN:
        behind = mask & (begin < end) & (end < parts)
        o_behind = tl.load(state_ptr + 2 * plane + (row + end * HELD // TILE) * C + cols, mask=behind, other=0.0)
    w, u2 = load_parameters(w_ptr, u_ptr, cols, mask, F.RAW, STATE)
    for i in range(begin, end):
        part = i if RIGHTWARDS else begin + end - 1 - i
        # here is cols, which LLVM cannot know: it would hold every ptr + cols, two registers each, too many with a gate
        here = cols + (part >> L.dtype.primitive_bitwidth - 1) if r_ptr is not None else cols
        left = tl.minimum(length - part * HELD, HELD).to(tl.int32)
        tile = part // PARTS
        t0 = tl.cast(part, tl.int64) * HELD
        at = (row + tile) * C + here
        ks = _tokens(k_ptr, t0, k_l, here, mask, left, -float("inf"), False, HELD)
        vs = _tokens(v_ptr, t0, v_l, here, mask, left, 0.0, False, HELD)
        gs = _tokens(g_ptr, t0, g_l, here, mask, left, 0.0, False, 0 if g_ptr is None else HELD)
        state = load_state(state_ptr, at, plane, mask)
        o_entry = state[2]
        for t in range(tl.cast(tile, tl.int64) * TILE, t0, HELD):
            state = _walk(k_ptr, v_ptr, t, k_l, v_l, here, mask, HELD, state, w, False, HELD)
        rs = _tokens(r_ptr, t0, r_l, here, mask, left, 0.0, False, 0 if r_ptr is None else HELD)
        rights = ()  # the states to the right of the tokens, last token first
        if BOTH:
            right = load_state(right_ptr, at, plane, mask)
            for j in range(0, PARTS - 1 - part % PARTS):
                later = tile * PARTS + PARTS - 1 - j
                there = tl.minimum(length - later * HELD, HELD).to(tl.int32)
                t = tl.cast(later, tl.int64) * HELD
                right = _walk(k_ptr, v_ptr, t, k_l, v_l, here, mask, there, right, w, True, HELD)
            for j in tl.static_range(HELD - 1, -1, -1):
                rights = rights + (right,)
                right, _, _ = _advance(ks[j].to(w.dtype), vs[j].to(w.dtype), right, w)
        at_part = (part_row + part) * C + here
        if UP:
            if OUT:
                P_ = tl.load(start_left_ptr + at_part, mask=mask, other=0.0)
                Q_ = tl.load(start_left_ptr + start_plane + at_part, mask=mask, other=0.0)
            else:
                P_, Q_ = P, Q
                if keep_ptr is not None:
                    tl.store(keep_ptr + at_part, P_, mask=mask)
                    tl.store(keep_ptr + keep_plane + at_part, Q_, mask=mask)
            o = tl.load(right_ptr + 2 * plane + at - C, mask=mask & (tile > 0), other=0.0)
            P_, Q_, factor_ = _rescaled(P_, Q_, factor, right, o, w, part % PARTS == 0)
        if OUT and r_ptr is not None:
            dr_at = _at(dr_ptr, t0, dr_l, here)
        before = ()  # per token: a, b, A, E, v, weight of the state in y times g, y, and what dv and dk have without P and Q
        for j in tl.static_range(HELD):
            k, v = ks[j].to(w.dtype), vs[j].to(w.dtype)
            num, den, e, e_, own = _mean(k, v, state, rights[HELD - 1 - j] if BOTH else state, w, u2, BOTH)
            inverse = reciprocal(den)
            y = num * inverse
            g = gs[j].to(w.dtype) if g_ptr is not None else zero
            if r_ptr is not None:
                p = reciprocal(1.0 + tl.exp2(rs[j].to(w.dtype) * -LOG2E))
                g *= p
                if OUT:
                    tl.store(dr_at, (g * y * (1.0 - p)).to(dr_ptr.dtype.element_ty), mask=mask & (j < left))
                    dr_at += dr_l
            g *= inverse
            dv = g * own
            dk = dv * (v - y) if UP else zero
            if UP:
                sum_u += dk
                _, b_, _, _ = rights[HELD - 1 - j]
                _, A, E = _advance(k, v, rights[HELD - 1 - j], w)
                dv += E * P_
                dk += E * (P_ * v + Q_)
                sum_w += tl.where(j < left, A * (P_ * rights[HELD - 1 - j][0] + Q_ * b_), 0.0)
                P_ = A * P_ + g * e_
                Q_ = A * Q_ - tl.where(j < left, g * e_ * y, 0.0)  # as below
                if exit_ptr is not None:
                    factor_ *= A
            if DOWN:
                a, b, _, _ = state
                state, A, E = _advance(k, v, state, w)
                before = before + ((a, b, A, E, v, g * e, y, dv, dk),)
            else:
                state, _, _ = _advance(k, v, state, w)
        if DOWN:
            if start_left_ptr is not None:
                P = tl.load(start_ptr + at_part, mask=mask, other=0.0)
                Q = tl.load(start_ptr + start_plane + at_part, mask=mask, other=0.0)
            if keep_ptr is not None:
                tl.store(keep_ptr + at_part, P, mask=mask)
                tl.store(keep_ptr + keep_plane + at_part, Q, mask=mask)
            P, Q, factor = _rescaled(P, Q, factor, state, o_behind, w, (part % PARTS == PARTS - 1) & (part != parts - 1))
            o_behind = o_entry
            if g_ybar_ptr is not None:
                if part == parts - 1:
                    seen = state[1] != 0.0
                    b = tl.where(seen, state[1], 1.0)
                    Q = tl.where(seen, (Q - P * state[0] / b) / b, 0.0)
                    P = tl.where(seen, P / b, 0.0)
            if OUT:
                dk_at = _at(dk_ptr, t0 + HELD - 1, dk_l, here)
                dv_at = _at(dv_ptr, t0 + HELD - 1, dv_l, here)
            for j in tl.static_range(HELD - 1, -1, -1):
                a, b, A, E, v, h, y, dv, dk = before[j]
                m = mask & (j < left)
                if OUT:
                    if not UP:  # not before: it would be one more value to hold
                        dk = dv * (v - y)
                        sum_u += dk
                    dv = (dv + E * P).to(dv_ptr.dtype.element_ty)
                    dk = (dk + E * (P * v + Q)).to(dk_ptr.dtype.element_ty)
                    tl.store(dv_at, dv, mask=m)
                    tl.store(dk_at, dk, mask=m)
                    dv_at -= dv_l
                    dk_at -= dk_l
                    sum_w += tl.where(j < left, A * (P * a + Q * b), 0.0)
                P = A * P + h
                Q = A * Q - tl.where(j < left, h * y, 0.0)  # behind the last token h is 0 and y may be infinite
                if exit_ptr is not None:
                    factor *= A
        else:
            P, Q, factor = P_, Q_, factor_
    sequence, chunk, cols, mask = _program(C, chunks, BC, AGAIN=True)
    first, length = _sequence(cu_ptr, sequence, L)
    parts = tl.cdiv(length.to(L.dtype), HELD)
    begin = chunk * parts_per_chunk
    chunk_row = _row(cu_ptr, sequence, first, L, HELD * tl.cast(parts_per_chunk, tl.int64)) + chunk
    at_state = sequence * C + cols
    if exit_ptr is not None:
        store_three(exit_ptr, chunk_row * C + cols, start_plane, mask & (begin < parts), P, Q, factor)
    if OUT:
        tl.store(dw_ptr + chunk_row * C + cols, sum_w, mask=mask & (begin < parts))
        tl.store(du_ptr + chunk_row * C + cols, sum_u, mask=mask & (begin < parts))
    if d_ybar_ptr is not None:
        m = mask & (chunk == 0)
        ybar = tl.load(ybar_ptr + at_state, mask=m, other=0.0)
        lse = tl.load(lse_ptr + at_state, mask=m, other=0.0)
        if g_ybar_ptr is not None:
            if parts == 0:
                Q -= P * ybar
        seen = lse != -float("inf")
        tl.store(d_ybar_ptr + at_state, tl.where(seen, P, 0.0), mask=m)
        tl.store(d_lse_ptr + at_state, tl.where(seen, P * ybar + Q, 0.0), mask=m)


@triton.jit(do_not_specialize=["rows"])
def wkv_sums_kernel(
    dw_ptr, du_ptr, w_ptr, d_decay_ptr, d_first_ptr, rows, C,
    RAW: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters from the sums of the programs."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = cols < C
    sum_w = tl.zeros([BR, BC], STATE)
    sum_u = tl.zeros([BR, BC], STATE)
    for first in range(0, rows, BR):
        row = first + tl.arange(0, BR)[:, None]
        at = row.to(tl.int64) * C + cols[None, :]
        there = (row < rows) & mask[None, :]
        sum_w += tl.load(dw_ptr + at, mask=there, other=0.0)
        sum_u += tl.load(du_ptr + at, mask=there, other=0.0)
    w = _decay(w_ptr, cols, mask, RAW, STATE)
    d = tl.sum(sum_w, 0) * (w if RAW else 1.0)
    d = tl.where(w <= _STEEPEST, 0.0, d)
    tl.store(d_decay_ptr + cols, d.to(d_decay_ptr.dtype.element_ty), mask=mask)
    tl.store(d_first_ptr + cols, tl.sum(sum_u, 0).to(d_first_ptr.dtype.element_ty), mask=mask)


# --- launchers: the same signatures as in cpu/wkv.py ------------------------------------------------------------------------


class _Grid:
    """Sequences, the chunks that each is cut into, and blocks of channels.

    "serial" launches sequences * C threads. "auto" is "serial" from a quarter of Tuning.wkv_busy_threads on, and where there
    are no more than four tiles to walk. Otherwise chunks are as long as so many threads allow. On an H200 with C = 384
    (perf/results/gpu_h200.json, "algorithms") 12,288 threads are better cut into chunks (forward and backward together take
    0.79 to 0.55 of the time for 394 to 4,096 tokens), 24,576 are not (1.13 to 1.02); at 64 tokens serial is faster forward.
    """

    def __init__(self, tuning, k, decay, raw, cu_seqlens, max_seqlen, algorithm):
        self.tuning, self.tile = tuning, tuning.wkv_checkpoint_tokens
        self.held = min(tuning.wkv_held_tokens, self.tile)  # tokens that the backward pass holds in registers
        B, L, self.C = k.shape
        self.packed = None if cu_seqlens is None else cu_seqlens.numel() - 1
        self.sequences = B if self.packed is None else self.packed
        self.B, self.L, self.longest = B, L, L if self.packed is None else max_seqlen or L
        self.decay, self.raw, self.cu_seqlens = decay, raw, cu_seqlens
        self.tiles = cdiv(self.longest, self.tile)
        threads, busy = self.sequences * self.C, tuning.wkv_busy_threads
        self.fine = max(1, self.tiles * threads // busy)  # tiles per chunk
        serial = 4 * threads >= busy or self.tiles <= 4 if algorithm == "auto" else algorithm == "serial"
        self.chunked = not serial and self.fine < self.tiles
        self.coarse = self.fine if self.chunked else self.tiles
        self.device, self.state = k.device, state_dtype(k.dtype)

    def rows(self, tiles):
        """Rows of what is kept per chunk of so many tiles."""
        return layout.wkv_rows(self.B, self.L, self.packed, self.tile * tiles)

    def empty(self, *leading, tiles):
        return torch.empty(*leading, self.rows(tiles), self.C, dtype=self.state, device=self.device)

    def launch(self, kernel, tiles, *args, **flags):
        chunks, threads = cdiv(self.tiles, tiles) if tiles else 1, self.tuning.wkv_threads
        programs = self.sequences * chunks * cdiv(self.C, threads)
        F = Flags(threads, self.tile, self.raw, **flags)
        launch(kernel, programs, self.device, *args, F=F, STATE=STATES[self.state], num_warps=warps_of(threads))

    def combine(self, rows, ybar, lse, carry, leftwards):
        """Summaries of chunks become what enters them."""
        self.launch(
            wkv_combine_kernel, 0, rows, self.decay, (self.cu_seqlens, ybar, lse), self.L, self.C, self.coarse, rows.stride(0),
            CARRY=carry, LEFTWARDS=leftwards,
        )  # fmt: skip


_NOTHING = None, 0, 0


def _placed(t):
    """(tensor, stride of sequences, stride of L), channels contiguous."""
    if t is None:
        return _NOTHING
    if t.stride(2) != 1 and t.shape[2] > 1:
        t = t.contiguous()
    return t, t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)  # packed sequences differ in their first token alone


def _plane(rows):
    return 0 if rows is None else rows.stride(0)


def wkv_forward(
    k, v, r, decay, first, raw, ybar, lse, cu_seqlens, max_seqlen, bidirectional, algorithm, out, ybar_out, lse_out, checkpoint,
    tuning,
):  # fmt: skip
    """Fill out, and ybar_out, lse_out and checkpoint where they are given. k is not empty."""
    decay, first = decay.contiguous(), first.contiguous()
    grid = _Grid(tuning, k, decay, raw, cu_seqlens, max_seqlen, algorithm)
    k, v, r = map(_placed, (k, v, r))
    if checkpoint is not None and not checkpoint.numel():
        checkpoint = None

    def walk(tiles, start=None, right=None, y=None, final=(None, None), keep=None, exit=None, leftwards=False):
        chunk_plane = _plane(exit if start is None else start)
        given = (ybar, lse) if exit is None else (None, None)  # a summary starts from nothing
        grid.launch(
            wkv_forward_kernel, tiles, (k, v, _NOTHING if y is None else r), (decay, first), (cu_seqlens, *given),
            (start, right), (_placed(y), (*final, keep, exit)), grid.L, grid.C, tiles, cdiv(grid.tiles, tiles),
            _plane(start if right is not None else keep), chunk_plane, LEFTWARDS=leftwards,
        )  # fmt: skip

    def starts(leftwards):
        """The state that enters each chunk."""
        if not grid.chunked:
            return None
        rows = grid.empty(3, tiles=grid.coarse)
        walk(grid.coarse, exit=rows, leftwards=leftwards)
        grid.combine(rows, None if leftwards else ybar, None if leftwards else lse, False, leftwards)
        return rows

    final = (ybar_out, lse_out)
    if not bidirectional:
        walk(grid.coarse, start=starts(False), y=out, final=final, keep=None if checkpoint is None else checkpoint[0])
        return
    entering = grid.empty(2, 3, tiles=1) if checkpoint is None else checkpoint
    for leftwards in (False, True):
        walk(
            grid.coarse, start=starts(leftwards), keep=entering[int(leftwards)], leftwards=leftwards,
            final=(None, None) if leftwards else final,
        )  # fmt: skip
    walk(grid.fine, start=entering[0], right=entering[1], y=out)


def parameter_sums(dw, du, decay, raw, d_decay, d_first, tuning):
    """Fill d_decay and d_first, contiguous, from sums of the programs, (rows, C) each."""
    (rows, C), block = dw.shape, tuning.wkv_sums_block
    flags = dict(RAW=raw, STATE=STATES[dw.dtype], BR=block, BC=block, num_warps=warps_of(128))
    launch(wkv_sums_kernel, cdiv(C, block), dw.device, dw, du, decay, d_decay, d_first, rows, C, **flags)


def wkv_backward(
    g, g_ybar, g_lse, k, v, r, decay, first, raw, ybar, lse, checkpoint, cu_seqlens, max_seqlen, bidirectional, algorithm,
    dk, dv, dr, d_decay, d_first, d_ybar, d_lse, tuning,
):  # fmt: skip
    """Fill dk and dv, and dr, d_decay with d_first, and d_ybar with d_lse where they are given. k is not empty."""
    decay, first = decay.contiguous(), first.contiguous()
    grid = _Grid(tuning, k, decay, raw, cu_seqlens, max_seqlen, algorithm)
    g = g if g is None or g.dtype == grid.state else g.to(k.dtype)
    g, k, v, r, dk, dv, dr = map(_placed, (g, k, v, r, dk, dv, dr))
    if g_ybar is not None or g_lse is not None:
        known = g_ybar if g_lse is None else g_lse
        g_ybar, g_lse = (torch.zeros_like(known) if t is None else t.contiguous() for t in (g_ybar, g_lse))
    right = checkpoint[1] if bidirectional else None
    state = checkpoint[0]

    def walk(tiles, start=None, left=None, out=False, keep=None, exit=None, rightwards=False):
        chunk_plane = _plane(exit if start is None else start)
        sums = (None, None)
        if out:
            new = torch.empty if cu_seqlens is None else torch.zeros  # packed: some rows belong to no chunk
            sums = tuple(new(grid.rows(tiles), grid.C, dtype=grid.state, device=grid.device) for _ in range(2))  # both aligned
        gradients = (dk, dv, dr, (d_ybar, d_lse, *sums)) if out else (_NOTHING,) * 3 + ((None,) * 4,)
        upstream = g, (None, None) if rightwards else (g_ybar, g_lse)
        grid.launch(
            wkv_backward_kernel, tiles, upstream, (k, v, r), (decay, first), (cu_seqlens, ybar, lse), (state, right),
            (start, left, keep, exit), gradients, grid.L, grid.C, tiles, cdiv(grid.tiles, tiles),
            _plane(state), chunk_plane, _plane(keep), RIGHTWARDS=rightwards, HELD=grid.held,
        )  # fmt: skip
        if out and d_decay is not None:
            parameter_sums(*sums, decay, raw, d_decay, d_first, tuning)

    def starts(rightwards):
        """The carry that enters each chunk."""
        if not grid.chunked:
            return None
        rows = grid.empty(3, tiles=grid.coarse)
        walk(grid.coarse, exit=rows, rightwards=rightwards)
        grid.combine(rows, None, None, True, not rightwards)
        return rows

    if not bidirectional:
        walk(grid.coarse, start=starts(False), out=True)
        return
    rows = layout.wkv_rows(grid.B, grid.L, grid.packed, grid.held)
    entering = torch.empty(2, 2, rows, grid.C, dtype=grid.state, device=grid.device)
    for rightwards in (False, True):
        walk(grid.coarse, start=starts(rightwards), keep=entering[int(rightwards)], rightwards=rightwards)
    walk(grid.fine, start=entering[0], left=entering[1], out=True)
