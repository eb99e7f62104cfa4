"""token_shift and relu_squared: the public functions and the operators behind them."""

import math

import torch
from torch import Tensor

from .. import dispatch, memory, reference, tuning
from ..checks import check_data, is_number
from ..dtypes import DATA_DTYPES, state_dtype
from ..layout import empty_like
from .operator import kernels, register

MIXES = 6  # an RWKV-7 block has six

# --- token_shift ------------------------------------------------------------------------------------------------------------


def _shift_outputs(x, mixes, dtype):
    return tuple(memory.empty_contiguous(x.shape if i < mixes.shape[0] else (0,), dtype, x) for i in range(MIXES))


def _shift(x, last, mixes, norm_eps, dtype, backend):
    outs = _shift_outputs(x, mixes, dtype)
    if x.numel():
        kernels(backend, "mix").token_shift_forward(
            x, last, mixes.contiguous(), norm_eps, outs[: mixes.shape[0]], tuning.current()
        )
    return outs


def _shift_fake(x, last, mixes, norm_eps, dtype, backend):
    return _shift_outputs(x, mixes, dtype)


def _shift_backward_outputs(x, last, mixes, parameters):
    """Allocate dx, d last and d mixes. Gradients that are not requested are empty tensors."""
    dlast = x.new_empty(0 if last is None else last.shape)
    return memory.empty_contiguous(x.shape, x.dtype, x), dlast, mixes.new_empty(mixes.shape if parameters else 0)


def _shift_backward(*args):
    gs, (x, last, mixes, norm_eps, parameters, backend) = args[:MIXES], args[MIXES:]
    dx, dlast, dmixes = _shift_backward_outputs(x, last, mixes, parameters)
    used = [i for i, g in enumerate(gs) if g is not None]
    if x.numel() == 0 or not used:
        return dx.zero_(), dlast.zero_(), dmixes.zero_()
    if len(used) < mixes.shape[0]:
        gs, part = [gs[i] for i in used], mixes[used]
    else:
        gs, part = gs[: len(used)], mixes.contiguous()
    sums = kernels(backend, "mix").token_shift_backward(
        gs, x, last, part, norm_eps, dx, None if last is None else dlast, parameters, tuning.current()
    )
    if parameters:
        if len(used) < mixes.shape[0]:
            dmixes.zero_()[used] = sums.sum(0)
        else:
            torch.sum(sums, 0, out=dmixes)
    return dx, dlast, dmixes


def _shift_backward_fake(*args):
    x, last, mixes, _, parameters, _ = args[MIXES:]
    return _shift_backward_outputs(x, last, mixes, parameters)


def _shift_save(ctx, inputs, output):
    x, last, mixes, ctx.norm_eps, _, ctx.backend = inputs
    ctx.save_for_backward(x, last, mixes)
    ctx.set_materialize_grads(False)


def _shift_gradient(ctx, *gs):
    x, last, mixes = ctx.saved_tensors
    gs = [g if i < mixes.shape[0] else None for i, g in enumerate(gs)]  # compiled graphs pass zeros for empty outputs
    if not any(g is not None for g in gs):
        return ()
    return _shift_backward_call(*gs, x, last, mixes, ctx.norm_eps, ctx.needs_input_grad[2], ctx.backend)


_shift_call = register(
    "token_shift(Tensor x, Tensor? last, Tensor mixes, float? norm_eps, ScalarType dtype, str backend) -> "
    f"({', '.join(['Tensor'] * MIXES)})",
    _shift,
    _shift_fake,
    batch_axes=(0, 0, None),
    output_axes=(0,) * MIXES,
    save=_shift_save,
    gradient=_shift_gradient,
)
_shift_backward_call = register(
    f"token_shift_backward({', '.join(f'Tensor? g{i}' for i in range(MIXES))}, Tensor x, Tensor? last, Tensor mixes, "
    "float? norm_eps, bool parameters, str backend) -> (Tensor, Tensor, Tensor)",
    _shift_backward,
    _shift_backward_fake,
    batch_axes=(*(0,) * MIXES, 0, 0, None),
    output_axes=(0, 0, None),
)


# --- relu_squared -----------------------------------------------------------------------------------------------------------


def _like(x):
    return empty_like(x.unsqueeze(0), x.dtype, False).squeeze(0)


def _relu_squared(x, backend):
    out = _like(x)
    if x.numel():
        kernels(backend, "mix").relu_squared_forward(x, out, tuning.current())
    return out


def _relu_squared_backward(g, x, backend):
    dx = _like(x)
    if x.numel():
        kernels(backend, "mix").relu_squared_backward(g, x, dx, tuning.current())
    return dx


def _relu_squared_save(ctx, inputs, output):
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _relu_squared_gradient(ctx, g):
    return (_relu_squared_backward_call(g, *ctx.saved_tensors, ctx.backend),)


_relu_squared_call = register(
    "relu_squared(Tensor x, str backend) -> Tensor",
    _relu_squared,
    lambda x, backend: _like(x),
    batch_axes=(0,),
    output_axes=(0,),
    save=_relu_squared_save,
    gradient=_relu_squared_gradient,
)
_relu_squared_backward_call = register(
    "relu_squared_backward(Tensor g, Tensor x, str backend) -> Tensor",
    _relu_squared_backward,
    lambda g, x, backend: _like(x),
    batch_axes=(0, 0),
    output_axes=(0,),
)


# --- the public functions ---------------------------------------------------------------------------------------------------


def _check_mix(name, m, x):
    if not isinstance(m, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(m).__name__}")
    if m.dtype not in DATA_DTYPES or torch.promote_types(m.dtype, x.dtype) != m.dtype:
        raise TypeError(
            f"{name} must be a floating tensor at least as wide as x ({x.dtype}), got {m.dtype}; cast it: {name}.to({x.dtype})"
        )
    C = x.shape[-1]
    if m.dim() == 0 or m.shape[-1] != C or m.numel() != C:
        raise ValueError(f"{name} must have shape ({C},) or (1, 1, {C}), one number per channel, got {tuple(m.shape)}")
    if m.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {m.device}")


def token_shift(
    x: Tensor,
    *mixes: Tensor,
    norm_eps: float | None = None,
    last: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    r"""RWKV's token shift: mix every token with the previous token, channel by channel. Fused with the LayerNorm before it.

    For every mix vector m, in one pass over x::

        xn[t]  = (x[t] - mean(x[t])) / sqrt(var(x[t]) + norm_eps)      x[t] if norm_eps is None
        out[t] = xn[t] * m + xn[t-1] * (1 - m)                         xn[-1]: 0, or ``last``, normalised in the same way

    The op reads x once and writes one output per mix. The backward pass keeps x and the mixes. It reads x and the upstream
    gradients once, recomputes the norm, and writes dx once. Gradients of the mixes are the same bit for bit in every run.

    Args:
        x: tokens, (..., L, C), float32, float64, bfloat16 or float16, any strides; L tokens, C channels. The arithmetic is
            float32, or float64 for float64 data.
        mixes: 1 to 6 vectors, (C,) or (1, 1, C), in the dtype of x or a wider one.
        norm_eps: the eps of a LayerNorm over C without affine parameters, before the shift. None: no norm.
        last: the token before x[..., 0, :], (..., C), in the dtype of x and, like x, not normalised. None: zeros instead. To
            split a sequence into slices, pass each slice ``x[..., -1, :]`` of the previous slice.
        dtype: dtype of the outputs and of the upstream gradients. None: the dtype of x. For float32 x under autocast, use
            bfloat16 or float16: autocast then does not cast the inputs of the matrix multiplications, and a cast moves more
            bytes than this op.

    Returns:
        A tuple with one tensor per mix, also for a single mix; each has the shape of x and is contiguous. Gradients reach x,
        the mixes and last.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Peng et al., RWKV, arXiv 2305.13048, section 3.1.

    Example:
        >>> import torch
        >>> from sdit_kernels import token_shift
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> k, r = token_shift(x, torch.tensor([0.5]), torch.tensor([1.0]))
        >>> k.flatten().tolist(), r.flatten().tolist()
        ([0.5, 1.5, 3.0], [1.0, 2.0, 4.0])
        >>> token_shift(x[1:], torch.tensor([0.5]), last=x[0])[0].flatten().tolist()
        [1.5, 3.0]
    """
    check_data("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have axes for tokens and channels, (..., L, C), got {tuple(x.shape)}")
    if not 1 <= len(mixes) <= MIXES:
        raise ValueError(f"token_shift takes 1 to {MIXES} mixes, got {len(mixes)}")
    for i, m in enumerate(mixes):
        _check_mix(f"mixes[{i}]", m, x)
    if norm_eps is not None:
        if not is_number(norm_eps):
            raise TypeError(f"norm_eps must be a number or None (no norm), got {type(norm_eps).__name__}")
        tiny = torch.finfo(state_dtype(x.dtype)).tiny  # a smaller number may be 0 in the kernel
        if not tiny <= norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive and finite ({tiny:.2g} at least), or None (no norm), got {norm_eps}")
    if last is not None:
        if not isinstance(last, Tensor):
            raise TypeError(f"last must be a tensor or None, got {type(last).__name__}")
        shape = (*x.shape[:-2], x.shape[-1])
        if last.shape != shape:
            raise ValueError(f"last must have the shape of one token of x, {shape}, got {tuple(last.shape)}")
        if last.dtype != x.dtype:
            raise TypeError(f"last must have the dtype of x, {x.dtype}, got {last.dtype}; cast it: last.to({x.dtype})")
        if last.device != x.device:
            raise ValueError(f"last must be on the device of x, {x.device}, got {last.device}")
    if dtype is None:
        dtype = x.dtype
    elif dtype != x.dtype and not (x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)):
        narrower = ", bfloat16 or float16" if x.dtype == torch.float32 else ""
        raise TypeError(f"dtype must be None or the dtype of x, {x.dtype}{narrower}, got {dtype!r}")
    backend = dispatch.choose(x.device)
    if backend == "reference":
        return reference.token_shift(x, *mixes, norm_eps=norm_eps, last=last, dtype=dtype)
    state = state_dtype(x.dtype)
    stacked = torch.stack([m.reshape(-1).to(state) for m in mixes])
    return tuple(_shift_call(x, last, stacked, None if norm_eps is None else float(norm_eps), dtype, backend))[: len(mixes)]


def relu_squared(x: Tensor) -> Tensor:
    r"""Squared ReLU, max(x, 0)^2: the activation of RWKV's channel mix, fused, forward and backward.

    The backward pass keeps only x. It reads x and the upstream gradient g and writes ``2 max(x, 0) g``.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16. The arithmetic is float32, or float64 for float64 data.

    Returns:
        A tensor with the shape and dtype of x.

    Raises:
        TypeError: x is not a tensor, or has another dtype.
        RuntimeError: the chosen backend cannot serve x, or a second derivative is requested.

    Source: So et al., Primer, arXiv 2109.08668; Peng et al., RWKV, arXiv 2305.13048.

    Example:
        >>> import torch
        >>> from sdit_kernels import relu_squared
        >>> relu_squared(torch.tensor([-1.0, 0.5, 3.0])).tolist()
        [0.0, 0.25, 9.0]
    """
    check_data("x", x)
    backend = dispatch.choose(x.device)
    if backend == "reference":
        return reference.relu_squared(x)
    return _relu_squared_call(x, backend)
