"""SDiT, the Spiking Diffusion Transformer (arXiv 2402.11588), built on sdit_kernels."""

from typing import TYPE_CHECKING

from .config import PRESETS, Config

if TYPE_CHECKING:
    from .model import SDiT

__all__ = ["PRESETS", "Config", "SDiT"]


def __getattr__(name):
    """Import the model at its first use: importing torch takes seconds, and Ctrl-C must stop the command line during them."""
    if name == "SDiT":
        from .model import SDiT

        return SDiT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
