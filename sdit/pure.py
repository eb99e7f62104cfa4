"""SDiT in spikes alone (``spiking="pure"``): the parts of a network in which every matrix multiplication sees spikes.

Letters: B batch, L tokens, C channels, N patches.

The tokens x are floats, to which every layer adds. Before each matrix multiplication, neurons turn them into spikes: integers
between -levels and levels. An integer n stands for n spikes, with a sign. The neurons have no state, so one pass computes all
spikes of a neuron at once. ``SDiT.slots = True`` runs them one after the other instead, in ``levels`` time slots.

Like the rest of the network, each part has two forms. The plain form, ``plain = True``, follows the equations in PyTorch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdit_kernels import lif, nvtx, token_shift, wkv
from sdit_kernels.dtypes import autocast_dtype
from sdit_kernels.nn import TimeMix

from .config import Config

__all__ = ["BitPlanes", "PureBlock", "SpikeLinear", "Spikes", "TimeTable", "slots_of"]

LIMIT = 4.0  # pixels of noisy images are limited to -4 .. 4; a pixel of noise is beyond with probability 6e-5
KNOT = 8  # times between two rows of the table of times


class Spikes(nn.Module):
    """Neurons with integer levels and one threshold per token::

        theta = factor * sqrt(mean over C of x^2 + 1e-6)
        s     = round(clip(x / theta, lo, hi))

    The factor is learnt; it starts at 0.5. The gradient of the rounding is 1 where x / theta is in lo .. hi, else 0.
    """

    recorder = None
    plain = False

    def __init__(self, lo: int, hi: int):
        super().__init__()
        self.lo, self.hi = lo, hi
        self.log_factor = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.log_factor.fill_(math.log(0.5))

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) or x.dtype  # so autocast does not cast the spikes
        if self.plain:
            z = self.normalise(x).clamp(self.lo, self.hi)
            s = (z + (z.round() - z).detach()).to(dtype)
        else:
            s = lif(
                x.unsqueeze(0), tau=1.0, v_threshold=self.log_factor.exp(), v_reset=None, levels=(self.lo, self.hi),
                threshold="rms", spike_dtype=dtype,
            ).squeeze(0)  # fmt: skip
        if self.recorder is not None:
            self.recorder("", (s != 0).detach())
        return s

    def thresholds(self, x: Tensor) -> Tensor:
        """Return theta, (..., 1): float32, or float64 for float64 tokens."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.log_factor.exp() * (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def normalise(self, x: Tensor) -> Tensor:
        """Return x / theta, which the neurons round."""
        return x / self.thresholds(x)

    def extra_repr(self) -> str:
        return f"{self.lo}, {self.hi}"


def slots_of(s: Tensor, slots: int) -> Tensor:
    """Unroll spikes s into time slots, (slots, \\*s.shape), of -1, 0 and 1. Slot i fires where the level exceeds i.

    Example:
        >>> import torch
        >>> from sdit.pure import slots_of
        >>> slots_of(torch.tensor([-2.0, 0.0, 1.0, 3.0]), 3).tolist()
        [[-1.0, 0.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    """
    slot = torch.arange(slots, dtype=s.dtype, device=s.device).view(-1, *[1] * s.dim())
    return torch.where(s.abs() <= slot, 0.0, s / s.abs())  # s.sign() of NaN is 0


class SpikeLinear(nn.Linear):
    """torch.nn.Linear for spikes. With ``slots`` above 0, it multiplies the spikes of each time slot and adds the results."""

    slots = 0

    def forward(self, s: Tensor) -> Tensor:
        if not self.slots:
            return super().forward(s)
        y = F.linear(slots_of(s, self.slots), self.weight).sum(0)
        return y if self.bias is None else y + self.bias


class BitPlanes(nn.Module):
    """A linear layer for pixels, which it splits into planes of spikes -1, 0 and 1::

        q = round(x 2^planes / 4), limited to -(2^planes - 1) .. 2^planes - 1
        y = bias + sum over i < planes of (weight 4 2^i / 2^planes) (sign(q) bit i of |q|)

    One matrix multiplication computes all planes; the plain form computes one after the other. Pixels get no gradient.
    """

    plain = False

    def __init__(self, inputs: int, outputs: int, planes: int):
        super().__init__()
        self.planes = planes
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        step, most = LIMIT / 2**self.planes, 2**self.planes - 1
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).contiguous()  # 16 bits do not hold every q
        powers = torch.exp2(torch.arange(self.planes + 1, dtype=x.dtype, device=x.device)).unsqueeze(1)  # (planes + 1, 1)
        q = (x / step).round().clamp(-most, most)
        rest = (q.abs().unsqueeze(-2) / powers).floor_()  # (B, N, planes + 1, inputs): |q| without its last i bits
        bits = torch.sub(rest[..., :-1, :], rest[..., 1:, :], alpha=2)
        spikes = bits.mul_(q.sign().unsqueeze(-2)).to(self.weight.dtype)  # (B, N, planes, inputs)
        weight = self.weight.unsqueeze(1) * (step * powers[:-1]).to(self.weight.dtype)  # (C, planes, inputs)
        if self.plain:
            return sum(F.linear(spikes[..., i, :], weight[:, i]) for i in range(self.planes)) + self.bias
        return F.linear(spikes.flatten(-2), weight.flatten(1), self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, planes={self.planes}"


class TimeTable(nn.Module):
    """A learnt table of the diffusion times 0 .. 1000: a row for every 8th time, and linear interpolation between two rows."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1000 // KNOT + 1, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every channel to a random smooth function of time with a standard deviation of about 1."""
        (rows, channels), like = self.weight.shape, dict(dtype=self.weight.dtype, device=self.weight.device)
        periods = torch.exp2(torch.arange(-2, 4, **like))  # 1/4 to 8 over all times
        angle = 2 * math.pi * periods * torch.linspace(0, 1, rows, **like).unsqueeze(1)
        waves = torch.cat([angle.cos(), angle.sin()], 1)
        self.weight.copy_(waves @ torch.randn(waves.shape[1], channels, **like) / math.sqrt(len(periods)))

    def forward(self, t: Tensor) -> Tensor:
        at = t.to(torch.promote_types(self.weight.dtype, torch.float32)).clamp(0, 1000) / KNOT
        row = at.long().clamp_max(len(self.weight) - 2)
        share = (at - row).unsqueeze(-1).to(self.weight.dtype)
        return torch.lerp(F.embedding(row, self.weight), F.embedding(row + 1, self.weight), share)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}"


class _Mix(nn.Module):
    """Base class of the two mixing layers: the neurons of the tokens, and the shift of half of the channels by one token."""

    plain = False

    def __init__(self, channels, levels):
        super().__init__()
        self.neuron = Spikes(-levels, levels)
        # The buffer holds numbers even if the model is made under torch.device("meta").
        own = torch.arange(channels, dtype=torch.int64, device="cpu") >= channels // 2
        self.register_buffer("own", own.float().view(1, 1, channels), persistent=False)

    def spikes(self, x):
        """Return the spikes of x, where the first half of the channels comes from the token before."""
        s = self.neuron(x)
        if self.plain:
            return torch.where(self.own.bool(), s, F.pad(s[:, :-1], (0, 0, 1, 0)))
        return token_shift(s, self.own)[0]


class PureTimeMix(_Mix):
    """RWKV's time mixing on spikes::

    s   = shift(Spikes(x))
    out = x + output(Spikes(sigmoid(receptance(s)) * wkv(key(s), value(s))))
    """

    def __init__(self, channels: int, layer: int, layers: int, levels: int, bidirectional: bool):
        super().__init__(channels, levels)
        self.place, self.bidirectional = (channels, layer, layers), bidirectional
        self.gated_neuron = Spikes(-levels, levels)
        self.time_decay, self.time_first = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.key, self.value, self.receptance, self.output = (SpikeLinear(channels, channels, bias=False) for _ in range(4))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        like = TimeMix(*self.place)  # RWKV-4's initial values
        self.time_decay.copy_(like.time_decay)
        self.time_first.copy_(like.time_first)
        for linear, gain in ((self.key, 0.5), (self.value, 0.5), (self.receptance, 0.5), (self.output, 0.25)):
            set_normal(linear, gain)

    @nvtx.range("attention")
    def forward(self, x: Tensor) -> Tensor:
        s = self.spikes(x)
        k, v, r = self.key(s), self.value(s), self.receptance(s)
        y = wkv(self.time_decay, self.time_first, k, v, r, bidirectional=self.bidirectional)
        return x + self.output(self.gated_neuron(y))


class PureChannelMix(_Mix):
    """RWKV's channel mixing on spikes. The hidden neurons have no negative levels::

    s   = shift(Spikes(x))
    out = x + sigmoid(receptance(s)) * value(Spikes(key(s)))
    """

    def __init__(self, channels: int, levels: int):
        super().__init__(channels, levels)
        self.hidden_neuron = Spikes(0, levels)
        self.key = SpikeLinear(channels, 4 * channels, bias=False)
        self.receptance = SpikeLinear(channels, channels, bias=False)
        self.value = SpikeLinear(4 * channels, channels, bias=False)

    def reset_parameters(self) -> None:
        for linear, gain in ((self.key, 0.5), (self.receptance, 0.5), (self.value, 0.25)):
            set_normal(linear, gain)

    @nvtx.range("mlp")
    def forward(self, x: Tensor) -> Tensor:
        s = self.spikes(x)
        return x + torch.sigmoid(self.receptance(s)) * self.value(self.hidden_neuron(self.key(s)))


class PureBlock(nn.Module):
    """One block of SDiT in spikes alone::

    x = skip(concat[Spikes(x), Spikes(skipped)])         (decoder blocks)
    x = TimeMix(x)
    x = ChannelMix(x)
    """

    reconstruction = None

    def __init__(self, config: Config, layer: int, layers: int, skip: bool):
        super().__init__()
        C, n = config.dim, config.levels
        self.skip = SpikeLinear(2 * C, C) if skip else None
        self.skip_neurons = nn.ModuleList(Spikes(-n, n) for _ in range(2)) if skip else None
        self.attention = PureTimeMix(C, layer, layers, n, config.bidirectional)
        self.mlp = PureChannelMix(C, n)
        self.frozen = None  # as in the other blocks; nothing here can be computed once for a sampling run

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        if self.skip is not None:  # (B, L, C), of a decoder block
            own, other = self.skip_neurons
            x = self.skip(torch.cat([own(x), other(skipped)], -1)).to(x.dtype)
        return self.mlp(self.attention(x))


@torch.no_grad()
def set_normal(linear: nn.Linear, gain: float) -> None:
    nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.weight.shape[1]))
