"""Read and write checkpoints: one safetensors file each. Its header holds all other data as JSON."""

import json
import re
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from .config import Config
from .files import PRETRAINED, atomic_write
from .model import SDiT
from .research import from_research, load_research
from .sampler import check_recommended

__all__ = ["about", "checkpoints", "from_research", "load", "load_model", "load_research", "newest", "save", "save_model"]


def _import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("checkpoints need safetensors: pip install safetensors") from None
    return safetensors


def save(path, groups: dict[str, dict[str, Tensor]], meta: dict) -> None:
    """Write a checkpoint with a checksum. The write is atomic: it either completes or leaves the earlier file unchanged.

    Args:
        path: file to write; an existing file is replaced.
        groups: {group: {name: tensor}}, for example {"model": model.state_dict()}; stored under "group.name".
        meta: values that JSON can hold; :func:`load_model` needs {"config": config.to_dict()}.

    Raises:
        OSError: path cannot be written; the error names it, and an earlier file is unchanged.
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
    # One entry that begins with the checksum: safetensors writes several entries in an order that changes between calls.
    content = _import_safetensors().torch.save(flat, {"sdit": json.dumps({"crc32": _CHECKSUM_PLACEHOLDER.decode(), **meta})})
    size = 8 + int.from_bytes(content[:8], "little")
    header = _CHECKSUM_PATTERN.sub(rb"\g<1>%08x" % zlib.crc32(content), content[:size], count=1)
    with atomic_write(path, "this checkpoint is not saved, earlier ones are intact") as file:
        file.write(header)
        file.write(memoryview(content)[size:])


# The checksum covers the whole file, with the placeholder where the checksum stands. CRC-32 finds all damage within 32 bits and
# misses one in 4e9 of other damage. It is the fastest: CRC-32 runs at 1.4 GB/s, SHA-256 at 0.6 and blake2b at 0.3.
_CHECKSUM_PLACEHOLDER = b"--------"
_CHECKSUM_PATTERN = re.compile(rb'("sdit": ?"{\\"crc32\\": \\")([0-9a-f]{8}|-{8})')  # inside strings, quotes have a backslash


def _verify_checksum(path):
    """Raise ValueError if the checksum in the file does not match its content. Files of earlier versions have no checksum."""
    with path.open("rb") as file:
        start = file.read(8)
        header = start + file.read(min(int.from_bytes(start, "little"), path.stat().st_size))
        found = _CHECKSUM_PATTERN.search(header)
        if found is None:
            return
        actual = zlib.crc32(_CHECKSUM_PATTERN.sub(rb"\1" + _CHECKSUM_PLACEHOLDER, header, count=1))
        while part := file.read(1 << 20):
            actual = zlib.crc32(part, actual)
    if b"%08x" % actual != found[2]:
        raise _damage_error(path, f"its checksum is {actual:08x}, it should be {found[2].decode()}")


def _damage_error(path, why):
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    older = [other for other in checkpoints(run) if other < path]
    instead = f"; remove it to continue from the earlier checkpoint {older[-1].name}" if older else ""
    return ValueError(f"{path} is not a checkpoint of sdit, or damaged: {why}{instead}")


@contextmanager
def _open_checkpoint(path, verify=True):
    """Open a checkpoint, yield (file, meta), and turn errors of safetensors into errors that name the file."""
    safetensors = _import_safetensors()
    path = Path(path)
    path.open("rb").close()  # Python's OSError is clearer than the error of safetensors
    if verify:
        _verify_checksum(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("sdit", "null"))
            if not isinstance(meta, dict):
                raise ValueError(f"{path} is not a checkpoint of sdit: its header has no entry 'sdit'")
            meta.pop("crc32", None)
            yield file, meta
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise _damage_error(path, error) from None


def load(path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Load a checkpoint: (groups, meta) as they were given to :func:`save`, with the tensors on the CPU.

    Raises:
        OSError: path cannot be read. ValueError: path is not a checkpoint, or is damaged. ImportError: safetensors is missing.
    """
    with _open_checkpoint(path) as (file, meta):
        groups = {}
        for group, name, key in _tensor_entries(file):
            groups.setdefault(group, {})[name] = file.get_tensor(key)
        return groups, meta


def _tensor_entries(file):
    """Yield (group, name, key in the file) for each tensor, with names of earlier versions replaced by today's names."""
    for key in file.keys():  # noqa: SIM118 - file is not a dict
        group, name = key.split(".", 1)
        yield group, re.sub(r"^spread\.", "condition_to_patches.", name), key


def about(path) -> dict:
    """Read only the header of a checkpoint and return its meta. The checksum is not verified. Errors are as in :func:`load`."""
    with _open_checkpoint(path, verify=False) as (_, meta):
        return meta


def save_model(path, model: SDiT) -> None:
    """Write a model without optimizer state, for :func:`load_model`.

    Errors are as in :func:`save`. ValueError: ``model.recommended`` is not a dict of settings that the model can use.
    """
    check_recommended(model.config, model.recommended)
    meta = {"config": model.config.to_dict(), "data": model.trained_on}
    save(path, {"model": model.state_dict()}, meta | ({"recommended": model.recommended} if model.recommended else {}))


def load_model(path, ema: bool = True) -> SDiT:
    """Load the model of a checkpoint onto the CPU, in eval mode.

    Args:
        path: a checkpoint; or the folder of a run, to load its newest checkpoint; or the name of a model in this package,
            which draws Fashion-MNIST: "pretrained-hybrid" (preset fashion_tiny), "pretrained-pure" (fashion_pure), or
            "pretrained", the default of ``sdit sample``, which is the pure one.
        ema: load the averaged weights if the checkpoint has them.

    Raises:
        OSError: path cannot be read. ValueError: path is not a checkpoint, is damaged, or its tensors do not fit its
            configuration. ImportError: safetensors is missing.

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
    with _open_checkpoint(path) as (file, meta):
        tensors = list(_tensor_entries(file))
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
    model.trained_on, model.recommended = meta.get("data", {}), meta.get("recommended", {})
    try:
        check_recommended(config, model.recommended)
    except ValueError as error:
        raise ValueError(f"{path} recommends settings that cannot be used: {error}") from None
    return model.eval()


def checkpoints(run) -> list[Path]:
    """List the checkpoints in the folder of a run, the newest last."""
    return sorted(Path(run).glob("checkpoints/step_*.safetensors"))


def newest(path) -> Path:
    """Return path if it is a file, or the newest checkpoint if it is the folder of a run.

    A key of ``PRETRAINED`` is a model in this package, unless the current folder has a file or folder with that name.

    Raises:
        FileNotFoundError: path does not exist, or the folder holds no checkpoint. ValueError: path is neither file nor folder.
    """
    path = Path(path)
    if str(path) in PRETRAINED and not path.exists():
        return PRETRAINED[str(path)]
    if not path.is_dir():
        if not path.exists():
            names = ", ".join(PRETRAINED)
            raise FileNotFoundError(f"{path} does not exist: give a checkpoint, the folder of a run, or one of {names}")
        if not path.is_file():
            raise ValueError(f"{path} is neither a file nor a folder: give a checkpoint or the folder of a run")
        return path
    found = checkpoints(path)
    if not found:
        inside = any(path.glob("step_*.safetensors"))  # the folder of checkpoints itself, or a copy of it
        why = "give one of the files in it" if inside else "no file checkpoints/step_*.safetensors"
        raise FileNotFoundError(f"{path} holds no checkpoint: {why}")
    return found[-1]


def prune_checkpoints(run, keep: int) -> None:
    """Remove all checkpoints of a run except the newest ``keep``, and the unfinished files of a killed process."""
    for path in (*checkpoints(run)[:-keep], *Path(run).glob("checkpoints/.step_*.part")):
        with suppress(OSError):
            path.unlink()
