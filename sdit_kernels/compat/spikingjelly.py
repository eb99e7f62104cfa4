r"""Run the neurons of a SpikingJelly model on the fused kernels, with one line in an existing project.

>>> import torch
>>> from sdit_kernels.compat.spikingjelly import accelerate
>>> report = accelerate(torch.nn.Linear(2, 2))  # your model, before or after you train, move or load it
>>> print(report)
SpikingJelly: 0 replaced, 0 left as they were: nothing of SpikingJelly was found in the model

``LIFNode``, ``IFNode`` and ``ParametricLIFNode`` then run :func:`sdit_kernels.lif`, in both step modes. Each neuron stays the
same object of the same class, with its names, parameters, hooks, states (``v``, ``v_seq``) and state_dict. So code that looks a
neuron up by its class still finds it, and ``base.to_functional_forward`` works too. This module does not import SpikingJelly.
It works with SpikingJelly 2.0.0 and 0.0.0.0.14; in the latter, the option ``backend`` keeps its value but has no effect.

The page "SpikingJelly" of the documentation lists the differences. The most important ones:

- A step multiplies by 1/tau; SpikingJelly divides by tau. The results are equal if tau is a power of two. For other tau, a
  neuron very close to its threshold may spike or not.
- bfloat16 and float16 data: the membrane potential is float32 within a call. SpikingJelly rounds it in every step on the CPU.
- Do not change the input of a neuron in place before the backward pass; autograd raises an error.
- ``ParametricLIFNode``: a w below -80 (-700 in float64) counts as -80 (-700) and gets no gradient; 1/tau is 2e-35 there.
- SpikingJelly's counters (``DispatchCounterMode``, the profilers) do not know a fused kernel. Under a counter, the neurons run
  SpikingJelly's code, with a warning, and the counts are the same as before. Run the backward pass under the same counter.
- After ``accelerate``, a neuron may get a setting or data that the kernels do not take: another surrogate, ``spiking=False``, a
  neuron precision, tau below 1, an infinite threshold, a NaN as w on the CPU, integer data. It then runs SpikingJelly's code,
  with a warning in each call.
"""

import math
import sys

import torch

from .._torch import has_hooks
from ..checks import check_neuron, check_neuron_values
from ..dispatch import backend
from ..dtypes import DATA_DTYPES, state_dtype
from ..ops.lif import lif
from ..ops.operator import values_are_readable
from .swap import (
    Methods,
    Report,
    changed_behaviour,
    counted,
    fused_methods,
    refuse_symbols,
    suspected_neuron,
    swap,
    swap_back,
    warn,
)

__all__ = ["accelerate", "restore"]

_SURROGATES = {
    "ATan": "atan",
    "Sigmoid": "sigmoid",
    "PiecewiseQuadratic": "piecewise_quadratic",
    "PiecewiseExp": "piecewise_exp",
    "SoftSign": "soft_sign",
    "SuperSpike": "super_spike",
    "Erf": "erf",
    "Rect": "rect",
    "QPseudoSpike": "fast_sigmoid",  # (1 + 2|z| / (alpha - 1))^-alpha at alpha = 2
}
_LIBRARY = "spikingjelly.activation_based"


def _surrogate(function):
    """Return (name, alpha) in our table of surrogates, or the reason why the surrogate is not in it."""
    kind = type(function)
    name = _SURROGATES.get(kind.__name__) if kind.__module__ == f"{_LIBRARY}.surrogate" else None
    if name is None:
        return f"surrogate {getattr(function, '__name__', kind.__name__)} has no formula here"
    if not function.spiking:
        return f"surrogate {kind.__name__} has spiking=False: its output is not a spike"
    alpha = function.alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        return f"surrogate {kind.__name__} has an alpha that is not a number but a {type(alpha).__name__}"
    if kind.__name__ == "QPseudoSpike" and alpha != 2:
        return f"surrogate QPseudoSpike has a formula here for alpha = 2 only, not {alpha}"
    if has_hooks(function):
        return f"surrogate {kind.__name__} has hooks, which the kernels would not call"
    return name, alpha


def _check(x, shape, **settings):
    """Run the checks of lif for data x; ``shape``: the shape of a step of x."""
    _, _, v_threshold = check_neuron(x, shape[-1] if shape else None, **settings)
    if v_threshold is not None and values_are_readable(v_threshold):
        check_neuron_values(None, v_threshold, settings["decay_input"])


def _obstacle(neuron):
    """Return the reason why the kernels cannot serve this neuron now, or None."""
    if getattr(neuron, "_neuron_precision", None) is not None:
        return "it has a neuron precision, which the fused kernels do not have"
    found = _surrogate(neuron.surrogate_function)
    return found if isinstance(found, str) else None


def _ready(neuron, x, axes=0):
    """Return the arguments of lif for data x. If SpikingJelly's code must run, warn and return None.

    ``axes``: number of axes of x before the axes of a step.
    """
    refuse_symbols(neuron, x)
    reason = counted() or _obstacle(neuron) or _not_taken(neuron, x, axes)
    if reason is None:
        try:
            found = _settings(neuron) | fused_methods(neuron)._leak(neuron, x)
            _check(x, x.shape[axes:], **found)
            return found
        except (TypeError, ValueError) as error:
            reason = f"the kernels refuse its settings: {error}"
    warn(f"{type(neuron).__name__} runs SpikingJelly's own code: {reason}", 6)
    return None


def _not_taken(neuron, x, axes):
    """Return the reason why the kernels cannot take this tau or this data, or None."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DATA_DTYPES or x.dim() < axes:
        found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        return f"the kernels do not take its data, {found}"
    tau = getattr(neuron, "tau", 1)
    if not isinstance(tau, (int, float)):
        return f"tau is a {type(tau).__name__}, and the kernels need a number"
    return None if tau >= 1 else f"tau is {tau}, and the kernels need at least 1"


def _settings(neuron):
    """Return the arguments of lif that all three neurons share."""
    surrogate, alpha = _surrogate(neuron.surrogate_function)
    return dict(
        v_threshold=neuron.v_threshold, v_reset=neuron.v_reset, detach_reset=neuron.detach_reset,
        surrogate=surrogate, alpha=alpha,
    )  # fmt: skip


def _start(neuron, x):
    """Return the membrane before a step x; None if it is at rest."""
    v, rest = neuron.v, 0.0 if neuron.v_reset is None else neuron.v_reset
    if isinstance(v, (int, float)):
        return None if v == rest else torch.full_like(x, v, requires_grad=False)
    if v.shape != x.shape:
        if hasattr(neuron, "materialize_states"):
            return None  # SpikingJelly 2 starts from rest
        v = v.expand(x.shape)
    return v if v.dtype == x.dtype and v.device == x.device else v.to(x)


def _run_steps(x_seq, v, store, settings):
    """Run T steps from v. Return (spikes, v, v_seq or None), in the dtype of the data."""
    if v is not None and not torch.compiler.is_compiling() and v.is_inference() and not torch.is_inference_mode_enabled():
        v = v.clone()  # autograd saves v, and refuses a tensor that was made in inference_mode
    found = lif(x_seq, v, **settings, return_v=True, return_v_seq=store)
    spikes, *states = found
    v, v_seq = (state.to(x_seq.dtype) for state in states) if store else (states[0].to(x_seq.dtype), None)
    return spikes, v, v_seq


class _Node(Methods):
    """Methods of SpikingJelly's neurons that run charge, fire and reset of all steps in one kernel."""

    @staticmethod
    def single_step_forward(own, neuron, x, *args, **kwargs):
        settings = _ready(neuron, x)
        if settings is None:
            return own(neuron, x, *args, **kwargs)
        spikes, neuron.v, _ = _run_steps(x.unsqueeze(0), _start(neuron, x), False, settings)
        if neuron.store_v_seq and hasattr(neuron, "_append_v_seq"):  # SpikingJelly 2 collects the steps
            neuron._append_v_seq(neuron.v)
        return spikes.squeeze(0)

    @staticmethod
    def multi_step_forward(own, neuron, x_seq, *args, **kwargs):
        settings = _ready(neuron, x_seq, 1)
        if settings is None:
            return own(neuron, x_seq, *args, **kwargs)
        start = _start(neuron, x_seq[0]) if x_seq.shape[0] else None
        spikes, neuron.v, v_seq = _run_steps(x_seq, start, neuron.store_v_seq, settings)
        if neuron.store_v_seq or "v_seq" in neuron.__dict__:
            neuron.v_seq = v_seq
        return spikes

    @staticmethod
    def single_step_functional_forward(own, neuron, inputs, states, **kwargs):
        settings = _ready(neuron, inputs[0])
        if settings is None:
            return own(neuron, inputs, states, **kwargs)
        spikes, v, _ = _run_steps(inputs[0].unsqueeze(0), states[0], False, settings)
        return (spikes.squeeze(0),), (v, *states[1:])

    @staticmethod
    def multi_step_functional_forward(own, neuron, inputs, states, **kwargs):
        settings = _ready(neuron, inputs[0], 1)
        if settings is None:
            return own(neuron, inputs, states, **kwargs)
        spikes, v, _ = _run_steps(inputs[0], states[0], False, settings)
        return (spikes,), (v, *states[1:])


class _LIFNode(_Node):
    @staticmethod
    def _leak(neuron, x):
        return {"tau": neuron.tau, "decay_input": neuron.decay_input}


class _IFNode(_Node):
    @staticmethod
    def _leak(neuron, x):
        return {"tau": math.inf, "decay_input": False}


class _ParametricLIFNode(_Node):
    @staticmethod
    def _leak(neuron, x):
        if values_are_readable(neuron.w) and math.isnan(neuron.w.detach().sum().item()):
            raise ValueError("w is NaN")
        wide = torch.promote_types(neuron.w.dtype, state_dtype(x.dtype))
        limit = 700 if wide == torch.float64 else 80  # the gradient of an infinite tau would be NaN
        exponent = (-neuron.w.to(wide)).clamp(max=limit)
        return {"tau": 1 + torch.exp(exponent), "decay_input": neuron.decay_input}


_MIXINS = {"LIFNode": _LIFNode, "IFNode": _IFNode, "ParametricLIFNode": _ParametricLIFNode}


def _is_neuron(module):
    """True if the class of the module, or a base class, comes from a neuron module of SpikingJelly."""
    parts = (cls.__module__.split(".") for cls in type(module).__mro__)
    return any(names[0] == "spikingjelly" and "neuron" in names for names in parts)


_suspect = suspected_neuron(f"LIFNode, IFNode or ParametricLIFNode of {_LIBRARY}.neuron")


def _choose(neurons):
    """Return a function: module -> its methods, the reason to leave it, or None for other modules."""
    bases = {getattr(neurons, name): mixin for name, mixin in _MIXINS.items() if neurons is not None}

    def choose(module):
        base = next((cls for cls in type(module).__mro__ if cls in bases), None)
        if base is None:
            return "this kind of neuron has no fused kernel here" if _is_neuron(module) else None
        mixin = bases[base]
        reason = changed_behaviour(module, base) or _obstacle(module)
        if reason is not None:
            return reason
        device = next((p.device for p in module.parameters(recurse=False)), "cpu")
        try:
            x = torch.empty(0, device=device, dtype=torch.float32)
            with backend("reference"):
                lif(x, **_settings(module), **mixin._leak(module, x))
        except (TypeError, ValueError) as error:
            return f"the kernels refuse its settings: {error}"
        return mixin

    return choose


def accelerate(model: torch.nn.Module) -> Report:
    """Run the LIFNode, IFNode and ParametricLIFNode neurons of a SpikingJelly model on the fused kernels.

    Args:
        model: a neuron of SpikingJelly, or any module that contains some. The function changes it in place. A second call
            changes nothing more.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of the
        neurons that did not change: other neurons; subclasses that override more than defaults; surrogates without a formula in
        ``sdit_kernels.SURROGATES``, with ``spiking=False``, with hooks, or with an alpha that is not a positive number; neurons
        with a neuron precision; parametrized modules.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.spikingjelly import accelerate, restore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))  # with SpikingJelly's neurons in it
        >>> accelerate(model).replaced
        ()
    """
    neurons = sys.modules.get(f"{_LIBRARY}.neuron")  # if it is not imported, the model cannot contain its neurons
    return swap("SpikingJelly", model, _choose(neurons), _suspect)


def restore(model: torch.nn.Module) -> Report:
    """Undo :func:`accelerate`: the neurons run SpikingJelly's own code again and keep their state.

    Args:
        model: the model that ``accelerate`` changed, or a part, copy or unpickled copy of it. The function changes it in place.

    Returns:
        A report like the report of ``accelerate``. ``replaced`` holds the neurons that run SpikingJelly's code again.

    Raises:
        TypeError: model is not a module.
    """
    return swap_back("SpikingJelly", model, _Node)
