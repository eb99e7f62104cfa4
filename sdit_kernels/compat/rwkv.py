"""RWKV-4 as others write it: their mixing layers made to run on this package's ops, and their function ``RUN_CUDA``.

No library is imported: a layer is known by the names of its parameters, and replaced only if it computes what RWKV-4 computes.
"""

import functools
import inspect
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import backend
from ..ops.mix import relu_squared, token_shift
from ..ops.wkv import wkv, wkv_state_from_rwkv, wkv_state_to_rwkv
from ..reference.lif import state_dtype

__all__ = ["RUN_CUDA", "Report", "accelerate", "restore"]


# --- the function that RWKV-LM's copies call --------------------------------------------------------------------------------


def RUN_CUDA(
    B: int, T: int, C: int, w: Tensor, u: Tensor, k: Tensor, v: Tensor, last_state: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The function of this name in RWKV-LM's RWKV-4 (folders RWKV-v4 and RWKV-v4neo) and in the repositories that copy it.

    ::

        y[t] = (sum_{i<t} e^(k[i] - (t-1-i) e^w) v[i]  +  e^(u + k[t]) v[t]) / (the same sum without v)

    w is the parameter ``time_decay`` as it is: -exp(w) is taken inside, and the gradient is that of w. In a model file,
    ``from sdit_kernels.compat.rwkv import RUN_CUDA`` takes the place of the lines that compile ``wkv_cuda``, of ``class WKV``
    and of ``def RUN_CUDA``.

    What differs: any device that this package serves, any T (no ``T_MAX``) and C; strides; y has k's dtype, where RWKV-LM goes
    by ``RWKV_FLOAT_MODE``; gradients have the dtype of their tensors. Not meant are ``wkv_cuda.forward`` beneath it, whose w is
    -exp(time_decay), and the function of this name in Vision-RWKV, which looks both ways: that is, but for its 1e-6 in the
    denominator, ``wkv(None, u, k, v, log_decay=-w, bidirectional=True)``.

    Args:
        B, T, C: batch, tokens, channels: the shape of k.
        w, u: time_decay and time_first, (C,), any floating dtype.
        k, v: keys and values, (B, T, C), float32, float64, bfloat16 or float16.
        last_state: the state after the tokens before these, (B, C, 3), float32 (float64 for float64 data): aa, bb, pp of RWKV's
            own code, as the copies that train on pieces of a sequence pass it; before any token 0, 0, -1e38. None: no state.

    Returns:
        y, (B, T, C), of k's dtype; with ``last_state`` the pair (y, new_state), new_state like last_state. Of its two scales
        bb is 1 where RWKV's code has another: aa e^pp and bb e^pp are the same. Gradients reach w, u, k, v and last_state.

    Raises:
        TypeError, ValueError: B, T, C are not k's shape; else as :func:`sdit_kernels.wkv`.

    Source: the interface of BlinkDL's RWKV-LM; Peng et al., RWKV, arXiv 2305.13048.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.rwkv import RUN_CUDA
        >>> w, u, k = torch.full((2,), -torch.inf), torch.zeros(2), torch.zeros(1, 3, 2)  # -exp(w) = 0: no decay
        >>> RUN_CUDA(1, 3, 2, w, u, k, torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1).repeat(1, 1, 2))[0, :, 0]
        tensor([1.0000, 1.5000, 3.0000])
    """
    for name, t in (("w", w), ("u", u), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if k.shape != (B, T, C):
        raise ValueError(f"k must have the shape (B, T, C) = ({B}, {T}, {C}), got {tuple(k.shape)}")
    dtype = torch.promote_types(k.dtype, v.dtype)
    k_, v_ = k.to(dtype), v.to(dtype)
    w, u = _as_wide(w, k_), _as_wide(u, k_)
    if last_state is None:
        return wkv(w, u, k_, v_).to(k.dtype)
    if not isinstance(last_state, Tensor):
        raise TypeError(f"last_state must be a tensor or None, got {type(last_state).__name__}")
    if last_state.shape != (B, C, 3):
        raise ValueError(f"last_state must have the shape (B, C, 3) = ({B}, {C}, 3), got {tuple(last_state.shape)}")
    y, state = wkv(w, u, k_, v_, state=wkv_state_from_rwkv(*last_state.unbind(-1)), return_state=True)
    return y.to(k.dtype), torch.stack(wkv_state_to_rwkv(*state), -1)


def _as_wide(parameter: Tensor, data: Tensor) -> Tensor:
    """Parameters may be wider than the data; narrower ones are cast, as arithmetic on the two would."""
    return parameter.to(torch.promote_types(parameter.dtype, data.dtype))


# --- the layers' own arithmetic ---------------------------------------------------------------------------------------------


class _Fused(nn.Module):
    """What a replaced layer gains: it stays an instance of its class, with all it has, and only computes otherwise."""

    _original: type[nn.Module]
    _kind: str

    def __reduce_ex__(self, protocol):
        """The class is made at run time; copies and pickles name what it is made of."""
        _, _, *rest = super().__reduce_ex__(max(2, protocol))
        return _revive, (self._original, self._kind), *rest

    def _shift(self, x, last, *names):
        return token_shift(x, *(_as_wide(getattr(self, name), x) for name in names), last=last)

    def _scan(self, xk, xv, xr, state, return_state):
        """``state``: None or RWKV's aa, bb, pp, and so is what comes back beside the output."""
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        if state is not None:
            state = wkv_state_from_rwkv(*(s.to(state_dtype(k.dtype)) for s in state))
        w, u = _as_wide(self.time_decay, k), _as_wide(self.time_first, k)
        y = wkv(w, u, k, v, r=r, state=state, return_state=return_state)
        y, state = y if return_state else (y, None)
        return self.output(y), None if state is None else wkv_state_to_rwkv(*state)

    def _gate(self, xk, xr):
        return torch.sigmoid(self.receptance(xr)) * self.value(relu_squared(self.key(xk)))


def _row(state, layer, like):
    """A layer's part of a state of transformers, (B, C, layers): a copy, because the state is written to in place."""
    return state[:, :, layer].to(like.dtype, copy=True)


class _TransformersTimeMix(_Fused):
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
    def forward(self, hidden, state=None):
        last = None if state is None else _row(state[0], self.layer_id, hidden)
        out = self._gate(*self._shift(hidden, last, "time_mix_key", "time_mix_receptance"))
        if state is not None:
            state[0][:, :, self.layer_id] = hidden[:, -1]
        return out, state


class _TimeMix(_Fused):
    def forward(self, x):
        return self._scan(*self._shift(x, None, "time_mix_k", "time_mix_v", "time_mix_r"), None, False)[0]


class _ChannelMix(_Fused):
    def forward(self, x):
        return self._gate(*self._shift(x, None, "time_mix_k", "time_mix_r"))


@dataclass(frozen=True)
class _Kind:
    """A layer as some library writes it."""

    fused: type[_Fused]
    parameters: tuple[str, ...]
    children: tuple[str, ...]
    by: str
    state: bool  # forward takes and returns the state of transformers

    @property
    def scans(self) -> bool:
        return not set(_SCAN).isdisjoint(self.parameters)


_TIME = ("key", "value", "receptance", "output")
_CHANNEL = ("key", "receptance", "value")
_SCAN = ("time_decay", "time_first")
_SCANNED, _GATED = "token shift; wkv and gate", "token shift; squared ReLU"
_KINDS = {
    "transformers time mix": _Kind(
        _TransformersTimeMix, (*_SCAN, "time_mix_key", "time_mix_value", "time_mix_receptance"), _TIME, _SCANNED, True
    ),
    "transformers channel mix": _Kind(_TransformersChannelMix, ("time_mix_key", "time_mix_receptance"), _CHANNEL, _GATED, True),
    "time mix": _Kind(_TimeMix, (*_SCAN, "time_mix_k", "time_mix_v", "time_mix_r"), _TIME, _SCANNED, False),
    "channel mix": _Kind(_ChannelMix, ("time_mix_k", "time_mix_r"), _CHANNEL, _GATED, False),
}
_CALL = "RUN_CUDA"  # the kind of a layer of which only the call of this function is replaced


@functools.cache
def _fused_class(original: type[nn.Module], kind: str) -> type[_Fused]:
    base = _Fused if kind == _CALL else _KINDS[kind].fused
    body: dict[str, Any] = {"_original": original, "_kind": kind, "__module__": original.__module__}
    if kind == _CALL:
        body["forward"] = _with_run_cuda(original.forward)
    return type(f"Fused{original.__name__}", (base, original), body)


def _revive(original: type[nn.Module], kind: str) -> _Fused:
    cls = _fused_class(original, kind)
    return cls.__new__(cls)


def _with_run_cuda(forward: Callable) -> types.FunctionType:
    """The same code with another RUN_CUDA, its other globals as they are now; the user's module keeps its own."""
    assert isinstance(forward, types.FunctionType)
    changed = types.FunctionType(
        forward.__code__, {**forward.__globals__, _CALL: RUN_CUDA}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


# --- which layers -----------------------------------------------------------------------------------------------------------


class _Pick(nn.Module):
    """Stands for a Linear: channels picked and scaled at random, at no cost."""

    def __init__(self, inputs, outputs, generator):
        super().__init__()
        self.index = torch.randint(inputs, (outputs,), generator=generator, device="cpu")
        self.scale = torch.randn(outputs, generator=generator, dtype=torch.float64, device="cpu")

    def forward(self, x):
        return x[..., self.index] * self.scale


def _calls_run_cuda(forward: Callable) -> bool:
    return isinstance(forward, types.FunctionType) and _CALL in forward.__code__.co_names


def _difference(module: nn.Module, kind: str) -> str | None:
    """None where the layer computes, on random values and tokens, what the fused one does; else what differs."""
    cls, spec, draw = type(module), _KINDS[kind], torch.Generator("cpu").manual_seed(0)
    own = {name: module._parameters[name] for name in spec.parameters}
    inner, outer = (own[spec.parameters[i]].numel() for i in (0, -1))  # channels of the scan, and of the tokens

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64, device="cpu")

    stand_ins = {name: _Pick(outer, inner, draw) for name in spec.children} | {"output": _Pick(inner, outer, draw)}
    twin = cls.__new__(cls)
    twin.__dict__.update(
        module.__dict__,
        _parameters={name: normal(*p.shape) for name, p in own.items()},
        _modules={name: stand_ins.get(name, child) for name, child in module._modules.items()},
    )
    x, states = normal(2, 5, outer), [None]
    if spec.state:  # as transformers lays it out; num, den, max at the end, of which den is a sum of exponentials
        states.append([normal(2, width, getattr(module, "layer_id", 0) + 1) for width in (outer, outer, inner, inner, inner)])
        states[1][3].exp_()

    def run(forward, state):
        if not spec.state:
            return [forward(twin, x)]
        out, state = forward(twin, x, state=state and [s.clone() for s in state])
        return [out] if state is None else [out, *state[:2], *wkv_state_from_rwkv(*state[2:])]

    what = "its forward does not run on random values"
    try:
        with torch.no_grad(), backend("reference"), torch.random.fork_rng(devices=[]):
            theirs = _with_run_cuda(cls.forward) if _calls_run_cuda(cls.forward) else cls.forward
            wanted = [t for state in states for t in run(theirs, state)]
            what = "RWKV-4's forward does not take its parameters"
            twin.__class__ = _fused_class(cls, kind)
            found = [t for state in states for t in run(spec.fused.forward, state)]
            same = (
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, wanted, strict=True)
            )
            return None if all(same) else "its forward computes something else than RWKV-4's"  # transformers scans in float32
    except Exception as error:  # of code that is not ours, on values that it may not expect
        return f"{what} ({type(error).__name__}: {error})"


_MARKS = (  # parameters that only layers of an RWKV have
    *_SCAN, "time_mix_k", "time_mix_r", "time_mix_key", "time_mix_receptance", "time_faaaa", "time_maa_k", "spatial_decay",
    "spatial_mix_k",
)  # fmt: skip


def _choose(module: nn.Module) -> tuple[str | None, str]:
    """(kind, by what) or (None, why not)."""
    if isinstance(module, _Fused):
        return None, "accelerated already"
    if isinstance(module, torch.jit.ScriptModule):
        return None, "compiled by TorchScript, which keeps its code: set RWKV_JIT_ON=0"
    if "forward" in vars(module):
        return None, "its forward is replaced on the instance, by hooks perhaps: accelerate the model first"
    forward, found = type(module).forward, {name for name, p in module._parameters.items() if p is not None}
    trained = {name for name, child in module._modules.items() if child is not None and any(True for _ in child.parameters())}
    why = "of another RWKV than RWKV-4, or another form of it"
    for kind, spec in _KINDS.items():
        scans = not found.isdisjoint(_SCAN)
        if not found.issuperset(spec.parameters) or scans is not spec.scans:
            continue
        extra = sorted((found - set(spec.parameters)) | (trained - set(spec.children)))
        missing = sorted(set(spec.children) - set(module._modules))
        if not extra and not missing:
            difference = _difference(module, kind)
            if difference is None:
                return kind, spec.by
            why = difference
        else:
            why = f"beside RWKV-4's parts it has {', '.join(extra)}" if extra else f"it lacks {', '.join(missing)}"
    if found.issuperset(_SCAN) and all(module._parameters[n].dim() == 1 for n in _SCAN) and _calls_run_cuda(forward):
        theirs = forward.__globals__.get(_CALL)
        if theirs is RUN_CUDA:
            return None, f"its RUN_CUDA is this package's already; the rest: {why}"
        arguments = len(inspect.signature(theirs).parameters) if callable(theirs) else 7
        if arguments in (7, 8):
            return _CALL, f"RUN_CUDA alone: {why}"
        why = f"its RUN_CUDA takes {arguments} arguments, RWKV-4's 7, or 8 with a state"
    return None, why


# --- the public functions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did; ``print`` it.

    Attributes:
        replaced: (name in the model, class, what is fused) of every layer that was replaced.
        left: (name, class, why) of every layer of an RWKV that was not.
    """

    replaced: tuple[tuple[str, str, str], ...]
    left: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        lines = []
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for name, cls, text in entries:
                groups.setdefault((cls, text), []).append(name or "(the model itself)")
            lines.append(f"{title}: {len(entries)}")
            for (cls, text), names in groups.items():
                shown = names if len(names) <= 3 else [names[0], "...", names[-1]]
                lines.append(f"  {len(names)} {cls} ({', '.join(shown)}): {text}")
        return "\n".join(lines)


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module) -> Report:
    r"""Let the mixing layers of an RWKV-4 run on this package's ops, in place, on CPUs and GPUs.

    Known are those of Hugging Face transformers (``RwkvSelfAttention``, ``RwkvFeedForward``; 4.29 to 5.24 and on) and those
    of RWKV-LM (``RWKV_TimeMix``, ``RWKV_ChannelMix``) with its many copies, whatever their classes are called. Fused are, per
    time mix, the token shift with its three mixes, and the scan with its gate; per channel mix, the token shift and the squared
    ReLU. A layer is replaced only if its own forward, run on a few random tokens with cheap stand-ins for its projections,
    gives what the fused one gives. One that has more than RWKV-4's parts but calls ``RUN_CUDA`` gets :func:`RUN_CUDA` of this
    file for that call. The report names every other layer of an RWKV, and why it was left.

    Each layer stays what it is: the same object with the same parameters, children, hooks and state_dict keys, an instance of
    its class (of a subclass ``Fused...`` made for it). So optimisers, checkpoints, ``save_pretrained``, copies and pickles go
    on working, as do ``generate`` and its state. :func:`restore` undoes it.

    What differs, with transformers:
        - Results agree to rounding. With bfloat16 weights the decay -exp(time_decay) is not rounded to bfloat16: their loop on
          the CPU does that, their CUDA kernel does not. With float64 weights the scan is float64, theirs float32.
        - One token after another with a state (``generate`` with a cache) is right for every batch size. Theirs is for a batch
          of one only: with B > 1 it gives logits of shape (B, B, vocabulary), mixed across the batch.
        - The state is theirs, five tensors written to in place, but of the scan's three (num, den, max) den is 1: num e^max
          and den e^max are the same. States can be handed from one to the other.
        - Gradients flow through the state; with ``use_cache=True`` theirs raise an error in the backward pass.
        - Their CUDA kernel is not used, nor its limit to ``context_length`` tokens. ``attention_mask`` is ignored, as theirs.

    Args:
        model: any module; layers of an RWKV are looked for in all of it. Before it is wrapped (FSDP, hooks that replace
            ``forward``) or compiled.

    Returns:
        A :class:`Report` of what was replaced, what was left and why. A UserWarning says if nothing of an RWKV was found.

    Raises:
        TypeError: model is no module.

    Source: Peng et al., RWKV, arXiv 2305.13048.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat import rwkv
        >>> from sdit_kernels.nn import TimeMix
        >>> class RWKV_TimeMix(TimeMix):  # a stand-in: RWKV-LM's names of parameters
        ...     def forward(self, x):
        ...         return super().forward(x)
        >>> model = torch.nn.Sequential(RWKV_TimeMix(8))
        >>> print(rwkv.accelerate(model))
        replaced: 1
          1 RWKV_TimeMix (0): token shift; wkv and gate
        left: 0
        >>> rwkv.restore(model)
    """
    _check_model(model)
    replaced, left = [], []
    for name, module in model.named_modules():
        if not any(mark in module._parameters for mark in _MARKS):
            continue
        cls = type(module)
        kind, text = _choose(module)
        if kind is None:
            left.append((name, cls.__name__, text))
        else:
            module.__class__ = _fused_class(cls, kind)
            replaced.append((name, cls.__name__, text))
    if not replaced and not left:
        warnings.warn("accelerate found no layer of an RWKV: none has parameters of its names", stacklevel=2)
    return Report(tuple(replaced), tuple(left))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every layer computes as its own class says.

    Args:
        model: a module that was accelerated; layers that were not are left alone.

    Raises:
        TypeError: model is no module.

    Example:
        >>> import torch
        >>> from sdit_kernels.compat.rwkv import restore
        >>> restore(torch.nn.Linear(1, 1))
    """
    _check_model(model)
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = module._original
