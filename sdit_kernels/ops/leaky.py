"""leaky and lapicque: snnTorch's neurons with one state."""

from typing import TYPE_CHECKING, TypedDict, overload

import torch
from torch import Tensor

from ..checks import check_decay, check_flag, check_number, check_positive
from ..neuron import LAPICQUE, LEAKY
from .lif import No, Yes
from .neuron import NeuronOp

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Required, Unpack

RESETS = ("subtract", "zero", "none")
_leaky = NeuronOp(LEAKY, (check_decay, check_number))
_lapicque = NeuronOp(LAPICQUE, (check_positive, check_positive, check_positive, check_number))


def check_reset(reset):
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(map(repr, RESETS))}, got {reset!r}")


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
    check_reset(reset)
    check_flag("reset_delay", reset_delay)
    flags = reset, reset_delay or reset == "none"
    return _leaky.one_state(x, v, (beta, v_threshold), flags, surrogate, alpha, return_v, return_v_seq, spike_dtype)


class _LapicqueSettings(TypedDict, total=False):
    """The keyword arguments of lapicque, for type checkers."""

    R: "float | Tensor"
    C: "Required[float | Tensor]"
    time_step: "float | Tensor"
    v_threshold: "float | Tensor"
    reset: str
    surrogate: "str | Callable[[Tensor], Tensor]"
    alpha: float | None
    spike_dtype: torch.dtype | None


@overload
def lapicque(
    x: Tensor, v: Tensor | None = ..., *, return_v: No = ..., return_v_seq: No = ..., **settings: "Unpack[_LapicqueSettings]"
) -> Tensor: ...
@overload
def lapicque(
    x: Tensor, v: Tensor | None = ..., *, return_v: Yes, return_v_seq: Yes, **settings: "Unpack[_LapicqueSettings]"
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def lapicque(
    x: Tensor, v: Tensor | None = ..., *, return_v: Yes, return_v_seq: No = ..., **settings: "Unpack[_LapicqueSettings]"
) -> tuple[Tensor, Tensor]: ...
@overload
def lapicque(
    x: Tensor, v: Tensor | None = ..., *, return_v: No = ..., return_v_seq: Yes, **settings: "Unpack[_LapicqueSettings]"
) -> tuple[Tensor, Tensor]: ...
@overload
def lapicque(
    x: Tensor,
    v: Tensor | None = ...,
    *,
    return_v: bool = ...,
    return_v_seq: bool = ...,
    **settings: "Unpack[_LapicqueSettings]",
) -> Tensor | tuple[Tensor, ...]: ...


def lapicque(
    x: Tensor,
    v: Tensor | None = None,
    *,
    R=1.0,
    C,
    time_step=1.0,
    v_threshold=1.0,
    reset: str = "subtract",
    surrogate="atan",
    alpha: float | None = None,
    return_v: bool = False,
    return_v_seq: bool = False,
    spike_dtype: torch.dtype | None = None,
):
    r"""snnTorch's Lapicque neuron over T time steps, fused: a circuit of a resistor R and a capacitor C.

    For t = 0 .. T-1, with v[-1] = ``v``::

        r[t] = 1 where v[t-1] > v_threshold, else 0              without gradient
        u[t] = x[t] * R * (1 / (R * C)) * time_step + (1 - time_step / (R * C)) * v[t-1]
        v[t] = u[t] - r[t] * v_threshold                         reset "subtract"
        v[t] = 0 where r[t], else u[t]                           reset "zero": the input of this step is lost too
        v[t] = u[t]                                              reset "none"
        s[t] = 1 where v[t] > v_threshold, else 0

    The backward pass is back-propagation through time with the surrogate gradient, ds/dv = surrogate(v - v_threshold). It
    recomputes v. For it, the forward pass keeps x, ``v`` if given, and for T > 16 the membrane potential of every 16th step.

    Args:
        x: input current, (T, ...), float32, float64, bfloat16 or float16, any strides. The arithmetic is float32, or float64
            for float64 data.
        v: membrane potential before the first step, x.shape[1:], in the dtype of x or float32 (float64). None: 0.
        R (float | Tensor): resistance, positive. A number, a scalar tensor, or a tensor (C,) with one value per channel of x's
            last axis.
        C (float | Tensor): capacitance, positive, like R. The time constant of the membrane is R * C.
        time_step (float | Tensor): duration of a step, positive, in the unit of R * C, like R.
        v_threshold (float | Tensor): firing threshold, like R.
        reset: "subtract", "zero" or "none".
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = v - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        return_v: also return the membrane potential after the last step, x.shape[1:], float32 (float64).
        return_v_seq: also return the membrane potential after every step, x.shape, float32 (float64).
        spike_dtype: dtype of the spikes. None: the dtype of x. torch.uint8 and torch.bool are for inference.

    Returns:
        s, with the shape of x; or a tuple (s, v), (s, v_seq) or (s, v, v_seq). Gradients reach x, v, R, C, time_step and
        v_threshold from each output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. The op checks the values of
            tensors R, C and time_step on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023). The results equal snnTorch's Lapicque.

    Example:
        >>> import torch
        >>> from sdit_kernels import lapicque
        >>> s, v = lapicque(torch.tensor([[1.0], [3.0], [1.0]]), R=1.0, C=2.0, return_v_seq=True)
        >>> s.flatten().tolist(), v.flatten().tolist()
        ([0.0, 1.0, 0.0], [0.5, 1.75, 0.375])
    """
    check_reset(reset)
    return _lapicque.one_state(
        x, v, (R, C, time_step, v_threshold), (reset,), surrogate, alpha, return_v, return_v_seq, spike_dtype
    )
