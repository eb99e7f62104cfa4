"""The pool that reuses memory for large CPU outputs. Its tensors must behave like any other tensor."""

import copy
import gc
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import sdit_kernels
from sdit_kernels import layout, memory

ROOT = Path(__file__).resolve().parents[1]
LARGE = memory.LARGE
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the pool serves Linux only")


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    """Use an empty pool, outside of deterministic mode. Deterministic mode fills new memory, so it bypasses the pool."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(memory, "pool", memory._Pool(64 << 20))


def empty_tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def idle_sizes():
    return [size for size, *_ in memory.pool._idle]


def test_a_freed_block_is_used_again():
    x = empty_tensor(LARGE // 4)
    a = memory.empty_like(x, torch.float32)
    address, nbytes = a.data_ptr(), a.nbytes
    assert address % 64 == 0 and nbytes == LARGE
    view = a[5:]
    del a
    assert idle_sizes() == []  # the view still holds the block
    del view
    assert idle_sizes() == [LARGE]
    b = memory.empty_like(x, torch.float32)
    assert b.data_ptr() == address and idle_sizes() == []
    c = memory.empty_like(x, torch.float32)
    assert c.data_ptr() != address


def test_tensors_begin_at_different_cache_lines():
    tensors = [memory.empty_like(empty_tensor(LARGE // 4 + n), torch.float32).fill_(n) for n in (0, 1, 2) for _ in range(8)]
    addresses = [t.data_ptr() for t in tensors]
    lines = {address % 4096 for address in addresses}
    assert len(lines) == len(tensors) and not any(line % 64 for line in lines)
    assert {line % 256 for line in lines} == {0, 64, 128, 192}
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))
    assert all((t == t[0]).all() for t in tensors)


def test_torch_allocates_small_tensors_other_devices_and_in_deterministic_mode():
    memory.empty_like(empty_tensor(LARGE // 4 - 1), torch.float32)
    memory.empty_like(empty_tensor(LARGE).to("meta"), torch.float32)
    torch.use_deterministic_algorithms(True)
    assert memory.empty_like(empty_tensor(LARGE), torch.float32).isnan().all()
    assert idle_sizes() == []


def test_idle_blocks_stay_below_the_limit_and_the_oldest_is_freed_first():
    sizes = [LARGE * n for n in (3, 5, 7, 2)]
    tensors = [memory.empty_like(empty_tensor(size // 4), torch.float32) for size in sizes]
    while tensors:
        tensors.pop(0)
        gc.collect()
    assert idle_sizes() == [LARGE * n for n in (5, 7, 2)]  # 12 + 20 + 28 + 8 MiB are more than the limit of 64 MiB
    memory.pool.limit = 0
    x = empty_tensor(LARGE)
    # torch allocated this memory: storage of the pool cannot be resized
    assert memory.empty_like(x, torch.float32).untyped_storage().resizable()


@pytest.mark.parametrize("shape, order", [((3, 700, 801), (0, 1, 2)), ((3, 4, 400, 401), (0, 2, 3, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.float64])
def test_strides_equal_those_torch_chooses(shape, order, dtype):
    x = torch.empty(2, *(shape[a] for a in order)).permute(0, *(1 + order.index(a) for a in range(len(shape))))
    for per_channel in (False, True):
        got = layout.empty_like(x, dtype, per_channel)
        with torch.device("meta"):
            want = layout.empty_like(torch.empty_strided(x.shape, x.stride()), dtype, per_channel)
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    state = layout.empty_state_like(x, dtype)
    assert (state.shape, state.stride()) == (x[0].shape, torch.empty_like(x[0]).stride())


def test_pooled_tensors_behave_like_other_tensors():
    x = torch.randn(4, 8, 300, 384, requires_grad=True)
    s = sdit_kernels.lif(x * 2)
    assert not s._is_view() and not s.untyped_storage().resizable()
    s.sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        s = sdit_kernels.lif(x)
        before = s.clone()
        s.mul_(1)
        file = io.BytesIO()
        torch.save(s, file)
        file.seek(0)
        assert torch.equal(torch.load(file), before) and torch.equal(copy.deepcopy(s), before)
        assert (s.numpy() == before.numpy()).all()
        assert torch.equal(s.share_memory_(), before)
    kept = s.numpy()
    del s
    assert (kept == before.numpy()).all()


def test_threads_never_share_a_block():
    wrong = []

    def work(value):
        for _ in range(60):
            t = memory.empty_like(empty_tensor(LARGE // 4), torch.float32).fill_(value)
            u = memory.empty_like(empty_tensor(LARGE // 2), torch.float32).fill_(-value)
            if not ((t == value).all() and (u == -value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i + 1.0,)) for i in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and sum(idle_sizes()) <= memory.pool.limit


def test_short_lived_tensors_take_the_memory_of_the_last_one(monkeypatch):
    monkeypatch.setattr(memory, "_recent", memory._Recent())
    shape = torch.Size((3, 500))
    a = memory.empty_again(shape, torch.float32).fill_(1)
    address = a.data_ptr()
    view = a[1]
    del a
    b = memory.empty_again(shape, torch.float32).fill_(2)
    assert b.data_ptr() != address and (view == 1).all()  # the view held the memory
    other, address = memory.empty_again(shape, torch.float64), b.data_ptr()
    assert other.dtype == torch.float64 and other.data_ptr() != address
    del b
    c = memory.empty_again(shape, torch.float32)
    assert c.data_ptr() == address and c.is_contiguous() and c.grad_fn is None
    found = []
    thread = threading.Thread(target=lambda: found.append(memory.empty_again(shape, torch.float32).data_ptr()))
    del c
    thread.start()
    thread.join()
    assert found[0] != address
    for n in range(1, 40):
        memory.empty_again(torch.Size((n << 17,)), torch.float32)
        assert memory._recent.size == sum(t.nbytes for t, *_ in memory._recent.kept.values()) <= memory._MOST_RECENT
    assert idle_sizes()  # the pool has served the large ones


@pytest.mark.parametrize("why", ["no pool", "deterministic", "an older PyTorch"])
def test_short_lived_tensors_are_new(why, monkeypatch):
    monkeypatch.setattr(memory, "_recent", memory._Recent())
    if why == "no pool":
        memory.pool.limit = 0
    if why == "deterministic":
        torch.use_deterministic_algorithms(True)
    if why == "an older PyTorch":
        monkeypatch.setattr(memory, "storage_users", None)
    t = memory.empty_again((3, 500), torch.float32)
    assert t.shape == (3, 500) and not memory._recent.kept and (why != "deterministic" or t.isnan().all())


def test_a_forked_child_gets_its_own_blocks():
    x = empty_tensor(LARGE // 4)
    a = memory.empty_like(x, torch.float32).fill_(1)
    del a
    kept = memory.empty_like(x, torch.float32).fill_(2)
    child = os.fork()
    if child == 0:
        b = memory.empty_like(x, torch.float32)
        b[:8], kept[:8] = 3, 4  # only a few elements: torch's threads did not survive the fork
        os._exit(0 if (b[:8] == 3).all() else 1)
    assert os.waitpid(child, 0)[1] == 0 and (kept == 2).all()


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)


def test_tensors_alive_at_exit_raise_no_error():
    code = "import torch, sdit_kernels; s = sdit_kernels.lif(torch.randn(4, 1 << 20)); print(s.shape)"
    done = run(code)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_an_environment_variable_sets_the_limit():
    code = "from sdit_kernels import memory; print(memory.pool.limit)"
    assert run(code, SDIT_KERNELS_CPU_POOL_MB="3").stdout == f"{3 << 20}\n"
    assert run(code, SDIT_KERNELS_CPU_POOL_MB="0").stdout == "0\n"
    for wrong in ("-1", "many"):
        assert (
            f"SDIT_KERNELS_CPU_POOL_MB must be a number of megabytes, 0 or more; got '{wrong}'"
            in run(code, SDIT_KERNELS_CPU_POOL_MB=wrong).stderr
        )
