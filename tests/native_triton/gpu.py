"""Run launches on a GPU: each launch copies its CPU tensors to the device and back."""

import functools

import torch

from .counting import count_runs_of


def use_gpu():
    """Run tests that use CPU tensors on the device, with a user's code and the same pointer alignment and strides."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    # the package asks for this device before a launch
    type(driver.active).get_active_torch_device = lambda self: torch.device("cpu")
    original = JITFunction.run

    @functools.wraps(original)
    def run(self, *args, **kwargs):
        storages = {}  # address -> (CPU memory, its copy on the GPU)

        def over(x):
            if isinstance(x, tuple):
                return tuple(map(over, x))
            if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
                return x
            here = x.untyped_storage()
            _, there = storages.setdefault(here.data_ptr(), (here, None))
            if there is None:
                _, there = storages[here.data_ptr()] = here, here.cuda()
            return torch.empty(0, dtype=x.dtype, device="cuda").set_(there, x.storage_offset(), x.shape, x.stride())

        result = original(self, *map(over, args), **{name: over(x) for name, x in kwargs.items()})
        for here, there in storages.values():
            here.copy_(there)
        return result

    JITFunction.run = run
    count_runs_of("triton.runtime.jit", "JITFunction")
