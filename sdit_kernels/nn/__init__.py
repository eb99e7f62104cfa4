"""Modules that call the ops of this package: spiking neurons and RWKV-4's two mixing layers."""

from .neurons import IF, LIF, Leaky, LIFRate, OverTime, ParametricLIF, detach, reset
from .rwkv import ChannelMix, TimeMix

__all__ = ["IF", "LIF", "ChannelMix", "LIFRate", "Leaky", "OverTime", "ParametricLIF", "TimeMix", "detach", "reset"]
