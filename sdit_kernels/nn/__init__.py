"""Spiking neurons, and RWKV-4's two mixing layers, as modules over the ops of this package."""

from .neurons import IF, LIF, LIFRate, OverTime, ParametricLIF, detach, reset
from .rwkv import ChannelMix, TimeMix

__all__ = ["IF", "LIF", "ChannelMix", "LIFRate", "OverTime", "ParametricLIF", "TimeMix", "detach", "reset"]
