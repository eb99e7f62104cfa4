"""Fused kernels for spiking transformers.

Letters: B batch, T simulation steps, L tokens, C channels.
"""

from . import nn
from .dispatch import backend
from .ops.lif import lif, lif_rate
from .ops.mix import relu_squared, token_shift
from .surrogate import SURROGATES

__version__ = "0.1.0"
__all__ = ["SURROGATES", "backend", "lif", "lif_rate", "nn", "relu_squared", "token_shift"]
