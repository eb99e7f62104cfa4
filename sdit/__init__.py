"""SDiT, the Spiking Diffusion Transformer (arXiv 2402.11588), over sdit_kernels."""

from .config import PRESETS, Config
from .model import SDiT

__all__ = ["PRESETS", "Config", "SDiT"]
