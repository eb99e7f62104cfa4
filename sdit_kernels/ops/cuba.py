"""cuba and adlif: neurons with two states."""

from typing import TYPE_CHECKING, TypedDict, overload

import torch
from torch import Tensor

from ..checks import check_decay, check_flag, check_number
from ..neuron import ADLIF, CUBA
from .leaky import check_reset
from .lif import No, Yes
from .neuron import NeuronOp

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Required, Unpack

_cuba = NeuronOp(CUBA, (check_decay, check_decay, check_number))
_adlif = NeuronOp(ADLIF, (check_decay, check_decay, check_number, check_number, check_number))
Pair = tuple[Tensor, Tensor]
State = tuple[Tensor | None, Tensor | None]


class _CubaSettings(TypedDict, total=False):
    """The keyword arguments of cuba, for type checkers."""

    beta_i: "Required[float | Tensor]"
    beta: "Required[float | Tensor]"
    v_threshold: "float | Tensor"
    reset: str
    reset_delay: bool
    surrogate: "str | Callable[[Tensor], Tensor]"
    alpha: float | None
    spike_dtype: torch.dtype | None


@overload
def cuba(
    x: Tensor, state: State | None = ..., *, return_state: No = ..., return_state_seq: No = ..., **kw: "Unpack[_CubaSettings]"
) -> Tensor: ...
@overload
def cuba(
    x: Tensor, state: State | None = ..., *, return_state: Yes, return_state_seq: Yes, **kw: "Unpack[_CubaSettings]"
) -> tuple[Tensor, Pair, Pair]: ...
@overload
def cuba(
    x: Tensor, state: State | None = ..., *, return_state: Yes, return_state_seq: No = ..., **kw: "Unpack[_CubaSettings]"
) -> tuple[Tensor, Pair]: ...
@overload
def cuba(
    x: Tensor, state: State | None = ..., *, return_state: No = ..., return_state_seq: Yes, **kw: "Unpack[_CubaSettings]"
) -> tuple[Tensor, Pair]: ...
@overload
def cuba(
    x: Tensor,
    state: State | None = ...,
    *,
    return_state: bool = ...,
    return_state_seq: bool = ...,
    **kw: "Unpack[_CubaSettings]",
) -> "Tensor | tuple[Tensor, Pair] | tuple[Tensor, Pair, Pair]": ...


def cuba(
    x: Tensor,
    state: State | None = None,
    *,
    beta_i,
    beta,
    v_threshold=1.0,
    reset: str = "subtract",
    reset_delay: bool = True,
    surrogate="atan",
    alpha: float | None = None,
    return_state: bool = False,
    return_state_seq: bool = False,
    spike_dtype: torch.dtype | None = None,
):
    r"""Current-based leaky integrate-and-fire neuron (CuBa) over T time steps, fused: snnTorch's Synaptic.

    The input drives a synaptic current i, which decays and drives the membrane potential v. For t = 0 .. T-1, with
    (i[-1], v[-1]) = ``state``::

        r[t] = 1 where v[t-1] > v_threshold, else 0              without gradient
        i[t] = beta_i * i[t-1] + x[t]
        h[t] = beta * v[t-1] + i[t] - r[t] * v_threshold         reset "subtract"
        h[t] = (1 - r[t]) * (beta * v[t-1] + i[t])               reset "zero"
        h[t] = beta * v[t-1] + i[t]                              reset "none"
        s[t] = 1 where h[t] > v_threshold, else 0
        v[t] = h[t]                                              reset_delay, or reset "none"
        v[t] = h[t] - (s[t] - r[t]) * v_threshold                no reset_delay, reset "subtract"
        v[t] = 0 where s[t], else h[t]                           no reset_delay, reset "zero"

    The backward pass is back-propagation through time with the surrogate gradient, ds/dh = surrogate(h - v_threshold). It
    recomputes both states. For it, the forward pass keeps x, the given states, and for T > 16 both states of every 16th step.

    Args:
        x: input, (T, ...), float32, float64, bfloat16 or float16, any strides. The arithmetic is float32, or float64 for
            float64 data.
        state: (i, v), the synaptic current and the membrane potential before the first step, x.shape[1:] each, in the dtype of
            x or float32 (float64). None, for one or for both: 0.
        beta_i (float | Tensor): decay of the current per step, 0 to 1 (snnTorch calls it alpha). A number, a scalar tensor, or
            a tensor (C,) with one value per channel of x's last axis.
        beta (float | Tensor): decay of the membrane potential per step, 0 to 1, like beta_i.
        v_threshold (float | Tensor): firing threshold, like beta_i.
        reset: "subtract", "zero" or "none". No reset changes the current.
        reset_delay: True: a spike resets the membrane in the next step. False: at once, and the reset has a gradient.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        return_state: also return (i, v) after the last step, x.shape[1:] each, float32 (float64).
        return_state_seq: also return (i, v) after every step, x.shape each, float32 (float64).
        spike_dtype: dtype of the spikes. None: the dtype of x. torch.uint8 and torch.bool are for inference.

    Returns:
        s, with the shape of x; or a tuple (s, state), (s, state_seq) or (s, state, state_seq). Gradients reach x, both states,
        beta_i, beta and v_threshold from each output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. The op checks the values of
            tensors beta_i and beta on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Eshraghian et al., Training Spiking Neural Networks Using Lessons From Deep Learning, Proceedings of the IEEE
    (2023). The results equal snnTorch's Synaptic.

    Example:
        >>> import torch
        >>> from sdit_kernels import cuba
        >>> s, (i, v) = cuba(torch.tensor([[1.0], [0.5], [0.0]]), beta_i=0.5, beta=0.5, return_state_seq=True)
        >>> s.flatten().tolist(), i.flatten().tolist(), v.flatten().tolist()
        ([0.0, 1.0, 0.0], [1.0, 1.0, 0.5], [1.0, 1.5, 0.25])
    """
    check_reset(reset)
    check_flag("reset_delay", reset_delay)
    flags = reset, reset_delay or reset == "none"
    return _cuba.states(
        x, state, (beta_i, beta, v_threshold), flags, surrogate, alpha, return_state, return_state_seq, spike_dtype
    )


class _AdlifSettings(TypedDict, total=False):
    """The keyword arguments of adlif, for type checkers."""

    beta: "Required[float | Tensor]"
    beta_w: "Required[float | Tensor]"
    a: "Required[float | Tensor]"
    b: "Required[float | Tensor]"
    v_threshold: "float | Tensor"
    surrogate: "str | Callable[[Tensor], Tensor]"
    alpha: float | None
    spike_dtype: torch.dtype | None


@overload
def adlif(
    x: Tensor, state: State | None = ..., *, return_state: No = ..., return_state_seq: No = ..., **kw: "Unpack[_AdlifSettings]"
) -> Tensor: ...
@overload
def adlif(
    x: Tensor, state: State | None = ..., *, return_state: Yes, return_state_seq: Yes, **kw: "Unpack[_AdlifSettings]"
) -> tuple[Tensor, Pair, Pair]: ...
@overload
def adlif(
    x: Tensor, state: State | None = ..., *, return_state: Yes, return_state_seq: No = ..., **kw: "Unpack[_AdlifSettings]"
) -> tuple[Tensor, Pair]: ...
@overload
def adlif(
    x: Tensor, state: State | None = ..., *, return_state: No = ..., return_state_seq: Yes, **kw: "Unpack[_AdlifSettings]"
) -> tuple[Tensor, Pair]: ...
@overload
def adlif(
    x: Tensor,
    state: State | None = ...,
    *,
    return_state: bool = ...,
    return_state_seq: bool = ...,
    **kw: "Unpack[_AdlifSettings]",
) -> "Tensor | tuple[Tensor, Pair] | tuple[Tensor, Pair, Pair]": ...


def adlif(
    x: Tensor,
    state: State | None = None,
    *,
    beta,
    beta_w,
    a,
    b,
    v_threshold=1.0,
    surrogate="atan",
    alpha: float | None = None,
    return_state: bool = False,
    return_state_seq: bool = False,
    spike_dtype: torch.dtype | None = None,
):
    r"""Adaptive leaky integrate-and-fire neuron (adLIF) over T time steps, fused, forward and backward.

    A second state w, the adaptation current, follows the membrane potential v and the spikes, and acts against the input. For
    t = 0 .. T-1, with (v[-1], w[-1]) = ``state``::

        h[t] = beta * v[t-1] + (1 - beta) * (x[t] - w[t-1])
        s[t] = 1 where h[t] >= v_threshold, else 0
        v[t] = 0 where s[t], else h[t]
        w[t] = beta_w * w[t-1] + (1 - beta_w) * (a * v[t] + b * s[t])

    The new membrane potential enters w (symplectic Euler). This is stable for more values of a than the membrane potential of
    the step before (Euler forward). The reset has a gradient.

    The backward pass is back-propagation through time with the surrogate gradient, ds/dh = surrogate(h - v_threshold). It
    recomputes both states. For it, the forward pass keeps x, the given states, and for T > 16 both states of every 16th step.

    Args:
        x: input current, (T, ...), float32, float64, bfloat16 or float16, any strides. The arithmetic is float32, or float64
            for float64 data.
        state: (v, w), the membrane potential and the adaptation current before the first step, x.shape[1:] each, in the dtype
            of x or float32 (float64). None, for one or for both: 0.
        beta (float | Tensor): decay of the membrane potential per step, 0 to 1. A number, a scalar tensor, or a tensor (C,)
            with one value per channel of x's last axis.
        beta_w (float | Tensor): decay of the adaptation current per step, 0 to 1, like beta.
        a (float | Tensor): how much the membrane potential drives the adaptation, like beta.
        b (float | Tensor): how much a spike drives the adaptation, like beta.
        v_threshold (float | Tensor): firing threshold, like beta.
        surrogate (str | Callable): a name in ``sdit_kernels.SURROGATES``, or a function of z = h - v_threshold that returns
            ds/dz (not fused).
        alpha: sharpness of the surrogate. None: the default of the surrogate.
        return_state: also return (v, w) after the last step, x.shape[1:] each, float32 (float64).
        return_state_seq: also return (v, w) after every step, x.shape each, float32 (float64).
        spike_dtype: dtype of the spikes. None: the dtype of x. torch.uint8 and torch.bool are for inference.

    Returns:
        s, with the shape of x; or a tuple (s, state), (s, state_seq) or (s, state, state_seq). Gradients reach x, both states,
        beta, beta_w, a, b and v_threshold from each output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range. The op checks the values of tensor
            parameters on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Baronig et al., Advancing spatio-temporal processing through adaptation in spiking neural networks, Nature
    Communications 16 (2025), arXiv 2408.07517: SE-adLIF with a resting potential of 0.

    Example:
        >>> import torch
        >>> from sdit_kernels import adlif
        >>> s, (v, w) = adlif(torch.tensor([[2.0], [1.0], [1.0]]), beta=0.5, beta_w=0.5, a=1.0, b=2.0, return_state_seq=True)
        >>> s.flatten().tolist(), v.flatten().tolist(), w.flatten().tolist()
        ([1.0, 0.0, 0.0], [0.0, 0.0, 0.25], [1.0, 0.5, 0.375])
    """
    values = beta, beta_w, a, b, v_threshold
    return _adlif.states(x, state, values, (), surrogate, alpha, return_state, return_state_seq, spike_dtype)
