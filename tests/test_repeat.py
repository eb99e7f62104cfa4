"""Repeated calls: a call seen three times skips its Python code, and no other call gets its kernels or sizes."""

import contextlib
import functools
from types import SimpleNamespace

import native_triton
import pytest
import torch

from sdit_kernels import backend, leaky, lif, lif_rate, memory, packed_spikes, relu_squared, repeat, wkv
from sdit_kernels.cpu.kernel import untyped_call
from sdit_kernels.ops.operator import kernels
from sdit_kernels.tuning import tuned

MODE = native_triton.setup()
BACKENDS = ["cpu", "triton"]
compiled_only = pytest.mark.skipif(MODE != "native", reason="kernels are not compiled for CPU tensors here")


@pytest.fixture(autouse=True)
def nothing_kept():
    repeat.forget()
    yield
    repeat.forget()


def repeats(name):
    return name in repeat.environments


@contextlib.contextmanager
def counted(name, stem, *launchers):
    """Count the calls of launchers in the block; a repeated call runs none of them."""
    module, calls = kernels(name, stem), []
    before = {launcher: getattr(module, launcher) for launcher in launchers}

    def spy(launcher):
        def run(*args):
            calls.append(launcher)
            return before[launcher](*args)

        return run

    for launcher in launchers:
        setattr(module, launcher, spy(launcher))
    try:
        yield calls
    finally:
        for launcher, function in before.items():
            setattr(module, launcher, function)


def data(*shape, seed=0, grad=True):
    """Odd multiples of 1/32: membranes are exact, and none equals the threshold."""
    x = 0.5 + 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (((x * 16).floor() + 0.5) / 16).requires_grad_(grad)


def vectors(C, seed):
    return [0.1 * data(C, seed=seed + i, grad=False).requires_grad_() for i in range(2)]


CASES = {  # op: (call, leaves for a seed, stem, launchers)
    "lif": (lif, lambda i: [data(4, 3, 20, seed=i)], "neuron", ("neuron_forward", "neuron_backward")),
    "lif, 20 steps": (
        lambda x: lif(x, v_reset=None, return_v=True)[0], lambda i: [data(20, 5, seed=i)], "neuron",
        ("neuron_forward", "neuron_backward"),
    ),
    "leaky": (lambda x: leaky(x, beta=0.5), lambda i: [data(4, 24, seed=i)], "neuron", ("neuron_forward", "neuron_backward")),
    "lif_rate": (
        lambda x, y, gate: lif_rate(x, 4, y, gate), lambda i: [data(3, 16, seed=i + n) for n in (0, 9, 18)], "rate",
        ("rate_forward", "rate_backward"),
    ),
    "wkv": (wkv, lambda i: [*vectors(16, i), data(2, 5, 16, seed=i), data(2, 5, 16, seed=9 + i)], "wkv", ("wkv_forward",)),
    "relu_squared": (relu_squared, lambda i: [data(3, 17, seed=i)], "mix", ("relu_squared_forward", "relu_squared_backward")),
}  # fmt: skip
ALWAYS_RUN = {("cpu", "wkv"), ("cpu", "lif_rate")}  # their launchers compute with PyTorch, or use tables of numpy


def check(name, f, leaves, g=None):
    """Compare outputs and gradients with the reference."""
    found = []
    for chosen in (name, "reference"):
        with backend(chosen):
            y = f(*leaves)
            g = torch.linspace(-1, 1, y.numel()).reshape(y.shape) if g is None else g
            found.append((y, *torch.autograd.grad(y, leaves, g)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return found[0][0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BACKENDS)
def test_the_third_call_runs_no_launcher_and_reads_its_own_data(name, case):
    f, make, stem, launchers = CASES[case]
    kernels(name, stem)  # a call that imports it is not counted
    check(name, f, make(0))
    outputs = []
    for i in range(1, 5):
        with counted(name, stem, *launchers) as calls:
            outputs.append(check(name, f, make(i)))
        if i > 1 and repeats(name) and (name, case) not in ALWAYS_RUN:
            assert not calls
        else:
            assert calls
    assert len({y.data_ptr() for y in outputs}) == len(outputs)  # every call has outputs of its own


@pytest.mark.parametrize("name", BACKENDS)
def test_other_strides_and_addresses_after_an_aligned_call(name):
    aligned = data(4, 3, 16, grad=False)
    flat = torch.zeros(4 * 3 * 16 + 64)

    def like(size, stride, offset):
        x = flat[:].as_strided(size, stride, offset)
        return x.copy_(data(*size, seed=offset, grad=False)).detach().requires_grad_()

    for _ in range(3):
        check(name, lif, [aligned.clone().requires_grad_()])
    for size, stride, offset in (
        ((4, 3, 16), (48, 16, 1), 1),  # not aligned
        ((4, 3, 16), (51, 17, 1), 0),  # an odd stride
        ((4, 3, 16), (48, 1, 3), 0),  # another order
        ((4, 1, 16), (48, 16, 1), 0), ((4, 3, 1), (48, 16, 1), 2), ((1, 3, 16), (7, 16, 1), 0),  # axes of size 1
    ):  # fmt: skip
        for _ in range(3):
            check(name, lif, [like(size, stride, offset)])
            check(name, lif, [aligned.clone().requires_grad_()])


@pytest.mark.parametrize("name", BACKENDS)
def test_settings_dtypes_and_given_states_are_told_apart(name):
    x, v = data(4, 32), torch.full((32,), 0.25)
    for _ in range(3):
        for settings in ({}, {"tau": 4.0}, {"v_threshold": 0.5}, {"v_reset": None}, {"v_reset": -0.5}, {"v": v}):
            check(name, lambda x, settings=settings: lif(x, **settings), [x])
        check(name, lambda x: lif(x, v.double()), [x.double().detach().requires_grad_()])


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_that_repeat_one_value_and_tuning_numbers(name):
    x = data(4, 3, 20)
    for _ in range(3):
        check(name, lif, [x], torch.ones(()).expand(4, 3, 20))
        check(name, lif, [x])
        with tuned(elementwise_threads=64):
            check(name, lif, [x])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_tensor_given_twice(name):
    d, u = vectors(16, 0)
    k, v = data(2, 5, 16), data(2, 5, 16, seed=1)
    for _ in range(3):
        check(name, lambda k: wkv(d, u, k, k), [k])
        check(name, lambda k, v: wkv(d, u, k, v), [k, v])


@pytest.mark.parametrize("name", BACKENDS)
def test_values_of_parameters_are_read_and_checked_every_time(name):
    x = data(4, 16)
    for value in (2.0, 4.0, 8.0, 2.0):
        check(name, lambda x, tau: lif(x, tau=tau), [x, torch.full((), value, requires_grad=True)])
    with backend(name), pytest.raises(ValueError, match="tau must be at least 1"):
        lif(x, tau=torch.full((), 0.5))


@pytest.mark.parametrize("name", BACKENDS)
def test_inside_packed_spikes(name):
    x, linear = data(4, 64, 64), torch.nn.Linear(64, 8)
    with backend(name):
        wanted = torch.autograd.grad(linear(lif(x)).square().sum(), [x, linear.weight])
        repeat.forget()
        for i in range(4):
            with packed_spikes(), counted(name, "neuron", "neuron_forward") as calls:
                y = linear(lif(x))
            assert bool(calls) == (i < 2 or not repeats(name))
            found = torch.autograd.grad(y.square().sum(), [x, linear.weight])
            assert all(map(torch.equal, found, wanted))


def test_scratch_memory_of_calls():
    """Memory that only launches use comes from the thread. What a call returns never does."""
    x, tau = data(8, 3, 64), torch.full((64,), 2.0, requires_grad=True)
    results = []
    for _ in range(5):
        s = lif(x, tau=tau)
        results.append((s, *torch.autograd.grad(s.square().sum(), (x, tau))))
    assert len({t.data_ptr() for found in results for t in found}) == 15
    assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0]))
    ((size, address, owner),) = repeat._local.scratch
    assert address % 64 == 0 and 0 <= address - owner.data_ptr() <= owner.nbytes - size


def test_scratch_memory_is_taken_and_returned(monkeypatch):
    monkeypatch.setattr(repeat, "_local", repeat._Local())
    a = repeat._take_scratch(1000)
    b = repeat._take_scratch(100)  # another call, before the first has ended
    assert a[1] + 1000 <= b[1] or b[1] + 100 <= a[1]
    repeat._local.scratch += [b, a]
    assert repeat._take_scratch(900) is a and repeat._local.scratch == [b]
    assert repeat._take_scratch(200)[0] == 200 and repeat._local.scratch == []


def test_the_number_of_kept_calls_is_bounded(monkeypatch):
    monkeypatch.setitem(repeat.environments, "fake", lambda: ())
    ran = []
    run = repeat.repeatable(lambda x, _: ran.append(1) or torch.empty_like(x), 1, most_calls=3)
    calls = repeat._all_calls.pop()
    for n in [*range(1, 9), 8, 8]:
        run(torch.ones(n), "fake")
        assert len(calls) <= 3
    assert len(ran) == 9


# --- what is not kept -------------------------------------------------------------------------------------------------------


def call_three_times(function, *args, monkeypatch):
    """Return how often three calls of a function run it."""
    calls = []

    def counting(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setitem(repeat.environments, "fake", lambda: ())
    run = repeat.repeatable(counting, sum(isinstance(a, torch.Tensor) for a in args))
    for _ in range(3):
        run(*args, "fake")
    repeat._all_calls.pop()
    return len(calls)


def started(*_):
    pass


def note(*args, **options):
    repeat.note_launch(started, args, **options)


@pytest.mark.parametrize(
    ("function", "runs"),
    [
        (lambda x, _: note(x, x.data_ptr(), (3, 1.0), integers=True), 2),
        (lambda x, _: note(x[1:], x.data_ptr() + 8, integers=True), 2),
        (lambda x, _: note(x, 1 << 50), 2),
        (lambda x, _: torch.empty_like(x), 2),
        (lambda x, _: (None, torch.empty(3), torch.empty_strided((4, 4), (1, 4))), 2),
        (lambda x, _: torch.empty(2, 3).view(6), 2),
        (lambda x, _: torch.empty(2, 3)[0], 3),
        (lambda x, _: torch.stack([x, x + 1]).sum(0), 2),
        (lambda x, _: note(x, 1 << 50, integers=True), 3),  # an unknown address
        (lambda x, _: torch.empty(1 << 20), 2),
        (lambda x, _: memory.empty_like(torch.empty(1 << 20), torch.bfloat16), 2),
        (lambda x, _: memory.empty_strided((1 << 10, 1 << 10), (1, 1 << 10), torch.float32, x), 2),
        (lambda x, _: note(x * 2 + x[1:2]), 2),
        (lambda x, _: note(torch.ones(4)), 3),
        (lambda x, _: torch.rand(4), 3),
        (lambda x, _: x.sum().item() and None, 3),
        (lambda x, _: torch.empty(3).fill_(1), 2),
        (lambda x, _: torch.zeros(3), 2),
        (lambda x, _: x, 3),
        (lambda x, _: repeat.refuse(), 3),
        (lambda x, _: note(x, hooks=[1]), 3),
    ],
)
def test_only_allocations_views_and_launches_are_repeated(function, runs, monkeypatch):
    assert call_three_times(function, torch.ones(4), monkeypatch=monkeypatch) == runs


def test_a_call_whose_operators_are_hidden_is_not_kept(monkeypatch):
    from sdit_kernels._torch import without_modes

    with without_modes():
        assert call_three_times(lambda x, _: x.mul_(2) and None, torch.ones(()), monkeypatch=monkeypatch) == 3


def test_a_kernel_without_the_names_that_repeated_launches_need(monkeypatch):
    launch = kernels("triton", "launch").launch

    class Kernel:
        arg_names, launched = ("x",), 0

        def __getitem__(self, grid):
            return self.run

        def run(self, x):
            Kernel.launched += 1
            return object()

    cpu = torch.device("cpu")
    assert call_three_times(lambda x, _: launch(Kernel(), 1, cpu, x), torch.ones(4), monkeypatch=monkeypatch) == 3
    assert Kernel.launched == 3


def test_repeated_cpu_launches_do_not_need_the_private_names_of_numba(monkeypatch):
    """With them, a repeated launch calls the machine code; without them, numba's dispatcher."""
    calls = []

    class Compiled:
        overloads = {}

        def __call__(self, *args):
            calls.append(args)

    function, args = untyped_call(Compiled(), (0, 1), (5, (2.0, 3)))
    function(*args)
    assert calls == [((0, 1), 5, (2.0, 3))] and args == (5, (2.0, 3))
    found = []
    for without in (False, True):
        with monkeypatch.context() as patch:
            if without:
                patch.setattr("sdit_kernels.cpu.kernel.untyped_call", lambda f, part, a: (functools.partial(f, part), a))
            repeat.forget()
            with backend("cpu"):
                found.append([lif(data(4, 300, seed=i, grad=False)) for i in range(4)])
            (call,) = (call for calls in repeat._all_calls for call in calls.values() if isinstance(call, repeat._Call))
            launches = [f for f in call.run.__globals__.values() if "lif" in getattr(f, "__name__", "")]
            assert [type(f).__name__ for f in launches] == ([] if without else ["builtin_function_or_method"])
    assert all(map(torch.equal, *found))


# --- what Triton must see ---------------------------------------------------------------------------------------------------


@compiled_only
def test_launch_hooks_of_triton_see_every_launch():
    from triton import knobs

    x, seen = data(4, 32, grad=False), []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    with backend("triton"):
        for _ in range(3):
            lif(x)
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            for _ in range(3):
                lif(x)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        lif(x)
    assert seen == ["lif_forward_kernel"] * 3


@compiled_only
def test_hooks_of_a_kernel_see_every_launch():
    x, seen, mix = data(3, 32, grad=False), [], kernels("triton", "mix")
    kernel = mix.relu_squared_forward_kernel
    with backend("triton"):
        for _ in range(3):
            relu_squared(x)
        kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(args))
        try:
            for _ in range(2):
                relu_squared(x)
        finally:
            kernel.pre_run_hooks.clear()
        relu_squared(x)
    assert len(seen) == 2


@compiled_only
@pytest.mark.parametrize("change", ["hook", "instrumentation", "replaced run", "device", "no environment"])
def test_what_changes_a_compilation_runs_the_launcher(change, monkeypatch):
    from triton import knobs
    from triton.runtime import JITFunction, driver

    x = data(4, 32, grad=False)
    with backend("triton"):
        for _ in range(3):
            wanted = lif(x)
        if change == "hook":
            monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: False)
        elif change == "instrumentation":  # compiling with it fails on the CPU, like debug
            before = repeat.environments["triton"]()
            for record, name in ((knobs.runtime, "debug"), (knobs.compilation, "instrumentation_mode")):
                with monkeypatch.context() as m:
                    m.setattr(record, name, "other")
                    assert repeat.environments["triton"]() != before
            return
        elif change == "replaced run":
            run = JITFunction.run
            monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: run(*args, **kwargs))
        elif change == "device":
            monkeypatch.setattr(driver.active, "get_current_device", lambda: 1)
        else:
            monkeypatch.delitem(repeat.environments, "triton")
        with counted("triton", "neuron", "neuron_forward") as calls:
            assert torch.equal(lif(x), wanted)
        assert calls


@compiled_only
@pytest.mark.parametrize("missing", ["compiler", "run", "jit_cache_hook"])
def test_without_a_name_of_triton_the_ordinary_path_runs(missing, monkeypatch):
    launch = kernels("triton", "launch")
    names = dict.fromkeys(("launch_enter_hook", "launch_exit_hook", "jit_cache_hook", "debug")) | {"interpret": False}
    monkeypatch.setattr(launch, "runtime", SimpleNamespace(**names))
    assert launch.can_repeat()
    if missing == "compiler":
        launch.runtime.interpret = True
    elif missing == "run":
        monkeypatch.setattr(launch, "_TRITON_RUN", None)
    else:
        delattr(launch.runtime, missing)
    assert not launch.can_repeat()


def test_without_a_gpu_nothing_is_repeated_in_the_interpreter():
    from helpers import python

    code = """
import torch, sdit_kernels
from sdit_kernels import repeat
for _ in range(4):
    s = sdit_kernels.lif(torch.full((2, 8), 3.0))
assert torch.equal(s, torch.ones(2, 8))
print(sorted(repeat.environments))
"""
    done = python(code, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "[]", done.stderr
