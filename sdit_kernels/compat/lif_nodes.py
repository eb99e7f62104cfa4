"""Methods that run SpikingJelly's neurons on :func:`sdit_kernels.lif`, for both of its interfaces.

``activation_based`` (0.0.0.0.14 and 2.x) has one class for a neuron, with a ``step_mode``. ``clock_driven`` (until 0.0.0.0.12)
has two: ``LIFNode`` for one step, and ``MultiStepLIFNode`` for T steps.
"""

import copy
import functools
import inspect
import itertools
import math
import numbers
import re
import sys

import torch

from .._torch import assume_constant_result, has_hooks
from ..checks import check_levels_fit, check_neuron, check_neuron_values
from ..dispatch import backend
from ..dtypes import DATA_DTYPES, state_dtype
from ..levels import Levels, encode
from ..ops.lif import lif
from ..ops.operator import values_are_readable
from ..pending import keep_waiting, without_values
from .swap import Methods, counted, fused_methods, refuse_symbols, replace_methods, warn

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
_TRUSTED_PACKAGES = ("spikingjelly.activation_based.", "spikingjelly.clock_driven.", "sdit_kernels.compat.clock_driven.")
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_SURROGATE_FILES = (".activation_based.surrogate", ".clock_driven.surrogate")


def find_surrogate(function):
    """Return (name, alpha) in our table of surrogates, or the reason why the surrogate is not in it."""
    kind = type(function)
    name = _SURROGATES.get(kind.__name__) if kind.__module__.endswith(_SURROGATE_FILES) else None
    if name is None or not _computes(kind, name):
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


def _surrogate(neuron):
    """Return the arguments of lif for the surrogate of a neuron, or the reason why there are none."""
    found = find_surrogate(neuron.surrogate_function)
    return found if isinstance(found, str) else {"surrogate": found[0], "alpha": found[1]}


def _integers(neuron):
    """Return the arguments of lif for the integer spikes of an ILIFNode, or the reason why there are none."""
    function = neuron.surrogate_function
    kind = type(function)
    if kind.__name__ != "MultiLevelSpikeCount" or not is_trusted(kind) or not kind.__module__.endswith(_SURROGATE_FILES):
        return f"its surrogate {getattr(function, '__name__', kind.__name__)} is not SpikingJelly's MultiLevelSpikeCount"
    if not function.spiking:
        return "surrogate MultiLevelSpikeCount has spiking=False: its output is not a spike"
    if has_hooks(function):
        return "surrogate MultiLevelSpikeCount has hooks, which the kernels would not call"
    return {"levels": Levels(0, function.max_spike_count, (function.grad_min, function.grad_max))}


def _check(x, shape, **settings):
    """Run the checks of lif for data x; ``shape``: the shape of a step of x."""
    defaults = {"surrogate": "atan", "alpha": None}
    _, _, v_threshold = check_neuron(x, shape[-1] if shape else None, **defaults | settings)
    levels = settings.get("levels")
    if v_threshold is not None and values_are_readable(v_threshold):
        check_neuron_values(None, v_threshold, settings["decay_input"], levels=encode(levels))
    if levels is not None:
        check_levels_fit(levels, x.dtype, "the dtype of the data")


def find_firing(neuron, methods):
    """Return the arguments of lif that tell how a neuron fires, or the reason why the kernels cannot serve it now.

    ``methods``: what replaces its methods.
    """
    if getattr(neuron, "_neuron_precision", None) is not None:
        return "it has a neuron precision, which the fused kernels do not have"
    return methods.firing(neuron)


def _ready(neuron, x, axes=0):
    """Return the arguments of lif for data x. If SpikingJelly's code must run, warn and return None.

    x: as ``without_values`` returns it. ``axes``: number of axes of x before the axes of a step.
    """
    refuse_symbols(neuron, x)
    methods = fused_methods(neuron)
    firing = find_firing(neuron, methods)
    reason = counted() or (firing if isinstance(firing, str) else None) or _not_taken(neuron, x, axes)
    if reason is None:
        try:
            found = neuron_settings(neuron, firing, methods.leak(neuron, x))
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


def neuron_settings(neuron, firing, leak):
    """Return the arguments of lif for a neuron. firing, leak: those that tell how it fires and leaks."""
    shared = dict(v_threshold=neuron.v_threshold, v_reset=neuron.v_reset, detach_reset=neuron.detach_reset)
    return shared | firing | leak


def _start(neuron, x, axes=0):
    """Return the membrane before the first step of x; None if it is at rest. axes: as in ``_ready``."""
    v, rest = neuron.v, 0.0 if neuron.v_reset is None else neuron.v_reset
    if not isinstance(v, torch.Tensor):
        if not isinstance(v, (int, float, numbers.Real)):  # the last: scalars of NumPy
            raise TypeError(f"v of {type(neuron).__name__} must be a number or a tensor, got {type(v).__name__}")
        return None if v == rest else torch.full(x.shape[axes:], float(v), dtype=x.dtype, device=x.device)
    if v.shape != x.shape[axes:]:
        if hasattr(neuron, "materialize_states"):
            return None  # SpikingJelly 2 starts from rest
        v = v.expand(x.shape[axes:])
    return v if v.dtype == x.dtype and v.device == x.device else v.to(x)


def _run_steps(x_seq, v, store, settings):
    """Run T steps from v. Return (spikes, v, v_seq or None), in the dtype of the data."""
    dtype = without_values(x_seq).dtype
    if v is not None and not torch.compiler.is_compiling() and v.is_inference() and not torch.is_inference_mode_enabled():
        v = v.clone()  # autograd saves v, and refuses a tensor that was made in inference_mode
    found = lif(x_seq, v, **settings, return_v=True, return_v_seq=store)
    spikes, *states = found
    v, *v_seq = [state if state.dtype == dtype else state.to(dtype) for state in states]
    return spikes, v, v_seq[0] if store else None


class Node(Methods):
    """Methods of SpikingJelly's neurons that run charge, fire and reset of all steps in one kernel.

    ``firing`` and ``leak`` return the arguments of lif that tell how it fires and how it leaks.
    """

    firing = staticmethod(_surrogate)

    @staticmethod
    def single_step_forward(own, neuron, x, *args, **kwargs):
        readable = without_values(x)
        settings = _ready(neuron, readable)
        if settings is None:
            return own(neuron, x, *args, **kwargs)
        spikes, neuron.v, _ = _run_steps(x.unsqueeze(0), _start(neuron, readable), False, settings)
        if neuron.store_v_seq and hasattr(neuron, "_append_v_seq"):  # SpikingJelly 2 collects the steps
            neuron._append_v_seq(neuron.v)
        return spikes.squeeze(0)

    @staticmethod
    def multi_step_forward(own, neuron, x_seq, *args, **kwargs):
        x = without_values(x_seq)
        settings = _ready(neuron, x, 1)
        if settings is None or not x.shape[0]:  # SpikingJelly has an error for T = 0
            return own(neuron, x_seq, *args, **kwargs)
        v = _start(neuron, x, 1)
        spikes, neuron.v, v_seq = _run_steps(x_seq, v, neuron.store_v_seq, settings)
        if neuron.store_v_seq or "v_seq" in neuron.__dict__:
            neuron.v_seq = v_seq
        return spikes

    @staticmethod
    def single_step_functional_forward(own, neuron, inputs, states, **kwargs):
        settings = _ready(neuron, without_values(inputs[0]))
        if settings is None:
            return own(neuron, inputs, states, **kwargs)
        spikes, v, _ = _run_steps(inputs[0].unsqueeze(0), states[0], False, settings)
        return (spikes.squeeze(0),), (v, *states[1:])

    @staticmethod
    def multi_step_functional_forward(own, neuron, inputs, states, **kwargs):
        settings = _ready(neuron, without_values(inputs[0]), 1)
        if settings is None:
            return own(neuron, inputs, states, **kwargs)
        spikes, v, _ = _run_steps(inputs[0], states[0], False, settings)
        return (spikes,), (v, *states[1:])


class _LIFNode(Node):
    @staticmethod
    def leak(neuron, x):
        return {"tau": neuron.tau, "decay_input": neuron.decay_input}


class _IFNode(Node):
    @staticmethod
    def leak(neuron, x):
        return {"tau": math.inf, "decay_input": False}


class _ILIFNode(_LIFNode):
    firing = staticmethod(_integers)


class _TernaryLIFNode(_LIFNode):
    @staticmethod
    def firing(neuron):
        found = _surrogate(neuron)
        return found if isinstance(found, str) else found | {"levels": "ternary"}


class _TernaryIFNode(_IFNode):
    firing = staticmethod(_TernaryLIFNode.firing)


class _ParametricLIFNode(Node):
    @staticmethod
    def leak(neuron, x):
        if values_are_readable(neuron.w) and math.isnan(neuron.w.detach().sum().item()):
            raise ValueError("w is NaN")
        wide = torch.promote_types(neuron.w.dtype, state_dtype(x.dtype))
        limit = 700 if wide == torch.float64 else 80  # the gradient of an infinite tau would be NaN
        exponent = (-neuron.w.to(wide)).clamp(max=limit)
        return {"tau": 1 + torch.exp(exponent), "decay_input": neuron.decay_input}


# --- clock_driven -----------------------------------------------------------------------------------------------------------


class _LastCall:
    """Input of the last call of a neuron, from which its membrane potentials are computed when somebody reads ``v_seq``."""

    def __init__(self, x_seq, v, settings, needs_grad, was_changed=False):
        self.x_seq, self.v, self.settings = x_seq, v, settings
        self.needs_grad = needs_grad  # autograd was on in the call, and detach was not called since
        self.was_changed = was_changed  # this is a copy, and its original was changed before
        self.versions = None if torch.compiler.is_compiling() else self._count_changes()

    def _count_changes(self):
        """Return the numbers of changes in place; inference tensors have none."""
        tensors = (without_values(self.x_seq), self.v, *self.settings.values())
        return [t._version for t in tensors if isinstance(t, torch.Tensor) and not t.is_inference()]

    def changed(self) -> bool:
        """True if an input was changed in place after the call. The inputs of a compiled call do not tell."""
        return self.was_changed or (self.versions is not None and self.versions != self._count_changes())

    def __reduce__(self):  # the tensors of a copy count changes from 0
        return _LastCall, (self.x_seq, self.v, self.settings, self.needs_grad, self.changed())

    def detached(self):
        x_seq, v, *values = (
            t.detach() if isinstance(t, torch.Tensor) else t for t in (self.x_seq, self.v, *self.settings.values())
        )
        return _LastCall(x_seq, v, dict(zip(self.settings, values)), False, self.changed())

    def v_seq(self):
        if self.changed():
            raise RuntimeError(
                "v_seq is computed when it is read, from the input of the neuron, and this input was changed in place after "
                "the call: read v_seq before, or change a copy of the input"
            )
        with torch.set_grad_enabled(self.needs_grad):
            return _run_steps(self.x_seq, self.v, True, self.settings)[2]


def _same_shape(neuron, x):
    """Return a step x and the membrane before it, broadcast to one shape; None for a membrane at rest."""
    v = neuron.v
    if isinstance(v, torch.Tensor) and v.shape != x.shape:
        try:
            shape = torch.broadcast_shapes(v.shape, x.shape)
        except RuntimeError:
            raise ValueError(
                f"a step of x must have the shape of the membrane potential that an earlier call left, {tuple(v.shape)}, got "
                f"{tuple(x.shape)}: call functional.reset_net before another batch size"
            ) from None
        v, x = v.expand(shape), x.expand(shape)
    if isinstance(v, torch.Tensor):
        return x, v if v.dtype == x.dtype and v.device == x.device else v.to(x)
    return x, _start(neuron, x)


class SingleStep(Methods):
    """Methods of the classes of one step."""

    firing = staticmethod(_surrogate)

    @staticmethod
    def forward(own, neuron, x):
        readable = without_values(x)
        settings = _ready(neuron, readable)
        if settings is None:
            return _run_own(own, neuron, x)
        step, v = _same_shape(neuron, readable)
        x = x if x.shape == step.shape else x.expand(step.shape)
        spikes, neuron.v, _ = _run_steps(x.unsqueeze(0), v, False, settings)
        return spikes.squeeze(0)


class MultiStep(Methods):
    """Methods of the classes of T steps. They compute ``v_seq`` only if somebody reads it."""

    firing = staticmethod(_surrogate)

    @staticmethod
    def forward(own, neuron, x_seq):
        readable = without_values(x_seq)
        settings = _ready(neuron, readable, 1)
        if settings is None or readable.dim() < 2 or not readable.shape[0]:
            return _run_own(own, neuron, x_seq)
        x, v = _same_shape(neuron, readable[0])
        if readable.shape[1:] != x.shape:  # v has more axes, or longer ones
            missing = [1] * (1 + x.dim() - x_seq.dim())
            x_seq = x_seq.reshape(len(x_seq), *missing, *x_seq.shape[1:]).expand(-1, *x.shape)
        spikes, neuron.v, _ = _run_steps(x_seq, v, False, settings)
        neuron.v_seq = _LastCall(keep_waiting(x_seq), v, settings, torch.is_grad_enabled())
        return spikes

    @staticmethod
    def detach(own, neuron):
        own(neuron)
        last = vars(neuron)["_memories"].get("v_seq")
        if isinstance(last, _LastCall):
            neuron.v_seq = last.detached()

    @property
    def v_seq(self):
        memories = vars(self).get("_memories", {})
        if "v_seq" not in memories:
            raise AttributeError(f"{type(self).__name__} has no attribute 'v_seq'")
        if isinstance(memories["v_seq"], _LastCall):
            v_seq, v = memories["v_seq"].v_seq(), memories["v"]
            memories["v_seq"] = v_seq.to(v.device, v.dtype) if isinstance(v, torch.Tensor) else v_seq  # .to() moved v since
        return memories["v_seq"]


def _run_own(own, neuron, x):
    """Run the class's own code. If it raises, v is as before."""
    v, backend, runner = neuron.v, getattr(neuron, "backend", None), neuron
    if backend == "cupy":  # it fails without CuPy
        # The copy has the same states. Other threads may use the neuron itself. torch.compile cannot trace a copy.
        runner = neuron if torch.compiler.is_compiling() else copy.copy(neuron)
        runner.backend = "torch"
    try:
        return own(runner, x)
    except Exception:
        neuron.v = v
        raise
    finally:
        if backend is not None:
            neuron.backend = backend


class _SingleStepLIF(SingleStep):
    leak = _LIFNode.leak


class _SingleStepIF(SingleStep):
    leak = _IFNode.leak


class _SingleStepParametricLIF(SingleStep):
    leak = _ParametricLIFNode.leak


class _MultiStepLIF(MultiStep):
    leak = _LIFNode.leak


class _MultiStepIF(MultiStep):
    leak = _IFNode.leak


class _MultiStepParametricLIF(MultiStep):
    leak = _ParametricLIFNode.leak


NODES: dict[str, dict[str, type]] = {
    "activation_based": {
        "LIFNode": _LIFNode,
        "IFNode": _IFNode,
        "ParametricLIFNode": _ParametricLIFNode,
        "ILIFNode": _ILIFNode,
        "TernaryLIFNode": _TernaryLIFNode,
        "TernaryIFNode": _TernaryIFNode,
    },
    "clock_driven": {
        "LIFNode": _SingleStepLIF,
        "IFNode": _SingleStepIF,
        "ParametricLIFNode": _SingleStepParametricLIF,
        "MultiStepLIFNode": _MultiStepLIF,
        "MultiStepIFNode": _MultiStepIF,
        "MultiStepParametricLIFNode": _MultiStepParametricLIF,
    },
}


# --- copies of SpikingJelly under another name ------------------------------------------------------------------------------


@functools.cache
def is_trusted(cls) -> bool:
    """True for a class of this package or of an installed SpikingJelly. The tests compare these with the fused methods.

    A project may hold an edited copy under SpikingJelly's name, so a SpikingJelly in another folder is a copy.
    """
    root = cls.__module__.partition(".")[0]
    installed = _INSTALLED.search(getattr(sys.modules.get(root), "__file__", None) or "")
    return f"{cls.__module__}.".startswith(_TRUSTED_PACKAGES) and (root != "spikingjelly" or installed is not None)


@functools.cache
def difference_of_copy(cls, methods) -> str | None:
    """Return None if a neuron class and its fused methods give the same spikes, states and gradients, else the reason."""
    if is_trusted(cls):
        return None
    kind = f"a copy of SpikingJelly's {cls.__name__}"
    taken = inspect.signature(cls).parameters
    try:
        for v_reset, detach_reset, decay_input in itertools.product((0.0, None, -0.5), (False, True), (True, False)):
            settings = {"v_reset": v_reset, "detach_reset": detach_reset, "decay_input": decay_input}
            settings = {name: value for name, value in settings.items() if name in taken}
            own, fused = (_try_out(cls(**settings), use) for use in (None, methods))
            if not all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(own, fused, strict=True)):
                return f"it is {kind} and computes something else"
    except Exception as error:  # code that is not ours may raise anything
        return f"it is {kind} and does not run as that does ({type(error).__name__}: {error})"
    return None


def _try_out(neuron, methods):
    """Run a new neuron on random data, in float64. Return its spikes, membrane potential and gradients."""
    if methods is None:
        vars(neuron)["_sdit_kernels"] = None  # its class may be fused
    else:
        replace_methods(neuron, methods)
    if hasattr(neuron, "step_mode"):
        neuron.step_mode = "m"
    draw = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(4, 2, 9, generator=draw, dtype=torch.float64, device="cpu").mul_(2).requires_grad_()
    neuron = neuron.to("cpu", torch.float64)
    several = hasattr(neuron, "step_mode") or type(neuron).__name__.startswith("MultiStep")
    with backend("reference"):
        spikes = torch.cat([neuron(x[:2]), neuron(x[2:])]) if several else torch.stack([neuron(step) for step in x])
        weight = torch.randn(spikes.shape, generator=draw, dtype=torch.float64, device="cpu")
        grads = torch.autograd.grad((spikes * weight).sum() + neuron.v.square().sum(), [x, *neuron.parameters()])
    return spikes, neuron.v, *grads


@assume_constant_result  # torch.compile calls it once per graph
def _computes(kind, name) -> bool:
    """True if a class of surrogates gives the spikes and gradients of our formula of this name. Only a copy's is run."""
    return is_trusted(kind) or _copy_computes(kind, name)


@functools.cache
def _copy_computes(kind, name):
    try:
        module = kind()
        for alpha in (module.alpha, module.alpha if name == "fast_sigmoid" else 3.0):
            module.alpha = alpha
            z = torch.linspace(-2, 2, 41, dtype=torch.float64, device="cpu", requires_grad=True)
            with backend("reference"):
                ours = lif(z[None] + 1, tau=math.inf, decay_input=False, surrogate=name, alpha=alpha)[0]
            (theirs, wanted), (spikes, found) = (
                (s, torch.autograd.grad(s.sum(), z, retain_graph=True)[0]) for s in (module(z), ours)
            )
            if not torch.equal(theirs, spikes) or not torch.allclose(wanted, found, rtol=1e-9, atol=1e-9):
                return False
    except Exception:  # code that is not ours may raise anything
        return False
    return True
