"""A small Vision-RWKV in plain PyTorch, written from the paper (Duan et al., arXiv 2403.02308) with the names of its code.

The layers call the global function RUN_CUDA, as in Vision-RWKV. Here it is plain PyTorch in one of three forms, see `FORMS`.
"""

import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

# ---- the two-way scan, in plain PyTorch ------------------------------------------------------------------------------


def bi_wkv_matrix(w, u, k, v):
    """Multiply with a matrix of weights for each channel, (C, T, T). Time and memory grow with T^2."""
    T = k.shape[1]
    steps = torch.arange(T, device=k.device)
    distance = (steps[:, None] - steps).abs() - 1
    exponent = torch.where(torch.eye(T, dtype=torch.bool, device=k.device), u[:, None, None], -w[:, None, None] * distance)
    weights = exponent.exp()  # (C, T, T)
    e = torch.exp(k - k.detach().amax(1, keepdim=True)).permute(2, 1, 0)  # (C, T, B)
    return ((weights @ (e * v.permute(2, 1, 0))) / (weights @ e)).permute(2, 1, 0)


def bi_wkv_cumsum(w, u, k, v):
    """Take cumulative sums of e^(k[i] + w i) from the left and of e^(k[i] - w i) from the right.

    The sums stay finite as long as |w| T is small, which it is in the models: w is a parameter of size 5, divided by T.
    """
    T = k.shape[1]
    steps = torch.arange(T, device=k.device, dtype=k.dtype)[:, None]
    k = k - k.detach().amax(1, keepdim=True)

    def others(e):
        """Return the weighted sum over earlier and over later tokens, for weights and values e."""
        grow, shrink = torch.exp(w * steps), torch.exp(-w * steps)
        left = pad((grow * e).cumsum(1), (0, 0, 1, -1)) * torch.exp(-w * (steps - 1))
        right = pad((shrink * e).flip(1).cumsum(1), (0, 0, 1, -1)).flip(1) * torch.exp(w * (steps + 1))
        return left + right

    e, own = torch.exp(k), torch.exp(u + k)
    return (others(e * v) + own * v) / (others(e) + own)


def bi_wkv_loop(w, u, k, v):
    """Scan the tokens in both directions with a running maximum, as the CUDA kernel does; then combine both with the token."""

    def scan(k, v):
        """Return numerator, denominator and exponent of the tokens before each token, each (B, T, C)."""
        zeros = torch.zeros_like(k[0])
        state, states = (zeros, zeros, torch.full_like(zeros, -1e38)), []
        for kt, vt in zip(k, v):
            states.append(state)
            a, b, o = state
            top = torch.maximum(o - w, kt)
            old, new = torch.exp(o - w - top), torch.exp(kt - top)
            state = old * a + new * vt, old * b + new, top
        return states

    ks, vs = k.unbind(1), v.unbind(1)
    left = [torch.stack(s, 1) for s in zip(*scan(ks, vs))]
    right = [torch.stack(s, 1) for s in zip(*reversed(scan(ks[::-1], vs[::-1])))]
    top = torch.maximum(torch.maximum(left[2], right[2]), u + k)
    before, after, own = torch.exp(left[2] - top), torch.exp(right[2] - top), torch.exp(u + k - top)
    return (before * left[0] + after * right[0] + own * v) / (before * left[1] + after * right[1] + own)


FORMS = {"cumulative sums": bi_wkv_cumsum, "matrix": bi_wkv_matrix, "loop": bi_wkv_loop}
chosen = {"form": "cumulative sums"}


def RUN_CUDA(B, T, C, w, u, k, v):
    """Cast and return as Vision-RWKV's function does: the dtype of w decides between half precision and float32."""
    wide = torch.promote_types(w.dtype, torch.float32)
    y = FORMS[chosen["form"]](*(t.to(wide) for t in (w, u, k, v)))
    return y.to(w.dtype)


# ---- the model -------------------------------------------------------------------------------------------------------


def q_shift(x, shift_pixel=1, gamma=1 / 4, patch_resolution=None):
    """Move four groups of channels right, left, down and up by some pixels; x: (B, H * W, C)."""
    n, (H, W) = shift_pixel, patch_resolution
    image = x.transpose(1, 2).unflatten(2, (H, W))
    ends = [int(x.shape[2] * gamma * i) for i in range(5)]
    right, left, down, up = (slice(a, b) for a, b in zip(ends, ends[1:]))
    moved = torch.zeros_like(image)
    moved[:, right, :, n:] = image[:, right, :, : W - n]
    moved[:, left, :, : W - n] = image[:, left, :, n:]
    moved[:, down, n:] = image[:, down, : H - n]
    moved[:, up, : H - n] = image[:, up, n:]
    moved[:, ends[4] :] = image[:, ends[4] :]
    return moved.flatten(2).transpose(1, 2)


class Mix(nn.Module):
    """What both mixes share: the shift, and activation checkpointing."""

    names: tuple[str, ...]

    def __init__(self, C, shift_pixel, channel_gamma, with_cp):
        super().__init__()
        self.shift_pixel, self.channel_gamma, self.with_cp = shift_pixel, channel_gamma, with_cp
        self.shift_func = q_shift
        for name in self.names:
            setattr(self, name, nn.Parameter(torch.rand(1, 1, C)) if shift_pixel else None)

    def mixed(self, x, patch_resolution):
        if not self.shift_pixel:
            return [x for _ in self.names]
        shifted = self.shift_func(x, self.shift_pixel, self.channel_gamma, patch_resolution)
        return [x * m + shifted * (1 - m) for m in (getattr(self, name) for name in self.names)]

    def forward(self, x, patch_resolution=None):
        if self.with_cp and x.requires_grad:
            return checkpoint(self.run, x, patch_resolution, use_reentrant=False)
        return self.run(x, patch_resolution)


class VRWKV_SpatialMix(Mix):
    names = ("spatial_mix_k", "spatial_mix_v", "spatial_mix_r")

    def __init__(self, C, shift_pixel=1, channel_gamma=1 / 4, key_norm=False, with_cp=False):
        super().__init__(C, shift_pixel, channel_gamma, with_cp)
        self.spatial_decay = nn.Parameter(8 * torch.rand(C) - 5)
        self.spatial_first = nn.Parameter(torch.rand(C) - 1.7)
        self.key, self.value, self.receptance, self.output = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.key_norm = nn.LayerNorm(C) if key_norm else None

    def run(self, x, patch_resolution):
        B, T, C = x.shape
        k, v, r = (f(m) for f, m in zip((self.key, self.value, self.receptance), self.mixed(x, patch_resolution)))
        y = RUN_CUDA(B, T, C, self.spatial_decay / T, self.spatial_first / T, k, v)
        if self.key_norm is not None:
            y = self.key_norm(y)
        return self.output(torch.sigmoid(r) * y)


class VRWKV_ChannelMix(Mix):
    names = ("spatial_mix_k", "spatial_mix_r")

    def __init__(self, C, shift_pixel=1, channel_gamma=1 / 4, key_norm=False, with_cp=False):
        super().__init__(C, shift_pixel, channel_gamma, with_cp)
        self.key, self.receptance, self.value = (nn.Linear(a, b, bias=False) for a, b in ((C, 4 * C), (C, C), (4 * C, C)))
        self.key_norm = nn.LayerNorm(4 * C) if key_norm else None

    def run(self, x, patch_resolution):
        xk, xr = self.mixed(x, patch_resolution)
        k = torch.square(torch.relu(self.key(xk)))
        if self.key_norm is not None:
            k = self.key_norm(k)
        return torch.sigmoid(self.receptance(xr)) * self.value(k)


class Block(nn.Module):
    def __init__(self, C, **options):
        super().__init__()
        self.ln1, self.att = nn.LayerNorm(C), VRWKV_SpatialMix(C, **options)
        self.ln2, self.ffn = nn.LayerNorm(C), VRWKV_ChannelMix(C, **options)

    def forward(self, x, patch_resolution):
        x = x + self.att(self.ln1(x), patch_resolution)
        return x + self.ffn(self.ln2(x), patch_resolution)


class VisionRWKV(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes): patches, position embedding, blocks, mean over tokens, linear layer."""

    def __init__(self, image=224, patch=16, C=192, layers=12, classes=1000, **options):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, C, patch, patch)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, C))
        self.blocks = nn.ModuleList(Block(C, **options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, classes)

    def forward(self, images):
        x = self.patch_embed(images)
        patch_resolution = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, patch_resolution)
        return self.head(self.norm(x).mean(1))
