"""Plot the curves of a run."""

import io
import json
from pathlib import Path

from .files import atomic_write

__all__ = ["plot", "read_metrics"]

_LINE_STYLES = "-", "--", ":", "-.", (0, (1, 1))
_FIELDS = "step", "loss", "mse", "vb", "grad_norm", "lr", "images_per_s", "rates"


def read_metrics(run) -> list[dict]:
    """Read the complete lines of a run's metrics.jsonl.

    Raises:
        FileNotFoundError: the file is missing. ValueError: the file is damaged, or has no line yet.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
        for row in rows:  # raises KeyError if a field is missing
            [row[name] for name in _FIELDS]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    if not rows:
        raise ValueError(f"{path} has no line yet: wait for the first steps")
    return rows


def plot(run: str | Path, out: str | Path | None = None) -> Path:
    """Plot the loss and its parts, gradient norm, learning rate, firing rates and speed of a run as a PNG.

    Args:
        run: folder of a run; the run may still be in progress.
        out: file to write; None writes curves.png in the folder.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_metrics`; ValueError also if out does not end in .png. ImportError:
            matplotlib is missing.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from sdit.plot import plot
        >>> row = {"step": 1, "loss": 1.0, "mse": 0.9, "vb": 0.1, "grad_norm": 2.0, "lr": 1e-3, "rates": {"a": 0.1}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.jsonl").write_text(json.dumps(row | {"images_per_s": 9.0}) + chr(10))
        ...     plot(folder).name
        'curves.png'
    """
    rows = read_metrics(run)
    out = Path(out) if out is not None else Path(run) / "curves.png"
    if out.suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, got {str(out)!r}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure; without pyplot, no display is needed
    (loss, gradient), (firing, speed) = figure.subplots(2, 2, sharex=True)
    marker = {"marker": "." if len(rows) < 40 else None}
    for name in ("loss", "mse", "vb"):
        values = [row[name] for row in rows]
        if any(values):  # vb is 0 without learn_sigma, and a logarithmic axis cannot show it
            loss.plot(steps, values, label=name, **marker)
    loss.set(yscale="log", title="loss = mse + vb")
    loss.legend()
    gradient.plot(steps, [row["grad_norm"] for row in rows], label="norm of the gradient, before clipping", **marker)
    gradient.plot([], [], color="C1", label="learning rate (right axis)")
    gradient.set(yscale="log", title="gradient")
    gradient.legend()
    gradient.twinx().plot(steps, [row["lr"] for row in rows], color="C1", **marker)
    blocks, kinds = {}, {}  # one colour per block, one line style per kind of layer
    for name in rows[-1]["rates"]:
        block, _, kind = name.removeprefix("blocks.").partition(".")
        color = blocks.setdefault(block, f"C{len(blocks) % 10}")
        style = kinds.setdefault(kind, _LINE_STYLES[len(kinds) % len(_LINE_STYLES)])
        rates = [row["rates"].get(name) for row in rows]
        firing.plot(steps, rates, linewidth=1, color=color, linestyle=style, **marker)
    for block, color in blocks.items():
        firing.plot([], [], color=color, label=f"block {block}" if block.isdigit() else block)
    for kind, style in kinds.items() if any(kinds) else ():
        firing.plot([], [], color="0.3", linestyle=style, label=kind)
    firing.set(title="mean firing rate", xlabel="step", ylim=(0, None))
    firing.legend(fontsize="x-small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    speed.plot(steps, [row["images_per_s"] for row in rows], **marker)
    speed.set(title="images/s", xlabel="step", ylim=(0, None))
    for axes in (loss, gradient, firing, speed):
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=5)  # more labels would run into each other
    figure.suptitle(Path(run).resolve().name)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    with atomic_write(out) as file:
        file.write(picture.getbuffer())
    return out
