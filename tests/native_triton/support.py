"""Decide whether kernels can be compiled natively on this machine."""

import importlib.metadata
import platform
import re
import shutil
import sys
from pathlib import Path

SUPPORTED_TRITON = ((3, 6), (3, 7), (3, 8))
CPU_FEATURES = ("avx2", "fma", "f16c")


def triton_version():
    """Return the installed Triton's version as (major, minor) without importing it, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _missing_cpu_features():
    try:
        flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    except (OSError, TypeError):
        return list(CPU_FEATURES)
    return [feature for feature in CPU_FEATURES if feature not in flags]


def unsupported_reason():
    """Return why native compilation is impossible here, as a sentence, or None if it is possible."""
    version = triton_version()
    if version is None:
        return "Triton is not installed."
    if version not in SUPPORTED_TRITON:
        known = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED_TRITON)
        return f"Native compilation knows Triton {known}, not {version[0]}.{version[1]}."
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"Native compilation needs Linux on x86-64, not {sys.platform} on {platform.machine()}."
    if missing := _missing_cpu_features():
        return f"Native compilation needs a processor with {', '.join(missing)}."
    if shutil.which("gcc") is None:
        return "Native compilation needs gcc to link kernels, and none was found."
    return None
