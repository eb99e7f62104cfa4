r"""Run snnTorch's Leaky, Synaptic and Lapicque neurons on the fused kernels, step by step or for a whole sequence at once.

>>> import torch
>>> from sdit_kernels.compat.snntorch import accelerate, unroll
>>> report = accelerate(torch.nn.Linear(2, 2))  # your model: its neurons now run leaky, cuba and lapicque
>>> unroll(torch.nn.Linear(2, 2), torch.zeros(5, 3, 2)).shape  # (T, batch, ...): each layer computes all time steps at once
torch.Size([5, 3, 2])

This loop over a feed-forward network ::

    mem1, mem2 = lif1.init_leaky(), lif2.init_leaky()
    for step in range(T):
        spk1, mem1 = lif1(fc1(x[step]), mem1)
        spk2, mem2 = lif2(fc2(spk1), mem2)              # append to lists, stack them at the end

computes the same as ::

    spk1, mem1 = unroll(lif1, fc1(x))
    spk2, mem2 = unroll(lif2, fc2(spk1))                # (T, ...) each

A network whose later layers feed back into earlier layers needs the loop. In the loop, an accelerated neuron computes each step
in one kernel.

Each neuron stays the same object of the same class, with its names, parameters, buffers, states, hooks and state_dict.
``reset_mem``, ``detach_hidden``, ``reset_hidden``, ``utils.reset``, ``export_to_nir``, copies and
``torch.compile(fullgraph=True)`` work as before, the last with :func:`unroll` too. Only ``Leaky``, ``Synaptic`` and
``Lapicque`` of this module import snnTorch. The module works with snnTorch 1.0.0.

The page "snnTorch" of the documentation lists the differences. The most important ones:

- Spikes have the dtype of the input; snnTorch's are always float32.
- Do not change the input or the states of a neuron in place before the backward pass; autograd raises an error.
- The attribute ``reset`` (the reset of the last step) is not set.
- If a neuron gets a setting or data that the kernels do not take, or while one of SpikingJelly's counters is active, it runs
  snnTorch's code, with a warning in each call.
"""

import importlib
import math
import sys

import torch
from torch import Tensor, nn

from .._torch import assume_constant_result, has_hooks
from ..dtypes import DATA_DTYPES, state_dtype
from ..ops.cuba import cuba
from ..ops.leaky import lapicque, leaky
from ..ops.operator import values_are_readable
from .swap import (
    Methods,
    Report,
    changed_behaviour,
    counted,
    refuse_symbols,
    replace_methods,
    suspected_neuron,
    swap,
    swap_back,
    warn,
)

__all__ = ["Lapicque", "Leaky", "Synaptic", "accelerate", "restore", "unroll"]

_SURROGATES = {"atan": ("atan", "alpha"), "fast_sigmoid": ("fast_sigmoid", "slope"), "sigmoid": ("sigmoid", "slope")}
_NO_KERNEL = "this kind of neuron has no fused kernel here"
_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}


@assume_constant_result  # torch.compile cannot read a function's name, but guards its code
def _formula(function):
    """Return (name in our table, name of its constant, index of the constant in the closure), or the reason why it has none."""
    made_by, _, inner = getattr(function, "__qualname__", "").partition(".<locals>")
    if not inner:
        made_by = getattr(function, "__name__", type(function).__name__)
    if getattr(function, "__module__", None) != "snntorch.surrogate" or made_by not in _SURROGATES:
        return f"surrogate {made_by} has no formula here"
    name, constant = _SURROGATES[made_by]
    return name, constant, function.__code__.co_freevars.index(constant)


def _surrogate(function):
    """Return (name, alpha) in our table of surrogates, or the reason why the surrogate is not in it.

    snnTorch makes a closure for each surrogate; alpha is a variable of the closure.
    """
    found = _formula(function)
    if isinstance(found, str):
        return found
    name, constant, index = found
    alpha = function.__closure__[index].cell_contents
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        return f"surrogate {name} has {constant}={alpha!r}, which is not a positive number"
    return name, alpha


def _obstacle(neuron):
    """Return the reason why the kernels cannot serve this neuron, or None."""
    if neuron.surrogate_disable:
        return "surrogate_disable=True has no formula here"
    found = _surrogate(neuron.spike_grad)
    if isinstance(found, str):
        return found
    for option in ("inhibition", "state_quant"):
        if getattr(neuron, option):
            return f"{option} has no fused kernel here"
    if _RESETS.get(getattr(neuron.state_function, "__name__", None)) != neuron.reset_mechanism:
        return "its state_function, which snnTorch chooses at construction, does not match its reset_mechanism"
    return None


class _Kind(Methods):
    """Methods of a class of snnTorch's neurons, which compute a step in one kernel."""

    _states: tuple[str, ...] = ("mem",)  # in the order of the op
    _attributes: tuple[str, ...]  # the neuron's attributes with the parameters of the op
    _decays: tuple[str, ...] = ()  # those that are clamped to 0 .. 1
    _positive: tuple[str, ...] = ()  # those that must be positive; the op calls them the same

    @staticmethod
    def _parameters(neuron):
        """Return the parameters of the op by their names there, as tensors."""
        raise NotImplementedError

    @staticmethod
    def _run(neuron, x, states, sequence, settings):
        """Call the op. Return (spikes, last states, states after every step if ``sequence``)."""
        raise NotImplementedError


class _Leaky(_Kind):
    _attributes = ("beta", "threshold")
    _decays = ("beta",)

    @staticmethod
    def _parameters(neuron):
        return {"beta": neuron.beta.clamp(0, 1), "v_threshold": neuron.threshold}

    @staticmethod
    def _run(neuron, x, states, sequence, settings):
        s, v, *v_seq = leaky(
            x, *states, reset=neuron.reset_mechanism, reset_delay=bool(neuron.reset_delay), return_v=True,
            return_v_seq=sequence, **settings,
        )  # fmt: skip
        return s, (v,), v_seq

    @staticmethod
    def forward(own, neuron, input_, mem=None):
        return _run_step(_Leaky, own, neuron, input_, (mem,))


class _Synaptic(_Kind):
    _states = ("syn", "mem")
    _attributes = ("alpha", "beta", "threshold")
    _decays = ("alpha", "beta")

    @staticmethod
    def _parameters(neuron):
        return {"beta_i": neuron.alpha.clamp(0, 1), "beta": neuron.beta.clamp(0, 1), "v_threshold": neuron.threshold}

    @staticmethod
    def _run(neuron, x, states, sequence, settings):
        s, last, *history = cuba(
            x, states, reset=neuron.reset_mechanism, reset_delay=bool(neuron.reset_delay), return_state=True,
            return_state_seq=sequence, **settings,
        )  # fmt: skip
        return s, last, history[0] if sequence else ()

    @staticmethod
    def forward(own, neuron, input_, syn=None, mem=None):
        return _run_step(_Synaptic, own, neuron, input_, (syn, mem))


class _Lapicque(_Kind):
    _attributes = ("R", "C", "time_step", "threshold")
    _positive = ("R", "C", "time_step")

    @staticmethod
    def _parameters(neuron):
        return {"R": neuron.R, "C": neuron.C, "time_step": neuron.time_step, "v_threshold": neuron.threshold}

    @staticmethod
    def _run(neuron, x, states, sequence, settings):
        s, v, *v_seq = lapicque(x, *states, reset=neuron.reset_mechanism, return_v=True, return_v_seq=sequence, **settings)
        return s, (v,), v_seq

    @staticmethod
    def forward(own, neuron, input_, mem=None):
        return _run_step(_Lapicque, own, neuron, input_, (mem,))


_KINDS = {"Leaky": _Leaky, "Synaptic": _Synaptic, "Lapicque": _Lapicque}


def _not_numbers(kind, neuron):
    """Return the reason why the kernels cannot take the values of a neuron's parameters, or None."""
    if not neuron.threshold.isfinite().all():
        return "its threshold is not finite"
    for name in kind._decays:
        if getattr(neuron, name).isnan().any():
            return f"its {name} is not a number"
    for name in kind._positive:
        value = getattr(neuron, name)
        if not ((value > 0) & value.isfinite()).all():
            return f"its {name} is not positive and finite"
    return None


class _Blocks:
    """The parameters of a neuron for data x, in the form that the ops take: numbers, scalars, or one value per channel.

    The ops take values per channel of the last axis. For values per channel of another axis, such as (C, 1, 1) for
    (..., C, H, W), or per neuron, such as (C, H, W), ``before`` makes the axes of the values the last axis of the data.
    """

    def __init__(self, kind, neuron, x):
        parameters = kind._parameters(neuron)
        axes = [a - p.dim() for p in parameters.values() for a in range(p.dim()) if p.shape[a] != 1]
        self.first, self.last = min(axes, default=0), max(axes, default=0)
        self.shape = x.shape[1:]
        if not all(_broadcasts_to(p.shape, self.shape) for p in parameters.values()):
            *names, last = (f"{name} {tuple(getattr(neuron, name).shape)}" for name in kind._attributes)
            raise ValueError(f"has {', '.join(names)} and {last} for data {tuple(self.shape)}")
        block = self.shape[len(self.shape) + self.first : len(self.shape) + self.last + 1] if axes else ()
        self.parameters = {name: self._value(p, block, state_dtype(x.dtype)) for name, p in parameters.items()}

    def _value(self, p, block, dtype):
        if p.numel() == 1:
            return p.item() if not p.requires_grad and values_are_readable(p) else p.to(dtype).reshape(())
        p = p[(..., *[0] * (-1 - self.last))] if self.last < -1 else p  # axes of size 1 behind the block
        p = p.reshape(p.shape[-len(block) :]) if p.dim() >= len(block) else p
        return p.to(dtype).expand(block).reshape(-1)

    @property
    def _moves(self):
        return self.first and (self.first, self.last) != (-1, -1)

    def before(self, t):
        """Return data or a membrane with the axes of the values as its last axis."""
        if t is None or not self._moves:
            return t
        behind = -1 - self.last
        n = self.last - self.first + 1
        t = t.movedim(tuple(range(self.first, self.last + 1)), tuple(range(-n, 0))) if behind else t
        return t.flatten(-n) if n > 1 else t

    def after(self, t):
        """Undo ``before``."""
        if not self._moves:
            return t
        n = self.last - self.first + 1
        if n > 1:
            d = len(self.shape)
            t = t.unflatten(-1, self.shape[d + self.first : d + self.last + 1])
        return t.movedim(tuple(range(-n, 0)), tuple(range(self.first, self.last + 1))) if self.last < -1 else t


def _broadcasts_to(shape, data):
    """True if values of this shape broadcast to the shape ``data`` and do not extend it."""
    return len(shape) <= len(data) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(data)))


def _prepare(kind, neuron, x):
    """Return the _Blocks for data x of shape (T, ...), or the reason why the kernels cannot serve the neuron."""
    reason = _obstacle(neuron)
    if x.dtype not in DATA_DTYPES:
        reason = f"the kernels do not take its data, {x.dtype}"
    elif not _broadcasts_to(neuron.graded_spikes_factor.shape, x.shape[1:]):
        factor = tuple(neuron.graded_spikes_factor.shape)
        reason = reason or f"has graded_spikes_factor {factor} for data {tuple(x.shape[1:])}, which the kernels do not take"
    if reason is not None:
        return reason
    try:
        blocks = _Blocks(kind, neuron, x)
    except ValueError as error:
        return f"{error}, which the kernels do not take"
    numbers = blocks.parameters
    finite = all(not isinstance(p, Tensor) and math.isfinite(p) for p in numbers.values())
    if finite and all(numbers[name] > 0 for name in kind._positive):
        return blocks
    readable = all(values_are_readable(getattr(neuron, name)) for name in kind._attributes)
    return (_not_numbers(kind, neuron) if readable else None) or blocks


def _check_states(states):
    for name, v in states.items():
        if v is not None and not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(v).__name__}")


def _run_steps(kind, neuron, x_seq, given, sequence, blocks):
    """Run T steps and store the last states in the neuron.

    Return (spikes, states after the last step, states after every step if ``sequence``).
    """
    _check_states(dict(zip(kind._states, given)))
    states = []
    for name, v in zip(kind._states, given):
        if v is not None and neuron.init_hidden:
            raise TypeError(f"{name} must not be given to a neuron with init_hidden=True, which keeps its own")
        v = getattr(neuron, name) if v is None else v
        if v.shape != x_seq.shape[1:]:
            v = None  # snnTorch starts from zero
        elif v.dtype not in (x_seq.dtype, state_dtype(x_seq.dtype)) or v.device != x_seq.device:
            v = v.to(x_seq.device, state_dtype(x_seq.dtype))
        states.append(blocks.before(v))
    surrogate, alpha = _surrogate(neuron.spike_grad)
    settings = {"surrogate": surrogate, "alpha": alpha, **blocks.parameters}
    spikes, last, history = kind._run(neuron, blocks.before(x_seq), tuple(states), sequence, settings)
    spikes, last, history = blocks.after(spikes), tuple(map(blocks.after, last)), tuple(map(blocks.after, history))
    for name, v in zip(kind._states, last):
        setattr(neuron, name, v)
    if not _ungraded(neuron):
        spikes = spikes * neuron.graded_spikes_factor.to(spikes.dtype)
    return spikes, last, history


def _ungraded(neuron):
    """True if the factor of the spikes is known to be 1. Never read on a GPU.

    Every call reads it on the CPU, because the version counter of a tensor does not count all changes.
    """
    factor = neuron.graded_spikes_factor
    return not factor.requires_grad and factor.numel() == 1 and values_are_readable(factor) and factor.item() == 1


def _run_step(kind, own, neuron, input_, given):
    refuse_symbols(neuron, input_)
    blocks = counted()  # before this function calls its first operator
    if blocks is None:
        x = input_.unsqueeze(0)
        blocks = _prepare(kind, neuron, x)
    if isinstance(blocks, str):
        warn(f"{type(neuron).__name__} runs snnTorch's own code: {blocks}", 5)
        return own(neuron, input_, *given)
    spikes, last, _ = _run_steps(kind, neuron, x, given, False, blocks)
    return (spikes.squeeze(0), *last) if neuron.output or not neuron.init_hidden else spikes.squeeze(0)


def _make(name, args, kwargs):
    try:
        library = importlib.import_module("snntorch")
    except ModuleNotFoundError as error:
        raise ImportError(f"sdit_kernels.compat.snntorch.{name} needs snnTorch: pip install snntorch") from error
    neuron = getattr(library, name)(*args, **kwargs)
    reason = _obstacle(neuron)
    if reason is not None:
        raise ValueError(f"{name} cannot be fused: {reason}; use snntorch.{name}")
    replace_methods(neuron, _KINDS[name])
    return neuron


def Leaky(*args, **kwargs) -> nn.Module:
    """Return a new, accelerated ``snntorch.Leaky``.

    Args:
        *args: positional arguments of ``snntorch.Leaky``.
        **kwargs: keyword arguments of ``snntorch.Leaky``.

    Raises:
        ImportError: snnTorch is not installed.
        ValueError: the kernels cannot serve a neuron of this kind.
    """
    return _make("Leaky", args, kwargs)


def Synaptic(*args, **kwargs) -> nn.Module:
    """Return a new, accelerated ``snntorch.Synaptic``.

    Args:
        *args: positional arguments of ``snntorch.Synaptic``.
        **kwargs: keyword arguments of ``snntorch.Synaptic``.

    Raises:
        ImportError: snnTorch is not installed.
        ValueError: the kernels cannot serve a neuron of this kind.
    """
    return _make("Synaptic", args, kwargs)


def Lapicque(*args, **kwargs) -> nn.Module:
    """Return a new, accelerated ``snntorch.Lapicque``.

    Args:
        *args: positional arguments of ``snntorch.Lapicque``.
        **kwargs: keyword arguments of ``snntorch.Lapicque``.

    Raises:
        ImportError: snnTorch is not installed.
        ValueError: the kernels cannot serve a neuron of this kind.
    """
    return _make("Lapicque", args, kwargs)


def _library():
    """Return the base class of snnTorch's neurons. None if snnTorch is not imported: no model can contain its neurons."""
    cls = getattr(sys.modules.get("snntorch"), "Leaky", None)
    return cls and next(base for base in cls.__mro__ if base.__name__ == "SpikingNeuron")


def _kind_of(module):
    """Return (class of snnTorch, methods) for a neuron that has kernels, or (None, None)."""
    library = sys.modules["snntorch"]
    for name, methods in _KINDS.items():
        if isinstance(module, getattr(library, name)):
            return getattr(library, name), methods
    return None, None


def _made_by_snntorch(module):
    """True for a neuron of snnTorch. They have no common base class, and not every class of the package is a neuron."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.startswith("snntorch._neurons.")]
    return any(cls.__name__ != "RecurrentOneToOne" for cls in classes)


_suspect = suspected_neuron("snntorch.Leaky, Synaptic or Lapicque")


def accelerate(model: nn.Module) -> Report:
    """Run the Leaky, Synaptic and Lapicque neurons of a snnTorch model on the fused kernels, in loops or with :func:`unroll`.

    Args:
        model: a neuron of snnTorch, or any module that contains some. The function changes it in place. A second call changes
            nothing more.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of the
        neurons that did not change: other neurons; subclasses that override more than defaults; surrogates other than ``atan``,
        ``fast_sigmoid`` and ``sigmoid``; ``surrogate_disable``, ``inhibition``, ``state_quant``; a threshold that is not
        finite; an alpha or beta that is NaN; R, C and time_step that are not positive; and modules with the name of a spiking
        neuron that are not snnTorch's.

    Raises:
        TypeError: model is not a module.
    """
    if _library() is None:
        return swap("snnTorch", model, lambda module: None, _suspect)

    def choose(module):
        cls, kind = _kind_of(module)
        if cls is None:
            return _NO_KERNEL if _made_by_snntorch(module) else None
        reason = changed_behaviour(module, cls) or _obstacle(module)
        if reason is None and module.reset_mechanism_val.item() != cls.reset_dict[module.reset_mechanism]:
            reason = "the reset_mechanism_val that was loaded into it does not match its reset_mechanism"
        return reason or _not_numbers(kind, module) or kind

    return swap("snnTorch", model, choose, _suspect)


def restore(model: nn.Module) -> Report:
    """Undo :func:`accelerate`: the neurons run snnTorch's own code again and keep their state.

    Args:
        model: the model that ``accelerate`` changed, or a part or copy of it. The function changes it in place.

    Returns:
        A report like the report of ``accelerate``. ``replaced`` holds the neurons that run snnTorch's code again.

    Raises:
        TypeError: model is not a module.
    """
    return swap_back("snnTorch", model, _Kind)


# Layers that process each sample independently, so that T * batch can be one batch. The value is the number of sample axes.
_SAMPLES = {
    getattr(nn, f"{kind}{n}d"): n + 1
    for kind in ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
    for n in (1, 2, 3)
}
_RUNNING_STATISTICS = (
    nn.SyncBatchNorm,
    *(getattr(nn, f"{lazy}{kind}Norm{n}d") for lazy in ("", "Lazy") for kind in ("Batch", "Instance") for n in (1, 2, 3)),
)
_ANY_AXES = (nn.Linear, nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh)


def unroll(module: nn.Module, x: Tensor, mem: Tensor | None = None, *, syn: Tensor | None = None):
    """Run a whole sequence through a layer, a neuron or an ``nn.Sequential``: the stacked results of a loop over steps.

    Each layer computes all time steps before the next layer starts. A Leaky, Synaptic or Lapicque runs in one kernel. Linear
    layers, convolutions, pooling, Flatten and common activations run as one batch of T * batch. Every other module, and every
    module with hooks, runs step by step. A neuron that the kernels cannot serve runs step by step, with a warning. So does an
    ``nn.Sequential`` that contains a module with a state more than once: a neuron, a BatchNorm in training, a module with
    hooks, or a module of a class that is not PyTorch's.

    Args:
        module: a neuron of snnTorch, accelerated or not; a layer; or an ``nn.Sequential`` whose neurons have
            ``init_hidden=True``.
        x: input, (T, batch, ...), T at least 1.
        mem: membrane potential before the first step, for a single neuron with ``init_hidden=False``. None: the neuron's
            ``mem``. If its shape is not the shape of a step, the neuron starts from 0, like snnTorch's.
        syn: synaptic current before the first step, for a single Synaptic, like mem.

    Returns:
        The stacked results of the steps, (T, batch, ...). For a neuron with ``output=True`` or ``init_hidden=False``, the pair
        (spikes, membrane potentials), for a Synaptic (spikes, synaptic currents, membrane potentials). The neuron's ``mem`` and
        ``syn`` are then the last ones.

    Raises:
        TypeError, ValueError: an argument has the wrong type; mem or syn is given for another module; a layer would receive a
            pair, or returns neither a tensor nor a tuple of tensors; T = 0.

    Random layers draw in another order than in a loop over steps.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.snntorch import unroll
        >>> unroll(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten()), torch.zeros(5, 3, 1, 4, 4)).shape
        torch.Size([5, 3, 8])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, (T, batch, ...), got {type(x).__name__}")
    if x.dim() < 1 or x.shape[0] == 0:
        raise ValueError(f"x must have a time axis of at least one step in front, got {tuple(x.shape)}")
    given = {name: v for name, v in (("syn", syn), ("mem", mem)) if v is not None}
    _check_states(given)
    library = _library()
    for name in given:
        if library is None or not isinstance(module, library):
            raise ValueError(f"{name} belongs to a single neuron, got a {type(module).__name__}")
        if not hasattr(module, name):
            raise ValueError(f"{name} belongs to a neuron that has it, got a {type(module).__name__}")
    repeated = _repeated(module)
    if repeated is not None:
        warn(f"{type(module).__name__} runs step by step: its {type(repeated).__name__} is reached more than once", 1)
        return _step_by_step(module, x, {})
    return _through(module, x, lambda layer, x: _whole(layer, x, given, library))


def _whole(module, x, given, library):
    """Run a whole sequence through a module that is not an ``nn.Sequential``, or an ``nn.Sequential`` with hooks."""
    if library is not None and isinstance(module, library):
        cls, kind = _kind_of(module)
        blocks = counted() or _why_not_whole(module, cls) or _prepare(kind, module, x)
        if not isinstance(blocks, str):
            both = module.output or not module.init_hidden
            spikes, _, history = _run_steps(kind, module, x, [given.get(n) for n in kind._states], both, blocks)
            return (spikes, *history) if both else spikes
        warn(f"{type(module).__name__} runs step by step: {blocks}", 4)
        return _step_by_step(module, x, given)
    if not has_hooks(module):
        if type(module) in _ANY_AXES:
            return module(x)
        flatten = type(module) is nn.Flatten and module.start_dim > 0 and x.dim() >= 2
        if flatten or _SAMPLES.get(type(module)) == x.dim() - 2:
            found, steps = module(x.flatten(0, 1)), x.shape[:2]
            return tuple(t.unflatten(0, steps) for t in found) if isinstance(found, tuple) else found.unflatten(0, steps)
    return _step_by_step(module, x, {})


def _through(module, x, run):
    """Pass x through ``run(layer, x)`` for each layer of a (nested) ``nn.Sequential``, or for the module itself."""
    if type(module) is not nn.Sequential or has_hooks(module):
        return run(module, x)
    for i, layer in enumerate(module):
        if not isinstance(x, Tensor):
            raise ValueError(
                f"layer {i} of the nn.Sequential would be given the pair (spikes, membranes) of the neuron before it: "
                "that one needs init_hidden=True and output=False"
            )
        x = _through(layer, x, run)
    return x


def _repeated(module):
    """Return a module that may keep a state between steps and runs more than once per step, or None.

    With such a module, layers cannot compute all time steps at once.
    """
    if type(module) is not nn.Sequential:
        return None
    layers, seen = [], {}
    _through(module, torch.empty(0, device="cpu", dtype=torch.float32), lambda layer, x: layers.append(layer) or x)
    for i, layer in enumerate(layers):
        for part in layer.modules():
            if _keeps_state(part) and seen.setdefault(part, i) != i:
                return part
    return None


def _keeps_state(module):
    if not type(module).__module__.startswith("torch.nn.modules.") or has_hooks(module):
        return True
    return isinstance(module, _RUNNING_STATISTICS) and module.training and module.track_running_stats


def _why_not_whole(neuron, cls):
    if cls is None:
        return _NO_KERNEL
    return changed_behaviour(neuron, cls) or ("it has hooks" if has_hooks(neuron) else None)


def _step_by_step(module, x, given):
    steps = []
    for x_t in x:
        found = module(x_t, **given) if given else _through(module, x_t, lambda layer, x: layer(x))
        if not isinstance(found, Tensor) and not (isinstance(found, tuple) and all(isinstance(t, Tensor) for t in found)):
            raise TypeError(f"{type(module).__name__} cannot be unrolled: one step of it returns neither a tensor nor a tuple")
        steps.append(found)
        if given:
            given = dict(zip(("syn", "mem") if hasattr(module, "syn") else ("mem",), found[1:]))
    return tuple(map(torch.stack, zip(*steps))) if isinstance(steps[0], tuple) else torch.stack(steps)
