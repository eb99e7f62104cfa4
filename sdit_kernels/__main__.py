"""``python -m sdit_kernels`` prints what a bug report needs: versions, machine, settings, and the backend of each device."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from . import __version__, dispatch

PEERS = ("spikingjelly", "snntorch", "transformers", "fla-core")  # the libraries that compat and perf use
SETTINGS = re.compile(r"(SDIT|NUMBA|TRITON|OMP|GOMP|KMP|MKL|PYTORCH|TORCHINDUCTOR)_|(CUDA|HIP|ROCR)_VISIBLE_DEVICES$")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_build():
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _cpu_name():
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or "unknown"


def _openmp():
    """Name torch's parallel backend and the OpenMP libraries that this process has loaded."""
    maps = Path("/proc/self/maps")
    found = re.findall(r"/(lib(?:gomp|i?omp)[^/\s]*)$", maps.read_text(), flags=re.M) if maps.exists() else ()
    parallel = re.search(r"ATen parallel backend: (.+)", torch.__config__.parallel_info())
    return f"{parallel[1] if parallel else 'unknown'} ({', '.join(sorted(set(found))) or 'no library seen'})"


def _short(path):
    text = str(path)
    home = str(Path.home())
    return "~" + text[len(home) :] if text.startswith(home + os.sep) else text


def _numba_cache():
    """Return the folder of numba's cache. The order is numba's: its variable, the source folder, the user's cache folder."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"])
    beside = Path(__file__).resolve().parent / "cpu"
    return beside / "__pycache__" if os.access(beside, os.W_OK) else "the user's cache folder"


def _triton_cache():
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def _devices():
    yield "cpu", f"{torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        yield "cuda", f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}, {memory:.0f} GiB"
    if not torch.cuda.is_available():
        yield "cuda", "none found"
    if torch.backends.mps.is_available():
        yield "mps", "Apple"


def report():
    """Yield the lines of the report."""
    yield f"sdit_kernels {__version__}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    yield f"CPU: {_cpu_name()}, {os.cpu_count()} cores, {platform.machine()}"
    yield f"torch {torch.__version__}, build for {_torch_build()}"
    yield ", ".join(f"{name} {_version(name) or 'not installed'}" for name in ("triton", "numba", "llvmlite", "numpy"))
    yield ", ".join(f"{name} {version}" for name in PEERS if (version := _version(name))) or "no other library"
    yield f"threads: {torch.get_num_threads()}, {torch.get_num_interop_threads()} between operators; {_openmp()}"
    yield f"compiled kernels: numba {_short(_numba_cache())}, triton {_short(_triton_cache())}"
    found = sorted(name for name in os.environ if SETTINGS.match(name))
    yield "environment: " + (", ".join(f"{name}={_short(os.environ[name])}" for name in found) or "nothing set")
    asked = dispatch.requested()
    for device, description in _devices():
        name, why = dispatch.explain(device, asked)
        yield f"{device:5} ({description}): {name or 'cannot be served'}: {why}"


def main():
    print(*report(), sep="\n")


if __name__ == "__main__":
    main()
