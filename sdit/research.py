"""Load checkpoints of the research code of arXiv 2402.11588, without executing code from the file."""

import argparse
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from .config import Config
from .model import SDiT

__all__ = ["from_research", "load_research", "research_name"]

_RESEARCH = (  # our prefix, the prefix of the research code; parameters of a block also have a block prefix
    ("patches.", "x_embedder.proj."),
    ("time.", "t_embedder.mlp."),
    ("labels.", "y_embedder.embedding_table."),
    ("position", "pos_embed"),
    ("final.", "final_layer.linear."),
    ("smooth.", "conv."),
    ("reconstruction", "restruction_token"),
    ("tokens_in.", "restruction_token_MLP."),
    ("tokens_out.", "another_MLP."),
    ("attention.", "att."),
    ("mlp.", "ffn."),
    ("skip.", "skip_linear."),
)


def research_name(name: str, half: int) -> str:
    """Return the research code's name of our parameter ``name``; ``half`` is the number of encoder blocks."""
    block = re.match(r"blocks\.(\d+)\.", name)
    prefix = ""
    if block:
        i, name = int(block[1]), name[block.end() :]
        prefix = f"in_blocks.{i}." if i < half else "mid_block." if i == half else f"out_blocks.{i - half - 1}."
    ours, theirs = next(pair for pair in _RESEARCH if name.startswith(pair[0]))
    return prefix + theirs + name.removeprefix(ours)


def _research_config(state_dict) -> Config:
    """Derive the configuration from the shapes of the tensors."""
    problems = []

    def shape(name, axes):
        tensor = state_dict.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() == axes:
            return tensor.shape
        found = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        problems.append(f"missing {name}" if tensor is None else f"{name} is {found} where {axes} axes are wanted")
        return (0,) * axes

    dim, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    _, tokens, _ = shape("pos_embed", 3)
    labels, _ = shape("y_embedder.embedding_table.weight", 2)
    out = shape("conv.weight", 4)[0]
    if not problems:
        side = math.isqrt(max(tokens - 1, 0))
        if side * side != tokens - 1:
            problems.append(f"pos_embed has {tokens} tokens, not a square number of patches plus one")
        if out not in (channels, 2 * channels):
            problems.append(f"conv.weight gives {out} channels where images have {channels}")
    if problems:
        raise ValueError(f"not the weights of a research SDiT: {'; '.join(problems)}")
    counts = [
        1 + max((int(m[1]) for name in state_dict if (m := re.match(rf"{blocks}\.(\d+)\.", name))), default=-1)
        for blocks in ("in_blocks", "out_blocks")
    ]
    return Config(
        image_size=side * patch, channels=channels, patch_size=patch, dim=dim, depth=max(2 * max(counts), 1),
        num_classes=labels - 1, learn_sigma=out == 2 * channels, variant="faithful",
    )  # fmt: skip


def from_research(state_dict: dict[str, Tensor]) -> SDiT:
    """Make a model from a state dict of the research code of arXiv 2402.11588, of any size.

    The shapes of the tensors determine dim, depth, patch size, image size, number of classes and learn_sigma. The shapes do not
    determine T, tau and v_threshold; these get the values of the research code, the defaults of :class:`sdit.config.Config`.

    Args:
        state_dict: {name: tensor}, the research code's ``model.state_dict()``; the tensors are copied. To read a file, use
            :func:`load_research`.

    Raises:
        TypeError: state_dict is not a dict. ValueError: keys are missing, unknown or of the wrong shape; the message names all.

    Example:
        >>> from sdit.research import from_research
        >>> from_research({})
        Traceback (most recent call last):
            ...
        ValueError: not the weights of a research SDiT: missing x_embedder.proj.weight; missing pos_embed; missing \
y_embedder.embedding_table.weight; missing conv.weight
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state_dict).__name__}")
    config = _research_config(state_dict)
    with torch.device("meta"):
        model = SDiT(config)
    half = config.depth // 2
    names = {research_name(name, half): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing {name}" for name in names if name not in state_dict]
    found = {}
    for name, tensor in state_dict.items():
        if name not in names:
            problems.append(f"unknown {name}")
            continue
        ours, shape = names[name]
        wanted = (*shape[:1], config.channels, config.patch_size, config.patch_size) if ours == "patches.weight" else shape
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            problems.append(
                f"{name} is {tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__}, not a float tensor"
            )
        elif tensor.shape != wanted:
            problems.append(f"{name} has shape {tuple(tensor.shape)} where {tuple(wanted)} is wanted")
        else:
            found[ours] = tensor.detach().reshape(shape).clone()
    if problems:
        raise ValueError(f"not the weights of a research SDiT: {'; '.join(problems)}")
    model.load_state_dict(found, assign=True)
    return model


def load_research(path) -> SDiT:
    """Load a checkpoint file of the research code, ``{"model": state dict, "opt": ..., "args": Namespace}``.

    The file is read with ``weights_only``, so none of its code is executed.

    Args:
        path: the .pt file.

    Raises:
        OSError: the file cannot be read. ValueError: the file is not a checkpoint of the research code; see also
            :func:`from_research`.

    Example:
        >>> import torch
        >>> from sdit.research import load_research
        >>> model = load_research("model.pt")  # doctest: +SKIP
    """
    try:
        with Path(path).open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # for bytes that are not a pickle, torch raises many types: KeyError, struct.error, ...
        # torch's own message recommends weights_only=False, which would execute code from the file.
        raise ValueError(f"{path} is not a checkpoint of PyTorch, or holds more than tensors and plain data") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        kind = f"a dict of {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path} must hold {{"model": state dict, ...}}, as research checkpoints do; it holds {kind:.200}')
    try:
        return from_research(content["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
