"""``python -m sdit_kernels``: versions, devices, and which backend would serve each, and why."""

import importlib.metadata
import platform

import torch

from . import __version__, dispatch


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices():
    yield "cpu", f"{torch.get_num_threads()} threads, {platform.machine()}"
    for i in range(torch.cuda.device_count()):
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        yield "cuda", f"{torch.cuda.get_device_name(i)}, {kind}"
    if not torch.cuda.is_available():
        yield "cuda", "none found"
    if torch.backends.mps.is_available():
        yield "mps", "Apple"


def main():
    print(f"sdit_kernels {__version__}, Python {platform.python_version()}, {platform.system()}")
    print(", ".join(f"{package} {_version(package)}" for package in ("torch", "triton", "numba", "numpy")))
    asked = dispatch.requested()
    if asked:
        print(f"SDIT_KERNELS_BACKEND={asked}")
    for device, description in _devices():
        name, why = dispatch.explain(device, asked)
        print(f"{device:5} ({description}): {name or 'cannot be served'}: {why}")


if __name__ == "__main__":
    main()
