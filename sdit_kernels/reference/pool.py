"""Max-pooling whose backward pass needs the place of each maximum in its window only, and these places in the fewest bits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 8192  # windows of a group


def per_byte(window: tuple[int, int]) -> int:
    """Return how many places fit into a byte."""
    n = window[0] * window[1]
    return 4 if n <= 4 else 2 if n <= 16 else 1


def group_rows(OH: int, OW: int) -> int:
    """Return how many rows of windows form a group."""
    return max(1, min(OH, 4096 // OW))


def codes_shape(planes: int, OH: int, OW: int, window: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape of the packed places, (planes, groups, bytes of a group).

    Byte q of a group of n bytes holds the places of its windows q, q + n, q + 2 n, .., in its bits from low to high.
    """
    rows = group_rows(OH, OW)
    return planes, -(-OH // rows), math.ceil(rows * OW / per_byte(window))


def max_pool(x: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the maxima (planes, OH, OW) of x (planes, H, W) over windows side by side, and the packed places.

    Of equal maxima, the first counts; of several NaN, the last.
    """
    (KH, KW), W = window, x.shape[-1]
    y, index = F.max_pool2d(x.unsqueeze(1), window, return_indices=True)
    y, index = y.squeeze(1), index.squeeze(1)
    planes, OH, OW = y.shape
    place = (index // W % KH) * KW + index % W % KW
    shape, per = codes_shape(planes, OH, OW, window), per_byte(window)
    rows = F.pad(place.flatten(1), (0, shape[1] * group_rows(OH, OW) * OW - OH * OW)).view(planes, shape[1], -1)
    rows = F.pad(rows, (0, shape[2] * per - rows.shape[-1])).view(planes, shape[1], per, shape[2])
    base = torch.tensor([1 << (8 // per * k) for k in range(per)], dtype=torch.int64, device=x.device)
    return y, (rows * base.view(-1, 1)).sum(2).to(torch.uint8)


def max_pool_backward(g: Tensor, codes: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the gradient of x, (planes, H, W), from the gradient of the maxima."""
    (KH, KW), (H, W), (planes, OH, OW) = window, size, g.shape
    per = per_byte(window)
    bits = 8 // per
    place = torch.stack([(codes >> (k * bits)) & (2**bits - 1) for k in range(per)], 2).flatten(2).long()
    rows = group_rows(OH, OW)
    place = place[..., : rows * OW].reshape(planes, -1)[:, : OH * OW].view(planes, OH, OW, 1)
    spread = torch.where(place == torch.arange(KH * KW, dtype=torch.int64, device=g.device), g.unsqueeze(-1), 0.0)
    spread = spread.view(planes, OH, OW, KH, KW).transpose(2, 3).reshape(planes, OH * KH, OW * KW)
    return F.pad(spread, (0, W - OW * KW, 0, H - OH * KH))
