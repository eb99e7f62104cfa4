"""Small networks with the structure of published spiking networks, for tests/test_published_models.py and perf/bench_compat.py.

They are written from the papers. Each takes the modules of ``spikingjelly.clock_driven`` as ``jelly``: SpikingJelly
0.0.0.0.12's or ``sdit_kernels.compat.clock_driven``, so that the same network runs on both. Images are (B, C, H, W);
the network repeats an image T times.
"""

import torch
from einops import rearrange
from torch import nn


def _lif(jelly, v_threshold=1.0):
    return jelly.neuron.MultiStepLIFNode(tau=2.0, v_threshold=v_threshold, detach_reset=True, backend="torch")


class NormAndSpikes(nn.Module):
    """A convolution over (B, C, H, W) or (B, C, L), BatchNorm and LIF, for x (T, B, C, ...)."""

    def __init__(self, jelly, conv, v_threshold=1.0):
        super().__init__()
        self.conv = conv
        self.bn = (nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm1d)(conv.out_channels)
        self.lif = _lif(jelly, v_threshold)

    def forward(self, x):
        T = x.shape[0]
        return self.lif(rearrange(self.bn(self.conv(rearrange(x, "t b ... -> (t b) ..."))), "(t b) ... -> t b ...", t=T))


def conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def pointwise(inputs, outputs):
    return nn.Conv1d(inputs, outputs, 1, bias=False)


def over_time(module, x):
    """Apply a stateless module to x (T, B, ...)."""
    return rearrange(module(rearrange(x, "t b ... -> (t b) ...")), "(t b) ... -> t b ...", t=x.shape[0])


class Classifier(nn.Module):
    """Repeats an image T times, and averages the features (T, B, C, ...) of ``features`` over time and places for a Linear."""

    def __init__(self, T, width, classes=10):
        super().__init__()
        self.T = T
        self.head = nn.Linear(width, classes)

    def forward(self, image):
        return self.head(self.features(image.expand(self.T, *image.shape)).flatten(3).mean(-1)).mean(0)


# --- Spikformer (Zhou et al., ICLR 2023) ------------------------------------------------------------------------------------


class SpikingSelfAttention(nn.Module):
    def __init__(self, jelly, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (NormAndSpikes(jelly, pointwise(width, width)) for _ in range(4))
        self.lif = _lif(jelly, 0.5)

    def forward(self, x):
        q, k, v = (rearrange(f(x), "t b (h d) n -> t b h n d", h=self.heads) for f in (self.q, self.k, self.v))
        y = (q @ k.transpose(-2, -1)) @ v * 0.125
        return self.proj(self.lif(rearrange(y, "t b h n d -> t b (h d) n")))


class MLP(nn.Module):
    def __init__(self, jelly, width, ratio=4):
        super().__init__()
        self.fc1 = NormAndSpikes(jelly, pointwise(width, ratio * width))
        self.fc2 = NormAndSpikes(jelly, pointwise(ratio * width, width))

    def forward(self, x):
        return self.fc2(self.fc1(x))


class Residual(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return x


class Spikformer(Classifier):
    def __init__(self, jelly, T=4, width=64, heads=4, depth=2):
        super().__init__(T, width)
        self.patches = nn.ModuleList(
            [NormAndSpikes(jelly, conv3x3(1, width // 4)), NormAndSpikes(jelly, conv3x3(width // 4, width // 2)),
             NormAndSpikes(jelly, conv3x3(width // 2, width))]
        )  # fmt: skip
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.position = NormAndSpikes(jelly, conv3x3(width, width))
        self.blocks = nn.Sequential(
            *(Residual(SpikingSelfAttention(jelly, width, heads), MLP(jelly, width)) for _ in range(depth))
        )

    def features(self, x):
        for layer in self.patches:
            x = over_time(self.pool, layer(x)) if layer is not self.patches[0] else layer(x)
        return self.blocks((x + self.position(x)).flatten(3))


# --- QKFormer (Zhou et al., NeurIPS 2024) -----------------------------------------------------------------------------------


class TokenQKAttention(nn.Module):
    """The spikes of q, summed over the channels of a head, decide which tokens of k pass."""

    def __init__(self, jelly, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.proj = (NormAndSpikes(jelly, pointwise(width, width)) for _ in range(3))
        self.lif = _lif(jelly, 0.5)

    def forward(self, x):
        q, k = (rearrange(f(x), "t b (h d) n -> t b h d n", h=self.heads) for f in (self.q, self.k))
        return self.proj(rearrange(self.lif(q.sum(3, keepdim=True)) * k, "t b h d n -> t b (h d) n"))


class Downsampling(nn.Module):
    """Patch embedding with a shortcut of spikes."""

    def __init__(self, jelly, inputs, outputs):
        super().__init__()
        self.first = NormAndSpikes(jelly, conv3x3(inputs, outputs, stride=2))
        self.second = NormAndSpikes(jelly, conv3x3(outputs, outputs))
        self.shortcut = NormAndSpikes(jelly, nn.Conv2d(inputs, outputs, 1, 2, bias=False))

    def forward(self, x):
        return self.second(self.first(x)) + self.shortcut(x)


class QKFormer(Classifier):
    def __init__(self, jelly, T=4, width=64, heads=4):
        super().__init__(T, width)
        self.embed = NormAndSpikes(jelly, conv3x3(1, width // 4))
        self.down1 = Downsampling(jelly, width // 4, width // 2)
        self.stage1 = Residual(TokenQKAttention(jelly, width // 2, heads), MLP(jelly, width // 2))
        self.down2 = Downsampling(jelly, width // 2, width)
        self.stage2 = Residual(SpikingSelfAttention(jelly, width, heads), MLP(jelly, width))

    def features(self, x):
        x = self.down1(self.embed(x))
        x = self.stage1(x.flatten(3)).unflatten(3, x.shape[3:])
        return self.stage2(self.down2(x).flatten(3))


# --- Spike-Driven Transformer V1 (Yao et al., NeurIPS 2023) -----------------------------------------------------------------


class SpikesAndNorm(nn.Module):
    """LIF, convolution and BatchNorm, in the order of a shortcut between membrane potentials."""

    def __init__(self, jelly, conv):
        super().__init__()
        self.lif = _lif(jelly)
        self.conv = conv
        self.bn = (nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm1d)(conv.out_channels)

    def forward(self, x):
        return over_time(lambda y: self.bn(self.conv(y)), self.lif(x))


class SpikeDrivenSelfAttention(nn.Module):
    """Masks and additions in place of products: x = q * lif(sum over tokens of k * v)."""

    def __init__(self, jelly, width):
        super().__init__()
        self.lif = _lif(jelly)
        self.q, self.k, self.v = (NormAndSpikes(jelly, pointwise(width, width)) for _ in range(3))
        self.mask_lif = _lif(jelly, 0.5)
        self.proj = pointwise(width, width)
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x):
        spikes = self.lif(x)
        mask = self.mask_lif((self.k(spikes) * self.v(spikes)).sum(-1, keepdim=True))
        return over_time(lambda y: self.bn(self.proj(y)), self.q(spikes) * mask)


class SpikeDrivenTransformer(Classifier):
    def __init__(self, jelly, T=4, width=64, depth=2):
        super().__init__(T, width)
        self.patches = nn.Sequential(
            NormAndSpikes(jelly, conv3x3(1, width // 2, 2)), NormAndSpikes(jelly, conv3x3(width // 2, width, 2))
        )
        self.position = nn.Sequential(conv3x3(width, width), nn.BatchNorm2d(width))
        mlp = lambda: nn.Sequential(  # noqa: E731
            SpikesAndNorm(jelly, pointwise(width, 4 * width)), SpikesAndNorm(jelly, pointwise(4 * width, width))
        )
        self.blocks = nn.Sequential(*(Residual(SpikeDrivenSelfAttention(jelly, width), mlp()) for _ in range(depth)))
        self.lif = _lif(jelly)

    def features(self, x):
        x = self.patches(x)
        return self.lif(self.blocks((x + over_time(self.position, x)).flatten(3)))


# --- SEW-ResNet (Fang et al., NeurIPS 2021) ---------------------------------------------------------------------------------


class SEWBlock(nn.Module):
    """Two convolutions with IF neurons; the spikes of the shortcut are added to the spikes of the block."""

    def __init__(self, jelly, inputs, outputs, stride=1):
        super().__init__()

        def unit(conv):
            norm = jelly.layer.SeqToANNContainer(conv, nn.BatchNorm2d(outputs))
            surrogate = jelly.surrogate.ATan()
            return nn.Sequential(norm, jelly.neuron.MultiStepIFNode(detach_reset=True, surrogate_function=surrogate))

        self.first, self.second = unit(conv3x3(inputs, outputs, stride)), unit(conv3x3(outputs, outputs))
        self.shortcut = unit(nn.Conv2d(inputs, outputs, 1, stride, bias=False)) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.second(self.first(x)) + self.shortcut(x)


class SEWResNet(Classifier):
    def __init__(self, jelly, T=4, width=16):
        super().__init__(T, 4 * width)
        self.stem = SEWBlock(jelly, 1, width, 2)
        self.blocks = nn.Sequential(
            SEWBlock(jelly, width, width), SEWBlock(jelly, width, 2 * width, 2), SEWBlock(jelly, 2 * width, 4 * width, 2)
        )

    def features(self, x):
        return self.blocks(self.stem(x))


# --- SpikeGPT (Zhu et al., 2023) --------------------------------------------------------------------------------------------


def plain_run_cuda(B, T, C, w, u, k, v):
    """RWKV-4's WKV scan as a loop over the tokens, in place of the CUDA extension."""
    decay = -torch.exp(w)
    a = b = torch.zeros_like(k[:, 0])
    top = torch.full_like(k[:, 0], -1e38)
    rows = []
    for t in range(T):
        best = torch.maximum(top, u + k[:, t])
        old, now = torch.exp(top - best), torch.exp(u + k[:, t] - best)
        rows.append((old * a + now * v[:, t]) / (old * b + now))
        best = torch.maximum(top + decay, k[:, t])
        old, now = torch.exp(top + decay - best), torch.exp(k[:, t] - best)
        a, b, top = old * a + now * v[:, t], old * b + now, best
    return torch.stack(rows, 1)


RUN_CUDA = plain_run_cuda  # the name under which SpikeGPT's layer calls it


class SpikeGPTTimeMix(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.time_decay = nn.Parameter(torch.linspace(-5, 2, width))
        self.time_first = nn.Parameter(torch.linspace(-1, 1, width))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (nn.Parameter(torch.rand(1, 1, width)) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        B, T, C = x.shape
        last = nn.functional.pad(x, (0, 0, 1, -1))
        xk, xv, xr = (x * m + last * (1 - m) for m in (self.time_mix_k, self.time_mix_v, self.time_mix_r))
        y = RUN_CUDA(B, T, C, self.time_decay, self.time_first, self.key(xk), self.value(xv))
        return self.output(torch.sigmoid(self.receptance(xr)) * y)


class SpikeGPTChannelMix(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.time_mix_k, self.time_mix_r = (nn.Parameter(torch.rand(1, 1, width)) for _ in range(2))
        self.key = nn.Linear(width, 4 * width, bias=False)
        self.receptance, self.value = nn.Linear(width, width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        last = nn.functional.pad(x, (0, 0, 1, -1))
        xk, xr = (x * m + last * (1 - m) for m in (self.time_mix_k, self.time_mix_r))
        return torch.sigmoid(self.receptance(xr)) * self.value(torch.relu(self.key(xk)) ** 2)


class SpikeGPT(nn.Module):
    """A language model whose tokens are the time steps of its LIF neurons."""

    def __init__(self, jelly, words=50, width=64, depth=2):
        super().__init__()

        def lif():
            return jelly.neuron.MultiStepLIFNode(tau=2.0, surrogate_function=jelly.surrogate.ATan(), backend="torch")

        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"norm1": nn.LayerNorm(width), "time": SpikeGPTTimeMix(width), "lif1": lif(),
                 "norm2": nn.LayerNorm(width), "channel": SpikeGPTChannelMix(width), "lif2": lif()}
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["lif1"](layer["time"](layer["norm1"](x)).transpose(0, 1)).transpose(0, 1)
            x = x + layer["lif2"](layer["channel"](layer["norm2"](x)).transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(x))


# --- SpikingResformer (Shi et al., CVPR 2024), on SpikingJelly's activation_based --------------------------------------------


class DualSpikeSelfAttention(nn.Module):
    """Attention between spikes and a strided convolution of them; two scales follow the firing rates."""

    def __init__(self, neuron, width, heads, patch):
        super().__init__()
        self.heads = heads
        self.norm_first = neuron()
        self.conv = nn.Conv2d(width, 2 * width, patch, patch, bias=False)
        self.bn = nn.BatchNorm2d(2 * width)
        self.attention_lif, self.out_lif = neuron(), neuron()
        self.proj = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.register_buffer("rate_x", torch.full((heads,), 0.5))
        self.register_buffer("rate_attention", torch.full((heads,), 0.5))

    def _follow(self, buffer, spikes):
        if self.training:
            with torch.no_grad():
                buffer.lerp_(spikes.mean((0, 1, 3, 4)).to(buffer.dtype), 0.1)
        return buffer.reshape(1, 1, -1, 1, 1)

    def forward(self, x):
        x = self.norm_first(x)
        side = x.shape[-2:]
        y = over_time(lambda z: self.bn(self.conv(z)), x)
        y1, y2 = rearrange(y, "t b (n h d) i j -> n t b h (i j) d", n=2, h=self.heads)
        x = rearrange(x, "t b (h d) i j -> t b h d (i j)", h=self.heads)
        scale = (self._follow(self.rate_x, x) * x.shape[3]) ** -0.5
        attention = self.attention_lif((y1 @ x) * scale)
        scale = (self._follow(self.rate_attention, attention) * attention.shape[3]) ** -0.5
        out = self.out_lif((y2.transpose(-2, -1) @ attention) * scale)
        return over_time(self.proj, rearrange(out, "t b h d (i j) -> t b (h d) i j", i=side[0], j=side[1]))


class GroupWiseMLP(nn.Module):
    def __init__(self, neuron, width, groups):
        super().__init__()
        self.lifs = nn.ModuleList(neuron() for _ in range(3))
        self.up = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.mix = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 1, 1, groups=groups, bias=False), nn.BatchNorm2d(2 * width))
        self.down = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        x = over_time(self.up, self.lifs[0](x))
        x = x + over_time(self.mix, self.lifs[1](x))
        return over_time(self.down, self.lifs[2](x))


class SpikingResformer(Classifier):
    """``neuron()`` makes a multi-step neuron of ``spikingjelly.activation_based``."""

    def __init__(self, neuron, T=4, width=32, heads=2):
        super().__init__(T, width)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.MaxPool2d(3, 2, 1))
        self.block = Residual(DualSpikeSelfAttention(neuron, width, heads, 2), GroupWiseMLP(neuron, width, 4))
        self.lif = neuron()

    def features(self, x):
        return self.lif(self.block(over_time(self.stem, x)))


# --- the convolutional network of snnTorch's tutorials ----------------------------------------------------------------------


class SnnTorchNet(nn.Module):
    """``neuron()`` makes a ``snntorch.Leaky``. It loops over T steps of the same image; the output counts spikes."""

    def __init__(self, neuron, T=10):
        super().__init__()
        self.T = T
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 5), nn.Conv2d(12, 32, 5)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(32 * 16, 10)
        self.lif1, self.lif2, self.lif3 = neuron(), neuron(), neuron()

    def forward(self, image):
        v1, v2, v3 = (lif.reset_mem() for lif in (self.lif1, self.lif2, self.lif3))
        spikes = []
        for _ in range(self.T):
            s1, v1 = self.lif1(self.pool(self.conv1(image)), v1)
            s2, v2 = self.lif2(self.pool(self.conv2(s1.to(image.dtype))), v2)  # snnTorch's own spikes are float32
            s3, v3 = self.lif3(self.fc(s2.to(image.dtype).flatten(1)), v3)
            spikes.append(s3)
        return torch.stack(spikes).sum(0)
