"""The operators of neurons over T time steps: one factory for all neurons, and the call that their ops share.

An operator has a CPU, a CUDA and a fake implementation and an autograd formula. The backend is an argument of the operator,
because the backward pass may run on another thread than the one that chose the backend.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import dispatch, memory, packed, reference, tuning
from ..checks import (
    check_data,
    check_flag,
    check_levels_fit,
    check_membrane,
    check_neuron_parameter,
    check_number,
    check_surrogate,
    wants_gradient,
    warn_of_custom_surrogate,
)
from ..dtypes import state_dtype
from ..layout import LIF_CHECKPOINT_STEPS, empty_like, empty_state_like, empty_states_like
from ..levels import Levels
from ..neuron import Neuron, Variant
from ..pending import Pending, computed, run_with_norm
from ..reference.neuron import returned
from .operator import kernels, register, values_are_readable

INFERENCE_DTYPES = (torch.uint8, torch.bool)
LEVEL_DTYPES = (torch.uint8, torch.int8)  # for inference with integer or ternary spikes
HALF_DTYPES = (torch.bfloat16, torch.float16)


def check_steps(x, states, **flags):
    """Check x, the states by their names in messages, and flags. Return the number of channels, or None if x is (T,)."""
    check_data("x", x)
    axes = x.dim()
    if axes == 0:
        raise ValueError("x must have a time axis, (T, ...), got a tensor without axes")
    for name, v in states.items():
        if v is not None:
            check_membrane(name, v, x.shape[1:], x)
    for name, flag in flags.items():
        if flag is not False and flag is not True:
            check_flag(name, flag)
    return x.shape[-1] if axes > 1 else None


def check_state(state, names):
    """Return the states of a neuron, given as a tuple or None, as a tuple with an entry per state."""
    if state is None:
        return (None,) * len(names)
    if not isinstance(state, (tuple, list)) or len(state) != len(names):
        found = f"{len(state)} items" if isinstance(state, (tuple, list)) else type(state).__name__
        form = f"({', '.join(names)}{',' * (len(names) == 1)})"
        raise TypeError(f"state must be None or a tuple {form} of tensors or None, got {found}")
    return tuple(state)


def check_spike_dtype(spike_dtype, x, *tensors, levels=None, half=False):
    """Check the dtype of the spikes. tensors: what may need a gradient besides x. half: float32 x may give 16-bit spikes."""
    if spike_dtype is None and levels is None:
        return
    given = spike_dtype is not None and spike_dtype != x.dtype
    allowed = INFERENCE_DTYPES if levels is None else LEVEL_DTYPES
    halves = HALF_DTYPES if half and x.dtype == torch.float32 else ()
    if given and spike_dtype not in (*allowed, *halves):
        names = " or ".join(map(str, (*halves, *allowed)))
        raise ValueError(f"spike_dtype must be None (x's dtype, {x.dtype}), {names}, got {spike_dtype}")
    if levels is not None:
        check_levels_fit(levels, spike_dtype if given else x.dtype, "the dtype of the spikes")
        if given and spike_dtype not in halves and levels != "ternary" and Levels(*levels).scale != 1:
            raise ValueError(f"spike_dtype={spike_dtype} holds integers: leave out the scale of levels, or spike_dtype")
    if given and spike_dtype not in halves and wants_gradient(x, *tensors):
        raise ValueError(f"spike_dtype={spike_dtype} carries no gradient: call under torch.no_grad(), or leave it out")


def launch(call, x, states, parameters, values, return_state, return_state_seq, spike_dtype, backend):
    """Call the operator of a neuron. Return (s, last states, their sequences); what is not requested is None."""
    T, S = x.shape[0], len(states)
    # a comparison would specialise a symbolic T; then the backward pass recomputes the checkpoint
    keep = isinstance(T, int) and T > LIF_CHECKPOINT_STEPS and wants_gradient(x, *states, *parameters)
    found = call(x, *states, *parameters, *values, return_state, return_state_seq, spike_dtype, keep, backend)
    return found[0], found[1 : 1 + S] if return_state else None, found[1 + S : 1 + 2 * S] if return_state_seq else None


def any_given(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110, because any() takes twice the time
        if t is not None:
            return True
    return False


def have_tokens(parameters: Sequence[Tensor | None]) -> bool:
    """True if a parameter has a value per token."""
    return any(p is not None and p.dim() > 1 for p in parameters)


def per_channel(parameters: Sequence[Tensor | None]) -> bool:
    for p in parameters:  # noqa: SIM110, as above
        if p is not None and (p.numel() > 1 or p.dim() > 1):
            return True
    return False


def allocate_parameter_gradients(parameters, wanted):
    """Gradients that are not requested are None."""
    return [memory.empty_contiguous(p.shape, p.dtype, p) if wanted and p is not None else None for p in parameters]


def sum_parameter_gradients(neuron, parameters, sums, found):
    """Replace in ``found`` the gradients of tensor parameters, from a launcher's partial sums.

    The partial sums of a scalar have any shape; of a parameter with several values, (any, number of values).
    """
    if sums is None:
        return found
    for i, (p, partial) in enumerate(zip(parameters, sums)):
        if p is not None:
            d = partial.sum(0) if p.numel() > 1 or p.dim() > 1 else partial.sum()
            if neuron.parameters[i] in neuron.reciprocals:  # r = 1 / tau
                d = -d / p.to(d.dtype).reshape(d.shape) ** 2
            found[i] = d.reshape(p.shape).to(p.dtype)
    return found


def define(
    neuron: Neuron,
    names: Sequence[str],
    schema: str,
    variant: Callable[..., Variant],
    check: Callable[..., None],
) -> Callable[..., tuple[Tensor, ...]]:
    """Define the operator ``sdit_kernels::<neuron.name>`` and its backward operator. Return the function to call.

    The arguments are x, a Tensor | None per state, a Tensor | None per parameter, the values of ``schema``, return_state,
    return_state_seq, spike_dtype, keep (the checkpoint), backend. The outputs are the spikes, then per state the last one, its
    sequence and its checkpoint. Outputs that are not requested are None.

    names: how users call the parameters. schema: the schema of the other settings. variant(*values): what launchers take.
    check(parameters, values, dtype): checks the values of tensor parameters, on the CPU only, because reading them on a GPU
    would wait for the GPU.
    """
    name, S, P = neuron.name, len(neuron.states), len(neuron.parameters)
    inputs = 1 + S + P
    T, nothing = range(S), [None] * S

    def reads_rows(given, parameters):
        """True if the kernels need to know which elements are the channels of a token."""
        return given.norm != "" or per_channel(parameters)

    def allocate(x, given, parameters, return_state, return_state_seq, spike_dtype, keep):
        dtype, channels = state_dtype(x.dtype), reads_rows(given, parameters)
        s = empty_like(x, spike_dtype or x.dtype, channels)
        finals = [empty_state_like(s, dtype) for _ in T] if return_state else nothing
        seqs = [empty_like(x, dtype, channels) for _ in T] if return_state_seq else nothing
        if not keep:
            return s, finals, seqs, nothing
        rows = max(x.shape[0] - 1, 0) // LIF_CHECKPOINT_STEPS
        return s, finals, seqs, [empty_states_like(s, dtype, rows) for _ in T]

    def forward(x, *rest):
        states, parameters, values, flags, backend = rest[:S], rest[S : S + P], rest[S + P : -5], rest[-5:-1], rest[-1]
        given = variant(*values)
        s, finals, seqs, checkpoints = allocate(x, given, parameters, *flags)
        if any_given(parameters) and x.device.type == "cpu":
            check(parameters, values, state_dtype(x.dtype))
        if x.numel():
            kernels(backend, "neuron").neuron_forward(
                given, x, states, parameters, s, finals, seqs, checkpoints, tuning.current()
            )
        elif flags[0]:
            for final, state, start in zip(finals, states, starts(given)):
                final.fill_(start) if state is None else final.copy_(state)
        return s, *finals, *seqs, *checkpoints

    def forward_fake(x, *rest):
        s, finals, seqs, checkpoints = allocate(x, variant(*rest[S + P : -5]), rest[S : S + P], *rest[-5:-1])
        return s, *finals, *seqs, *checkpoints

    def starts(given):
        numbers = dict(zip((*neuron.parameters, *neuron.numbers), given.values))
        return [numbers.get(start, 0.0) for start in neuron.start]

    def allocate_gradients(x, given, states, parameters, wanted):
        dx = empty_like(x, x.dtype, reads_rows(given, parameters))
        d_states = [None if v is None else empty_state_like(dx, v.dtype) for v in states]
        return dx, d_states, allocate_parameter_gradients(parameters, wanted)

    def backward(g, *rest):
        g_finals, g_seqs, (x, *states) = rest[:S], rest[S : 2 * S], rest[2 * S : 3 * S + 1]
        rest = rest[3 * S + 1 :]
        parameters, checkpoints, values, wanted, backend = rest[:P], rest[P : P + S], rest[P + S : -2], rest[-2], rest[-1]
        given = variant(*values)
        dx, d_states, d_parameters = allocate_gradients(x, given, states, parameters, wanted)
        if x.numel() == 0:
            for d, v, g_final in zip(d_states, states, g_finals):
                if v is not None:
                    d.zero_() if g_final is None else d.copy_(g_final)
            return dx, *d_states, *(None if d is None else d.zero_() for d in d_parameters)
        if x.shape[0] <= LIF_CHECKPOINT_STEPS:
            checkpoints = nothing
        elif checkpoints[0] is None or checkpoints[0].numel() == 0:
            # The forward pass ran without a checkpoint (torch.func or symbolic T), so recompute it.
            checkpoints = forward(x, *states, *parameters, *values, False, False, None, True, backend)[1 + 2 * S :]
        sums = kernels(backend, "neuron").neuron_backward(
            given, g, g_finals, g_seqs, x, states, parameters, checkpoints, dx, d_states, wanted, tuning.current(),
        )  # fmt: skip
        return dx, *d_states, *sum_parameter_gradients(neuron, parameters, sums, d_parameters)

    def backward_fake(g, *rest):
        (x, *states), parameters = rest[2 * S : 3 * S + 1], rest[3 * S + 1 : 3 * S + 1 + P]
        given = variant(*rest[3 * S + 1 + P + S : -2])
        dx, d_states, d_parameters = allocate_gradients(x, given, states, parameters, rest[-2])
        return dx, *d_states, *d_parameters

    def save(ctx, arguments, outputs):
        ctx.rest = arguments[inputs:]
        ctx.save_for_backward(*arguments[:inputs], *outputs[1 + 2 * S :])
        ctx.set_materialize_grads(False)

    def gradient(ctx, g, *upstream):
        *values, return_state, return_state_seq, _, _, backend = ctx.rest
        # Compiled graphs pass zeros for empty outputs.
        g_finals = upstream[:S] if return_state else [None] * S
        g_seqs = upstream[S : 2 * S] if return_state_seq else [None] * S
        wanted = any(ctx.needs_input_grad[1 + S : inputs])
        return backward_call(g, *g_finals, *g_seqs, *ctx.saved_tensors, *values, wanted, backend)

    def tensors(kind, given):
        return "".join(f"{kind} {given_}, " for given_ in given)

    states, parameters = tensors("Tensor?", neuron.states), tensors("Tensor?", names)
    checkpoint_names = [f"checkpoint_{v}" if S > 1 else "checkpoint" for v in neuron.states]
    call = register(
        f"{name}(Tensor x, {states}{parameters}{schema}, bool return_state, bool return_state_seq, ScalarType? spike_dtype, "
        f"bool keep, str backend) -> ({', '.join(['Tensor'] * (1 + 3 * S))})",
        forward,
        forward_fake,
        batch_axes=(1, *(0 for _ in T), *(None for _ in names)),
        output_axes=(1, *(0 for _ in T), *(1 for _ in T), *(1 for _ in T)),
        save=save,
        gradient=gradient,
        loop=lambda given: have_tokens(given[1 + S :]),
    )
    upstream = tensors("Tensor?", [f"g_{v}" for v in neuron.states] + [f"g_{v}_seq" for v in neuron.states])
    backward_call = register(
        f"{name}_backward(Tensor? g, {upstream}Tensor x, {states}{parameters}{tensors('Tensor?', checkpoint_names)}{schema}, "
        f"bool parameters, str backend) -> ({', '.join(['Tensor'] * (1 + S + P))})",
        backward,
        backward_fake,
        batch_axes=(1, *(0 for _ in T), *(1 for _ in T), 1, *(0 for _ in T), *(None for _ in names), *(1 for _ in T)),
        output_axes=(1, *(0 for _ in T), *(None for _ in names)),
        loop=lambda given: have_tokens(given[2 + 3 * S : 2 + 3 * S + P]),
    )
    return call


class NeuronOp:
    """The op of a neuron whose settings are its parameters, the flags of its step, and a surrogate.

    checks: per parameter, a function of (name, number, dtype of the arithmetic) that raises an error if the number is out of
    range. constants: the neuron's numbers. binary: True if all spikes are 0 or 1.
    """

    def __init__(self, neuron: Neuron, checks=None, constants=(), binary=True):
        self.binary = binary
        self.neuron, self.constants = neuron, tuple(constants)
        self.checks = checks or (check_number,) * len(neuron.parameters)
        self.flags = tuple(neuron.flags)
        values = [f"float {name}_value" for name in neuron.parameters]
        flags = [f"{type(flag).__name__} {name}" for name, flag in neuron.flags.items()]
        schema = ", ".join([*values, *flags, "str surrogate", "float alpha"])
        self.schema, self._norm_calls = schema, None
        self._call = define(neuron, neuron.parameters, schema, self._variant, self._check_values)

    def _variant(self, *values):
        n = len(self.neuron.parameters)
        *flags, surrogate, alpha = values[n:]
        return Variant(self.neuron, tuple(flags), (*values[:n], *self.constants), surrogate, alpha)

    def _check_values(self, parameters, values, dtype):
        """Check the values of tensor parameters."""
        for name, p, check in zip(self.neuron.parameters, parameters, self.checks):
            if p is not None and p.numel():
                check(name, p.min().item(), dtype)
                check(name, p.max().item(), dtype)

    def one_state(
        self, x, v, parameters, flags, surrogate, alpha, return_v, return_v_seq, spike_dtype
    ):  # fmt: skip
        """Run a neuron whose only state is the argument v. Return s, or (s, v), (s, v_seq) or (s, v, v_seq)."""
        if isinstance(x, Pending):
            found = self._run_pending(x, v, parameters, flags, surrogate, alpha, return_v, return_v_seq, spike_dtype)
            if found is not None:
                return found
            x = computed(x)
        channels = check_steps(x, {"v": v}, return_v=return_v, return_v_seq=return_v_seq)
        found = self._run(x, (v,), parameters, flags, surrogate, alpha, return_v, return_v_seq, spike_dtype, channels)
        return returned(found, single=True)

    def _run_pending(self, x, v, parameters, flags, surrogate, alpha, return_v, return_v_seq, spike_dtype):
        """Compute the norm of which x is the output and the neuron in one pass; None if that is not possible."""
        if any(isinstance(p, Tensor) and p.numel() > 1 for p in parameters):
            return None
        return run_with_norm(
            self.after_norm, x, v, parameters=parameters, flags=flags, surrogate=surrogate, alpha=alpha, return_v=return_v,
            return_v_seq=return_v_seq, spike_dtype=spike_dtype,
        )  # fmt: skip

    def after_norm(
        self, x, norm, v, statistics, checked, *, parameters, flags, surrogate, alpha, return_v, return_v_seq, spike_dtype
    ):  # fmt: skip
        """Run a BatchNorm, a Norm of norm_lif.py, and this neuron, which has one state, in one pass; see run_norm_lif there."""
        from .norm_lif import check_state_and_flags, define_norm  # which builds on this module

        axis = norm.channel_axis if checked else norm.check(x)
        check_state_and_flags(x, f"state's {self.neuron.states[0]}", v, return_v, return_v_seq)
        values, tensors, alpha = self._check(
            x, (v, *norm.learnt), parameters, surrogate, alpha, spike_dtype, x.shape[axis], axis="channel axis"
        )  # fmt: skip
        backend = dispatch.choose(x.device, fused=alpha is not None)
        if backend == "reference":
            if values_are_readable(x):
                self._check_values(tensors, (), state_dtype(x.dtype))
            current, axis = reference.norm.normalise(x, *(norm if statistics is None else norm.without_update()))
            found = reference.neuron.run(
                self.neuron, current, (None if v is None else v.movedim(axis - 1, -1),), parameters,
                dict(zip(self.flags, flags)), surrogate, alpha, return_v, return_v_seq, spike_dtype or x.dtype, self.constants,
            )  # fmt: skip
            found = reference.norm.move_back(returned(found, single=True), x, axis)
        else:
            assert alpha is not None  # the reference has served a custom surrogate function
            if self._norm_calls is None:
                names, schema = self.neuron.parameters, self.schema
                self._norm_calls = define_norm(self.neuron, names, schema, self._variant, self._check_values)
            settings = (*values, *flags, surrogate, alpha)
            found = norm.launch(
                self._norm_calls, x, v, axis, statistics, tensors, settings, return_v, return_v_seq, spike_dtype, backend
            )
        self._noted(found if isinstance(found, tuple) else (found,))
        return found

    def states(self, x, state, parameters, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype):
        """Run a neuron whose states are the argument ``state``, a tuple. Return s, or s and what was requested."""
        names = self.neuron.states
        states = check_state(state, names)
        if isinstance(x, Pending):
            found = None
            if len(names) == 1:
                found = self._run_pending(
                    x, states[0], parameters, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype
                )  # fmt: skip
            if found is not None:
                return (found[0], *((v,) for v in found[1:])) if isinstance(found, tuple) else found
            x = computed(x)
        named = {f"state's {name}": v for name, v in zip(names, states)}
        channels = check_steps(x, named, return_state=return_state, return_state_seq=return_state_seq)
        found = self._run(
            x, states, parameters, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype, channels
        )  # fmt: skip
        return returned(found)

    def _check(self, x, more, parameters, surrogate, alpha, spike_dtype, channels, axis="last axis"):
        """Check the settings. Return (numbers, tensors or None, alpha). more: tensors that may need a gradient."""
        names, dtype = self.neuron.parameters, state_dtype(x.dtype)
        given = [check_neuron_parameter(name, p, x, channels, axis=axis) for name, p in zip(names, parameters)]
        values, tensors = tuple(value for value, _ in given), tuple(tensor for _, tensor in given)
        for name, value, tensor, check in zip(names, values, tensors, self.checks):
            if tensor is None:
                check(name, value, dtype)
        check_spike_dtype(spike_dtype, x, *more, *tensors)
        alpha = check_surrogate(surrogate, alpha, dtype)
        if alpha is None:
            warn_of_custom_surrogate()
        return values, tensors, alpha

    def _run(
        self, x, states, parameters, flags, surrogate, alpha, return_state, return_state_seq, spike_dtype, channels
    ):  # fmt: skip
        values, tensors, alpha = self._check(x, states, parameters, surrogate, alpha, spike_dtype, channels)
        dtype = state_dtype(x.dtype)
        backend = dispatch.choose(x.device, fused=alpha is not None)
        if backend == "reference":
            if values_are_readable(x):
                self._check_values(tensors, (), dtype)
            found = reference.neuron.run(
                self.neuron, x, states, parameters, dict(zip(self.flags, flags)), surrogate, alpha, return_state,
                return_state_seq, spike_dtype, self.constants,
            )  # fmt: skip
            return self._noted(found)
        assert alpha is not None  # the reference has served a custom surrogate function
        settings = (*values, *flags, surrogate, alpha)
        return self._noted(
            launch(self._call, x, states, tensors, settings, return_state, return_state_seq, spike_dtype, backend)
        )

    def _noted(self, found):
        if self.binary:
            packed.note_spikes(found[0])
        return found
