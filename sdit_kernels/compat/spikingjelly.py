r"""SpikingJelly's neurons on the fused kernels, in place: one line in an existing project.

>>> import torch
>>> from sdit_kernels.compat.spikingjelly import accelerate
>>> report = accelerate(torch.nn.Linear(2, 2))  # your model, before or after it was trained, moved or loaded
>>> print(report)
SpikingJelly: 0 replaced, 0 left as they were: nothing of SpikingJelly was found in the model

``LIFNode``, ``IFNode`` and ``ParametricLIFNode`` then run :func:`sdit_kernels.lif`, in both step modes. They stay what they
were: the same objects of the same class, with the same names, parameters, hooks, memories (``v``, ``v_seq``) and state_dict. So
everything that looks a neuron up by its class finds it: ``isinstance``, the NIR export, precision tables, rules of counters.
(The methods of SpikingJelly's classes ask each neuron whether it is fused; the other neurons run as before.)
``functional.reset_net``, ``set_step_mode``, ``detach_net``, ``base.to_functional_forward``, ``.to()``, copies, pickles and
``torch.compile(fullgraph=True)`` go on working. What is not replaced is in the report with the reason. SpikingJelly is not
imported: a model that has its neurons has imported it. Made for SpikingJelly 2.0.0; 0.0.0.0.14 works too, where ``backend``
keeps its value and no longer matters.

SpikingJelly's counters of operations, memory accesses, states and energy know the operators of PyTorch, not a fused kernel. So
the neurons run SpikingJelly's code under ``DispatchCounterMode`` and the profilers, with a warning, and the figures are the
same as before. Run the backward pass under the same counter as the forward pass. Other programs that count operators see one
operator, ``sdit_kernels.lif``: call :func:`restore` before.

Differences that remain:

- A step multiplies by 1/tau, where SpikingJelly divides by tau (``ParametricLIFNode``: by 1 / (1 + exp(-w)), where it takes
  sigmoid(w)). The same for tau a power of two; for others a membrane differs in its last bits, and so may the spike of a neuron
  whose membrane is that near to the threshold.
- bfloat16 and float16 data: the membrane is float32 within a call and rounded to the dtype of the data after it, where
  SpikingJelly on the CPU rounds it in every step.
- An infinite membrane that fires is reset, where 0 * inf makes it NaN there.
- The input of a neuron must not be modified in place afterwards (``s = node(y); y += s``): the backward pass recomputes the
  membrane from it, and autograd says "modified by an inplace operation". SpikingJelly does not keep its input. ``y = y + s``.
- A learnt ``v_threshold`` (a parameter in its place) gets its gradient, where SpikingJelly 2.0.0 gives it none.
- ``torch.fx`` cannot trace through a fused neuron, as it cannot through SpikingJelly's: the error says what to do.
- ``ParametricLIFNode``: a w below -80 (-700 in float64) counts as that, with no gradient; 1/tau is 2e-35 there.
- 0.0.0.0.14 in evaluation mode passes no gradient through spikes; here there is the surrogate's.
- Second derivatives and forward mode are refused (use ``sdit_kernels.backend("reference")``).
- A neuron that is given what the kernels do not have after ``accelerate`` (another surrogate, ``spiking=False``, a neuron
  precision, tau below 1, an infinite threshold, a NaN as w on the CPU, data of ints) runs SpikingJelly's code, with a warning
  in every such call.
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
    """(name, alpha) in the table here, or the reason why there is none."""
    kind = type(function)
    name = _SURROGATES.get(kind.__name__) if kind.__module__ == f"{_LIBRARY}.surrogate" else None
    if name is None:
        return f"surrogate {getattr(function, '__name__', kind.__name__)} has no formula here"
    if not function.spiking:
        return f"surrogate {kind.__name__} has spiking=False: its output is no spike"
    alpha = function.alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        return f"surrogate {kind.__name__} has an alpha that is no number but a {type(alpha).__name__}"
    if kind.__name__ == "QPseudoSpike" and alpha != 2:
        return f"surrogate QPseudoSpike has a formula here for alpha = 2 only, not {alpha}"
    if has_hooks(function):
        return f"surrogate {kind.__name__} has hooks, which the kernels would not call"
    return name, alpha


def _check(x, shape, **settings):
    """Raise what lif would, for data x whose steps have this shape."""
    _, _, v_threshold = check_neuron(x, shape[-1] if shape else None, **settings)
    if v_threshold is not None and values_are_readable(v_threshold):
        check_neuron_values(None, v_threshold, settings["decay_input"])


def _obstacle(neuron):
    """Why the kernels cannot do this now, None if they can."""
    if getattr(neuron, "_neuron_precision", None) is not None:
        return "a precision of its own is asked for, which the fused kernels do not have"
    found = _surrogate(neuron.surrogate_function)
    return found if isinstance(found, str) else None


def _ready(neuron, x, axes=0):
    """Arguments of lif for data x, with ``axes`` before those of a step; None, with a warning, where the library's own code
    must run."""
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
    """Why the kernels cannot have this tau or these data, None if they can."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DATA_DTYPES or x.dim() < axes:
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        return f"the kernels do not take its data, {what}"
    tau = getattr(neuron, "tau", 1)
    if not isinstance(tau, (int, float)):
        return f"tau is a {type(tau).__name__}, and the kernels' is a number"
    return None if tau >= 1 else f"tau is {tau}, and the kernels' is at least 1"


def _settings(neuron):
    """Arguments of lif that all three have."""
    surrogate, alpha = _surrogate(neuron.surrogate_function)
    return dict(
        v_threshold=neuron.v_threshold, v_reset=neuron.v_reset, detach_reset=neuron.detach_reset,
        surrogate=surrogate, alpha=alpha,
    )  # fmt: skip


def _start(neuron, x):
    """The membrane before a step x: None where it is at rest."""
    v, rest = neuron.v, 0.0 if neuron.v_reset is None else neuron.v_reset
    if isinstance(v, (int, float)):
        return None if v == rest else torch.full_like(x, v, requires_grad=False)
    if v.shape != x.shape:
        if hasattr(neuron, "materialize_states"):
            return None  # SpikingJelly 2 starts anew
        v = v.expand(x.shape)
    return v if v.dtype == x.dtype and v.device == x.device else v.to(x)


def _walk(x_seq, v, store, settings):
    """T steps from v: (spikes, v, v_seq or None), in the dtype of the data."""
    if v is not None and not torch.compiler.is_compiling() and v.is_inference() and not torch.is_inference_mode_enabled():
        v = v.clone()  # autograd keeps v, and refuses one that inference_mode made
    found = lif(x_seq, v, **settings, return_v=True, return_v_seq=store)
    spikes, *states = found
    v, v_seq = (state.to(x_seq.dtype) for state in states) if store else (states[0].to(x_seq.dtype), None)
    return spikes, v, v_seq


class _Node(Methods):
    """SpikingJelly's neuron, its charge, fire and reset in one kernel for all steps."""

    @staticmethod
    def single_step_forward(own, neuron, x, *args, **kwargs):
        settings = _ready(neuron, x)
        if settings is None:
            return own(neuron, x, *args, **kwargs)
        spikes, neuron.v, _ = _walk(x.unsqueeze(0), _start(neuron, x), False, settings)
        if neuron.store_v_seq and hasattr(neuron, "_append_v_seq"):  # SpikingJelly 2 collects the steps
            neuron._append_v_seq(neuron.v)
        return spikes.squeeze(0)

    @staticmethod
    def multi_step_forward(own, neuron, x_seq, *args, **kwargs):
        settings = _ready(neuron, x_seq, 1)
        if settings is None:
            return own(neuron, x_seq, *args, **kwargs)
        start = _start(neuron, x_seq[0]) if x_seq.shape[0] else None
        spikes, neuron.v, v_seq = _walk(x_seq, start, neuron.store_v_seq, settings)
        if neuron.store_v_seq or "v_seq" in neuron.__dict__:
            neuron.v_seq = v_seq
        return spikes

    @staticmethod
    def single_step_functional_forward(own, neuron, inputs, states, **kwargs):
        settings = _ready(neuron, inputs[0])
        if settings is None:
            return own(neuron, inputs, states, **kwargs)
        spikes, v, _ = _walk(inputs[0].unsqueeze(0), states[0], False, settings)
        return (spikes.squeeze(0),), (v, *states[1:])

    @staticmethod
    def multi_step_functional_forward(own, neuron, inputs, states, **kwargs):
        settings = _ready(neuron, inputs[0], 1)
        if settings is None:
            return own(neuron, inputs, states, **kwargs)
        spikes, v, _ = _walk(inputs[0], states[0], False, settings)
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
        exponent = (-neuron.w.to(wide)).clamp(max=700 if wide == torch.float64 else 80)  # an infinite tau has a NaN as gradient
        return {"tau": 1 + torch.exp(exponent), "decay_input": neuron.decay_input}


_MIXINS = {"LIFNode": _LIFNode, "IFNode": _IFNode, "ParametricLIFNode": _ParametricLIFNode}


def _is_neuron(module):
    """Whether its class, or one it derives from, is from a module of SpikingJelly for neurons."""
    parts = (cls.__module__.split(".") for cls in type(module).__mro__)
    return any(names[0] == "spikingjelly" and "neuron" in names for names in parts)


_suspect = suspected_neuron(f"LIFNode, IFNode or ParametricLIFNode of {_LIBRARY}.neuron")


def _choose(neurons):
    """module -> its mixin, the reason to leave it, or None: no neuron of SpikingJelly's."""
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
    """Let the LIFNode, IFNode and ParametricLIFNode of a SpikingJelly model run on the fused kernels.

    Args:
        model: any module that contains SpikingJelly's neurons, or is one; changed in place.

    Returns:
        A report to print: ``replaced``, pairs (name, class); ``left``, triples (name, class, reason), the neurons that stay
        as they were: of other kinds; subclasses that override what a neuron does; surrogates without a formula in
        ``sdit_kernels.SURROGATES``, with ``spiking=False``, with hooks or without a positive number as alpha; a neuron
        precision of their own; parametrized ones. Subclasses that only set defaults are replaced. A second call changes
        nothing more.

    Raises:
        TypeError: model is no module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.spikingjelly import accelerate, restore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))  # with SpikingJelly's neurons in it
        >>> accelerate(model).replaced
        ()
    """
    neurons = sys.modules.get(f"{_LIBRARY}.neuron")  # where nobody has imported it, the model cannot have any
    return swap("SpikingJelly", model, _choose(neurons), _suspect)


def restore(model: torch.nn.Module) -> Report:
    """Undo :func:`accelerate`: SpikingJelly's own code again, from the state that was reached.

    Args:
        model: what was given to ``accelerate``, or a part, copy or unpickled copy of it; changed in place.

    Returns:
        A report as that of ``accelerate``; ``replaced`` are the neurons that run SpikingJelly's code again.

    Raises:
        TypeError: model is no module.
    """
    return swap_back("SpikingJelly", model, _Node)
