"""Triton kernels and their launchers. Imported, with triton, when the first tensor arrives that they serve.

Launchers run in Python in front of every kernel, so they count: triton.cdiv and triton.next_power_of_2 unwrap their arguments
for compiled code first, which costs several times what they compute.
"""

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is n or more."""
    return 1 << (n - 1).bit_length()


def launch(kernel, programs, device, *args, **flags):
    """Triton launches on the current device; make that the tensors'."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **flags)
    else:
        kernel[(programs,)](*args, **flags)
