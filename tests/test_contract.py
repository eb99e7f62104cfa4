"""Rules for every op and for the layout of the package: folders, imports, import cost, and behaviour all ops share."""

import ast
import importlib
import inspect
import json
import re
from unittest import mock

import pytest
import torch
from helpers import ROOT, python
from torch.utils._python_dispatch import TorchDispatchMode

import sdit_kernels
import sdit_kernels.nn
from sdit_kernels import reference

PACKAGE = ROOT / "sdit_kernels"
OPS = [name for name in sdit_kernels.__all__ if inspect.isfunction(getattr(sdit_kernels, name)) and name != "backend"]
# The files of kernels: each exists for both backends.
STEMS = ("mix", "neuron", "rate", "spiking_wkv", "wkv")


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_reference_of_equal_signature_and_a_documented_example(name):
    op, definition = getattr(sdit_kernels, name), getattr(reference, name)

    def shape(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert shape(op) == shape(definition)
    for part in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert part in op.__doc__, f"{name}: its docstring lacks {part}"


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_test_and_a_benchmark(name):
    stem = getattr(sdit_kernels, name).__module__.rpartition(".")[2]
    tests = ROOT / "tests" / f"test_{stem}.py"
    benches = "".join(p.read_text() for p in (ROOT / "perf").glob("bench_*.py"))
    assert re.search(rf"\b{name}\(", tests.read_text()), f"no test of {name} in {tests.name}"
    # converters of states only add a few numbers, so they have no benchmark
    assert "_state_" in name or re.search(rf"\b{name}\b", benches), f"no benchmark of {name}"


@pytest.mark.parametrize("stem", STEMS)
def test_launchers_have_equal_signatures_on_every_backend(stem):
    cpu, triton = (importlib.import_module(f"sdit_kernels.{room}.{stem}") for room in ("cpu", "triton"))
    own = [name for name, value in vars(cpu).items() if getattr(value, "__module__", None) == cpu.__name__]
    names = [name for name in own if re.search("^[a-z].*_(forward|backward)$", name)]
    assert len(names) >= 2
    for name in names:
        assert inspect.signature(getattr(cpu, name)) == inspect.signature(getattr(triton, name))


def cpu_kernels():
    """(name, number of parameters, part included) of every function that a file of cpu/ makes a ``Kernel`` of."""
    for path in sorted((PACKAGE / "cpu").glob("*.py")):
        tree = ast.parse(path.read_text())
        made = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "Kernel"]
        for factory in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            names = {call.args[0].id for call in made if call in ast.walk(factory)}
            for f in factory.body:
                if isinstance(f, ast.FunctionDef) and f.name in names:
                    names.remove(f.name)
                    a = f.args
                    assert not (a.vararg or a.kwarg or a.kwonlyargs), f.name
                    yield f.name, len(a.posonlyargs + a.args)
            assert not names, f"{path.name}: no function {names} where a Kernel is made of it"


def test_a_cpu_kernel_takes_at_most_16_parameters():
    counts = dict(cpu_kernels())
    assert len(counts) >= 12 and {"neuron_forward", "wkv_backward", "spiking_wkv_backward"} <= counts.keys()
    assert {name: n for name, n in counts.items() if n > 16} == {}


def imports(path):
    """Yield (absolute module, whether the import is at module level) for every import of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module, node in top
            for alias in node.names:
                yield f"{module}.{alias.name}", node in top


@pytest.mark.parametrize("module", ["builtins", "torch", "torch.nn", "torch.nn.functional", "numpy", "matplotlib.pyplot"])
def test_import_star_replaces_no_name_of_other_libraries(module):
    """Users may write ``from sdit_kernels import *`` after the imports of torch and other libraries."""
    if module == "matplotlib.pyplot":
        pytest.importorskip("matplotlib", reason="matplotlib, whose names are compared, is not installed")
    assert not set(sdit_kernels.__all__) & set(dir(importlib.import_module(module)))
    found = {"nn": torch.nn}
    exec("from sdit_kernels import *", found)
    assert found["nn"] is torch.nn and found["lif"] is sdit_kernels.lif
    assert sdit_kernels.nn.LIF


def package_modules(names):
    return tuple(f"sdit_kernels.{name}" for name in names.split())


FORBIDDEN = {  # folder or file: modules that its files may not import
    "_torch.py": ("numba", "triton", "numpy", *package_modules("dtypes checks neuron reference cpu triton ops nn compat")),
    "dtypes.py": ("numba", "triton", "numpy", *package_modules("checks neuron reference cpu triton ops nn compat")),
    "checks.py": ("numba", "triton", "numpy", *package_modules("neuron reference cpu triton ops nn compat")),
    "neuron": ("torch", "numba", "triton", "numpy", *package_modules("reference cpu triton ops nn compat")),
    "reference": ("numba", "triton", "numpy", *package_modules("cpu triton ops nn compat")),
    "cpu": ("triton", *package_modules("triton ops nn compat")),
    "triton": ("numba", *package_modules("cpu ops nn compat")),
    "ops": ("numba", "triton", *package_modules("cpu triton nn compat")),
    "nn": ("numba", "triton", *package_modules("cpu triton compat")),
}


def test_imports_go_in_one_direction():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        forbidden = FORBIDDEN.get(room, ("numba", "sdit_kernels.cpu", "sdit_kernels.triton"))
        for module, top in imports(path):
            assert not (module == "sdit" or module.startswith("sdit.")), f"{path.name} imports {module}"
            for name in (*forbidden, "perf", "tests"):
                assert not (module == name or module.startswith(name + ".")), f"{room}/{path.name} imports {module}"
            if module.split(".")[0] in ("triton", "numba") and room not in ("cpu", "triton"):
                assert not top, f"{path.name} imports {module} at module level"
    for path in (ROOT / "perf").rglob("*.py"):
        assert not any(module.startswith("tests") for module, _ in imports(path)), f"{path.name} imports the tests"


def names_of_constants():
    """Yield the names of all constants in capitals that modules of the package assign at their top level."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.BinOp)):
                for name in (t.id for t in node.targets if isinstance(t, ast.Name)):
                    if name.isupper():
                        yield name


def patched_names(source):
    """Yield the attributes and keys that a program sets on other objects, by assignment or with monkeypatch or mock."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("setattr", "setitem", "object", "dict", "multiple"):
                yield from (a.value for a in node.args if isinstance(a, ast.Constant))
                yield from (k.arg for k in node.keywords)
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
            yield from (t.attr for t in flat if isinstance(t, ast.Attribute))


def test_no_test_or_benchmark_patches_a_constant():
    """Use sdit_kernels.tuning.tuned for the numbers that decide how kernels are cut."""
    numbers = set(names_of_constants())
    assert {"LIF_CHECKPOINT_STEPS", "_MAX_HELD_VALUES", "STREAM"} <= numbers
    for line in (
        'monkeypatch.setattr(kernels, "STREAM", 2)', 'mock.patch.object(kernel, "STREAM", 2)', "a, kernel.STREAM = 1, 2",
        "mock.patch.multiple(kernel, STREAM=2)", "kernel.STREAM = 2",
    ):  # fmt: skip
        assert "STREAM" in set(patched_names(line)), line
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "perf").rglob("*.py")]:
        assert not numbers & set(patched_names(path.read_text())), path


ROOMS = ("sdit_kernels", "sdit", "perf", "examples")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
# names with an underscore that subclasses may use
PUBLIC = {*dir(torch.nn.Module()), "_replace", "_asdict", "_fields", "_make"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def private_definitions(source):
    """Return the private names a file defines: functions, classes, variables, arguments, and attributes it sets."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif stored and isinstance(node, (ast.Name, ast.Attribute)):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def private_names_of_others(source, others):
    """Return the private names that a file takes from another file of ROOMS.

    It may import them, read them from an imported name, or read them from any object. The last case counts only names in
    ``others`` (private names that other files define) that the file itself does not define.
    """
    modules, imported, found, own = {path.stem for path in SOURCES}, set(), [], private_definitions(source)
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in ROOMS):
            imported |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if is_private(alias.name) and alias.name not in modules]
        elif isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in ROOMS}
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            of_import = isinstance(root, ast.Name) and root.id in imported
            if of_import or (node.attr in others and node.attr not in own):
                found.append(ast.unparse(node))
    return found


def test_no_file_uses_private_names_of_another():
    definitions = {path: private_definitions(path.read_text()) for path in SOURCES}
    found = {}
    for path in SOURCES:
        others = set().union(*(names for other, names in definitions.items() if other != path))
        names = private_names_of_others(path.read_text(), others)
        if names:
            found[str(path.relative_to(ROOT))] = names
    assert not found


@pytest.mark.parametrize(
    "source, name",
    [
        ("from .lif import _helper", "_helper"),
        ("from sdit_kernels.ops.lif import _helper as helper", "_helper"),
        ("from . import lif\nlif._helper()", "lif._helper"),
        ("import sdit_kernels.ops.lif\nsdit_kernels.ops.lif._helper()", "sdit_kernels.ops.lif._helper"),
        ("import perf.ops as o\no.OPS._x", "o.OPS._x"),
        ("def f(model): return model._hidden(1)", "model._hidden"),
    ],
)
def test_the_check_finds_private_names(source, name):
    assert private_names_of_others(source, {"_hidden"}) == [name]


def test_the_check_ignores_own_names_and_methods_of_tuples():
    source = "from .x import a as _b\nimport torch\nclass A:\n    def _hidden(self): return self._hidden, a._replace, torch._C"
    assert private_names_of_others(source, {"_hidden"}) == []


BARE = """
import sys, json
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "numba", "einops", "nvtx", "diffusers", "matplotlib", "hypothesis"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
before = set(sys.modules)
import sdit_kernels, sdit_kernels.nn
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
with sdit_kernels.backend("reference"):
    spikes = sdit_kernels.lif(torch.full((2, 3), 2.0)).sum().item()
try: sdit_kernels.lif(torch.ones(2, 3)); message = ""
except RuntimeError as error: message = str(error)
print(json.dumps([sorted(loaded), spikes, message, torch.cuda.is_initialized()]))
"""


def output_of(code, **environment):
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_importing_a_drop_in_does_not_import_the_compiler():
    """torch._dynamo takes a second to import."""
    names = ("clock_driven", "handwritten", "rwkv", "snntorch", "spikingjelly", "vision_rwkv")
    code = "import sys, torch\n" + "".join(f"import sdit_kernels.compat.{name}\n" for name in names)
    assert output_of(code + "print('torch._dynamo' in sys.modules)").strip() == "False"


@pytest.mark.process
def test_import_is_light_and_needs_no_optional_package():
    loaded, spikes, message, initialised = json.loads(output_of(BARE, TRITON_INTERPRET=""))
    assert loaded == ["sdit_kernels"]  # no part of torch that torch does not load itself, such as its compiler
    assert spikes == 6.0 and not initialised
    assert "pip install numba" in message


@pytest.mark.process
def test_the_report_shows_versions_machine_and_settings():
    """A bug report needs versions, builds, the machine, the settings that matter and no others, caches and devices."""
    settings = {"NUMBA_CACHE_DIR": "/some/folder", "TRITON_CACHE_DIR": "/another", "OMP_NUM_THREADS": "1", "MY_TOKEN": "hidden"}
    code = "import runpy; runpy.run_module('sdit_kernels', run_name='__main__')"
    text = output_of(code, TRITON_INTERPRET="", SDIT_KERNELS_BACKEND="", **settings)
    assert "cpu: numba kernels serve CPU tensors" in text and "hidden" not in text
    build = "ROCm" if torch.version.hip else "CUDA" if torch.version.cuda else "CPU"
    assert f"sdit_kernels {sdit_kernels.__version__}" in text and f"torch {torch.__version__}, build for {build}" in text
    assert re.search(r"^Python 3[.\d]+, .+$", text, re.M) and re.search(r"^CPU: .+, \d+ cores", text, re.M)
    assert all(re.search(rf"\b{name} ([\d.]+|not installed)", text) for name in ("triton", "numba", "llvmlite", "numpy"))
    assert "threads: 1, " in text and "compiled kernels: numba /some/folder, triton /another" in text
    assert "NUMBA_CACHE_DIR=/some/folder" in text and ", OMP_NUM_THREADS=1" in text and re.search(r"^cuda +\(", text, re.M)


def test_the_report_names_gpus(monkeypatch):
    from types import SimpleNamespace

    from sdit_kernels import __main__ as program

    gpu = {
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "get_device_name": lambda i: "NVIDIA H200",
        "get_device_capability": lambda i: (9, 0),
        "get_device_properties": lambda i: SimpleNamespace(total_memory=139 * 2**30),
    }
    for name, answer in gpu.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert any(line.startswith("cuda  (NVIDIA H200, capability 9.0, 139 GiB): triton: ") for line in program.report())


@pytest.mark.parametrize("name", ["cuda", "", "CPU"])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'cpu', 'triton'"), sdit_kernels.backend(name):
        pass


@pytest.mark.process
def test_an_environment_variable_chooses_the_backend():
    code = "import torch, sdit_kernels; print(sdit_kernels.dispatch.choose(torch.device('cpu')))"
    assert output_of(code, SDIT_KERNELS_BACKEND="reference").strip() == "reference"
    code = "\ntry: import sdit_kernels\nexcept ValueError as e: print(e)"
    assert "SDIT_KERNELS_BACKEND must be one of" in output_of(code, SDIT_KERNELS_BACKEND="gpu")
    code = "import torch, sdit_kernels\ntry: sdit_kernels.lif(torch.ones(2, 3))\nexcept RuntimeError as e: print(e)"
    message = output_of(code, SDIT_KERNELS_BACKEND="triton", TRITON_INTERPRET="")
    assert "TRITON_INTERPRET=1" in message and "move them to a GPU" in message
    # setup() makes Triton 3.6 work with numpy 2.4
    mended = "import sys; sys.path.insert(0, 'tests'); import native_triton; native_triton.setup()"
    chosen = "k.dispatch.choose(torch.device('cpu'))"
    code = f"{mended}; import torch, sdit_kernels as k; print({chosen}, k.lif(torch.ones(2, 3) * 2).sum().item())"
    assert output_of(code, TRITON_INTERPRET="1", SDIT_KERNELS_BACKEND="").split() == ["triton", "6.0"]


def test_a_backend_is_restored_and_set_per_thread():
    import threading

    seen = []
    with pytest.raises(KeyError), sdit_kernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(sdit_kernels.dispatch.requested()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [sdit_kernels.dispatch.requested()]


def test_devices_without_kernels_run_the_reference_with_one_warning(monkeypatch):
    monkeypatch.setattr(sdit_kernels.dispatch, "_resolved", {})
    with pytest.warns(UserWarning, match="plain PyTorch reference"):
        assert sdit_kernels.dispatch.choose(torch.device("mps")) == "reference"
    assert sdit_kernels.dispatch.choose(torch.device("mps")) == "reference"
    with pytest.raises(RuntimeError, match="serves CPU tensors"), sdit_kernels.backend("cpu"):
        sdit_kernels.dispatch.choose(torch.device("cuda"))


ONE = torch.ones(5)


def given(p, value=1.0):
    return value * ONE if p is None else p


CALLS = {  # functions of x, (3, 4, 5), and of a parameter with one value per channel
    "adlif": lambda x, p=None: sdit_kernels.adlif(x, beta=0.5 * given(p), beta_w=0.5, a=0.5, b=1.0),
    "cuba": lambda x, p=None: sdit_kernels.cuba(x, beta_i=0.5, beta=0.5 * given(p)),
    "lapicque": lambda x, p=None: sdit_kernels.lapicque(x, R=given(p), C=1.0, time_step=0.5),
    "leaky": lambda x, p=None: sdit_kernels.leaky(x, beta=0.5 * given(p)),
    "lif": lambda x, p=None: sdit_kernels.lif(x, tau=given(p, 2.0)),
    "lif_rate": lambda x, p=None: sdit_kernels.lif_rate(x, tau=given(p, 2.0)),
    "relu_squared": lambda x, p=None: sdit_kernels.relu_squared(x if p is None else x * p),
    "token_shift": lambda x, p=None: sdit_kernels.token_shift(x, 0.3 * given(p))[0],
    "wkv": lambda x, p=None: sdit_kernels.wkv(given(p), given(p), x, x),
    "wkv_step": lambda x, p=None: sdit_kernels.wkv_step(given(p), given(p), x[:, 0], x[:, 0])[0],
    "spiking_wkv": lambda x, p=None: sdit_kernels.spiking_wkv(given(p), given(p), x[None], x[None]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("gradient", [False, True])
def test_lazily_negated_tensors_are_read_correctly(name, gradient):
    """torch.imag of a conjugate is such a view. A kernel that reads its memory directly would use -x instead of x."""
    x = torch.randn(3, 4, 5)
    view = torch._neg_view(x.neg())
    assert view.is_neg() and torch.equal(view, x)
    found, wanted = (CALLS[name](t.requires_grad_(gradient)) for t in (view, x))
    assert torch.equal(found, wanted)
    if gradient:
        g = torch.randn_like(wanted)
        assert torch.equal(*(torch.autograd.grad(out, t, g)[0] for out, t in ((found, view), (wanted, x))))


@pytest.mark.parametrize("name", CALLS)
def test_a_second_backward_pass_names_the_way_out(name):
    loss = CALLS[name](torch.randn(3, 4, 5, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"graph a second time.*reset\(net\).*detach\(net\).*retain_graph=True"):
        loss.backward()


def test_a_step_in_place_refuses_dual_tensors():
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        x = torch.randn(3, 5)
        state = torch.zeros(3, 5), torch.full((3, 5), -torch.inf)
        sdit_kernels.wkv_step_(ONE, ONE, x, x, state)
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            sdit_kernels.wkv_step_(ONE, ONE, dual, x, state)


@pytest.mark.parametrize("name", CALLS)
def test_batched_gradients_are_refused_with_the_alternative(name):
    x = torch.randn(3, 4, 5, requires_grad=True)
    out = CALLS[name](x)
    with pytest.raises(RuntimeError, match="use torch.func.jacrev or torch.func.vmap"):
        torch.autograd.grad(out, x, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_derivatives_are_refused(name):
    """Also when gradients are disabled, because forward mode does not depend on that."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(3, 4, 5), torch.randn(3, 4, 5))
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="no forward-mode derivative"):
                CALLS[name](x)
    x = torch.randn(3, 4, 5)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(CALLS[name], (x,), (x,))


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_has_forward_mode_derivatives(name):
    """The refusal suggests this. The test is <g, J dx> = <J^T g, dx>."""
    x = torch.randn(3, 4, 5, requires_grad=True)
    dx, g = torch.randn(2, *x.shape)
    with sdit_kernels.backend("reference"):
        out, tangent = torch.func.jvp(CALLS[name], (x.detach(),), (dx,))
        g = g.flatten()[: out.numel()].reshape(out.shape)
        (want,) = torch.autograd.grad(CALLS[name](x), x, g)
    torch.testing.assert_close((g * tangent).sum(), (want * dx).sum(), rtol=1e-4, atol=1e-4)


# --- behaviour that all ops share -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    """Kernels have no formula for it. The reference has one."""

    def gradient(x):
        out = CALLS[name](x)
        return torch.autograd.grad((out * out.detach()).sum(), x, create_graph=True)[0]

    # large enough that neurons fire
    x = (3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    if name == "token_shift":  # linear in x: torch.autograd.grad never asks for the second derivative, backward() does
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient(x).sum().backward()
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient(x).sum(), x)
        with sdit_kernels.backend("reference"):
            assert torch.autograd.grad(gradient(x).square().sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, n) for n in CALLS] + [(torch.float16, n) for n in ("lif", "wkv")])
def test_autocast_runs_fused(name, dtype):
    """The op takes the 16-bit output of a layer under autocast and returns 16 bits. Gradients reach the layer."""
    x, linear = torch.randn(3, 4, 5, requires_grad=True), torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype=dtype), torch.profiler.profile() as profile:
        out = CALLS[name](linear(x))
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0
    operator = {"wkv_step": "wkv"}.get(name, name)
    assert f"sdit_kernels::{operator}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name", CALLS)
def test_fake_and_meta_tensors_get_shapes_and_dtypes(name):
    from torch._subclasses import FakeTensorMode

    want = CALLS[name](torch.randn(3, 4, 5))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = CALLS[name](mode.from_tensor(torch.randn(3, 4, 5, requires_grad=True)))
    one = ONE.to("meta")
    with mock.patch.dict(globals(), ONE=one):
        meta = CALLS[name](torch.empty(3, 4, 5, device="meta"))
    assert meta.is_meta and fake.requires_grad
    for found in (fake, meta):
        assert (found.shape, found.dtype, found.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_vmap_equals_a_loop_over_the_batch(name, backend):
    from torch.func import grad, vmap

    def loss(x):
        return (CALLS[name](x) * 0.5).sum()

    x = torch.randint(-32, 64, (2, 3, 4, 5)) / 16
    with sdit_kernels.backend(backend):
        assert torch.equal(vmap(CALLS[name])(x), torch.stack([CALLS[name](member) for member in x]))
        torch.testing.assert_close(vmap(grad(loss))(x), torch.stack([grad(loss)(member) for member in x]))


BACKENDS = ["cpu", "triton"]
STATE = torch.zeros(3, 5), torch.full((3, 5), -torch.inf)
OPERATORS = {  # calls of x, (3, 4, 5), and p, (5,), which together reach every operator with all its options
    "adlif": lambda x, p: sdit_kernels.adlif(x, beta=p, beta_w=0.5, a=p, b=1.0, return_state=True),
    "cuba": lambda x, p: sdit_kernels.cuba(x, beta_i=0.5, beta=0.5),
    "cuba, long": lambda x, p: sdit_kernels.cuba(
        x.repeat(6, 1, 1), (None, x[0]), beta_i=p[0] / 2, beta=p, return_state=True, return_state_seq=True
    ),
    "cuba, no step": lambda x, p: sdit_kernels.cuba(x[:0], (x[0], x[1]), beta_i=0.5, beta=0.5, return_state=True),
    "lapicque": lambda x, p: sdit_kernels.lapicque(x, x[0], C=p + 1, return_v=True),
    "leaky": lambda x, p: sdit_kernels.leaky(x, beta=0.5),
    "leaky, long": lambda x, p: sdit_kernels.leaky(x.repeat(6, 1, 1), x[0], beta=p[0] / 2, v_threshold=p, return_v_seq=True),
    "leaky, permuted": lambda x, p: sdit_kernels.leaky(x.reshape(3, 2, 2, 5).permute(0, 2, 3, 1), beta=0.5, return_v=True),
    "leaky, no step": lambda x, p: sdit_kernels.leaky(x[:0], x[0], beta=0.5, return_v=True, return_v_seq=True),
    "lif": lambda x, p: sdit_kernels.lif(x),
    "lif, long": lambda x, p: sdit_kernels.lif(x.repeat(6, 1, 1), x[0], tau=p[0] + 1, v_threshold=p, return_v_seq=True),
    "lif, tokens": lambda x, p: sdit_kernels.lif(x, tau=p[:4, None] + 1, v_threshold=p[:3, None, None].expand(3, 4, 1)),
    "lif, norm": lambda x, p: sdit_kernels.lif(x, v_threshold=p[0] + 0.5, threshold="rms"),
    "lif, uint8": lambda x, p: sdit_kernels.lif(x.detach().transpose(0, 1), spike_dtype=torch.uint8, return_v=True),
    "lif, permuted": lambda x, p: sdit_kernels.lif(x.reshape(3, 2, 2, 5).permute(0, 2, 3, 1), return_v_seq=True),
    "lif, no step": lambda x, p: sdit_kernels.lif(x[:0], x[0], return_v=True, return_v_seq=True),
    "lif_rate": lambda x, p: sdit_kernels.lif_rate(x, 4),
    "lif_rate, all": lambda x, p: sdit_kernels.lif_rate(x, 4, x, x, tau=p[0] + 1, v_threshold=p),
    "lif_rate, counts": lambda x, p: sdit_kernels.lif_rate(x.detach(), 20, return_counts=True),
    "relu_squared": lambda x, p: sdit_kernels.relu_squared(x),
    "relu_squared, permuted": lambda x, p: sdit_kernels.relu_squared(x.permute(2, 0, 1)),
    "token_shift": lambda x, p: sdit_kernels.token_shift(x, p, 1 - p, norm_eps=1e-6),
    "token_shift, last": lambda x, p: sdit_kernels.token_shift(x, p, p, p, last=x[:, 0], dtype=torch.bfloat16),
    "token_shift, empty": lambda x, p: sdit_kernels.token_shift(x[:, :0], p, last=x[:, 0], norm_eps=1e-6),
    "wkv": lambda x, p: sdit_kernels.wkv(p, p, x, x),
    "wkv, all": lambda x, p: sdit_kernels.wkv(None, p, x, x, r=x, log_decay=-p, state=STATE, return_state=True),
    "wkv, chunked": lambda x, p: sdit_kernels.wkv(p, p, x.repeat(1, 9, 1), x.repeat(1, 9, 1), algorithm="chunked"),
    "wkv, both ways": lambda x, p: sdit_kernels.wkv(p, p, x, x, r=x, bidirectional=True),
    "wkv, packed": lambda x, p: sdit_kernels.wkv(p, p, *[x.reshape(1, 12, 5)] * 2, cu_seqlens=torch.tensor([0, 5, 12])),
    "wkv, no token": lambda x, p: sdit_kernels.wkv(p, p, x[:, :0], x[:, :0], state=STATE, return_state=True),
    "wkv_step": lambda x, p: sdit_kernels.wkv_step(p, p, x[:, 0], x[:, 0], STATE),
    "wkv_step_": lambda x, p: step_in_place(p.detach(), x.detach()),
    "spiking_wkv": lambda x, p: sdit_kernels.spiking_wkv(p, p, x[None], x[None]),
    "spiking_wkv, all": lambda x, p: sdit_kernels.spiking_wkv(
        p, p, x[None], x[None], x[None], scan_state=tuple(s[None] for s in STATE), membrane=x, tau=p + 1, rate=True,
        return_state=True,
    ),
}  # fmt: skip


def step_in_place(p, x):
    return sdit_kernels.wkv_step_(p, p, x[:, 0], x[:, 0], tuple(s.clone() for s in STATE))


class Recorded(TorchDispatchMode):
    """Record every call of an operator of this library."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sdit_kernels":
            self.calls.append((function, [a.clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return function(*args, **(kwargs or {}))


def tensors(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else [t for o in outputs for t in tensors(o)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", OPERATORS)
def test_opcheck_passes_for_every_operator(call, backend):
    """torch.library.opcheck tests an operator's schema, its registered gradient, fake tensors and the compiler."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = torch.rand(5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.use_deterministic_algorithms(False)
    with sdit_kernels.backend(backend), Recorded() as mode:
        outputs = [t for t in tensors(OPERATORS[call](x, p)) if t.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, [x, p], [torch.ones_like(t) for t in outputs], allow_unused=True)
    assert len(mode.calls) == (2 if outputs and outputs[0].numel() else 1 + bool(outputs))
    for function, args in mode.calls:
        if outputs and "backward" not in function.name():
            args = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        torch.library.opcheck(function, args)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name):
    """Compare values and gradients of torch.compile(fullgraph=True) for two batch sizes. test_lif.py uses Inductor."""
    torch.compiler.reset()

    def loss(x, p):
        return CALLS[name](x, p).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 6):
        a, b = [[torch.rand(size, 4, 5).requires_grad_(), torch.full((5,), 1.5, requires_grad=True)] for _ in range(2)]
        with torch.no_grad():
            b[0].copy_(a[0])
        torch.testing.assert_close(compiled(*a), loss(*b))
        torch.testing.assert_close(torch.autograd.grad(compiled(*a), a), torch.autograd.grad(loss(*b), b))


@pytest.mark.parametrize("name", CALLS)
def test_export_takes_any_batch(name):
    class Net(torch.nn.Module):
        def forward(self, x):
            return CALLS[name](x)

    axis = 1 if name in ("adlif", "cuba", "lapicque", "leaky", "lif") else 0  # T is the first axis of these ops
    program = torch.export.export(Net(), (torch.randn(3, 4, 5),), dynamic_shapes={"x": {axis: torch.export.Dim("batch")}})
    x = torch.randn(3, 4, 5).narrow(axis, 0, 2)
    assert torch.equal(program.module()(x), CALLS[name](x))
    assert any("sdit_kernels." in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_results_repeat_bit_for_bit_and_inputs_stay_unchanged(name, backend):
    x, p = torch.randn(30, 40, 5, requires_grad=True), torch.full((5,), 1.5, requires_grad=True)
    before = [t.detach().clone() for t in (x, p)]
    found = []
    for _ in range(2):
        with sdit_kernels.backend(backend):
            out = CALLS[name](x, p)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, p])])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert all(torch.equal(a, b) and a._version == 0 for a, b in zip((x, p), before))
