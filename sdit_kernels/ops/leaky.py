"""leaky: the public function and the operator ``sdit_kernels::leaky`` behind it."""

from typing import TYPE_CHECKING, TypedDict, overload

import torch
from torch import Tensor

from .. import dispatch, reference
from ..checks import (
    check_flag,
    check_neuron_parameter,
    check_surrogate,
    check_threshold,
    warn_of_custom_surrogate,
)
from ..dtypes import state_dtype
from ..neuron import LEAKY, Variant
from .lif import No, Yes
from .neuron import check_spike_dtype, check_steps, define, run
from .operator import values_are_readable

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Required, Unpack

RESETS = ("subtract", "zero", "none")
_SCHEMA = "float beta_value, float v_threshold_value, str reset, bool reset_delay, str surrogate, float alpha"


def _leaky_variant(beta, v_threshold, reset, reset_delay, surrogate, alpha):
    return Variant(LEAKY, (reset, reset_delay or reset == "none"), (beta, v_threshold), surrogate, alpha)


def _check_beta(beta):
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")


def _check_values(parameters, values, dtype):
    """Check the values of tensors beta and v_threshold."""
    for p, check in zip(parameters, (_check_beta, lambda extreme: check_threshold(extreme, dtype))):
        if p is not None and p.numel():
            check(p.min().item())
            check(p.max().item())


_leaky_call = define(LEAKY, ("beta", "v_threshold"), _SCHEMA, _leaky_variant, _check_values)


class _Settings(TypedDict, total=False):
    """The keyword arguments of leaky, for type checkers."""

    beta: "Required[float | Tensor]"
    v_threshold: "float | Tensor"
    reset: str
    reset_delay: bool
    surrogate: "str | Callable[[Tensor], Tensor]"
    alpha: float | None
    spike_dtype: torch.dtype | None


@overload
def leaky(
    x: Tensor, v: Tensor | None = ..., *, return_v: No = ..., return_v_seq: No = ..., **settings: "Unpack[_Settings]"
) -> Tensor: ...
@overload
def leaky(
    x: Tensor, v: Tensor | None = ..., *, return_v: Yes, return_v_seq: Yes, **settings: "Unpack[_Settings]"
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def leaky(
    x: Tensor, v: Tensor | None = ..., *, return_v: Yes, return_v_seq: No = ..., **settings: "Unpack[_Settings]"
) -> tuple[Tensor, Tensor]: ...
@overload
def leaky(
    x: Tensor, v: Tensor | None = ..., *, return_v: No = ..., return_v_seq: Yes, **settings: "Unpack[_Settings]"
) -> tuple[Tensor, Tensor]: ...
@overload
def leaky(
    x: Tensor, v: Tensor | None = ..., *, return_v: bool = ..., return_v_seq: bool = ..., **settings: "Unpack[_Settings]"
) -> Tensor | tuple[Tensor, ...]: ...


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
    spike_dtype: torch.dtype | None = None,
):
    r"""snnTorch's Leaky neuron over T time steps, fused, forward and backward.

    For t = 0 .. T-1, with v[-1] = ``v``::

        r[t] = 1 where v[t-1] > v_threshold, else 0              without gradient
        h[t] = beta * v[t-1] + x[t] - r[t] * v_threshold         reset "subtract"
        h[t] = beta * (1 - r[t]) * v[t-1] + x[t]                 reset "zero"
        h[t] = beta * v[t-1] + x[t]                              reset "none"
        s[t] = 1 where h[t] > v_threshold, else 0
        v[t] = h[t]                                              reset_delay, or reset "none"
        v[t] = h[t] - (s[t] - r[t]) * v_threshold                no reset_delay, reset "subtract"
        v[t] = h[t] - (s[t] - r[t]) * h[t]                       no reset_delay, reset "zero"

    The backward pass is back-propagation through time with the surrogate gradient, ds/dh = surrogate(h - v_threshold). It
    recomputes h. For it, the forward pass keeps x, v if given, and for T > 16 the membrane potential of every 16th step.

    Three things differ from :func:`lif`: ``lif`` resets the membrane before it returns it, the leak acts on the membrane after
    the reset, and the neuron also fires at h equal to the threshold.

    Args:
        x: input current, (T, ...), float32, float64, bfloat16 or float16, any strides. The arithmetic is float32, or float64
            for float64 data.
        v: membrane potential before the first step, x.shape[1:], in the dtype of x or float32 (float64). None: 0.
        beta (float | Tensor): decay per step, 0 to 1. A number, a scalar tensor, or a tensor (C,) with one value per channel of
            x's last axis.
        v_threshold (float | Tensor): firing threshold. A number or a tensor, like beta.
        reset: "subtract", "zero" or "none".
        reset_delay: True: a spike resets the membrane in the next step. False: at once, and the reset has a gradient.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        return_v: also return the membrane potential after the last step, x.shape[1:], float32 (float64).
        return_v_seq: also return the membrane potential after every step, x.shape, float32 (float64).
        spike_dtype: dtype of the spikes. None: the dtype of x. torch.uint8 and torch.bool are for inference.

    Returns:
        s, with the shape of x; or a tuple (s, v), (s, v_seq) or (s, v, v_seq). Gradients reach x, v, beta and
        v_threshold from each output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. The op checks the values of a
            tensor beta on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023). The results equal snnTorch's Leaky.

    Example:
        >>> import torch
        >>> from sdit_kernels import leaky
        >>> x = torch.tensor([[0.75], [0.75], [0.25], [1.0]])
        >>> s, v = leaky(x, beta=0.5, return_v_seq=True)
        >>> s.flatten().tolist(), v.flatten().tolist()
        ([0.0, 1.0, 0.0, 0.0], [0.75, 1.125, -0.1875, 0.90625])
    """
    channels = check_steps(x, v, return_v, return_v_seq)
    beta_value, beta_tensor = check_neuron_parameter("beta", beta, x, channels)
    threshold_value, threshold_tensor = check_neuron_parameter("v_threshold", v_threshold, x, channels)
    _check_beta(beta_value)
    dtype = state_dtype(x.dtype)
    check_threshold(threshold_value, dtype)
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(map(repr, RESETS))}, got {reset!r}")
    check_flag("reset_delay", reset_delay)
    check_spike_dtype(spike_dtype, x, v, beta_tensor, threshold_tensor)
    alpha = check_surrogate(surrogate, alpha, dtype)
    if alpha is None:
        warn_of_custom_surrogate()
    backend = dispatch.choose(x.device.type, fused=alpha is not None)
    if backend == "reference":
        if values_are_readable(x):
            _check_values((beta_tensor, threshold_tensor), (), dtype)
        return reference.leaky(
            x, v, beta=beta, v_threshold=v_threshold, reset=reset, reset_delay=reset_delay, surrogate=surrogate, alpha=alpha,
            return_v=return_v, return_v_seq=return_v_seq, spike_dtype=spike_dtype,
        )  # fmt: skip
    assert alpha is not None  # the reference has served a custom surrogate function
    values = beta_value, threshold_value, reset, reset_delay, surrogate, alpha
    parameters = beta_tensor, threshold_tensor
    return run(_leaky_call, x, v, parameters, values, return_v, return_v_seq, spike_dtype, backend)
