"""Encoders of numbers as spikes, under the names of ``spikingjelly.clock_driven.encoding``."""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from . import base


class StatelessEncoder(nn.Module):
    """Base class of encoders without state."""

    @abstractmethod
    def forward(self, x):
        raise NotImplementedError


class StatefulEncoder(base.MemoryModule):
    """Base class of encoders that make T steps of spikes in the first call, and return one step per call.

    ``encode(x)`` sets ``self.spike``, (T, ...).
    """

    def __init__(self, T: int):
        super().__init__()
        if not isinstance(T, int) or T < 1:
            raise ValueError(f"T must be an int of at least 1, got {T!r}")
        self.T = T
        self.register_memory("spike", None)
        self.register_memory("t", 0)

    def forward(self, x=None):
        if self.spike is None:
            self.encode(x)
        t, self.t = self.t, (self.t + 1) % self.T
        return self.spike[t]

    @abstractmethod
    def encode(self, x):
        raise NotImplementedError

    def extra_repr(self):
        return f"T={self.T}"


class PeriodicEncoder(StatefulEncoder):
    """Repeat given spikes, (T, ...)."""

    def __init__(self, spike):
        super().__init__(spike.shape[0])
        self.encode(spike)

    def encode(self, spike):
        self.spike = spike
        self.T = spike.shape[0]


class LatencyEncoder(StatefulEncoder):
    """Encode x in [0, 1] as one spike, which comes earlier for larger x.

    The step is round((T-1) (1-x)) for "linear", and round(T - 1 - log(alpha x + 1)), alpha = e^(T-1) - 1, for "log".
    """

    def __init__(self, T: int, enc_function="linear"):
        super().__init__(T)
        if enc_function not in ("linear", "log"):
            raise ValueError(f'enc_function must be "linear" or "log", got {enc_function!r}')
        if enc_function == "log":
            self.alpha = math.exp(T - 1) - 1
        self.enc_function = enc_function

    def encode(self, x):
        log = self.enc_function == "log"
        step = self.T - 1 - torch.log(self.alpha * x + 1) if log else (self.T - 1) * (1 - x)
        self.spike = F.one_hot(step.round().long(), self.T).to(x).movedim(-1, 0)


class PoissonEncoder(StatelessEncoder):
    """Draw a spike with probability x in [0, 1]."""

    def forward(self, x):
        return (torch.rand_like(x) <= x).to(x)


class WeightedPhaseEncoder(StatefulEncoder):
    """Encode x in [0, 1 - 2^-K] by its K binary digits, the digit 1/2 first."""

    def __init__(self, K: int):
        super().__init__(K)

    def encode(self, x):
        if not ((x >= 0) & (x <= 1 - 2**-self.T)).all():
            raise ValueError(f"x must be between 0 and 1 - 2^-{self.T}")
        digits = []
        for t in range(self.T):
            weight = 0.5 ** (t + 1)
            digits.append((x >= weight).to(x))
            x = x - weight * digits[-1]
        self.spike = torch.stack(digits)
