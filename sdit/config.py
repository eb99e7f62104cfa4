"""What defines a network and its objective, as one frozen record, and the sizes that have a name."""

import dataclasses
import math
from dataclasses import dataclass

__all__ = ["PRESETS", "Config"]

SPIKING = ("rate", "wkv")
VARIANTS = ("improved", "faithful")
CONDITIONS = ("first", "every")
SCANS = ("rows", "four")
PREDICTIONS = ("epsilon", "v", "flow")
WEIGHTINGS = ("uniform", "min_snr")


@dataclass(frozen=True)
class Config:
    """Everything that defines an SDiT and its diffusion objective; what a checkpoint stores beside the weights.

    Args:
        image_size: side of the square images, in pixels; a multiple of patch_size.
        channels: of the images; grey ones are repeated to it.
        patch_size: side of a patch, in pixels; N = (image_size / patch_size)^2 patches are the tokens, beside one for the
            condition.
        dim: C, channels of a token.
        depth: depth // 2 encoder blocks, one in the middle, depth // 2 decoder blocks: depth 2 is three blocks, depth 4 five.
        num_classes: labels are 0 .. num_classes - 1; num_classes itself is the null label.
        T: simulation steps of the neurons.
        tau: their time constant, in steps, at least 1.
        v_threshold: the membrane at which they fire.
        alpha: sharpness of the ATan surrogate derivative.
        learn_sigma: the network also gives logits of the variance: twice the output channels. Not with prediction "flow".
        reconstruction: blocks with learned reconstruction tokens, from which a gate is made.
        bidirectional: the scan over tokens goes both ways.
        spiking: "rate" (the firing rate after each mixing layer) or "wkv" (spikes inside the attention, see ``sdit.model``).
        variant: "improved" or "faithful" (to the research code): initial values, see ``sdit.model``; and what a trainer
            takes as its defaults.
        dropout_label: probability with which a label becomes the null label in training.
        dataset: name of the data, a key of ``sdit.data.DATASETS``, or None.
        prediction: what the network says of a noisy image, see ``sdit.diffusion.training_loss``: "epsilon", the noise in it;
            "v", the velocity of the diffusion; "flow", the velocity of a straight line from image to noise (rectified flow).
        weighting: of the squared error over time: "uniform", or "min_snr" (Min-SNR-5).
        condition: the tokens that carry the condition, time and label: "first", one of its own alone, from which the scan takes
            it to the others; or "every", where a learned projection of it is also added to each patch.
        scan: order of the patches in a block: "rows", or "four", which one block after the other takes in turn: by rows, by
            rows from the last to the first, by columns, by columns from the last to the first.

    Raises:
        TypeError, ValueError: naming the field, what it was given and what is allowed.

    Example:
        >>> from sdit.config import PRESETS, Config
        >>> PRESETS["mnist"].dim, PRESETS["mnist"].tokens
        (384, 197)
        >>> Config.from_dict(PRESETS["mnist"].to_dict()) == PRESETS["mnist"]
        True
    """

    image_size: int
    channels: int
    patch_size: int
    dim: int
    depth: int
    num_classes: int
    T: int = 4
    tau: float = 2.0
    v_threshold: float = 1.0
    alpha: float = 2.0
    learn_sigma: bool = True
    reconstruction: bool = True
    bidirectional: bool = False
    spiking: str = "rate"
    variant: str = "improved"
    dropout_label: float = 0.1
    dataset: str | None = None
    prediction: str = "epsilon"
    weighting: str = "uniform"
    condition: str = "first"
    scan: str = "rows"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{field.name} must be an int, got {value!r}")
            if kind is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
            if kind is float:
                if not isinstance(value, (int, float)) or isinstance(value, bool):
                    raise TypeError(f"{field.name} must be a number, got {value!r}")
                if not math.isfinite(value):
                    raise ValueError(f"{field.name} must be finite, got {value}")
                object.__setattr__(self, field.name, float(value))
            if kind is bool and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be true or false, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size, {self.patch_size}, got {self.image_size}")
        if self.tau < 1:
            raise ValueError(f"tau must be at least 1, got {self.tau}")
        if self.v_threshold <= 0:
            raise ValueError(f"v_threshold must be positive, got {self.v_threshold}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout_label < 1:
            raise ValueError(f"dropout_label must be a probability below 1, got {self.dropout_label}")
        named = {"spiking": SPIKING, "variant": VARIANTS, "condition": CONDITIONS, "scan": SCANS}
        named |= {"prediction": PREDICTIONS, "weighting": WEIGHTINGS}
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.dataset is not None and not isinstance(self.dataset, str):
            raise TypeError(f"dataset must be a name or None, got {self.dataset!r}")
        if self.bidirectional and self.spiking == "wkv":
            raise ValueError("bidirectional must be false with spiking='wkv', whose scan goes one way")
        if self.learn_sigma and self.prediction == "flow":
            raise ValueError("learn_sigma must be false with prediction='flow', whose samplers draw no noise")

    @property
    def tokens(self) -> int:
        """N + 1: one per patch and one for the condition."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """The inverse of ``to_dict``; fields that have a default may be missing."""
        if not isinstance(values, dict):
            raise TypeError(f"values must be a dict, got {type(values).__name__}")
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {f.name for f in fields})
        if unknown:
            raise ValueError(f"unknown fields of a Config: {', '.join(unknown)}; it has {', '.join(f.name for f in fields)}")
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise ValueError(f"a Config needs {', '.join(missing)}")
        return cls(**values)


_28 = Config(28, 3, 2, dim=384, depth=4, num_classes=10, variant="faithful", dataset="mnist")
_CIFAR = Config(28, 3, 2, dim=512, depth=8, num_classes=10, variant="faithful", dataset="cifar10")
PRESETS: dict[str, Config] = {
    "mnist": _28,
    "fashion_mnist": dataclasses.replace(_28, dataset="fashion_mnist"),
    "cifar10_28": _CIFAR,  # as published: CIFAR-10 made smaller
    "cifar10": dataclasses.replace(_CIFAR, image_size=32),
    "digits": Config(
        8, 1, 2, dim=64, depth=2, num_classes=10, v_threshold=0.3, dataset="digits"
    ),  # the last two: for two cores
    "fashion_tiny": Config(
        # What was worth most in equal time (perf/results/sdit_fashion_trials.json): no reconstruction tokens, into which half
        # of a step went (objective .0614 without, .0649 with, after 150 s of one core); scans in four orders (.0651 against
        # .0701 after 500 steps); and v (label accuracy .55 against .24, at the same Frechet distance).
        28,
        1,
        4,
        dim=128,
        depth=4,
        num_classes=10,
        reconstruction=False,
        dataset="fashion_mnist",
        prediction="v",
        scan="four",
    ),  # fmt: skip
}
