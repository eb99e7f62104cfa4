"""The definitions in plain PyTorch, with the names and signatures of the public ops, for any floating dtype and device."""

from .mix import relu_squared, token_shift
from .neuron import adlif, cuba, lapicque, leaky, lif, lif_rate
from .norm import norm_lif
from .spiking_wkv import spiking_wkv
from .wkv import wkv, wkv_state_from_rwkv, wkv_state_to_rwkv, wkv_step, wkv_step_

__all__ = [
    "adlif",
    "cuba",
    "lapicque",
    "leaky",
    "lif",
    "lif_rate",
    "norm_lif",
    "relu_squared",
    "spiking_wkv",
    "token_shift",
    "wkv",
    "wkv_state_from_rwkv",
    "wkv_state_to_rwkv",
    "wkv_step",
    "wkv_step_",
]
