"""Surrogate gradients: they replace d spike / d z, z = h - v_threshold, in the backward pass.

The forward pass uses the step function. Names, formulas and default alphas are SpikingJelly's; ``fast_sigmoid`` is snnTorch's.
The reference, the CPU kernels and the Triton kernels use the same table. The kernels identify a surrogate by its ``id``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    id: int  # the kernels select the formula by it
    alpha: float  # default sharpness
    formula: str
    derivative: Callable[[Tensor, float], Tensor]


SURROGATES = {
    "atan": Surrogate(0, 2.0, "(a/2) / (1 + (pi/2 a z)^2)", lambda z, a: (a / 2) / (1 + (math.pi / 2 * a * z) ** 2)),
    "sigmoid": Surrogate(1, 4.0, "a sig(a z) (1 - sig(a z))", lambda z, a: a * torch.sigmoid(a * z) * torch.sigmoid(-a * z)),
    "piecewise_quadratic": Surrogate(2, 1.0, "max(0, a - a^2 |z|)", lambda z, a: (a - a * a * z.abs()).clamp(min=0)),
    "piecewise_exp": Surrogate(3, 1.0, "(a/2) exp(-a |z|)", lambda z, a: (a / 2) * torch.exp(-a * z.abs())),
    "soft_sign": Surrogate(4, 2.0, "(a/2) / (1 + a |z|)^2", lambda z, a: (a / 2) / (1 + a * z.abs()) ** 2),
    "super_spike": Surrogate(5, 1.0, "a / (1 + |z|)^2", lambda z, a: a / (1 + z.abs()) ** 2),
    "erf": Surrogate(
        6, 2.0, "(a / sqrt(pi)) exp(-(a z)^2)", lambda z, a: (a / math.sqrt(math.pi)) * torch.exp(-((a * z) ** 2))
    ),
    "rect": Surrogate(7, 1.0, "a where |z| < 1/(2a), else 0", lambda z, a: a * (z.abs() < 1 / (2 * a)).to(z.dtype)),
    "fast_sigmoid": Surrogate(8, 25.0, "1 / (1 + a |z|)^2", lambda z, a: 1 / (1 + a * z.abs()) ** 2),
}
