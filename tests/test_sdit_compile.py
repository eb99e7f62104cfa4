"""--compile, --tf32 and padded token dimensions: the same results in another form."""

import warnings

import pytest
import torch
from test_sdit_train import TINY, comparable_rows, settings, states_equal
from torch import nn

from sdit import SDiT
from sdit.checkpoint import checkpoints, load, newest
from sdit.execution import matmul_precision
from sdit.model import pad_tokens
from sdit.sample import sample
from sdit.train import train


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_equals_a_plain_one(tmp_path):
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    train(TINY, settings(save_every=3), plain, progress=False)
    train(TINY, settings(save_every=3, compile=True), whole, progress=False)
    train(TINY, settings(save_every=3, compile=True), parts, progress=False)
    checkpoints(parts)[-1].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(out_dir=parts, resume=True, progress=False)
    assert comparable_rows(parts) == comparable_rows(whole)
    assert all(states_equal(a, b) for a, b in zip(load(newest(whole))[0].values(), load(newest(parts))[0].values()))
    for a, b in zip(comparable_rows(plain), comparable_rows(whole)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b["rates"] == pytest.approx(a["rates"], abs=0.02)
    checkpoints(parts)[-1].unlink()
    with pytest.warns(UserWarning, match="compile was True until step 3 and is False from here on: the rounding may differ"):
        train(None, settings(save_every=3), parts, resume=True, progress=False)


def test_an_error_of_the_compiler_names_the_switch(tmp_path, monkeypatch):
    def breaks(model, x0, **others):
        torch._dynamo.graph_break()

    monkeypatch.setattr("sdit.train.training_loss", breaks)
    with pytest.raises(RuntimeError, match=r"^compile \(--compile\) failed, train without it: "):
        train(TINY, settings(compile=True), tmp_path, progress=False)


@pytest.mark.slow
def test_compiled_sampling_draws_the_same_images():
    model = SDiT(TINY)
    nn.init.normal_(model.final.weight, std=0.1)
    draw = dict(sampler="ddim", steps=4, guidance=2.0)
    torch.testing.assert_close(sample(model, [1, 2], compile=True, **draw), sample(model, [1, 2], **draw), rtol=0, atol=1e-4)


@pytest.mark.parametrize("L", [1, 17, 197])
def test_padded_tokens_change_nothing(L):
    rest = -L % 8
    first, second = nn.Linear(12, L).double(), nn.Linear(L, 12).double()
    r = torch.randn(3, L, 12, dtype=torch.float64, requires_grad=True)
    tensors = [r, *first.parameters(), *second.parameters()]
    g = torch.randn(3, L, 12, dtype=torch.float64)
    wanted, found = second(first(r).transpose(1, 2)), pad_tokens(first, second, r, rest)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(found, tensors, g), torch.autograd.grad(wanted, tensors, g)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_precision_of_matmuls_is_set_on_a_gpu_only_and_restored():
    assert torch.get_float32_matmul_precision() == "highest"
    for device, tf32, wanted in (("cpu", True, "highest"), ("cuda", True, "high"), ("cuda", False, "highest")):
        with matmul_precision(torch.device(device), tf32):
            assert torch.get_float32_matmul_precision() == wanted
    assert torch.get_float32_matmul_precision() == "highest"
