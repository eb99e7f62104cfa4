"""Tests that need their own processes: the cache of compiled code, threads, forks, environment variables, Triton's
interpreter."""

import os
import re
import subprocess
import sys
import zipfile

import native_triton
import pytest
from helpers import ROOT, python

pytestmark = pytest.mark.process

# --- compiled code on disk --------------------------------------------------------------------------------------------------


EVERY_OP = """
import torch
from sdit_kernels import *
x, one = torch.rand(4, 2, 3, 5, requires_grad=True), torch.ones(5)
for y in (lif(x), lif_rate(x), wkv(one, one, x[0], x[1]), wkv_step(one, one, x[0, :, 0], x[1, :, 0])[0],
          spiking_wkv(one, one, x, x), token_shift(x, one, norm_eps=1e-6)[0], relu_squared(x)):
    y.sum().backward()
"""


def test_a_second_process_compiles_nothing(tmp_path):
    """All kernels of both passes are loaded from disk. Compiling one takes seconds."""

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    assert python(EVERY_OP, NUMBA_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="1").returncode == 0
    first = files()
    assert len(first) >= 2 * 12  # an index file and a code file for each kernel
    assert python(EVERY_OP, NUMBA_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="2").returncode == 0
    assert files() == first


def test_the_cache_distinguishes_constants_of_a_kernel(tmp_path):
    """A kernel of the same name with another constant is compiled again."""
    code = """
import sys, numba, numpy
from sdit_kernels.cpu.kernel import Kernel, share
def made(by):
    @numba.njit
    def twice(x): return 2 * x
    def scale(part, x):
        for i in share(1, part): x[0] = twice(x[0]) * by
    return Kernel(scale, "scale")
x = numpy.ones(1)
made(int(sys.stdin.readline()))(1, x)
print(x[0])
"""
    for by, files in ((3, 2), (5, 3), (3, 3)):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        script = tmp_path / "script.py"  # numba does not cache code from `python -c`
        script.write_text(code)
        command = [sys.executable, str(script)]
        done = subprocess.run(command, input=f"{by}\n", capture_output=True, text=True, env=environment, timeout=1800)
        assert done.stdout == f"{2.0 * by}\n", done.stderr
        assert len(list(tmp_path.rglob("*.nb?"))) == files


UNCACHED = """
import numba.core.caching as caching, torch
name = next(n for n in ("InTreeCacheLocator", "_InTreeCacheLocator") if hasattr(caching, n))
getattr(caching, name).from_function = classmethod(lambda *args: None)  # as if the package's folder were read-only
from sdit_kernels import lif, lif_rate
print(lif(torch.full((4, 3), 2.0)).sum().item(), lif_rate(torch.ones(3) * 2).sum().item())
"""


def test_without_a_cache_folder_ops_run_with_one_warning(tmp_path):
    """No folder is writable, so compiled code cannot be saved."""
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "folder")
    done = python(UNCACHED, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR="")
    assert done.stdout.strip() == "12.0 3.0", done.stderr
    assert done.stderr.count("no writable folder") == 1


def test_a_numba_without_its_private_cache_names_still_works(tmp_path):
    """Every process then compiles its kernels, with one warning, and writes nothing."""
    hidden = "import numba.core.caching as caching; del caching.Cache._index_key\n"
    code = hidden + "import torch; from sdit_kernels import lif, lif_rate\n"
    code += "print(lif(torch.full((4, 3), 2.0)).sum().item(), lif_rate(torch.ones(3) * 2).sum().item())"
    done = python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "12.0 3.0", done.stderr
    assert done.stderr.count("cannot cache compiled CPU kernels") == 1
    assert not list(tmp_path.rglob("*.nb?"))


@pytest.mark.parametrize("hidden", ["", "import numba.core.codegen as codegen; del codegen.JITCodeLibrary; "])
def test_only_entries_of_kernels_become_machine_code(tmp_path, hidden):
    """Functions that are inlined into an entry are not compiled on their own, with a numba that has the private names."""
    code = "import torch; from sdit_kernels import lif; from sdit_kernels.cpu.compiler import NO_ENTRY\n"
    code += "from llvmlite.binding import ExecutionEngine as engine; made = []\n"
    code += "add = engine.add_module; engine.add_module = lambda self, m: (made.append(m.name), add(self, m))[1]\n"
    code += "x = torch.full((4, 3), 2.0).requires_grad_(); lif(x).sum().backward()\n"
    code += "print(x.grad.sum().item(), 'pipeline_class' in NO_ENTRY, sum('lif' in name for name in made))"
    done = python(hidden + code, NUMBA_CACHE_DIR=str(tmp_path))
    gradient, ours, compiled = done.stdout.split()
    assert gradient == "4.3125", done.stderr
    assert ours == str(not hidden)
    assert int(compiled) == 2 if not hidden else int(compiled) > 2


@pytest.mark.parametrize("can_empty", [True, False])
def test_incomplete_cache_files_are_compiled_again(tmp_path, can_empty):
    """A full disk or a crash may cut the files of compiled code short."""
    code = "import torch; from sdit_kernels import lif; print(lif(torch.full((4, 3), 2.0)).sum().item())"
    if not can_empty:  # a numba without the private names
        code = "import sdit_kernels.cpu.kernel as kernel; kernel._empty_cache = lambda compiled: False; " + code
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout.strip() == "12.0"
    whole = {file: file.read_bytes() for file in tmp_path.rglob("*.nb?")}
    assert whole
    for ending in (".nbc", ".nbi"):
        for keep in (0, 20, 2000) if can_empty else (20,):
            for file, content in whole.items():
                file.write_bytes(content[:keep] if file.suffix == ending else content)
            done = python(code, NUMBA_CACHE_DIR=str(tmp_path))
            assert done.stdout.strip() == "12.0", (ending, keep, done.stderr)


COMPILE = """
import logging, torch
import sdit_kernels.cpu.kernel as kernel
from sdit_kernels import lif, relu_squared
kernel._SLOW = {limit}
{more}
print(lif(torch.full((2, 3), 2.0)).sum().item(), relu_squared(torch.ones(3)).sum().item())
"""


def test_slow_compilation_is_logged_once(tmp_path):
    """One line is logged if compiling takes longer than the limit. Loading code logs nothing, nor does a disabled logger."""

    def lines(folder, limit=0.01, more=""):
        done = python(COMPILE.format(limit=limit, more=more), NUMBA_CACHE_DIR=str(tmp_path / folder))
        assert done.stdout.split() == ["6.0", "3.0"], done.stderr
        return done.stderr.count("compiling CPU kernels")

    assert lines("a") == 1
    assert lines("a", limit=0.0) == 0  # loaded from disk
    assert lines("b", limit=100.0) == 0
    assert lines("c", more="logging.getLogger('sdit_kernels').setLevel(logging.ERROR)") == 0


# --- threads and forks ------------------------------------------------------------------------------------------------------


POOLS = """
import sys, torch, threading
import sdit_kernels.cpu.kernel as kernel
from sdit_kernels import lif
torch.set_num_threads(3)
if sys.argv[1] == "threads": kernel._OPENMP = False  # as if torch had no OpenMP
x = torch.full((4, 100000), 2.0)
def work():
    for _ in range(50): assert lif(x).all()
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sum(t.name.startswith("sdit_kernels") for t in threading.enumerate()) > 0, "numba.np.ufunc.omppool" in sys.modules)
"""


@pytest.mark.parametrize("kind", ["openmp", "threads"])
def test_kernels_never_use_numbas_threads(kind):
    """Kernels run on torch's OpenMP threads, or on their own threads if torch has no OpenMP."""
    if kind == "openmp" and sys.platform != "linux":
        pytest.skip("torch's OpenMP is looked for on Linux")
    done = python(POOLS, kind)
    assert done.stdout.split() == [str(kind == "threads"), "False"], done.stderr


NEURONS_IN_WORKERS = """
import torch, warnings
warnings.simplefilter("ignore")
from sdit_kernels import lif
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        x = torch.full((4, 100000), 2.0 + i)
        torch.set_num_threads(2)  # from here on torch's own operators would hang in a forked child
        mean = lif(x).numpy().mean()
        torch.set_num_threads(1)
        return float(mean)
print(lif(torch.full((4, 100000), 2.0)).mean().item())
print([b.item() for b in torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=1, multiprocessing_context="fork")])
"""


def test_neurons_run_in_forked_workers():
    done = python(NEURONS_IN_WORKERS)
    assert done.stdout.split("\n")[:2] == ["1.0", "[1.0, 1.0, 1.0, 1.0]"], done.stderr


SCANS_IN_WORKERS = """
import torch, warnings
warnings.simplefilter("ignore")
from sdit_kernels import wkv
p, x = torch.zeros(64), torch.ones(1, 3000, 64)
values = [x * (i + 1) for i in range(2)]
class Data(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i):
        torch.set_num_threads(2)  # from here on torch's own operators would hang in a forked child
        y = wkv(None, p, x, values[i], log_decay=p).numpy().mean()
        torch.set_num_threads(1)
        return float(y)
print(wkv(None, p, x, x, log_decay=p).mean().item())
print([b.item() for b in torch.utils.data.DataLoader(Data(), num_workers=1, batch_size=1, multiprocessing_context="fork")])
"""


def test_scans_run_in_forked_workers():
    done = python(SCANS_IN_WORKERS)
    numbers = [float(x) for x in re.findall(r"[\d.]+", done.stdout)]
    assert numbers == pytest.approx([1.0, 1.0, 2.0], rel=1e-5), done.stderr


FORKED = """
import os, sys, torch
import sdit_kernels as K
from torch.utils.data import DataLoader

torch.set_num_threads(2)
before, generations = {before!r}, {generations}
x = torch.empty(4, 64, 512)
if "torch" in before:
    x.fill_(3)  # wakes torch's threads
else:
    x.numpy()[:] = 3
if "ours" in before:
    K.lif(x)
def child(n):
    if n == 0:
        s = K.lif(x, return_v_seq=True)[0]
        return print(s.numpy().mean(), flush=True)
    pid = os.fork()
    if pid == 0:
        child(n - 1)
        os._exit(0)
    os.waitpid(pid, 0)
child(generations)
class Data(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return float(K.lif(x).numpy().mean())
if generations == 1:
    print(sum(b.item() for b in DataLoader(Data(), num_workers=2, batch_size=1, multiprocessing_context="fork")) / 2)
"""


@pytest.mark.parametrize("before", ["torch", "ours", "torch and ours", "neither"])
@pytest.mark.parametrize("generations", [1, 2])
def test_forked_children_run_serially(before, generations):
    """OpenMP's threads do not survive a fork. A child that entered them would wait forever."""
    done = python(FORKED.format(before=before, generations=generations))
    assert done.stdout.split() == ["1.0"] * (2 if generations == 1 else 1), done.stderr


# --- the environment --------------------------------------------------------------------------------------------------------


def test_disabled_numba_is_named_with_a_way_out():
    """The error and `python -m sdit_kernels` name the variable, and the backend they suggest works."""
    code = "import torch, sdit_kernels as K; print(K.lif(torch.full((4, 1), 1.5)).flatten().tolist())"
    done = python(code, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1 and "RuntimeError" in done.stderr and "NUMBA_DISABLE_JIT is set" in done.stderr
    report = "import runpy; runpy.run_module('sdit_kernels', run_name='__main__')"
    assert "cannot be served: backend 'cpu': NUMBA_DISABLE_JIT is set" in python(report, NUMBA_DISABLE_JIT="1").stdout
    done = python(code, NUMBA_DISABLE_JIT="1", SDIT_KERNELS_BACKEND="reference")
    assert done.stdout.strip() == "[0.0, 1.0, 0.0, 1.0]"
    assert python(code, NUMBA_DISABLE_JIT="0").stdout.strip() == "[0.0, 1.0, 0.0, 1.0]"


# --- Triton's interpreter ---------------------------------------------------------------------------------------------------

SMALL = {  # file: a -k expression for its small cases
    "test_lif.py": "triton and (threshold or empty or staircase or not_a_number or spike_dtypes or small)",
    "test_leaky.py": "triton and (above_the_threshold or empty or not_a_number) or small",
    "test_mix.py": "triton and (laws or pad or empty or not_a_number or saved) or channels_than",
    "test_wkv_triton.py": "small",
}


@pytest.mark.skipif(native_triton.setup() == "interpreter", reason="this run is the interpreter's already")
@pytest.mark.parametrize("file", SMALL)
def test_small_cases_pass_in_the_interpreter(file):
    """Triton's interpreter checks the kernels independently of our compiler for the CPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"tests/{file}",
        "-k",
        SMALL[file],
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


# --- neurons by their definition ------------------------------------------------------------------------------------------

MINE = """
import torch
from sdit_kernels.neuron import Neuron, Variant
from sdit_kernels.ops.neuron import define

def step(x, s, p, o):
    h = FACTOR * s.v + x * p.a
    fired = o.fire(h - 1.0)
    return fired, o.where(o.detach(fired), 0.0, h)

NEURON = Neuron("mine", step, parameters=("a",))
SCHEMA = "float a_value, str surrogate, float alpha"
call = define(NEURON, ("a",), SCHEMA, lambda a, *rest: Variant(NEURON, (), (a,), *rest), lambda *_: None)

def mine(x):
    return call(x, None, None, 1.0, "atan", 2.0, True, False, None, False, "cpu")[:2]

def check(x=None):
    x = torch.full((2, 3), 0.5) if x is None else x
    s, v = mine(x.requires_grad_())
    return v[0].item(), torch.autograd.grad(v.sum(), x)[0][0, 0].item()

class Net(torch.nn.Module):
    def forward(self, x):
        return mine(x)[1]
"""


def run_mine(tmp_path, code, factor=0.5, wait=True, **environment):
    """Run code in a process beside a module ``mine``, with a cache of compiled code of its own in tmp_path."""
    (tmp_path / "mine.py").write_text(MINE.replace("FACTOR", str(factor)))
    script = tmp_path / "script.py"
    script.write_text(code)
    path = os.pathsep.join([str(environment.pop("first", ROOT)), str(tmp_path)])
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = inherited | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path} | environment
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    return finish(process) if wait else process


def finish(process):
    out, error = process.communicate(timeout=1800)
    assert process.returncode == 0, error
    return out.strip()


PRINT = "import mine; print(*mine.check())"


def test_an_edited_step_gives_new_values_and_an_old_one_is_loaded(tmp_path):
    for factor, value in ((0.5, "0.75 0.5"), (0.25, "0.625 0.25"), (0.5, "0.75 0.5")):
        before = set(tmp_path.rglob("*.nb?"))
        assert run_mine(tmp_path, PRINT, factor) == value
        files = set(tmp_path.rglob("*.nb?"))
        assert len(files - before) == (0 if before and factor == 0.5 else 4)  # two kernels, an index and code each


def test_processes_and_threads_may_compile_a_neuron_at_once(tmp_path):
    threads = """
import mine
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    found = set(pool.map(lambda _: mine.check(), range(8)))
print(found)
"""
    started = [run_mine(tmp_path, threads, wait=False) for _ in range(3)]
    assert [finish(process) for process in started] == ["{(0.75, 0.5)}"] * 3


def test_a_neuron_is_exported_compiled_and_used_in_spawned_processes(tmp_path):
    code = """
import torch, mine
if __name__ == "__main__":
    x = torch.full((2, 3), 0.5)
    torch.export.save(torch.export.export(mine.Net(), (x,)), "net.pt2")
    compiled = torch.compile(mine.mine, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[1], mine.mine(x)[1])
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(mine.check, (x,)) == mine.check()
    print("done")
"""
    assert run_mine(tmp_path, code) == "done"
    load = "import torch, mine; print(torch.export.load('net.pt2').module()(torch.full((2, 3), 0.5))[0].item())"
    assert run_mine(tmp_path, load) == "0.75"


def test_definitions_work_from_a_zip_and_with_a_home_that_cannot_be_written(tmp_path):
    archive = tmp_path / "library.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (ROOT / "sdit_kernels").rglob("*.py"):
            file.write(path, path.relative_to(ROOT))
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "folder")
    code = "import sdit_kernels; assert 'library.zip' in sdit_kernels.__file__\n" + PRINT
    found = run_mine(tmp_path, code, first=archive, HOME=nowhere, XDG_CACHE_HOME=nowhere, NUMBA_CACHE_DIR="")
    assert found == "0.75 0.5"
    assert not list(tmp_path.rglob("*.nb?"))
