"""The private names of PyTorch that the library uses, each under a public name.

If a version of PyTorch lacks one, this file uses a fallback that is slower or more cautious. A cautious answer sends a call
through PyTorch's dispatcher or through autograd, and the result is the same. Functions written in C have no wrapper, because
every eager call of an op calls several of them.
"""

import contextlib
import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_C: Any = getattr(torch, "_C", None)


def _always(*_) -> bool:
    return True


# True if a transform of torch.func (vmap, grad, ...) is active. Fallback: True, and every call costs 18 us more.
transforms_active = getattr(_C, "_are_functorch_transforms_active", _always)

# Number of active modes that see every operator, and number of active modes that see every function. Fallback: 1.
dispatch_mode_count = getattr(_C, "_len_torch_dispatch_stack", _always)
function_mode_count = getattr(_C, "_len_torch_function_stack", _always)

# True if a profiler is active. Fallback: True, and every call goes through the dispatcher (24 us).
profiler_enabled = getattr(torch.autograd, "_profiler_enabled", _always)

# True if a tensor represents zeros without memory. Fallback: True, and calls go through the dispatcher, which makes the zeros.
is_zerotensor = getattr(Tensor, "_is_zerotensor", _always)

# True while torch.jit.trace records a graph. The public function is slower: it also checks for torch.jit.script.
is_tracing = getattr(_C, "_is_tracing", torch.jit.is_tracing)

# A context in which operators run without their autograd formula. None: register defines a second operator without a formula.
below_autograd = getattr(_C, "_AutoDispatchBelowAutograd", None)

# True if autocast is on for any device. Fallback: True, and Python asks for the device.
any_autocast: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", _always)

# What pending tensors need: a context in which functions treat them as ordinary tensors, and a tensor without memory. Fallback
# of the second: None, and norms do not wait for their neurons.
without_functions_of_subclasses = getattr(_C, "DisableTorchFunctionSubclass", contextlib.nullcontext)
make_wrapper_subclass = getattr(Tensor, "_make_wrapper_subclass", None)


def _tree_map(function, tree):
    """Apply a function to all leaves of nested tuples, lists and dicts."""
    if isinstance(tree, dict):
        return {key: _tree_map(function, value) for key, value in tree.items()}
    if type(tree) in (tuple, list):
        return type(tree)(_tree_map(function, value) for value in tree)
    return function(tree)


# Applies a function to all leaves of a tree. Fallback: of tuples, lists and dicts only.
tree_map: Callable = getattr(getattr(torch.utils, "_pytree", None), "tree_map", _tree_map)

# A context in which no mode sees the operators. Fallback: the modes see them, which costs 5 us per operator.
without_modes = getattr(_C, "_DisableTorchDispatch", contextlib.nullcontext)


def _same(function):
    return function


# Returns an operator of ``torch.ops`` as a function in C. Fallback: the operator, whose call runs Python.
as_function: Callable[[Any], Callable] = operator.attrgetter("_op") if hasattr(torch.ops.aten.add.Tensor, "_op") else _same


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


# True if forward-mode derivatives (dual tensors) may be in use. Fallback: True, and calls use autograd.Function (11 us).
in_forward_mode: Callable[[], bool] = _in_forward_mode if hasattr(forward_ad, "_current_level") else _always


# --- torch.compile ----------------------------------------------------------------------------------------------------------


def _marks_constants() -> bool:
    """True if torch.compile reads the mark. This reads the compiler's source, because importing the compiler takes a second."""
    try:
        return "._dynamo_marked_constant = True" in Path(torch.__file__).parent.joinpath("_dynamo/decorators.py").read_text()
    except OSError:
        return False


_MARKS_CONSTANTS = _marks_constants()


def assume_constant_result(function):
    """Let torch.compile call the function once while it traces, and use the result as a constant.

    ``torch.compiler.assume_constant_result`` does the same, but it imports the whole compiler.
    """
    if not _MARKS_CONSTANTS:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True
    return function


# --- torch.jit.trace and torch.func -----------------------------------------------------------------------------------------


def _find_trace():
    """Return the frame of the innermost torch.jit.trace, True if something else traces, or None."""
    if not torch.jit.is_tracing():
        return None
    codes = [inspect.unwrap(function).__code__ for function in (torch.jit.trace, torch.jit.trace_module)]
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame or True


# Returns an object that identifies the running torch.jit.trace, or None outside a trace.
current_trace = getattr(_C, "_get_tracing_state", _find_trace)

_functorch: Any = getattr(_C, "_functorch", None)
_TELLS_TRANSFORMS = all(
    hasattr(_functorch, name)
    for name in ("is_functorch_wrapped_tensor", "is_dead_tensor_wrapper", "_wrap_for_grad", "get_unwrapped", "maybe_get_level")
)


# True if a tensor was made in a transform of torch.func, also one that has ended. Fallback: True, and calls go through the
# dispatcher.
is_of_transform: Callable[[Any], bool] = getattr(_functorch, "is_functorch_wrapped_tensor", _always)


def find_apply(function: type[torch.autograd.Function]) -> Callable:
    """Return ``apply`` of an autograd.Function without a setup_context, for tensors that belong to no transform of torch.func.

    PyTorch's own looks for such tensors in Python and takes 3 us more.
    """
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def mark_transform(v: Tensor) -> Tensor | None:
    """Return a mark of the transform of torch.func that made v, for ``has_ended``; None if v was made outside a transform.

    If PyTorch lacks the functions for it, the mark is always None. Using v after the transform then raises torch.func's error.
    """
    if not _TELLS_TRANSFORMS or not _functorch.is_functorch_wrapped_tensor(v):
        return None
    return _functorch._wrap_for_grad(_functorch.get_unwrapped(v), _functorch.maybe_get_level(v))


def has_ended(mark: Tensor) -> bool:
    """True if the transform of this mark has ended. Tensors made in it then have no values."""
    return _functorch.is_dead_tensor_wrapper(mark)


# --- modes and hooks --------------------------------------------------------------------------------------------------------

_function_modes = getattr(torch.overrides, "_get_current_function_mode_stack", None)
_dispatch_modes = getattr(getattr(torch.utils, "_python_dispatch", None), "_get_current_dispatch_mode_stack", None)


def active_modes() -> list | None:
    """Return the active modes that see every operator or every function; None if PyTorch lacks the functions for it."""
    return None if _function_modes is None or _dispatch_modes is None else [*_dispatch_modes(), *_function_modes()]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# True if a call of a module runs hooks of the module. Fallback: True, and the module runs its own code.
has_hooks: Callable[[nn.Module], bool] = _has_hooks if all(hasattr(nn.Module(), name) for name in _HOOKS) else _always


# --- operators ----------------------------------------------------------------------------------------------------------------

# The base class of modes that see every operator. torch's documentation shows it under this private module.
_TorchDispatchMode: Any = getattr(getattr(torch.utils, "_python_dispatch", None), "TorchDispatchMode", object)


class OperatorMode(_TorchDispatchMode):
    """The base class of modes that see every operator.

    PyTorch wraps such modes so that torch.compile does not trace them. The wrapper imports the whole compiler, which takes
    seconds. The modes of this package run with the compiler turned off, so they need no wrapper.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# A base class of modes that torch.compile does not trace. PyTorch's wrapper imports the compiler at the first call.
UntracedMode: Any = _TorchDispatchMode

# Returns None if the compiler does not see the frames of this thread. Fallback: True if the compiler is loaded.
compiler_callback: Callable[[], Any] = getattr(
    getattr(getattr(_C, "_dynamo", None), "eval_frame", None),
    "get_eval_frame_callback",
    lambda: True if "torch._dynamo" in sys.modules else None,
)


@functools.cache
def skip_frames(function) -> bool:
    """Let the compiler, which is loaded, run the frames of a function as they are. It still traces what they call.

    Fallback: do nothing and return False.
    """
    skip = getattr(getattr(sys.modules["torch._dynamo"], "decorators", None), "skip_code", None)
    if skip is not None:
        skip(function.__code__)
    return skip is not None


def _nothing(_):
    return None


_autograd: Any = getattr(_C, "_autograd", None)

# Returns how many tensors and Python objects use the storage with this address (``_cdata``). Fallback: None.
storage_users: Callable[[int], int] | None = getattr(_C, "_storage_Use_Count", None)

# Returns the functions of the innermost hooks on saved tensors, or None. Fallback: None.
innermost_hooks: Callable[[bool], tuple | None] = getattr(_autograd, "_top_saved_tensors_default_hooks", _nothing)

# Enter and leave hooks on saved tensors. Fallback: None, and the hooks stay.
push_hooks: Callable[[Callable, Callable], None] | None = getattr(_autograd, "_push_saved_tensors_default_hooks", None)
pop_hooks: Callable[[], None] | None = getattr(_autograd, "_pop_saved_tensors_default_hooks", None)

_HAS_SCHEMA = hasattr(torch.ops.aten.add.Tensor, "_schema")


def written_arguments(function: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Return the arguments that a call of an operator writes to. Fallback: the first argument of an operator whose name ends
    in an underscore, and the argument named out."""
    if not _HAS_SCHEMA:
        first = args[:1] if re.search(r"_(\.|$)", function.name()) else ()
        return [*first, *(v for k, v in kwargs.items() if k == "out")]
    schema = function._schema
    if not schema.is_mutable:
        return []
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    named = {a.name for a, w in zip(schema.arguments, written) if w}
    return [*(a for a, w in zip(args, written) if w), *(v for k, v in kwargs.items() if k in named)]


def increase(counts: list[Tensor]) -> None:
    """Add 1 to each tensor in one operator. Fallback: one operator per tensor."""
    if hasattr(torch, "_foreach_add_"):
        torch._foreach_add_(counts, 1)
    else:
        for count in counts:
            count.add_(1)


# The number of the running backward pass, -1 outside one. Fallback: -1, and a pass that repeats the forward pass counts twice.
_graph_task: Callable[[], int] = getattr(_C, "_current_graph_task_id", lambda: -1)


def in_backward() -> bool:
    """True if this thread runs a backward pass, in which activation checkpointing repeats the forward pass."""
    return _graph_task() != -1


# --- groups of processes ----------------------------------------------------------------------------------------------------


def sum_over_processes(t: Tensor, name: str) -> Tensor:
    """Sum a tensor over the processes of the group with this name. torch.compile can trace it."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(t.contiguous(), "sum", name))


def gather_over_processes(t: Tensor, group) -> Tensor:
    """Return the tensors of all processes of a group, one behind the other on a new first axis."""
    functional, n = torch.ops._c10d_functional, group.size()
    found = functional.all_gather_into_tensor(t.contiguous(), n, group.group_name)
    return functional.wait_tensor(found).reshape(n, *t.shape)


# --- lists of tensors ---------------------------------------------------------------------------------------------------------

_HAS_LISTS = all(hasattr(torch, name) for name in ("_foreach_sub", "_foreach_mul_", "_foreach_add_"))


def move_towards(averages: list[Tensor], tensors: list[Tensor], weight: Tensor) -> None:
    """Add weight * (tensor - average) to each average in place. On a GPU this takes a few kernels for all tensors.

    weight is a tensor with one element on the same device. Fallback: a kernel for each tensor.
    """
    if not _HAS_LISTS:
        for average, t in zip(averages, tensors):
            average.add_((t - average) * weight)
        return
    gaps = torch._foreach_sub(tensors, averages)
    torch._foreach_mul_(gaps, weight)
    torch._foreach_add_(averages, gaps)
