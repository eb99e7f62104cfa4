"""The private names of PyTorch that the library uses, each under a public name of its own.

Where PyTorch lacks one, public names take its place, which is slower or more cautious: a cautious answer sends a call through
PyTorch's dispatcher or through autograd, where the result is the same. Functions written in C are bound as they are, because
every eager call of an op calls several of them.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_C: Any = getattr(torch, "_C", None)


def _always(*_) -> bool:
    return True


# True if a transform of torch.func (vmap, grad, ...) is active. Cautious: ops take the way that works in one (18 us a call).
transforms_active = getattr(_C, "_are_functorch_transforms_active", _always)

# The number of active modes that see every operator, and of those that see every function. Cautious: 1.
dispatch_mode_count = getattr(_C, "_len_torch_dispatch_stack", _always)
function_mode_count = getattr(_C, "_len_torch_function_stack", _always)

# True if a profiler is active. Cautious: ops go through the dispatcher (24 us a call).
profiler_enabled = getattr(torch.autograd, "_profiler_enabled", _always)

# True if a tensor stands for zeros and has no memory. Cautious: ops go through the dispatcher, which makes the zeros.
is_zerotensor = getattr(Tensor, "_is_zerotensor", _always)

# True while torch.jit.trace records a graph. The public function asks first whether torch.jit.script compiles.
is_tracing = getattr(_C, "_is_tracing", torch.jit.is_tracing)

# A context in which operators run without their autograd formula, or None: register then defines a second operator without one.
below_autograd = getattr(_C, "_AutoDispatchBelowAutograd", None)


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


# True if forward-mode derivatives (dual tensors) may be in use. Cautious: ops go through autograd.Function (11 us a call).
in_forward_mode: Callable[[], bool] = _in_forward_mode if hasattr(forward_ad, "_current_level") else _always


# --- torch.compile ----------------------------------------------------------------------------------------------------------


def _marks_constants() -> bool:
    """True if torch.compile looks for the mark. To ask the compiler would import it, which takes a second."""
    try:
        return "._dynamo_marked_constant = True" in Path(torch.__file__).parent.joinpath("_dynamo/decorators.py").read_text()
    except OSError:
        return False


_MARKS_CONSTANTS = _marks_constants()


def assume_constant_result(function):
    """As ``torch.compiler.assume_constant_result``: torch.compile calls the function once while it traces. That decorator
    imports the whole compiler."""
    if not _MARKS_CONSTANTS:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True
    return function


# --- torch.jit.trace and torch.func -----------------------------------------------------------------------------------------


def _find_trace():
    """The frame of the innermost torch.jit.trace; True where something else traces."""
    if not torch.jit.is_tracing():
        return None
    codes = [inspect.unwrap(function).__code__ for function in (torch.jit.trace, torch.jit.trace_module)]
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame or True


# An object that stands for the running torch.jit.trace, the same one until that ends; None outside a trace.
current_trace = getattr(_C, "_get_tracing_state", _find_trace)

_functorch: Any = getattr(_C, "_functorch", None)
_TELLS_TRANSFORMS = all(
    hasattr(_functorch, name)
    for name in ("is_functorch_wrapped_tensor", "is_dead_tensor_wrapper", "_wrap_for_grad", "get_unwrapped", "maybe_get_level")
)


def mark_transform(v: Tensor) -> Tensor | None:
    """A mark of the transform of torch.func in which v was made, for ``has_ended``; None for a tensor from outside.

    Always None where PyTorch does not tell. Whoever uses v after the transform then gets the error of torch.func.
    """
    if not _TELLS_TRANSFORMS or not _functorch.is_functorch_wrapped_tensor(v):
        return None
    return _functorch._wrap_for_grad(_functorch.get_unwrapped(v), _functorch.maybe_get_level(v))


def has_ended(mark: Tensor) -> bool:
    """True if the transform of this mark has ended, and tensors made in it have no values any more."""
    return _functorch.is_dead_tensor_wrapper(mark)


# --- modes and hooks --------------------------------------------------------------------------------------------------------

_function_modes = getattr(torch.overrides, "_get_current_function_mode_stack", None)
_dispatch_modes = getattr(getattr(torch.utils, "_python_dispatch", None), "_get_current_dispatch_mode_stack", None)


def active_modes() -> list | None:
    """The active modes that see every operator or every function; None where PyTorch does not tell."""
    return None if _function_modes is None or _dispatch_modes is None else [*_dispatch_modes(), *_function_modes()]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# True if calls of a module run hooks of its own. Cautious: such a module runs its own code.
has_hooks: Callable[[nn.Module], bool] = _has_hooks if all(hasattr(nn.Module(), name) for name in _HOOKS) else _always
