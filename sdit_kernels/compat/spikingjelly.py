r"""Run the neurons of a SpikingJelly model on the fused kernels, with one line in an existing project.

>>> import torch
>>> from sdit_kernels.compat.spikingjelly import accelerate
>>> report = accelerate(torch.nn.Linear(2, 2))  # your model, before or after you train, move or load it
>>> print(report)
SpikingJelly: 0 replaced, 0 left as they were: nothing of SpikingJelly was found in the model

``LIFNode``, ``IFNode``, ``ParametricLIFNode``, ``ILIFNode``, ``TernaryLIFNode`` and ``TernaryIFNode`` then run
:func:`sdit_kernels.lif`, in both step modes. Each neuron stays the same object of the same class, with its names, parameters,
hooks, states (``v``, ``v_seq``) and state_dict. So code that looks a neuron up by its class still finds it, and
``base.to_functional_forward`` works too. This module does not import SpikingJelly. It works with SpikingJelly 2.0.0 and
0.0.0.0.14; in the latter, the option ``backend`` keeps its value but has no effect.

The page "SpikingJelly" of the documentation lists the differences. The most important ones:

- A step multiplies by 1/tau; SpikingJelly divides by tau. The results are equal if tau is a power of two. For other tau, a
  neuron very close to its threshold may spike or not.
- ``ILIFNode`` in multi-step mode computes (1 - 1/tau) v + x, the kernel v - v/tau + x; the same holds.
- bfloat16 and float16 data: the membrane potential is float32 within a call. SpikingJelly rounds it in every step on the CPU.
- Do not change the input of a neuron in place before the backward pass; autograd raises an error.
- ``ParametricLIFNode``: a w below -80 (-700 in float64) counts as -80 (-700) and gets no gradient; 1/tau is 2e-35 there.
- SpikingJelly's counters (``DispatchCounterMode``, the profilers) do not know a fused kernel. Under a counter, the neurons run
  SpikingJelly's code, with a warning, and the counts are the same as before. Run the backward pass under the same counter.
- After ``accelerate``, a neuron may get a setting or data that the kernels do not take: another surrogate, ``spiking=False``, a
  neuron precision, tau below 1, an infinite threshold, a NaN as w on the CPU, integer data. It then runs SpikingJelly's code,
  with a warning in each call.
"""

import functools
import sys

import torch

from ..checks import check_flag
from ..dispatch import backend
from ..ops.lif import lif
from .fuse import FusedNorm, PackedMaxPool, Whole, accelerate_whole, choose_pool, norm_chooser, restore_readers
from .lif_nodes import NODES, MultiStep, Node, SingleStep, difference_of_copy, find_firing, neuron_settings
from .swap import Report, changed_behaviour, check_model, fuse_class, suspected_neuron, swap, swap_back

__all__ = ["accelerate", "restore"]


def _is_neuron(module):
    """True if the class of the module, or a base class, comes from a neuron module of SpikingJelly or of this package."""
    parts = (cls.__module__.split(".") for cls in type(module).__mro__)
    return any(names[0] in ("spikingjelly", "sdit_kernels") and "neuron" in names for names in parts)


_suspect = suspected_neuron(
    "LIFNode, IFNode, ParametricLIFNode, ILIFNode or a ternary neuron of SpikingJelly, activation_based or clock_driven"
)


def neuron_classes(neurons) -> dict[type, type | str]:
    """Return the methods for each class that a neuron module of SpikingJelly, or of a copy of it, defines.

    A copy may be edited. A class of a copy that computes something else has the reason in place of the methods.
    """
    return {cls: difference_of_copy(cls, methods) or methods for cls, methods in _methods_of_classes(neurons).items()}


def _methods_of_classes(neurons):
    table = NODES[neurons.__name__.split(".")[-2]]
    return {getattr(neurons, name): methods for name, methods in table.items() if hasattr(neurons, name)}


def fuse_classes(neurons) -> list[type]:
    """Run all neurons of a neuron module of SpikingJelly on the kernels, also later ones. Return the classes."""
    found = _methods_of_classes(neurons)
    for cls, methods in found.items():
        fuse_class(cls, methods, functools.partial(difference_of_copy, cls, methods))
    return list(found)


def _all_classes():
    """Return ``neuron_classes`` of every neuron module that is imported. A model cannot contain other neurons."""
    endings = tuple(f".{interface}.neuron" for interface in NODES)
    found: dict[type, type | str] = {}
    for name, module in list(sys.modules.items()):
        if name.endswith(endings) and module is not None:
            found |= neuron_classes(module)
    return found


def _choose(module, bases):
    """Return the methods for a module, the reason to leave it, or None for other modules."""
    base = next((cls for cls in type(module).__mro__ if cls in bases), None)
    if base is None:
        return "this kind of neuron has no fused kernel here" if _is_neuron(module) else None
    methods = bases[base]
    if isinstance(methods, str):
        return methods
    reason = changed_behaviour(module, base)
    if reason is not None:
        return reason
    firing = find_firing(module, methods)
    if isinstance(firing, str):
        return firing
    device = next((p.device for p in module.parameters(recurse=False)), "cpu")
    try:
        x = torch.empty(0, device=device, dtype=torch.float32)
        with backend("reference"):
            lif(x, **neuron_settings(module, firing, methods.leak(module, x)))
    except (TypeError, ValueError) as error:
        return f"the kernels refuse its settings: {error}"
    return methods


def accelerate(model: torch.nn.Module, *, fuse: bool = False, packed: bool = False) -> Report:
    """Run the LIF, IF, parametric LIF, integer LIF and ternary neurons of a SpikingJelly model on the fused kernels.

    With ``fuse``, a BatchNorm and the neuron that gets its output, directly or through views, run as one operation,
    :func:`sdit_kernels.norm_lif`. The normalised input of the neuron is then neither written to memory nor kept. The norm and
    the neuron find each other in each call, so the path of forward may change after ``accelerate``. A norm whose output goes
    elsewhere computes as before.

    With ``packed``, the forward pass of the model runs under :class:`sdit_kernels.packed_spikes`: other layers keep spikes for
    the backward pass as bits. A ``MaxPool2d`` over windows side by side runs on a kernel that keeps two bits per window of
    2 x 2.

    Args:
        model: a neuron of SpikingJelly, or any module that contains some. The function changes it in place. A second call
            changes nothing more, except for options that are new.
        fuse: fuse the BatchNorms too: PyTorch's ``BatchNorm1d``, ``2d`` and ``3d``, and the norms of SpikingJelly's ``layer``,
            also tdBN, TEBN and BNTT. Norms with hooks, shared norms, parametrized norms and subclasses with another forward
            are left.
        packed: keep spikes as bits in calls of the model. To call only a part of the model, enter the context yourself.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of the
        neurons that did not change: other neurons; subclasses that override more than defaults; surrogates without a formula in
        ``sdit_kernels.SURROGATES``, with ``spiking=False``, with hooks, or with an alpha that is not a positive number; neurons
        with a neuron precision; parametrized modules. With ``fuse``, both lists hold the norms too.

    Raises:
        TypeError: model is not a module, or an option is not a bool.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.spikingjelly import accelerate, restore
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))  # with SpikingJelly's neurons in it
        >>> accelerate(model).replaced
        ()
    """
    check_model(model)
    check_flag("fuse", fuse)
    check_flag("packed", packed)
    bases = _all_classes()
    more = [norm_chooser(model)] * fuse + [choose_pool] * packed

    def choose(module):
        return _choose(module, bases) or next(filter(None, (chooser(module) for chooser in more)), None)

    report = swap("SpikingJelly", model, choose, _suspect)
    return accelerate_whole(model, report, fuse, packed) if fuse or packed else report


def restore(model: torch.nn.Module) -> Report:
    """Undo :func:`accelerate`: the neurons run SpikingJelly's own code again and keep their state.

    Args:
        model: the model that ``accelerate`` changed, or a part, copy or unpickled copy of it. The function changes it in place.

    Returns:
        A report like the report of ``accelerate``. ``replaced`` holds the neurons that run SpikingJelly's code again.

    Raises:
        TypeError: model is not a module.
    """
    report = swap_back("SpikingJelly", model, (Node, SingleStep, MultiStep, FusedNorm, PackedMaxPool, Whole))
    restore_readers(model)
    return report
