"""Checkpoints: one safetensors file each, whose header holds, as JSON, what is not a tensor."""

import json
import re
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from .config import Config
from .files import atomic_write
from .model import SDiT
from .research import from_research, load_research

__all__ = ["about", "checkpoints", "from_research", "load", "load_model", "load_research", "newest", "save", "save_model"]


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from None
    return safetensors


def save(path, groups: dict[str, dict[str, Tensor]], meta: dict) -> None:
    """Write a checkpoint, whole or not at all: a file beside it takes its place once it is on the disk. It has a checksum.

    Args:
        path: of the file, which an earlier one gives way to.
        groups: {group: {name: tensor}}, as {"model": model.state_dict()}; stored under "group.name".
        meta: what JSON can hold; {"config": config.to_dict()} is what :func:`load_model` needs.

    Raises:
        OSError: naming path; nothing that was there before has changed.
        ImportError: safetensors is missing.

    Example:
        >>> import tempfile, torch
        >>> from sdit.checkpoint import load, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", {"model": {"w": torch.ones(2)}}, {"step": 3})
        ...     load(f"{folder}/a.safetensors")
        ({'model': {'w': tensor([1., 1.])}}, {'step': 3})
    """
    path = Path(path)
    flat = {f"{group}.{name}": t.detach().cpu().contiguous() for group, named in groups.items() for name, t in named.items()}
    # One entry, with the checksum in it first: of several, safetensors writes now one first and now another.
    content = _safetensors().torch.save(flat, {"sdit": json.dumps({"crc32": _UNKNOWN.decode(), **meta})})
    size = 8 + int.from_bytes(content[:8], "little")
    header = _CHECKSUM.sub(rb"\g<1>%08x" % zlib.crc32(content), content[:size], count=1)
    with atomic_write(path, "this checkpoint is not saved, earlier ones are intact") as file:
        file.write(header)
        file.write(memoryview(content)[size:])


# The checksum is of the whole file, with _UNKNOWN in its own place. CRC-32 finds all damage that lies within 32 bits and misses
# one in 4e9 of other damage. It is the cheapest: zlib's CRC-32 runs at 1.4 GB/s, hashlib's SHA-256 at 0.6 and blake2b at 0.3.
_UNKNOWN = b"--------"
_CHECKSUM = re.compile(rb'("sdit": ?"{\\"crc32\\": \\")([0-9a-f]{8}|-{8})')  # inside strings, quotes have a backslash


def _verify(path):
    """Raise if the checksum in the file does not fit its content. Files of earlier versions have none."""
    with path.open("rb") as file:
        start = file.read(8)
        header = start + file.read(min(int.from_bytes(start, "little"), path.stat().st_size))
        found = _CHECKSUM.search(header)
        if found is None:
            return
        actual = zlib.crc32(_CHECKSUM.sub(rb"\1" + _UNKNOWN, header, count=1))
        while part := file.read(1 << 20):
            actual = zlib.crc32(part, actual)
    if b"%08x" % actual != found[2]:
        raise _damaged(path, f"its checksum is {actual:08x}, it should be {found[2].decode()}")


def _damaged(path, why):
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    older = [other for other in checkpoints(run) if other < path]
    instead = f"; remove it to go on from the one before, {older[-1].name}" if older else ""
    return ValueError(f"{path} is not a checkpoint of sdit, or damaged: {why}{instead}")


@contextmanager
def _opened(path, verify=True):
    safetensors = _safetensors()
    path = Path(path)
    path.open("rb").close()  # an OSError says more than safetensors' own
    if verify:
        _verify(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("sdit", "null"))
            if not isinstance(meta, dict):
                raise ValueError(f"{path} is not a checkpoint of sdit: its header has no entry 'sdit'")
            meta.pop("crc32", None)
            yield file, meta
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from None


def load(path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """What :func:`save` was given, on the CPU.

    Raises:
        OSError: it cannot be read. ValueError: it is not such a file, or is damaged. ImportError: safetensors is missing.
    """
    with _opened(path) as (file, meta):
        groups = {}
        for group, name, key in _tensors(file):
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        return groups, meta


def _tensors(file):
    """(group, name, key in the file) of each tensor, by the name that it has in today's models."""
    for key in file.keys():  # noqa: SIM118 - it is not a dict
        group, name = key.split(".", 1)
        yield group, re.sub(r"^spread\.", "condition_to_patches.", name), key


def about(path) -> dict:
    """The meta that :func:`save` was given; errors as :func:`load`. It reads the header alone and verifies no checksum."""
    with _opened(path, verify=False) as (_, meta):
        return meta


def save_model(path, model: SDiT) -> None:
    """Write a model alone, for :func:`load_model`; errors as :func:`save`."""
    save(path, {"model": model.state_dict()}, {"config": model.config.to_dict(), "data": model.trained_on})


def load_model(path, ema: bool = True) -> SDiT:
    """The model of a checkpoint, on the CPU, in eval mode.

    Args:
        path: a checkpoint, or the folder of a run, whose newest one is taken; or "pretrained", the package's, which draws
            Fashion-MNIST.
        ema: take the averaged weights, where the checkpoint has some.

    Raises:
        OSError: it cannot be read. ValueError: it is none, damaged, or of another network than its configuration says.
        ImportError: safetensors is missing.

    Example:
        >>> import tempfile
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.checkpoint import load_model, save_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_model(f"{folder}/a.safetensors", SDiT(PRESETS["digits"], dim=32, depth=2))
        ...     load_model(f"{folder}/a.safetensors").config.dim
        32
    """
    path = newest(path)
    with _opened(path) as (file, meta):
        tensors = list(_tensors(file))
        wanted = "ema" if ema and any(group == "ema" for group, *_ in tensors) else "model"
        weights = {name: file.get_tensor(key) for group, name, key in tensors if group == wanted}
    try:
        config = Config.from_dict(meta.get("config", {}))
        with torch.device("meta"):
            model = SDiT(config)
        model.load_state_dict(weights, assign=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no model: {' '.join(str(error).split())}") from None
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.trained_on = meta.get("data", {})
    return model.eval()


def checkpoints(run) -> list[Path]:
    """The checkpoints in the folder of a run, the newest last."""
    return sorted(Path(run).glob("checkpoints/step_*.safetensors"))


PRETRAINED = Path(__file__).with_name("fashion_mnist.safetensors")  # averaged weights of a run of fashion_tiny


def newest(path) -> Path:
    """path itself, or the newest checkpoint where it is the folder of a run; "pretrained" is the model of the package, unless
    something here has that name.

    Raises:
        FileNotFoundError: the folder holds none, or there is no such path.
    """
    path = Path(path)
    if str(path) == "pretrained" and not path.exists():
        return PRETRAINED
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give a checkpoint or the folder of a run")
        if not path.is_file():
            raise ValueError(f"{path} is neither a file nor a folder: give a checkpoint or the folder of a run")
        return path
    found = checkpoints(path)
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint: no file checkpoints/step_*.safetensors")
    return found[-1]


def prune_checkpoints(run, keep: int) -> None:
    """Remove all checkpoints of a run but the newest ``keep``, and what a killed process left half written."""
    for path in (*checkpoints(run)[:-keep], *Path(run).glob("checkpoints/.step_*.part")):
        with suppress(OSError):
            path.unlink()
