"""The definitions, in plain PyTorch: same names and signatures as the public ops, any floating dtype, any device."""

from .lif import lif, lif_rate
from .mix import relu_squared, token_shift

__all__ = ["lif", "lif_rate", "relu_squared", "token_shift"]
