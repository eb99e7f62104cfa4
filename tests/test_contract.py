"""The layout, made executable: rooms, the direction of imports, and what `import sdit_kernels` may cost."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import sdit_kernels
import sdit_kernels.nn
from sdit_kernels import reference

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sdit_kernels"
OPS = [name for name in sdit_kernels.__all__ if inspect.isfunction(getattr(sdit_kernels, name)) and name != "backend"]
STEMS = sorted(p.stem for p in (PACKAGE / "reference").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_reference_of_equal_signature_and_a_documented_example(name):
    op, definition = getattr(sdit_kernels, name), getattr(reference, name)

    def shape(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert shape(op) == shape(definition)
    for part in ("Args:", "Returns:", "Raises:", "Source:", ">>> "):
        assert part in op.__doc__, f"{name}: its docstring lacks {part}"


@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_has_its_rooms(stem):
    for room in ("ops", "cpu", "triton"):
        assert (PACKAGE / room / f"{stem}.py").exists(), f"{room}/{stem}.py is missing"
    tests = ROOT / "tests" / f"test_{stem}.py"
    benches = "".join(p.read_text() for p in (ROOT / "perf").glob("bench_*.py"))
    for name in OPS:
        if getattr(sdit_kernels, name).__module__.endswith(f".{stem}"):
            assert re.search(rf"\b{name}\(", tests.read_text()), f"no test of {name} in {tests.name}"
            assert "_state_" in name or re.search(rf"\b{name}\b", benches), f"no benchmark of {name}"  # converters: a few adds


@pytest.mark.parametrize("stem", STEMS)
def test_same_launchers_on_every_backend(stem):
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
    assert len(counts) >= 16 and {"lif_forward", "wkv_backward", "spiking_wkv_backward"} <= counts.keys()
    assert {name: n for name, n in counts.items() if n > 16} == {}


def imports(path):
    """(absolute module, whether at module level) for every import of a file."""
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
def test_importing_everything_replaces_nothing(module):
    """``from sdit_kernels import *`` stands behind the imports of torch and its like."""
    if module == "matplotlib.pyplot":
        pytest.importorskip("matplotlib", reason="matplotlib, whose names are compared, is not installed")
    assert not set(sdit_kernels.__all__) & set(dir(importlib.import_module(module)))
    found = {"nn": torch.nn}
    exec("from sdit_kernels import *", found)
    assert found["nn"] is torch.nn and found["lif"] is sdit_kernels.lif
    assert sdit_kernels.nn.LIF


FORBIDDEN = {  # room: what no file in it may import
    "reference": ("numba", "triton", "numpy", "sdit_kernels.cpu", "sdit_kernels.triton", "sdit_kernels.ops", "sdit_kernels.nn"),
    "cpu": ("triton", "sdit_kernels.triton", "sdit_kernels.ops", "sdit_kernels.nn"),
    "triton": ("numba", "sdit_kernels.cpu", "sdit_kernels.ops", "sdit_kernels.nn"),
    "ops": ("numba", "triton", "sdit_kernels.cpu", "sdit_kernels.triton", "sdit_kernels.nn"),
}


def test_imports_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        forbidden = FORBIDDEN.get(room, ("numba", "sdit_kernels.cpu", "sdit_kernels.triton"))
        for module, top in imports(path):
            assert not (module == "sdit" or module.startswith("sdit.")), f"{path.name} imports {module}"
            for name in (*forbidden, "perf", "tests"):
                assert not (module == name or module.startswith(name + ".")), f"{room}/{path.name} imports {module}"
            if module.split(".")[0] in ("triton", "numba") and room not in ("cpu", "triton"):
                assert not top, f"{path.name} imports {module} when it is itself imported"
    for path in (ROOT / "perf").rglob("*.py"):
        assert not any(module.startswith("tests") for module, _ in imports(path)), f"{path.name} knows the tests"


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


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_import_is_light_and_needs_no_optional_package():
    loaded, spikes, message, initialised = json.loads(python(BARE, TRITON_INTERPRET=""))
    assert loaded == ["sdit_kernels"]  # nothing of torch's that torch has not loaded itself, such as its compiler
    assert spikes == 6.0 and not initialised
    assert "pip install numba" in message


@pytest.mark.process
def test_the_report():
    text = python("import runpy; runpy.run_module('sdit_kernels', run_name='__main__')", TRITON_INTERPRET="")
    assert "cpu: numba kernels serve CPU tensors" in text and "torch " in text


@pytest.mark.parametrize("name", ["cuda", "", "CPU"])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'cpu', 'triton'"), sdit_kernels.backend(name):
        pass


@pytest.mark.process
def test_backend_from_the_environment():
    code = "import torch, sdit_kernels; print(sdit_kernels.dispatch.choose('cpu'))"
    assert python(code, SDIT_KERNELS_BACKEND="reference").strip() == "reference"
    code = "\ntry: import sdit_kernels\nexcept ValueError as e: print(e)"
    assert "SDIT_KERNELS_BACKEND must be one of" in python(code, SDIT_KERNELS_BACKEND="gpu")
    code = "import torch, sdit_kernels\ntry: sdit_kernels.lif(torch.ones(2, 3))\nexcept RuntimeError as e: print(e)"
    message = python(code, SDIT_KERNELS_BACKEND="triton", TRITON_INTERPRET="")
    assert "TRITON_INTERPRET=1" in message and "move them to a GPU" in message
    mended = "import sys; sys.path.insert(0, 'tests'); import native_triton; native_triton.setup()"  # Triton 3.6 with numpy 2.4
    code = (
        f"{mended}; import torch, sdit_kernels as k; print(k.dispatch.choose('cpu'), k.lif(torch.ones(2, 3) * 2).sum().item())"
    )
    assert python(code, TRITON_INTERPRET="1", SDIT_KERNELS_BACKEND="").split() == ["triton", "6.0"]


def test_backend_is_restored_and_per_thread():
    import threading

    seen = []
    with pytest.raises(KeyError), sdit_kernels.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(sdit_kernels.dispatch.requested()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [sdit_kernels.dispatch.requested()]


def test_devices_without_kernels_run_the_reference_and_say_so_once(monkeypatch):
    monkeypatch.setattr(sdit_kernels.dispatch, "_resolved", {})
    with pytest.warns(UserWarning, match="plain PyTorch reference"):
        assert sdit_kernels.dispatch.choose("mps") == "reference"
    assert sdit_kernels.dispatch.choose("mps") == "reference"
    with pytest.raises(RuntimeError, match="serves CPU tensors"), sdit_kernels.backend("cpu"):
        sdit_kernels.dispatch.choose("cuda")


ONE = torch.ones(5)
CALLS = {
    "leaky": lambda x: sdit_kernels.leaky(x, beta=0.5),
    "lif": sdit_kernels.lif,
    "lif_rate": sdit_kernels.lif_rate,
    "relu_squared": sdit_kernels.relu_squared,
    "token_shift": lambda x: sdit_kernels.token_shift(x, 0.3 * ONE)[0],
    "wkv": lambda x: sdit_kernels.wkv(ONE, ONE, x, x),
    "wkv_step": lambda x: sdit_kernels.wkv_step(ONE, ONE, x[:, 0], x[:, 0])[0],
    "spiking_wkv": lambda x: sdit_kernels.spiking_wkv(ONE, ONE, x[None], x[None]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("gradient", [False, True])
def test_memory_that_holds_the_negative(name, gradient):
    """torch.imag of a conjugate is such a view: a kernel that read its memory would take -x for x."""
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


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_refused(name):
    """With and without gradients enabled, which are another thing."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(3, 4, 5), torch.randn(3, 4, 5))
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="no forward-mode derivative"):
                CALLS[name](x)
    x = torch.randn(3, 4, 5)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(CALLS[name], (x,), (x,))


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_of_the_reference(name):
    """The way out that the refusal names: <g, J dx> = <J^T g, dx>."""
    x = torch.randn(3, 4, 5, requires_grad=True)
    dx, g = torch.randn(2, *x.shape)
    with sdit_kernels.backend("reference"):
        out, tangent = torch.func.jvp(CALLS[name], (x.detach(),), (dx,))
        g = g.flatten()[: out.numel()].reshape(out.shape)
        (want,) = torch.autograd.grad(CALLS[name](x), x, g)
    torch.testing.assert_close((g * tangent).sum(), (want * dx).sum(), rtol=1e-4, atol=1e-4)


# --- what every op does, told once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused(name):
    """By the kernels, which know no formula for it; the reference has one."""

    def gradient(x):
        out = CALLS[name](x)
        return torch.autograd.grad((out * out.detach()).sum(), x, create_graph=True)[0]

    x = (3 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()  # so that neurons fire
    if name == "token_shift":  # linear in x: its second derivative is 0, of which nothing can be refused
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient(x).sum().backward()
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient(x).sum(), x)
        with sdit_kernels.backend("reference"):
            assert torch.autograd.grad(gradient(x).square().sum(), x)[0].abs().sum() > 0


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_fused(name, dtype):
    """The op takes what a layer under autocast hands it, in 16 bits, and hands on as much; its gradients reach the layer."""
    x, linear = torch.randn(3, 4, 5, requires_grad=True), torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype=dtype), torch.profiler.profile() as profile:
        out = CALLS[name](linear(x))
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and linear.weight.grad.abs().sum() > 0
    operator = {"wkv_step": "wkv"}.get(name, name)
    assert f"sdit_kernels::{operator}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name", CALLS)
def test_fake_and_meta_tensors(name):
    """Shapes and dtypes without values."""
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
def test_vmap_and_gradients_of_each_member(name, backend):
    from torch.func import grad, vmap

    def loss(x):
        return (CALLS[name](x) * 0.5).sum()

    x = torch.randint(-32, 64, (2, 3, 4, 5)) / 16
    with sdit_kernels.backend(backend):
        assert torch.equal(vmap(CALLS[name])(x), torch.stack([CALLS[name](member) for member in x]))
        torch.testing.assert_close(vmap(grad(loss))(x), torch.stack([grad(loss)(member) for member in x]))
