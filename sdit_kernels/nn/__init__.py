"""Modules that call the ops of this package: spiking neurons and RWKV-4's two mixing layers."""

from .neurons import IF, LIF, AdLIF, CuBa, Lapicque, Leaky, LIFRate, OverTime, ParametricLIF, detach, reset
from .rwkv import ChannelMix, TimeMix

__all__ = [
    "IF",
    "LIF",
    "AdLIF",
    "ChannelMix",
    "CuBa",
    "LIFRate",
    "Lapicque",
    "Leaky",
    "OverTime",
    "ParametricLIF",
    "TimeMix",
    "detach",
    "reset",
]
