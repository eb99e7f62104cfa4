"""Run Triton kernels on CPU tensors in every test: natively compiled where possible, otherwise in Triton's interpreter."""

import gc
import os
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest

# graphs cached by a run with other tiles have other shapes
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# With more processes than cores, threads that spin while they wait slow down the threads they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Compilers make many objects with a long life, so rarer collection makes numba's compilation a tenth faster.
gc.set_threshold(50_000, 20, 50)

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import native_triton  # noqa: E402

MODE = native_triton.setup()  # must run before triton is imported

# No test may fail because an example, or drawing it, takes long.
ANY_TIME = dict(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True)
hypothesis.settings.register_profile("ci", derandomize=True, **ANY_TIME)
hypothesis.settings.register_profile("local", **ANY_TIME)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header():
    return f"Triton kernels on CPU tensors: {MODE}" + (f" ({native_triton.reason()})" if native_triton.reason() else "")


MARKED = {  # markers of whole files
    "alignment": ("test_native_triton", "test_neuron_triton", "test_recompiles", "test_repeat", "test_wkv_triton"),
    "process": ("test_gpu_suite", "test_nvtx", "test_packaging", "test_profile_sdit", "test_ttsem"),
    "peers": ("test_compat_rwkv", "test_compat_snntorch", "test_compat_spikingjelly", "test_published_models"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        for mark, files in MARKED.items():
            if item.path.stem in files:
                item.add_marker(mark)


@pytest.fixture(autouse=True)
def same_draws_in_every_run(request):
    """A failure repeats: torch's generator starts from the name of the test, whatever ran before in the process."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def one_alignment(request):
    """Compile fewer variants of Triton kernels. Tests marked with ``alignment`` compile all of them, as on a GPU."""
    if os.environ.get("TEST_TILES") == "users" or request.node.get_closest_marker("alignment"):
        yield
    else:
        with native_triton.alignment_ignored():
            yield


@pytest.fixture(autouse=True)
def nothing_stays_installed():
    """Undo sdit_kernels.compat.install() of a test, a docstring or a page."""
    yield
    imports = sys.modules.get("sdit_kernels.compat.imports")
    if imports is not None:
        imports.uninstall()


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    """Fill new memory with NaN, so that a comparison fails where no kernel wrote."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", autouse=True)
def use_small_tiles():
    """Use small tiles: 32 float32 elements, and 4 tokens for WKV.

    Small tensors then need many programs and have incomplete tiles, and compiling takes a tenth of the time. test_oracle.py
    also uses the numbers that users run. ``TEST_TILES=users pytest ...`` uses them, and every alignment, in every test.
    """
    from helpers import SMALL, USERS

    from sdit_kernels.tuning import tuned

    with tuned(USERS if MODE == "interpreter" or os.environ.get("TEST_TILES") == "users" else SMALL):
        yield
