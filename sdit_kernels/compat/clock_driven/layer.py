"""Layers under the names of ``spikingjelly.clock_driven.layer``."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import base, functional


class MultiStepContainer(nn.Sequential):
    """Call single-step modules on each of the T steps of x_seq, (T, ...)."""

    def forward(self, x_seq):
        return functional.multi_step_forward(x_seq, self)


class SeqToANNContainer(nn.Sequential):
    """Call stateless modules on x_seq, (T, B, ...), with T and B as one axis."""

    def forward(self, x_seq):
        return functional.seq_to_ann_forward(x_seq, self)


class Dropout(base.MemoryModule):
    """Dropout with one mask for all time steps until ``reset``."""

    def __init__(self, p=0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p}")
        self.register_memory("mask", None)
        self.p = p

    def extra_repr(self):
        return f"p={self.p}"

    def create_mask(self, x):
        self.mask = F.dropout(torch.ones_like(x.detach()), self.p)

    def _first_step(self, x):
        return x

    def forward(self, x):
        if not self.training:
            return x
        if self.mask is None:
            self.create_mask(self._first_step(x))
        return x * self.mask


class Dropout2d(Dropout):
    """Dropout of whole channels with one mask for all time steps until ``reset``."""

    def __init__(self, p=0.2):
        super().__init__(p)

    def create_mask(self, x):
        self.mask = F.dropout2d(torch.ones_like(x.detach()), self.p)


class MultiStepDropout(Dropout):
    """:class:`Dropout` of x_seq, (T, ...)."""

    def _first_step(self, x):
        return x[0]


class MultiStepDropout2d(Dropout2d):
    """:class:`Dropout2d` of x_seq, (T, ...)."""

    def __init__(self, p=0.5):
        super().__init__(p)

    def _first_step(self, x):
        return x[0]


class SynapseFilter(base.MemoryModule):
    """Current of a synapse: y[t] = y[t-1] - (1 - s[t]) y[t-1] / tau + s[t]. learnable: 1/tau = sigmoid(w)."""

    def __init__(self, tau=100.0, learnable=False):
        super().__init__()
        if not tau > 1:
            raise ValueError(f"tau must be above 1, got {tau}")
        self.learnable = learnable
        if learnable:
            self.w = nn.Parameter(torch.as_tensor(-math.log(tau - 1)))
        else:
            self.tau = tau
        self.register_memory("out_i", 0.0)

    def extra_repr(self):
        tau = 1 / self.w.detach().sigmoid() if self.learnable else self.tau
        return f"tau={tau}, learnable={self.learnable}"

    def forward(self, in_spikes):
        rate = self.w.sigmoid() if self.learnable else 1 / self.tau
        self.out_i = self.out_i - (1 - in_spikes) * self.out_i * rate + in_spikes
        return self.out_i


class NeuNorm(base.MemoryModule):
    """Subtract a learned multiple of the running mean of the spikes of all channels (Wu et al., AAAI 2019)."""

    def __init__(self, in_channels, height, width, k=0.9, shared_across_channels=False):
        super().__init__()
        self.register_memory("x", 0.0)
        self.k0 = k
        self.k1 = (1 - k) / in_channels**2
        self.w = nn.Parameter(torch.empty(1 if shared_across_channels else in_channels, height, width))
        nn.init.kaiming_uniform_(self.w, a=math.sqrt(5))

    def forward(self, in_spikes):
        self.x = self.k0 * self.x + self.k1 * in_spikes.sum(1, keepdim=True)
        return in_spikes - self.w * self.x

    def extra_repr(self):
        return f"shape={self.w.shape}"


class ConvBatchNorm2d(nn.Module):
    """Conv2d without bias and then BatchNorm2d."""

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros",
        eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
    ):  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False, padding_mode=padding_mode
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats)

    def forward(self, x):
        return self.bn(self.conv(x))

    def get_fused_weight(self):
        return functional.fused_conv2d_weight_of_convbn2d(self.conv, self.bn)

    def get_fused_bias(self):
        return functional.fused_conv2d_bias_of_convbn2d(self.conv, self.bn)

    def scale_fused_weight(self, k=None, b=None):
        functional.scale_fused_conv2d_weight_of_convbn2d(self.conv, self.bn, k, b)

    def scale_fused_bias(self, k=None, b=None):
        functional.scale_fused_conv2d_bias_of_convbn2d(self.conv, self.bn, k, b)

    def get_fused_conv(self):
        return functional.fuse_convbn2d(self.conv, self.bn)


class _ThresholdDependent(nn.Module):
    """BatchNorm over time and batch whose initial weight is alpha v_th (Zheng et al., AAAI 2021)."""

    def __init__(self, alpha: float, v_th: float, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.affine:
            raise ValueError("affine must be True, because the weight starts at alpha * v_th")
        self.alpha = alpha
        self.v_th = v_th
        nn.init.constant_(self.get_parameter("weight"), alpha * v_th)

    def forward(self, x_seq):
        return functional.seq_to_ann_forward(x_seq, super().forward)


class MultiStepThresholdDependentBatchNorm1d(_ThresholdDependent, nn.BatchNorm1d):
    """tdBN of x_seq, (T, B, C) or (T, B, C, L)."""


class MultiStepThresholdDependentBatchNorm2d(_ThresholdDependent, nn.BatchNorm2d):
    """tdBN of x_seq, (T, B, C, H, W)."""


class MultiStepThresholdDependentBatchNorm3d(_ThresholdDependent, nn.BatchNorm3d):
    """tdBN of x_seq, (T, B, C, D, H, W)."""


class MultiStepTemporalWiseAttention(nn.Module):
    """Multiply each time step of x_seq, (T, B, M) or (T, B, C, H, W), by a score from its mean and maximum.

    Source: Yao et al., Temporal-wise Attention Spiking Neural Networks, ICCV 2021.
    """

    def __init__(self, T: int, reduction: int = 16, dimension: int = 4):
        super().__init__()
        if dimension not in (2, 4):
            raise ValueError(f"dimension must be 2 or 4, got {dimension}")
        if reduction > T:
            raise ValueError(f"reduction must be at most T = {T}, got {reduction}")
        self.dimension = dimension
        first, second = nn.Linear(T, T // reduction, bias=False), nn.Linear(T // reduction, T, bias=False)
        self.sharedMLP = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x_seq):
        if x_seq.dim() != self.dimension + 1:
            raise ValueError(f"x_seq must have {self.dimension + 1} axes, (T, B, ...), got {x_seq.dim()}")
        steps = x_seq.flatten(2)
        score = torch.sigmoid(self.sharedMLP(steps.mean(2).t()) + self.sharedMLP(steps.amax(2).t())).t()
        return x_seq * score.reshape(*score.shape, *(1 for _ in x_seq.shape[2:]))


class ElementWiseRecurrentContainer(base.MemoryModule):
    """Single-step module with its last output as input: y[t] = sub_module(element_wise_function(y[t-1], x[t]))."""

    def __init__(self, sub_module: nn.Module, element_wise_function):
        super().__init__()
        self.sub_module = sub_module
        self.element_wise_function = element_wise_function
        self.register_memory("y", None)

    def forward(self, x):
        y = torch.zeros_like(x.detach()) if self.y is None else self.y
        self.y = self.sub_module(self.element_wise_function(y, x))
        return self.y

    def extra_repr(self):
        return f"element-wise function={self.element_wise_function}"


class LinearRecurrentContainer(base.MemoryModule):
    """Single-step module with its last output as input: y[t] = sub_module(rc(concatenation of x[t] and y[t-1]))."""

    def __init__(self, sub_module: nn.Module, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.sub_module_out_features = out_features
        self.rc = nn.Linear(in_features + out_features, in_features, bias)
        self.sub_module = sub_module
        self.register_memory("y", None)

    def forward(self, x):
        y = x.new_zeros(*x.shape[:-1], self.sub_module_out_features) if self.y is None else self.y
        self.y = self.sub_module(self.rc(torch.cat((x, y), -1)))
        return self.y


class PrintShapeModule(nn.Module):
    """Print the shape of x and return x."""

    def __init__(self, ext_str="PrintShapeModule"):
        super().__init__()
        self.ext_str = ext_str

    def forward(self, x):
        print(self.ext_str, x.shape)
        return x


__getattr__ = base.refuse_names("layer", "DCT", "AXAT", "ChannelsPool", "DropConnectLinear", "STDPLearner")
