"""Spiking neurons under the names of ``spikingjelly.clock_driven.neuron``. They run on :func:`sdit_kernels.lif`.

The methods here are the definition. :mod:`sdit_kernels.compat.lif_nodes` runs them on the kernels, where the settings, the data
and the surrogate allow it; else a call runs this code, with a warning.
"""

import math
import sys
from abc import abstractmethod

import torch
from torch import nn

from ..spikingjelly import fuse_classes
from . import base, surrogate

_SIGMOID = surrogate.Sigmoid()  # the default of all neurons, one object as in SpikingJelly


def check_backend(backend: str):
    """Raise ValueError for a backend other than "torch" and "cupy". Both run the kernels of this package, without CuPy."""
    if backend == "lava":
        raise ValueError(
            'backend must be "torch" or "cupy", got "lava": neurons of Lava compute something else, and SpikingJelly has them'
        )
    if backend not in ("torch", "cupy"):
        raise ValueError(f'backend must be "torch" or "cupy", got {backend!r}')


def _check_tensor(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _check_number(name, value, above=-math.inf):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value > above:
        raise ValueError(f"{name} must be above {above}, got {value}")


class BaseNode(base.MemoryModule):
    r"""Base class of the neurons. A subclass defines ``neuronal_charge(x)``, which updates the membrane potential ``v``.

    ::

        charge  h[t] = neuronal_charge(x[t])
        fire    s[t] = surrogate_function(h[t] - v_threshold)
        reset   v[t] = (1 - s[t]) h[t] + s[t] v_reset,  or  h[t] - s[t] v_threshold  with v_reset=None

    Args:
        v_threshold: firing threshold.
        v_reset: membrane potential after a spike and at the start. None subtracts the threshold instead, and the start is 0.
        surrogate_function: the spike and its gradient, from ``clock_driven.surrogate``.
        detach_reset: True: no gradient flows through the s of the reset.

    Attributes:
        v (float | Tensor): membrane potential. A number before the first call and after ``reset``.

    Source: the interface of SpikingJelly 0.0.0.0.12.
    """

    def __init__(self, v_threshold=1.0, v_reset=0.0, surrogate_function=_SIGMOID, detach_reset=False):
        _check_number("v_threshold", v_threshold)
        if v_reset is not None:
            _check_number("v_reset", v_reset)
        if not isinstance(detach_reset, bool):
            raise TypeError(f"detach_reset must be a bool, got {type(detach_reset).__name__}")
        super().__init__()
        self.register_memory("v", 0.0 if v_reset is None else v_reset)
        self.register_memory("v_threshold", v_threshold)
        self.register_memory("v_reset", v_reset)
        self.detach_reset = detach_reset
        self.surrogate_function = surrogate_function

    @abstractmethod
    def neuronal_charge(self, x):
        raise NotImplementedError

    def neuronal_fire(self):
        return self.surrogate_function(self.v - self.v_threshold)

    def neuronal_reset(self, spike):
        if self.detach_reset:
            spike = spike.detach()
        if self.v_reset is None:
            self.v = self.v - spike * self.v_threshold
        else:
            self.v = (1 - spike) * self.v + spike * self.v_reset

    def _step(self, x):
        self.neuronal_charge(x)
        spike = self.neuronal_fire()
        self.neuronal_reset(spike)
        return spike

    def forward(self, x):
        _check_tensor("x", x)
        return self._step(x)

    def extra_repr(self):
        return f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, detach_reset={self.detach_reset}"


class _MultiStep(BaseNode):
    """Mixin of the neurons that take x_seq, (T, ...), and return (T, ...)."""

    def _add_steps(self, backend):
        check_backend(backend)
        self.register_memory("v_seq", None)
        self.backend = backend

    def forward(self, x_seq):
        _check_tensor("x_seq", x_seq)
        if x_seq.dim() < 2 or not x_seq.shape[0]:
            raise ValueError(f"x_seq must have at least two axes, (T, ...), and T at least 1, got {tuple(x_seq.shape)}")
        spikes, v_seq = [], []
        for x in x_seq:
            spikes.append(self._step(x))
            v_seq.append(self.v)
        self.v_seq = torch.stack(v_seq)
        return torch.stack(spikes)

    def extra_repr(self):
        return f"{super().extra_repr()}, backend={self.backend}"


class IFNode(BaseNode):
    r"""Integrate-and-fire neuron for one step: h[t] = v[t-1] + x[t].

    The other arguments are the same as in :class:`BaseNode`. ``cupy_fp32_inference`` has no effect.
    """

    def __init__(
        self,
        v_threshold=1.0,
        v_reset=0.0,
        surrogate_function=_SIGMOID,
        detach_reset=False,
        cupy_fp32_inference=False,
    ):
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.cupy_fp32_inference = cupy_fp32_inference

    def neuronal_charge(self, x):
        self.v = self.v + x


class MultiStepIFNode(_MultiStep, IFNode):
    r"""Integrate-and-fire neuron for T steps, x_seq (T, ...).

    Args:
        backend: "torch" or "cupy". Both run the kernels of this package.
        lava_s_cale: kept as an attribute; only SpikingJelly's Lava backend uses it.

    The other arguments are the same as in :class:`BaseNode`.

    Attributes:
        v_seq (Tensor | None): membrane potential after each of the T steps of the last call, (T, ...). It is computed when you
            read it.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.clock_driven import MultiStepIFNode
        >>> neuron = MultiStepIFNode(backend="cupy")
        >>> neuron(torch.full((4, 1), 0.75)).flatten().tolist(), neuron.v_seq.flatten().tolist()
        ([0.0, 1.0, 0.0, 1.0], [0.75, 0.0, 0.75, 0.0])
    """

    def __init__(
        self, v_threshold=1.0, v_reset=0.0, surrogate_function=_SIGMOID, detach_reset=False, backend="torch",
        lava_s_cale=1 << 6,
    ):  # fmt: skip
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self._add_steps(backend)
        self.lava_s_cale = lava_s_cale


class _LeakyNode(BaseNode):
    """Base class of the neurons with a leak: ``_leak(u)`` is u / tau."""

    def neuronal_charge(self, x):
        v_reset = 0.0 if self.v_reset is None else self.v_reset
        rest = self.v if v_reset == 0 else self.v - v_reset
        self.v = self.v + self._leak(x - rest) if self.decay_input else self.v - self._leak(rest) + x


class LIFNode(_LeakyNode):
    r"""Leaky integrate-and-fire neuron for one step.

    ::

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau    decay_input=True
        h[t] = v[t-1] - (v[t-1] - v_reset) / tau + x[t]      decay_input=False

    Args:
        tau: time constant in steps, above 1.
        decay_input: True: the leak divides the input by tau too.
        cupy_fp32_inference: no effect: every call runs the kernels.

    The other arguments are the same as in :class:`BaseNode`.
    """

    def __init__(
        self, tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0, surrogate_function=_SIGMOID,
        detach_reset=False, cupy_fp32_inference=False,
    ):  # fmt: skip
        _check_number("tau", tau, above=1)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau = tau
        self.decay_input = decay_input
        self.cupy_fp32_inference = cupy_fp32_inference

    def _leak(self, u):
        return u / self.tau

    def extra_repr(self):
        return f"{super().extra_repr()}, tau={self.tau}"


class MultiStepLIFNode(_MultiStep, LIFNode):
    r"""Leaky integrate-and-fire neuron for T steps, x_seq (T, ...). The equations are the same as in :class:`LIFNode`.

    Args:
        backend: "torch" or "cupy". Both run the kernels of this package.
        lava_s_cale: kept as an attribute; only SpikingJelly's Lava backend uses it.

    The other arguments are the same as in :class:`LIFNode`.

    Attributes:
        v_seq (Tensor | None): membrane potential after each of the T steps of the last call, (T, ...). It is computed when you
            read it.

    Raises:
        TypeError, ValueError: at construction if a setting has the wrong type or range, or for the backend "lava"; in a call if
            x_seq has fewer than two axes, or a step has not the shape of the membrane potential.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.clock_driven import MultiStepLIFNode
        >>> neuron = MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy")
        >>> neuron(torch.full((4, 1), 1.5)).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]
        >>> neuron.reset()
        >>> neuron.v
        0.0
    """

    def __init__(
        self, tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0, surrogate_function=_SIGMOID,
        detach_reset=False, backend="torch", lava_s_cale=1 << 6,
    ):  # fmt: skip
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset)
        self._add_steps(backend)
        self.lava_s_cale = lava_s_cale


class ParametricLIFNode(_LeakyNode):
    r"""A :class:`LIFNode` that learns its time constant: 1 / tau = sigmoid(w).

    Args:
        init_tau: initial tau, above 1: w = -log(init_tau - 1).

    The other arguments are the same as in :class:`LIFNode`.

    Attributes:
        w (torch.nn.Parameter): the learned parameter, ().
    """

    def __init__(
        self, init_tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0, surrogate_function=_SIGMOID,
        detach_reset=False,
    ):  # fmt: skip
        _check_number("init_tau", init_tau, above=1)
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.as_tensor(-math.log(init_tau - 1)))

    def _leak(self, u):
        return u * self.w.sigmoid()

    def extra_repr(self):
        return f"{super().extra_repr()}, tau={1 / self.w.detach().sigmoid()}"


class MultiStepParametricLIFNode(_MultiStep, ParametricLIFNode):
    r"""A :class:`MultiStepLIFNode` that learns its time constant: 1 / tau = sigmoid(w).

    The arguments are the same as in :class:`ParametricLIFNode`, and ``backend`` of :class:`MultiStepLIFNode`.
    """

    def __init__(
        self, init_tau=2.0, decay_input=True, v_threshold=1.0, v_reset=0.0, surrogate_function=_SIGMOID,
        detach_reset=False, backend="torch",
    ):  # fmt: skip
        super().__init__(init_tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset)
        self._add_steps(backend)


fuse_classes(sys.modules[__name__])

__getattr__ = base.refuse_names(
    "neuron", "AdaptiveBaseNode", "QIFNode", "EIFNode", "MultiStepEIFNode", "GeneralNode", "MultiStepGeneralNode", "LIAFNode"
)
