"""Profiler ranges: one per call when they are on, none when they are off, none inside a compiled graph."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

RECORDER = """
log, names = [], {}
class Domain:
    def get_event_attributes(self, message): return message
    def push_range(self, message): log.append(message)
    def pop_range(self): log.append(None)
def get_domain(name):
    assert name == "sdit_kernels"
    return Domain()
"""

# Print a list [name, range, ...] for every part. A range that contains others is written as "a(b c)".
RECORDED = """
import json, sys
import nvtx, torch
from torch import randn, ones
import sdit_kernels as k
from sdit import PRESETS, SDiT

def tree():
    text, depth = "", 0
    for name in nvtx.log:
        depth += 1 if name else -1
        assert depth >= 0
        text += f"{name}(" if name else ")"
    assert depth == 0
    nvtx.log.clear()
    return text

found = {}
x, one = randn(2, 3, 4).requires_grad_(), ones(4)
for name, f in {
    "lif": k.lif, "lif_rate": k.lif_rate, "relu_squared": k.relu_squared, "token_shift": lambda x: k.token_shift(x, one)[0],
    "wkv": lambda x: k.wkv(one, one, x, x), "wkv_step": lambda x: k.wkv_step(one, one, x[:, 0], x[:, 0])[0],
    "spiking_wkv": lambda x: k.spiking_wkv(one, one, x[None], x[None]),
}.items():
    y = f(x)
    forward = tree()
    y.sum().backward()
    found[name] = forward, tree()
compiled = torch.compile(lambda x: k.relu_squared(x), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x), k.relu_squared(x))
found["compiled op"] = tree()

def fails(x):
    raise KeyError
for broken in (k.nvtx.range("fails")(fails), k.nvtx.range("fails").untraced(fails)):
    try: broken(x)
    except KeyError: pass
    assert broken.__wrapped__ is fails
with k.nvtx.range("block"):
    k.relu_squared(x)
found["user"] = tree()

model = SDiT(PRESETS["digits"], dim=32, depth=2)
inputs = randn(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10])
model.plain = True
with k.backend("reference"):
    wanted = model(*inputs)
model.plain = False
found["plain"] = tree()
found_ours = model(*inputs)
found["model"] = tree()
model.checkpointing = True
model(*inputs).sum().backward()
found["checkpointed"] = tree()
model.checkpointing = False
if sys.argv[1:] == ["compile"]:
    with torch.no_grad():
        exported = torch.export.export(model, inputs, strict=False).module()
        strict = torch.export.export(model, inputs, strict=True).module()
        tree()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for f in (exported, strict, compiled):
            assert torch.allclose(f(*inputs), wanted, atol=1e-4)
            f(*inputs)
            text = tree()
            assert "block" not in text and "lif_rate()" in text, text  # ranges of operators remain
print(json.dumps(found))
"""


def python(code, *args, path="", **environment):
    path = os.pathsep.join([str(path), str(ROOT)] if path else [str(ROOT)])
    command = [sys.executable, "-c", code, *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SDIT_KERNELS_BACKEND": "", "PYTHONPATH": path, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "nvtx.py").write_text(RECORDER)
    done = python(RECORDED, "compile", path=folder, SDIT_NVTX="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["lif", "lif_rate", "relu_squared", "token_shift", "wkv", "spiking_wkv"])
def test_each_call_has_one_range(recorded, name):
    assert recorded[name] == [f"{name}()", f"{name}_backward()"]


def test_wkv_step_and_its_backward_pass_have_ranges(recorded):
    assert recorded["wkv_step"][0].startswith("wkv") and recorded["wkv_step"][1].startswith("wkv")


def test_a_compiled_op_keeps_its_range(recorded):
    assert recorded["compiled op"] == "relu_squared()relu_squared()"  # the first call compiles, the second one compares


def test_a_users_range_ends_after_an_exception(recorded):
    assert recorded["user"] == "fails()fails()block(relu_squared())"


@pytest.mark.parametrize("form", ["plain", "model", "checkpointed"])
def test_stages_of_the_model_have_ranges_in_order(recorded, form):
    text = recorded[form]
    forward = "embedding()block 0(" if form != "checkpointed" else "embedding("
    assert text.startswith(forward)
    at = [
        text.index(f"{stage}(") for stage in ("embedding", "block 0", "attention", "mlp", "reconstruction", "block 1", "final")
    ]
    assert at == sorted(at)
    times = 2 if form == "checkpointed" else 1
    assert [text.count(f"block {i}(") for i in range(4)] == [times] * 3 + [0]  # checkpointing computes each block twice


def test_functions_stay_plain_when_off():
    from sdit.model import Block, SDiT
    from sdit_kernels import nvtx
    from sdit_kernels.ops import lif, mix, spiking_wkv, wkv

    assert os.environ.get("SDIT_NVTX", "0") in ("", "0") and "nvtx" not in sys.modules
    calls = {
        lif: ("_rate", "_rate_backward"), mix: ("_shift", "_relu_squared", "_relu_squared_backward"),
        spiking_wkv: ("_forward", "_backward"), wkv: ("_wkv", "_wkv_backward"),
    }  # fmt: skip
    inside = []
    for module in calls:
        for call in vars(module).values():
            found = inspect.isfunction(call) and call.__module__ == "sdit_kernels.ops.operator"
            direct = inspect.getclosurevars(call).nonlocals.get("implementation") if found else None
            inside += [direct.__wrapped__] if direct else []  # what repeat.repeatable wraps
    for module, names in calls.items():
        for name in names:
            assert any(f is getattr(module, name) for f in inside), name
    assert "define.<locals>.forward" in [f.__qualname__ for f in inside if f]  # lif
    for method in (SDiT.embed_inputs, SDiT.decode_tokens, Block._gate, Block._attend):
        assert method.__qualname__.endswith(method.__name__) and not hasattr(method, "__wrapped__")
    assert nvtx.range("a") is nvtx.range("b")
    assert nvtx.range("a")(test_functions_stay_plain_when_off) is nvtx.range("a").untraced(test_functions_stay_plain_when_off)
    assert nvtx.range("a")(test_functions_stay_plain_when_off) is test_functions_stay_plain_when_off
    with nvtx.range("a"):
        pass


COST = """
import json, sys, timeit
from sdit_kernels import nvtx
def f(x): return x
cases = {"nothing": f, "operator": nvtx.range("a").untraced(f), "stage": nvtx.range("a")(f)}
def calls(g):
    seen = []
    sys.setprofile(lambda frame, event, arg: seen.append(event))
    g(1)
    sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in seen)
def nanoseconds(g):
    return min(timeit.timeit("f(1)", globals={"f": g}, number=5000) / 5e-6 for _ in range(40))
found = {cost.__name__: {name: cost(g) - cost(f) for name, g in cases.items()} for cost in (calls, nanoseconds)}
print(json.dumps(found))
"""


@pytest.mark.skipif(not importlib.util.find_spec("nvtx"), reason="nvtx is not installed: pip install nvtx")
def test_a_range_costs_one_or_two_python_calls():
    """Besides nvtx's push and pop, a range adds one Python call to an operator and two to a stage of the model."""
    done = python(COST, SDIT_NVTX="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cost = found["nanoseconds"]
    print(f"\na range around an operator {cost['operator']:.0f} ns, around a stage {cost['stage']:.0f} ns")
    assert found["calls"] == {"nothing": 0, "operator": 1, "stage": 2}


def test_a_missing_nvtx_package_is_named_in_the_error(tmp_path):
    (tmp_path / "nvtx.py").write_text("raise ModuleNotFoundError('nvtx')")
    code = "\ntry: import sdit_kernels\nexcept ImportError as error: print(error)"
    assert "pip install nvtx" in python(code, path=tmp_path, SDIT_NVTX="1").stdout
    assert python("import sdit_kernels; print(1)", path=tmp_path).stdout == "1\n"


def test_other_values_of_the_variable_are_refused():
    code = "\ntry: import sdit_kernels\nexcept ValueError as error: print(error)"
    assert python(code, SDIT_NVTX="yes").stdout == "SDIT_NVTX must be 0 or 1; got 'yes'\n"
