r"""snnTorch's Leaky on the fused kernels, and whole sequences where its users write a loop over steps.

>>> import torch
>>> from sdit_kernels.compat.snntorch import accelerate, unroll
>>> report = accelerate(torch.nn.Linear(2, 2))  # your model: its Leaky neurons run sdit_kernels.leaky from here on
>>> unroll(torch.nn.Linear(2, 2), torch.zeros(5, 3, 2)).shape  # (T, batch, ...): a layer at a time instead of a step at a time
torch.Size([5, 3, 2])

A loop over a feed-forward network ::

    mem1, mem2 = lif1.init_leaky(), lif2.init_leaky()
    for step in range(T):
        spk1, mem1 = lif1(fc1(x[step]), mem1)
        spk2, mem2 = lif2(fc2(spk1), mem2)
        ...                                             # spk2 and mem2 into lists, stacked in the end

says the same as ::

    spk1, mem1 = unroll(lif1, fc1(x))
    spk2, mem2 = unroll(lif2, fc2(spk1))                # (T, ...) each

and for an ``nn.Sequential`` of layers and neurons with ``init_hidden=True``, ``unroll(net, x)``. Networks whose steps feed back
into earlier layers need the loop; in it, an accelerated neuron computes each step in one kernel.

The neurons stay what they were: the same objects of the same class, with the same names, parameters, buffers, ``mem``, hooks
and state_dict; ``reset_mem``, ``detach_hidden``, ``reset_hidden``, ``utils.reset``, ``export_to_nir``, copies and
``torch.compile(fullgraph=True)`` go on working, the last with :func:`unroll` too. (The methods of snnTorch's class ask each
neuron whether it is fused; the others run as before.) ``Leaky`` of this file makes an accelerated one: ``Leaky(beta=0.9)``
takes snnTorch's arguments. That function imports snnTorch; the others look for it among the imported modules. Made for snnTorch
1.0.0.

Differences that remain:

- Spikes have the dtype of the input, where snnTorch's are always float32; the membrane of bfloat16 and float16 data is float32.
- An infinite membrane that is reset to zero is zero, where 0 * inf makes it NaN there; and so is the gradient of ``sigmoid``
  far below the threshold, where its exponential overflows to NaN there.
- The attribute ``reset``, the last step's reset, is not set.
- The input of a neuron, and a membrane that it gave or was given, must not be changed in place (``y += s``) before the
  backward pass, which recomputes the steps from them: autograd then raises.
- On a GPU the values of beta and threshold are looked at in ``accelerate`` only, for a threshold that is not finite and a beta
  that is not a number: to look at each call would wait for them.
- SpikingJelly's counters of operations know the operators of PyTorch, not a fused kernel. Where one is active, the neurons run
  snnTorch's code, with a warning. Other programs that count operators see one operator, ``sdit_kernels.leaky``: call
  :func:`restore` before.
- ``torch.fx`` cannot trace through a fused neuron, as it cannot through snnTorch's: the error says what to do.
- Second derivatives and forward mode are refused (use ``sdit_kernels.backend("reference")``).
- A neuron that is given what the kernels do not have after ``accelerate`` runs snnTorch's code, with a warning in every such
  call.
"""

import importlib
import math
import sys

import torch
from torch import Tensor, nn

from .._torch import has_hooks
from ..dtypes import DATA_DTYPES, state_dtype
from ..ops.leaky import leaky
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

__all__ = ["Leaky", "accelerate", "restore", "unroll"]

_SURROGATES = {"atan": ("atan", "alpha"), "fast_sigmoid": ("fast_sigmoid", "slope"), "sigmoid": ("sigmoid", "slope")}
_NO_KERNEL = "this kind of neuron has no fused kernel here"
_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}


@torch.compiler.assume_constant_result  # torch.compile cannot read a function's name, but guards its code
def _formula(function):
    """(name in the table here, name of its constant, the index of that in the closure), or the reason why there is none."""
    made_by, _, inner = getattr(function, "__qualname__", "").partition(".<locals>")
    if not inner:
        made_by = getattr(function, "__name__", type(function).__name__)
    if getattr(function, "__module__", None) != "snntorch.surrogate" or made_by not in _SURROGATES:
        return f"surrogate {made_by} has no formula here"
    name, constant = _SURROGATES[made_by]
    return name, constant, function.__code__.co_freevars.index(constant)


def _surrogate(function):
    """(name, alpha) in the table here, or the reason why there is none. snnTorch makes a closure for each surrogate."""
    found = _formula(function)
    if isinstance(found, str):
        return found
    name, constant, index = found
    alpha = function.__closure__[index].cell_contents
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        return f"surrogate {name} has {constant}={alpha!r}, which is no positive number"
    return name, alpha


def _obstacle(neuron):
    """Why the kernels cannot serve this Leaky, None if they can."""
    if neuron.surrogate_disable:
        return "surrogate_disable=True has no formula here"
    found = _surrogate(neuron.spike_grad)
    if isinstance(found, str):
        return found
    for option in ("inhibition", "state_quant"):
        if getattr(neuron, option):
            return f"{option} has no fused kernel here"
    if _RESETS.get(getattr(neuron.state_function, "__name__", None)) != neuron.reset_mechanism:
        return "its state_function, which snnTorch chooses at construction, is not that of its reset_mechanism"
    return None


def _not_numbers(neuron):
    """Why the kernels cannot serve the values of its beta and threshold, None if they can."""
    if not neuron.threshold.isfinite().all():
        return "its threshold is not finite"
    return "its beta is not a number" if neuron.beta.isnan().any() else None


class _Blocks:
    """beta and threshold of a neuron for data x, as leaky takes them: numbers, scalars, or values for channels, the last axis.

    Values per channel of another axis, as (C, 1, 1) for (..., C, H, W), or per neuron, as (C, H, W), become those of a last
    axis by a change of view.
    """

    def __init__(self, neuron, x):
        parameters = [neuron.beta.clamp(0, 1), neuron.threshold]
        axes = [a - p.dim() for p in parameters for a in range(p.dim()) if p.shape[a] != 1]
        self.first, self.last = min(axes, default=0), max(axes, default=0)
        self.shape = x.shape[1:]
        if not all(_broadcasts_to(p.shape, self.shape) for p in parameters):
            raise ValueError(f"has beta {tuple(neuron.beta.shape)} and threshold {tuple(neuron.threshold.shape)} for data "
                             f"{tuple(self.shape)}")  # fmt: skip
        block = self.shape[len(self.shape) + self.first : len(self.shape) + self.last + 1] if axes else ()
        self.parameters = [self._value(p, block, state_dtype(x.dtype)) for p in parameters]

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
        """Data or a membrane, with the block as its last axis."""
        if t is None or not self._moves:
            return t
        behind = -1 - self.last
        n = self.last - self.first + 1
        t = t.movedim(tuple(range(self.first, self.last + 1)), tuple(range(-n, 0))) if behind else t
        return t.flatten(-n) if n > 1 else t

    def after(self, t):
        """Back again."""
        if not self._moves:
            return t
        n = self.last - self.first + 1
        if n > 1:
            d = len(self.shape)
            t = t.unflatten(-1, self.shape[d + self.first : d + self.last + 1])
        return t.movedim(tuple(range(-n, 0)), tuple(range(self.first, self.last + 1))) if self.last < -1 else t


def _broadcasts_to(shape, data):
    """Whether values of this shape go with data of that one, which keep theirs."""
    return len(shape) <= len(data) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(data)))


def _prepare(neuron, x):
    """_Blocks for data x of (T, ...), or the reason why the kernels cannot serve the neuron."""
    reason = _obstacle(neuron)
    if x.dtype not in DATA_DTYPES:
        reason = f"the kernels do not take its data, {x.dtype}"
    elif not _broadcasts_to(neuron.graded_spikes_factor.shape, x.shape[1:]):
        factor = tuple(neuron.graded_spikes_factor.shape)
        reason = reason or f"has graded_spikes_factor {factor} for data {tuple(x.shape[1:])}, which the kernels do not take"
    if reason is not None:
        return reason
    try:
        blocks = _Blocks(neuron, x)
    except ValueError as error:
        return f"{error}, which the kernels do not take"
    if all(not isinstance(p, Tensor) and math.isfinite(p) for p in blocks.parameters):
        return blocks
    readable = values_are_readable(neuron.beta) and values_are_readable(neuron.threshold)
    return (_not_numbers(neuron) if readable else None) or blocks


def _check_mem(mem):
    if mem is not None and not isinstance(mem, Tensor):
        raise TypeError(f"mem must be a tensor or None, got {type(mem).__name__}")


def _walk(neuron, x_seq, mem, sequence, blocks):
    """T steps: spikes, membrane after the last step, and if ``sequence`` after every step. The neuron keeps the last one."""
    _check_mem(mem)
    if mem is not None and neuron.init_hidden:
        raise TypeError("mem must not be given to a neuron with init_hidden=True, which keeps its own")
    mem = neuron.mem if mem is None else mem
    if mem.shape != x_seq.shape[1:]:
        mem = None  # snnTorch starts from zero
    elif mem.dtype not in (x_seq.dtype, state_dtype(x_seq.dtype)) or mem.device != x_seq.device:
        mem = mem.to(x_seq.device, state_dtype(x_seq.dtype))
    beta, threshold = blocks.parameters
    surrogate, alpha = _surrogate(neuron.spike_grad)
    found = leaky(
        blocks.before(x_seq), blocks.before(mem), beta=beta, v_threshold=threshold, reset=neuron.reset_mechanism,
        reset_delay=bool(neuron.reset_delay), surrogate=surrogate, alpha=alpha, return_v=True, return_v_seq=sequence,
    )  # fmt: skip
    spikes, last, *history = (blocks.after(t) for t in found)
    neuron.mem = last
    if not _ungraded(neuron):
        spikes = spikes * neuron.graded_spikes_factor.to(spikes.dtype)
    return spikes, last, history[0] if sequence else None


def _ungraded(neuron):
    """Whether the spikes' factor is known to be 1. Read in every call, as no version counts all changes; on a GPU never."""
    factor = neuron.graded_spikes_factor
    return not factor.requires_grad and factor.numel() == 1 and values_are_readable(factor) and factor.item() == 1


class _Leaky(Methods):
    """snnTorch's Leaky, a step in one kernel."""

    @staticmethod
    def forward(own, neuron, input_, mem=None):
        refuse_symbols(neuron, input_)
        blocks = counted()  # before the first operator of ours
        if blocks is None:
            x = input_.unsqueeze(0)
            blocks = _prepare(neuron, x)
        if isinstance(blocks, str):
            warn(f"{type(neuron).__name__} runs snnTorch's own code: {blocks}", 4)
            return own(neuron, input_, mem)
        spikes, last, _ = _walk(neuron, x, mem, False, blocks)
        return (spikes.squeeze(0), last) if neuron.output or not neuron.init_hidden else spikes.squeeze(0)


def Leaky(*args, **kwargs) -> nn.Module:
    """A new ``snntorch.Leaky``, accelerated.

    Args:
        *args, **kwargs: those of ``snntorch.Leaky``.

    Raises:
        ImportError: snnTorch is not installed.
        ValueError: the kernels cannot serve a neuron of this kind.
    """
    try:
        library = importlib.import_module("snntorch")
    except ModuleNotFoundError as error:
        raise ImportError("sdit_kernels.compat.snntorch.Leaky needs snnTorch: pip install snntorch") from error
    neuron = library.Leaky(*args, **kwargs)
    reason = _obstacle(neuron)
    if reason is not None:
        raise ValueError(f"Leaky cannot be fused: {reason}; use snntorch.Leaky")
    replace_methods(neuron, _Leaky)
    return neuron


def _library():
    """(Leaky, the base of all neurons), or None where nobody has imported snnTorch, so that no model can have one."""
    library = sys.modules.get("snntorch")
    cls = getattr(library, "Leaky", None)
    return cls and (cls, next(base for base in cls.__mro__ if base.__name__ == "SpikingNeuron"))


def _made_by_snntorch(module):
    """Whether it is one of snnTorch's neurons, not all of which have a base in common; nor is all of that package a neuron."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.startswith("snntorch._neurons.")]
    return any(cls.__name__ != "RecurrentOneToOne" for cls in classes)


_suspect = suspected_neuron("snntorch.Leaky")


def accelerate(model: nn.Module) -> Report:
    """Let the Leaky neurons of a snnTorch model run on the fused kernels, a step at a time or by :func:`unroll`.

    Args:
        model: any module that contains snnTorch's neurons, or is one; changed in place.

    Returns:
        A report to print: ``replaced``, pairs (name, class); ``left``, triples (name, class, reason), the neurons that stay as
        they were: of other kinds; subclasses that override what a neuron does; surrogates other than ``atan``,
        ``fast_sigmoid`` and ``sigmoid``; ``surrogate_disable``, ``inhibition``, ``state_quant``; a threshold that is not
        finite, a beta that is not a number; and modules that look like spiking neurons by their name but are not snnTorch's. A
        second call changes nothing.

    Raises:
        TypeError: model is no module.
    """
    library = _library()
    if library is None:
        return swap("snnTorch", model, lambda module: None, _suspect)
    cls, _ = library

    def choose(module):
        if not isinstance(module, cls):
            return _NO_KERNEL if _made_by_snntorch(module) else None
        reason = changed_behaviour(module, cls) or _obstacle(module)
        if reason is None and module.reset_mechanism_val.item() != cls.reset_dict[module.reset_mechanism]:
            reason = "the reset_mechanism_val that was loaded into it is not that of its reset_mechanism"
        return reason or _not_numbers(module) or _Leaky

    return swap("snnTorch", model, choose, _suspect)


def restore(model: nn.Module) -> Report:
    """Undo :func:`accelerate`: snnTorch's own code again, from the state that was reached.

    Args:
        model: what was given to ``accelerate``, or a part or copy of it; changed in place.

    Returns:
        A report as that of ``accelerate``; ``replaced`` are the neurons that run snnTorch's code again.

    Raises:
        TypeError: model is no module.
    """
    return swap_back("snnTorch", model, _Leaky)


# Layers that do to every sample what they do to it alone: (T, batch, ...) is one batch to them. With the axes of a sample.
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


def unroll(module: nn.Module, x: Tensor, mem: Tensor | None = None):
    """A whole sequence through a layer, a neuron or an ``nn.Sequential`` of them: what a loop over steps gives, stacked.

    The layers take their turns, each for all steps: snnTorch's Leaky in one kernel; linear layers, convolutions, pooling,
    Flatten and common activations as one batch of T * batch; any other module, and one with hooks, step by step. So does a
    neuron that has no kernel, with a warning, and an ``nn.Sequential`` in which something that keeps a state between steps is
    reached more than once: a neuron, a BatchNorm in training, a module with hooks or of a class that is not PyTorch's.

    Args:
        module: a ``snntorch.Leaky``, accelerated or not, a layer, or an ``nn.Sequential``, whose neurons have
            ``init_hidden=True``.
        x: (T, batch, ...), T at least 1.
        mem: membrane before the first step, for a single neuron with ``init_hidden=False``; None: the neuron's ``mem``. Where
            it has another shape than a step, the neuron starts from 0, as snnTorch's does.

    Returns:
        What ``module`` returns for a step, stacked: (T, batch, ...), or the pair (spikes, membranes) of those from a neuron
        with ``output=True`` or ``init_hidden=False``. ``mem`` of a neuron is then the last membrane.

    Raises:
        TypeError, ValueError: an argument of the wrong type; mem for anything but such a neuron; a layer that would be given a
            pair, or that returns for a step what is no tensor nor a tuple of them; T = 0.

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
    _check_mem(mem)
    library = _library()
    if mem is not None and not (library is not None and isinstance(module, library[1])):
        raise ValueError(f"mem belongs to a single neuron, got a {type(module).__name__}")
    repeated = _repeated(module)
    if repeated is not None:
        warn(f"{type(module).__name__} runs step by step: its {type(repeated).__name__} is reached more than once", 1)
        return _step_by_step(module, x, None)
    return _through(module, x, lambda layer, x: _whole(layer, x, mem, library))


def _whole(module, x, mem, library):
    """A whole sequence through what is no ``nn.Sequential``, or one that has hooks."""
    if library is not None and isinstance(module, library[1]):
        blocks = counted() or _why_not_whole(module, library[0]) or _prepare(module, x)
        if not isinstance(blocks, str):
            both = module.output or not module.init_hidden
            spikes, _, history = _walk(module, x, mem, both, blocks)
            return (spikes, history) if both else spikes
        warn(f"{type(module).__name__} runs step by step: {blocks}", 4)
        return _step_by_step(module, x, mem)
    if not has_hooks(module):
        if type(module) in _ANY_AXES:
            return module(x)
        flatten = type(module) is nn.Flatten and module.start_dim > 0 and x.dim() >= 2
        if flatten or _SAMPLES.get(type(module)) == x.dim() - 2:
            found, steps = module(x.flatten(0, 1)), x.shape[:2]
            return tuple(t.unflatten(0, steps) for t in found) if isinstance(found, tuple) else found.unflatten(0, steps)
    return _step_by_step(module, x, None)


def _through(module, x, run):
    """x through ``run(layer, x)`` for each layer of an ``nn.Sequential``, and of those in it; or for the module itself."""
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
    """What may keep a state between steps and has more than one turn in a step, so that layers cannot take theirs whole."""
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


def _why_not_whole(neuron, leaky_class):
    if not isinstance(neuron, leaky_class):
        return _NO_KERNEL
    return changed_behaviour(neuron, leaky_class) or ("it has hooks" if has_hooks(neuron) else None)


def _step_by_step(module, x, mem):
    steps = []
    for x_t in x:
        found = _through(module, x_t, lambda layer, x: layer(x)) if mem is None else module(x_t, mem)
        if not isinstance(found, Tensor) and not (isinstance(found, tuple) and all(isinstance(t, Tensor) for t in found)):
            raise TypeError(f"{type(module).__name__} cannot be unrolled: a step of it gives no tensor, nor a tuple of tensors")
        steps.append(found)
        if mem is not None:
            mem = found[1]
    return tuple(map(torch.stack, zip(*steps))) if isinstance(steps[0], tuple) else torch.stack(steps)
