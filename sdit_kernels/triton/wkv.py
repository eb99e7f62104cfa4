"""The WKV scan in Triton. A thread holds one channel and loops over tiles of TILE tokens.

The kernel issues all loads of a tile before it uses the first. A thread holds one channel, so a warp reads 128 adjacent bytes
of float32. With two channels per thread, the backward pass would need twice its 140 registers and fill half as much of the GPU;
only a fifth of the instructions (addresses and loads) would be shared.

There are four kernels. ``wkv_forward_kernel`` and ``wkv_backward_kernel`` process a chunk of tiles, with or without outputs.
``wkv_combine_kernel`` scans the summaries of whole chunks. ``wkv_sums_kernel`` adds up the gradients of the parameters.
"serial" launches one kernel with one chunk per sequence; it reads and writes everything once. "chunked" cuts a sequence into
chunks, so that there are enough programs to fill the GPU, in three launches: (1) process each chunk from an empty state and
store a summary; (2) scan the summaries, which turns each into the state at the start of its chunk; (3) process each chunk from
that state. The backward pass does the same. Its carry is linear in the carry that enters a chunk, so a summary is a factor and
an added term. A scan over tokens inside a program (tl.associative_scan) would read k and v once instead of twice. But it
exchanges two or three values per token between lanes, and it cannot split a sequence over more than B*C / BC programs. The
second read often hits the L2 cache.

Bidirectional: two launches compute the states at the start of every tile, from the left and from the right. Then each tile
combines them with its own tokens. The backward pass does the same with its carries.

The backward pass holds nine values per token in registers. compile_report.py finds 248 registers for 16 tokens, and spills with
a gate, but 95 to 170 registers for 8 tokens. So it holds 8 tokens. For the second half of a tile of 16 tokens it recomputes the
state over the first half.

Range: a token far above the state has a weight of up to 2^60. So float32 values must stay below 2^67, and a gate with r < -47
on such a token may give 0, because the denominator overflows.

Exponents: o[t] = ka + n w, where ka is the key that holds the maximum and n is the number of tokens since. The argument of each
exponential is one rounded difference, (k - ka) - n w by fused multiply-add, so the error does not grow with the length. The
kernels use exponentials of base 2, and the square of rsqrt as reciprocal, because both are one instruction on every GPU.
exp and / take several (/ takes ten on AMD). rsqrt.approx twice is within 2^-21.9, div.full within 2 ulp.

A state without any key is a = b = 0 with the exponent _EMPTY_EXPONENT, so that no difference of infinities occurs. A token past
the end of its sequence has k = -inf and v = g = 0. Parameter gradients are summed per program and then over programs, never by
atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import layout
from ..dtypes import state_dtype
from .launch import launch
from .tiles import STATES, cdiv, warps_of

_PREFETCHED: tl.constexpr = tl.constexpr(8)  # summaries that are loaded before the first is used
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LOG2E_REST: tl.constexpr = tl.constexpr(1.925963033500212e-8)  # log2(e) minus its float32 value
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_EMPTY_EXPONENT: tl.constexpr = tl.constexpr(-1e38)  # of an empty state; finite after a multiplication by log2(e)
_MIN_LOG_DECAY: tl.constexpr = tl.constexpr(-1e20)  # as in reference/wkv.py
# The denominator of a state is at most the number of tokens, below 2^31. Next to a token of weight 2^60 it is lost in float32
# rounding. Products of the weight and a value stay finite if the value is below 2^67.
_MAX_OWN_EXPONENT: tl.constexpr = tl.constexpr(60.0)
_TINY: tl.constexpr = tl.constexpr(1e-9)  # a denominator is at least 1, or 0 if every key is masked: then y = 0 / _TINY


# --- the arithmetic of a token -----------------------------------------------------------------------------------------------


@triton.jit
def reciprocal(x):
    if x.dtype == tl.float32:
        root = tl.rsqrt(x)
        return root * root
    else:
        return 1.0 / x


@triton.jit
def exponent_gap(k, state, w):
    """Return k - o."""
    _, _, ka, n = state
    return tl.fma(n, -w, k - ka)


@triton.jit
def pair_weights(d):
    """Return (A, E): the weights of an old term and of a new term whose exponent is greater by d. The larger weight is 1."""
    e = tl.exp2(tl.abs(d) * -LOG2E)
    return tl.where(d > 0.0, e, 1.0), tl.where(d > 0.0, 1.0, e)


@triton.jit
def include_token(k, v, state, w):
    """Return (state after the token, A, E): a <- A a + E v, b <- A b + E. One of A and E is 1."""
    a, b, ka, n = state
    d = exponent_gap(k, state, w) - w  # k - (o + w)
    new = d > 0.0
    A, E = pair_weights(d)
    return (A * a + E * v, A * b + E, tl.where(new, k, ka), tl.where(new, 0.0, n + 1.0)), A, E


@triton.jit
def own_weight(gap, u2):
    """Return e^(u + k - o), the weight of the token in its own output; u2 = u log2(e).

    The weight is limited to 2^60 in float32; there the state is lost in rounding anyway.
    """
    x = tl.fma(gap, tl.full(gap.shape, LOG2E, gap.dtype), u2)
    highest: tl.constexpr = _MAX_OWN_EXPONENT if x.dtype == tl.float32 else 2 * _MAX_OWN_EXPONENT
    return tl.exp2(tl.minimum(x, highest, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _three_weights(k, left, right, w, u2):
    """Return the weights of the left state, the right state and the token.

    The code subtracts before it multiplies. If the compiler fused a product near 1e20 into a difference with its own rounded
    value, the result would be the rounding error, which is a large number.
    """
    _, _, ka, n = left
    _, _, ka_, n_ = right  # names that end in _ belong to the state from the right
    masked = k == -float("inf")
    origin = tl.where(masked, 0.0, k)
    x = tl.fma(-n, w, origin - ka)  # how far the exponent of the state lies below the key of the token
    x_ = tl.fma(-n_, w, origin - ka_)
    own = tl.where(masked, -_EMPTY_EXPONENT, u2 * -_LN2)
    m = tl.minimum(
        tl.minimum(x, x_), tl.minimum(own, 1e30)
    )  # 1e30 limits m if no token is visible: all three weights are then 0
    return tl.exp2((m - x) * LOG2E), tl.exp2((m - x_) * LOG2E), tl.exp2((m - own) * LOG2E)


@triton.jit
def at_least_tiny(x):
    return tl.where(x < _TINY, _TINY, x)  # keeps a NaN; a maximum that keeps it takes one more instruction on AMD


@triton.jit
def _weighted_mean(k, v, state, right, w, u2, BOTH: tl.constexpr):
    """Return (numerator, denominator, weight of the left state, of the right state, of the token) of y."""
    if BOTH:
        e, e_, own = _three_weights(k, state, right, w, u2)
        return e * state[0] + e_ * right[0] + own * v, at_least_tiny(e * state[1] + e_ * right[1] + own), e, e_, own
    else:
        own = own_weight(exponent_gap(k, state, w), u2)
        one = tl.full(own.shape, 1.0, own.dtype)
        return state[0] + own * v, at_least_tiny(state[1] + own), one, one, own


# --- addresses, loads and stores ---------------------------------------------------------------------------------------------


@triton.jit
def _locate_program(C, chunks, BC: tl.constexpr, OPAQUE: tl.constexpr = False):
    """Return (sequence, chunk, channels, mask) of this program. Adjacent programs have adjacent channels.

    OPAQUE computes the same values in a way that the compiler cannot merge with the first call: it adds the program id of the
    second grid axis, which is always 0. So values that are needed only after a loop are not held in registers, or spilled,
    during the loop.
    """
    opaque_zero = tl.program_id(1) if OPAQUE else 0
    blocks = tl.cdiv(C + opaque_zero, BC)
    pid = tl.program_id(0) + opaque_zero
    cols = (pid % blocks) * BC + tl.arange(0, BC)
    pid = pid // blocks
    return (pid // chunks).to(tl.int64), pid % chunks, cols, cols < C


@triton.jit
def _sequence_bounds(cu_ptr, n, L):
    """Return (first token, number of tokens) of sequence n."""
    if cu_ptr is None:
        return tl.full([], 0, tl.int64), L.to(tl.int64)
    else:
        first = tl.load(cu_ptr + n).to(tl.int64)
        return first, tl.load(cu_ptr + n + 1).to(tl.int64) - first


@triton.jit
def _first_row(cu_ptr, n, first, L, tokens):
    """Return the row of the first tile of ``tokens`` tokens of sequence n; see layout.wkv_rows."""
    return n * tl.cdiv(L, tokens) if cu_ptr is None else first // tokens + n


@triton.jit
def _address(ptr, t, stride, cols):
    return ptr + t * stride + cols


@triton.jit
def _load_tokens(ptr, t, stride, cols, mask, left, other, WHOLE: tl.constexpr, N: tl.constexpr):
    """Load N tokens from t on. Only the first ``left`` of them exist, except with WHOLE: all of them exist."""
    found = ()
    if N > 0:
        p = _address(ptr, t, stride, cols)
        for j in tl.static_range(N):
            found = found + (tl.load(p, mask=mask) if WHOLE else tl.load(p, mask=mask & (j < left), other=other),)
            p += stride
    return found


@triton.jit
def _state_after(k_ptr, v_ptr, t, k_l, v_l, cols, mask, left, state, w, LEFTWARDS: tl.constexpr, N: tl.constexpr):
    """Return the state after N tokens from t on."""
    ks = _load_tokens(k_ptr, t, k_l, cols, mask, left, -float("inf"), False, N)
    vs = _load_tokens(v_ptr, t, v_l, cols, mask, left, 0.0, False, N)
    for j in tl.static_range(N - 1 if LEFTWARDS else 0, -1 if LEFTWARDS else N, -1 if LEFTWARDS else 1):
        state, A, E = include_token(ks[j].to(w.dtype), vs[j].to(w.dtype), state, w)
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
def _exp_near_zero(x):
    """exp(x) of a rounding error. x is large only if o is so large that the state has no correct digits."""
    return tl.exp2(tl.minimum(tl.maximum(x, -1.0), 1.0) * LOG2E)


@triton.jit
def rounding_factor(o, state, w):
    """Return e^(rounding error of o), where o is ka + n w rounded. It differs from 1 by up to 2e-6 at o = 50."""
    _, _, ka, n = state
    back = o - ka
    return _exp_near_zero((ka - (o - back)) + tl.fma(n, w, -back))


@triton.jit
def rounded_exponent(state, w):
    """Return o, which is ka + n w rounded, and e^(rounding error of o)."""
    _, _, ka, n = state
    o = tl.fma(n, w, ka)
    return o, rounding_factor(o, state, w)


@triton.jit
def rounded_state(state, w):
    """Return (a, b, o). a and b absorb the rounding error of o."""
    o, rest = rounded_exponent(state, w)
    return state[0] * rest, state[1] * rest, o


@triton.jit
def _store_state(ptr, at, plane, mask, state, w):
    a, b, o = rounded_state(state, w)
    store_three(ptr, at, plane, mask, a, b, o)


@triton.jit
def load_user_state(ybar_ptr, lse_ptr, at, mask, like):
    """Load the user's state, or return an empty state."""
    zero = tl.zeros_like(like)
    if ybar_ptr is None:
        return zero, zero, zero + _EMPTY_EXPONENT, zero
    else:
        lse = tl.load(lse_ptr + at, mask=mask, other=0.0)
        ybar = tl.load(ybar_ptr + at, mask=mask, other=0.0)
        empty = lse == -float("inf")
        return tl.where(empty, 0.0, ybar), tl.where(empty, zero, zero + 1.0), tl.where(empty, _EMPTY_EXPONENT, lse), zero


@triton.jit
def _exp(x):
    """Return e^x for x limited to -1000 .. 60. A decay of e^60 is beyond its limit, and infinities would give NaN below."""
    x = tl.minimum(x, 60.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -1000.0, propagate_nan=tl.PropagateNan.ALL)
    if x.dtype == tl.float32:  # 2^y, corrected by the rounding error of y = x log2(e)
        y = x * LOG2E
        lost = tl.fma(x, tl.full(x.shape, LOG2E, x.dtype), -y) + x * _LOG2E_REST
        power = tl.exp2(y)
        return tl.fma(power, lost * _LN2, power)
    else:
        return tl.exp(x)


@triton.jit
def _load_decay(w_ptr, cols, mask, LOG_OF_RATE: tl.constexpr, STATE: tl.constexpr):
    """Load w = -exp(time_decay), or w itself. The limit keeps n w finite."""
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(STATE)
    if LOG_OF_RATE:
        w = -_exp(w)
    return tl.maximum(w, _MIN_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_decay_and_bonus(w_ptr, u_ptr, cols, mask, LOG_OF_RATE: tl.constexpr, STATE: tl.constexpr):
    """Load w and u log2(e). u is either -inf or above the exponent of an empty state."""
    u = tl.load(u_ptr + cols, mask=mask, other=0.0).to(STATE)
    u = tl.where((u < 0.1 * _EMPTY_EXPONENT) & (u > -float("inf")), 0.1 * _EMPTY_EXPONENT, u)
    return _load_decay(w_ptr, cols, mask, LOG_OF_RATE, STATE), u * LOG2E


class Flags(NamedTuple):
    """Compile-time constants of the wkv kernels."""

    BC: int  # channels per program
    TILE: int  # tokens per tile
    LOG_OF_RATE: bool  # w is -exp(time_decay)
    LEFTWARDS: bool = False  # forward pass: from the last token to the first
    RIGHTWARDS: bool = False  # backward pass: from the first token to the last
    HELD: int = 0  # tokens that the backward pass holds in registers
    CARRY: bool = False  # the combine kernel scans carries of the backward pass, not states


# --- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tile(
    k_ptr, v_ptr, r_ptr, start_ptr, right_ptr, out_ptr, keep_ptr, k_l, v_l, r_l, out_l, C, plane, row, tile, length, cols, mask,
    state, w, u2, WHOLE: tl.constexpr, LEFTWARDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Process a tile and return the state after it. WHOLE: the tile is full, so its tokens need no masks."""
    BOTH: tl.constexpr = right_ptr is not None
    HALF: tl.constexpr = TILE // 2
    t0 = tile * TILE
    left = tl.minimum(length - t0, TILE).to(tl.int32)
    at = (row + tile) * C + cols
    ks = _load_tokens(k_ptr, t0, k_l, cols, mask, left, -float("inf"), WHOLE, TILE)
    vs = _load_tokens(v_ptr, t0, v_l, cols, mask, left, 0.0, WHOLE, TILE)
    rs = _load_tokens(r_ptr, t0, r_l, cols, mask, left, 0.0, WHOLE, 0 if r_ptr is None else HALF)  # half, to save registers
    if keep_ptr is not None:
        _store_state(keep_ptr, at, plane, mask, state, w)
    rights = ()  # the states to the right of the tile's tokens, last token first
    if BOTH:
        state = load_state(start_ptr, at, plane, mask)
        right = load_state(right_ptr, at, plane, mask)
        for j in tl.static_range(TILE - 1, -1, -1):
            rights = rights + (right,)
            right, _, _ = include_token(ks[j].to(w.dtype), vs[j].to(w.dtype), right, w)
    if out_ptr is not None:
        out_at = _address(out_ptr, t0, out_l, cols)
    for j in tl.static_range(TILE - 1 if LEFTWARDS else 0, -1 if LEFTWARDS else TILE, -1 if LEFTWARDS else 1):
        k, v = ks[j].to(w.dtype), vs[j].to(w.dtype)
        if r_ptr is not None and j == HALF:
            rs = rs + _load_tokens(r_ptr, t0 + HALF, r_l, cols, mask, left - HALF, 0.0, WHOLE, HALF)
        if out_ptr is not None:
            num, den, _, _, _ = _weighted_mean(k, v, state, rights[TILE - 1 - j] if BOTH else state, w, u2, BOTH)
            if r_ptr is not None:
                den *= 1.0 + tl.exp2(rs[j].to(w.dtype) * -LOG2E)
            y = (num * reciprocal(den)).to(out_ptr.dtype.element_ty)
            tl.store(out_at, y, mask=mask if WHOLE else mask & (j < left))
            out_at += out_l
        state, _, _ = include_token(k, v, state, w)
    return state


@triton.jit(do_not_specialize=["L", "tiles_per_chunk", "chunks", "plane", "start_plane"])
def wkv_forward_kernel(
    inputs, parameters, sequences, entering, outputs, L, C, tiles_per_chunk, chunks, plane, start_plane,
    F: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Process the tiles of a chunk. The kernel skips pointers that are None.

    start: the state at the start of each chunk; None: the user's state. With ``right``, start and right hold the states at the
    start of every tile, from the left and from the right. out: y. keep: receives the state at the start of each tile. exit:
    receives the state after the chunk.
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
    sequence, chunk, cols, mask = _locate_program(C, chunks, F.BC)
    first, length = _sequence_bounds(cu_ptr, sequence, L)
    tiles = tl.cdiv(length, TILE)
    begin = chunk.to(tl.int64) * tiles_per_chunk
    end = tl.minimum(begin + tiles_per_chunk, tiles)
    row = _first_row(cu_ptr, sequence, first, L, TILE)
    chunk_row = _first_row(cu_ptr, sequence, first, L, TILE * tl.cast(tiles_per_chunk, tl.int64)) + chunk
    w, u2 = load_decay_and_bonus(w_ptr, u_ptr, cols, mask, F.LOG_OF_RATE, STATE)
    if start_ptr is None or BOTH:
        state = load_user_state(ybar_ptr, lse_ptr, sequence * C + cols, mask, w)
    else:
        state = load_state(start_ptr, chunk_row * C + cols, start_plane, mask & (begin < tiles))
        if not LEFTWARDS:  # a sequence without tokens has no chunk in start; its final state is the user's state
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
    whole = tl.maximum(begin, tl.minimum(end, length // TILE))  # the tile after it, if any, is not full
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
    """Replace the summary of each chunk, in place, by the state that enters it, or by the carry of the backward pass.

    A summary of the backward pass is (P, Q, factor).
    """
    cu_ptr, ybar_ptr, lse_ptr = sequences
    CARRY: tl.constexpr = F.CARRY
    LEFTWARDS: tl.constexpr = F.LEFTWARDS
    sequence, chunk, cols, mask = _locate_program(C, 1, F.BC)
    first, length = _sequence_bounds(cu_ptr, sequence, L)
    span = F.TILE * tl.cast(tiles_per_chunk, tl.int64)
    chunks = tl.cdiv(length, span)
    row = _first_row(cu_ptr, sequence, first, L, span)
    w = _load_decay(w_ptr, cols, mask, F.LOG_OF_RATE, STATE)
    steps = span.to(w.dtype)
    zero = tl.zeros_like(w)
    state = (zero, zero, zero, zero) if CARRY else load_user_state(ybar_ptr, lse_ptr, sequence * C + cols, mask, w)
    for i in range(0, tl.cdiv(chunks, _PREFETCHED)):
        found = ()
        for j in tl.static_range(_PREFETCHED):
            c = i * _PREFETCHED + j
            at = (row + (chunks - 1 - c if LEFTWARDS else c)) * C + cols
            found = found + (_load_three(rows_ptr, at, plane, mask & (c < chunks)),)
        for j in tl.static_range(_PREFETCHED):
            c = i * _PREFETCHED + j
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
def _rescale_carry(P, Q, F, state, o, w, border):
    """Rescale a carry from the exponent of the next checkpoint to the exponent that the recomputed tile ends with."""
    factor = tl.where(state[1] != 0.0, rounding_factor(o, state, w), 0.0)
    factor = tl.where(border, factor, 1.0)
    return P * factor, Q * factor, F * factor


@triton.jit(do_not_specialize=["L", "tiles_per_chunk", "chunks", "plane", "start_plane", "keep_plane"])
def wkv_backward_kernel(
    upstream, inputs, parameters, sequences, entering, carries, gradients,
    L, C, tiles_per_chunk, chunks, plane, start_plane, keep_plane, F: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Propagate the carry through a chunk, part by part of HELD tokens, the last part first.

    With RIGHTWARDS, the kernel propagates the carry of the right states, the first part first.

    state, right: the checkpoints, the states at the start of each tile; the kernel recomputes the states of a part from them.
    start: the carry that enters each chunk. With ``start_left``, start (from the right) and start_left hold the carries that
    enter every part. keep: receives the carry that enters each part. exit: receives the carry after the chunk, and the factor
    by which the carry that enters the chunk is multiplied. Between tiles, the scale of a carry is the exponent of the
    checkpoint.
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
    DOWN: tl.constexpr = OUT or not RIGHTWARDS  # propagate the carry of the left states
    UP: tl.constexpr = BOTH and (OUT or RIGHTWARDS)  # propagate the carry of the right states
    PARTS: tl.constexpr = TILE // HELD
    sequence, chunk, cols, mask = _locate_program(C, chunks, BC)
    first, length = _sequence_bounds(cu_ptr, sequence, L)
    length = length.to(L.dtype)
    parts = tl.cdiv(length, HELD)
    parts_per_chunk = tiles_per_chunk * PARTS
    begin = chunk * parts_per_chunk
    end = tl.minimum(begin + parts_per_chunk, parts)
    row = _first_row(cu_ptr, sequence, first, L, TILE)
    part_row = _first_row(cu_ptr, sequence, first, L, HELD)
    chunk_row = _first_row(cu_ptr, sequence, first, L, HELD * tl.cast(parts_per_chunk, tl.int64)) + chunk
    zero = tl.zeros([BC], STATE)
    P, Q, factor = zero, zero, zero + 1.0
    P_, Q_ = zero, zero
    if start_ptr is not None and start_left_ptr is None:
        P = tl.load(start_ptr + chunk_row * C + cols, mask=mask & (begin < parts), other=0.0)
        Q = tl.load(start_ptr + start_plane + chunk_row * C + cols, mask=mask & (begin < parts), other=0.0)
    if g_ybar_ptr is not None:  # the gradient of the final state, as given; it is rescaled below, once that state is known
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
    w, u2 = load_decay_and_bonus(w_ptr, u_ptr, cols, mask, F.LOG_OF_RATE, STATE)
    for i in range(begin, end):
        part = i if RIGHTWARDS else begin + end - 1 - i
        # opaque_cols equals cols, but LLVM cannot know it. LLVM would otherwise hold every ptr + cols in two registers, which
        # is too much with a gate.
        opaque_cols = cols + (part >> L.dtype.primitive_bitwidth - 1) if r_ptr is not None else cols
        left = tl.minimum(length - part * HELD, HELD).to(tl.int32)
        tile = part // PARTS
        t0 = tl.cast(part, tl.int64) * HELD
        at = (row + tile) * C + opaque_cols
        ks = _load_tokens(k_ptr, t0, k_l, opaque_cols, mask, left, -float("inf"), False, HELD)
        vs = _load_tokens(v_ptr, t0, v_l, opaque_cols, mask, left, 0.0, False, HELD)
        gs = _load_tokens(g_ptr, t0, g_l, opaque_cols, mask, left, 0.0, False, 0 if g_ptr is None else HELD)
        state = load_state(state_ptr, at, plane, mask)
        o_entry = state[2]
        for t in range(tl.cast(tile, tl.int64) * TILE, t0, HELD):
            state = _state_after(k_ptr, v_ptr, t, k_l, v_l, opaque_cols, mask, HELD, state, w, False, HELD)
        rs = _load_tokens(r_ptr, t0, r_l, opaque_cols, mask, left, 0.0, False, 0 if r_ptr is None else HELD)
        rights = ()  # the states to the right of the tokens, last token first
        if BOTH:
            right = load_state(right_ptr, at, plane, mask)
            for j in range(0, PARTS - 1 - part % PARTS):
                later = tile * PARTS + PARTS - 1 - j
                there = tl.minimum(length - later * HELD, HELD).to(tl.int32)
                t = tl.cast(later, tl.int64) * HELD
                right = _state_after(k_ptr, v_ptr, t, k_l, v_l, opaque_cols, mask, there, right, w, True, HELD)
            for j in tl.static_range(HELD - 1, -1, -1):
                rights = rights + (right,)
                right, _, _ = include_token(ks[j].to(w.dtype), vs[j].to(w.dtype), right, w)
        at_part = (part_row + part) * C + opaque_cols
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
            P_, Q_, factor_ = _rescale_carry(P_, Q_, factor, right, o, w, part % PARTS == 0)
        if OUT and r_ptr is not None:
            dr_at = _address(dr_ptr, t0, dr_l, opaque_cols)
        # Values per token: a, b, A, E, v, weight of the state in y times g, y, and the parts of dv and dk without P and Q.
        before = ()
        for j in tl.static_range(HELD):
            k, v = ks[j].to(w.dtype), vs[j].to(w.dtype)
            num, den, e, e_, own = _weighted_mean(k, v, state, rights[HELD - 1 - j] if BOTH else state, w, u2, BOTH)
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
                _, A, E = include_token(k, v, rights[HELD - 1 - j], w)
                dv += E * P_
                dk += E * (P_ * v + Q_)
                sum_w += tl.where(j < left, A * (P_ * rights[HELD - 1 - j][0] + Q_ * b_), 0.0)
                P_ = A * P_ + g * e_
                Q_ = A * Q_ - tl.where(j < left, g * e_ * y, 0.0)  # y may be infinite past the last token
                if exit_ptr is not None:
                    factor_ *= A
            if DOWN:
                a, b, _, _ = state
                state, A, E = include_token(k, v, state, w)
                before = before + ((a, b, A, E, v, g * e, y, dv, dk),)
            else:
                state, _, _ = include_token(k, v, state, w)
        if DOWN:
            if start_left_ptr is not None:
                P = tl.load(start_ptr + at_part, mask=mask, other=0.0)
                Q = tl.load(start_ptr + start_plane + at_part, mask=mask, other=0.0)
            if keep_ptr is not None:
                tl.store(keep_ptr + at_part, P, mask=mask)
                tl.store(keep_ptr + keep_plane + at_part, Q, mask=mask)
            P, Q, factor = _rescale_carry(P, Q, factor, state, o_behind, w, (part % PARTS == PARTS - 1) & (part != parts - 1))
            o_behind = o_entry
            if g_ybar_ptr is not None:
                if part == parts - 1:
                    seen = state[1] != 0.0
                    b = tl.where(seen, state[1], 1.0)
                    Q = tl.where(seen, (Q - P * state[0] / b) / b, 0.0)
                    P = tl.where(seen, P / b, 0.0)
            if OUT:
                dk_at = _address(dk_ptr, t0 + HELD - 1, dk_l, opaque_cols)
                dv_at = _address(dv_ptr, t0 + HELD - 1, dv_l, opaque_cols)
            for j in tl.static_range(HELD - 1, -1, -1):
                a, b, A, E, v, h, y, dv, dk = before[j]
                m = mask & (j < left)
                if OUT:
                    if not UP:  # computed here, because it would be one more value to hold in registers
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
                Q = A * Q - tl.where(j < left, h * y, 0.0)  # past the last token h is 0 and y may be infinite
                if exit_ptr is not None:
                    factor *= A
        else:
            P, Q, factor = P_, Q_, factor_
    sequence, chunk, cols, mask = _locate_program(C, chunks, BC, OPAQUE=True)
    first, length = _sequence_bounds(cu_ptr, sequence, L)
    parts = tl.cdiv(length.to(L.dtype), HELD)
    begin = chunk * parts_per_chunk
    chunk_row = _first_row(cu_ptr, sequence, first, L, HELD * tl.cast(parts_per_chunk, tl.int64)) + chunk
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
    dw_ptr, du_ptr, w_ptr, d_decay_ptr, d_bonus_ptr, rows, C,
    LOG_OF_RATE: tl.constexpr, STATE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum the partial sums of all programs to the gradients of the parameters."""
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
    w = _load_decay(w_ptr, cols, mask, LOG_OF_RATE, STATE)
    d = tl.sum(sum_w, 0) * (w if LOG_OF_RATE else 1.0)
    d = tl.where(w <= _MIN_LOG_DECAY, 0.0, d)
    tl.store(d_decay_ptr + cols, d.to(d_decay_ptr.dtype.element_ty), mask=mask)
    tl.store(d_bonus_ptr + cols, tl.sum(sum_u, 0).to(d_bonus_ptr.dtype.element_ty), mask=mask)


# --- launchers: the same signatures as in cpu/wkv.py ------------------------------------------------------------------------


class _Grid:
    """The launch grid: sequences, chunks of tokens, and blocks of channels.

    "serial" launches sequences * C threads. "auto" chooses "serial" if these are at least a quarter of
    Tuning.wkv_busy_threads, or if there are at most four tiles. Otherwise it cuts a sequence into as many chunks as
    wkv_busy_threads allows. On an H200 with C = 384 (perf/results/gpu_h200.json, "algorithms"), chunks pay for 12,288 threads:
    forward and backward together take 0.79 to 0.55 of the time for 394 to 4,096 tokens. They do not pay for 24,576 threads
    (1.13 to 1.02). With 64 tokens, serial is faster in the forward pass.
    """

    def __init__(self, tuning, k, decay, decay_is_log_of_rate, cu_seqlens, max_seqlen, algorithm):
        self.tuning, self.tile = tuning, tuning.wkv_checkpoint_tokens
        self.held = min(tuning.wkv_held_tokens, self.tile)  # tokens that the backward pass holds in registers
        B, L, self.C = k.shape
        self.packed = None if cu_seqlens is None else cu_seqlens.numel() - 1
        self.sequences = B if self.packed is None else self.packed
        self.B, self.L, self.longest = B, L, L if self.packed is None else max_seqlen or L
        self.decay, self.decay_is_log_of_rate, self.cu_seqlens = decay, decay_is_log_of_rate, cu_seqlens
        self.tiles = cdiv(self.longest, self.tile)
        threads, busy = self.sequences * self.C, tuning.wkv_busy_threads
        self.fine = max(1, self.tiles * threads // busy)  # tiles per chunk that give about wkv_busy_threads threads
        serial = 4 * threads >= busy or self.tiles <= 4 if algorithm == "auto" else algorithm == "serial"
        self.chunked = not serial and self.fine < self.tiles
        self.coarse = self.fine if self.chunked else self.tiles
        self.device, self.state = k.device, state_dtype(k.dtype)

    def rows(self, tiles):
        """Rows of a table with one row per chunk of ``tiles`` tiles."""
        return layout.wkv_rows(self.B, self.L, self.packed, self.tile * tiles)

    def empty(self, *leading, tiles):
        return torch.empty((*leading, self.rows(tiles), self.C), dtype=self.state, device=self.device)

    def launch(self, kernel, tiles, *args, **flags):
        chunks, threads = cdiv(self.tiles, tiles) if tiles else 1, self.tuning.wkv_threads
        programs = self.sequences * chunks * cdiv(self.C, threads)
        F = Flags(threads, self.tile, self.decay_is_log_of_rate, **flags)
        launch(kernel, programs, self.device, *args, F=F, STATE=STATES[self.state], num_warps=warps_of(threads))

    def combine(self, rows, ybar, lse, carry, leftwards):
        """Replace the summaries of chunks by the state or carry that enters each chunk."""
        self.launch(
            wkv_combine_kernel, 0, rows, self.decay, (self.cu_seqlens, ybar, lse), self.L, self.C, self.coarse, rows.stride(0),
            CARRY=carry, LEFTWARDS=leftwards,
        )  # fmt: skip


_ABSENT = None, 0, 0


def _with_strides(t):
    """Return (tensor, stride of sequences, stride of L), with contiguous channels."""
    if t is None:
        return _ABSENT
    if t.stride(2) != 1 and t.shape[2] > 1:
        t = t.contiguous()
    return t, t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)  # packed sequences differ only in their first token


def _plane_stride(rows):
    return 0 if rows is None else rows.stride(0)


def wkv_forward(
    k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, cu_seqlens, max_seqlen, bidirectional, algorithm, out, ybar_out,
    lse_out, checkpoint, tuning,
):  # fmt: skip
    """Fill out, and ybar_out, lse_out and checkpoint if given. k must not be empty."""
    decay, bonus = decay.contiguous(), bonus.contiguous()
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    grid = _Grid(tuning, k, decay, decay_is_log_of_rate, cu_seqlens, max_seqlen, algorithm)
    k, v, r = map(_with_strides, (k, v, r))
    if checkpoint is not None and not checkpoint.numel():
        checkpoint = None

    def launch_scan(tiles, start=None, right=None, y=None, final=(None, None), keep=None, exit=None, leftwards=False):
        chunk_plane = _plane_stride(exit if start is None else start)
        given = (ybar, lse) if exit is None else (None, None)  # a summary starts from an empty state
        grid.launch(
            wkv_forward_kernel, tiles, (k, v, _ABSENT if y is None else r), (decay, bonus), (cu_seqlens, *given),
            (start, right), (_with_strides(y), (*final, keep, exit)), grid.L, grid.C, tiles, cdiv(grid.tiles, tiles),
            _plane_stride(start if right is not None else keep), chunk_plane, LEFTWARDS=leftwards,
        )  # fmt: skip

    def entering_states(leftwards):
        """Return the state that enters each chunk."""
        if not grid.chunked:
            return None
        rows = grid.empty(3, tiles=grid.coarse)
        launch_scan(grid.coarse, exit=rows, leftwards=leftwards)
        grid.combine(rows, None if leftwards else ybar, None if leftwards else lse, False, leftwards)
        return rows

    final = (ybar_out, lse_out)
    if not bidirectional:
        launch_scan(
            grid.coarse, start=entering_states(False), y=out, final=final, keep=None if checkpoint is None else checkpoint[0]
        )
        return
    entering = grid.empty(2, 3, tiles=1) if checkpoint is None else checkpoint
    for leftwards in (False, True):
        launch_scan(
            grid.coarse, start=entering_states(leftwards), keep=entering[int(leftwards)], leftwards=leftwards,
            final=(None, None) if leftwards else final,
        )  # fmt: skip
    launch_scan(grid.fine, start=entering[0], right=entering[1], y=out)


def parameter_sums(dw, du, decay, decay_is_log_of_rate, d_decay, d_bonus, tuning):
    """Fill d_decay and d_bonus (contiguous) from the partial sums of the programs, (rows, C) each."""
    (rows, C), block = dw.shape, tuning.wkv_sums_block
    flags = dict(LOG_OF_RATE=decay_is_log_of_rate, STATE=STATES[dw.dtype], BR=block, BC=block, num_warps=warps_of(128))
    launch(wkv_sums_kernel, cdiv(C, block), dw.device, dw, du, decay, d_decay, d_bonus, rows, C, **flags)


def wkv_backward(
    g, g_ybar, g_lse, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, checkpoint, cu_seqlens, max_seqlen,
    bidirectional, algorithm, dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse, tuning,
):  # fmt: skip
    """Fill dk and dv, and dr, d_decay, d_bonus, d_ybar and d_lse if given. k must not be empty."""
    decay, bonus = decay.contiguous(), bonus.contiguous()
    ybar, lse = (None if s is None else s.contiguous() for s in (ybar, lse))
    grid = _Grid(tuning, k, decay, decay_is_log_of_rate, cu_seqlens, max_seqlen, algorithm)
    g = g if g is None or g.dtype == grid.state else g.to(k.dtype)
    g, k, v, r, dk, dv, dr = map(_with_strides, (g, k, v, r, dk, dv, dr))
    if g_ybar is not None or g_lse is not None:
        known = g_ybar if g_lse is None else g_lse
        g_ybar, g_lse = (torch.zeros_like(known) if t is None else t.contiguous() for t in (g_ybar, g_lse))
    right = checkpoint[1] if bidirectional else None
    state = checkpoint[0]

    def launch_backward(tiles, start=None, left=None, out=False, keep=None, exit=None, rightwards=False):
        chunk_plane = _plane_stride(exit if start is None else start)
        sums = (None, None)
        if out:
            sums = tuple(grid.empty(tiles=tiles) for _ in range(2))  # both aligned
            if cu_seqlens is not None:  # packed: some rows do not belong to any chunk
                sums = tuple(torch.zeros_like(t) for t in sums)
        gradients = (dk, dv, dr, (d_ybar, d_lse, *sums)) if out else (_ABSENT,) * 3 + ((None,) * 4,)
        upstream = g, (None, None) if rightwards else (g_ybar, g_lse)
        grid.launch(
            wkv_backward_kernel, tiles, upstream, (k, v, r), (decay, bonus), (cu_seqlens, ybar, lse), (state, right),
            (start, left, keep, exit), gradients, grid.L, grid.C, tiles, cdiv(grid.tiles, tiles),
            _plane_stride(state), chunk_plane, _plane_stride(keep), RIGHTWARDS=rightwards, HELD=grid.held,
        )  # fmt: skip
        if out and d_decay is not None:
            parameter_sums(*sums, decay, decay_is_log_of_rate, d_decay, d_bonus, tuning)

    def entering_carries(rightwards):
        """Return the carry that enters each chunk."""
        if not grid.chunked:
            return None
        rows = grid.empty(3, tiles=grid.coarse)
        launch_backward(grid.coarse, exit=rows, rightwards=rightwards)
        grid.combine(rows, None, None, True, not rightwards)
        return rows

    if not bidirectional:
        launch_backward(grid.coarse, start=entering_carries(False), out=True)
        return
    rows = layout.wkv_rows(grid.B, grid.L, grid.packed, grid.held)
    entering = torch.empty((2, 2, rows, grid.C), dtype=grid.state, device=grid.device)
    for rightwards in (False, True):
        launch_backward(grid.coarse, start=entering_carries(rightwards), keep=entering[int(rightwards)], rightwards=rightwards)
    launch_backward(grid.fine, start=entering[0], left=entering[1], out=True)
