"""wkv and its one-token step: the public functions and the operators ``sdit_kernels::wkv*`` behind them."""

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import dispatch, memory, reference, repeat, tuning
from ..checks import check_flag, check_scan_state, check_tensor, check_tokens, wants_gradient
from ..dtypes import state_dtype
from ..layout import wkv_rows
from .operator import kernels, register, values_are_readable

if TYPE_CHECKING:
    from typing_extensions import Unpack

State = tuple[Tensor, Tensor]  # (ybar, lse)

_ALGORITHMS = ("auto", "serial", "chunked")


# --- argument checks --------------------------------------------------------------------------------------------------------


def _check_cu_seqlens(cu_seqlens, max_seqlen, k):
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen belongs to cu_seqlens, which is not given")
        return k.shape[0], 0
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (N + 1,) for N sequences, got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != k.device:
        raise ValueError(f"cu_seqlens must be on the device of k, {k.device}, got {cu_seqlens.device}")
    if k.shape[0] != 1:
        raise ValueError(f"k must have the shape (1, tokens, C) where cu_seqlens packs the sequences, got {tuple(k.shape)}")
    if max_seqlen is not None:
        if not isinstance(max_seqlen, (int, torch.SymInt)) or isinstance(max_seqlen, bool):
            raise TypeError(f"max_seqlen must be an int or None, got {type(max_seqlen).__name__}")
        if max_seqlen < 1:
            raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
    return cu_seqlens.shape[0] - 1, max_seqlen or 0


def _check_lengths(cu_seqlens, max_seqlen, L):
    """Check the values of cu_seqlens, on the CPU only: reading them on a GPU would wait for the GPU."""
    repeat.refuse()
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:])]
    if ends[0] != 0 or ends[-1] != L or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must start at 0, not decrease, and end at the {L} tokens of k, got {_brief(ends)}")
    if max_seqlen and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest sequence, {max(lengths)} tokens, got {max_seqlen}")


def _brief(values):
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {', '.join(map(str, values[-3:]))}]"


# --- the operators ----------------------------------------------------------------------------------------------------------


def _wkv_outputs(k, cu_seqlens, bidirectional, return_state, keep, tokens):
    """Allocate out, ybar, lse and checkpoint. Outputs that are not requested are None."""
    B, L, C = k.shape
    dtype = state_dtype(k.dtype)
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = memory.empty_contiguous((B, L, C), k.dtype, k)
    ybar = lse = checkpoint = None
    if return_state:
        ybar, lse = (k.new_empty((B if packed is None else packed, C), dtype=dtype) for _ in range(2))
    if keep:
        rows = torch.empty if packed is None else torch.zeros  # packed: a few rows do not belong to any tile
        shape = 2 if bidirectional else 1, 3, wkv_rows(B, L, packed, tokens), C
        checkpoint = rows(shape, dtype=dtype, device=k.device)
    return out, ybar, lse, checkpoint


def _wkv(
    k, v, r, decay, bonus, ybar, lse, cu_seqlens, max_seqlen, decay_is_log_of_rate, bidirectional, return_state, keep,
    algorithm, backend
):  # fmt: skip
    numbers = tuning.current()
    outputs = _wkv_outputs(k, cu_seqlens, bidirectional, return_state, keep, numbers.wkv_checkpoint_tokens)
    if cu_seqlens is not None and k.device.type == "cpu":
        _check_lengths(cu_seqlens, max_seqlen, k.shape[1])
    if k.numel():
        kernels(backend, "wkv").wkv_forward(
            k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, cu_seqlens, max_seqlen, bidirectional, algorithm,
            *outputs, numbers,
        )  # fmt: skip
    elif return_state:  # no tokens: the final state is the given state
        for new, old, empty in zip(outputs[1:3], (ybar, lse), (0.0, -torch.inf)):
            new.fill_(empty) if old is None else new.copy_(torch.where(lse > -torch.inf, old, empty))
    return outputs


def _wkv_fake(
    k, v, r, decay, bonus, ybar, lse, cu_seqlens, max_seqlen, decay_is_log_of_rate, bidirectional, return_state, keep,
    algorithm, backend
):  # fmt: skip
    return _wkv_outputs(k, cu_seqlens, bidirectional, return_state, keep, tuning.current().wkv_checkpoint_tokens)


def _backward_outputs(k, v, r, decay, bonus, ybar, lse, parameters):
    """Allocate dk, dv, dr, d decay, d bonus, d ybar and d lse. Gradients that are not requested are None."""
    data = [None if t is None else memory.empty_contiguous(k.shape, k.dtype, k) for t in (k, v, r)]
    sums = [memory.empty_contiguous(p.shape, p.dtype, p) if parameters else None for p in (decay, bonus)]
    state = [None if t is None else memory.empty_contiguous(t.shape, t.dtype, t) for t in (ybar, lse)]
    return *data, *sums, *state


def _wkv_backward(
    g, g_ybar, g_lse, k, v, r, decay, bonus, ybar, lse, checkpoint, cu_seqlens, max_seqlen, decay_is_log_of_rate,
    bidirectional, parameters, algorithm, backend,
):  # fmt: skip
    outputs = _backward_outputs(k, v, r, decay, bonus, ybar, lse, parameters)
    dk, dv, dr, d_decay, d_bonus, d_ybar, d_lse = outputs
    if k.numel() == 0:
        if parameters:
            d_decay.zero_(), d_bonus.zero_()
        if ybar is not None:
            for d, upstream in ((d_ybar, g_ybar), (d_lse, g_lse)):
                d.zero_() if upstream is None else d.copy_(torch.where(lse > -torch.inf, upstream, 0.0))
        return outputs
    numbers, packed = tuning.current(), None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = wkv_rows(*k.shape[:2], packed, numbers.wkv_checkpoint_tokens)
    # The forward pass ran without a checkpoint (torch.func), or under another Tuning, so recompute it.
    if checkpoint is None or checkpoint.numel() == 0 or checkpoint.shape[2] != rows:
        checkpoint = _wkv(
            k, v, r, decay, bonus, ybar, lse, cu_seqlens, max_seqlen, decay_is_log_of_rate, bidirectional, False, True,
            algorithm, backend
        )[3]  # fmt: skip
    kernels(backend, "wkv").wkv_backward(
        g, g_ybar, g_lse, k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, checkpoint.contiguous(), cu_seqlens,
        max_seqlen, bidirectional, algorithm, *outputs, numbers,
    )  # fmt: skip
    return outputs


def _wkv_backward_fake(
    g, g_ybar, g_lse, k, v, r, decay, bonus, ybar, lse, checkpoint, cu_seqlens, max_seqlen, decay_is_log_of_rate,
    bidirectional, parameters, algorithm, backend,
):  # fmt: skip
    return _backward_outputs(k, v, r, decay, bonus, ybar, lse, parameters)


def _wkv_save(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.decay_is_log_of_rate, ctx.bidirectional, ctx.returned, _, ctx.algorithm, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.set_materialize_grads(False)


def _wkv_gradient(ctx, g, g_ybar, g_lse, _):
    *tensors, cu_seqlens, checkpoint = ctx.saved_tensors
    if not ctx.returned:  # compiled graphs pass zeros for empty outputs
        g_ybar = g_lse = None
    needs = ctx.needs_input_grad
    return _wkv_backward_call(
        g, g_ybar, g_lse, *tensors, checkpoint, cu_seqlens, ctx.max_seqlen, ctx.decay_is_log_of_rate, ctx.bidirectional,
        needs[3] or needs[4], ctx.algorithm, ctx.backend,
    )  # fmt: skip


_wkv_call = register(
    "wkv(Tensor k, Tensor v, Tensor? r, Tensor decay, Tensor first, Tensor? ybar, Tensor? lse, Tensor? cu_seqlens, "
    "SymInt max_seqlen, bool raw, bool bidirectional, bool return_state, bool keep, str algorithm, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _wkv,
    _wkv_fake,
    batch_axes=(0, 0, 0, None, None, 0, 0, None),
    output_axes=(0, 0, 0, 2),
    save=_wkv_save,
    gradient=_wkv_gradient,
    flatten=True,
    loop=lambda tensors: tensors[7] is not None,  # packed sequences cannot be batched
)
_wkv_backward_call = register(
    "wkv_backward(Tensor? g, Tensor? g_ybar, Tensor? g_lse, Tensor k, Tensor v, Tensor? r, Tensor decay, Tensor first, "
    "Tensor? ybar, Tensor? lse, Tensor? checkpoint, Tensor? cu_seqlens, SymInt max_seqlen, bool raw, bool bidirectional, "
    "bool parameters, str algorithm, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _wkv_backward,
    _wkv_backward_fake,
    batch_axes=(0, 0, 0, 0, 0, 0, None, None, 0, 0, 2, None),
    output_axes=(0, 0, 0, None, None, 0, 0),
    flatten=True,
    loop=lambda tensors: tensors[11] is not None,
)


def _step_(k, v, r, decay, bonus, ybar, lse, decay_is_log_of_rate, backend):
    out = k.new_empty(k.shape)
    if k.numel():
        new = [t if t.is_contiguous() else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (ybar, lse)]
        k, v, r, out_ = (None if t is None else t.unsqueeze(1) for t in (k, v, r, out))
        kernels(backend, "wkv").wkv_forward(
            k, v, r, decay, bonus, decay_is_log_of_rate, ybar, lse, None, 0, False, "serial", out_, *new, None, tuning.current()
        )  # fmt: skip
        for old, t in zip((ybar, lse), new):
            if t is not old:
                old.copy_(t)
    return out


def _step_fake_(k, v, r, decay, bonus, ybar, lse, decay_is_log_of_rate, backend):
    return k.new_empty(k.shape)


_step_call_ = register(
    "wkv_step_(Tensor k, Tensor v, Tensor? r, Tensor decay, Tensor first, Tensor(a!) ybar, Tensor(b!) lse, bool raw, "
    "str backend) -> Tensor",
    _step_,
    _step_fake_,
    batch_axes=(0, 0, 0, None, None, 0, 0),
    output_axes=(0,),
    mutates=(5, 6),
)


# --- the public functions ---------------------------------------------------------------------------------------------------


class _Options(TypedDict, total=False):
    state: State | None
    bidirectional: bool
    log_decay: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    algorithm: str


@overload
def wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = ...,
    *,
    return_state: Literal[False] = ...,
    **options: "Unpack[_Options]",
) -> Tensor: ...
@overload
def wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = ...,
    *,
    return_state: Literal[True],
    **options: "Unpack[_Options]",
) -> tuple[Tensor, State]: ...
@overload
def wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = ...,
    *,
    return_state: bool,
    **options: "Unpack[_Options]",
) -> Tensor | tuple[Tensor, State]: ...


def wkv(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None = None,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    bidirectional: bool = False,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    algorithm: str = "auto",
):
    r"""RWKV-4's linear attention (WKV) over L tokens, causal or bidirectional, fused, forward and backward.

    For each sequence and channel, with w = -exp(time_decay) and u = time_first::

        y[t] = (sum_{i<t} e^(k[i] + (t-1-i) w) v[i]  +  e^(u + k[t]) v[t]) / (the same sum without v)
        out  = y, or sigmoid(r) * y

    ``bidirectional`` adds the tokens i > t with weights e^(k[i] + (i-1-t) w). The op runs two scans; it does not subtract a
    token from a total, so it loses no precision. Vision-RWKV's Bi-WKV is this formula with w = -decay / L: pass that as
    ``log_decay``.

    A state summarises the tokens before a slice. Let N be the sum of e^(k[i] + age w) v[i] over these tokens, where age counts
    the tokens after token i, and D the same sum without v. The state is the pair (ybar, lse) = (N / D, log D). Before any token
    it is (0, -inf). If you pass the state from slice to slice, the result equals one call on the whole sequence.

    The kernels store the running maximum as a key and the number of tokens since that key, so rounding errors do not grow from
    token to token. The backward pass keeps k, v, r, the small tensors and the state of the scan at every 16th token. Parameter
    gradients are summed in a fixed order: they are the same bit for bit for every number of threads.

    Args:
        time_decay: RWKV's decay parameter, (C,). None if ``log_decay`` is given.
        time_first: bonus u of the current token in the log domain, (C,). +inf is not allowed.
        k: keys, (B, L, C), float32, float64, bfloat16 or float16, any strides. The arithmetic is float32, or float64 for
            float64 data. k = -inf masks a token: it has no weight and gets no gradient. If all visible tokens are masked, the
            output and its gradients are 0. k = +inf is not allowed.
        v: values, with the shape and dtype of k.
        r: receptance, the logits of a gate on the output, with the shape and dtype of k. By position or by name.
        state: (ybar, lse), each (B, C), or (N, C) with ``cu_seqlens``; float32 (float64 for float64 data). None: empty state.
        return_state: also return the state after the last token.
        bidirectional: each token also sees the tokens after it. Takes and returns no state.
        log_decay: w itself, (C,), of any sign. A w below -1e20, including -inf, counts as -1e20 and gets no gradient: a token
            then sees only itself and the nearest unmasked token before it.
        cu_seqlens: int32 or int64 bounds of N packed sequences, (N + 1,): 0, ..., tokens. k then has shape (1, tokens, C).
        max_seqlen: upper bound of the length of a packed sequence. Optional; with it, a GPU launches fewer idle programs.
        algorithm: "serial" processes the tokens in order, in parallel over B * C. "chunked" is also parallel over chunks of
            tokens, but does 1.5 to 2 times the work. "auto" chooses by B * C and L: "chunked" on the CPU if B * C <= 32 and
            L >= 4096; on a GPU if B * C < 16,384 and L > 64. (On an H200, chunks are faster for 12,288 channels and slower for
            24,576.)

    Returns:
        out, (B, L, C), with the dtype of k; with ``return_state`` the pair (out, (ybar, lse)). Gradients reach time_decay or
        log_decay, time_first, k, v, r and the state, from the output and from the returned state.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or two arguments exclude each
            other. The op checks the values of cu_seqlens on the CPU only.
        RuntimeError: the chosen backend cannot serve the tensors, or a second derivative is requested.

    Source: Peng et al., RWKV, arXiv 2305.13048, appendix D; bidirectional: Duan et al., Vision-RWKV, arXiv 2403.02308.

    Example:
        >>> import torch
        >>> from sdit_kernels import wkv
        >>> k, v = torch.zeros(1, 4, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1).repeat(1, 1, 2)
        >>> no_decay, u = torch.tensor([0.0, 0.0]), torch.zeros(2)
        >>> wkv(None, u, k, v, log_decay=no_decay)[0, :, 0]  # running mean
        tensor([1.0000, 1.5000, 2.0000, 2.5000])
        >>> y, state = wkv(None, u, k[:, :2], v[:, :2], log_decay=no_decay, return_state=True)
        >>> wkv(None, u, k[:, 2:], v[:, 2:], log_decay=no_decay, state=state)[0, :, 0]
        tensor([2.0000, 2.5000])
    """
    decay, decay_is_log_of_rate = check_tokens(time_decay, time_first, k, v, r, log_decay, ("B", "L", "C"))
    sequences, longest = _check_cu_seqlens(cu_seqlens, max_seqlen, k)
    check_flag("return_state", return_state)
    check_flag("bidirectional", bidirectional)
    if bidirectional and (return_state or state is not None):
        name = "state" if state is not None else "return_state"
        raise ValueError(f"bidirectional scans a sequence from both ends and has no state: leave {name} out")
    ybar, lse = (None, None) if state is None else check_scan_state(state, (sequences, k.shape[-1]), k)
    if algorithm not in _ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(map(repr, _ALGORITHMS))}, got {algorithm!r}")
    backend = dispatch.choose(k.device)
    if backend == "reference":
        if cu_seqlens is not None and values_are_readable(k):
            _check_lengths(cu_seqlens, longest, k.shape[1])
        return reference.wkv(
            time_decay, time_first, k, v, r, state=state, return_state=return_state, bidirectional=bidirectional,
            log_decay=log_decay, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, algorithm=algorithm,
        )  # fmt: skip
    keep = wants_gradient(k, v, r, decay, time_first, ybar, lse)
    out, ybar, lse, _ = _wkv_call(
        k, v, r, decay, time_first, ybar, lse, cu_seqlens, longest, decay_is_log_of_rate, bidirectional, return_state, keep,
        algorithm, backend
    )  # fmt: skip
    return (out, (ybar, lse)) if return_state else out


def wkv_step(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    *,
    r: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> tuple[Tensor, State]:
    r"""One token of :func:`wkv`, for decoding: equals a slice of one token.

    With N and D, the sums of the state (ybar, lse) = (N / D, log D), and w, u as in :func:`wkv`::

        y  = (N + e^(u+k) v) / (D + e^(u+k)),    N' = e^w N + e^k v,    D' = e^w D + e^k

    Every step rounds lse to its dtype. So the result of many steps differs from one call of :func:`wkv` by about 1e-7 of |lse|
    per step.

    Args:
        time_decay: RWKV's decay parameter, (C,). None if ``log_decay`` is given.
        time_first: bonus u of the current token in the log domain, (C,).
        k: key, (B, C); dtypes and special values as in :func:`wkv`.
        v: value, with the shape and dtype of k.
        state: (ybar, lse), each (B, C), float32 (float64 for float64 data). None: empty state.
        r: receptance, the logits of a gate on the output, with the shape and dtype of k.
        log_decay: w itself, (C,), as in :func:`wkv`.

    Returns:
        (out, (ybar, lse)): the output, (B, C), with the dtype of k, and the new state. Gradients as in :func:`wkv`.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`wkv`.

    Source: Peng et al., RWKV, arXiv 2305.13048, appendix D.

    Example:
        >>> import torch
        >>> from sdit_kernels import wkv_step
        >>> w, u, state = torch.zeros(2), torch.zeros(2), None
        >>> for v in (1.0, 2.0, 3.0):
        ...     y, state = wkv_step(None, u, torch.zeros(1, 2), torch.full((1, 2), v), state, log_decay=w)
        >>> y
        tensor([[2., 2.]])
    """
    decay, decay_is_log_of_rate = check_tokens(time_decay, time_first, k, v, r, log_decay, ("B", "C"))
    ybar, lse = (None, None) if state is None else check_scan_state(state, (k.shape[0], k.shape[-1]), k)
    backend = dispatch.choose(k.device)
    if backend == "reference":
        return reference.wkv_step(time_decay, time_first, k, v, state, r=r, log_decay=log_decay)
    keep = wants_gradient(k, v, r, decay, time_first, ybar, lse)
    out, ybar, lse, _ = _wkv_call(
        k.unsqueeze(1), v.unsqueeze(1), None if r is None else r.unsqueeze(1), decay, time_first, ybar, lse, None, 0,
        decay_is_log_of_rate, False, True, keep, "serial", backend,
    )  # fmt: skip
    return out.squeeze(1), (ybar, lse)


def wkv_step_(
    time_decay: Tensor | None,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    r: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> Tensor:
    r"""One token of :func:`wkv` that updates the state in place, for decoding with CUDA graphs. For inference only.

    ::

        y = (N + e^(u+k) v) / (D + e^(u+k)),    N <- e^w N + e^k v,    D <- e^w D + e^k,    state = (N / D, log D)

    Args:
        time_decay: RWKV's decay parameter, (C,). None if ``log_decay`` is given.
        time_first: bonus u of the current token in the log domain, (C,).
        k: key, (B, C); dtypes and special values as in :func:`wkv`.
        v: value, with the shape and dtype of k.
        state: (ybar, lse), each (B, C), float32 (float64 for float64 data). The call overwrites them. Before the first token:
            (0, -inf).
        r: receptance, the logits of a gate on the output, with the shape and dtype of k.
        log_decay: w itself, (C,), as in :func:`wkv`.

    Returns:
        out, (B, C), with the dtype of k. It has no gradient.

    Raises:
        TypeError, ValueError: as in :func:`wkv`.
        RuntimeError: as in :func:`wkv`, or an argument requires a gradient.

    Source: Peng et al., RWKV, arXiv 2305.13048, appendix D.

    Example:
        >>> import torch
        >>> from sdit_kernels import wkv_step_
        >>> state = torch.zeros(1, 2), torch.full((1, 2), -torch.inf)
        >>> for v in (1.0, 2.0, 3.0):
        ...     y = wkv_step_(None, torch.zeros(2), torch.zeros(1, 2), torch.full((1, 2), v), state, log_decay=torch.zeros(2))
        >>> y, state[0]
        (tensor([[2., 2.]]), tensor([[2., 2.]]))
    """
    decay, decay_is_log_of_rate = check_tokens(time_decay, time_first, k, v, r, log_decay, ("B", "C"))
    if state is None:
        raise TypeError("state must be a pair (ybar, lse) of tensors to update, got None; begin with (0, -inf)")
    ybar, lse = check_scan_state(state, (k.shape[0], k.shape[-1]), k)
    if ybar is lse:
        raise ValueError("state must be two tensors to update, got the same one as ybar and lse")
    if wants_gradient(k, v, r, decay, time_first, ybar, lse):
        raise RuntimeError("wkv_step_ overwrites its state and has no gradient: call it under torch.no_grad(), or use wkv_step")
    backend = dispatch.choose(k.device)
    if backend == "reference":
        return reference.wkv_step_(time_decay, time_first, k, v, state, r=r, log_decay=log_decay)
    return _step_call_(k, v, r, decay, time_first, ybar, lse, decay_is_log_of_rate, backend)


def _check_same(**tensors):
    (first, like), *others = tensors.items()
    for name, t in tensors.items():
        check_tensor(name, t)
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating tensor, got {t.dtype}")
    for name, t in others:
        if (t.shape, t.dtype, t.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"{name} must have the shape, dtype and device of {first}, {tuple(like.shape)} {like.dtype} {like.device}, "
                f"got {tuple(t.shape)} {t.dtype} {t.device}"
            )


def wkv_state_from_rwkv(aa: Tensor, bb: Tensor, pp: Tensor) -> tuple[Tensor, Tensor]:
    r"""Convert the state of RWKV's own code, with N = aa e^pp and D = bb e^pp, to the state of :func:`wkv`.

    ::

        ybar = aa / bb,    lse = pp + log bb        bb > 0
        ybar = 0,          lse = -inf               bb = 0, before any token

    Args:
        aa: scaled numerator, any shape, any floating dtype.
        bb: scaled denominator, with the shape and dtype of aa.
        pp: exponent of both, with the shape and dtype of aa.

    Returns:
        (ybar, lse), with the same shape and dtype. Gradients flow.

    Raises:
        TypeError, ValueError: the tensors differ in shape, dtype or device, or are not floating.

    Source: the state of BlinkDL's RWKV-LM (RWKV-4).

    Example:
        >>> import torch
        >>> from sdit_kernels import wkv_state_from_rwkv
        >>> wkv_state_from_rwkv(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.5, -1e38]))
        (tensor([3., 0.]), tensor([0.5000,   -inf]))
    """
    _check_same(aa=aa, bb=bb, pp=pp)
    return reference.wkv_state_from_rwkv(aa, bb, pp)


def wkv_state_to_rwkv(ybar: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Convert the state of :func:`wkv` to the state of RWKV's own code, with N = aa e^pp, D = bb e^pp and bb = 1.

    ::

        aa = ybar,    bb = 1,    pp = lse           lse > -inf
        aa = 0,       bb = 0,    pp = -1e38         lse = -inf, before any token

    Args:
        ybar: N / D, any shape, any floating dtype.
        lse: log D, with the shape and dtype of ybar.

    Returns:
        (aa, bb, pp), with the same shape and dtype. Gradients flow.

    Raises:
        TypeError, ValueError: the tensors differ in shape, dtype or device, or are not floating.

    Source: the state of BlinkDL's RWKV-LM (RWKV-4).

    Example:
        >>> import torch
        >>> from sdit_kernels import wkv_state_to_rwkv
        >>> wkv_state_to_rwkv(torch.tensor([3.0]), torch.tensor([0.5]))
        (tensor([3.]), tensor([1.]), tensor([0.5000]))
    """
    _check_same(ybar=ybar, lse=lse)
    return reference.wkv_state_to_rwkv(ybar, lse)
