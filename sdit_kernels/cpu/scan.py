"""The state of a WKV scan, and what is done to it: vectors of channels, for the kernels of cpu/wkv.py and cpu/spiking_wkv.py.

Exponents: a state N = a e^o, D = b e^o has o = ka - m w, the key of the token that holds the running maximum and minus the
number of tokens since. b is 0 (nothing seen, ka the least float) or at least 1, less rounding.

A running maximum is what a token waits for: a difference, a product, a comparison and a selection, one after the other. So a
calm tile, in which nothing can overflow, has one maximum R for all its tokens, the greatest of o and their keys:

    y[t] = (a + U E[t] v[t]) / (b + U E[t]);   a <- D a + E[t] v[t];   b <- D b + E[t]

one exponential a token instead of two, no comparison, and nothing to wait for but two multiply-adds. A slow channel, TILE w >=
-36, has D = 1, U = e^(u + w), E[t] = e^(k[t] - R - (t + 1) w) and, at the tile's end, o = R + TILE w: no rounding adds up. A
steep one has D = e^w, U = e^u, E[t] = e^(k[t] - R), and o becomes the last key where that exceeds R + TILE w. Calm: w <= 0,
|u| <= 8, no key of a slow channel exceeds o (before the first key: that key) by more than 26, and none of a steep one is less
than R - 30. Other tiles walk with the running maximum.
"""

import numba
import numpy as np
import torch

from ..dtypes import state_dtype
from ..reference.wkv import MIN_LOG_DECAY
from .intrinsics import F64
from .vector import absolute, all_at_most, fma, negative_abs, vexp, vload, vset, vstore, where_equal, where_less

_STEEP, _BONUS, _JUMP, _RANGE = 36.0, 8.0, 26.0, 30.0  # of a calm tile; 36 + 8 + 26 < 88 - ln 2^24
LEAST = 1e-30  # lost beside the denominator of a token that sees a key, which is e^-38 at least
FAR = 4.0e6  # tokens after which an exponent is rounded and counted anew: float32 counts to 2^24

inline = numba.njit(forceinline=True, error_model="numpy")


def parameters(decay, bonus, decay_is_log_of_rate, k):
    """(w, u) as the kernels take them: contiguous, in the state type."""
    dtype = state_dtype(k.dtype)
    w, u = (p if p.dtype == dtype else p.to(dtype) for p in (decay, bonus))
    w = torch.exp(w).neg_() if decay_is_log_of_rate else w
    return w.clamp_min(MIN_LOG_DECAY).contiguous(), u.contiguous()


def parameter_sums(dw, du, w, decay_is_log_of_rate, d_decay, d_bonus):
    """Fill d_decay and d_bonus from sums of the programs, (rows, C) each."""
    d_bonus.copy_(du.sum(0))
    dw = dw.sum(0)
    d_decay.copy_((w * dw if decay_is_log_of_rate else dw).masked_fill_(w <= MIN_LOG_DECAY, 0.0))


@inline
def weights(d, W):
    """Of the old and the new of two terms whose exponents differ by d = new - old: the greater is 1."""
    zero, one = vset(0.0, W), vset(1.0, W)
    e = vexp(negative_abs(d), W)
    return where_less(d, zero, one, e), where_less(d, zero, e, one)


@inline
def include(ka, m, a, b, k, v, w, W):
    """The state one token later, and the weights that made it."""
    zero = vset(0.0, W)
    m = m - vset(1.0, W)
    d = fma(m, w, k - ka)
    A, E = weights(d, W)
    return where_less(d, zero, ka, k), where_less(d, zero, m, zero), fma(E, v, A * a), fma(A, b, E), A, E


@inline
def gentle(w, u, W):
    """Whether tiles may be calm, as far as the parameters are concerned."""
    return all_at_most(w, vset(0.0, W)) and all_at_most(absolute(u), vset(_BONUS, W))


@inline
def by_slope(w, n, slow, steep, W):
    """``slow`` in the channels whose decay over n tokens is within _STEEP, ``steep`` in the others."""
    return where_less(w, vset(-_STEEP / n, W), steep, slow)


@inline
def tile_constants(target, n, w, u, lanes, W):
    """U, D and what e^(k[t] - R) takes to be E[t] for n tokens; t w may be so great that its rounding shows."""
    one, bonus, decay = vset(1.0, W), vexp(u, W), vexp(w, W)
    vstore(target, 0, bonus * by_slope(w, n, decay, one, W), W)
    vstore(target, lanes, by_slope(w, n, one, decay, W), W)
    for t in range(n):
        minus = vset(-float(t + 1), W)
        x = by_slope(w, n, minus * w, vset(0.0, W), W)
        e = vexp(x, W)
        growth = fma(e, fma(minus, w, vset(0.0, W) - x), e)
        vstore(target, (t + 2) * lanes, by_slope(w, n, growth, one, W), W)


@inline
def finite(x, W):
    """x, and 0 where it is infinite or NaN: what may be taken from every value without making NaN of them."""
    return where_less(absolute(x), vset(np.inf, W), x, vset(0.0, W))


@inline
def maximum(x, y):
    """The greater; x where one is NaN."""
    return where_less(x, y, y, x)


@inline
def minimum(x, y):
    return where_less(y, x, y, x)


@inline
def extremes(k, k_l, n, V):
    """The greatest and the least key of n >= 1 tokens."""
    top = low = top2 = low2 = vload(k, 0, V)  # two, because a maximum takes some cycles
    for t in range(n // 2):
        x, y = vload(k, 2 * t * k_l, V), vload(k, (2 * t + 1) * k_l, V)
        top, top2, low, low2 = maximum(top, x), maximum(top2, y), minimum(low, x), minimum(low2, y)
    x = vload(k, (n - 1) * k_l, V)
    return maximum(maximum(top, top2), x), minimum(minimum(low, low2), x)


@inline
def settle(first, top, low, tokens, ka, m, b, w, W):
    """(whether a tile of at most ``tokens`` with these keys is calm, R as a key and minus the tokens since, the factor that
    takes the state to it)"""
    zero, half = vset(0.0, W), vset(0.5, W)
    base = where_equal(b, zero, first, fma(zero - m, w, ka))
    top = maximum(base, top)
    jump, spread = vset(-_JUMP, W), vset(-_RANGE, W)
    calm = all_at_most(by_slope(w, tokens, jump, spread, W), by_slope(w, tokens, base, low, W) - top)
    old = where_equal(b, zero, zero, where_less(base, top, zero, vset(1.0, W)))  # 1 where R stays
    entry = vexp(zero - fma(m, w, top - ka), W)
    return calm, where_less(half, old, ka, top), old * m, where_less(half, old, old, entry)


@inline
def leave(last, n, tokens, ka, m, a, b, w, W):
    """The state after a calm tile of n tokens, ``last`` the key of the last: b is at least 1 again."""
    zero, one, minus = vset(0.0, W), vset(1.0, W), vset(-float(n), W)
    if all_at_most(vset(-_STEEP / tokens, W), w):
        return ka, m + minus, a, b
    d, x = fma(m, w, last - ka), vset(float(n), W) * w
    scale = by_slope(w, tokens, one, vexp(zero - where_less(x, d, d, x), W), W)
    fresh = by_slope(w, tokens, zero, where_less(x, d, one, zero), W)
    half = vset(0.5, W)
    return where_less(half, fresh, last, ka), where_less(half, fresh, zero, m + minus), a * scale, b * scale


@inline
def join(ka, m, a, b, ka2, m2, a2, b2, w, W):
    """Two states of disjoint tokens as one, and their weights."""
    zero = vset(0.0, W)
    d = fma(m - m2, w, ka2 - ka)
    A, E = weights(d, W)
    return where_less(d, zero, ka, ka2), where_less(d, zero, m, m2), fma(E, a2, A * a), fma(E, b2, A * b), A, E


@inline
def excess(ka, m, o, w, W):
    """(ka - m w) - o, where both may be large and close: product and sum are taken apart into the rounded and the lost."""
    n = vset(0.0, W) - m
    p = n * w
    total = ka + p
    back = total - ka
    lost = (ka - (total - back)) + (p - back) + fma(n, w, vset(0.0, W) - p)
    return (total - o) + lost


@inline
def unrounding(ka, m, o, w, W):
    """e^((ka - m w) - o), where o is ka - m w rounded; or, where chunks meet, the running maximum, which a calm tile's exponent
    may miss by _STEEP. Where rounding leaves nothing of it, 1."""
    x = excess(ka, m, o, w, W)
    return vexp(where_less(vset(-2.0 * _STEEP, W), negative_abs(x), x, vset(0.0, W)), W)


@inline
def rounded(ka, m, a, b, w, W):
    """(a, b, o): the state with its exponent in one number."""
    o = fma(vset(0.0, W) - m, w, ka)
    gap = unrounding(ka, m, o, w, W)
    return a * gap, b * gap, o


@inline
def nearby(ka, m, a, b, w, W):
    """The same state with no more than FAR tokens since its exponent's key."""
    far, zero = vset(-FAR, W), vset(0.0, W)
    a2, b2, o = rounded(ka, m, a, b, w, W)
    return (
        where_less(m, far, o, ka),
        where_less(m, far, zero, m),
        where_less(m, far, a2, a),
        where_less(m, far, b2, b),
    )


@inline
def user_state(ybar, lse, at, W):
    """(ka, a, b) from a user's state; none where the addresses are 0."""
    zero, one, nothing = vset(0.0, W), vset(1.0, W), vset(-1e300 if W % 8 == F64 else -3.4028234663852886e38, W)
    if ybar == 0:
        return nothing, zero, zero
    y, o, empty = vload(ybar, at, W), vload(lse, at, W), vset(-np.inf, W)
    return where_equal(o, empty, nothing, o), where_equal(o, empty, zero, y), where_equal(o, empty, zero, one)


@inline
def gate(r, W):
    """(1 / sigmoid(r), e^-r), of r no less than -80 where e^80 is near the greatest float."""
    least = vset(-80.0 if W % 8 != F64 else -700.0, W)
    e = vexp(vset(0.0, W) - where_less(r, least, least, r), W)
    return vset(1.0, W) + e, e


@inline
def channels(C, lanes, block, blocks):
    """First vector of a block and the number of its vectors; the last takes the channels that fill no vector."""
    whole = C // lanes
    begin, end = whole * block // blocks, whole * (block + 1) // blocks
    return begin, end - begin + (1 if block == blocks - 1 and whole * lanes < C else 0)
