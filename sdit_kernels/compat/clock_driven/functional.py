"""Functions under the names of ``spikingjelly.clock_driven.functional``."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import base


def reset_net(net):
    """Call ``reset`` of every module that has one."""
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()


def _apply_all(x, modules):
    if isinstance(modules, (list, tuple, nn.Sequential)):
        for module in modules:
            x = module(x)
        return x
    return modules(x)


def multi_step_forward(x_seq, single_step_module):
    """Call a module, or several in turn, on each of the T steps of x_seq, (T, ...). Return the stacked outputs."""
    return torch.stack([_apply_all(x, single_step_module) for x in x_seq])


def seq_to_ann_forward(x_seq, stateless_module):
    """Call a stateless module, or several in turn, on x_seq with T and B as one axis. Return (T, B, ...)."""
    return _apply_all(x_seq.flatten(0, 1), stateless_module).unflatten(0, x_seq.shape[:2])


def set_threshold_margin(output_layer, label_one_hot, eval_threshold=1.0, threshold0=0.9, threshold1=1.1):
    """Set the threshold of each output neuron: threshold1 for the right class, else threshold0; eval_threshold in eval mode."""
    if not isinstance(label_one_hot, torch.Tensor):
        raise TypeError(f"label_one_hot must be a tensor, got {type(label_one_hot).__name__}")
    if not output_layer.training:
        output_layer.v_threshold = eval_threshold
        return
    low = torch.ones_like(label_one_hot) * threshold0
    output_layer.v_threshold = low.masked_fill(label_one_hot == 1, threshold1)


def redundant_one_hot(labels, num_classes: int, n: int):
    """Return a one-hot code in which each class has n places, (B, num_classes n)."""
    codes = F.one_hot(labels, num_classes).repeat_interleave(n, dim=-1)
    return codes.to(torch.get_default_dtype())


def first_spike_index(spikes):
    """Return True at the first spike along the last axis, which is time."""
    with torch.no_grad():
        return spikes.cumsum(-1).cumsum(-1) == 1


def kernel_dot_product(x, y, kernel="linear", *args):
    """Return the matrix of kernel(x_i, y_j) of the rows of x and y.

    kernel: "linear", "polynomial" (args: d), "sigmoid" (alpha) or "gaussian" (sigma).
    """
    if kernel == "linear":
        return x @ y.t()
    if kernel == "polynomial":
        return (x @ y.t()) ** args[0]
    if kernel == "sigmoid":
        return torch.sigmoid(args[0] * (x @ y.t()))
    if kernel == "gaussian":
        squares = x.square().sum(1)[:, None] + y.square().sum(1)
        return torch.exp(-(squares - 2 * x @ y.t()) / (2 * args[0] ** 2))
    raise ValueError(f"kernel must be linear, polynomial, sigmoid or gaussian, got {kernel!r}")


def spike_similar_loss(spikes, labels, kernel_type="linear", loss_type="mse", *args):
    """Return the loss between the similarity of spikes, (B, ...), and the similarity of labels, (B, classes), one-hot."""
    losses = {"mse": F.mse_loss, "l1": F.l1_loss, "bce": F.binary_cross_entropy}
    if loss_type not in losses:
        raise ValueError(f"loss_type must be mse, l1 or bce, got {loss_type!r}")
    spikes, labels = spikes.flatten(1), labels.float()
    found = kernel_dot_product(spikes, spikes, kernel_type, *args)
    if kernel_type == "linear":
        length = spikes.norm(dim=1, keepdim=True)
        found = found / (length @ length.t() + 1e-8)
    return losses[loss_type](found, (labels @ labels.t()).clamp(max=1))


def fused_conv2d_weight_of_convbn2d(conv2d, bn2d):
    """Return the weight of the convolution that equals conv2d, which has no bias, and then bn2d in evaluation mode."""
    _refuse_bias(conv2d)
    return conv2d.weight * _scale(bn2d).reshape(-1, 1, 1, 1)


def fused_conv2d_bias_of_convbn2d(conv2d, bn2d):
    """Return the bias of the convolution that equals conv2d, which has no bias, and then bn2d in evaluation mode."""
    _refuse_bias(conv2d)
    return bn2d.bias - bn2d.running_mean * _scale(bn2d)


@torch.no_grad()
def scale_fused_conv2d_weight_of_convbn2d(conv2d, bn2d, k=None, b=None):
    """Set the fused weight to k weight + b, in place."""
    _refuse_bias(conv2d)
    if k is not None:
        conv2d.weight.mul_(k)
    if b is not None:
        conv2d.weight.add_(b)


@torch.no_grad()
def scale_fused_conv2d_bias_of_convbn2d(conv2d, bn2d, k=None, b=None):
    """Set the fused bias to k bias + b, in place."""
    _refuse_bias(conv2d)
    if k is not None:
        bn2d.bias.mul_(k)
        bn2d.running_mean.mul_(k)
    if b is not None:
        bn2d.bias.add_(b)


@torch.no_grad()
def fuse_convbn2d(conv2d, bn2d, k=None, b=None):
    """Return a new convolution that equals conv2d and then bn2d in evaluation mode. k, b: scale both first, in place."""
    scale_fused_conv2d_weight_of_convbn2d(conv2d, bn2d, k, b)
    scale_fused_conv2d_bias_of_convbn2d(conv2d, bn2d, k, b)
    fused = nn.Conv2d(
        conv2d.in_channels, conv2d.out_channels, conv2d.kernel_size, conv2d.stride, conv2d.padding, conv2d.dilation,
        conv2d.groups, True, conv2d.padding_mode, device=conv2d.weight.device, dtype=conv2d.weight.dtype,
    )  # fmt: skip
    fused.weight.copy_(fused_conv2d_weight_of_convbn2d(conv2d, bn2d))
    fused.bias.copy_(fused_conv2d_bias_of_convbn2d(conv2d, bn2d))
    return fused


def _refuse_bias(conv2d):
    if conv2d.bias is not None:
        raise ValueError("conv2d must have no bias, because the BatchNorm after it has one")


def _scale(bn2d):
    return bn2d.weight / torch.sqrt(bn2d.running_var + bn2d.eps)


def temporal_efficient_training_cross_entropy(x_seq, target):
    """Return the cross entropy of every time step, averaged. x_seq: (T, B, classes, ...); target: (B, ...), class indices.

    Source: Deng et al., Temporal Efficient Training, ICLR 2022.
    """
    target = target.unsqueeze(0).expand(x_seq.shape[0], *target.shape)
    if target.dim() == 2:  # one class for a sample, also for outputs with further axes
        target = target.reshape(*target.shape, *(1 for _ in x_seq.shape[3:])).expand(-1, -1, *x_seq.shape[3:])
    return F.cross_entropy(x_seq.flatten(0, 1), target.flatten(0, 1))


def kaiming_normal_conv_linear_weight(net: nn.Module):
    """Draw the weights of every convolution and Linear with ``kaiming_normal_(a=sqrt(5))``."""
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=math.sqrt(5))


__getattr__ = base.refuse_names("functional", "spike_cluster")
