"""Fused kernels for spiking transformers.

The letters in shapes: B batch, T time steps, L tokens, C channels.
"""

from . import neuron as neuron
from . import nn as nn  # not in __all__: "from sdit_kernels import *" would replace torch's nn
from .dispatch import backend
from .levels import Levels
from .ops.cuba import adlif, cuba
from .ops.leaky import lapicque, leaky
from .ops.lif import lif, lif_rate
from .ops.mix import relu_squared, token_shift
from .ops.norm_lif import norm_lif
from .ops.operator import refuse_script as _refuse_script
from .ops.spiking_wkv import spiking_wkv
from .ops.wkv import wkv, wkv_state_from_rwkv, wkv_state_to_rwkv, wkv_step, wkv_step_
from .own import define as _define
from .packed import packed_spikes
from .surrogate import SURROGATES

__version__ = "0.1.0"
__all__ = [
    "Levels",
    "SURROGATES",
    "adlif",
    "backend",
    "cuba",
    "lapicque",
    "leaky",
    "lif",
    "lif_rate",
    "norm_lif",
    "packed_spikes",
    "relu_squared",
    "token_shift",
    "spiking_wkv",
    "wkv",
    "wkv_state_from_rwkv",
    "wkv_state_to_rwkv",
    "wkv_step",
    "wkv_step_",
]

neuron.define = _define  # neuron/ cannot import it, because it builds on the ops, which import neuron/

for _name in __all__:  # torch.jit.script calls this hook, which raises an error that names the alternatives
    if _name not in ("Levels", "SURROGATES", "backend", "packed_spikes"):
        globals()[_name].__prepare_scriptable__ = _refuse_script
