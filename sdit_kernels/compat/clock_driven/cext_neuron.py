r"""The neurons of ``spikingjelly.cext.neuron`` on the kernels of this package, without a CUDA extension.

Old versions of SpikingJelly compile this module. Some models import it, for example Spike-Element-Wise ResNet. The equations
are the same as in ``clock_driven.neuron``; the surrogate is a name, "ATan" or "Sigmoid", and a number alpha.
"""

from . import neuron, surrogate

_SURROGATES = {"ATan": surrogate.ATan, "Sigmoid": surrogate.Sigmoid}


def _make_surrogate(name, alpha):
    if name not in _SURROGATES:
        raise ValueError(f'surrogate_function must be "ATan" or "Sigmoid", got {name!r}')
    return _SURROGATES[name](alpha=alpha)


class IFNode(neuron.IFNode):
    """``clock_driven.neuron.IFNode`` with the arguments of ``cext.neuron``."""

    def __init__(self, v_threshold=1.0, v_reset=0.0, surrogate_function="ATan", alpha=2.0, detach_reset=False):
        super().__init__(v_threshold, v_reset, _make_surrogate(surrogate_function, alpha), detach_reset)


class MultiStepIFNode(neuron.MultiStepIFNode):
    """``clock_driven.neuron.MultiStepIFNode`` with the arguments of ``cext.neuron``."""

    def __init__(self, v_threshold=1.0, v_reset=0.0, surrogate_function="ATan", alpha=2.0, detach_reset=False):
        super().__init__(v_threshold, v_reset, _make_surrogate(surrogate_function, alpha), detach_reset)


class LIFNode(neuron.LIFNode):
    """``clock_driven.neuron.LIFNode`` with the arguments of ``cext.neuron``."""

    def __init__(self, tau=100.0, v_threshold=1.0, v_reset=0.0, surrogate_function="ATan", alpha=2.0, detach_reset=False):
        super().__init__(tau, True, v_threshold, v_reset, _make_surrogate(surrogate_function, alpha), detach_reset)


class MultiStepLIFNode(neuron.MultiStepLIFNode):
    """``clock_driven.neuron.MultiStepLIFNode`` with the arguments of ``cext.neuron``."""

    def __init__(self, tau=100.0, v_threshold=1.0, v_reset=0.0, surrogate_function="ATan", alpha=2.0, detach_reset=False):
        super().__init__(tau, True, v_threshold, v_reset, _make_surrogate(surrogate_function, alpha), detach_reset)


class ParametricLIFNode(neuron.ParametricLIFNode):
    """``clock_driven.neuron.ParametricLIFNode`` with the arguments of ``cext.neuron``.

    Only ``init_tau`` is positional, because the versions of SpikingJelly have the other arguments in different orders.
    """

    def __init__(
        self, init_tau=2.0, *, v_threshold=1.0, v_reset=0.0, surrogate_function="ATan", alpha=2.0, detach_reset=False
    ):  # fmt: skip
        super().__init__(init_tau, True, v_threshold, v_reset, _make_surrogate(surrogate_function, alpha), detach_reset)


class MultiStepParametricLIFNode(neuron.MultiStepParametricLIFNode):
    """``clock_driven.neuron.MultiStepParametricLIFNode`` with the arguments of :class:`ParametricLIFNode`."""

    def __init__(
        self, init_tau=2.0, *, v_threshold=1.0, v_reset=0.0, surrogate_function="ATan", alpha=2.0, detach_reset=False
    ):  # fmt: skip
        super().__init__(init_tau, True, v_threshold, v_reset, _make_surrogate(surrogate_function, alpha), detach_reset)
