"""Surrogate derivatives in Triton, see ../surrogate.py."""

import math

import triton
import triton.language as tl

_ALPHA_PI_HALF: tl.constexpr = tl.constexpr(math.pi / 2)
_INVERSE_ROOT_PI: tl.constexpr = tl.constexpr(1 / math.sqrt(math.pi))


@triton.jit
def surrogate_derivative(z, alpha, KIND: tl.constexpr):
    """Surrogate gradient ds/dz; KIND is the id in SURROGATES."""
    tl.static_assert(KIND <= 8, "unknown surrogate")
    m = tl.abs(z)
    if KIND == 0:
        q = _ALPHA_PI_HALF * alpha * z
        return 0.5 * alpha / (1.0 + q * q)
    elif KIND == 1:
        e = tl.exp(-alpha * m)
        return alpha * e / ((1.0 + e) * (1.0 + e))
    elif KIND == 2:
        p = alpha - alpha * alpha * m
        return tl.where(p < 0.0, 0.0, p)  # not maximum: a NaN stays
    elif KIND == 3:
        return 0.5 * alpha * tl.exp(-alpha * m)
    elif KIND == 4:
        q = 1.0 + alpha * m
        return 0.5 * alpha / (q * q)
    elif KIND == 5:
        q = 1.0 + m
        return alpha / (q * q)
    elif KIND == 6:
        q = alpha * z
        return _INVERSE_ROOT_PI * alpha * tl.exp(-q * q)
    elif KIND == 7:
        return tl.where(m < 0.5 / alpha, alpha, 0.0)
    else:
        q = 1.0 + alpha * m
        return 1.0 / (q * q)
