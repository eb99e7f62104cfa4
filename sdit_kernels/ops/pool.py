"""Max-pooling for packed_spikes: the backward pass needs the place of each maximum in its window, which takes two bits."""

import torch
from torch import Tensor

from .. import dispatch, packed, tuning
from ..dtypes import DATA_DTYPES
from ..memory import empty_contiguous
from ..reference.pool import MOST, codes_shape
from .operator import kernels, register


def _allocate(x, kh, kw):
    y = empty_contiguous((x.shape[0], x.shape[1] // kh, x.shape[2] // kw), x.dtype, x)
    return y, torch.empty(codes_shape(*y.shape, (kh, kw)), dtype=torch.uint8, device=x.device)


def _max_pool(x, kh, kw, backend):
    y, codes = _allocate(x, kh, kw)
    kernels(backend, "pool").max_pool_forward(x.contiguous(), (kh, kw), y, codes, tuning.current())
    return y, codes


def _gradient_like(g, H, W):
    return empty_contiguous((g.shape[0], H, W), g.dtype, g)


def _max_pool_backward(g, codes, kh, kw, H, W, backend):
    dx = _gradient_like(g, H, W)
    kernels(backend, "pool").max_pool_backward(g.contiguous(), codes, (kh, kw), dx, tuning.current())
    return dx


def _save(ctx, inputs, outputs):
    x, *ctx.window, ctx.backend = inputs
    ctx.size = x.shape[1:]
    ctx.save_for_backward(outputs[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx, g, _):
    return (None if g is None else _backward_call(g, *ctx.saved_tensors, *ctx.window, *ctx.size, ctx.backend),)


_call = register(
    "max_pool(Tensor x, int kh, int kw, str backend) -> (Tensor, Tensor)",
    _max_pool,
    lambda x, kh, kw, backend: _allocate(x, kh, kw),
    batch_axes=(0,),
    output_axes=(0, 0),
    save=_save,
    gradient=_gradient,
    flatten=True,
)
_backward_call = register(
    "max_pool_backward(Tensor g, Tensor codes, int kh, int kw, int H, int W, str backend) -> Tensor",
    _max_pool_backward,
    lambda g, codes, kh, kw, H, W, backend: _gradient_like(g, H, W),
    batch_axes=(0, 0),
    output_axes=(0,),
    flatten=True,
)


def max_pool(x: Tensor, window: tuple[int, int]) -> Tensor | None:
    """Return the maxima (.., H // kh, W // kw) of x (.., H, W) over windows (kh, kw) side by side, as torch's max_pool2d does.

    Nothing but the places of the maxima is kept for the backward pass, in 2 bits each for up to 4 elements in a window, 4 for
    up to 16, 8 for up to 256. Return None if the kernels cannot take x or the window.
    """
    (kh, kw), shape = window, x.shape
    if x.dim() < 3 or x.dtype not in DATA_DTYPES or x.device.type not in ("cpu", "cuda") or kh * kw > 256:
        return None
    fits = kh <= shape[-2] and kw <= shape[-1] and shape[-1] // kw <= MOST and x.numel() > 0
    if not fits or not x.is_contiguous():  # torch pools channels_last in place
        return None
    backend = dispatch.choose(x.device)
    if backend == "reference":
        return None
    y, _ = _call(x.reshape(-1, *shape[-2:]), kh, kw, backend)
    packed.note_same(y, x)
    return y.view(*shape[:-2], *y.shape[-2:])
