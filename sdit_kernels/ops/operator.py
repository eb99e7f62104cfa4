"""Define an operator (CPU, CUDA, fake, autograd and vmap) from a schema and two functions, with little overhead per call.

torch.library.register_autograd would cost 60 us more per call, and torch.func transforms reject it.
"""

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import nvtx, packed
from .._torch import (
    below_autograd,
    dispatch_mode_count,
    find_apply,
    in_forward_mode,
    is_of_transform,
    is_tracing,
    is_zerotensor,
    profiler_enabled,
    transforms_active,
)
from ..repeat import repeatable

_LIBRARY = torch.library.Library("sdit_kernels", "FRAGMENT")
_PLAIN_TENSOR_TYPES = (Tensor, torch.nn.Parameter)

# torch.jit.trace warns about every shape that an argument check compares. No check changes the traced computation.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"sdit_kernels\.(checks|ops|nn)\b")


def _call_per_member(operator, n, dims, tensors, rest):
    """Call the operator once per member of the batch, on views, and stack the outputs."""
    one = [operator(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims)), *rest) for i in range(n)]
    columns = zip(*one) if isinstance(one[0], (tuple, list)) else [one]
    return [torch.stack(column) for column in columns]


def _make_vmap_rule(operator, batch_axes, output_axes, flatten, sums, loop, mutates):
    """Return the vmap rule. If only data are batched, the batch becomes an axis of the data; else the rule loops over it.

    batch_axes: the axis that receives the batch, per leading tensor argument; None for a parameter. output_axes: the axis of
    the batch, per output; None for the gradient of a parameter, which must not be summed over the batch. flatten: merge the
    batch with the axis after it. sums: index of the flag that requests sums over the data; with sums the rule loops, because
    they could not be separated by batch member. loop(tensors): True if the rule must loop for another reason. mutates: indices
    of tensors that the operator writes; each must be batched.
    """

    def rule(info, in_dims, *args):
        n = info.batch_size
        tensors, dims, rest = args[: len(batch_axes)], in_dims[: len(batch_axes)], args[len(batch_axes) :]
        batched_parameter = any(dim is not None for dim, axis in zip(dims, batch_axes) if axis is None)
        if mutates and any(dims[i] is None for i in mutates):
            raise RuntimeError("vmap over an operator that writes to a tensor needs that tensor batched as well")
        if batched_parameter or mutates or (sums is not None and args[sums]) or (loop is not None and loop(tensors)):
            outputs = _call_per_member(operator, n, dims, tensors, rest)
            axes = [0] * len(outputs)
        else:
            moved = []
            for t, dim, axis in zip(tensors, dims, batch_axes):
                if t is not None and axis is not None and t.shape != (0,):
                    t = (
                        t.movedim(dim, axis)
                        if dim is not None
                        else t.unsqueeze(axis).expand(*t.shape[:axis], n, *t.shape[axis:])
                    )
                    t = t.flatten(axis, axis + 1) if flatten else t
                moved.append(t)
            outputs = operator(*moved, *rest)
            outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            # an output of shape (0,) was not requested, and has no batch axis
            axes = [None if out.shape == (0,) else axis for out, axis in zip(outputs, output_axes)]
            if flatten:
                outputs = [
                    out if axis is None else out.unflatten(axis, (n, out.shape[axis] // n)) for out, axis in zip(outputs, axes)
                ]
        return (tuple(outputs), tuple(axes)) if len(outputs) > 1 else (outputs[0], axes[0])

    return rule


def _save_nothing(ctx, inputs, output):
    pass


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "the fused kernels have no second derivative; run the forward pass under sdit_kernels.backend('reference')"
    )


def _refuse_forward_mode(ctx, *_):
    raise RuntimeError(
        "the fused kernels have no forward-mode derivative (jvp); call the op under sdit_kernels.backend('reference')"
    )


@functools.cache
def kernels(backend: str, stem: str) -> ModuleType:
    """Import the module of a backend ("cpu" or "triton") that launches the kernels of an op."""
    return importlib.import_module(f"sdit_kernels.{backend}.{stem}")


def values_are_readable(t: Tensor) -> bool:
    """True if Python may read the values of a tensor. False if reading them would wait for a GPU or break a graph."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not is_tracing()
        and getattr(t, "fake_mode", None) is None
    )


def _make_backward(gradient):
    """Wrap ``gradient`` as a backward pass that returns None for inputs that need no gradient or are not tensors.

    If autograd has freed the saved tensors, the error names reset(net), because the usual cause is a neuron's membrane that
    still belongs to the graph of an earlier call.
    """

    def backward(ctx, *upstream):
        needs = ctx.needs_input_grad
        try:
            found = gradient(ctx, *upstream)
        except RuntimeError as error:
            if "Cannot access data pointer of Tensor" in str(error) or "Batching rule not implemented" in str(error):
                raise RuntimeError(
                    "the fused kernels cannot run under the vmap of is_grads_batched=True (torch.autograd.grad, or "
                    "torch.autograd.functional with vectorize=True): use torch.func.jacrev or torch.func.vmap"
                ) from error
            if "backward through the graph a second time" not in str(error):
                raise
            raise RuntimeError(
                "Trying to backward through the graph a second time: the backward pass reached an earlier call of an op of "
                "sdit_kernels, whose saved tensors are freed. If a neuron's membrane led there, call "
                "sdit_kernels.nn.reset(net) before each new batch, or sdit_kernels.nn.detach(net) after each backward pass "
                "to keep the membrane (for neurons of SpikingJelly functional.reset_net or detach_net, for neurons of snnTorch "
                "snntorch.utils.reset); if not, call the first backward pass with retain_graph=True"
            ) from error
        return *[d if need else None for d, need in zip(found, needs)], *[None] * (len(needs) - len(found))

    return backward


def _refuse_onnx(name):
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"sdit_kernels::{name} has no ONNX operator: run torch.onnx.export under sdit_kernels.backend('reference'), "
            "which records plain PyTorch operations"
        )


def refuse_script(*_):
    """Raise. torch.jit.script calls ``__prepare_scriptable__`` before it compiles a function or a module."""
    raise RuntimeError(
        "torch.jit.script cannot compile sdit_kernels: use torch.jit.trace, whose graph records the operators, or torch.export"
    )


def _needs_dispatcher(tensors):
    """True if PyTorch's dispatcher must see a call: the profiler or a dispatch mode is active, or an argument is a tensor
    subclass, meta, or lazily negated. The mode of packed_spikes need not see it. Otherwise an eager call skips the dispatcher
    and saves about 24 us."""
    if (dispatch_mode_count() > 0 and packed.has_other_modes()) or profiler_enabled():
        return True
    for t in tensors:  # a loop takes half the time of any()
        if t is not None and (type(t) not in _PLAIN_TENSOR_TYPES or t.is_meta or t.is_neg() or is_zerotensor(t)):
            return True
    return False


def _may_need_grad(tensors):
    """True if a derivative may be needed; otherwise the call skips autograd.Function and saves 11 us."""
    if in_forward_mode():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _apply(apply, tensors, rest, data):
    """Call ``apply`` of an autograd.Function. Return NotImplemented if a tensor belongs to a transform that has ended.

    data: the number of leading tensors that are data and not parameters.
    """
    for t in tensors:
        if t is not None and is_of_transform(t):  # ``apply`` does not know such tensors
            return NotImplemented
    if dispatch_mode_count() > 0:  # the mode of packed_spikes
        return packed.apply_without_hooks(apply, tensors, rest, data)
    return apply(*tensors, rest)


def eager(name, implementation, data, tensor_count, outputs, save, gradient, mutates):
    """Return a function that does the work of two operators in eager mode, with less overhead than two calls.

    It returns the first ``outputs`` results of the implementation. It returns NotImplemented, before it has done anything,
    where PyTorch must see the operators. data: as for ``_apply``. tensor_count: how many of the leading arguments are tensors.
    save(ctx, args, results) and the rest are as for ``register``.
    """
    implementation = nvtx.range(name).untraced(repeatable(implementation, tensor_count))

    def run(*args):
        results = implementation(*args)
        torch.autograd.graph.increment_version([args[i] for i in mutates])
        return results

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            args = *args[:-1], *args[-1]
            results = run(*args)
            save(ctx, args, results)
            return results[:outputs]

        backward = staticmethod(_make_backward(gradient))

    apply = find_apply(Eager)

    def entry(*args):
        tensors = args[:tensor_count]
        if torch.compiler.is_compiling() or is_tracing() or transforms_active() or in_forward_mode():
            return NotImplemented
        if _needs_dispatcher(tensors):
            return NotImplemented
        return _apply(apply, tensors, args[tensor_count:], data) if _may_need_grad(tensors) else run(*args)[:outputs]

    return entry


def register(
    schema, implementation, fake, batch_axes, output_axes, save=None, gradient=None, flatten=False, loop=None, mutates=()
):  # fmt: skip
    """Define ``sdit_kernels::<schema>``. Return the function to call: it skips the dispatcher and autograd if it can.

    implementation, fake: functions of the operator's arguments, tensors first. They return None for outputs that are not
    requested; from the dispatcher, these arrive as empty tensors. An argument named ``parameters`` in the schema
    is a flag that requests the gradients of parameters; the vmap rule loops while it is true. batch_axes, output_axes, flatten,
    loop: see _make_vmap_rule. mutates: indices of tensors that the operator writes. save(ctx, inputs, outputs): as in
    autograd.Function. gradient(ctx, *upstream): returns the gradients of the first inputs. None: for a backward operator, whose
    derivative would be a second derivative, and with ``mutates``.
    """
    name, tensor_count = schema.partition("(")[0], len(batch_axes)
    data = (*batch_axes, None).index(None) or tensor_count  # without batch axes, any tensor may be data
    save, gradient = save or _save_nothing, _make_backward(gradient) if gradient else _refuse_second_derivative
    implementation = nvtx.range(name).untraced(repeatable(implementation, tensor_count))

    def filled(outputs, args):
        """Replace None by empty tensors, because an operator cannot return None."""
        if not isinstance(outputs, tuple) or all(out is not None for out in outputs):
            return outputs
        like = next(t for t in args[:tensor_count] if t is not None)
        return tuple(like.new_empty(0) if out is None else out for out in outputs)

    def full(*args):
        return filled(implementation(*args), args)

    def fake_unless_onnx(*args):
        _refuse_onnx(name)
        return filled(fake(*args), args)

    arguments = [argument.split()[-1] for argument in schema[schema.index("(") + 1 : schema.index(") ->")].split(",")]
    sums = arguments.index("parameters") if "parameters" in arguments else None

    def define(name):
        _LIBRARY.define(name + schema[schema.index("(") :])
        operator = getattr(torch.ops.sdit_kernels, name).default
        _LIBRARY.impl(name, full, "CPU")
        _LIBRARY.impl(name, full, "CUDA")
        torch.library.register_fake(f"sdit_kernels::{name}", fake_unless_onnx, lib=_LIBRARY)
        rule = _make_vmap_rule(operator, batch_axes, output_axes, flatten, sums, loop, mutates)
        torch.library.register_vmap(f"sdit_kernels::{name}", rule, lib=_LIBRARY)
        return operator

    operator = define(name)
    if below_autograd is None:
        call_below_autograd = define(f"{name}_below_autograd")
    else:

        def call_below_autograd(*args):
            with below_autograd():
                return operator(*args)

    def run(*args):
        return call_below_autograd(*args) if _needs_dispatcher(args[:tensor_count]) else implementation(*args)

    # autograd.Function takes 0.3 us per argument, so arguments that are not tensors are one tuple.
    class Autograd(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            args = *args[:-1], *args[-1]
            output = implementation(*args)
            save(ctx, args, output)
            return output

        backward = staticmethod(gradient)
        jvp = staticmethod(_refuse_forward_mode)

    apply = find_apply(Autograd)

    class Dispatched(Autograd):
        @staticmethod
        def forward(ctx, *args):
            args = *args[:-1], *args[-1]
            output = run(*args)
            save(ctx, args, output)
            return filled(output, args)

    class Functorch(torch.autograd.Function):  # torch.func needs a separate setup_context, which costs 18 us per call
        generate_vmap_rule = True

        @staticmethod
        def forward(*args):
            return call_below_autograd(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            save(ctx, inputs, output)

        backward = staticmethod(gradient)
        jvp = staticmethod(_refuse_forward_mode)

    def autograd(*args):  # called by the dispatcher
        if not _may_need_grad(args[:tensor_count]):
            return filled(run(*args), args)
        return Dispatched.apply(*args[:tensor_count], args[tensor_count:])

    def write(run, args):
        """Run an operator that writes to its arguments."""
        if torch.is_grad_enabled():
            for t in args[:tensor_count]:
                if t is not None and t.requires_grad:
                    raise RuntimeError(
                        f"sdit_kernels::{name} writes to its arguments and has no gradient: call it under torch.no_grad()"
                    )
        if in_forward_mode() and any(
            t is not None and forward_ad.unpack_dual(t).tangent is not None for t in args[:tensor_count]
        ):
            _refuse_forward_mode(None)
        output = run(*args)
        torch.autograd.graph.increment_version([args[i] for i in mutates])
        return output

    _LIBRARY.impl(name, (lambda *args: write(run, args)) if mutates else autograd, "Autograd")

    def entry(*args):
        if torch.compiler.is_compiling():
            return operator(*args)
        if is_tracing():  # torch.jit.trace: sizes and addresses are tensors
            _refuse_onnx(name)
            return operator(*args)
        if transforms_active():
            return operator(*args) if mutates else Functorch.apply(*args)
        tensors = args[:tensor_count]
        if _needs_dispatcher(tensors):
            return operator(*args)
        if mutates:
            return write(implementation, args)
        if _may_need_grad(tensors):
            found = _apply(apply, tensors, args[tensor_count:], data)
            return operator(*args) if found is NotImplemented else found
        return implementation(*args)

    return entry
