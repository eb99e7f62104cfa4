"""The settings of a training run, and recipes for the small presets."""

import dataclasses
import math
from dataclasses import dataclass

from .config import Config

__all__ = ["RECIPES", "TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training run. ``TrainSettings.of(config)`` returns settings that suit a configuration.

    The defaults are the values of the research code. For the variant "improved", ``of`` uses lr 1e-3, 200 steps of warm-up,
    cosine decay, clipping at 1, averaging with decay 0.999 and flips. With dim < 384 it then applies the entry of ``RECIPES``
    for the data set, if there is one.

    Args:
        steps: total number of optimiser steps.
        batch_size: images of one step, over all processes and accumulated parts.
        accumulate: number of parts into which a process splits its images of a step, to save memory.
        lr: learning rate of AdamW after the warm-up.
        weight_decay: weight decay of AdamW.
        warmup: steps over which the learning rate rises linearly.
        cosine: True lets the learning rate fall to 0 at the last step, along a cosine; False keeps it constant.
        clip: largest norm of the gradient, 0 for no limit.
        ema: decay of the average of the weights, 0 for no average. At step n the decay is at most (1 + n) / (10 + n).
        flip: mirror half of the images left to right, if mirrored images of the data set keep their class.
        bf16: compute matrix multiplications in bfloat16 (autocast).
        tf32: on a GPU, compute float32 matrix multiplications in TF32: 10 bits of precision instead of 23.
        compile: compile the model and the loss with torch.compile, as one graph. The first step then takes a minute.
        graph: on a GPU, record a step as CUDA graphs at the third step and replay them from then on. In one process only.
        seed: seed of the initial weights and of all random numbers.
        log_every: steps between lines of metrics.jsonl. A line holds the means over these steps.
        sample_every: steps between pictures in samples/, 0 for none.
        save_every: steps between checkpoints.
        keep: number of checkpoints to keep, the newest ones.

    Raises:
        TypeError, ValueError: a field is wrong; the message names the field, its value and the allowed values.

    Example:
        >>> from sdit import PRESETS
        >>> from sdit.settings import TrainSettings
        >>> TrainSettings.of(PRESETS["mnist"]).lr, TrainSettings.of(PRESETS["mnist"], lr=3e-4).lr
        (0.0001, 0.0003)
    """

    steps: int = 100_000
    batch_size: int = 256
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: int = 0
    cosine: bool = False
    clip: float = 0.0
    ema: float = 0.0
    flip: bool = False
    bf16: bool = False
    tf32: bool = True
    compile: bool = False
    graph: bool = False
    seed: int = 0
    log_every: int = 20
    sample_every: int = 1000
    save_every: int = 1000
    keep: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0
            if field.type is bool:
                if not isinstance(value, bool):
                    raise TypeError(f"{field.name} must be true or false, got {value!r}")
                continue
            number = isinstance(value, (int, float) if field.type is float else int)
            if not number or isinstance(value, bool):
                raise TypeError(f"{field.name} must be {'a number' if field.type is float else 'an int'}, got {value!r}")
            if field.name in ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep"):
                least = 1
            limit, bound = (math.inf, "finite") if field.type is float else (2**63, "below 2^63")
            if field.name == "lr" and not 0 < value < limit:
                raise ValueError(f"lr must be positive and finite, got {value}")
            if not least <= value < limit:
                raise ValueError(f"{field.name} must be at least {least} and {bound}, got {value}")
        if not self.ema < 1:
            raise ValueError(f"ema must be below 1, got {self.ema}")

    @classmethod
    def of(cls, config: Config, **changes) -> "TrainSettings":
        """Return the settings that suit ``config``, with the fields of ``changes`` replaced."""
        suited = {}
        if config.variant == "improved":
            suited = dict(lr=1e-3, warmup=200, cosine=True, clip=1.0, ema=0.999, flip=True)
            suited |= RECIPES.get(config.dataset, {}) if config.dim < 384 else {}
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise TypeError(f"TrainSettings does not have the fields {', '.join(unknown)}")
        return cls(**(suited | changes))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step ``step`` (0, 1, ..)."""
        warmup_factor = min(1.0, (step + 1) / (self.warmup + 1))
        decay_progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * warmup_factor * (0.5 * (1 + math.cos(math.pi * decay_progress)) if self.cosine else 1.0)


RECIPES = {  # {data set: settings of a small network that train in minutes on two CPU cores}
    # Flips have no effect on digits: the data set says that a mirrored image changes its class.
    "digits": dict(steps=2000, batch_size=64, lr=3e-3, warmup=100, ema=0.995, sample_every=500, save_every=500),
    # No flips, because every sneaker and boot of Fashion-MNIST points to the left. The Frechet distance of 500 real images from
    # the test images is .126, and .167 with every other image mirrored (perf/results/sdit_fashion_trials.json).
    "fashion_mnist": dict(steps=4000, batch_size=64, lr=5e-3, flip=False, sample_every=1000, save_every=500),
}
