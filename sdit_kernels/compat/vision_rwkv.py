"""Run the mixing layers of Vision-RWKV, and of models made from it, on the ops of this package; and the function ``RUN_CUDA``.

This module does not import the models. It recognises a layer by the names of its parameters, and replaces it only if it
computes the same as Vision-RWKV's. The page "Vision-RWKV" of the documentation lists the fused parts and the differences.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ..dtypes import state_dtype
from ..ops.mix import relu_squared
from ..ops.wkv import wkv
from .layers import (
    Call,
    Form,
    Layer,
    OwnCode,
    accelerate_layers,
    argument_names,
    as_wide,
    calls_run_cuda,
    check_floating,
    choose_call,
    unless_counted,
    why_forward_is_fixed,
    why_unlike,
)
from .swap import Report, Swapped, class_names, swap_back

__all__ = ["RUN_CUDA", "accelerate", "restore"]


# --- RUN_CUDA of Vision-RWKV and its copies ---------------------------------------------------------------------------------


@overload
def RUN_CUDA(B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...
@overload
def RUN_CUDA(w: Tensor, u: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


def RUN_CUDA(*arguments: Any) -> Tensor:
    r"""Vision-RWKV's two-way scan (Bi-WKV), with the name and arguments of ``RUN_CUDA`` in its files.

    ::

        y[t] = (sum_{i != t} e^(k[i] - (|t-i| - 1) w) v[i]  +  e^(u + k[t]) v[t]) / (the same sum without v)

    The models call ``RUN_CUDA(B, T, C, spatial_decay / T, spatial_first / T, k, v)``. Since February 2025, Vision-RWKV itself
    calls ``RUN_CUDA(spatial_decay / T, spatial_first / T, k, v)``. The function takes both forms. In a model file, ``from
    sdit_kernels.compat.vision_rwkv import RUN_CUDA`` replaces the lines that compile the extension, ``T_MAX``, ``class WKV``
    and ``def RUN_CUDA``.

    It runs on the device of k, and does not move tensors to a GPU. It takes any T (no ``T_MAX``), any B and C, and any strides.
    Vision-RWKV adds 1e-6 to the denominator, which changes y by at most 1e-6 of its value. This function does not.

    This is the formula of the paper. Vision-RWKV's CUDA kernel differs from it: the kernel cuts the tokens into up to 32 parts,
    and most tokens get the exponent |t-i| w. The page "Vision-RWKV" of the documentation says by how much the results differ.
    For T <= 32 the kernel equals this function with u + w instead of u.

    Args:
        arguments: B, T, C, w, u, k, v, or only w, u, k, v; by position.

            - B, T, C: the shape of k.
            - w: decay per token, (C,), any floating dtype, any sign. w < 0 gives distant tokens more weight.
            - u: bonus of the current token, (C,), any floating dtype.
            - k: keys, (B, T, C), float32, float64, bfloat16 or float16.
            - v: values, (B, T, C).

    Returns:
        y, (B, T, C). As in Vision-RWKV, y is float16 or bfloat16 if w is, else float32 (float64 if an argument is float64). The
        arithmetic is float32 or float64. Gradients reach w, u, k and v, and have the dtype of their tensor.

    Raises:
        TypeError, ValueError: the number of arguments is neither 7 nor 4; (B, T, C) is not the shape of k; otherwise as in
            :func:`sdit_kernels.wkv`, where w is called log_decay and u time_first.

    Source: the interface of OpenGVLab's Vision-RWKV; Duan et al., Vision-RWKV, arXiv 2403.02308.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.vision_rwkv import RUN_CUDA
        >>> w, u, k = torch.full((2,), torch.inf), torch.zeros(2), torch.zeros(1, 3, 2)  # w: only the nearest tokens count
        >>> v = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1).repeat(1, 1, 2)
        >>> RUN_CUDA(1, 3, 2, w, u, k, v)[0, :, 0]
        tensor([1.5000, 3.0000, 4.0000])
        >>> torch.equal(RUN_CUDA(w, u, k, v), RUN_CUDA(1, 3, 2, w, u, k, v))
        True
    """
    if len(arguments) not in (4, 7):
        raise TypeError(f"RUN_CUDA takes B, T, C, w, u, k, v, or w, u, k, v, got {len(arguments)} arguments")
    *shape, w, u, k, v = arguments
    check_floating(w=w, u=u, k=k, v=v)
    if shape and k.shape != torch.Size(shape):
        raise ValueError(f"k must have the shape (B, T, C) = ({', '.join(map(str, shape))}), got {tuple(k.shape)}")
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (w, u, k, v)))
    y = _bi_wkv(w, u, k.to(dtype), v.to(dtype))
    return y.to(w.dtype if w.dtype in (torch.float16, torch.bfloat16) else state_dtype(dtype))


def _bi_wkv(w, u, k, v, r=None):
    w, u = (t.to(state_dtype(k.dtype)) for t in (w, u))
    return wkv(None, u, k, v, r=r, log_decay=-w, bidirectional=True)


# --- the fused layers -------------------------------------------------------------------------------------------------------


class _OwnCode(OwnCode):
    family, run_cuda = "Vision-RWKV", RUN_CUDA


class _Call(_OwnCode, Call):
    """A layer that runs its own code with our RUN_CUDA."""


def _shift_not(layer, x, resolution):
    return x


def _shift_own(layer, x, resolution):
    return layer.shift_func(x, layer.shift_pixel, layer.channel_gamma, resolution)


def _q_shift(layer, x, resolution):
    """Vision-RWKV's q_shift of tokens (B, H * W, C): four groups of channels move by ``shift_pixel`` right, left, down and up.

    Each group has the share ``channel_gamma`` of the channels. The rest stays. Empty places get zeros. Vision-RWKV copies the
    tokens to (B, C, H, W) and back; this code does not, and takes half the time for the forward and backward pass.
    """
    n, ends = layer.shift_pixel, [int(x.shape[-1] * layer.channel_gamma * i) for i in (1, 2, 3, 4)]
    right, left, down, up, rest = x.unflatten(1, resolution).tensor_split(ends, -1)
    moved = (
        pad(right, (0, 0, n, -n)), pad(left, (0, 0, -n, n)), pad(down, (0, 0, 0, 0, n, -n)), pad(up, (0, 0, 0, 0, -n, n)), rest,
    )  # fmt: skip
    return torch.cat(moved, -1).flatten(1, 2)


class _Mix(Layer):
    """Base class of the fused layers. The annotations name parameters, children and attributes of the layer."""

    own_code = _OwnCode
    fused_shift: Callable
    resolution_name: str
    key: nn.Module
    value: nn.Module
    receptance: nn.Module
    output: nn.Module
    spatial_decay: Tensor
    spatial_first: Tensor

    @classmethod
    def made_from(cls, mixin, original):
        super().made_from(mixin, original)
        cls.resolution_name = argument_names(original.forward)[2]  # patch_resolution, or resolution in many copies

    @unless_counted
    def forward(self, x, *args, **kwargs):
        given = (*args, *kwargs.values())
        resolution = given[0] if given else None
        needs_resolution = type(self).fused_shift is _q_shift
        if (resolution is None and needs_resolution) or len(given) > 1 or not kwargs.keys() <= {self.resolution_name}:
            return self.run_own_code(x, *args, **kwargs)  # the layer finds a resolution itself, or raises its own error
        if getattr(self, "with_cp", False) and x.requires_grad:
            return checkpoint(self.fused_forward, x, resolution, use_reentrant=False)
        return self.fused_forward(x, resolution)

    def fused_mix(self, x, resolution, *names):
        """Mix the tokens with the shifted tokens: shifted + (x - shifted) * mix, for every mix that is named."""
        if type(self).fused_shift is _shift_not:
            return [x] * len(names)
        shifted = type(self).fused_shift(self, x, resolution)
        change = x - shifted
        return [torch.addcmul(shifted, change, as_wide(getattr(self, name), x)) for name in names]

    def fused_norm(self, x):
        norm = getattr(self, "key_norm", None)
        return x if norm is None else norm(x)


class _SpatialMix(_Mix):
    def fused_forward(self, x, resolution):
        mixed = self.fused_mix(x, resolution, "spatial_mix_k", "spatial_mix_v", "spatial_mix_r")
        k, v, r = (project(m) for project, m in zip((self.key, self.value, self.receptance), mixed))
        w, u = (p.to(state_dtype(k.dtype)) / x.shape[1] for p in (self.spatial_decay, self.spatial_first))
        if getattr(self, "key_norm", None) is None:
            return self.output(_bi_wkv(w, u, k, v, r))
        return self.output(torch.sigmoid(r) * self.key_norm(_bi_wkv(w, u, k, v)))


class _ChannelMix(_Mix):
    def fused_forward(self, x, resolution):
        xk, xr = self.fused_mix(x, resolution, "spatial_mix_k", "spatial_mix_r")
        k = self.fused_norm(relu_squared(self.key(xk)))
        return torch.sigmoid(self.receptance(xr)) * self.value(k)


class _SpatialMixQShift(_SpatialMix):
    fused_shift = _q_shift


class _SpatialMixOwnShift(_SpatialMix):
    fused_shift = _shift_own


class _SpatialMixUnshifted(_SpatialMix):
    fused_shift = _shift_not


class _ChannelMixQShift(_ChannelMix):
    fused_shift = _q_shift


class _ChannelMixOwnShift(_ChannelMix):
    fused_shift = _shift_own


class _ChannelMixUnshifted(_ChannelMix):
    fused_shift = _shift_not


# --- which layers are replaced ----------------------------------------------------------------------------------------------


class _Form(Form):
    arguments = ["x", "patch_resolution"]

    def accepts(self, arguments):
        """Return True for any name of the second argument."""
        return len(arguments) == 2

    def widths(self, layer, parameters):
        mix, decay = (parameters.get(name) for name in ("spatial_mix_k", "spatial_decay"))
        outer = layer.key.in_features if mix is None else mix.numel()
        return outer if decay is None else decay.numel(), outer

    def inputs(self, layer, widths, normal):
        pixel = getattr(layer, "shift_pixel", 1)
        H, W = pixel + 2, pixel + 3
        return [(normal(2, H * W, widths[1]), (H, W))]


_SCAN = ("spatial_decay", "spatial_first")
_SPATIAL, _CHANNEL = ("spatial_mix_k", "spatial_mix_v", "spatial_mix_r"), ("spatial_mix_k", "spatial_mix_r")
_OF_SPATIAL, _OF_CHANNEL, _NORM = ("key", "value", "receptance", "output"), ("key", "receptance", "value"), ("key_norm",)
_FORMS = (
    _Form(_SpatialMixQShift, (*_SCAN, *_SPATIAL), _OF_SPATIAL, _NORM),
    _Form(_SpatialMixOwnShift, (*_SCAN, *_SPATIAL), _OF_SPATIAL, _NORM),
    _Form(_SpatialMixUnshifted, _SCAN, _OF_SPATIAL, _NORM),
    _Form(_ChannelMixQShift, _CHANNEL, _OF_CHANNEL, _NORM),
    _Form(_ChannelMixOwnShift, _CHANNEL, _OF_CHANNEL, _NORM),
    _Form(_ChannelMixUnshifted, (), _OF_CHANNEL, _NORM),
)
_MARKS = {"spatial_decay", "spatial_first", "spatial_mix_k"}  # names of attributes that only these layers have
_NAME = re.compile(r"(?i:rwkv|spatial_?mix|channel_?mix)")


def _suspect(module: nn.Module) -> str | None:
    """Return the reason why a layer with the name or call of an RWKV layer, but other parameters, is left; else None."""
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.")]
    if any(calls_run_cuda(method) for cls in classes for method in vars(cls).values()):
        return (
            "it calls RUN_CUDA, but has no parameters spatial_decay and spatial_first: for RWKV-4 there is compat.rwkv, and "
            "for a Bi-WKV with other names import RUN_CUDA of sdit_kernels.compat.vision_rwkv in its file"
        )
    if hasattr(module, "key") and any(_NAME.search(name) for _, name in class_names(module)):
        return "it has the name of an RWKV's layer, but not the parameters of Vision-RWKV, for example spatial_mix_k"
    return None


def _choose(module: nn.Module) -> tuple[type[Swapped] | None, str]:
    """Return (the class for the layer or None, the reason why it is not fully fused); (None, "") for other modules."""
    if isinstance(module, Swapped) or not any(hasattr(module, name) for name in _MARKS):  # a mix that is not used is None
        return None, ""
    fixed = why_forward_is_fixed(module)
    if fixed is not None:
        return None, fixed
    own = {name for name, p in module._parameters.items() if p is not None}
    why = ""
    for form in _FORMS:
        same_kind = own.isdisjoint(_SCAN) is set(_SCAN).isdisjoint(form.parameters)
        if same_kind and own.isdisjoint(_SPATIAL) is set(_SPATIAL).isdisjoint(form.parameters):
            found = why_unlike(module, form)
            if found is None:
                return form.fused, ""
            why = why or found
    if not own.issuperset(_SCAN):
        return None, why
    return choose_call(module, _Call, (4, 7), "7, or 4 without B, T and C", why)


# --- the public functions ---------------------------------------------------------------------------------------------------


def accelerate(model: nn.Module) -> Report:
    r"""Run the mixing layers of a Vision-RWKV model on the ops of this package, in place, on CPUs and GPUs.

    The function recognises Vision-RWKV's spatial mix and channel mix (``VRWKV_SpatialMix``, ``VRWKV_ChannelMix``) and their
    copies under any class name, with any shift, with or without ``key_norm`` and ``with_cp``. In a spatial mix it fuses the
    two-way scan with its gate, in a channel mix the squared ReLU. ``q_shift`` and the mixes run as fewer passes of PyTorch over
    the tokens; a shift of another kind (the attribute ``shift_func``) runs as it is. The CUDA extension is not needed.

    It replaces a layer only if the layer's own forward, with :func:`RUN_CUDA` of this module, and the fused forward give the
    same result on a few random tokens, in training and evaluation mode, on common and on large values, and if the layer draws
    no random numbers. The limits of this check are the same as in :func:`sdit_kernels.compat.rwkv.accelerate`.

    A layer that differs, but has the parameters ``spatial_decay`` and ``spatial_first`` and calls ``RUN_CUDA``, gets
    :func:`RUN_CUDA` of this module in all its methods, and otherwise runs its own code. Restore-RWKV's layers are an example:
    they call it once for rows and once for columns. ``torch.compile`` leaves these methods out of its graph.

    Each layer stays the same object with the same parameters, children, hooks and state_dict keys. Its class becomes a subclass
    of its class. Optimisers, checkpoints, copies and pickles work as before. A file that compiles the extension when it is
    imported still needs a compiler: replace its RUN_CUDA by an import instead.

    The page "Vision-RWKV" of the documentation lists the differences from the CUDA extension. The most important one: the
    extension does not compute the paper's formula exactly.

    Args:
        model: any module; the function searches all of it for layers. Call it before you wrap the model (FSDP, hooks that
            replace ``forward``) or compile it. A second call changes nothing more.

    Returns:
        A report that you can print. ``replaced`` holds pairs (name, class). ``left`` holds triples (name, class, reason) of all
        other layers of this kind, and of layers of which only the call of ``RUN_CUDA`` is replaced.

    Raises:
        TypeError: model is not a module.

    Source: Duan et al., Vision-RWKV, arXiv 2403.02308.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat import vision_rwkv
        >>> class ChannelMix(torch.nn.Module):  # here without a shift
        ...     def __init__(self, C):
        ...         super().__init__()
        ...         for name in ("spatial_mix_k", "spatial_mix_r"):
        ...             self.register_parameter(name, None)
        ...         self.key, self.receptance, self.value = (torch.nn.Linear(C, C, bias=False) for _ in range(3))
        ...     def forward(self, x, patch_resolution=None):
        ...         return torch.sigmoid(self.receptance(x)) * self.value(torch.relu(self.key(x)) ** 2)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), ChannelMix(8))
        >>> print(vision_rwkv.accelerate(model))
        Vision-RWKV: 1 replaced, 0 left as they were
          1  ChannelMix: fused
        >>> vision_rwkv.restore(model).replaced
        (('1', 'ChannelMix'),)
    """
    return accelerate_layers("Vision-RWKV", model, _choose, _suspect)


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
        >>> from sdit_kernels.compat.vision_rwkv import restore
        >>> restore(torch.nn.Linear(1, 1)).replaced
        ()
    """
    return swap_back("Vision-RWKV", model, (_Mix, _Call))
