"""What the drop-ins share: the report of ``accelerate``, and modules that get other methods in place.

A module stays the object it is, so that names, hooks, parameters, buffers, containers and whoever holds a reference to it need
not be told. There are two ways. A neuron of a library keeps its very class, since programs look neurons up by it
(``table[type(module)]``, ``type(module) is LIFNode``): the methods of the library's class ask each neuron whether it is fused.
A layer of a user's file gets a class derived from its own (``Swapped``), and that file's classes stay as they are.
"""

import functools
import re
import sys
import warnings
from typing import NamedTuple

import torch

from .._torch import active_modes, dispatch_mode_count, function_mode_count


class Left(NamedTuple):
    """A neuron that was left as it was."""

    name: str
    kind: str
    reason: str


class Report(NamedTuple):
    """What ``accelerate`` or ``restore`` did: ``replaced``, pairs (name, class); ``left``, triples (name, class, reason)."""

    library: str
    outcome: str  # what the replaced ones run now; in an empty report, why it is empty
    replaced: tuple[tuple[str, str], ...]
    left: tuple[Left, ...]

    def __str__(self):
        lines = [f"{self.library}: {len(self.replaced)} replaced, {len(self.left)} left as they were"]
        if not self.replaced and not self.left:
            lines[0] += f": {self.outcome}"
        width = max((len(entry[0]) for entry in (*self.replaced, *self.left)), default=0)
        lines += [f"  {name:{width}}  {kind}: {self.outcome}" for name, kind in self.replaced]
        lines += [f"  {name:{width}}  {kind}: left, {reason}" for name, kind, reason in self.left]
        return "\n".join(lines)


class Methods:
    """Base of what takes the place of a library's methods: static functions (own, module, *args, **kwargs), under the names of
    those methods, where ``own`` is the library's. Names with an underscore are helpers."""

    @staticmethod
    def extra_repr(own, module):
        text, mark = own(module), "fused by sdit_kernels"
        return text if mark in text else ", ".join(filter(None, (text, mark)))  # own may have asked its base class


class Fused:
    """In the ``__dict__`` of a module, where copies and pickles find it: the module runs these methods."""

    def __init__(self, methods: type[Methods], cls: type):
        self.methods = methods
        self.cls = cls
        for name in dir(methods):
            if not name.startswith("_") and hasattr(cls, name):  # SpikingJelly 0.0.0.0.14 has fewer
                _ask(cls, name)

    def __reduce__(self):  # the library's class in another process has to be told as well
        return Fused, (self.methods, self.cls)


def _ask(cls, name):
    """Let the method of this name, in the class of the library that defines it, ask whether the module is fused."""
    home = next((c for c in cls.__mro__ if name in vars(c) and not c.__module__.startswith("torch.")), cls)
    own = getattr(home, name)
    if hasattr(own, "asks_if_fused"):
        return

    @functools.wraps(own)
    def method(self, *args, **kwargs):
        fused = self._sdit_kernels
        return own(self, *args, **kwargs) if fused is None else getattr(fused.methods, name)(own, self, *args, **kwargs)

    method.asks_if_fused = True
    home._sdit_kernels = None  # what a module has that is not fused
    setattr(home, name, method)


class Swapped(torch.nn.Module):
    """First base of the classes that ``swapped_class`` makes; a module, because Python lets an object change its class only
    between classes that lay out their instances alike."""

    _mixin: type
    _original: type

    def __reduce_ex__(self, protocol):
        """Those classes have no name to be pickled by: copies and pickles say what they are made of."""
        rest = super().__reduce_ex__(max(protocol, 2))[2:]
        return _rebuild, (type(self)._mixin, type(self)._original), *rest


_classes: dict[tuple[type, type], type] = {}


def swapped_class(mixin: type, original: type) -> type:
    """``original`` with the methods of ``mixin``, under its own name; the same class each time."""
    if (mixin, original) not in _classes:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        body = names | {"_mixin": mixin, "_original": original}
        _classes[mixin, original] = type(original.__name__, (mixin, original), body)
    return _classes[mixin, original]


def _rebuild(mixin, original):
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)


def original_class(module: Swapped | type[Swapped]) -> type:
    """The class that ``swapped_class`` derived the class of a module from."""
    return module._original


def fused_methods(module) -> type[Methods]:
    """The methods of a module that has those of a ``Methods``."""
    return module._sdit_kernels.methods


def methods_of(module) -> type | None:
    """Which of this package's methods a module has got, if any."""
    if isinstance(module, Swapped):
        return type(module)._mixin
    fused = vars(module).get("_sdit_kernels")
    return None if fused is None else fused.methods


def replace_methods(module, methods: type[Methods] | type[Swapped]):
    """Give a module the methods of a ``Methods`` or of a ``Swapped``."""
    if issubclass(methods, Swapped):
        module.__class__ = swapped_class(methods, type(module))
    else:
        module.__dict__["_sdit_kernels"] = Fused(methods, type(module))


def check_model(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def swap(library: str, model, choose, suspect=lambda module: None) -> Report:
    """Give every module for which ``choose(module)`` is a ``Methods`` or a ``Swapped`` its methods; a string is the reason to
    leave it.

    ``suspect(module)``: why a module of which ``choose`` knows nothing (returns None) belongs into the report all the same. It
    does not count where something that is in the report, or was replaced before, is inside the module or around it.
    """
    check_model(model)
    modules = list(model.named_modules())
    already = {module for _, module in modules if methods_of(module) is not None}
    chosen = {module: choose(module) for _, module in modules if module not in already}
    known = already | {module for module, found in chosen.items() if found is not None}
    parts = {part for module in known for part in module.modules()}
    for _, module in reversed(modules):  # children before their parents
        reason = None if module in parts else suspect(module)
        if reason is not None and known.isdisjoint(module.modules()):
            chosen[module] = reason
            known.add(module)
    replaced, left = [], []
    for name, module in modules:
        found, name, kind = chosen.get(module), name or "(the model)", type(module).__name__
        if isinstance(found, type):
            replace_methods(module, found)
            replaced.append((name, kind))
        elif found is not None:
            left.append(Left(name, kind, found))
    outcome = "fused"
    if not replaced and not left:
        outcome = f"{len(already)} run fused already" if already else f"nothing of {library} was found in the model"
    return Report(library, outcome, tuple(replaced), tuple(left))


def swap_back(library: str, model, bases) -> Report:
    """Undo ``swap`` where the methods are of one of these bases. The state is where it was, in the module."""
    check_model(model)
    replaced, left = [], []
    for name, module in model.named_modules():
        methods = methods_of(module)
        if methods is None or not issubclass(methods, bases):
            continue
        name, kind = name or "(the model)", type(module).__name__
        if vars(module).pop("_sdit_kernels", None) is None:
            if "_original" not in vars(type(module)):
                left.append(Left(name, kind, "its class was changed again after accelerate"))
                continue
            module.__class__ = type(module)._original
        replaced.append((name, kind))
    outcome = f"{library}'s own code" if replaced or left else "nothing in the model was accelerated"
    return Report(library, outcome, tuple(replaced), tuple(left))


def class_names(module) -> list[tuple[str, str]]:
    """(module, name) of the classes of a module; empty for PyTorch's own and this package's. TorchScript hides the name."""
    names = [(cls.__module__, cls.__name__) for cls in type(module).__mro__ if cls.__module__ != "builtins"]
    if any(path.partition(".")[0] == "sdit_kernels" for path, _ in names):
        return []
    names = [(path, name) for path, name in names if path.partition(".")[0] != "torch"]
    if isinstance(module, torch.jit.ScriptModule):
        names.append(("torch.jit", getattr(module, "original_name", "")))
    return names


# LIFNode, MultiStepLIF, IF_Neuron, QIFNode, SpikingNeuron, but not AIFI, SIFT or DIFF
_NEURON_NAME = re.compile(r"LIF(?![a-z])|IF(?=$|[_\d]|[A-Z][a-z])|Neuron(?![a-z])|Izhikevich")
_NEURON_FILE = re.compile(r"(^|[._])neurons?($|\.)")


def suspected_neuron(known: str):
    """For ``swap``: why a module that looks like a spiking neuron is left, where what derives from ``known`` is taken."""

    def suspect(module):
        for path, name in class_names(module):
            if _NEURON_NAME.search(name) or _NEURON_FILE.search(path):
                home = path.partition(".")[0]
                hint = f"; for that library there is sdit_kernels.compat.{home}" if home in ("spikingjelly", "snntorch") else ""
                return f"it looks like a spiking neuron, {path}.{name}, but does not derive from {known}{hint}"
        return None

    return suspect


def refuse_symbols(module, x):
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            f"torch.fx cannot trace through a fused {type(module).__name__}: use a torch.fx.Tracer whose is_leaf_module is "
            "True for it, or restore the model before"
        )


def counted() -> str | None:
    """Why the library's own code has to run at this moment: one of SpikingJelly's modes that count operations is active."""
    if torch.compiler.is_compiling() or not (dispatch_mode_count() or function_mode_count()):
        return None
    modes = active_modes()
    if modes is None and "spikingjelly.activation_based.op_counter" in sys.modules:
        return "this version of PyTorch does not tell whether SpikingJelly counts the operators of PyTorch"
    for mode in modes or ():
        if any(cls.__module__.startswith("spikingjelly.") for cls in type(mode).__mro__):
            return f"{type(mode).__name__} counts the operators of PyTorch, and a fused kernel would count as nothing"
    return None


@torch.compiler.assume_constant_result  # while torch.compile traces, once for the graph
def warn(message: str, frames: int):
    """``frames``: from the caller of this to the user's."""
    warnings.warn(message, stacklevel=2 + frames)


_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "extra_repr",
             "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
             "__orig_bases__", "__parameters__", "__abstractmethods__", "_abc_impl", "__repr__", "_sdit_kernels"}  # fmt: skip


@torch.compiler.assume_constant_result  # what it reads, torch.compile cannot; the graph is for this module only
def changed_behaviour(module, base) -> str | None:
    """Why ``module``, an instance of ``base``, may do other than ``base``; None if it does not."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize)"
    for cls in type(module).__mro__:
        if cls is base:
            break
        changed = sorted(name for name in vars(cls) if name not in _HARMLESS and hasattr(base, name))
        if changed:
            return f"{cls.__name__} overrides {', '.join(changed)} of {base.__name__}"
    patched = sorted(name for name in vars(module) if callable(vars(module)[name]) and callable(getattr(base, name, None)))
    if patched:
        return f"{', '.join(patched)} of {base.__name__} {'is' if len(patched) == 1 else 'are'} replaced on the instance"
    return None
