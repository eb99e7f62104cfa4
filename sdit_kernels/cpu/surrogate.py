"""Surrogate gradients for numba code. ../surrogate.py has the table of all kinds."""

import math

from .compiler import inline
from .vector import absolute, exp_below, negative_abs, vset, where_less


@inline
def surrogate_derivative(kind, z, a, V):
    """Return ds/dz of a vector of type V, or of a number if V is a storage code."""
    zero, half, one = vset(0.0, V), vset(0.5, V), vset(1.0, V)
    m = absolute(z)
    if kind == 0:
        q = vset(0.5 * math.pi, V) * a * z
        return half * a / (one + q * q)
    if kind == 1:
        e = exp_below(negative_abs(a * m), V)
        return a * e / ((one + e) * (one + e))
    if kind == 2:
        p = a - a * a * m
        return where_less(p, zero, zero, p)
    if kind == 3:
        return half * a * exp_below(negative_abs(a * m), V)
    if kind == 4:
        q = one + a * m
        return half * a / (q * q)
    if kind == 5:
        q = one + m
        return a / (q * q)
    if kind == 6:
        q = a * z
        return vset(1.0 / math.sqrt(math.pi), V) * a * exp_below(negative_abs(q * q), V)
    if kind == 7:
        return where_less(m, half / a, a, zero)
    q = one + a * m
    return one / (q * q)
