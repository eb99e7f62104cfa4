"""The configuration of a network and its objective, and the named presets."""

import dataclasses
import math
from dataclasses import dataclass

__all__ = ["PRESETS", "Config"]

SPIKING = ("rate", "wkv", "pure")
VARIANTS = ("improved", "faithful")
CONDITIONS = ("first", "every")
SCANS = ("rows", "four")
PREDICTIONS = ("epsilon", "v", "flow")
WEIGHTINGS = ("uniform", "min_snr")
TIMES = ("uniform", "logit_normal")


@dataclass(frozen=True)
class Config:
    """The configuration of an SDiT and its diffusion objective. A checkpoint stores it beside the weights.

    Args:
        image_size: side of the square images, in pixels; a multiple of patch_size.
        channels: channels of the images; grey images are repeated to this number.
        patch_size: side of a patch, in pixels. The tokens are N = (image_size / patch_size)^2 patches, and one token for the
            condition.
        dim: C, channels of a token.
        depth: the network has depth // 2 encoder blocks, one middle block and depth // 2 decoder blocks: 3 blocks for depth 2,
            5 for depth 4.
        num_classes: labels are 0 .. num_classes - 1; num_classes itself is the null label.
        T: time steps of the neurons.
        tau: membrane time constant of the neurons, in time steps, at least 1.
        v_threshold: membrane potential at which a neuron fires.
        alpha: width parameter of the ATan surrogate gradient; a larger value makes it narrower.
        learn_sigma: the network also predicts logits of the variance, in twice the output channels. Not with prediction "flow".
        reconstruction: each block has learned reconstruction tokens, from which it computes a gate.
        bidirectional: the scan over tokens runs in both directions.
        spiking: "rate" (the firing rate after each mixing layer), "wkv" (spikes inside the attention, see ``sdit.model``) or
            "pure" (every matrix multiplication sees spikes, see ``sdit.pure``). The neurons of "pure" have no state and learn
            their thresholds, so T, tau, v_threshold and alpha do not apply.
        variant: "improved" or "faithful" (to the research code). It selects the initial values, see ``sdit.model``, and the
            defaults of ``sdit.settings.TrainSettings``.
        dropout_label: probability with which a label becomes the null label in training.
        dataset: name of the data set, a key of ``sdit.data.DATASETS``, or None.
        prediction: the network's target, see ``sdit.diffusion.training_loss``: "epsilon", the noise in the image; "v", the
            velocity of the diffusion; "flow", the velocity of a straight line from image to noise (rectified flow).
        weighting: weight of the squared error over time: "uniform", or "min_snr" (Min-SNR-5).
        times: distribution of the training times: "uniform", or "logit_normal", 1000 sigmoid(z - 1) with z normal: 73 % of the
            times are between 100 and 500.
        condition: the tokens that receive the condition (time and label): "first", one condition token, from which the scan
            carries it to the others; or "every", which also adds a learned projection of the condition to each patch.
        scan: order of the patches in a block: "rows"; or "four", where successive blocks use four orders in turn: rows, rows
            reversed, columns, columns reversed.
        levels: the neurons of spiking "pure" fire integers from -levels to levels, 1 to 64.
        planes: number of bit planes into which spiking "pure" splits the pixels, 1 to 16.

    Raises:
        TypeError, ValueError: a field is wrong; the message names the field, its value and the allowed values.

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
    times: str = "uniform"
    condition: str = "first"
    scan: str = "rows"
    levels: int = 4
    planes: int = 10

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
        named |= {"prediction": PREDICTIONS, "weighting": WEIGHTINGS, "times": TIMES}
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.dataset is not None and not isinstance(self.dataset, str):
            raise TypeError(f"dataset must be a name or None, got {self.dataset!r}")
        if self.bidirectional and self.spiking == "wkv":
            raise ValueError("bidirectional must be false with spiking='wkv', whose scan goes one way")
        self._check_spiking()
        if self.learn_sigma and self.prediction == "flow":
            raise ValueError("learn_sigma must be false with prediction='flow', whose samplers draw no noise")

    def _check_spiking(self):
        if self.spiking == "pure":
            for name, most in (("levels", 64), ("planes", 16)):
                if getattr(self, name) > most:
                    raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
            if self.variant != "improved":
                raise ValueError(f"variant must be 'improved' with spiking='pure', got {self.variant!r}")
            if self.reconstruction:
                raise ValueError("reconstruction must be false with spiking='pure', whose blocks have no gate")
            unused = ("T", "tau", "v_threshold", "alpha")
        else:
            unused = ("levels", "planes")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in unused:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name} does not apply to spiking={self.spiking!r}: it must be {defaults[name]}, got {getattr(self, name)}"
                )

    @property
    def tokens(self) -> int:
        """The number of tokens, N + 1: one per patch and one for the condition."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Make a Config from the dict of ``to_dict``. Fields that have a default may be missing."""
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


_MNIST = Config(28, 3, 2, dim=384, depth=4, num_classes=10, variant="faithful", dataset="mnist")
_CIFAR = Config(28, 3, 2, dim=512, depth=8, num_classes=10, variant="faithful", dataset="cifar10")
PRESETS: dict[str, Config] = {
    "mnist": _MNIST,
    "fashion_mnist": dataclasses.replace(_MNIST, dataset="fashion_mnist"),
    "cifar10_28": _CIFAR,  # the published size: CIFAR-10 resized to 28 pixels
    "cifar10": dataclasses.replace(_CIFAR, image_size=32),
    "digits": Config(
        8, 1, 2, dim=64, depth=2, num_classes=10, v_threshold=0.3, dataset="digits"
    ),  # this preset and the next are sized for training on two CPU cores
    "fashion_tiny": Config(
        # The choices that gained most in equal time (perf/results/sdit_fashion_trials.json): no reconstruction tokens, which
        # took half of a step (objective .0614 without, .0649 with, after 150 s of one core); scans in four orders (.0651
        # against .0701 after 500 steps); and prediction v (label accuracy .55 against .24, at the same Frechet distance).
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
# Like fashion_tiny, in spikes alone
PRESETS["fashion_pure"] = dataclasses.replace(PRESETS["fashion_tiny"], spiking="pure", condition="every")
