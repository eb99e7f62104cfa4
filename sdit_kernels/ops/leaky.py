"""leaky: the public function and the operators ``sdit_kernels::leaky*`` behind it, built as those of lif."""

from typing import NamedTuple

from torch import Tensor

from .. import dispatch, reference, tuning
from ..checks import (
    check_data,
    check_flag,
    check_membrane,
    check_neuron_parameter,
    check_surrogate,
    check_threshold,
    wants_gradient,
    warn_of_custom_surrogate,
)
from ..dtypes import state_dtype
from ..layout import STRIDE
from .lif import allocate_gradients, allocate_outputs
from .operator import kernels, register, values_are_readable

RESETS = ("subtract", "zero", "none")
_NEURON = "float beta_value, float v_threshold_value, str reset, bool reset_delay, str surrogate, float alpha"


class Leaky(NamedTuple):
    """What the operators are told of the neuron; beta and v_threshold are overridden by tensors where those are given."""

    beta: float
    v_threshold: float
    reset: str
    reset_delay: bool
    surrogate: str
    alpha: float


def _check_beta(beta):
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")


def _check_values(beta, v_threshold, dtype):
    """The range of tensors is looked at on the CPU only: on a GPU that would wait for them."""
    for p, check in ((beta, _check_beta), (v_threshold, lambda extreme: check_threshold(extreme, dtype))):
        if p is not None and p.numel():
            check(p.min().item())
            check(p.max().item())


def _leaky(x, v, beta, v_threshold, *rest):
    *neuron, return_v, return_v_seq, keep, backend = rest
    outputs = allocate_outputs(x, beta, v_threshold, return_v, return_v_seq, None, keep)
    wanted = [t if t.numel() else None for t in outputs]
    if x.device.type == "cpu":
        _check_values(beta, v_threshold, state_dtype(x.dtype))
    if x.numel():
        kernels(backend, "leaky").leaky_forward(x, v, beta, v_threshold, Leaky(*neuron), *wanted, tuning.current())
    elif return_v:
        outputs[1].copy_(v) if v is not None else outputs[1].zero_()
    return outputs


def _leaky_fake(x, v, beta, v_threshold, *rest):
    *_, return_v, return_v_seq, keep, _ = rest
    return allocate_outputs(x, beta, v_threshold, return_v, return_v_seq, None, keep)


def _leaky_backward(g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, *rest):
    *neuron, parameters, backend = rest
    dx, dv, *d_parameters = allocate_gradients(x, v, beta, v_threshold, parameters)
    if x.numel() == 0:
        if v is not None:
            dv.zero_() if g_v is None else dv.copy_(g_v)
        return dx, dv, *(d.zero_() for d in d_parameters)
    if x.shape[0] > STRIDE and checkpoint.numel() == 0:  # the forward pass could not know that a gradient would be asked for
        checkpoint = _leaky(x, v, beta, v_threshold, *neuron, False, False, True, backend)[3]
    sums = kernels(backend, "leaky").leaky_backward(
        g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, Leaky(*neuron), dx, None if v is None else dv, parameters,
        tuning.current(),
    )  # fmt: skip
    for i, p in enumerate((beta, v_threshold)):
        if sums is not None and p is not None:
            total = sums[i].sum(0) if p.numel() > 1 else sums[i].sum()
            d_parameters[i] = total.reshape(p.shape).to(p.dtype)
    return dx, dv, *d_parameters


def _leaky_backward_fake(g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, *rest):
    return tuple(allocate_gradients(x, v, beta, v_threshold, rest[-2]))


def _leaky_save(ctx, inputs, output):
    x, v, beta, v_threshold, *ctx.rest = inputs
    ctx.save_for_backward(x, v, beta, v_threshold, output[3])
    ctx.set_materialize_grads(False)


def _leaky_gradient(ctx, g, g_v, g_seq, _):
    x, v, beta, v_threshold, checkpoint = ctx.saved_tensors
    *neuron, return_v, return_v_seq, _, backend = ctx.rest
    g_v, g_seq = g_v if return_v else None, g_seq if return_v_seq else None  # compiled graphs pass zeros for empty outputs
    needs = ctx.needs_input_grad
    return _leaky_backward_call(g, g_v, g_seq, x, v, beta, v_threshold, checkpoint, *neuron, needs[2] or needs[3], backend)


_leaky_call = register(
    f"leaky(Tensor x, Tensor? v, Tensor? beta, Tensor? v_threshold, {_NEURON}, bool return_v, bool return_v_seq, bool keep, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _leaky,
    _leaky_fake,
    batch_axes=(1, 0, None, None),
    output_axes=(1, 0, 1, 1),
    save=_leaky_save,
    gradient=_leaky_gradient,
)
_leaky_backward_call = register(
    "leaky_backward(Tensor? g, Tensor? g_v, Tensor? g_seq, Tensor x, Tensor? v, Tensor? beta, Tensor? v_threshold, "
    f"Tensor checkpoint, {_NEURON}, bool parameters, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _leaky_backward,
    _leaky_backward_fake,
    batch_axes=(1, 0, 1, 1, 0, None, None, 1),
    output_axes=(1, 0, None, None),
)


def leaky(
    x: Tensor,
    v: Tensor | None = None,
    *,
    beta,
    v_threshold=1.0,
    reset: str = "subtract",
    reset_delay: bool = True,
    surrogate="atan",
    alpha: float | None = None,
    return_v: bool = False,
    return_v_seq: bool = False,
):
    r"""snnTorch's Leaky neuron over T steps, fused forward and backward: the membrane before a step decides on its reset.

    For t = 0 .. T-1, with v[-1] = ``v``::

        r[t] = 1 where v[t-1] > v_threshold, else 0              without gradient
        h[t] = beta * v[t-1] + x[t] - r[t] * v_threshold         reset "subtract"
        h[t] = beta * (1 - r[t]) * v[t-1] + x[t]                 reset "zero"
        h[t] = beta * v[t-1] + x[t]                              reset "none"
        s[t] = 1 where h[t] > v_threshold, else 0
        v[t] = h[t]                                              reset_delay, or reset "none"
        v[t] = h[t] - (s[t] - r[t]) * v_threshold                otherwise, "subtract"
        v[t] = h[t] - (s[t] - r[t]) * h[t]                       otherwise, "zero"

    The backward pass is back-propagation through time with ds/dh = surrogate(h - v_threshold). It recomputes h: kept for it are
    x and, if given, v; for T > 16 also the membrane of every 16th step. :func:`lif` differs in more than names: it resets
    before the membrane is kept, decays what the reset left, and fires at the threshold too.

    Args:
        x: input current, (T, ...), float32, float64, bfloat16 or float16, any strides. Arithmetic is float32, for float64
            float64.
        v: membrane before the first step, x.shape[1:], of x's dtype or float32 (float64). None: 0.
        beta: decay of a step, 0 to 1; a number, or a tensor: scalar, or (C,) for the C channels of x's last axis.
        v_threshold: firing threshold; a number or a tensor, as beta.
        reset: "subtract", "zero" or "none".
        reset_delay: whether a spike resets the membrane in the step after it, or at once, then with a gradient.
        surrogate: a name of ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns ds/dz (not fused).
        alpha: sharpness of the surrogate; None: the surrogate's default.
        return_v: also return the membrane after the last step, x.shape[1:], float32 (float64).
        return_v_seq: also return the membrane after every step, x.shape, float32 (float64).

    Returns:
        s, of x's shape and dtype; or the tuple (s, v), (s, v_seq) or (s, v, v_seq). Gradients reach x, v, beta and v_threshold
        from each.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range. The values of a tensor beta are
            looked at on the CPU only. RuntimeError: the chosen backend cannot serve the tensors, or a second derivative.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023); snnTorch's Leaky, which this equals.

    Example:
        >>> import torch
        >>> from sdit_kernels import leaky
        >>> x = torch.tensor([[0.75], [0.75], [0.25], [1.0]])
        >>> s, v = leaky(x, beta=0.5, return_v_seq=True)
        >>> s.flatten().tolist(), v.flatten().tolist()
        ([0.0, 1.0, 0.0, 0.0], [0.75, 1.125, -0.1875, 0.90625])
    """
    check_data("x", x)
    if x.dim() == 0:
        raise ValueError("x must have a time axis, (T, ...), got a tensor without axes")
    shape = x.shape[1:]
    if v is not None:
        check_membrane("v", v, shape, x)
    channels = shape[-1] if shape else None
    beta_value, beta_tensor = check_neuron_parameter("beta", beta, x, channels)
    threshold_value, threshold_tensor = check_neuron_parameter("v_threshold", v_threshold, x, channels)
    _check_beta(beta_value)
    dtype = state_dtype(x.dtype)
    check_threshold(threshold_value, dtype)
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(map(repr, RESETS))}, got {reset!r}")
    for name, flag in (("reset_delay", reset_delay), ("return_v", return_v), ("return_v_seq", return_v_seq)):
        check_flag(name, flag)
    alpha = check_surrogate(surrogate, alpha, dtype)
    if alpha is None:
        warn_of_custom_surrogate()
    backend = dispatch.choose(x.device.type, fused=alpha is not None)
    if backend == "reference":
        if values_are_readable(x):
            _check_values(beta_tensor, threshold_tensor, dtype)
        return reference.leaky(
            x, v, beta=beta, v_threshold=v_threshold, reset=reset, reset_delay=reset_delay, surrogate=surrogate, alpha=alpha,
            return_v=return_v, return_v_seq=return_v_seq,
        )  # fmt: skip
    assert alpha is not None  # a surrogate function went to the reference
    neuron = Leaky(beta_value, threshold_value, reset, reset_delay, surrogate, alpha)
    T = x.shape[0]  # to compare a symbol would settle it; the backward pass then makes its checkpoint itself
    keep = isinstance(T, int) and T > STRIDE and wants_gradient(x, v, beta_tensor, threshold_tensor)
    s, v_final, v_seq, _ = _leaky_call(x, v, beta_tensor, threshold_tensor, *neuron, return_v, return_v_seq, keep, backend)
    if return_v:
        return (s, v_final, v_seq) if return_v_seq else (s, v_final)
    return (s, v_seq) if return_v_seq else s
