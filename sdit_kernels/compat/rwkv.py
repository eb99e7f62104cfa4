"""Run the mixing layers of RWKV-4 models from other libraries on the ops of this package; and the function ``RUN_CUDA``.

This module does not import the libraries. It recognises a layer by the names of its parameters, and replaces it only if it
computes the same as RWKV-4. The page "RWKV-4" of the documentation lists the fused parts and the differences.
"""

import re
from typing import overload

import torch
from torch import Tensor, nn

from ..dtypes import autocast_dtype, state_dtype
from ..nn import ChannelMix, TimeMix
from ..ops.mix import relu_squared, token_shift
from ..ops.wkv import wkv, wkv_state_from_rwkv, wkv_state_to_rwkv
from .layers import (
    Call,
    Form,
    Layer,
    OwnCode,
    accelerate_layers,
    as_wide,
    check_floating,
    choose_call,
    unless_counted,
    why_forward_is_fixed,
    why_unlike,
)
from .swap import Report, Swapped, class_names, swap_back

__all__ = ["RUN_CUDA", "accelerate", "restore"]


# --- RUN_CUDA of RWKV-LM and its copies -------------------------------------------------------------------------------------


@overload
def RUN_CUDA(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, last_state: None = ...) -> Tensor: ...
@overload
def RUN_CUDA(
    B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, last_state: Tensor
) -> tuple[Tensor, Tensor]: ...


def RUN_CUDA(
    B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, last_state: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    r"""RWKV-4's WKV scan with the name and arguments of ``RUN_CUDA`` in RWKV-LM (folders RWKV-v4 and RWKV-v4neo).

    ::

        y[t] = (sum_{i<t} e^(k[i] - (t-1-i) e^w) v[i]  +  e^(u + k[t]) v[t]) / (the same sum without v)

    w is the parameter ``time_decay``; the function computes -exp(w), and the gradient is the gradient of w. In a model file,
    ``from sdit_kernels.compat.rwkv import RUN_CUDA`` replaces the lines that compile ``wkv_cuda``, ``class WKV`` and ``def
    RUN_CUDA``.

    Unlike RWKV-LM's function, this one takes any device that the package serves, any T (no ``T_MAX``), any C and any strides. y
    has the dtype of k; in RWKV-LM, ``RWKV_FLOAT_MODE`` sets it. A gradient has the dtype of its tensor. Two other functions are
    different: ``wkv_cuda.forward``, whose w is -exp(time_decay), and ``RUN_CUDA`` of Vision-RWKV, which is bidirectional. For
    the latter there is :func:`sdit_kernels.compat.vision_rwkv.RUN_CUDA`.

    Args:
        B: batch size, the first axis of k.
        T: number of tokens, the second axis of k.
        C: number of channels, the third axis of k.
        w: time_decay, (C,), any floating dtype.
        u: time_first, (C,), any floating dtype.
        k: keys, (B, T, C), float32, float64, bfloat16 or float16.
        v: values, (B, T, C). If k and v have two dtypes, the function computes in the wider one.
        last_state: aa, bb, pp of RWKV's own code after the earlier tokens, (B, C, 3), float32 (float64 for float64 data). Some
            copies pass it to train on slices of a sequence. Before any token it is 0, 0, -1e38. None: no state.

    Returns:
        y, (B, T, C), with the dtype of k; with ``last_state`` the pair (y, new_state), where new_state has the form of
        last_state. bb is 1 in new_state and another number in RWKV's code; aa e^pp and bb e^pp are the same. Gradients reach w,
        u, k, v and last_state.

    Raises:
        TypeError, ValueError: (B, T, C) is not the shape of k; otherwise as in :func:`sdit_kernels.wkv`.

    Source: the interface of BlinkDL's RWKV-LM; Peng et al., RWKV, arXiv 2305.13048.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.rwkv import RUN_CUDA
        >>> w, u, k = torch.full((2,), -torch.inf), torch.zeros(2), torch.zeros(1, 3, 2)  # -exp(w) = 0: no decay
        >>> RUN_CUDA(1, 3, 2, w, u, k, torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1).repeat(1, 1, 2))[0, :, 0]
        tensor([1.0000, 1.5000, 3.0000])
    """
    check_floating(w=w, u=u, k=k, v=v)
    if k.shape != (B, T, C):
        raise ValueError(f"k must have the shape (B, T, C) = ({B}, {T}, {C}), got {tuple(k.shape)}")
    dtype = torch.promote_types(k.dtype, v.dtype)
    k_, v_ = k.to(dtype), v.to(dtype)
    w, u = as_wide(w, k_), as_wide(u, k_)
    if last_state is None:
        return wkv(w, u, k_, v_).to(k.dtype)
    if not isinstance(last_state, Tensor):
        raise TypeError(f"last_state must be a tensor or None, got {type(last_state).__name__}")
    if last_state.shape != (B, C, 3):
        raise ValueError(f"last_state must have the shape (B, C, 3) = ({B}, {C}, 3), got {tuple(last_state.shape)}")
    if last_state.dtype != state_dtype(dtype):
        raise TypeError(f"last_state must be {state_dtype(dtype)} for data of {dtype}, got {last_state.dtype}")
    y, state = wkv(w, u, k_, v_, state=wkv_state_from_rwkv(*last_state.unbind(-1)), return_state=True)
    return y.to(k.dtype), torch.stack(wkv_state_to_rwkv(*state), -1)


# --- the fused layers -------------------------------------------------------------------------------------------------------


class _OwnCode(OwnCode):
    family, run_cuda = "RWKV-4", RUN_CUDA


class _Call(_OwnCode, Call):
    """A layer that runs its own code with our RUN_CUDA."""


class _Fused(Layer):
    """Base class of the fused layers. The annotations name parameters and children of the layer."""

    own_code = _OwnCode
    time_decay: Tensor
    time_first: Tensor
    key: nn.Module
    value: nn.Module
    receptance: nn.Module
    output: nn.Module
    layer_id: int

    def _shift(self, x, last, *names):
        mixes = [as_wide(getattr(self, name), x) for name in names]
        if last is not None and x.shape[1] == 1 and all(m.dtype == x.dtype for m in mixes):
            return [torch.lerp(last.unsqueeze(1), x, m) for m in mixes]  # one token: plain PyTorch, see _step
        return token_shift(x, *mixes, last=last, dtype=autocast_dtype(x))

    def _scan(self, xk, xv, xr, state, return_state):
        """Return (output, new state). Both states are None or aa, bb, pp of RWKV's own code."""
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        w, u = as_wide(self.time_decay, k), as_wide(self.time_first, k)
        if state is not None:
            state = [s.to(state_dtype(k.dtype)) for s in state]
            if k.shape[1] == 1:
                y, state = _step(w, u, k, v, r, *state)
                return self.output(y), state
            state = wkv_state_from_rwkv(*state)
        y = wkv(w, u, k, v, r=r, state=state, return_state=return_state)
        y, state = y if return_state else (y, None)
        return self.output(y), None if state is None else wkv_state_to_rwkv(*state)

    def _gate(self, xk, xr):
        return torch.sigmoid(self.receptance(xr)) * self.value(relu_squared(self.key(xk)))


def _step(w, u, k, v, r, aa, bb, pp):
    """Process a single token, (B, 1, C), with RWKV's own state, (B, C), in plain PyTorch.

    There is nothing to fuse. A call of wkv would convert the state in both directions and take twice as long.
    """
    k_, v_, r_ = (t[:, 0].to(aa.dtype) for t in (k, v, r))
    bonus, decayed = u.to(aa.dtype) + k_, pp - torch.exp(w.to(aa.dtype))
    o = torch.maximum(pp, bonus)
    old, now = torch.exp(pp - o), torch.exp(bonus - o)
    y = torch.sigmoid(r_) * (old * aa + now * v_) / (old * bb + now)
    o = torch.maximum(decayed, k_)
    old, now = torch.exp(decayed - o), torch.exp(k_ - o)
    return y.to(k.dtype).unsqueeze(1), (old * aa + now * v_, old * bb + now, o)


def _row(state, layer, like):
    """Return the slice of a layer from a state of transformers, (B, C, layers).

    If autograd may need it, the slice is a copy, because the layer writes to the state in place.
    """
    return state[:, :, layer].to(like.dtype, copy=torch.is_grad_enabled())


class _TransformersTimeMix(_Fused):
    @unless_counted
    def forward(self, hidden, state=None, use_cache=False):
        last = scan = None
        if state is not None:
            last = _row(state[1], self.layer_id, hidden)
            scan = [_row(s, self.layer_id, s) for s in state[2:]]
        mixed = self._shift(hidden, last, "time_mix_key", "time_mix_value", "time_mix_receptance")
        out, scan = self._scan(*mixed, scan, state is not None)
        if state is not None:
            for old, new in zip(state[1:], (hidden[:, -1], *scan)):
                old[:, :, self.layer_id] = new
        return out, state


class _TransformersChannelMix(_Fused):
    @unless_counted
    def forward(self, hidden, state=None):
        last = None if state is None else _row(state[0], self.layer_id, hidden)
        out = self._gate(*self._shift(hidden, last, "time_mix_key", "time_mix_receptance"))
        if state is not None:
            state[0][:, :, self.layer_id] = hidden[:, -1]
        return out, state


class _TimeMix(_Fused):
    @unless_counted
    def forward(self, x):
        return self._scan(*self._shift(x, None, "time_mix_k", "time_mix_v", "time_mix_r"), None, False)[0]


class _ChannelMix(_Fused):
    @unless_counted
    def forward(self, x):
        return self._gate(*self._shift(x, None, "time_mix_k", "time_mix_r"))


# --- which layers are replaced ----------------------------------------------------------------------------------------------


class _TransformersForm(Form):
    def inputs(self, layer, widths, normal):
        """Return a call without state and one with the state of transformers: the last three tensors are num, den, max."""
        (inner, outer), x = widths, normal(2, 5, widths[1])
        state = [normal(2, width, layer.layer_id + 1) for width in (outer, outer, inner, inner, inner)]
        state[3].exp_()  # a sum of exponentials
        return [(x, None), (x, state)]

    def outputs(self, result):
        out, state = result
        return [out] if state is None else [out, *state[:2], *wkv_state_from_rwkv(*state[2:])]


_SCAN = ("time_decay", "time_first")
_TIME, _CHANNEL = ("key", "value", "receptance", "output"), ("key", "receptance", "value")
_FORMS = (
    _TransformersForm(_TransformersTimeMix, (*_SCAN, "time_mix_key", "time_mix_value", "time_mix_receptance"), _TIME),
    _TransformersForm(_TransformersChannelMix, ("time_mix_key", "time_mix_receptance"), _CHANNEL),
    Form(_TimeMix, (*_SCAN, "time_mix_k", "time_mix_v", "time_mix_r"), _TIME),
    Form(_ChannelMix, ("time_mix_k", "time_mix_r"), _CHANNEL),
)
_VISION = {"spatial_decay", "spatial_mix_k"}
_MARKS = {  # names of parameters that only RWKV layers have
    *(name for form in _FORMS for name in form.parameters), "time_faaaa", "time_maa_k", *_VISION,
}  # fmt: skip


_RWKV_NAME = re.compile(r"(?i:rwkv|time_?mix|channel_?mix)|[TC][Mm]ix")


def _suspect(module: nn.Module) -> str | None:
    """Return the reason why a layer with the name of an RWKV layer, but without RWKV-4's parameters, is left; else None."""
    if next(module.parameters(recurse=False), None) is None:
        return None
    if any(_RWKV_NAME.search(name) for _, name in class_names(module)):
        return "it has the name of an RWKV's layer, but not the parameters of RWKV-4, for example time_decay or time_mix_k"
    return None


def _choose(module: nn.Module) -> tuple[type[Swapped] | None, str]:
    """Return (the class for the layer or None, the reason why it is not fully fused); (None, "") if it is not an RWKV layer."""
    own = dict(module.named_parameters(recurse=False))
    if _MARKS.isdisjoint(own) or isinstance(module, TimeMix | ChannelMix | Swapped):
        return None, ""
    if not _VISION.isdisjoint(own):
        return None, "it is a layer of Vision-RWKV: use sdit_kernels.compat.vision_rwkv"
    fixed = why_forward_is_fixed(module)
    if fixed is not None:
        return None, fixed
    why = "it belongs to another version of RWKV, or to another form of RWKV-4"
    for form in _FORMS:
        if ("time_decay" in own) is ("time_decay" in form.parameters) and own.keys() >= set(form.parameters):
            found = why_unlike(module, form)
            if found is None:
                return form.fused, ""
            why = found
    scan = [own.get(name) for name in _SCAN]
    if any(p is None or p.dim() != 1 for p in scan):
        return None, why
    return choose_call(module, _Call, (7, 8), "7, or 8 with a state", why)


# --- the public functions ---------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module) -> Report:
    r"""Run the mixing layers of an RWKV-4 model on the ops of this package, in place, on CPUs and GPUs.

    The function recognises the layers of Hugging Face transformers (``RwkvSelfAttention``, ``RwkvFeedForward``, 4.29 to 5.24),
    and the layers of RWKV-LM (``RWKV_TimeMix``, ``RWKV_ChannelMix``) and its copies under any class name. It fuses the token
    shift and the gated scan of a time mix, and the token shift and the squared ReLU of a channel mix.

    It replaces a layer only if the layer's own forward and the fused forward give the same result on a few random tokens, in
    training and evaluation mode, on common and on large values, and if the layer draws no random numbers. The check uses cheap
    stand-ins for the projections. It does not detect limits above about 1e5 on outputs or 100 on keys. Nor does it detect a
    behaviour that depends on dtype, device or length, or on later changes of attributes (the p of a dropout). A layer with
    more parts than RWKV-4 that calls ``RUN_CUDA`` gets :func:`RUN_CUDA` of this module and otherwise runs its own code;
    ``torch.compile`` then leaves the layer out of its graph.

    Each layer stays the same object with the same parameters, children, hooks and state_dict keys. Its class becomes a subclass
    of its class, so ``type(layer) is TimeMix`` is False. Optimisers, checkpoints, ``save_pretrained``, copies, pickles and
    ``generate`` work as before. While one of SpikingJelly's counters is active, the layers run their own code, with a warning.
    ``torch.fx`` cannot trace through a fused layer.

    The page "RWKV-4" of the documentation lists the differences from transformers. The most important ones: results agree to
    rounding; decoding with a state is right for every batch size; gradients pass through the state.

    Args:
        model: any module; the function searches all of it for RWKV layers. Call it before you wrap the model (FSDP, hooks that
            replace ``forward``) or compile it. A second call changes nothing more.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of all
        other RWKV layers, and of layers of which only the call of ``RUN_CUDA`` is replaced.

    Raises:
        TypeError: model is not a module.

    Source: Peng et al., RWKV, arXiv 2305.13048.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat import rwkv
        >>> class ChannelMix(torch.nn.Module):  # as RWKV-LM has it
        ...     def __init__(self, C):
        ...         super().__init__()
        ...         self.time_mix_k, self.time_mix_r = (torch.nn.Parameter(torch.rand(1, 1, C)) for _ in range(2))
        ...         self.key, self.receptance, self.value = (torch.nn.Linear(C, C, bias=False) for _ in range(3))
        ...     def forward(self, x):
        ...         last = torch.nn.functional.pad(x, (0, 0, 1, -1))
        ...         k, r = (x * m + last * (1 - m) for m in (self.time_mix_k, self.time_mix_r))
        ...         return torch.sigmoid(self.receptance(r)) * self.value(torch.relu(self.key(k)) ** 2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), ChannelMix(8))
        >>> print(rwkv.accelerate(model))
        RWKV: 1 replaced, 0 left as they were
          1  ChannelMix: fused
        >>> rwkv.restore(model).replaced
        (('1', 'ChannelMix'),)
    """
    return accelerate_layers("RWKV", model, _choose, _suspect)


def restore(model: nn.Module) -> Report:
    """Undo :func:`accelerate`: every layer runs its own code again.

    Args:
        model: the model that ``accelerate`` changed, or a part, copy or unpickled copy of it. The function changes it in place.

    Returns:
        A report like the report of ``accelerate``. ``replaced`` holds the layers that run their own code again.

    Raises:
        TypeError: model is not a module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.rwkv import restore
        >>> restore(torch.nn.Linear(1, 1)).replaced
        ()
    """
    return swap_back("RWKV", model, (_Fused, _Call))
