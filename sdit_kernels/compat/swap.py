"""What the drop-ins share: the report of ``accelerate``, and modules that change their class in place.

A module stays the object it is, so that names, hooks, parameters, buffers, containers and whoever holds a reference to it need
not be told. It gets a class derived from its own, so that ``isinstance`` holds as before.
"""

from typing import NamedTuple

import torch


class Left(NamedTuple):
    """A neuron that was left as it was."""

    name: str
    kind: str
    reason: str


class Report(NamedTuple):
    """What ``accelerate`` or ``restore`` did: ``replaced``, pairs (name, class); ``left``, triples (name, class, reason)."""

    library: str
    outcome: str  # what the replaced ones run now
    replaced: tuple[tuple[str, str], ...]
    left: tuple[Left, ...]

    def __str__(self):
        lines = [f"{self.library}: {len(self.replaced)} replaced, {len(self.left)} left as they were"]
        width = max((len(entry[0]) for entry in (*self.replaced, *self.left)), default=0)
        lines += [f"  {name:{width}}  {kind}: {self.outcome}" for name, kind in self.replaced]
        lines += [f"  {name:{width}}  {kind}: left, {reason}" for name, kind, reason in self.left]
        return "\n".join(lines)


class Swapped(torch.nn.Module):
    """First base of the classes that ``swapped_class`` makes; a module, because Python lets an object change its class only
    between classes that lay out their instances alike."""

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


def check_model(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def swap(library: str, model, neuron_bases, choose) -> Report:
    """Give every module for which ``choose(module)`` is a mixin its new class; a string is the reason to leave it.

    ``neuron_bases``: classes whose instances the report names where ``choose`` knows nothing of them (returns None).
    """
    check_model(model)
    replaced, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            continue
        chosen = choose(module)
        name, kind = name or "(the model)", type(module).__name__
        if isinstance(chosen, type):
            module.__class__ = swapped_class(chosen, type(module))
            replaced.append((name, kind))
        elif chosen is not None:
            left.append(Left(name, kind, chosen))
        elif isinstance(module, neuron_bases):
            left.append(Left(name, kind, "this kind of neuron has no fused kernel here"))
    return Report(library, "fused", tuple(replaced), tuple(left))


def swap_back(library: str, model, mixins) -> Report:
    """Undo ``swap``. The state is where it was, in the module."""
    check_model(model)
    replaced, left = [], []
    for name, module in model.named_modules():
        if isinstance(module, mixins):
            name, kind = name or "(the model)", type(module).__name__
            if "_original" in vars(type(module)):
                module.__class__ = type(module)._original
                replaced.append((name, kind))
            else:
                left.append(Left(name, kind, "its class was changed again after accelerate"))
    return Report(library, f"{library}'s own code", tuple(replaced), tuple(left))


_HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "extra_repr",
             "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__",
             "__orig_bases__", "__parameters__", "__abstractmethods__", "_abc_impl", "__repr__"}  # fmt: skip


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
