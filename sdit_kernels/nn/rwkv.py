"""RWKV-4's two mixing layers as modules that call the ops of this package, with or without spiking neurons."""

import math

import torch
from torch import Tensor

from ..checks import check_data, check_flag
from ..dispatch import backend
from ..dtypes import autocast_dtype
from ..ops.mix import relu_squared, token_shift
from ..ops.operator import refuse_script
from ..ops.wkv import wkv
from .neurons import LIFRate


def _linear(inputs, outputs):
    return torch.nn.Linear(inputs, outputs, bias=False)


def _vector(channels):
    return torch.nn.Parameter(torch.empty(1, 1, channels))


def _last(x, last):
    """Return the state for the next slice: the last token, cloned so that it does not keep x alive."""
    return x[..., -1, :].clone() if x.shape[-2] else last


class _Mix(torch.nn.Module):
    """Base class of TimeMix and ChannelMix: position in the network (sets initial values), norm, neuron and residual."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, channels, layer, layers, norm_eps, neuron):
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("layer", layer, 0), ("layers", layers, 1)):
            _check_int(name, value, least)
        if layer >= layers:
            raise ValueError(f"layer must be below layers, {layers}, got {layer}")
        if neuron is not None and not isinstance(neuron, LIFRate):
            raise TypeError(f"neuron must be a LIFRate or None (no spikes), got {type(neuron).__name__}")
        with backend("reference"):  # run the op's check of norm_eps
            x = torch.empty(1, 1, device="cpu", dtype=torch.float32)
            token_shift(x, x[0], norm_eps=norm_eps)
        self.channels, self.layer, self.layers, self.norm_eps = channels, layer, layers, norm_eps
        self.neuron = neuron

    def _shift(self, x, *mixes, last=None):
        """Return the mixed tokens; under autocast in its dtype, so that the matrix multiplications do not cast them."""
        return token_shift(x, *mixes, norm_eps=self.norm_eps, last=last, dtype=autocast_dtype(x))

    def _curve(self, exponent):
        """Return (c / C)^exponent for each channel c."""
        return (torch.arange(self.channels, dtype=torch.float64, device="cpu") / self.channels) ** exponent

    def _check_call(self, x, residual):
        check_data("x", x)
        if x.dim() < 2 or x.shape[-1] != self.channels:
            raise ValueError(f"x must have shape (..., L, {self.channels}), got {tuple(x.shape)}")
        if residual is not None:
            check_data("residual", residual, like=x)

    def _output(self, x, residual, gate=None):
        if self.neuron is not None:
            return self.neuron(x, residual, gate)
        x = x if gate is None else torch.sigmoid(gate) * x
        return x if residual is None else residual + x

    def extra_repr(self) -> str:
        return f"{self.channels}, layer={self.layer}, layers={self.layers}, norm_eps={self.norm_eps}"


def _check_int(name, value, least):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


class TimeMix(_Mix):
    r"""RWKV-4's time mixing (its attention): token shift, three projections, gated WKV scan, projection, optional neuron.

    ::

        xk, xv, xr = token_shift(x, time_mix_k, time_mix_v, time_mix_r)        of LayerNorm(x) with norm_eps
        y   = output(sigmoid(receptance(xr)) * wkv(time_decay, time_first, key(xk), value(xv)))
        out = residual + y, or residual + neuron(y)

    The parameters have the same names and shapes as in RWKV-4, and its initial values for this layer index and number of
    layers. The projections have no bias; they start with the initial values of torch.nn.Linear.

    Args:
        channels: number of channels C.
        layer: index of this layer, from 0.
        layers: number of layers in the network.
        norm_eps: the eps of a LayerNorm without affine parameters before the token shift. None: no norm.
        neuron: the :class:`LIFRate` that turns y into its firing rate. None: no neuron.
        bidirectional: every token also sees the tokens after it. The token shift stays causal.

    Shape:
        x: (B, L, C). residual: as in :class:`LIFRate`. Output: the shape of x; the dtype of residual, or of x without a
        residual.

    State:
        ``forward(x, state, return_state=True)`` returns (out, state), where state is (last token of x, (ybar, lse) of
        :func:`sdit_kernels.wkv`). If you pass the state from slice to slice, the result equals one call on the whole sequence.
        None is the state at the start.

    Raises:
        TypeError, ValueError: at construction if an argument has the wrong type or range; in a call as in
            :func:`sdit_kernels.token_shift` and :func:`sdit_kernels.wkv`, and for a state with bidirectional=True.

    Source: Peng et al., RWKV, arXiv 2305.13048; with the neuron: Yang et al., SDiT, arXiv 2402.11588.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import LIFRate, TimeMix
        >>> attention = TimeMix(8, layer=1, layers=4, norm_eps=1e-6, neuron=LIFRate(T=4))
        >>> x = torch.randn(2, 5, 8)
        >>> whole = attention(x, residual=x)
        >>> first, state = attention(x[:, :3], residual=x[:, :3], return_state=True)
        >>> second = attention(x[:, 3:], state, residual=x[:, 3:])
        >>> torch.cat([first, second], 1).shape == whole.shape
        True
    """

    def __init__(
        self,
        channels: int,
        layer: int = 0,
        layers: int = 1,
        *,
        norm_eps: float | None = None,
        neuron: LIFRate | None = None,
        bidirectional: bool = False,
    ):
        super().__init__(channels, layer, layers, norm_eps, neuron)
        check_flag("bidirectional", bidirectional)
        self.bidirectional = bidirectional
        self.time_decay = torch.nn.Parameter(torch.empty(channels))
        self.time_first = torch.nn.Parameter(torch.empty(channels))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (_vector(channels) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (_linear(channels, channels) for _ in range(4))
        self._reset_mixes()

    @torch.no_grad()
    def _reset_mixes(self):
        depth = self.layer / (self.layers - 1) if self.layers > 1 else 0.0  # 0 at the first layer, 1 at the last
        rest = 1 - self.layer / self.layers
        c = torch.arange(self.channels, dtype=torch.float64, device="cpu")
        self.time_decay.copy_(-5 + 8 * (c / max(self.channels - 1, 1)) ** (0.7 + 1.3 * depth))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((c + 1) % 3 - 1))
        self.time_mix_k.copy_(self._curve(rest))
        self.time_mix_v.copy_(self._curve(rest) + 0.3 * depth)
        self.time_mix_r.copy_(self._curve(0.5 * rest))

    def reset_parameters(self) -> None:
        for linear in (self.key, self.value, self.receptance, self.output):
            linear.reset_parameters()
        self._reset_mixes()

    def forward(self, x: Tensor, state=None, return_state: bool = False, residual: Tensor | None = None):
        self._check_call(x, residual)
        return_state = bool(return_state)  # the older ONNX exporter passes a tensor
        if self.bidirectional and (state is not None or return_state):
            raise ValueError("a bidirectional TimeMix sees the whole sequence: it takes and returns no state")
        if state is not None and (not isinstance(state, (tuple, list)) or len(state) != 2):
            raise TypeError("state must be None or the state of an earlier call, (last token, (ybar, lse))")
        last, scan = (None, None) if state is None else state
        y = self.scan(*self.project(x, last), scan, return_state)
        y, scan = y if return_state else (y, None)
        out = self.finish(y, residual)
        return (out, (_last(x, last), scan)) if return_state else out

    def project(self, x: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and receptances: the first of three parts of ``forward``, for use in other models."""
        xk, xv, xr = self._shift(x, self.time_mix_k, self.time_mix_v, self.time_mix_r, last=last)
        return self.key(xk), self.value(xv), self.receptance(xr)

    def scan(self, k: Tensor, v: Tensor, r: Tensor, state=None, return_state: bool = False):
        """Return the gated scan, y or (y, state): the second part of ``forward``."""
        return wkv(
            self.time_decay, self.time_first, k, v, r=r, state=state, return_state=return_state,
            bidirectional=self.bidirectional,
        )  # fmt: skip

    def finish(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply projection, neuron and residual: the third part of ``forward``."""
        return self._output(self.output(y), residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bidirectional={self.bidirectional}"


class ChannelMix(_Mix):
    r"""RWKV-4's channel mixing (its MLP): token shift, gated MLP with squared ReLU, optional neuron.

    ::

        xk, xr = token_shift(x, time_mix_k, time_mix_r)        of LayerNorm(x) with norm_eps
        y   = sigmoid(receptance(xr)) * value(max(key(xk), 0)^2)
        out = residual + y, or residual + neuron(y); the neuron's kernel applies the gate

    The parameters have the same names, shapes and initial values as in RWKV-4.

    Args:
        channels: number of channels C.
        layer: index of this layer, from 0.
        layers: number of layers in the network.
        hidden: width of the MLP. None: 4 * channels.
        norm_eps: the eps of a LayerNorm without affine parameters before the token shift. None: no norm.
        neuron: the :class:`LIFRate` that turns y into its firing rate. None: no neuron.

    Shape:
        x: (B, L, C). residual: as in :class:`LIFRate`. Output: the shape of x; the dtype of residual, or of x without a
        residual.

    State:
        ``forward(x, state, return_state=True)`` returns (out, state), where state is the last token of x.

    Raises:
        TypeError, ValueError: at construction if an argument has the wrong type or range; in a call as in
            :func:`sdit_kernels.token_shift`.

    Source: Peng et al., RWKV, arXiv 2305.13048; with the neuron: Yang et al., SDiT, arXiv 2402.11588.

    Example:
        >>> import torch
        >>> from sdit_kernels.nn import ChannelMix
        >>> mlp = ChannelMix(8, layer=1, layers=4)
        >>> mlp(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        channels: int,
        layer: int = 0,
        layers: int = 1,
        hidden: int | None = None,
        *,
        norm_eps: float | None = None,
        neuron: LIFRate | None = None,
    ):
        super().__init__(channels, layer, layers, norm_eps, neuron)
        hidden = 4 * channels if hidden is None else hidden
        _check_int("hidden", hidden, 1)
        self.time_mix_k, self.time_mix_r = _vector(channels), _vector(channels)
        self.key, self.receptance, self.value = (
            _linear(channels, hidden),
            _linear(channels, channels),
            _linear(hidden, channels),
        )
        self._reset_mixes()

    @torch.no_grad()
    def _reset_mixes(self):
        for mix in (self.time_mix_k, self.time_mix_r):
            mix.copy_(self._curve(1 - self.layer / self.layers))

    def reset_parameters(self) -> None:
        for linear in (self.key, self.receptance, self.value):
            linear.reset_parameters()
        self._reset_mixes()

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False, residual: Tensor | None = None):
        self._check_call(x, residual)
        if state is not None and not isinstance(state, Tensor):
            raise TypeError(f"state must be None or the state of an earlier call, the last token, got {type(state).__name__}")
        xk, xr = self._shift(x, self.time_mix_k, self.time_mix_r, last=state)
        out = self._output(self.value(relu_squared(self.key(xk))), residual, self.receptance(xr))
        return (out, _last(x, state)) if return_state else out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden={self.key.out_features}"
