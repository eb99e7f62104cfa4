"""BatchNorm and a neuron: the definition. Statistics and arithmetic are float32 (float64 for float64 data)."""

import math

import torch

from ..dtypes import state_dtype
from .neuron import lif


def affine(rstd, weight, bias, step_factor, scale, dtype):
    """Return the factor of x - mean, and what is added then: (C,) each, or (T, C)."""
    factor = rstd if weight is None else rstd * weight.to(dtype)
    shift = torch.zeros_like(rstd) if bias is None else bias.to(dtype)
    factor = factor if scale == 1 else factor * scale
    if step_factor is not None:
        steps = step_factor.to(dtype).reshape(-1, 1)
        factor, shift = factor * steps, shift * steps
    return factor, shift


def update_running(running_mean, running_var, mean, squares, count, momentum):
    """Update the running statistics in place. squares: the sum of (x - mean)^2 of a channel, count: its number of values."""
    for running, new in ((running_mean, mean), (running_var, squares / (count - 1))):
        if running is not None:
            running.lerp_(new if new.dtype == running.dtype else new.to(running.dtype), momentum)


def _sum_over_processes(t, group):
    if group is None:
        return t
    from torch.distributed.nn.functional import all_reduce  # imports the distributed package

    return all_reduce(t, group=group)


def _spread(p, y):
    """Give p, (C,) or (T, C), the axes of y, (T, .., C)."""
    return p.reshape(p.shape[0], *[1] * (y.dim() - 2), p.shape[1]) if p.dim() == 2 else p


def norm_lif(
    x,
    weight=None,
    bias=None,
    running_mean=None,
    running_var=None,
    v=None,
    *,
    training,
    momentum=0.1,
    eps=1e-5,
    channel_axis=2,
    per_step=False,
    step_factor=None,
    scale=1.0,
    process_group=None,
    tau=2.0,
    v_threshold=1.0,
    v_reset=0.0,
    decay_input=True,
    detach_reset=False,
    surrogate="atan",
    alpha=None,
    levels=None,
    return_v=False,
    return_v_seq=False,
    spike_dtype=None,
):
    """See :func:`sdit_kernels.norm_lif`."""
    current, channels = normalise(
        x, weight, bias, running_mean, running_var, training, momentum, eps, channel_axis, per_step, step_factor, scale,
        process_group,
    )  # fmt: skip
    found = lif(
        current, None if v is None else v.movedim(channels - 1, -1), tau=tau, v_threshold=v_threshold, v_reset=v_reset,
        decay_input=decay_input, detach_reset=detach_reset, surrogate=surrogate, alpha=alpha, levels=levels, return_v=return_v,
        return_v_seq=return_v_seq, spike_dtype=spike_dtype or x.dtype,
    )  # fmt: skip
    return move_back(found, x, channels)


def normalise(
    x, weight, bias, running_mean, running_var, training, momentum, eps, channel_axis, per_step, step_factor, scale,
    process_group,
):  # fmt: skip
    """Return (the current of the neuron (T, .., C) in the dtype of the arithmetic, the axis of the channels of x)."""
    dtype, channels = state_dtype(x.dtype), channel_axis % x.dim()
    y = x.to(dtype).movedim(channels, -1)  # (T, .., C)
    if training:
        axes = tuple(range(1 if per_step else 0, y.dim() - 1))
        count = torch.full((), math.prod([y.shape[a] for a in axes]), dtype=dtype, device=x.device)
        count = _sum_over_processes(count, process_group).clamp(min=1.0)
        mean = _sum_over_processes(y.sum(axes), process_group) / count
        squares = _sum_over_processes((y - _spread(mean, y)).square().sum(axes), process_group)
        var = squares / count
        if x.numel():
            with torch.no_grad():
                update_running(running_mean, running_var, mean, squares, count, momentum)
    else:
        mean, var = running_mean.to(dtype), running_var.to(dtype)
    factor, shift = affine(1.0 / torch.sqrt(var + eps), weight, bias, step_factor, scale, dtype)
    return (y - _spread(mean, y)) * _spread(factor, y) + _spread(shift, y), channels


def move_back(found, x, channels):
    """Move the channels of the outputs of a neuron from the last axis to their place in x."""
    found = found if isinstance(found, tuple) else (found,)
    found = tuple(t.movedim(-1, channels - (t.dim() < x.dim())) for t in found)
    return found if len(found) > 1 else found[0]
