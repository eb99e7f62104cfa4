r"""The neurons of ``spikingjelly.clock_driven`` on the kernels of this package, without SpikingJelly and without CuPy.

>>> import torch
>>> from sdit_kernels.compat.clock_driven import MultiStepLIFNode, functional
>>> net = torch.nn.Sequential(MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy"))
>>> net(torch.full((4, 1), 1.5)).flatten().tolist()
[0.0, 1.0, 0.0, 1.0]
>>> functional.reset_net(net)

Names, arguments, attributes, repr, state_dict and surrogates equal SpikingJelly 0.0.0.0.12, the last version with this
package; checkpoints load both ways. The page "SpikingJelly" of the documentation lists the differences. Use
:func:`sdit_kernels.compat.install` to serve the import ``from spikingjelly.clock_driven...`` of existing code.
"""

from ..imports import install
from . import base, encoding, functional, layer, neuron, surrogate
from .neuron import IFNode, LIFNode, MultiStepIFNode, MultiStepLIFNode, MultiStepParametricLIFNode, ParametricLIFNode

__all__ = [
    "IFNode", "LIFNode", "MultiStepIFNode", "MultiStepLIFNode", "MultiStepParametricLIFNode", "ParametricLIFNode",
    "base", "encoding", "functional", "install", "layer", "neuron", "surrogate",
]  # fmt: skip

__getattr__ = base.refuse_names(
    "clock_driven", "ann2snn", "cu_kernel_opt", "examples", "lava_exchange", "model", "monitor", "neuron_kernel", "rnn",
    "spike_op", "tensor_cache",
)  # fmt: skip
