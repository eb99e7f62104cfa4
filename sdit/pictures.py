"""Write images to files: a labelled grid, a GIF of the denoising, arrays."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import to_uint8
from .files import atomic_write, name_in_errors

__all__ = ["Film", "check_image_folder", "check_pillow", "save_gif", "save_grid", "save_images", "save_npz"]


class Film:
    """A callback for ``sample`` that keeps the noise and ``frames`` later states of the denoising.

    Args:
        frames: number of states to keep after the noise at the start.
        images: keep only the first so many images of each state.

    Example:
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.pictures import Film
        >>> from sdit.sample import sample
        >>> film = Film(frames=5)
        >>> images = sample(SDiT(PRESETS["digits"], dim=32, depth=2), [3, 1, 4], sampler="ddim", steps=10, callback=film)
        >>> len(film.frames), film.frames[0].shape
        (6, torch.Size([3, 1, 8, 8]))
    """

    def __init__(self, frames: int = 40, images: int = 100):
        self.count, self.images, self._parts = frames, images, {}

    def __call__(self, start: int, step: int, steps: int, x: Tensor) -> None:
        if start < self.images and (step == 0 or step * self.count // steps > (step - 1) * self.count // steps):
            self._parts.setdefault(step, {})[start] = x[: self.images - start].float().clamp(-1, 1).cpu()

    @property
    def frames(self) -> list[Tensor]:
        """The noise, then ``frames`` states (fewer if there are fewer steps), (images, C, S, S) float32 each."""
        return [torch.cat([part for _, part in sorted(parts.items())]) for _, parts in sorted(self._parts.items())]

    def merge(self, other: "Film") -> None:
        """Add the images that another film of the same run kept, in another process."""
        for step, parts in other._parts.items():
            self._parts.setdefault(step, {}).update(parts)


def check_pillow() -> None:
    """Raise ImportError if pillow is missing, before the work whose result it must write."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ImportError("writing images needs pillow: pip install pillow") from None


def _render(images, labels, names, columns):
    """Draw images (N, C, S, S) in [-1, 1] as one PIL image: a grid with class names, each image at least 64 pixels wide."""
    check_pillow()
    from PIL import Image, ImageDraw, ImageFont

    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (N, 1 or 3, S, S) with N > 0, got {tuple(images.shape)}")
    pixels = to_uint8(images.detach().cpu()).permute(0, 2, 3, 1).numpy()
    n, height, width, channels = pixels.shape
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels must be one for each of {n} images, got {len(labels)}")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    scale = max(1, math.ceil(64 / max(height, width)))
    pad, text = 4, 14 if labels is not None else 0
    cell_w, cell_h = width * scale + pad, height * scale + text + pad
    mode = "L" if (pixels == pixels[..., :1]).all() else "RGB"
    canvas = Image.new(mode, (columns * cell_w + pad, rows * cell_h + pad), 255 if mode == "L" else (255,) * 3)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for i, image in enumerate(pixels):
        x, y = pad + i % columns * cell_w, pad + i // columns * cell_h
        if labels is not None:
            label = int(labels[i])
            name = names[label] if names is not None and label < len(names) else "none" if names is not None else str(label)
            while name and draw.textlength(name, font=font) > cell_w - pad:
                name = name[:-2] + "\N{HORIZONTAL ELLIPSIS}" if len(name) > 1 else ""
            draw.text((x, y - 1), name, fill=0 if mode == "L" else (0, 0, 0), font=font)
        tile = image[..., 0] if mode == "L" else np.broadcast_to(image, (height, width, 3))
        canvas.paste(Image.fromarray(np.repeat(np.repeat(tile, scale, 0), scale, 1)), (x, y + text))
    return canvas


def _save_picture(path, picture, lost="", **how):
    content = io.BytesIO()
    picture.save(content, **how)  # into memory first: pillow's errors do not say that the disk is full
    with atomic_write(Path(path), lost) as file:
        file.write(content.getbuffer())


def save_grid(
    path, images: Tensor, labels=None, names: Sequence[str] | None = None, columns: int | None = None, lost: str = ""
) -> None:
    """Write images (N, C, S, S) in [-1, 1] as a grid, a PNG, with the class name above each image if ``labels`` (N,) are given.

    Pixels are magnified without smoothing. ``columns`` defaults to a square grid. The write is atomic. An OSError names the
    file and ends with the text ``lost``.
    """
    _save_picture(path, _render(images, labels, names, columns), lost, format="PNG")


def save_gif(path, frames: Sequence[Tensor], labels=None, names=None, columns: int | None = None, seconds: float = 4.0) -> None:
    """Write ``frames`` (``Film.frames``), (N, C, S, S) each, as a GIF of grids; the last frame stays for 2 s."""
    if not frames:
        raise ValueError("frames must hold at least one frame, got none")
    pictures = [_render(frame, labels, names, columns) for frame in frames]
    each = max(20, round(1000 * seconds / len(pictures)))  # ms; browsers show faster GIFs slowly
    times = [each] * (len(pictures) - 1) + [2000]
    _save_picture(path, pictures[0], format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)


def check_image_folder(folder, *others) -> None:
    """Raise ValueError if :func:`save_images` cannot use this folder, because tools would read other images as well.

    others: files that will be written too, or None.
    """
    if not str(folder):
        raise ValueError("images must name a folder, got an empty name")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"images must be an empty or new folder, {folder} is a file")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"images must be an empty or new folder, {folder} holds files already")
    for other in others:
        if other is not None and folder.resolve() in Path(other).resolve().parents:
            raise ValueError(f"images must be a folder of its own, {other} would lie in {folder} too")
    folder.mkdir(parents=True, exist_ok=True)


def save_images(folder, images: Tensor | np.ndarray) -> None:
    """Write images (N, S, S, 1 or 3) uint8, as :func:`sdit.data.load` has them, into an empty folder: 00000.png, 00001.png, ...

    clean-fid, which computes the FID, reads all image files of a folder and no labels.
    """
    check_pillow()
    from PIL import Image

    check_image_folder(folder)
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(f"images must be (N, S, S, 1 or 3) uint8, got {tuple(images.shape)} {images.dtype}")
    for i, image in enumerate(images.numpy()):
        content = io.BytesIO()  # pillow's errors do not say that the disk is full
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(content, format="PNG")
        with name_in_errors(path := Path(folder) / f"{i:05d}.png", "free some space and empty this folder"):
            path.write_bytes(content.getbuffer())


def save_npz(path, images: Tensor, labels) -> None:
    """Write an npz file with ``images`` (N, S, S, C) uint8 and ``labels`` (N,) int64."""
    pixels = to_uint8(images.detach().cpu()).permute(0, 2, 3, 1).contiguous().numpy()
    with atomic_write(Path(path)) as file:
        np.savez(file, images=pixels, labels=np.asarray(labels, dtype=np.int64))
