"""SDiT, the Spiking Diffusion Transformer (arXiv 2402.11588), over sdit_kernels."""

from typing import TYPE_CHECKING

from .config import PRESETS, Config

if TYPE_CHECKING:
    from .model import SDiT

__all__ = ["PRESETS", "Config", "SDiT"]


def __getattr__(name):
    """The model when it is asked for: it imports torch, during which the command line already has to answer Ctrl-C."""
    if name == "SDiT":
        from .model import SDiT

        return SDiT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
