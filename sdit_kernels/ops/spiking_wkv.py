"""spiking_wkv: the public function and the operators ``sdit_kernels::spiking_wkv*`` behind it."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .. import dispatch, memory, packed, reference, tuning
from ..checks import (
    Neuron,
    check_flag,
    check_levels_fit,
    check_membrane,
    check_neuron,
    check_neuron_values,
    check_scan_state,
    check_tokens,
    wants_gradient,
    warn_of_custom_surrogate,
)
from ..dtypes import state_dtype
from ..layout import spiking_tile, wkv_rows
from ..levels import encode
from ..neuron import LIF
from .lif import NEURON_SCHEMA, Settings, lif_variant
from .neuron import allocate_parameter_gradients, sum_parameter_gradients
from .operator import kernels, register, values_are_readable
from .wkv import State

if TYPE_CHECKING:
    from typing_extensions import Unpack

_STEPS = 16  # a Triton program holds the scan states of at most this many time steps


def _outputs(k, rate, return_state, keep, backend, numbers):
    """Allocate out, ybar, lse, membrane and checkpoint. Outputs that are not requested are None."""
    T, B, L, C = k.shape
    dtype = state_dtype(k.dtype)
    out = memory.empty_contiguous((B, L, C) if rate else k.shape, k.dtype, k)
    states = [k.new_empty(shape, dtype=dtype) for shape in ((T, B, C), (T, B, C), (B, L, C))] if return_state else [None] * 3
    rows = wkv_rows(T * B, L, None, spiking_tile(T, backend, numbers)) if keep else 0
    return out, *states, k.new_empty((3, rows, C), dtype=dtype) if keep else None


def _forward(k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold, decay_is_log_of_rate, *rest):
    *neuron, rate, return_state, keep, backend = rest
    neuron = Neuron(*neuron)
    numbers = tuning.current()
    outputs = _outputs(k, rate, return_state, keep, backend, numbers)
    if k.device.type == "cpu":
        check_neuron_values(tau, v_threshold, neuron.decay_input, state_dtype(k.dtype), neuron.levels)
    if k.numel():
        kernels(backend, "spiking_wkv").spiking_wkv_forward(
            k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, membrane, (tau, v_threshold),
            lif_variant(*neuron), rate, *outputs, numbers,
        )  # fmt: skip
    elif return_state:  # no tokens or no steps: the final states are the given states
        for new, old, empty in zip(outputs[1:3], (ybar, lse), (0.0, -torch.inf)):
            new.fill_(empty) if old is None else new.copy_(torch.where(lse > -torch.inf, old, empty))
        outputs[3].fill_(neuron.v_reset or 0.0) if membrane is None else outputs[3].copy_(membrane)
    return outputs


def _forward_fake(k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold, decay_is_log_of_rate, *rest):
    return _outputs(k, *rest[8:], tuning.current())


def _backward_outputs(k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold, parameters):
    """Allocate the gradients of the ten tensors, in this order. Gradients that are not requested are None."""
    data = [None if t is None else memory.empty_contiguous(k.shape, k.dtype, k) for t in (k, v, r)]
    given = [None if t is None else t.new_empty(t.shape) for t in (decay, bonus, ybar, lse, membrane)]
    return *data, *given, *allocate_parameter_gradients((tau, v_threshold), parameters)


def _backward(
    g, g_ybar, g_lse, g_membrane, k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold, checkpoint,
    decay_is_log_of_rate, *rest,
):  # fmt: skip
    *neuron, rate, parameters, backend = rest
    inputs = k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold
    outputs = _backward_outputs(*inputs, parameters)
    dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse, d_membrane, *d_parameters = outputs
    if k.numel() == 0:
        for d in (d_decay, d_bonus, *d_parameters):
            if d is not None:
                d.zero_()
        if ybar is not None:
            for d, upstream in ((d_ybar, g_ybar), (d_lse, g_lse)):
                d.zero_() if upstream is None else d.copy_(torch.where(lse > -torch.inf, upstream, 0.0))
        if membrane is not None:
            d_membrane.zero_() if g_membrane is None else d_membrane.copy_(g_membrane)
        return outputs
    numbers = tuning.current()
    rows = wkv_rows(k.shape[0] * k.shape[1], k.shape[2], None, spiking_tile(k.shape[0], backend, numbers))
    # The forward pass ran without a checkpoint (torch.func), or under another Tuning, so recompute it.
    if checkpoint is None or checkpoint.numel() == 0 or checkpoint.shape[1] != rows:
        checkpoint = _forward(*inputs, decay_is_log_of_rate, *neuron, rate, False, True, backend)[4]
    sums = kernels(backend, "spiking_wkv").spiking_wkv_backward(
        g, g_ybar, g_lse, g_membrane, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, membrane, (tau, v_threshold),
        checkpoint.contiguous(), lif_variant(*neuron), rate, parameters, *outputs[:8], numbers,
    )  # fmt: skip
    return *outputs[:8], *sum_parameter_gradients(LIF, (tau, v_threshold), sums, d_parameters)


def _backward_fake(
    g, g_ybar, g_lse, g_membrane, k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold, checkpoint,
    decay_is_log_of_rate, *rest,
):  # fmt: skip
    return _backward_outputs(k, v, r, decay, bonus, ybar, lse, membrane, tau, v_threshold, rest[-2])


def _save(ctx, inputs, output):
    *tensors, ctx.decay_is_log_of_rate = inputs[:11]
    *ctx.neuron, ctx.rate, ctx.returned, _, ctx.backend = inputs[11:]
    ctx.save_for_backward(*tensors, output[4])
    ctx.set_materialize_grads(False)


def _gradient(ctx, g, g_ybar, g_lse, g_membrane, _):
    *tensors, checkpoint = ctx.saved_tensors
    if not ctx.returned:  # compiled graphs pass zeros for empty outputs
        g_ybar = g_lse = g_membrane = None
    needs = ctx.needs_input_grad
    return _backward_call(
        g, g_ybar, g_lse, g_membrane, *tensors, checkpoint, ctx.decay_is_log_of_rate, *ctx.neuron, ctx.rate,
        needs[8] or needs[9], ctx.backend,
    )  # fmt: skip


_INPUTS = (
    "Tensor k, Tensor v, Tensor? r, Tensor decay, Tensor first, Tensor? ybar, Tensor? lse, Tensor? membrane, Tensor? tau, "
    "Tensor? v_threshold"
)
_call = register(
    f"spiking_wkv({_INPUTS}, bool raw, {NEURON_SCHEMA}, bool rate, bool return_state, bool keep, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    batch_axes=(None,) * 10,  # vmap loops: k has no axis for members with separate states
    output_axes=(0,) * 5,
    save=_save,
    gradient=_gradient,
)
_backward_call = register(
    f"spiking_wkv_backward(Tensor? g, Tensor? g_ybar, Tensor? g_lse, Tensor? g_membrane, {_INPUTS}, Tensor? checkpoint, "
    f"bool raw, {NEURON_SCHEMA}, bool rate, bool parameters, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    batch_axes=(None,) * 15,
    output_axes=(0,) * 10,
)


def _chunks(k, v, r, scan_state, membrane, rate, one):
    """Run more steps than a Triton program holds: several calls that pass the membrane on. Concatenate their spikes."""
    spikes, states = [], []
    for t in range(0, k.shape[0], _STEPS):
        part = slice(t, t + _STEPS)
        state = None if scan_state is None else tuple(s[part] for s in scan_state)
        s, (state, membrane) = one(k[part], v[part], None if r is None else r[part], state, membrane)
        spikes.append(s)
        states.append(state)
    s = torch.cat(spikes)
    if rate:
        s = (s.sum(0, dtype=state_dtype(k.dtype)) / k.shape[0]).to(k.dtype)
    return s, (tuple(torch.cat(parts) for parts in zip(*states)), membrane)


class _Options(Settings, total=False):
    log_decay: Tensor | None
    scan_state: State | None
    membrane: Tensor | None
    rate: bool


@overload
def spiking_wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = ...,
    *,
    return_state: Literal[False] = ...,
    **options: "Unpack[_Options]",
) -> Tensor: ...
@overload
def spiking_wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = ...,
    *,
    return_state: Literal[True],
    **options: "Unpack[_Options]",
) -> tuple[Tensor, tuple[State, Tensor]]: ...
@overload
def spiking_wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = ...,
    *,
    return_state: bool,
    **options: "Unpack[_Options]",
) -> Tensor | tuple[Tensor, tuple[State, Tensor]]: ...


def spiking_wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    *,
    tau=2.0,
    v_threshold=1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate="atan",
    alpha: float | None = None,
    levels=None,
    log_decay: Tensor | None = None,
    scan_state: tuple[Tensor, Tensor] | None = None,
    membrane: Tensor | None = None,
    return_state: bool = False,
    rate: bool = False,
):
    r"""WKV scans over tokens that drive LIF neurons over time, in one kernel, forward and backward.

    At each of T time steps, the op scans the keys and values over the tokens, independently of other steps. The result is the
    input current of one LIF neuron per token and channel::

        current[t] = wkv(time_decay, time_first, k[t], v[t], r=r[t])        (B, L, C)
        s          = lif(current, membrane)                                 (T, B, L, C)
        out        = s, or with ``rate`` the mean of s over T               (B, L, C)

    The kernel processes the tokens in order and holds T scan states. It reads k, v and r once and writes the spikes once. It
    never stores the currents, which are float32 (float64). On a GPU, one thread processes each of the B * C channels. Below
    32,768 channels, the op runs the kernels of wkv and lif instead, which are also parallel over tokens and therefore faster;
    the currents then exist during the call.

    The backward pass keeps k, v, r, the given states, and the scan states at the start of every tile of tokens. (A tile has
    64 / T tokens on the CPU and 16 / T on a GPU, at least 2.) It recomputes everything else, the spikes bit for bit. The spikes
    of two backends may differ if the membrane potential is within rounding of the threshold, because the exponentials of the
    backends differ in rounding. Parameter gradients are summed in a fixed order: they are the same bit for bit for every number
    of threads.

    Args:
        time_decay: RWKV's decay parameter, (C,). None if ``log_decay`` is given.
        time_first: bonus u of the current token in the log domain, (C,).
        k: keys, (T, B, L, C), float32, float64, bfloat16 or float16, any strides. k = -inf masks a token. More than 16 steps on
            a GPU run as calls of 16 steps; ``rate`` then takes the mean of stored spikes.
        v: values, with the shape and dtype of k.
        r: receptance, the logits of a gate on the current, with the shape and dtype of k. By position or by name.
        tau (float | Tensor): time constant in steps, as in :func:`lif`; a number, a scalar tensor or a tensor (C,).
        v_threshold (float | Tensor): firing threshold, as in :func:`lif`; a number, a scalar tensor or a tensor (C,).
        v_reset: membrane potential after a spike. None subtracts the threshold instead (soft reset).
        decay_input: True: the leak divides the input by tau too.
        detach_reset: True: no gradient flows through the reset.
        surrogate (str | Callable): surrogate gradient, as in :func:`lif`.
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        levels (Levels | tuple[int, int] | str | None): ternary or integer spikes, as in :func:`lif`.
        log_decay: w itself, (C,), as in :func:`wkv`.
        scan_state: states of the scans before the first token, (ybar, lse), each (T, B, C), float32 (float64 for float64 data).
            None: empty states.
        membrane: membrane potential before the first step, (B, L, C), in the dtype of k or float32 (float64). None: v_reset, or
            0 with soft reset.
        return_state: also return the states of the scans after the last token and the membrane potential after the last step.
        rate: return the mean of the spikes over T instead of the spikes.

    Returns:
        out, with the dtype of k; with ``return_state`` the pair (out, ((ybar, lse), membrane)), the states float32 (float64).
        Gradients reach time_decay or log_decay, time_first, k, v, r, tau, v_threshold, scan_state and membrane, from each
        output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. The op checks the values of a
            tensor tau on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Peng et al., RWKV, arXiv 2305.13048 (the scan); Yang et al., SDiT, arXiv 2402.11588 (a scan that drives spiking
    neurons).

    Example:
        >>> import torch
        >>> from sdit_kernels import spiking_wkv
        >>> k, v = torch.zeros(2, 1, 3, 1), torch.tensor([1.0, 3.0, 5.0]).reshape(1, 1, 3, 1).repeat(2, 1, 1, 1)
        >>> s = spiking_wkv(None, torch.zeros(1), k, v, log_decay=torch.zeros(1))  # currents 1, 2, 3, twice
        >>> s[:, 0, :, 0]
        tensor([[0., 1., 1.],
                [0., 1., 1.]])
    """
    decay, decay_is_log_of_rate = check_tokens(time_decay, time_first, k, v, r, log_decay, ("T", "B", "L", "C"))
    T, B, L, C = k.shape
    for name, flag in (("return_state", return_state), ("rate", rate)):
        check_flag(name, flag)
    ybar, lse = (None, None) if scan_state is None else check_scan_state(scan_state, (T, B, C), k, "scan_state")
    if membrane is not None:
        check_membrane("membrane", membrane, (B, L, C), k, "k")
    neuron, tau_tensor, threshold_tensor = check_neuron(
        k, C, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, levels, "k"
    )
    if levels is not None:
        check_levels_fit(levels, k.dtype, "the dtype of the spikes")
    if rate and T == 0:
        raise ValueError("rate is a mean over time and needs at least one step, got k with T = 0")
    if neuron is None:
        warn_of_custom_surrogate()
    backend = dispatch.choose(k.device, fused=neuron is not None)
    if backend == "reference":
        if values_are_readable(k):
            check_neuron_values(tau_tensor, threshold_tensor, decay_input, state_dtype(k.dtype), encode(levels))
        found = reference.spiking_wkv(
            time_decay, time_first, k, v, r, tau=tau, v_threshold=v_threshold, v_reset=v_reset, decay_input=decay_input,
            detach_reset=detach_reset, surrogate=surrogate, alpha=alpha, levels=levels, log_decay=log_decay,
            scan_state=scan_state, membrane=membrane, return_state=return_state, rate=rate,
        )  # fmt: skip
        packed.note_spikes(found[0] if return_state else found, levels, T if rate else None)
        return found
    keep = wants_gradient(k, v, r, decay, time_first, ybar, lse, membrane, tau_tensor, threshold_tensor)

    def one(k, v, r, scan_state, membrane, rate=False, return_state=True):
        ybar, lse = scan_state or (None, None)
        s, ybar, lse, membrane, _ = _call(
            k, v, r, decay, time_first, ybar, lse, membrane, tau_tensor, threshold_tensor, decay_is_log_of_rate, *neuron, rate,
            return_state, keep, backend,
        )  # fmt: skip
        return s, ((ybar, lse), membrane)

    if backend == "triton" and T > _STEPS:
        out, state = _chunks(k, v, r, scan_state, membrane, rate, one)
    else:
        out, state = one(k, v, r, scan_state, membrane, rate, return_state)
    packed.note_spikes(out, levels, T if rate else None)
    return (out, state) if return_state else out
