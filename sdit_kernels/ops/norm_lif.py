"""norm_lif: BatchNorm and a neuron in one pass, and the operators of any neuron behind a BatchNorm.

The statistics are an operator of their own. So the running statistics are updated between it and the neuron, where an operator
need not write to its arguments, and the processes of a group exchange their sums between operators.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, packed, reference, tuning
from .._torch import gather_over_processes, is_tracing, sum_over_processes, transforms_active
from ..checks import (
    check_data,
    check_flag,
    check_membrane,
    check_neuron,
    check_neuron_values,
    check_number,
    check_tensor,
    is_number,
    wants_gradient,
    warn_of_custom_surrogate,
)
from ..dtypes import DATA_DTYPES, state_dtype
from ..layout import LIF_CHECKPOINT_STEPS, channel_layout
from ..levels import encode
from ..neuron import LIF, Variant
from ..neuron.norm import after_norm
from ..reference.neuron import returned
from ..reference.norm import affine, update_running
from .lif import NEURON_SCHEMA, lif_variant
from .neuron import any_given, check_spike_dtype, sum_parameter_gradients
from .operator import eager, kernels, register, values_are_readable

# --- statistics -------------------------------------------------------------------------------------------------------------


def _empty_statistics(x, axis, per_step):
    shape = (x.shape[0], x.shape[axis]) if per_step else (x.shape[axis],)
    return tuple(torch.empty(shape, dtype=state_dtype(x.dtype), device=x.device) for _ in range(3))


def _statistics(x, running_mean, running_var, axis, per_step, eps, momentum, backend):
    found = mean, squares, rstd = _empty_statistics(x, axis, per_step)
    if x.numel():
        layout, running = channel_layout(x, axis, per_step), (running_mean, running_var)
        kernels(backend, "norm").norm_forward(
            layout.view(x), layout.S is not None, eps, *found, running, momentum, tuning.current()
        )
    else:
        mean.zero_(), squares.zero_(), rstd.copy_(_rstd(squares, eps))
    return found


def _statistics_fake(x, running_mean, running_var, axis, per_step, eps, momentum, backend):
    return _empty_statistics(x, axis, per_step)


def _rstd(var, eps):
    return 1.0 / torch.sqrt(var + eps)


_statistics_call, _updating_call = (
    register(
        f"{name}(Tensor x, Tensor{a}? running_mean, Tensor{b}? running_var, int axis, bool per_step, float eps, "
        "float momentum, str backend) -> (Tensor, Tensor, Tensor)",
        _statistics,
        _statistics_fake,
        batch_axes=(1, None, None),
        output_axes=(0, 0, 0),
        loop=lambda given: True,
        mutates=mutates,
    )
    for name, a, b, mutates in (("norm_statistics", "", "", ()), ("norm_statistics_", "(a!)", "(b!)", (1, 2)))
)


def _combine(mean, squares, count, group):
    """Combine the statistics of the processes of a group, whose counts may differ. Return (mean, squares, count)."""
    own = torch.stack([mean, squares, torch.full_like(mean, count)]).double()
    means, sums, counts = gather_over_processes(own, group).unbind(1)
    count = counts.sum(0)
    joint = (counts * means).sum(0) / count
    squares = (sums + counts * (means - joint).square()).sum(0)
    return joint.to(mean.dtype), squares.to(mean.dtype), count


# --- the operators of a neuron ----------------------------------------------------------------------------------------------


def define_norm(neuron, names, schema, variant, check):
    """Define the operators ``sdit_kernels::norm_<neuron.name>*`` of a neuron with one state. Return the functions to call.

    names, schema, variant, check: as in ops/neuron.py. The arguments are x, the state, weight, bias, step_factor, mean, rstd,
    count (of the values per channel, from all processes; None: of x), the parameters, scale, axis, per_step, training, group,
    the values of ``schema``, return_v, return_v_seq, spike_dtype, keep, backend. ``train``, which also finds and updates the
    statistics, takes the running statistics in the places of mean and rstd, and before the backend eps and momentum.
    """
    name, P = neuron.name, len(names)
    vectors = 6 + P  # tensors without the shape of the data
    settings = 5

    def unpack(rest):
        """Return (vectors, settings, values of the schema) of the arguments behind the data."""
        return rest[:vectors], rest[vectors : vectors + settings], rest[vectors + settings :]

    def layout_for(x, given, options):
        return channel_layout(x, options[1], options[2] or given[2] is not None)

    def rows_for(layout, given, options, backend):
        """Return the layout for the kernels of the neuron."""
        limit = tuning.current().norm_short_row_cpu if backend == "cpu" else 0
        short = layout.S is not None and limit >= layout.S
        return layout.with_long_rows() if short and given[2] is None and not options[2] else layout

    def neuron_of(values, learnt, centred=False):
        base = variant(*values)
        k = len(neuron.parameters)
        fixed = (0.0,) * (3 if centred else 1)
        values = (1.0, 0.0, *base.values[:k], *fixed, *base.values[k:])
        return Variant(after_norm(neuron, learnt, centred), base.flags, values, base.surrogate, base.alpha)

    def spread(layout, given, options, dtype, backend):
        """Return the parameters of the neuron behind the norm, as the view of the data needs them."""
        weight, bias, step_factor, mean, rstd, _, *parameters = given
        if backend == "cpu" and step_factor is None:  # one kernel, because a small operator of PyTorch takes as long
            vectors = kernels(backend, "norm").norm_vectors(mean, rstd, weight, bias, options[0], layout.inner)
        else:
            vectors = *affine(rstd, weight, bias, step_factor, options[0], dtype), mean
        factor, shift, mean = map(layout.spread, vectors) if layout.inner == 1 else vectors
        parameters = [p if p is None else p.reshape(()) if p.numel() == 1 else layout.spread(p.to(dtype)) for p in parameters]
        return [factor, shift, *parameters, mean]

    def allocate(x, given, options, return_v, return_v_seq, spike_dtype, keep):
        layout, dtype = layout_for(x, given, options), state_dtype(x.dtype)
        s = layout.empty(x, spike_dtype or x.dtype, x.shape[0])
        final = layout.empty(x, dtype, None) if return_v else None
        seq = layout.empty(x, dtype, x.shape[0]) if return_v_seq else None
        rows = max(x.shape[0] - 1, 0) // LIF_CHECKPOINT_STEPS if keep else 0
        return layout, (s, final, seq, layout.empty(x, dtype, rows) if keep else None)

    def find_block(x, layout, given, options, backend, forward):
        """Return how many channels the CPU's kernel of norm and neuron takes at a time, or None if it cannot serve the call."""
        if backend != "cpu" or not options[3] or options[2] or options[4] or layout.S is None or not x.is_contiguous():
            return None
        if given[2] is not None or any_given(given[6:]) or not x.numel():
            return None
        return kernels(backend, "norm_neuron").block_of(x.shape[0], layout, x.dtype, forward)

    def forward(x, v, *rest):
        given, options, (*values, return_v, return_v_seq, spike_dtype, keep, backend) = unpack(rest)
        layout, outputs = allocate(x, given, options, return_v, return_v_seq, spike_dtype, keep)
        dtype, parameters = state_dtype(x.dtype), given[6:]
        if x.device.type == "cpu" and any_given(parameters):
            check(parameters, values, dtype)
        s, final, seq, checkpoint = outputs
        given_variant, layout = neuron_of(values, False), rows_for(layout, given, options, backend)
        if x.numel():
            spread_ = spread(layout, given, options, dtype, backend)
            kernels(backend, "neuron").neuron_forward(
                given_variant, layout.view(x), (_state(layout, v),), spread_, layout.view(s), (_state(layout, final),),
                (_maybe(layout, seq),), (_maybe(layout, checkpoint),), tuning.current(),
            )  # fmt: skip
        elif final is not None:
            final.copy_(v) if v is not None else final.fill_(_start(neuron, variant(*values)))
        return outputs

    def forward_fake(x, v, *rest):
        given, options, (*_, return_v, return_v_seq, spike_dtype, keep, _) = unpack(rest)
        return allocate(x, given, options, return_v, return_v_seq, spike_dtype, keep)[1]

    def allocate_gradients(x, v, given, options, wanted):
        layout = layout_for(x, given, options)
        vectors = [p.new_empty(p.shape) if wanted and p is not None else None for p in (*given[:3], *given[6:])]
        return layout, layout.empty(x, x.dtype, x.shape[0]), None if v is None else layout.empty(x, v.dtype, None), vectors

    def joint_sums(sums, factor, options):
        """Return the sums over the data of the gradient of x - mean, and of its product with x - mean, (2, C) or (2, T, C)."""
        d_factor, d_shift = sums
        found = torch.stack([factor * d_shift, factor * d_factor])
        return found if options[2] or found.dim() == 2 else found.sum(1)

    def vector_gradients(sums, given, options, found):
        """Fill the gradients of weight, bias and step_factor."""
        (d_factor, d_shift), (weight, bias, step_factor, _, rstd, *_) = sums, given
        normalised = d_factor * rstd * options[0]
        d_steps = None
        if step_factor is not None:
            w, b = (0.0 if p is None else p.to(rstd.dtype) for p in (weight, bias))
            d_steps = (normalised * (1.0 if weight is None else w) + d_shift * b).sum(-1)
            steps = step_factor.to(rstd.dtype).reshape(-1, 1)
            normalised, d_shift = normalised * steps, d_shift * steps
            if not options[2]:
                normalised, d_shift = normalised.sum(0), d_shift.sum(0)
        for into, d in zip(found, (normalised, d_shift, d_steps)):
            if into is not None:
                into.copy_(d.reshape(into.shape))

    def coefficients(sums, given, x):
        """Return norm_offset and norm_slope from the joint sums."""
        rstd, count = given[4], given[5]
        count = x.numel() // rstd.numel() if count is None else count
        return sums[0] / count, sums[1] * rstd.square() / count

    def run_backward(g, g_final, g_seq, x, v, given, options, checkpoint, values, backend, sums, mode, wanted):
        """mode: "all", "sums" (everything except dx) or "apply" (only dx, from the joint ``sums``)."""
        layout, dx, dv, found = allocate_gradients(x, v, given, options, wanted)
        dtype, training = state_dtype(x.dtype), options[3]
        if x.numel() == 0:
            joint = torch.zeros((2, *given[3].shape), dtype=dtype, device=x.device)
            if dv is not None:
                dv.zero_() if g_final is None else dv.copy_(g_final)
            for d in found:
                if d is not None:
                    d.zero_()
            return dx, dv, found, joint
        keeps = x.shape[0] <= LIF_CHECKPOINT_STEPS or (checkpoint is not None and checkpoint.numel() > 0)
        block = find_block(x, layout, given, options, backend, False) if mode == "all" and keeps and given[5] is None else None
        if block is not None:
            checkpoint = checkpoint if x.shape[0] > LIF_CHECKPOINT_STEPS else None
            kernels(backend, "norm_neuron").norm_neuron_backward(
                neuron_of(values, False), block, rows_for(layout, given, options, backend).S is None, g, g_final, g_seq,
                layout.view(x), v, given[:2], *given[3:5], options[0], checkpoint, dx, dv, found[:2],
            )  # fmt: skip
            return dx, dv, found, None
        parameters, rows = given[6:], layout
        layout = rows_for(layout, given, options, backend)
        spread_ = spread(layout, given, options, dtype, backend)
        y = layout.view(x)
        learnt = wanted and any(p is not None for p in parameters)
        if x.shape[0] <= LIF_CHECKPOINT_STEPS:
            checkpoint = None
        elif checkpoint is None or checkpoint.numel() == 0:
            # The forward pass ran without a checkpoint (torch.func or symbolic T), so recompute it.
            checkpoint = layout.empty(x, dtype, (x.shape[0] - 1) // LIF_CHECKPOINT_STEPS)
            s = torch.empty_like(y)
            kernels(backend, "neuron").neuron_forward(
                neuron_of(values, False), y, (_state(layout, v),), spread_, s, (None,), (None,), (layout.view(checkpoint),),
                tuning.current(),
            )  # fmt: skip
        launch = functools.partial(
            _launch, kernels(backend, "neuron").neuron_backward, g=_maybe(layout, g), g_final=_state(layout, g_final),
            g_seq=_maybe(layout, g_seq), x=y, v=_state(layout, v), checkpoint=_maybe(layout, checkpoint),
        )  # fmt: skip
        centred = neuron_of(values, False, True)

        def finish(offset, slope):
            """Compute dx again, with the statistics' share."""
            more = [layout.spread(c) for c in (offset, slope)]
            launch(centred, [*spread_, *more], dx=layout.view(dx), dv=None, wanted=False)

        if mode == "apply":
            finish(*coefficients(sums, given, x))
            return dx, dv, found, sums
        summing = neuron_of(values, learnt)
        # The CPU's kernel is bound by arithmetic. So it writes its gradient, and a second kernel adds the share of the
        # statistics. A GPU runs the kernel twice, and moves fewer bytes.
        twice = backend == "triton" and training
        first = None if mode == "sums" or twice else dx
        if first is not None and training and x.dtype != dtype:  # or the gradient would be rounded twice
            first = layout.empty(x, dtype, x.shape[0])
        partial = launch(summing, spread_, dx=_maybe(layout, first), dv=_state(layout, dv), wanted=wanted or training)
        if not (wanted or training):
            return dx, dv, found, None
        k, joint = len(summing.neuron.learnt), None
        parameters = spread_[:k]
        at_once = mode == "all" and given[2] is None
        if at_once:  # one kernel computes what the other branch does
            offset, slope = (torch.empty_like(given[4]) for _ in range(2))
            steps = x.shape[0] if options[2] else 1
            sums_ = [t.reshape(-1, layout.C, layout.inner) for t in partial[:2]]
            kernels(backend, "norm").norm_gradients(
                sums_, steps, 1 if layout.S is None else layout.B, given[0], given[4], options[0],
                x.numel() // given[4].numel(), *found[:2], offset, slope, tuning.current(),
            )  # fmt: skip
            parameters = [None, None, *parameters[2:]]
        gradients = sum_parameter_gradients(summing.neuron, parameters, partial, [None] * k)
        if not at_once:
            sums_ = [layout.gather(d) for d in gradients[:2]]
            joint = joint_sums(sums_, affine(given[4], *given[:3], options[0], dtype)[0], options)
            offset, slope = coefficients(joint, given, x) if mode == "all" else (None, None)
            if wanted:
                vector_gradients(sums_, given, options, found)
        for into, d in zip(found[3:], gradients[2:]):
            if into is not None:
                into.copy_((layout.gather(d) if d.dim() else d).reshape(into.shape))
        if training and mode == "all":
            if twice:
                finish(offset, slope)
            else:
                kernels(backend, "norm").norm_backward(
                    rows.view(first), rows.view(dx), rows.view(x), rows.S is not None, given[3], offset, slope, tuning.current()
                )
        return dx, dv, found, joint

    def split(rest):
        """Return (given, options, checkpoint, values, parameters wanted, backend) of a backward operator's arguments."""
        given, (checkpoint, *rest) = rest[:vectors], rest[vectors:]
        *values, wanted, backend = rest[settings:]
        return given, rest[:settings], checkpoint, values, wanted, backend

    def backward(g, g_final, g_seq, x, v, *rest):
        given, options, checkpoint, values, wanted, backend = split(rest)
        dx, dv, found, _ = run_backward(
            g, g_final, g_seq, x, v, given, options, checkpoint, values, backend, None, "all", wanted
        )
        return dx, dv, *found

    def backward_fake(g, g_final, g_seq, x, v, *rest):
        given, options, *_, wanted, _ = split(rest)
        _, dx, dv, found = allocate_gradients(x, v, given, options, wanted)
        return dx, dv, *found

    def sums(g, g_final, g_seq, x, v, *rest):
        given, options, checkpoint, values, wanted, backend = split(rest)
        _, dv, found, joint = run_backward(
            g, g_final, g_seq, x, v, given, options, checkpoint, values, backend, None, "sums", wanted
        )
        return joint, dv, *found

    def sums_fake(g, g_final, g_seq, x, v, *rest):
        given, options, *_, wanted, _ = split(rest)
        _, _, dv, found = allocate_gradients(x, v, given, options, wanted)
        return torch.empty((2, *given[3].shape), dtype=state_dtype(x.dtype), device=x.device), dv, *found

    def apply(joint, g, g_final, g_seq, x, v, *rest):
        given, options, checkpoint, values, _, backend = split(rest)
        return run_backward(
            g, g_final, g_seq, x, v, given, options, checkpoint, values, backend, joint, "apply", False
        )[0]  # fmt: skip

    def apply_fake(joint, g, g_final, g_seq, x, v, *rest):
        given, options, *_ = split(rest)
        return allocate_gradients(x, v, given, options, False)[1]

    def train(x, v, *rest):
        *rest, eps, momentum, backend = rest
        given, options, values = unpack(rest)
        block = find_block(x, layout_for(x, given, options), given, options, backend, True)
        if block is not None:
            (*values, return_v, return_v_seq, spike_dtype, keep), found = values, _empty_statistics(x, options[1], False)
            layout, outputs = allocate(x, given, options, return_v, return_v_seq, spike_dtype, keep)
            kernels(backend, "norm_neuron").norm_neuron_forward(
                neuron_of(values, False), block, rows_for(layout, given, options, backend).S is None, layout.view(x), v,
                given[:2], given[3:5], eps, momentum, options[0], found, outputs,
            )  # fmt: skip
            return *outputs, found[0], found[2]
        if x.device.type == "cpu" and any_given(given[6:]):  # before the running statistics change
            check(given[6:], values[:-4], state_dtype(x.dtype))
        mean, _, rstd = _statistics(x, *given[3:5], options[1], options[2], eps, momentum, backend)
        return *forward(x, v, *given[:3], mean, rstd, *given[5:], *options, *values, backend), mean, rstd

    def save_train(ctx, arguments, results):
        save(ctx, (*arguments[:5], *results[4:], *arguments[7:-3], arguments[-1]), results)

    def save(ctx, arguments, outputs):
        ctx.rest = arguments[2 + vectors :]
        ctx.save_for_backward(*arguments[: 2 + vectors], outputs[3])
        ctx.set_materialize_grads(False)

    def gradient(ctx, g, g_final, g_seq, _):
        *options, return_v, return_v_seq, _, _, backend = ctx.rest
        # Compiled graphs pass zeros for empty outputs.
        upstream = g, g_final if return_v else None, g_seq if return_v_seq else None
        needs = ctx.needs_input_grad
        wanted = any(needs[2:5]) or any(needs[8 : 8 + P])
        rest = *ctx.saved_tensors, *options, wanted, backend
        if options[3] and options[4]:
            joint, dv, *found = sums_call(*upstream, *rest)
            dx = apply_call(sum_over_processes(joint, options[4]), *upstream, *rest)
        else:
            dx, dv, *found = backward_call(*upstream, *rest)
        return dx, dv, *found[:3], None, None, None, *found[3:]

    tensors = "Tensor? weight, Tensor? bias, Tensor? step_factor, Tensor mean, Tensor rstd, Tensor? count, "
    tensors += "".join(f"Tensor? {p}, " for p in names)
    options = "float scale, int axis, bool per_step, bool training, str group"
    data = "Tensor? g, Tensor? g_v, Tensor? g_v_seq, Tensor x, Tensor? v, "
    behind = f"Tensor? checkpoint, {options}, {schema}, bool parameters, str backend"
    found = ", ".join(["Tensor"] * (5 + P))
    rule = dict(loop=lambda given: True)
    axes = dict(batch_axes=(1, 0, *[None] * vectors), output_axes=(1, 0, 1, 1))
    call = register(
        f"norm_{name}(Tensor x, Tensor? v, {tensors}{options}, {schema}, bool return_v, bool return_v_seq, "
        "ScalarType? spike_dtype, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
        forward, forward_fake, **axes, save=save, gradient=gradient, **rule,
    )  # fmt: skip
    train_call = eager(f"norm_{name}_train", train, 2, 2 + vectors, 4, save_train, gradient, mutates=(5, 6))
    upstream_axes = (1, 0, 1, 1, 0, *[None] * vectors, 1)
    backward_call = register(
        f"norm_{name}_backward({data}{tensors}{behind}) -> ({found})",
        backward, backward_fake, batch_axes=upstream_axes, output_axes=(1, 0, *[None] * (3 + P)), **rule,
    )  # fmt: skip
    sums_call = register(
        f"norm_{name}_sums({data}{tensors}{behind}) -> ({found})",
        sums, sums_fake, batch_axes=upstream_axes, output_axes=(0, 0, *[None] * (3 + P)), **rule,
    )  # fmt: skip
    apply_call = register(
        f"norm_{name}_apply(Tensor joint, {data}{tensors}{behind}) -> Tensor",
        apply, apply_fake, batch_axes=(0, *upstream_axes), output_axes=(1,), **rule,
    )  # fmt: skip
    return NormCalls(call, train_call)


class NormCalls(NamedTuple):
    """What define_norm returns."""

    call: Callable
    train: Callable  # returns NotImplemented where PyTorch must see the operators


def _start(neuron, given):
    return dict(zip((*neuron.parameters, *neuron.numbers), given.values)).get(neuron.start[0], 0.0)


def _maybe(layout, t):
    return None if t is None else layout.view(t)


def _state(layout, t):
    return None if t is None else layout.state(t)


def _launch(neuron_backward, variant, parameters, *, g, g_final, g_seq, x, v, checkpoint, dx, dv, wanted):
    return neuron_backward(
        variant, g, (g_final,), (g_seq,), x, (v,), parameters, (checkpoint,), dx, (dv,), wanted, tuning.current()
    )


def _check_values(parameters, values, dtype):
    check_neuron_values(*parameters, values[3], dtype, values[7])


_lif_calls = define_norm(LIF, ("tau", "v_threshold"), NEURON_SCHEMA, lif_variant, _check_values)


# --- the public function ----------------------------------------------------------------------------------------------------


def _check_axis(x, channel_axis):
    if type(channel_axis) is not int and (isinstance(channel_axis, bool) or not isinstance(channel_axis, numbers.Integral)):
        raise TypeError(f"channel_axis must be an int, got {type(channel_axis).__name__}")
    if x.dim() < 2:
        raise ValueError(f"x must have a time axis and a channel axis, (T, .., C, ..), got shape {tuple(x.shape)}")
    axis = channel_axis + x.dim() if channel_axis < 0 else channel_axis
    if not 1 <= axis < x.dim():
        raise ValueError(
            f"channel_axis must be an axis of x, {tuple(x.shape)}, and not its first, the time steps; got {channel_axis} "
            "(the default is 2)"
        )
    return int(axis)


def _check_vector(name, p, shape, x, running=False):
    """Check weight, bias, or a running statistic."""
    if p is None:
        return
    check_tensor(name, p, optional=True)
    if p.dtype != x.dtype and (p.dtype not in DATA_DTYPES or torch.promote_types(p.dtype, x.dtype) != p.dtype):
        raise TypeError(
            f"{name} must be a floating tensor at least as wide as x ({x.dtype}), got {p.dtype}; cast it: {name}.to({x.dtype})"
        )
    if p.shape != shape:
        per = "one per time step and channel" if len(shape) == 2 else "one per channel"
        raise ValueError(f"{name} must have shape {tuple(shape)}, {per}, got {tuple(p.shape)}")
    if p.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {p.device}")
    if running and p.requires_grad:
        raise ValueError(f"{name} is updated in place and must not require a gradient")
    if running and any(n > 1 and step == 0 for n, step in zip(p.shape, p.stride())):
        raise ValueError(f"{name} is updated in place, and its elements must not share memory: clone it")


def _check_group(group):
    if group is not None and not isinstance(getattr(group, "group_name", None), str):
        raise TypeError(f"process_group must be a group of torch.distributed or None, got {type(group).__name__}")


def _check_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, axis, per_step, step_factor, scale):
    for name, flag in (("training", training), ("per_step", per_step)):
        check_flag(name, flag)
    shape = (x.shape[0], x.shape[axis]) if per_step else (x.shape[axis],)
    for name, p in (("weight", weight), ("bias", bias)):
        _check_vector(name, p, shape, x)
    for name, p in (("running_mean", running_mean), ("running_var", running_var)):
        _check_vector(name, p, shape, x, running=True)
        inference = training and p is not None and not torch.compiler.is_compiling() and p.is_inference()
        if inference and not torch.is_inference_mode_enabled():  # PyTorch would raise after it has changed the values
            raise ValueError(f"{name} was made in inference_mode and can be updated only there: clone it outside")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean and running_var must be given where training=False; without them use training=True")
    if not is_number(momentum):
        hint = "; for a cumulative average give 1 / num_batches_tracked" if momentum is None else ""
        raise TypeError(f"momentum must be a number, got {type(momentum).__name__}{hint}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
    for name, value in (("eps", eps), ("scale", scale)):
        if not is_number(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    check_number("scale", scale, state_dtype(x.dtype))
    if step_factor is not None:
        check_tensor("step_factor", step_factor, optional=True)
        if step_factor.dtype not in DATA_DTYPES or torch.promote_types(step_factor.dtype, x.dtype) != step_factor.dtype:
            raise TypeError(f"step_factor must be a floating tensor at least as wide as x ({x.dtype}), got {step_factor.dtype}")
        if step_factor.dim() == 0 or step_factor.shape[0] != x.shape[0] or step_factor.numel() != x.shape[0]:
            raise ValueError(
                f"step_factor must have one value per time step, shape ({x.shape[0]},) or ({x.shape[0]}, 1, ..), got "
                f"{tuple(step_factor.shape)}"
            )
        if step_factor.device != x.device:
            raise ValueError(f"step_factor must be on the device of x, {x.device}, got {step_factor.device}")


def check_state_and_flags(x, name, v, return_v, return_v_seq):
    """Check the state, which the messages call ``name``, and the flags."""
    if v is not None:
        check_membrane(name, v, x.shape[1:], x)
    for name, flag in (("return_v", return_v), ("return_v_seq", return_v_seq)):
        if flag is not False and flag is not True:
            check_flag(name, flag)


def batch_statistics(x, axis, per_step, eps, group, backend):
    """Return (mean, sum of (x - mean)^2, rstd, number of values) per channel; the number is a tensor if there is a group."""
    x = x.detach() if x.requires_grad else x
    mean, squares, rstd = _statistics_call(x, None, None, axis, per_step, eps, 0.0, backend)
    count = x.numel() // mean.numel() if mean.numel() else 0
    if group is None:
        return mean, squares, rstd, count
    mean, squares, count = _combine(mean, squares, count, group)
    return mean, squares, _rstd(squares / count, eps), count


class Norm(NamedTuple):
    """The arguments of a BatchNorm in front of a neuron."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    channel_axis: int
    per_step: bool
    step_factor: Tensor | None
    scale: float
    process_group: Any

    @property
    def learnt(self):
        return self.weight, self.bias, self.step_factor

    def without_update(self) -> "Norm":
        """Return the same norm for data that the running statistics have seen."""
        return self._replace(running_mean=None, running_var=None) if self.training else self

    def check(self, x):
        """Check x and the arguments of the norm. Return the axis of the channels, counted from 0."""
        check_data("x", x)
        axis = _check_axis(x, self.channel_axis)
        _check_norm(x, *self[:7], axis, *self[8:11])
        _check_group(self.process_group)
        per_channel = x.numel() // (x.shape[axis] * (x.shape[0] if self.per_step else 1)) if x.numel() else 0
        if self.training and self.process_group is None and per_channel == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        return axis

    def _can_update(self, x):
        """True if the kernel that finds the statistics may update the running statistics. Traces and transforms see PyTorch's
        operators instead."""
        if not self.training or self.process_group is not None or not x.numel():
            return False
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or torch.compiler.is_compiling() or transforms_active() or is_tracing():
            return False
        return mean.is_contiguous() and var.is_contiguous() and not (mean.is_inference() or var.is_inference())

    def statistics(self, x, axis, backend) -> "Statistics":
        """Return the statistics to normalise x with. In training, update the running statistics."""
        if not self.training:
            assert self.running_mean is not None and self.running_var is not None  # check has made sure
            dtype = state_dtype(x.dtype)
            mean, var = self.running_mean.to(dtype, copy=True), self.running_var.to(dtype)
            return Statistics(mean, _rstd(var, self.eps), None, "")
        group, running, eps = self.process_group, (self.running_mean, self.running_var), float(self.eps)
        if self._can_update(x):
            x = x.detach() if x.requires_grad else x
            mean, _, rstd = _updating_call(x, *running, axis, self.per_step, eps, float(self.momentum), backend)
            return Statistics(mean, rstd, None, "")
        mean, squares, rstd, n = batch_statistics(x, axis, self.per_step, eps, group, backend)
        if any_given(running) and (x.numel() or group is not None):
            with packed.unseen():
                update_running(*running, mean, squares, n, self.momentum)
        return Statistics(mean, rstd, None, "") if group is None else Statistics(mean, rstd, n, group.group_name)

    def launch(self, calls, x, v, axis, statistics, parameters, values, return_v, return_v_seq, spike_dtype, backend):
        """Run the neuron with these calls. Return what norm_lif returns.

        statistics: None: they are computed and, in training, the running statistics are updated.
        """
        T, learnt, found = x.shape[0], self.learnt, NotImplemented
        # a comparison would specialise a symbolic T; then the backward pass recomputes the checkpoint
        keep = isinstance(T, int) and T > LIF_CHECKPOINT_STEPS and wants_gradient(x, v, *learnt, *parameters)
        options = float(self.scale), axis, self.per_step, self.training
        rest = *values, return_v, return_v_seq, spike_dtype, keep
        if statistics is None and self._can_update(x):
            found = calls.train(
                x, v, *learnt, self.running_mean, self.running_var, None, *parameters, *options, "", *rest, float(self.eps),
                float(self.momentum), backend,
            )  # fmt: skip
        if found is NotImplemented:
            mean, rstd, count, group = self.statistics(x, axis, backend) if statistics is None else statistics
            found = calls.call(x, v, *learnt, mean, rstd, count, *parameters, *options, group, *rest, backend)
        s, final, seq, _ = found
        if not (return_v or return_v_seq):
            return s
        return returned((s, (final,) if return_v else None, (seq,) if return_v_seq else None), single=True)


class Statistics(NamedTuple):
    mean: Tensor
    rstd: Tensor
    values: Tensor | None  # the number of the values per channel, from all processes; None: of x
    group: str  # the name of the group of processes


def norm_lif(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    v: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int = 2,
    per_step: bool = False,
    step_factor: Tensor | None = None,
    scale: float = 1.0,
    process_group=None,
    tau=2.0,
    v_threshold=1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate="atan",
    alpha: float | None = None,
    levels=None,
    return_v: bool = False,
    return_v_seq: bool = False,
    spike_dtype: torch.dtype | None = None,
):
    r"""BatchNorm and a leaky integrate-and-fire neuron over T time steps, in one pass: what is between them is never stored.

    With the statistics of a channel over all steps, samples and positions, N values::

        xhat = (x - mean) / sqrt(var + eps) * scale
        s, v = lif(xhat * weight + bias, v, ..)

    In training, mean and var (biased) are the statistics of x, and the running statistics are updated in place::

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var + momentum * var * N / (N - 1)

    In evaluation, mean and var are running_mean and running_var. Variants of BatchNorm for spiking networks::

        step_factor, (T,)     current[t] = step_factor[t] * (xhat[t] * weight + bias)             TEBN
        per_step              statistics, weight and bias of every step of its own, (T, C)        BNTT
        scale                 scale = alpha * v_threshold                                         tdBN

    The forward pass reads x twice (once in evaluation) and writes the spikes. For the backward pass it keeps x, vectors per
    channel, v if given, and for T > 16 the membrane potential of every 16th step. The backward pass recomputes the neuron. With
    dx, the gradient of the current xhat * weight + bias, S1 = sum dx and S2 = sum dx * xhat over the N values, it returns::

        dbias = S1,    dweight = S2
        dx_in = weight / sqrt(var + eps) * (dx - S1 / N - xhat * S2 / N)          in evaluation without the last two terms

    Args:
        x: input, (T, .., C, ..), float32, float64, bfloat16 or float16; statistics and arithmetic are float32 (float64).
        weight, bias: (C,), or (T, C) with ``per_step``, at least as wide as x. None: 1 and 0.
        running_mean, running_var: running statistics, in the shape of weight. Training updates them in place. None: not kept;
            then use training=True. Under torch.func.vmap, each member of the batch needs its own.
        v: membrane potential before the first step, x.shape[1:]. None: v_reset, or 0 with soft reset.
        training: True: normalise with the statistics of x; False: with the running statistics.
        momentum: weight of the new statistics. For a cumulative average (momentum=None of torch.nn.BatchNorm2d), give
            1 / num_batches_tracked.
        eps: added to the variance.
        channel_axis: the axis of the channels, counted with T: 2 for (T, B, C, H, W), -1 for (T, B, L, C). Both layouts, and
            channels_last strides, are read in place. With ``per_step`` or ``step_factor``, x is copied if its channels are
            contiguous.
        per_step: True: statistics, weight and bias have a value per time step and channel.
        step_factor: factor of the current per time step, (T,) or (T, 1, ..). None: 1.
        scale: a number that multiplies xhat.
        process_group: a group of torch.distributed, or None. In training, the statistics are over the data of all its
            processes, as in torch.nn.SyncBatchNorm. The number of samples may differ. Gradients of weight and bias are not
            summed over processes.
        tau (float | Tensor): as in :func:`lif`: a number, a scalar tensor, or (C,) with one value per channel of channel_axis.
        v_threshold (float | Tensor): as tau.
        v_reset, decay_input, detach_reset, return_v, return_v_seq, spike_dtype: as in :func:`lif`.
        surrogate (str | Callable): as in :func:`lif`.
        alpha: as in :func:`lif`.
        levels (Levels | tuple[int, int] | str | None): ternary or integer spikes, as in :func:`lif`.

    Returns:
        s, with the shape of x; or a tuple (s, v), (s, v_seq) or (s, v, v_seq). Gradients reach x, weight, bias, step_factor, v,
        tau and v_threshold.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; one value per channel in training.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167. TEBN: Duan et al., NeurIPS 2022. BNTT: Kim and Panda,
    arXiv 2010.01729. tdBN: Zheng et al., arXiv 2011.05280.

    Example:
        >>> import torch
        >>> from sdit_kernels import norm_lif
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(2, 2, 1)  # T = 2, B = 2, C = 1
        >>> mean, var = torch.zeros(1), torch.ones(1)
        >>> norm_lif(x, torch.tensor([2.0]), None, mean, var, training=True, momentum=0.5).flatten().tolist()
        [0.0, 0.0, 0.0, 1.0]
        >>> mean.item(), round(var.item(), 3)
        (1.5, 2.833)
    """
    norm = Norm(weight, bias, running_mean, running_var, training, momentum, eps, channel_axis, per_step, step_factor, scale,
                process_group)  # fmt: skip
    return run_norm_lif(
        x, norm, v, None, False, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input,
        detach_reset=detach_reset, surrogate=surrogate, alpha=alpha, levels=levels, return_v=return_v,
        return_v_seq=return_v_seq, spike_dtype=spike_dtype,
    )  # fmt: skip


def run_norm_lif(
    x, norm, v, statistics, checked, *, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels,
    return_v, return_v_seq, spike_dtype,
):  # fmt: skip
    """Run norm_lif. statistics: of x; None: they are computed, and the running statistics are updated. checked: x and the
    arguments of the norm are right, and channel_axis counts from 0."""
    axis = norm.channel_axis if checked else norm.check(x)
    check_state_and_flags(x, "v", v, return_v, return_v_seq)
    neuron, tau_tensor, threshold_tensor = check_neuron(
        x, x.shape[axis], tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels, axis="channel axis"
    )
    if spike_dtype is not None or levels is not None:
        check_spike_dtype(spike_dtype, x, v, *norm.learnt, tau_tensor, threshold_tensor, levels=levels, half=True)
    if neuron is None:
        warn_of_custom_surrogate()
    backend = dispatch.choose(x.device, fused=neuron is not None)
    if backend == "reference":
        if values_are_readable(x):
            check_neuron_values(tau_tensor, threshold_tensor, decay_input, state_dtype(x.dtype), encode(levels))
        own = norm if statistics is None else norm.without_update()
        found = reference.norm_lif(
            x, *own[:4], v, training=norm.training, momentum=norm.momentum, eps=norm.eps, channel_axis=axis,
            per_step=norm.per_step, step_factor=norm.step_factor, scale=norm.scale, process_group=norm.process_group, tau=tau,
            v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input, detach_reset=detach_reset, surrogate=surrogate,
            alpha=alpha, levels=levels, return_v=return_v, return_v_seq=return_v_seq, spike_dtype=spike_dtype,
        )  # fmt: skip
    else:
        found = norm.launch(
            _lif_calls, x, v, axis, statistics, (tau_tensor, threshold_tensor), neuron, return_v, return_v_seq, spike_dtype,
            backend,
        )  # fmt: skip
    s = found[0] if isinstance(found, tuple) else found
    by_sample = norm.training and axis == 2  # a thread of the CPU writes some channels of every sample
    packed.note_spikes(s, levels, parts=s.shape[0] * s.shape[1] if by_sample else None)
    return found
