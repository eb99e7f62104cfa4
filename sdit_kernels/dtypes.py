"""The dtypes that the ops accept and compute in."""

import torch
from torch import Tensor

DATA_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic, states and parameter sums: float64 for float64 data, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts x to before a matrix multiplication; None if autocast would not change x."""
    device = x.device.type
    if x.dtype != torch.float32 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
