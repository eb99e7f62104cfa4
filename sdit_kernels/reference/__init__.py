"""The definitions, in plain PyTorch: same names and signatures as the public ops, any floating dtype, any device."""

from .lif import lif, lif_rate

__all__ = ["lif", "lif_rate"]
