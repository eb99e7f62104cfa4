"""Surrogate derivatives g(z) with z = h - v_threshold: (default alpha, formula). Formulas take numpy arrays or torch
tensors."""

import math

import numpy as np


def _exp(z):
    return z.exp() if hasattr(z, "exp") else np.exp(z)


def _number(condition, z):
    return condition.to(z.dtype) if hasattr(condition, "to") else condition.astype(z.dtype)


def _sigmoid(z):
    """Use one of two forms, so that the argument of exp is never positive."""
    e = _exp(-abs(z))
    return (z >= 0) * (1 / (1 + e)) + (z < 0) * (e / (1 + e))


SURROGATES = {
    "atan": (2.0, lambda z, a: (a / 2) / (1 + (math.pi / 2 * a * z) ** 2)),
    "sigmoid": (4.0, lambda z, a: a * _sigmoid(a * z) * _sigmoid(-a * z)),
    "piecewise_quadratic": (1.0, lambda z, a: (a - a * a * abs(z)).clip(0)),
    "piecewise_exp": (1.0, lambda z, a: (a / 2) * _exp(-a * abs(z))),
    "soft_sign": (2.0, lambda z, a: (a / 2) / (1 + a * abs(z)) ** 2),
    "super_spike": (1.0, lambda z, a: a / (1 + abs(z)) ** 2),
    "erf": (2.0, lambda z, a: (a / math.sqrt(math.pi)) * _exp(-((a * z) ** 2))),
    "rect": (1.0, lambda z, a: _number(abs(z) < 1 / (2 * a), z) * a),
    "fast_sigmoid": (25.0, lambda z, a: 1 / (1 + a * abs(z)) ** 2),
}


def derivative(name, alpha):
    """Return g as a function of z."""
    default, formula = SURROGATES[name]
    return lambda z: formula(z, default if alpha is None else alpha)
