r"""Run LIF neurons that a project wrote itself, as a loop over time steps, on the fused kernels.

Published spiking networks often contain such a class (``LIFSpike``, ``mem_update``, ``IF``, ...)::

    for t in range(T):
        mem = mem * self.tau + x[:, t]
        spike = self.act(mem - self.thresh, self.gama)
        mem = (1 - spike) * mem

This module recognises a neuron by what it computes, not by its name. It runs a copy of the module on chosen inputs and reads
from the spikes and gradients: the time axis, the decay, the threshold, the reset and the surrogate gradient. It replaces the
neuron only if the fused neuron then has the same spikes and the same gradients on fresh random inputs. The page "Hand-written
neurons" of the documentation lists the accepted forms, and the reasons why a module is left.
"""

import dis
import inspect
import re
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import assume_constant_result, has_hooks
from ..ops.operator import values_are_readable
from .fit_levels import fit_levels
from .fit_lif import DECAYS, NOT_BINARY, SIMPLE, Cannot, Found, fit_lif, is_foreign
from .swap import (
    Report,
    Swapped,
    check_model,
    class_names,
    counted,
    methods_of,
    named_like_a_neuron,
    original_class,
    refuse_symbols,
    swap,
    swap_back,
    warn,
)

__all__ = ["accelerate", "restore"]

_LIBRARY = "hand-written neurons"


# --- the fused neuron -------------------------------------------------------------------------------------------------------


class _Watched(NamedTuple):
    """What the neuron's code may read: an attribute of a module, or a global of a file."""

    path: tuple[str, ...]  # names of the children on the way to the attribute; of a global: the file's module
    name: str
    value: Any  # of a number, flag or string in ``attributes`` the value itself, else its ``_settings``


class _Fit(NamedTuple):
    """The neuron that a module computed when ``accelerate`` ran it, and the values that its code may read."""

    neuron: Found
    attributes: tuple[_Watched, ...]
    holders: tuple[
        _Watched, ...
    ]  # attributes that hold settings: lists, dicts, namespaces, classes; the value is ``_settings``
    constants: tuple[_Watched, ...]
    methods: frozenset[str]  # names of methods that the instance replaces


class _HandWritten(Swapped):
    """A neuron that a project wrote itself, on the fused kernels."""

    _handwritten: _Fit

    def forward(self, x, *args, **kwargs):
        refuse_symbols(self, x)
        reason = counted() or _why_not_now(self, x, args, kwargs)
        if reason is not None:
            warn(f"{type(self).__name__} runs its own code: {reason}", 3)
            return original_class(self).forward(self, x, *args, **kwargs)
        form, layout, _, dtypes = self._handwritten.neuron
        spikes = layout.back(form.run(layout.time_first(x), self._parameters))
        spikes = spikes.contiguous() if x.is_contiguous() else spikes
        return spikes.to(next(out for dtype, out in dtypes if dtype == x.dtype))

    def extra_repr(self):
        return ", ".join(filter(None, (super().extra_repr(), f"{self._handwritten.neuron.form}, fused by sdit_kernels")))


def _why_not_now(module, x, args, kwargs) -> str | None:
    """Return why the neuron must run its own code for this call, or None."""
    form, layout, ranks, dtypes = module._handwritten.neuron
    if args or kwargs:
        return "it is called with more than its input"
    if not isinstance(x, Tensor) or all(x.dtype != dtype for dtype, _ in dtypes):
        return f"the kernels do not take its data, {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
    if x.dim() not in ranks or not layout.fits(x):
        return f"it was not checked for data of shape {tuple(x.shape)}"
    if any(has_hooks(child) for child in module.children()):
        return "a module in it has hooks, which the kernels would not call"
    return _unfit_parameter(form, module, x) or _changed(module)


def _unfit_parameter(form, module, x) -> str | None:
    """Return why the kernels cannot take the learned values for data x, or None. Values on a GPU are not read."""
    decay, threshold = form.decay, form.threshold
    for name in (decay[0] if isinstance(decay, tuple) else None, threshold if isinstance(threshold, str) else None):
        if name is not None and module._parameters[name].device != x.device:
            return f"its parameter {name} is on {module._parameters[name].device}, its data on {x.device}"
    if isinstance(decay, tuple):
        p = module._parameters[decay[0]]
        if values_are_readable(p) and not 0 <= DECAYS[decay[1]](p.detach()).item() < 1:
            return "its decay is not between 0 and 1"
    if isinstance(threshold, str):
        p = module._parameters[threshold]
        if values_are_readable(p) and not p.detach().item() > 0:
            return "its threshold is not positive"
    return None


def _changed(module) -> str | None:
    """Return which value, read by the neuron's code, changed since ``accelerate``, or None."""
    attributes = module._handwritten.attributes
    found = _changed_attribute(module, attributes) or _changed_holder(module) or _changed_constant(module)
    if found is None and _replaced_methods(module) != module._handwritten.methods:
        found = "a method was replaced on it"
    return None if found is None else f"{found} since accelerate; call accelerate again"


def _replaced_methods(module) -> frozenset[str]:
    """Return the names of the methods of its class that a module replaces by an attribute."""
    cls = type(module)
    return frozenset(name for name in vars(module) if isinstance(getattr(cls, name, None), types.FunctionType))


def _changed_attribute(module, attributes) -> str | None:
    for path, name, value in attributes:
        holder = module
        for part in path:
            holder = getattr(holder, part)
        now = getattr(holder, name, None)
        if type(now) is not type(value) or now != value:
            return f"its attribute {'.'.join((*path, name))} changed from {value!r}"
    return None


@assume_constant_result  # torch.compile cannot guard all that a list, a dict or an object holds
def _changed_holder(module) -> str | None:
    for path, name, value in module._handwritten.holders:
        holder = module
        for part in path:
            holder = getattr(holder, part)
        if _settings(getattr(holder, name, None)) != value:
            return f"what its attribute {'.'.join((*path, name))} holds changed"
    return None


@assume_constant_result  # torch.compile cannot guard the globals of another file
def _changed_constant(module) -> str | None:
    for (file,), name, value in module._handwritten.constants:
        if file in sys.modules and _settings(vars(sys.modules[file]).get(name)) != value:
            return f"{name} in {file} changed" + (f" from {value[1]!r}" if isinstance(value[0], type) else "")
    return None


def _settings(value, depth=3):
    """Return the numbers, flags and strings in a value in a form that can be compared; None if it holds none.

    They are the value itself, the items of a list, tuple or dict, or the attributes of an object or class of the project.
    """
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, (list, tuple)):
        items = dict(enumerate(value))
    elif isinstance(value, dict):
        items = value
    elif isinstance(value, (nn.Module, Tensor, types.ModuleType, types.FunctionType)) or not hasattr(value, "__dict__"):
        return None
    elif is_foreign(value.__module__ if isinstance(value, type) else type(value).__module__):
        classes = value.__mro__ if isinstance(value, type) else type(value).__mro__
        spaces = [vars(cls) for cls in reversed(classes) if is_foreign(cls.__module__)] + [vars(value)]
        items = {name: item for space in spaces for name, item in space.items()}
        items = {name: item for name, item in items.items() if not name.startswith("__") and name not in _BARE}
    else:
        return None
    found = [(key, _settings(item, depth - 1)) for key, item in items.items() if isinstance(key, SIMPLE)] if depth else []
    return tuple((key, item) for key, item in found if item is not None) or None


# --- what the code of a neuron reads ----------------------------------------------------------------------------------------


class _BareFunction(torch.autograd.Function):
    pass


_BARE = {*vars(nn.Module()), *vars(_BareFunction), "training"}  # attributes that PyTorch sets, which are not settings


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _reads(function: types.FunctionType) -> Iterator[tuple[str, str, Any]]:
    """Yield (file, name, value) of the globals that a function may read, in its own file and in files it imports."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    spaces = {function.__globals__.get("__name__", ""): function.__globals__}
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType) and is_foreign(value.__name__):
            spaces[value.__name__] = vars(value)
    for file, space in spaces.items():
        yield from ((file, name, space[name]) for name in sorted(names.intersection(space)) if not name.startswith("__"))


def _functions(module: nn.Module) -> list[types.FunctionType]:
    """Return the functions of the project that the forward of a module may call."""
    found: dict[types.FunctionType, None] = {}
    todo: list[tuple[Any, nn.Module]] = [(type(part).forward, part) for part in module.modules()]
    while todo and len(found) < 64:
        f, part = todo.pop()
        owner = getattr(f, "__self__", None)
        f = owner if isinstance(owner, type) else getattr(f, "__func__", f)  # owner: MyFunction of MyFunction.apply
        f = inspect.unwrap(f) if isinstance(f, types.FunctionType) else f
        if isinstance(f, type) and is_foreign(f.__module__):
            todo += [(getattr(f, name), part) for name in ("forward", "backward", "setup_context") if hasattr(f, name)]
        elif isinstance(f, types.FunctionType) and is_foreign(f.__module__ or "") and f not in found:
            found[f] = None
            values = [value for _, _, value in _reads(f)]
            for name in (name for code in _codes(f.__code__) for name in code.co_names):
                values.append(vars(part).get(name, getattr(type(part), name, None)))
            values += [cell.cell_contents for cell in f.__closure__ or () if not _is_empty(cell)]
            todo += [(value, part) for value in values if callable(value) and not isinstance(value, nn.Module)]
    return list(found)


def _is_empty(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _has_loop(functions) -> bool:
    jumps = ("FOR_ITER", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
    codes = (code for f in functions for code in _codes(f.__code__))
    return any(i.opname.startswith(jumps) for code in codes for i in dis.get_instructions(code))


def _attributes(module: nn.Module) -> tuple[tuple[_Watched, ...], tuple[_Watched, ...]]:
    """Return the attributes of a module, its class and its children that are settings, and those that hold settings."""
    found: tuple[list[_Watched], list[_Watched]] = [], []
    for path, part in module.named_modules():
        names = [*vars(part)]
        for cls in type(part).__mro__:
            if is_foreign(cls.__module__) and cls is not object:
                names += [name for name in vars(cls) if not name.startswith("__")]
        for name in dict.fromkeys(names):
            value = getattr(part, name, None) if name in vars(part) else getattr(type(part), name, None)
            where = tuple(filter(None, path.split(".")))
            if name in _BARE:
                continue
            if isinstance(value, SIMPLE):
                found[0].append(_Watched(where, name, value))
            elif _settings(value) is not None:
                found[1].append(_Watched(where, name, _settings(value)))
    return tuple(found[0]), tuple(found[1])


def _numbers(settings) -> Iterator[Any]:
    """Yield all numbers in a result of ``_settings``."""
    for item in settings:
        if isinstance(item, tuple):
            yield from _numbers(item)
        elif isinstance(item, (int, float)):
            yield item


def _constants(functions) -> tuple[_Watched, ...]:
    """Return the globals that functions read and that are or hold settings, if their file can be found again by its name."""
    found = []
    for file, name, value in (read for f in functions for read in _reads(f)):
        settings = _settings(value)
        if settings is not None and file in sys.modules and vars(sys.modules[file]).get(name) is value:
            found.append(_Watched((file,), name, settings))
    return tuple(dict.fromkeys(found))


# --- which modules are tried ------------------------------------------------------------------------------------------------

_NAME = re.compile(r"(?i:spike|spiking|mem_?update)")


def _is_named(module: nn.Module) -> bool:
    return named_like_a_neuron(module) is not None or any(_NAME.search(name) for _, name in class_names(module))


def _unfit(module: nn.Module) -> str | None:
    """Return why a module cannot be a neuron that the kernels serve, before it is run, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript, which keeps its code: accelerate the model from which it was made"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, by hooks perhaps: accelerate the model before"
    if any(has_hooks(part) for part in module.modules()):
        return "it, or a module in it, has hooks that a trial would call"
    if any(
        next(child.parameters(), None) is not None or next(child.buffers(), None) is not None for child in module.children()
    ):
        return "it contains modules with parameters or buffers"
    if module._buffers:
        return f"it has buffers ({', '.join(module._buffers)}), and the kernels take numbers and parameters"
    for name, p in module.named_parameters(recurse=False):
        if p.numel() != 1:
            return f"its parameter {name} has shape {tuple(p.shape)}, and only parameters with one value are taken"
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                return f"its attribute {name} is a tensor, and may be a state: make it a number or a parameter"
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
            if name not in _BARE and any(isinstance(item, (Tensor, nn.Module)) for item in items):
                return f"its attribute {name} holds tensors or modules, and may be a state"
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    if code is None:
        return False
    defaults = len(type(module).forward.__defaults__ or ())
    return code.co_argcount - defaults == 2 or code.co_argcount == 2


def _is_own_class(module: nn.Module) -> bool:
    """True for a module of a class that the project wrote itself."""
    names = class_names(module)
    libraries = ("spikingjelly", "snntorch", "norse", "transformers", "timm")
    return bool(names) and all(path.partition(".")[0] not in libraries for path, _ in names)


def _find(module: nn.Module, device: str, numbers: list) -> Found:
    """Return the neuron that a module computes: with binary spikes, or else with integers."""
    try:
        return fit_lif(module, device, numbers)
    except Cannot as reason:
        if str(reason) != NOT_BINARY:
            raise
    return fit_levels(module, device, numbers)


def _fit(module: nn.Module) -> _Fit | str | None:
    """Return what was read from a neuron, the reason to leave it, or None if it does not look like a neuron."""
    named = _is_named(module)
    reason = _unfit(module)
    if reason is None and not _takes_one_tensor(module):
        reason = "its forward does not take one tensor"
    if reason is not None:
        return reason if named and not reason.startswith("it contains") else None
    functions = _functions(module)
    if not named and not _has_loop(functions):
        return None
    (attributes, holders), constants = _attributes(module), _constants(functions)
    numbers = [w.value for w in attributes] + [n for w in (*holders, *constants) for n in _numbers(w.value)]
    numbers += [c for f in functions for code in _codes(f.__code__) for c in code.co_consts if type(c) in (int, float)]
    best = Cannot(0, "")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):  # some files move data to the GPU themselves
        try:
            found = _find(module, device, numbers)
            return _Fit(found, attributes, holders, constants, _replaced_methods(module))
        except Cannot as found:
            best = max(found, best, key=lambda r: r.progress)
        except Exception as error:  # deepcopy, and code that is not ours, may raise anything
            best = max(
                best, Cannot(0, f"it cannot be copied and run ({type(error).__name__}: {error})"), key=lambda r: r.progress
            )
        if best.progress:
            break
    return str(best) if named or best.progress > 2 else None


def _key(module: nn.Module):
    """Return a key that equal neurons share, or None for a neuron with attributes that cannot be compared."""
    found: list[Any] = []
    for path, part in module.named_modules():
        items = {name: value for name, value in vars(part).items() if name not in _BARE}
        if not all(isinstance(value, SIMPLE) or callable(value) for value in items.values()):
            return None
        items |= {name: p.item() for name, p in part._parameters.items() if p is not None}
        found.append((path, type(part), *((name, type(value), value) for name, value in items.items())))
    try:
        hash(tuple(found))
    except TypeError:
        return None
    return tuple(found)


def accelerate(model: nn.Module) -> Report:
    r"""Run LIF neurons that a project wrote itself on the fused kernels, in place, on CPUs and GPUs.

    The function tries modules of the project's own classes that take one tensor and loop over time steps, or have the name of a
    neuron. It runs a float64 copy of each on chosen inputs. From the spikes and their gradients it reads::

        h[t] = decay * v[t-1] + x[t]       or    v[t-1] + (1 - decay) * (x[t] - v[t-1])
        s[t] = 1 where h[t] > threshold    or    h[t] >= threshold
        v[t] = v_reset where s[t]          or    h[t] - s[t] * threshold

    or of integer spikes::

        c[t] = round(clip(h[t] / threshold, lo, hi)),    s[t] = c[t] * scale,    v[t] = h[t] - c[t] * threshold

    which may also have no state and no time axis. It also reads the time axis (the first, the second, the last, or T folded
    into the batch), the surrogate gradient (name and alpha in ``sdit_kernels.SURROGATES``) or the window of the gradient, the
    initial membrane potential, the size of a spike, and the use of learned scalars.
    It replaces a module only if the spikes are equal and the gradients agree to 1e-9 on fresh float64 inputs: several lengths,
    numbers of axes and scales of the input, in training and evaluation mode.

    Each neuron stays the same object with the same attributes, parameters and state_dict. Its class becomes a subclass of its
    class. The fused neuron compares the attributes and the globals that its code reads with their values at ``accelerate``.
    After a change it runs its own code, with a warning, until you call ``accelerate`` again. It also runs its own code, with a
    warning, on data that were not checked (another number of axes, integers), and while one of SpikingJelly's counters is
    active.

    Args:
        model: any module; the function searches all of it. Call it before you compile or wrap the model. A second call changes
            only neurons whose attributes changed.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of the
        modules that look like neurons and did not change.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat import handwritten
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))  # with the project's neurons in it
        >>> print(handwritten.accelerate(model))
        hand-written neurons: 0 replaced, 0 left as they were: no such neuron was found in the model
    """
    check_model(model)
    for module in model.modules():
        if methods_of(module) is _HandWritten and _changed(module):
            restore(module)
    fits: dict[Any, _Fit | str | None] = {}
    parts: set[nn.Module] = set()  # the modules in replaced neurons

    def choose(module):
        if module in parts or not _is_own_class(module):
            return None
        key = _key(module) if _unfit(module) is None else None
        found = fits[key] if key in fits else _fit(module)
        if key is not None:
            fits[key] = found
        if not isinstance(found, _Fit):
            return found
        module.__dict__["_handwritten"] = found
        parts.update(module.children())
        return _HandWritten

    def suspect(module):
        return _unfit(module) if _is_own_class(module) and named_like_a_neuron(module) else None

    report = swap(_LIBRARY, model, choose, suspect)
    return report._replace(outcome=report.outcome.replace(f"nothing of {_LIBRARY}", "no such neuron"))


def restore(model: nn.Module) -> Report:
    """Undo :func:`accelerate`: the neurons run their own code again.

    Args:
        model: the model that ``accelerate`` changed, or a part, copy or unpickled copy of it. The function changes it in place.

    Returns:
        A report like the report of ``accelerate``. ``replaced`` holds the neurons that run their own code again.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.handwritten import restore
        >>> restore(torch.nn.Linear(1, 1)).replaced
        ()
    """
    report = swap_back(_LIBRARY, model, _HandWritten)
    for module in model.modules():
        if methods_of(module) is not _HandWritten:
            vars(module).pop("_handwritten", None)
    return report
