"""SDiT, the Spiking Diffusion Transformer (Yang et al., arXiv 2402.11588): a U-shaped stack of RWKV blocks over the patches of
a noisy image. Each mixing layer outputs firing rates.

Letters: B batch, T time steps, L tokens, C channels, N patches.

The network has one definition and two forms that compute it. The plain form, ``model.plain = True``, follows the equations:
every block appends B copies of its reconstruction tokens to the tokens of the image, and runs its layers over all tokens. The
fast form gives the same numbers for less work. The scan over tokens is causal and the image tokens stand first, so they do not
depend on the reconstruction tokens. The scan of the reconstruction tokens starts from the state after the last image token. The
reconstruction tokens are the same for the whole batch, so the fast form computes their norm, shift, keys, values and
receptances once, except for the first one, which mixes with the last token of the image. ``sdit_kernels.backend`` selects the
kernels or the reference for both forms. ``sdit.pure`` has the parts of a network in spikes alone.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdit_kernels import lif, nvtx, spiking_wkv, token_shift
from sdit_kernels.nn import ChannelMix, LIFRate, TimeMix

from .config import Config
from .diffusion import STEPS
from .pure import BitPlanes, PureBlock, SpikeLinear, Spikes, TimeTable, set_normal

try:
    from einops import rearrange
except ImportError:
    raise ImportError("the model needs einops: pip install einops") from None

__all__ = ["SDiT"]

EPS = 1e-6  # eps of every LayerNorm; no LayerNorm here has affine parameters


class RecordedRate(LIFRate):
    """A rate neuron that can record its firing rate (``SDiT.record``). The plain form repeats the current T times."""

    recorder = None
    plain = False

    def forward(self, x: Tensor, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        if self.recorder is not None:
            with torch.no_grad():
                self.recorder("", super().forward(x, None, gate))
        if not self.plain:
            return super().forward(x, residual, gate)
        current = x if gate is None else torch.sigmoid(gate) * x
        rate = self.spikes(current).mean(0)
        return rate if residual is None else residual + rate

    def spikes(self, x: Tensor, name: str | None = None) -> Tensor:
        """Run the neuron for T time steps under the constant current x; return the spikes (T, ...)."""
        T = self.T
        s = lif(x.repeat(T, *[1] * x.dim()) if self.plain else x.expand(T, *x.shape), **self.op_arguments(x))
        if name:
            self.record_spikes(name, s)
        return s

    def record_spikes(self, name: str, s: Tensor) -> None:
        if self.recorder is not None:
            self.recorder("." + name, s.detach())


class SpikingTimeMix(TimeMix):
    """TimeMix with a spiking scan: each of the T time steps has a scan of its own, and every matrix multiplication is
    spike-driven::

        sk, sv, sr   = T steps of the neuron under the constant currents xk, xv, xr
        k, v, r      = key(sk), value(sv), receptance(sr)                                  (T, B, L, C)
        s            = T steps of the neuron under sigmoid(r[t]) * wkv(k[t], v[t])
        out          = residual + 1/T * sum over t of output(s[t])

    ``output`` is linear, so it receives the mean of s over T, which takes 1/T of the work. In the plain form it receives the
    spikes.
    """

    plain = False

    def project(self, x, last=None):
        mixes = self.time_mix_k, self.time_mix_v, self.time_mix_r
        mixed = token_shift(x, *mixes, norm_eps=self.norm_eps, last=last)
        return tuple(getattr(self, n)(self.neuron.spikes(m, n)) for n, m in zip(("key", "value", "receptance"), mixed))

    def scan(self, k, v, r, state=None, return_state=False):
        y, (state, _) = spiking_wkv(
            self.time_decay, self.time_first, k, v, r, **self.neuron.op_arguments(k), scan_state=state, return_state=True,
            rate=not self.plain,
        )  # fmt: skip
        self.neuron.record_spikes("output", y)
        return (y, state) if return_state else y

    def finish(self, y, residual=None):
        y = self.output(y)
        y = y.mean(0) if self.plain else y
        return y if residual is None else residual + y


def pad_tokens(first: nn.Linear, second: nn.Linear, r: Tensor, rest: int) -> Tensor:
    """Return second(first(r)^T), (B, L, C), of r (B, L, C), with ``rest`` tokens of zeros more inside.

    The fast matmul kernels of a GPU need rows that start at multiples of 16 bytes, which 197 tokens do not give.
    The weights of the added tokens are 0, so the result is the same.
    """
    L = r.shape[1]
    w, b = F.pad(first.weight, (0, 0, 0, rest)), F.pad(first.bias, (0, rest))
    y = F.linear(F.pad(r, (0, 0, 0, rest)), w, b)  # (B, L of r + rest, L + rest)
    return F.linear(y.transpose(1, 2), F.pad(second.weight, (0, rest)), second.bias)[:, :L]


class Block(nn.Module):
    """One block of SDiT, with learned reconstruction tokens R::

        x    = skip(concat[x, skipped])                             (decoder blocks)
        z    = concat[x, R]                                         over tokens
        z    = z + rate(TimeMix(LN(z)))
        z    = z + rate(ChannelMix(LN(z)))
        x, r = split(z)
        x    = x + x * gate,    gate = tokens_out(tokens_in(r)^T)   (B, N+1, C)

    Without reconstruction tokens, the block returns z. In the shapes below L = N+1.
    """

    plain = False

    def __init__(self, config: Config, layer: int, layers: int, skip: bool):
        super().__init__()
        C, L = config.dim, config.tokens
        neuron = {"tau": config.tau, "v_threshold": config.v_threshold, "alpha": config.alpha}
        self.skip = nn.Linear(2 * C, C) if skip else None
        attention = SpikingTimeMix if config.spiking == "wkv" else TimeMix
        self.attention = attention(
            C, layer, layers, norm_eps=EPS, neuron=RecordedRate(config.T, **neuron), bidirectional=config.bidirectional
        )
        self.mlp = ChannelMix(C, layer, layers, norm_eps=EPS, neuron=RecordedRate(config.T, **neuron))
        if config.reconstruction:
            self.reconstruction = nn.Parameter(torch.ones(1, L, C))
            self.tokens_in, self.tokens_out = nn.Linear(C, L), nn.Linear(L, C)
        else:
            self.reconstruction = None
        self.frozen = None  # a dict inside SDiT.frozen(): tensors that a sampling run computes once

    def forward(self, x: Tensor, skipped: Tensor | None = None) -> Tensor:
        if self.skip is not None:  # (B, L, C), of a decoder block
            x = self.skip(torch.cat([x, skipped], -1)) if self.plain else self._apply_skip(x, skipped)
        if self.reconstruction is None:
            return self._mix(self._attend_all(x))  # (B, L, C)
        if self.plain:
            z = torch.cat([x, self.reconstruction.expand(len(x), -1, -1)], 1)  # (B, 2L, C)
            x, r = self._mix(self._attend_all(z)).chunk(2, 1)  # (B, L, C) each
            return x + x * self._gate(r)
        x, r = self._attend(x)  # (B, L, C) each
        x, r = self._mix(x), self._mix(r, x[:, -1])
        return x * (self._gate(r).to(x.dtype) + 1)  # addcmul would read x and the gate three times more in the backward pass

    @nvtx.range("mlp")
    def _mix(self, x, last=None):
        return self.mlp(x, last, residual=x)

    @nvtx.range("reconstruction")
    def _gate(self, r):
        rest = -r.shape[1] % 8 if r.device.type == "cuda" else 0
        if rest:
            return pad_tokens(self.tokens_in, self.tokens_out, r, rest)
        return self.tokens_out(self.tokens_in(r).transpose(1, 2))  # (B, L, C) -> (B, L of r, L) -> (B, L, C)

    def _apply_skip(self, x, skipped):
        """Apply ``skip`` to [x, skipped] without concatenating: one matmul per half of its weight."""
        C = x.shape[-1]
        weight = self.skip.weight
        first = F.linear(x, weight[:, :C], self.skip.bias).flatten(0, 1)  # (B L, C)
        skipped = skipped.flatten(0, 1).to(first.dtype)
        return torch.addmm(first, skipped, weight[:, C:].t().to(first.dtype)).view_as(x).to(x.dtype)

    @nvtx.range("attention")
    def _attend_all(self, x):
        return self.attention(x, residual=x)

    @nvtx.range("attention")
    def _attend(self, x):
        """Run the attention over the image tokens, then over R; return both with their residuals, (B, L, C) each."""
        a, R = self.attention, self.reconstruction.expand(len(x), -1, -1)
        own = a.project(x)
        first = a.project(R[:, :1], x[:, -1])
        rest = tuple(t.expand(*t.shape[:-3], len(x), -1, -1) for t in self._shared())
        if a.bidirectional:
            y = a.scan(*(torch.cat(parts, -2) for parts in zip(own, first, rest)))
            y, y_r = y.chunk(2, -2)
        else:
            y, state = a.scan(*own, return_state=True)
            y_first, state = a.scan(*first, state, return_state=True)
            y_r = torch.cat([y_first, a.scan(*rest, state)], -2)
        return a.finish(y, x), a.finish(y_r, R)

    def _shared(self):
        """Return keys, values and receptances of R[1:] with batch size 1: they do not depend on the images."""
        if self.frozen is None:
            return self._project_shared()
        neuron = self.attention.neuron
        key = (torch.is_autocast_enabled(self.reconstruction.device.type), neuron.T, neuron.tau, neuron.v_threshold)
        if key not in self.frozen:
            self.frozen[key] = self._project_shared()
        return self.frozen[key]

    def _project_shared(self):
        R = self.reconstruction
        return self.attention.project(R[:, 1:], R[:, 0])


class SDiT(nn.Module):
    """The SDiT network: predict the noise in noisy images from the images, their times and their labels.

    Args:
        config: a :class:`sdit.config.Config`, for example from ``PRESETS``.
        overrides: fields of config to change.

    Shape:
        x: (B, channels, S, S), in the units of the noise. t: (B,), times 0 .. 999. y: (B,), int labels; num_classes is the null
        label. Output: (B, out, S, S), out = 2 channels (noise, then logits of the variance) with learn_sigma, else channels.

    Attributes:
        config: the configuration, with the overrides.
        plain: True computes the equations literally, for comparison; see the top of this file.
        slots: True runs a model with spiking "pure" spike by spike: every matrix multiplication sees -1, 0 and 1 alone, in
            config.levels time slots. The result is the same, except for rounding.
        trained_on: a dict that describes the training data, as the checkpoint stores it; empty for a new model. Keys: name,
            images (their number), classes (their names), root (where the files were, or None).
        recommended: a dict of settings of :func:`sdit.sample.sample` that ``sdit sample`` and ``sdit evaluate`` use by default:
            guidance, guidance_interval, noise_scale.
        checkpointing: True keeps only the input of each block for the backward pass, which recomputes the rest.

    Raises:
        TypeError, ValueError: the constructor raises them for a wrong field, a call for a wrong shape, dtype or label.

    Source: Yang et al., SDiT, arXiv 2402.11588.

    Example:
        >>> import torch
        >>> from sdit.config import PRESETS
        >>> from sdit.model import SDiT
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> model(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10])).shape
        torch.Size([2, 2, 8, 8])
    """

    def __init__(self, config: Config, **overrides):
        super().__init__()
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, as in sdit.config.PRESETS, got {type(config).__name__}")
        unknown = sorted(set(overrides) - {f.name for f in dataclasses.fields(Config)})
        if unknown:
            raise TypeError(f"a Config does not have the fields {', '.join(unknown)}")
        self.config = config = dataclasses.replace(config, **overrides)
        self.trained_on, self.recommended = {}, {}
        self.checkpointing = False
        C, P, pure = config.dim, config.patch_size, config.spiking == "pure"
        linear = SpikeLinear if pure else nn.Linear
        pixels = config.channels * P * P
        self.patches = BitPlanes(pixels, C, config.planes) if pure else nn.Linear(pixels, C)
        self.time = TimeTable(C) if pure else nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.labels = nn.Embedding(config.num_classes + 1, C)
        self.condition_to_patches = linear(C, C) if config.condition == "every" else None
        self.position = nn.Parameter(torch.zeros(1, config.tokens, C))
        half = config.depth // 2
        if config.variant == "faithful":
            layers, places = config.depth, [*range(half + 1), *range(half)]
        else:
            layers, places = 2 * half + 1, range(2 * half + 1)
        block = PureBlock if pure else Block
        self.blocks = nn.ModuleList(block(config, place, layers, skip=i > half) for i, place in enumerate(places))
        for name, order in zip(("_order", "_inverse_order"), _token_orders(config)):
            self.register_buffer(name, order, persistent=False)
        self.final = linear(C, P * P * config.out_channels)
        self.smooth = None if pure else nn.Conv2d(config.out_channels, config.out_channels, 3, padding=1)
        if pure:
            self.final_neuron = Spikes(-config.levels, config.levels)
            if config.condition == "every":
                self.condition_neuron = Spikes(-config.levels, config.levels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values that ``config.variant`` selects."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.labels,) if self.pure else (self.time[0], self.time[2], self.labels):
            nn.init.normal_(linear.weight, std=0.02)
        for parameter in (self.final.weight, self.final.bias, self.position):
            nn.init.zeros_(parameter)
        if self.condition_to_patches is not None:
            nn.init.zeros_(self.condition_to_patches.weight)
        if self.smooth is not None:
            self.smooth.reset_parameters()
        for block in self.blocks:
            block.attention.reset_parameters()
            block.mlp.reset_parameters()
            if block.reconstruction is not None:
                nn.init.ones_(block.reconstruction)
        if self.pure:
            self._set_pure_values()
        elif self.config.variant == "improved":
            self._set_improved_values()

    def _set_improved_values(self):
        """Turn the "faithful" initial values into the "improved" ones: gates start at zero, neurons fire, the condition depends
        on time and label, and the last convolution is the identity."""

        def normal(linear, gain):
            nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.weight.shape[1]))

        spiking = self.config.spiking == "wkv"
        for block in self.blocks:
            a, m = block.attention, block.mlp
            for linear in (a.key, a.receptance, m.key, m.receptance):
                normal(linear, 1)
            normal(a.value, 30 if spiking else 1)  # the mean over tokens is small, and smaller still for sparse spikes
            normal(a.output, 0.5 if spiking else 3)
            normal(m.value, 2)
            if block.reconstruction is not None:
                nn.init.zeros_(block.tokens_out.weight)
        normal(self.time[0], math.sqrt(2))
        normal(self.time[2], 1)
        nn.init.normal_(self.labels.weight, std=3)  # labels are added to the time embedding, which soon grows to about 5
        nn.init.dirac_(self.smooth.weight)
        nn.init.zeros_(self.smooth.bias)

    def _set_pure_values(self):
        """Set the initial values of a network in spikes alone, except in the mixing layers: neurons fire, and the condition
        depends on time and label."""
        for module in self.modules():
            if isinstance(module, (Spikes, BitPlanes, TimeTable)):
                module.reset_parameters()
        for block in self.blocks:
            if block.skip is not None:
                set_normal(block.skip, 0.35)
        nn.init.normal_(self.labels.weight, std=3)

    @property
    def pure(self) -> bool:
        """True if every matrix multiplication sees spikes."""
        return self.config.spiking == "pure"

    @property
    def plain(self) -> bool:
        return self.blocks[0].mlp.neuron.plain

    @plain.setter
    def plain(self, plain: bool) -> None:
        for module in self.modules():
            if hasattr(module, "plain") and module is not self:
                module.plain = plain

    @property
    def slots(self) -> bool:
        return self.pure and self.final.slots > 0

    @slots.setter
    def slots(self, slots: bool) -> None:
        if slots and not self.pure:
            raise ValueError(f"slots needs a model with spiking='pure', this one has spiking={self.config.spiking!r}")
        for module in self.modules():
            if isinstance(module, SpikeLinear):
                module.slots = self.config.levels if slots else 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._check(x, t, y)
        if self.blocks[0].frozen is not None and torch.is_grad_enabled():
            raise RuntimeError("frozen() is for sampling runs: call the model under torch.no_grad() inside it")
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) if device != "meta" else False
        # Both ends of the network cost little, and the tokens keep their precision. Spikes are exact in 16 bits.
        no_autocast = torch.autocast(device, enabled=False) if autocast and not self.pure else contextlib.nullcontext()
        with no_autocast:
            x = self.embed_inputs(x.to(self.position.dtype), t, y)  # (B, channels, S, S) -> (B, N+1, C)
        half, skips = len(self.blocks) // 2, []
        checkpointing = self.checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            inputs = (x, skips.pop()) if i > half else (x,)  # (B, N+1, C) each
            block = nvtx.range(f"block {i}")(block)
            permuted = self.config.scan == "four" and i % 4
            if permuted:
                inputs = tuple(a[:, self._order[i % 4]] for a in inputs)
            x = checkpoint(block, *inputs, use_reentrant=False) if checkpointing else block(*inputs)  # (B, N+1, C)
            if permuted:
                x = x[:, self._inverse_order[i % 4]]
            if i < half:
                skips.append(x)
        with no_autocast:
            return self.decode_tokens(x).to(self.position.dtype)  # (B, out, S, S)

    @nvtx.range("embedding")
    def embed_inputs(self, x, t, y):
        """Return the tokens (B, N+1, C) of images: the condition, then the patches row by row."""
        c = self.time(t if self.pure else _sinusoid(t, self.position.dtype)) + self.labels(y)  # (B, C)
        x = F.pixel_unshuffle(x, self.config.patch_size)  # (B, channels P P, S/P, S/P)
        x = self.patches(rearrange(x, "b c h w -> b (h w) c"))  # (B, N, C)
        if self.condition_to_patches is not None:
            # The condition is much larger than the patches, so it is normalised and its weights start at zero.
            normal = self.condition_neuron(c) if self.pure else F.layer_norm(c, c.shape[-1:], eps=EPS)
            x = x + self.condition_to_patches(normal).unsqueeze(1)
        return torch.cat([c.unsqueeze(1), x], 1) + self.position  # (B, N+1, C)

    @nvtx.range("final")
    def decode_tokens(self, x):
        """Return the images (B, out, S, S) of tokens (B, N+1, C). The condition token is dropped."""
        P = self.config.patch_size
        x = x[:, 1:]
        x = self.final_neuron(x) if self.pure else F.layer_norm(x, x.shape[-1:], eps=EPS)
        x = self.final(x)  # (B, N, P P out)
        x = rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.config.image_size // P, p=P, q=P)  # (B, out, S, S)
        return x if self.smooth is None else self.smooth(x)

    def _check(self, x, t, y):
        config = self.config
        shape = (config.channels, config.image_size, config.image_size)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
        if x.dim() != 4 or x.shape[1:] != shape or x.shape[0] == 0:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), B > 0, got {tuple(x.shape)}")
        for name, value in (("t", t), ("y", y)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name} must have shape ({x.shape[0]},), one per image, got {tuple(value.shape)}")
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"y must be labels, int64 or int32, got {y.dtype}")
        if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
            low, high = torch.aminmax(y)
            if low < 0 or high > config.num_classes:
                raise ValueError(f"y must be labels 0 .. {config.num_classes}, the last the null label, got {low} .. {high}")
        if self.pure and t.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = torch.aminmax(t)
            if not (low >= 0 and high <= STEPS):
                raise ValueError(f"t must be times 0 .. {STEPS}, as its table has no others, got {low} .. {high}")

    @contextlib.contextmanager
    def record(self, fired=None):
        """Record firing rates: yield a dict {name of a layer: mean rate over all calls inside the with block, a tensor}.

        Args:
            fired: a dict to fill with {name of a layer: bool tensor (C,)}, True for each neuron (channel) that fired.

        Example:
            >>> import torch
            >>> from sdit.config import PRESETS
            >>> from sdit.model import SDiT
            >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
            >>> with model.record() as rates:
            ...     _ = model(torch.randn(1, 1, 8, 8), torch.tensor([500]), torch.tensor([3]))
            >>> len(rates), list(rates)[0]
            (6, 'blocks.0.attention')
        """
        rates = {}
        neurons = [(name.removesuffix(".neuron"), m) for name, m in self.named_modules() if hasattr(m, "recorder")]
        for name, neuron in neurons:
            neuron.recorder = _RateRecorder(rates, fired, name)
        try:
            yield rates
        finally:
            for _, neuron in neurons:
                neuron.recorder = None

    @contextlib.contextmanager
    def frozen(self):
        """Speed up a sampling run: the first call computes the tensors that depend only on the weights, later calls reuse them.

        Inside the with block the weights must not change and gradients must be disabled.

        Raises:
            RuntimeError: the model was called inside the with block with gradients enabled.

        Example:
            >>> import torch
            >>> from sdit.config import PRESETS
            >>> from sdit.model import SDiT
            >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
            >>> with model.frozen(), torch.no_grad():
            ...     for t in (999, 500, 0):
            ...         _ = model(torch.randn(1, 1, 8, 8), torch.tensor([t]), torch.tensor([3]))
        """
        before = [block.frozen for block in self.blocks]
        for block in self.blocks:
            block.frozen = {}
        try:
            yield
        finally:
            for block, old in zip(self.blocks, before):
                block.frozen = old


class _RateRecorder:
    """Recorder of one neuron: keeps the mean of all its inputs in rates[name + part], and where they exceed 0 in fired."""

    def __init__(self, rates, fired, name):
        self.rates, self.fired, self.name, self.seen = rates, fired, name, {}

    def __call__(self, part, x):
        total, count = self.seen.get(part, (0, 0))
        total = total + x.sum(dtype=torch.promote_types(x.dtype, torch.float32))
        self.seen[part] = total, count + x.numel()
        self.rates[self.name + part] = total / self.seen[part][1]
        if self.fired is not None:
            some = x.flatten(0, -2).amax(0) > 0
            self.fired[self.name + part] = some | self.fired.get(self.name + part, False)


def _token_orders(config):
    """Return the four token orders of scan "four" and their inverses, (4, N+1) each: rows, rows reversed, columns, columns
    reversed. The condition token always stays first."""
    rows = torch.arange(1, config.tokens, device="cpu")  # numbers, even if the model is made under torch.device("meta")
    columns = rearrange(rows, "(h w) -> (w h)", h=config.image_size // config.patch_size)
    orders = torch.stack([F.pad(order, (1, 0)) for order in (rows, rows.flip(0), columns, columns.flip(0))])
    return orders, orders.argsort(1)


def _sinusoid(t, dtype):
    """Embed times t (B,) in 256 numbers each: cos, then sin, at 128 frequencies from 1 to 1e-4."""
    dtype_of_angle = torch.promote_types(dtype, torch.float32)
    frequency = torch.exp(torch.arange(128, dtype=dtype_of_angle, device=t.device) * (-math.log(10000) / 128))
    angle = t.to(dtype_of_angle).unsqueeze(1) * frequency
    return torch.cat([torch.cos(angle), torch.sin(angle)], 1).to(dtype)
