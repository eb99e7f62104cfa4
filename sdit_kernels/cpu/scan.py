"""The state of a WKV scan and its arithmetic, on vectors of channels, for cpu/wkv.py and cpu/spiking_wkv.py.

w <= 0 is the log decay per token, u is the bonus. The state of a channel is the numerator a e^o and the denominator b e^o of y,
with the exponent o = ka - m w. ka is the key of the token that holds the running maximum. m is minus the number of tokens since
that token. b is 0 if the scan has seen nothing; ka is then the lowest float. Otherwise b is at least 1, up to rounding.

A tile is a run of TILE tokens. In general each token updates the running maximum: a difference, a multiplication, a comparison
and a selection, and the next token must wait for all of them. In a shared-maximum tile, nothing can overflow, so all tokens
share one maximum R, the greatest of o and of the keys:

    y[t] = (a + U E[t] v[t]) / (b + U E[t]);   a <- D a + E[t] v[t];   b <- D b + E[t]

Here D is the decay and U is the bonus factor. A token then needs one exponential instead of two and no comparison, and the next
token waits only for two multiply-adds. U, D and E depend on the channel:

- A slow channel has TILE w >= -36. D = 1, U = e^(u + w), E[t] = e^(k[t] - R - (t + 1) w), and o = R + TILE w at the end of the
  tile. So rounding errors do not accumulate.
- A fast-decaying channel has TILE w < -36. D = e^w, U = e^u, E[t] = e^(k[t] - R). At the end of the tile, o is the greater of
  the last key and R + TILE w.

A tile can share its maximum if all of this holds: w <= 0; |u| <= 8; in slow channels no key exceeds o by more than 26 (o is the
first key of the tile if the scan has seen nothing); in fast-decaying channels no key is below R - 30. All other tiles use the
running maximum.
"""

import numpy as np
import torch

from ..dtypes import state_dtype
from ..reference.wkv import MIN_LOG_DECAY
from .compiler import inline
from .intrinsics import F64
from .vector import absolute, all_at_most, fma, negative_abs, vexp, vload, vset, vstore, where_equal, where_less

# Limits of a shared-maximum tile. No value overflows, because 36 + 8 + 26 < 88 - ln 2^24.
_MAX_TILE_DECAY, _MAX_BONUS, _MAX_RISE, _MAX_FALL = 36.0, 8.0, 26.0, 30.0
# Added to a denominator, so that y is 0 instead of 0 / 0. If a token sees a key, its denominator is at least e^-38, and the sum
# does not change in float32.
LEAST = 1e-30
# After so many tokens, the exponent becomes one rounded number and m restarts at 0, because float32 counts only to 2^24.
FAR = 4.0e6


def parameters(decay, bonus, decay_is_log_of_rate, k):
    """Return (w, u) for the kernels: contiguous, in the state type."""
    dtype = state_dtype(k.dtype)
    w, u = (p if p.dtype == dtype else p.to(dtype) for p in (decay, bonus))
    w = torch.exp(w).neg_() if decay_is_log_of_rate else w
    return w.clamp_min(MIN_LOG_DECAY).contiguous(), u.contiguous()


def parameter_sums(dw, du, w, decay_is_log_of_rate, d_decay, d_bonus):
    """Fill d_decay and d_bonus from the partial sums dw and du, which have the shape (rows, C)."""
    d_bonus.copy_(du.sum(0))
    dw = dw.sum(0)
    d_decay.copy_((w * dw if decay_is_log_of_rate else dw).masked_fill_(w <= MIN_LOG_DECAY, 0.0))


@inline
def pair_weights(d, W):
    """Return (A, E): the weights of an old and of a new term whose exponent is greater by d. The larger weight is 1."""
    zero, one = vset(0.0, W), vset(1.0, W)
    e = vexp(negative_abs(d), W)
    return where_less(d, zero, one, e), where_less(d, zero, e, one)


@inline
def include_token(ka, m, a, b, k, v, w, W):
    """Return the state after the token, and (A, E): a <- A a + E v, b <- A b + E."""
    zero = vset(0.0, W)
    m = m - vset(1.0, W)
    d = fma(m, w, k - ka)
    A, E = pair_weights(d, W)
    return where_less(d, zero, ka, k), where_less(d, zero, m, zero), fma(E, v, A * a), fma(A, b, E), A, E


@inline
def allows_shared_max(w, u, W):
    """Return True if w and u allow shared-maximum tiles. The keys of each tile must allow it too."""
    return all_at_most(w, vset(0.0, W)) and all_at_most(absolute(u), vset(_MAX_BONUS, W))


@inline
def by_decay(w, n, slow, fast, W):
    """Return ``slow`` in the slow channels of a tile of n tokens, and ``fast`` in the fast-decaying channels."""
    return where_less(w, vset(-_MAX_TILE_DECAY / n, W), fast, slow)


@inline
def store_tile_constants(target, n, w, u, lanes, W):
    """Write U, D and E[t] / e^(k[t] - R) for n tokens. A correction removes the rounding error of t w, which may be large."""
    one, bonus, decay = vset(1.0, W), vexp(u, W), vexp(w, W)
    vstore(target, 0, bonus * by_decay(w, n, decay, one, W), W)
    vstore(target, lanes, by_decay(w, n, one, decay, W), W)
    for t in range(n):
        minus = vset(-float(t + 1), W)
        x = by_decay(w, n, minus * w, vset(0.0, W), W)
        e = vexp(x, W)
        growth = fma(e, fma(minus, w, vset(0.0, W) - x), e)
        vstore(target, (t + 2) * lanes, by_decay(w, n, growth, one, W), W)


@inline
def finite(x, W):
    """Return x, and 0 where x is infinite or NaN, so that subtracting the result from a value cannot create a NaN."""
    return where_less(absolute(x), vset(np.inf, W), x, vset(0.0, W))


@inline
def maximum(x, y):
    """Return the greater value, and x where x or y is NaN."""
    return where_less(x, y, y, x)


@inline
def minimum(x, y):
    """Return the smaller value, and x where x or y is NaN."""
    return where_less(y, x, y, x)


@inline
def extremes(k, k_l, n, V):
    """Return the greatest and the lowest key of n >= 1 tokens."""
    top = low = top2 = low2 = vload(k, 0, V)  # two running pairs, because a maximum takes several cycles
    for t in range(n // 2):
        x, y = vload(k, 2 * t * k_l, V), vload(k, (2 * t + 1) * k_l, V)
        top, top2, low, low2 = maximum(top, x), maximum(top2, y), minimum(low, x), minimum(low2, y)
    x = vload(k, (n - 1) * k_l, V)
    return maximum(maximum(top, top2), x), minimum(minimum(low, low2), x)


@inline
def enter_shared_max_tile(first, top, low, tokens, ka, m, b, w, W):
    """Return (shared_max, key, m, factor) for a tile of at most ``tokens`` tokens.

    shared_max: True if the tile can share its maximum R = key - m w. factor: e^(o - R); a and b times it are relative to R.
    first, top and low are the first, the greatest and the lowest key of the tile.
    """
    zero, half = vset(0.0, W), vset(0.5, W)
    base = where_equal(b, zero, first, fma(zero - m, w, ka))
    top = maximum(base, top)
    jump, spread = vset(-_MAX_RISE, W), vset(-_MAX_FALL, W)
    shared_max = all_at_most(by_decay(w, tokens, jump, spread, W), by_decay(w, tokens, base, low, W) - top)
    old = where_equal(b, zero, zero, where_less(base, top, zero, vset(1.0, W)))  # 1 where R equals o
    entry = vexp(zero - fma(m, w, top - ka), W)
    return shared_max, where_less(half, old, ka, top), old * m, where_less(half, old, old, entry)


@inline
def exit_shared_max_tile(last, n, tokens, ka, m, a, b, w, W):
    """Return the state after a shared-maximum tile of n tokens, so that b is at least 1. ``last`` is the last key."""
    zero, one, minus = vset(0.0, W), vset(1.0, W), vset(-float(n), W)
    if all_at_most(vset(-_MAX_TILE_DECAY / tokens, W), w):
        return ka, m + minus, a, b
    d, x = fma(m, w, last - ka), vset(float(n), W) * w
    scale = by_decay(w, tokens, one, vexp(zero - where_less(x, d, d, x), W), W)
    fresh = by_decay(w, tokens, zero, where_less(x, d, one, zero), W)
    half = vset(0.5, W)
    return where_less(half, fresh, last, ka), where_less(half, fresh, zero, m + minus), a * scale, b * scale


@inline
def join(ka, m, a, b, ka2, m2, a2, b2, w, W):
    """Combine the states of two disjoint sets of tokens. Return the combined state and the weights of both."""
    zero = vset(0.0, W)
    d = fma(m - m2, w, ka2 - ka)
    A, E = pair_weights(d, W)
    return where_less(d, zero, ka, ka2), where_less(d, zero, m, m2), fma(E, a2, A * a), fma(E, b2, A * b), A, E


@inline
def exponent_error(ka, m, o, w, W):
    """Return (ka - m w) - o. The terms may be large and nearly equal, so this adds the rounding errors of m w and the sum."""
    n = vset(0.0, W) - m
    p = n * w
    total = ka + p
    back = total - ka
    lost = (ka - (total - back)) + (p - back) + fma(n, w, vset(0.0, W) - p)
    return (total - o) + lost


@inline
def rounding_factor(ka, m, o, w, W):
    """Return e^((ka - m w) - o), where o is ka - m w after rounding.

    Where two segments meet, o is the running maximum, and the exponent of a shared-maximum tile may differ from it by
    _MAX_TILE_DECAY. A difference above twice this limit is only rounding noise; the result is then 1.
    """
    x = exponent_error(ka, m, o, w, W)
    return vexp(where_less(vset(-2.0 * _MAX_TILE_DECAY, W), negative_abs(x), x, vset(0.0, W)), W)


@inline
def with_rounded_exponent(ka, m, a, b, w, W):
    """Return (a, b, o): the same state with its exponent as one number."""
    o = fma(vset(0.0, W) - m, w, ka)
    gap = rounding_factor(ka, m, o, w, W)
    return a * gap, b * gap, o


@inline
def rebase_exponent(ka, m, a, b, w, W):
    """Return the same state with at most FAR tokens since its key ka."""
    far, zero = vset(-FAR, W), vset(0.0, W)
    a2, b2, o = with_rounded_exponent(ka, m, a, b, w, W)
    return (
        where_less(m, far, o, ka),
        where_less(m, far, zero, m),
        where_less(m, far, a2, a),
        where_less(m, far, b2, b),
    )


@inline
def user_state(ybar, lse, at, W):
    """Return (ka, a, b) of a user's state. If the addresses are 0, return the state that has seen nothing."""
    zero, one, nothing = vset(0.0, W), vset(1.0, W), vset(-1e300 if W % 8 == F64 else -3.4028234663852886e38, W)
    if ybar == 0:
        return nothing, zero, zero
    y, o, empty = vload(ybar, at, W), vload(lse, at, W), vset(-np.inf, W)
    return where_equal(o, empty, nothing, o), where_equal(o, empty, zero, y), where_equal(o, empty, zero, one)


@inline
def gate(r, W):
    """Return (1 / sigmoid(r), e^-r). r is limited to -80 (float64: -700) from below, so that e^-r is finite."""
    least = vset(-80.0 if W % 8 != F64 else -700.0, W)
    e = vexp(vset(0.0, W) - where_less(r, least, least, r), W)
    return vset(1.0, W) + e, e


@inline
def channels(C, lanes, block, blocks):
    """Return a block's first vector and number of vectors. The last block includes the channels that do not fill a vector."""
    whole = C // lanes
    begin, end = whole * block // blocks, whole * (block + 1) // blocks
    return begin, end - begin + (1 if block == blocks - 1 and whole * lanes < C else 0)
