"""Helpers of all drop-ins: the report of ``accelerate``, and the replacement of a module's methods in place.

A module stays the same object, so names, hooks, parameters, buffers, containers and references to it do not change. There are
two ways to replace its methods. A neuron of a library keeps its class, because programs look neurons up by it
(``table[type(module)]``, ``type(module) is LIFNode``): the methods of the library's class check for each neuron if it is fused.
A layer from a user's file gets a class derived from its own (``Swapped``), and the classes of that file do not change.

``swap`` and ``swap_back`` do the work of ``accelerate`` and ``restore``. A module is fused while its methods are replaced.
"""

import functools
import inspect
import re
import sys
import warnings
from typing import Any, NamedTuple

import torch

from .._torch import active_modes, assume_constant_result, dispatch_mode_count, function_mode_count
from ..packed import has_other_modes


class Left(NamedTuple):
    """A module that ``accelerate`` did not change."""

    name: str
    kind: str
    reason: str


class Report(NamedTuple):
    """Result of ``accelerate`` and ``restore``: (name, class) in ``replaced``, (name, class, reason) in ``left``."""

    library: str
    outcome: str  # the code that the replaced modules run now; in an empty report, the reason why it is empty
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
    """Base class of the methods that replace a library's methods of the same names.

    They are static functions (own, module, *args, **kwargs), where ``own`` is the library's method. Names that start with an
    underscore are helpers.
    """

    @staticmethod
    def extra_repr(own, module):
        text, mark = own(module), "fused by sdit_kernels"
        return (
            text if mark in text else ", ".join(filter(None, (text, mark)))
        )  # if own calls super().extra_repr(), the text has the mark already


class Fused:
    """Marks a module as fused, with its methods. It is in the ``__dict__`` of the module, so copies and pickles contain it."""

    def __init__(self, methods: type[Methods], cls: type):
        self.methods = methods
        self.cls = cls
        public = {name: getattr(methods, name) for name in dir(methods) if not name.startswith("_")}
        properties = {name: value for name, value in public.items() if isinstance(value, property)}
        # SpikingJelly 0.0.0.0.14 has fewer methods
        names = [name for name in public if name not in properties and hasattr(cls, name)]
        self.homes = {name: _dispatch_if_fused(cls, name) for name in names}
        for name, value in properties.items():
            setattr(self.homes["forward"], name, value)
        self.own_methods = frozenset(name for name in dir(cls) if callable(getattr(cls, name)))

    def serves(self, module) -> bool:
        return self.own_methods.isdisjoint(vars(module)) or _serves_patched(self, module)

    def __reduce__(self):  # unpickling in another process must patch the library's class there too
        return type(self), (self.methods, self.cls)


class FusedClass(Fused):
    """Marks a class: all its instances are fused; of its subclasses only those that keep the code that the kernels replace.

    ``check()`` returns the reason why the class itself must run its own code, or None. The first call of a neuron asks it.
    """

    def __init__(self, methods, cls, check):
        super().__init__(methods, cls)
        self.homes.pop("extra_repr", None)  # repr stays the library's
        self.check = check
        self.reasons = {}  # of the class and its subclasses: the reason why not, or None

    def serves(self, module):
        kind = type(module)
        known = self.reasons[kind] is None if kind in self.reasons else _serves_class(self, module)
        return known and super().serves(module)


@assume_constant_result  # torch.compile calls it once per graph
def _serves_class(fused, module):
    reason = fused.check() or changed_class(module, fused.cls, harmless=("forward",))
    fused.reasons[type(module)] = reason
    if reason is not None:
        warn(f"{type(module).__name__} runs its own code: {reason}", 5)
    return reason is None


@assume_constant_result  # torch.compile calls it once per graph
def _serves_patched(fused, module):
    """Return False, with a warning, if a method other than forward is replaced on the instance."""
    patched = fused.own_methods & vars(module).keys() - {"forward"}
    reason = changed_instance(module, fused.cls, harmless=("forward",)) if patched else None
    if reason is not None:
        warn(f"{type(module).__name__} runs its own code: {reason}", 5)
    return reason is None


def fuse_class(cls: type, methods: type[Methods], check):
    """Replace the methods of a class, for all its instances, also instances that are made later, unless ``check()`` objects."""
    setattr(cls, "_sdit_kernels", FusedClass(methods, cls, check))  # noqa: B010, because mypy knows no attribute of that name


def unfuse_class(cls: type):
    """Undo ``fuse_class``."""
    setattr(cls, "_sdit_kernels", None)  # noqa: B010, as above


def _dispatch_if_fused(cls, name):
    """Patch the method in the library's class that defines it, so that it calls our method if the module is fused.

    Return this class, the method's home. A method of the library may call the base class's method of the same name. This call
    must stay the library's, so only the method in a module's own home calls ours.
    """
    home = next((c for c in cls.__mro__ if name in vars(c) and not c.__module__.startswith("torch.")), cls)
    own = getattr(home, name)
    if hasattr(own, "asks_if_fused"):
        return home

    @functools.wraps(own)
    def method(self, *args, **kwargs):
        fused = self._sdit_kernels
        if fused is None or fused.homes.get(name) is not home or not fused.serves(self):
            return own(self, *args, **kwargs)
        return getattr(fused.methods, name)(own, self, *args, **kwargs)

    method.asks_if_fused = True
    if "_sdit_kernels" not in vars(home):
        home._sdit_kernels = None  # the default: the module is not fused
    setattr(home, name, method)
    return home


class Swapped(torch.nn.Module):
    """First base of the classes that ``swapped_class`` makes.

    It derives from Module, because Python changes the class of an object only between classes with the same instance layout.
    """

    _mixin: type
    _original: type

    @classmethod
    def made_from(cls, mixin: type, original: type):
        """Prepare a class that ``swapped_class`` has just made from ``mixin`` and ``original``."""

    def __reduce_ex__(self, protocol):
        """Pickle the two classes that this class was made from, because pickle cannot find this class by its name."""
        rest = super().__reduce_ex__(max(protocol, 2))[2:]
        return _rebuild, (type(self)._mixin, type(self)._original), *rest


_classes: dict[tuple[type, type], type] = {}


def swapped_class(mixin: type, original: type) -> type:
    """Return a class with the methods of ``mixin`` and the name of ``original``; the same class each time."""
    if (mixin, original) not in _classes:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        body = names | {"_mixin": mixin, "_original": original}
        cls: Any = type(original.__name__, (mixin, original), body)
        cls.made_from(mixin, original)
        _classes[mixin, original] = cls
    return _classes[mixin, original]


def _rebuild(mixin, original):
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)


def original_class(module: Swapped | type[Swapped]) -> type:
    """Return the class that a module, or a class made by ``swapped_class``, had before."""
    return module._original


def fused_methods(module) -> type[Methods]:
    """Return the ``Methods`` of a fused module."""
    return module._sdit_kernels.methods


def methods_of(module) -> type | None:
    """Return the ``Methods`` or ``Swapped`` of a module, or None."""
    if isinstance(module, Swapped):
        return type(module)._mixin
    fused = getattr(module, "_sdit_kernels", None)
    return None if fused is None else fused.methods


def _is_fused_itself(module):
    """True if the module was replaced, and not only its class."""
    return isinstance(module, Swapped) or vars(module).get("_sdit_kernels") is not None


def replace_methods(module, methods: type[Methods] | type[Swapped]):
    """Replace the methods of a module by the methods of a ``Methods`` or of a ``Swapped``."""
    if issubclass(methods, Swapped):
        module.__class__ = swapped_class(methods, type(module))
    else:
        module.__dict__["_sdit_kernels"] = Fused(methods, type(module))


def check_model(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def swap(library: str, model, choose, suspect=lambda module: None) -> Report:
    """Replace the methods of the modules of a model and return the report.

    choose(module): a ``Methods`` or ``Swapped`` to use, the reason (a string) to leave the module, or None for an unknown
    module. suspect(module): the reason why an unknown module belongs in the report, or None. The report omits a suspected
    module if it contains, or is part of, another module that is in the report or was replaced before.
    """
    check_model(model)
    modules = list(model.named_modules())
    already = {module for _, module in modules if _is_fused_itself(module)}
    chosen = {module: choose(module) for _, module in modules if module not in already}
    known = already | {module for module, found in chosen.items() if found is not None}
    parts = {part for module in known for part in module.modules()}
    for _, module in reversed(modules):  # children before parents
        reason = None if module in parts else suspect(module)
        if reason is not None and known.isdisjoint(module.modules()):
            chosen[module] = reason
            known.add(module)
    replaced, left = [], []
    for name, module in modules:
        choice, name, kind = chosen.get(module), name or "(the model)", type(module).__name__
        if isinstance(choice, type):
            replace_methods(module, choice)
            replaced.append((name, kind))
        elif choice is not None:
            left.append(Left(name, kind, choice))
    outcome = "fused"
    if not replaced and not left:
        outcome = f"{len(already)} run fused already" if already else f"nothing of {library} was found in the model"
    return Report(library, outcome, tuple(replaced), tuple(left))


def swap_back(library: str, model, bases) -> Report:
    """Undo ``swap`` for modules whose methods derive from ``bases``. The state stays in the module."""
    check_model(model)
    replaced, left = [], []
    for name, module in model.named_modules():
        methods = methods_of(module)
        if methods is None or not issubclass(methods, bases):
            continue
        name, kind = name or "(the model)", type(module).__name__
        if not isinstance(module, Swapped):
            vars(module).pop("_sdit_kernels", None)
            if module._sdit_kernels is not None:  # its class is fused
                vars(module)["_sdit_kernels"] = None
        elif "_original" in vars(type(module)):
            module.__class__ = type(module)._original
        else:
            left.append(Left(name, kind, "its class was changed again after accelerate"))
            continue
        replaced.append((name, kind))
    outcome = f"{library}'s own code" if replaced or left else "nothing in the model was accelerated"
    return Report(library, outcome, tuple(replaced), tuple(left))


def class_names(module) -> list[tuple[str, str]]:
    """Return (Python module, name) of the classes of a module except PyTorch's. Return nothing if one is from this package.

    TorchScript hides the name, so it comes from ``original_name``.
    """
    names = [(cls.__module__, cls.__name__) for cls in type(module).__mro__ if cls.__module__ != "builtins"]
    if any(path.partition(".")[0] == "sdit_kernels" for path, _ in names):
        return []
    names = [(path, name) for path, name in names if path.partition(".")[0] != "torch"]
    if isinstance(module, torch.jit.ScriptModule):
        names.append(("torch.jit", getattr(module, "original_name", "")))
    return names


# matches LIFNode, MultiStepLIF, IF_Neuron, QIFNode and SpikingNeuron, but not AIFI, SIFT and DIFF
_NEURON_NAME = re.compile(r"LIF(?![a-z])|IF(?=$|[_\d]|[A-Z][a-z])|Neuron(?![a-z])|Izhikevich")
_NEURON_FILE = re.compile(r"(^|[._])neurons?($|\.)")


def named_like_a_neuron(module) -> tuple[str, str] | None:
    """Return (Python module, name) of a class of the module whose name looks like a spiking neuron, or None."""
    found = class_names(module)
    return next(((path, name) for path, name in found if _NEURON_NAME.search(name) or _NEURON_FILE.search(path)), None)


def suspected_neuron(known: str):
    """Return the ``suspect`` function of ``swap`` for modules whose names look like spiking neurons.

    ``known``: the classes that are replaced, for the message.
    """

    def suspect(module):
        found = named_like_a_neuron(module)
        if found is not None:
            path, name = found
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
    """Return why the library's own code must run now: SpikingJelly is counting operations, and a fused kernel would count as
    nothing. None: no counter is active."""
    return None if torch.compiler.is_compiling() else find_counter()


def find_counter() -> str | None:
    """Return what ``counted`` returns, outside torch.compile."""
    if not (function_mode_count() or (dispatch_mode_count() and has_other_modes())):
        return None
    modes = active_modes()
    if modes is None and "spikingjelly.activation_based.op_counter" in sys.modules:
        return "this version of PyTorch does not tell whether SpikingJelly counts the operators of PyTorch"
    for mode in modes or ():
        if any(cls.__module__.startswith("spikingjelly.") for cls in type(mode).__mro__):
            return f"{type(mode).__name__} counts the operators of PyTorch, and a fused kernel would count as nothing"
    return None


@assume_constant_result  # torch.compile calls it once per graph, while it traces
def warn(message: str, frames: int):
    """Warn at the user's line. ``frames``: number of frames from the caller of this function to the user's code."""
    warnings.warn(message, stacklevel=2 + frames)


_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "extra_repr",
             "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
             "__orig_bases__", "__parameters__", "__abstractmethods__", "_abc_impl", "__repr__", "_sdit_kernels"}  # fmt: skip


@assume_constant_result  # torch.compile cannot trace the attributes it reads; the graph is for this module only
def changed_behaviour(module, base) -> str | None:
    """Return the reason why ``module``, an instance of ``base``, may behave differently from ``base``, or None."""
    return changed_class(module, base) or changed_instance(module, base)


def changed_class(module, base, harmless=()) -> str | None:
    """Return the reason why the class of ``module`` may behave differently from ``base``, or None.

    harmless: names that a subclass may override.
    """
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize)"
    kind = type(module)
    for cls in kind.__mro__:  # with several bases, an override may come after base
        names = vars(cls).keys() - _HARMLESS - set(harmless) if cls not in base.__mro__ else ()
        changed = sorted(n for n in names if hasattr(base, n) and inspect.getattr_static(kind, n) is vars(cls)[n])
        if changed:
            return f"{cls.__name__} overrides {', '.join(changed)} of {base.__name__}"
    return None


def changed_instance(module, base, harmless=()) -> str | None:
    """Return the reason if methods of ``base`` are replaced on the instance, or None."""
    patched = sorted(n for n, value in vars(module).items() if callable(value) and callable(getattr(base, n, None)))
    patched = [name for name in patched if name not in harmless]
    if patched:
        return f"{', '.join(patched)} of {base.__name__} {'is' if len(patched) == 1 else 'are'} replaced on the instance"
    return None
