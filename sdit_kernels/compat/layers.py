"""What compat.rwkv and compat.vision_rwkv share: recognise a layer by what it computes, and replace its forward or a call.

A ``Form`` says which parameters and children a layer of a library has, and which ``Layer`` computes the same with the ops of
this package. ``why_unlike`` runs both on random values. A layer that differs but calls ``RUN_CUDA`` gets a ``Call``: it runs
its own code with another RUN_CUDA.
"""

import copy
import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import backend
from .swap import (
    Left,
    Report,
    Swapped,
    counted,
    original_class,
    refuse_symbols,
    swap,
    swapped_class,
    warn,
)


def as_wide(parameter: Tensor, data: Tensor) -> Tensor:
    """Cast a parameter that is narrower than the data, as an operation on both would. It may stay wider than the data."""
    return parameter.to(torch.promote_types(parameter.dtype, data.dtype))


def check_floating(**tensors: Any):
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {t.dtype}")


# --- RUN_CUDA inside a layer's own code ---------------------------------------------------------------------------------------


def calls_run_cuda(function: Any) -> bool:
    """Return True if a Python function, or a function defined inside it, uses the name RUN_CUDA."""

    def uses(code):
        return "RUN_CUDA" in code.co_names or any(uses(c) for c in code.co_consts if isinstance(c, types.CodeType))

    return isinstance(function, types.FunctionType) and uses(function.__code__)


@functools.cache
def with_run_cuda(function: types.FunctionType, run_cuda: Callable) -> types.FunctionType:
    """Return a function with the same code and a copy of its globals, in which RUN_CUDA is ``run_cuda``."""
    space = {**function.__globals__, "RUN_CUDA": run_cuda}
    changed = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def methods_with_run_cuda(cls: type, run_cuda: Callable) -> dict[str, types.FunctionType]:
    """Return {name: changed method} of the methods of a class that call RUN_CUDA."""
    methods = {name: inspect.getattr_static(cls, name, None) for name in dir(cls)}
    return {name: with_run_cuda(method, run_cuda) for name, method in methods.items() if calls_run_cuda(method)}


class OwnCode(Swapped):
    """A layer that runs its own code, in which RUN_CUDA is the function of this package."""

    family: str  # name of the model that the layer comes from, for messages
    run_cuda: Callable

    @classmethod
    def made_from(cls, mixin, original):
        for name, changed in methods_with_run_cuda(original, cls.run_cuda).items():
            setattr(cls, name, changed)


class Call(OwnCode):
    """An ``OwnCode`` for users: torch.compile leaves the changed methods out of its graph.

    It would look up RUN_CUDA in the module of the class, where the library's function is.
    """

    @classmethod
    def made_from(cls, mixin, original):
        reason = "of this layer only the call of RUN_CUDA was replaced: compile without fullgraph=True, or restore the model"
        for name, changed in methods_with_run_cuda(original, cls.run_cuda).items():
            setattr(cls, name, torch.compiler.disable(changed, reason=reason))


# --- fused layers -------------------------------------------------------------------------------------------------------------


class Layer(Swapped):
    """Base class of the fused layers. A layer keeps its parameters and children."""

    own_code: type[OwnCode]  # runs the layer's own forward, also where the CUDA extension is not installed

    @classmethod
    def made_from(cls, mixin, original):
        for name, changed in methods_with_run_cuda(original, cls.own_code.run_cuda).items():
            if name not in dir(mixin):
                setattr(cls, name, changed)

    def run_own_code(self, *args, **kwargs):
        return swapped_class(self.own_code, original_class(self)).forward(self, *args, **kwargs)


def unless_counted(fused: Callable) -> Callable:
    """Wrap the forward ``fused``: while operations are counted, the layer runs its own forward."""

    @functools.wraps(fused)
    def forward(self, x, *args, **kwargs):
        refuse_symbols(self, x)
        reason = counted()
        if reason is None:
            return fused(self, x, *args, **kwargs)
        warn(f"{type(self).__name__} runs its own code: {reason}", 3)
        return self.run_own_code(x, *args, **kwargs)

    return forward


# --- which layers are replaced ------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """The parameters and children of a layer as a library defines it, the fused layer, and how to run both on random values."""

    fused: type[Layer]
    parameters: tuple[str, ...]
    children: tuple[str, ...]
    optional: tuple[str, ...] = ()  # children that a layer may lack

    @property
    def family(self) -> str:
        return self.fused.own_code.family

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of forward, without self."""
        return argument_names(self.fused.forward)[1:]

    def accepts(self, arguments: list[str]) -> bool:
        """Return True if a forward with these arguments takes the same as the fused forward."""
        return arguments == self.arguments

    def widths(self, layer: Any, parameters: dict[str, Tensor]) -> tuple[int, int]:
        """Return the number of channels of the scan, and of the tokens."""
        return parameters[self.parameters[0]].numel(), parameters[self.parameters[-1]].numel()

    def inputs(self, layer: Any, widths: tuple[int, int], normal: Callable) -> list[tuple]:
        """Return the arguments of some calls of forward. The first argument is a tensor of tokens with unit variance."""
        return [(normal(2, 5, widths[1]),)]

    def outputs(self, result: Any) -> list[Tensor]:
        """Return the tensors to compare."""
        return [result]


class Pick(nn.Module):
    """A cheap stand-in for a Linear: it selects and scales channels at random."""

    def __init__(self, inputs, outputs, generator, scale=1.0):
        super().__init__()
        self.index = torch.randint(inputs, (outputs,), generator=generator, dtype=torch.int64, device="cpu")
        self.scale = scale * torch.randn(outputs, generator=generator, dtype=torch.float64, device="cpu")

    def forward(self, x):
        return x[..., self.index] * self.scale


def argument_names(function: Callable) -> list[str]:
    return list(inspect.signature(function).parameters)


def twin_of(module: Any, instead: Mapping[str, nn.Module]) -> Any:
    """Return a copy of a module to run, with the children in ``instead``. It shares no mode and no buffer with the module."""
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module)
    cls: Any = type(module)
    twin = cls.__new__(cls)
    buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
    children = {
        name: instead[name] if name in instead else child if child is None else twin_of(child, {})
        for name, child in module._modules.items()
    }
    twin.__dict__.update(module.__dict__, _buffers=buffers, _modules=children)
    return twin


def difference(module: Any, form: Form) -> str | None:
    """Return None if the layer and the fused layer give the same result on random values, else the difference.

    The check runs in training and evaluation mode, and also on large values, where clamps of the layer show.
    """
    for training in (module.training, not module.training):
        mode = "" if training == module.training else f" in {'train' if training else 'eval'} mode"
        for large in (False, True):
            found = probe(module, form, training, large, (" on large values" if large else "") + mode)
            if found is not None:
                return found
    return None


def probe(module: Any, form: Form, training: bool, large: bool, where: str) -> str | None:
    cls: Any = type(module)
    draw = torch.Generator("cpu").manual_seed(0)
    # Large values give outputs of 1e6 and more. Keys stay in the range where transformers' float32 scan is correct.
    x_scale, value_scale, tolerance = (300, 1e4, 1e-4) if large else (1, 1.0, 1e-5)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")

    def run(mixin):
        twin.__class__ = swapped_class(mixin, cls)
        return [t for x, *rest in copy.deepcopy(calls) for t in form.outputs(twin.forward(x_scale * x, *rest))]

    problem, drawn = "its forward does not run on random values", random.getstate()
    try:
        parameters = {name: normal(*p.shape) for name, p in module._parameters.items() if p is not None}
        inner, outer = widths = form.widths(module, parameters)
        stand_ins = {name: Pick(outer, inner, draw, value_scale if name == "value" else 1.0) for name in form.children}
        stand_ins["output"] = Pick(inner, outer, draw)
        stand_ins |= {name: Pick(inner, inner, draw) for name in form.optional if module._modules.get(name) is not None}
        twin = twin_of(module, stand_ins)
        twin.__dict__.update(_parameters={name: parameters.get(name) for name in module._parameters})
        for part in twin.modules():
            part.training = training
        calls = form.inputs(module, widths, normal)
        with torch.no_grad(), backend("reference"), torch.random.fork_rng(devices=[]):
            before = torch.random.get_rng_state()
            wanted = run(form.fused.own_code)
            if not torch.equal(before, torch.random.get_rng_state()) or random.getstate() != drawn:
                return f"its forward draws random numbers{where}"
            problem = f"{form.family}'s forward does not take its parameters"
            for a, b in zip(run(form.fused), wanted, strict=True):  # transformers' scan is float32
                if large and a.shape == b.shape:  # the layer's own loop may overflow
                    a, b = a[b.isfinite()], b[b.isfinite()]
                atol = tolerance * b.abs().max().item() if large and b.numel() else tolerance
                if a.shape != b.shape or not torch.allclose(a, b, rtol=tolerance, atol=atol):
                    return f"its forward computes something else than {form.family}'s{where}"
    except Exception as error:  # code that is not ours may raise anything on random values
        return f"{problem}{where} ({type(error).__name__}: {error})"
    finally:
        random.setstate(drawn)
    return None


def why_unlike(module: nn.Module, form: Form) -> str | None:
    """Return None if the layer has this form, else the reason why not."""
    family = form.family
    own = {name for name, p in module._parameters.items() if p is not None}
    trained = {name for name, child in module.named_children() if next(child.parameters(), None) is not None}
    extra = sorted(own.difference(form.parameters) | trained.difference(form.children, form.optional))
    missing = sorted(set(form.children).difference(module._modules))
    if extra or missing:
        return f"it has more parts than {family}: {', '.join(extra)}" if extra else f"it lacks {', '.join(missing)}"
    theirs = argument_names(type(module).forward)[1:]
    if not form.accepts(theirs):
        return f"its forward takes ({', '.join(theirs)}), {family}'s ({', '.join(form.arguments)})"
    return difference(module, form)


def why_forward_is_fixed(module: nn.Module) -> str | None:
    """Return the reason why the forward of a layer cannot be replaced, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return why_script(type(module))
    if "forward" in vars(module):
        return "its forward is replaced on the instance, by hooks perhaps: accelerate the model before"
    return None


def why_script(cls: type[nn.Module]) -> str:
    """Return the reason why a layer compiled by TorchScript is left, and how to avoid that."""
    if cls.__module__.startswith("torch."):
        return (
            "compiled by torch.jit.script or torch.jit.trace, which keep its code: accelerate the model from which they made it"
        )
    try:
        optional = "RWKV_JIT_ON" in inspect.getsource(sys.modules[cls.__module__])
    except (KeyError, OSError, TypeError):  # the module has no source file
        optional = False
    way = "set RWKV_JIT_ON=0" if optional else "derive it from torch.nn.Module, without torch.jit.script_method"
    return f"its class derives from torch.jit.ScriptModule, which keeps its code: {way}"


def choose_call(
    module: nn.Module, call: type[Call], counts: tuple[int, ...], expected: str, why: str
) -> tuple[type[Swapped] | None, str]:
    """Return (``call``, reason) if the calls of RUN_CUDA in an unfused layer can be replaced, else (None, reason).

    ``counts``: possible numbers of arguments of the library's RUN_CUDA, and ``expected`` the same in words. ``why``: the reason
    why the layer is not fused.
    """
    methods = methods_with_run_cuda(type(module), call.run_cuda)
    if not methods:
        return None, why
    for name in methods:
        theirs = inspect.getattr_static(type(module), name).__globals__.get("RUN_CUDA")
        if theirs is call.run_cuda:
            return None, f"its RUN_CUDA is this package's already; the rest: {why}"
        if callable(theirs) and len(argument_names(theirs)) not in counts:
            return None, f"its RUN_CUDA takes {len(argument_names(theirs))} arguments, {call.family}'s {expected}"
    return call, f"only its call of RUN_CUDA is replaced: {why}"


def accelerate_layers(library: str, model: nn.Module, choose: Callable, suspect: Callable) -> Report:
    """Replace the layers that ``choose`` knows: choose(module) returns (class, why it is not fully fused) or (None, reason)."""
    rest = []

    def class_or_reason(module):
        cls, why = choose(module)
        if cls is None:
            return why or None
        rest.append(why)
        return cls

    report = swap(library, model, class_or_reason, suspect)
    return report._replace(left=report.left + tuple(Left(*entry, why) for entry, why in zip(report.replaced, rest) if why))
