"""Compare the training loss with closed forms and numeric integration, and the schedulers with their equations."""

import doctest
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sdit import diffusion
from sdit.diffusion import STEPS, draw, training_loss
from sdit.sampler import make_scheduler, predict, reverse_step, samplers, scale_noise

CONFIG = dict(channels=1, image_size=4, num_classes=3, learn_sigma=True, dropout_label=0.25)
CONFIG |= dict(prediction="epsilon", weighting="uniform", times="uniform")
PREDICTIONS = ("epsilon", "v", "flow")
BETA = np.linspace(1e-4, 2e-2, STEPS)
ABAR = np.cumprod(1 - BETA)


def config_with(**changes):
    return SimpleNamespace(**{**CONFIG, **changes})


class Given(nn.Module):
    """Return a given output, and record the arguments of each call."""

    def __init__(self, output=None, function=None, **changes):
        super().__init__()
        self.config = config_with(**changes)
        self.output, self.function, self.calls = output, function, []

    def forward(self, x, t, y):
        self.calls.append((x, t, y))
        return self.output if self.function is None else self.function(x, t, y)


def batch(n=6, dtype=torch.float64, **changes):
    """Return x0 (8-bit levels, including both extremes), labels, t, noise and drop."""
    c = config_with(**changes)
    g = torch.Generator().manual_seed(1)
    x0 = torch.randint(256, (n, c.channels, c.image_size, c.image_size), generator=g)
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = 0, 255
    t, noise, drop = draw(c, n, g)
    return x0.to(dtype) / 127.5 - 1, torch.arange(n) % c.num_classes, t, noise.to(dtype), drop


def posterior(x0, xt, t):
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule from the two normal densities, in numpy."""
    before = ABAR[t - 1]
    precision = (
        1 / (1 - before) + (1 - BETA[t]) / BETA[t]
    )  # the precision of q(x_{t-1} | x_0) plus the precision of q(x_t | x_{t-1}) as a function of x_{t-1}
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - BETA[t]) * xt / BETA[t]) / precision
    return mean, 1 / precision


def reverse(xt, eps, v, t):
    """Mean and log variance of p(x_{t-1} | x_t) by definition: the posterior with the x_0 that eps predicts."""
    x0 = (xt - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])
    smallest = posterior(0.0, 0.0, max(t, 1))[1]
    f = (v + 1) / 2
    log_variance = f * math.log(BETA[t]) + (1 - f) * math.log(smallest)
    return (posterior(x0, xt, t)[0] if t else x0), log_variance


def test_tables_equal_the_closed_forms():
    tables = diffusion.make_tables(torch.device("cpu"), torch.float64)
    np.testing.assert_allclose(tables.signal.numpy(), np.sqrt(ABAR), rtol=1e-12)
    np.testing.assert_allclose(tables.sigma.numpy(), np.sqrt(1 - ABAR), rtol=1e-12)
    np.testing.assert_allclose(tables.log_beta.numpy(), np.log(BETA), rtol=1e-12)
    for t in (1, 2, 500, 999):
        mean, variance = posterior(0.3, -0.7, t)
        eps = (-0.7 - math.sqrt(ABAR[t]) * 0.3) / math.sqrt(1 - ABAR[t])
        assert tables.log_posterior[t].item() == pytest.approx(math.log(variance), rel=1e-10)
        assert -0.7 / math.sqrt(1 - BETA[t]) - tables.shift[t].item() * eps == pytest.approx(mean, rel=1e-10)
    assert tables.log_posterior[0] == tables.log_posterior[1]


@pytest.mark.parametrize("t", [1, 2, 37, 999])
def test_vb_equals_the_kl_divergence_by_numeric_integration(t):
    x0, y, _, noise, drop = batch()
    t_ = torch.full((6,), t)
    g = torch.Generator().manual_seed(2)
    eps, v = (torch.randn(noise.shape, generator=g, dtype=torch.float64) for _ in range(2))
    losses = training_loss(Given(torch.cat([eps, v], 1)), x0, y, t=t_, noise=noise, drop=drop)

    xt = math.sqrt(ABAR[t]) * x0 + math.sqrt(1 - ABAR[t]) * noise
    total = 0.0
    for a, b, e, w in zip(*(z.flatten().tolist() for z in (x0, xt, eps, v))):
        mean_q, variance_q = posterior(a, b, t)
        mean_p, log_variance = reverse(b, e, w, t)
        z = np.linspace(-12, 12, 20001)
        x = mean_q + math.sqrt(variance_q) * z
        log_q = -0.5 * z**2 - 0.5 * math.log(2 * math.pi * variance_q)
        log_p = -0.5 * (x - mean_p) ** 2 / math.exp(log_variance) - 0.5 * (math.log(2 * math.pi) + log_variance)
        total += (np.exp(log_q) * (log_q - log_p)).sum() * (x[1] - x[0]) / math.log(2)
    assert losses["vb"].item() == pytest.approx(total / x0.numel(), rel=1e-6)
    assert losses["mse"].item() == pytest.approx((eps - noise).square().mean().item(), rel=1e-12)
    assert losses["loss"].item() == pytest.approx(losses["mse"].item() + losses["vb"].item(), rel=1e-12)


def phi(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def test_vb_at_step_0_is_the_likelihood_of_the_level():
    x0, y, _, noise, drop = batch()
    g = torch.Generator().manual_seed(3)
    v = torch.randn(noise.shape, generator=g, dtype=torch.float64)
    eps = noise + 0.5 * torch.randn(noise.shape, generator=g, dtype=torch.float64)
    losses = training_loss(Given(torch.cat([eps, v], 1)), x0, y, t=torch.zeros(6, dtype=torch.long), noise=noise, drop=drop)
    xt = math.sqrt(ABAR[0]) * x0 + math.sqrt(1 - ABAR[0]) * noise
    total = 0.0
    for a, b, e, w in zip(*(z.flatten().tolist() for z in (x0, xt, eps, v))):
        mean, log_variance = reverse(b, e, w, 0)
        sigma = math.exp(log_variance / 2)
        low = 0.0 if a < -0.999 else phi((a - 1 / 255 - mean) / sigma)
        high = 1.0 if a > 0.999 else phi((a + 1 / 255 - mean) / sigma)
        total -= math.log2(high - low)
    assert losses["vb"].item() == pytest.approx(total / x0.numel(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_likelihoods_of_all_levels_sum_to_1(dtype):
    """The tolerance allows one rounding error of 1 at a border between levels, in standard deviations."""
    levels = torch.arange(256, dtype=dtype) / 127.5 - 1
    for mean in (-1.3, -1.0, -0.4567, 0.0, 0.999, 5.0):
        for log_variance in (-14.0, -9.5, -3.0, 1.0):
            log_p = diffusion._log_likelihood(levels, levels - mean, torch.full_like(levels, log_variance))
            assert log_p.isfinite().all() and (log_p <= 0).all()
            bound = 16 * torch.finfo(dtype).eps * (1 + math.exp(-log_variance / 2))
            assert log_p.double().exp().sum().item() == pytest.approx(1, abs=bound)


def test_the_likelihood_stays_finite_and_keeps_its_gradient():
    """Where the probability underflows, its logarithm approaches the log of the normal density."""
    distance = torch.tensor([-3.0, 3.0, 0.5, 0.0], requires_grad=True)
    log_variance = torch.full((4,), -9.5, requires_grad=True)
    log_p = diffusion._log_likelihood(torch.zeros(4), distance, log_variance)
    log_p.sum().backward()
    nearest = (distance.detach().abs() - 1 / 255).clamp(min=0)
    torch.testing.assert_close(log_p[:3], -0.5 * nearest[:3].square() * math.exp(9.5), rtol=0.05, atol=0)
    assert log_variance.grad.isfinite().all() and (log_variance.grad[:3] > 1).all() and log_variance.grad[3] < 0


def test_the_bound_trains_only_the_variance_and_the_square_only_eps():
    x0, y, t, noise, drop = batch()
    t[0] = 0
    out = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    training_loss(Given(out), x0, y, t=t, noise=noise, drop=drop)["loss"].backward()
    eps_grad, v_grad = out.grad.chunk(2, dim=1)
    torch.testing.assert_close(eps_grad, 2 * (out.detach()[:, :1] - noise) / noise.numel(), rtol=1e-12, atol=0)

    def vb(v):
        eps = out.detach()[:, :1]
        return training_loss(Given(torch.cat([eps, v], 1)), x0, y, t=t, noise=noise, drop=drop)["loss"]

    assert torch.autograd.gradcheck(vb, out.detach()[:, 1:].clone().requires_grad_())
    assert (v_grad != 0).all()


def test_training_finds_the_best_constant_variance():
    """With the true eps, the bound for t > 0 is smallest at the posterior variance, v = -1."""
    x0, y, _, noise, drop = batch()
    v = torch.zeros_like(noise, requires_grad=True)
    for _ in range(60):
        loss = training_loss(Given(torch.cat([noise, v], 1)), x0, y, t=torch.full((6,), 3), noise=noise, drop=drop)["loss"]
        (grad,) = torch.autograd.grad(loss, v)
        v = (v - 100 * noise.numel() * grad / 10).detach().requires_grad_()
    torch.testing.assert_close(v, torch.full_like(v, -1.0), rtol=0, atol=1e-3)


def test_without_learned_variance_the_loss_is_the_squared_error():
    x0, y, t, noise, drop = batch(learn_sigma=False)
    eps = torch.zeros_like(noise, requires_grad=True)
    losses = training_loss(Given(eps, learn_sigma=False), x0, y, t=t, noise=noise, drop=drop)
    assert losses["loss"].item() == losses["mse"].item() == pytest.approx(noise.square().mean().item())
    assert losses["vb"].item() == 0 and losses["loss"].requires_grad


def test_float32_rounding_is_small():
    """Compare float32 with float64 for every t. The output has the size of a network's output."""
    n = STEPS
    x0, y, _, noise, _ = batch(n, torch.float32)
    out = torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    drop = torch.zeros(n, dtype=torch.bool)
    losses, gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        o = out.to(dtype, copy=True).requires_grad_()
        losses[dtype] = training_loss(Given(o), x0.to(dtype), y, t=torch.arange(n), noise=noise.to(dtype), drop=drop)
        losses[dtype]["loss"].backward()
        gradients[dtype] = o.grad.double()
    for name in ("loss", "mse", "vb"):
        assert losses[torch.float32][name].item() == pytest.approx(losses[torch.float64][name].item(), rel=2e-6)
    error = (gradients[torch.float32] - gradients[torch.float64]).abs().amax((1, 2, 3))
    assert (error <= 1e-4 * gradients[torch.float64].abs().amax((1, 2, 3))).all()


def test_the_network_gets_noisy_images_and_dropped_labels():
    x0, y, t, noise, drop = batch()
    model = Given(torch.zeros(6, 2, 4, 4, dtype=torch.float64))
    drop[:2] = torch.tensor([True, False])
    training_loss(model, x0, y, t=t, noise=noise, drop=drop)
    ((x, asked_t, asked_y),) = model.calls
    torch.testing.assert_close(x.numpy(), np.sqrt(ABAR[t])[:, None, None, None] * x0.numpy()
                               + np.sqrt(1 - ABAR[t])[:, None, None, None] * noise.numpy(), rtol=1e-12, atol=1e-12)  # fmt: skip
    assert torch.equal(asked_t, t) and torch.equal(asked_y, torch.where(drop, 3, y))


def test_randomness_comes_only_from_the_generator():
    x0, y, *_ = batch(64, torch.float32)

    def run(seed, global_seed):
        torch.manual_seed(global_seed)
        model = Given(torch.zeros(64, 2, 4, 4))
        generator = torch.Generator().manual_seed(seed)
        losses = training_loss(model, x0, y, generator)
        return losses["loss"], model.calls[0], generator.get_state()

    first, again, other = run(1, 1), run(1, 2), run(2, 1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[2], again[2])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1]))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    training_loss(Given(torch.zeros(64, 2, 4, 4)), x0, y, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_slices_of_one_draw_give_the_loss_of_the_whole():
    x0, y, t, noise, drop = batch(8)
    out = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    whole = training_loss(Given(out), x0, y, t=t, noise=noise, drop=drop)["loss"]
    parts = [
        training_loss(
            Given(out[i : i + 4]), x0[i : i + 4], y[i : i + 4], t=t[i : i + 4], noise=noise[i : i + 4], drop=drop[i : i + 4]
        )
        for i in (0, 4)
    ]
    torch.testing.assert_close(sum(part["loss"] for part in parts) / 2, whole, rtol=1e-12, atol=0)


def test_draw_has_the_documented_distributions():
    t, noise, drop = draw(config_with(dropout_label=0.1), 20000, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 10
    assert noise.dtype == torch.float32 and abs(noise.std() - 1) < 0.01 and abs(noise.mean()) < 0.01
    assert abs(drop.float().mean() - 0.1) < 0.01
    assert not draw(config_with(dropout_label=0.0), 1000, torch.Generator())[2].any()


def test_logit_normal_times_have_their_distribution_and_change_nothing_else():
    config, of_times = config_with(), config_with(times="logit_normal")
    (t, *others), (times, *same) = (draw(c, 20000, torch.Generator().manual_seed(0)) for c in (config, of_times))
    assert all(torch.equal(a, b) for a, b in zip(others, same))
    assert times.dtype == torch.int64 and times.min() >= 0 and times.max() <= 999
    normal = torch.special.ndtr
    for below in (50, 125, 250, 500, 750):
        exact = normal(torch.logit(torch.tensor(below / 1000, dtype=torch.float64)) + 1)
        assert abs((times < below).double().mean() - exact) < 0.012
    assert (times[t.argsort()].diff() >= 0).all()


def test_autocast_affects_only_the_network():
    x0, y, t, noise, drop = batch(6, torch.float32)
    t[:] = torch.tensor([0, 1, 2, 500, 998, 999])
    weight = torch.eye(4)
    seen = []

    def network(x, t, y):
        out = torch.cat([x @ weight, x @ weight], 1)
        seen.append((x.dtype, out.dtype))
        return out

    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = training_loss(Given(function=network), x0, y, t=t, noise=noise, drop=drop)
    assert seen == [(torch.float32, torch.bfloat16)]
    tables = diffusion.make_tables(x0.device, x0.dtype)
    xt = tables.signal[t].view(-1, 1, 1, 1) * x0 + tables.sigma[t].view(-1, 1, 1, 1) * noise
    out = torch.cat([xt, xt], 1).bfloat16().float()
    expected = training_loss(Given(out), x0, y, t=t, noise=noise, drop=drop)
    for name in losses:
        assert losses[name].dtype == torch.float32 and torch.equal(losses[name], expected[name])


def test_the_loss_reads_no_values_from_the_device():
    """On the meta device, reading a value raises. On a GPU it would wait for the device."""
    x0, y, t, noise, drop = (z.to("meta") for z in batch(6, torch.float32))
    output = torch.zeros(6, 2, 4, 4, device="meta", requires_grad=True)
    losses = training_loss(Given(output), x0, y, t=t, noise=noise, drop=drop)
    losses["loss"].backward()
    assert losses["vb"].device.type == "meta" and output.grad.shape == output.shape
    model = Given(function=lambda x, t, y: torch.cat([x, x], 1))
    assert predict(model, x0, t, y, 2.0).shape == (6, 2, 4, 4)


def test_a_wrapped_model_gives_the_same_loss():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments):
            return self.module(*arguments)

    x0, y, *_ = batch()
    model = Given(torch.zeros(6, 2, 4, 4, dtype=torch.float64))
    a, b = (training_loss(m, x0, y, torch.Generator().manual_seed(0))["loss"] for m in (model, Wrapper(model)))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x0=torch.zeros(6, 1, 4, 4, dtype=torch.uint8)), TypeError, "x0 must be a floating-point tensor.*uint8"),
        (dict(x0=torch.zeros(6, 3, 4, 4)), ValueError, r"x0 must be \(B, 1, 4, 4\).*\(6, 3, 4, 4\)"),
        (dict(x0=torch.zeros(0, 1, 4, 4)), ValueError, "x0 must be"),
        (dict(y=torch.zeros(6)), TypeError, "y must be a tensor of ints, got torch.float32"),
        (dict(y=torch.zeros(5, dtype=torch.long)), ValueError, r"y must have shape \(6,\)"),
        (dict(y=torch.full((6,), 4)), ValueError, r"y must be in 0\.\.3, got 4\.\.4"),
        (dict(y=torch.full((6,), -1)), ValueError, r"y must be in 0\.\.3"),
        (dict(t=torch.full((6,), 1000)), ValueError, r"t must be in 0\.\.999"),
        (dict(t=None), TypeError, "generator must be a torch.Generator, got None"),
        (dict(noise=torch.zeros(6, 1, 4, 5)), ValueError, "noise must have the shape of x0"),
        (dict(drop=torch.zeros(6)), ValueError, "drop must be a bool tensor"),
        (dict(output=torch.zeros(6, 1, 4, 4)), ValueError, "model must output epsilon and variance, got 1 channels"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    x0, y, t, noise, drop = batch(6, torch.float32)
    arguments = {"x0": x0, "y": y, "t": t, "noise": noise, "drop": drop, "output": torch.zeros(6, 2, 4, 4), **change}
    with pytest.raises(error, match=message):
        training_loss(Given(arguments.pop("output")), **arguments)


# Guidance


def test_guidance_changes_eps_and_keeps_the_variance():
    def network(x, t, y):
        return torch.cat([x * (1.0 + y[:, None, None, None]), x + y[:, None, None, None]], 1)

    model = Given(function=network)
    x, t, y = torch.randn(5, 1, 4, 4), torch.full((5,), 7), torch.tensor([0, 1, 2, 0, 1])
    given, free = network(x, t, y), network(x, t, torch.full((5,), 3))
    assert torch.equal(predict(model, x, t, y, 1.0), given) and len(model.calls) == 1
    for guidance in (0.0, 0.5, 1.5, 4.0):
        out = predict(model, x, t, y, guidance)
        torch.testing.assert_close(out[:, :1], free[:, :1] + guidance * (given[:, :1] - free[:, :1]))
        assert torch.equal(out[:, 1:], given[:, 1:])
    assert len(model.calls) == 5
    plain = Given(function=lambda x, t, y: x * (1.0 + y[:, None, None, None]), learn_sigma=False)
    torch.testing.assert_close(predict(plain, x, t, y, 2.0), 2 * given[:, :1] - free[:, :1])


def test_guidance_needs_a_trained_null_label():
    model = Given(function=lambda x, t, y: x, learn_sigma=False, dropout_label=0.0)
    x, t, y = torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert predict(model, x, t, y) is not None
    with pytest.raises(ValueError, match="guidance 2.0 needs a model that was trained with dropout_label > 0"):
        predict(model, x, t, y, 2.0)
    with pytest.raises(ValueError, match="guidance must be a finite number, got nan"):
        predict(Given(function=lambda x, t, y: x), x, t, y, math.nan)


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_predicted_noise_is_scaled(prediction, t):
    """Both predictions of the same noise stay predictions of the same noise; the variance stays."""
    config = config_with(prediction=prediction)
    tables = diffusion.make_tables(torch.device("cpu"), torch.float64)
    signal, sigma = tables.signal[t], tables.sigma[t]
    x, eps, logits = torch.randn(3, 5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))

    def predicted(eps):
        return eps if prediction == "epsilon" else signal * eps - sigma * (x - sigma * eps) / signal

    out = scale_noise(config, torch.cat([predicted(eps), logits], 1), x, t, 1.25)
    torch.testing.assert_close(out, torch.cat([predicted(1.25 * eps), logits], 1), rtol=1e-12, atol=1e-12)
    assert scale_noise(config, out, x, t, 1.0) is out


def test_wrong_scales_of_the_noise_are_named():
    x = torch.zeros(1, 1, 4, 4)
    for wrong in (0, -1.0, math.inf, math.nan, True, "1"):
        with pytest.raises(ValueError, match=f"noise_scale must be a positive number, got {wrong!r}"):
            scale_noise(config_with(), x, x, 5, wrong)
    for wrong in (-1, 1000, 1.5):
        with pytest.raises(ValueError, match=rf"t must be an int in 0\.\.999, got {wrong}"):
            scale_noise(config_with(), x, x, wrong, 1.5)
    with pytest.raises(ValueError, match=r"x must have the shape of the prediction, \(2, 1, 4, 4\), got \(1, 1, 4, 4\)"):
        scale_noise(config_with(), torch.zeros(2, 2, 4, 4), x, 5, 1.5)
    flow = config_with(prediction="flow", learn_sigma=False)
    assert scale_noise(flow, x, x, 5, 1) is x
    with pytest.raises(ValueError, match="noise_scale must be 1 for a model with prediction 'flow', got 1.5"):
        scale_noise(flow, x, x, 5, 1.5)


# Samplers


def network_of(x, t):
    """A smooth function whose output has halves for eps and variance."""
    eps = torch.sin(3 * x) * 0.5 + 0.3 * x + 1e-4 * t
    return torch.cat([eps, torch.cos(2 * x)], 1)


def run_scheduler(scheduler, x, learn_sigma=True, generator=None):
    for t in scheduler.timesteps.tolist():
        out = network_of(x, t)
        x = reverse_step(scheduler, out if learn_sigma else out[:, : x.shape[1]], t, x, generator)
        yield t, x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("steps, learn_sigma", [(250, True), (250, False), (17, True)])
def test_ddpm_steps_equal_the_closed_form(steps, learn_sigma, channels, clip):
    """The respaced chain of Nichol and Dhariwal: betas of the subsequence, and the posterior mean of the predicted x_0."""
    scheduler = make_scheduler("ddpm", steps, config_with(learn_sigma=learn_sigma), clip)
    ts = np.round(np.linspace(0, 999, steps)).astype(int)[::-1]
    assert scheduler.timesteps.tolist() == ts.tolist() and ts[0] == 999 and ts[-1] == 0
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(7))
    noises = torch.Generator().manual_seed(8)
    mine = x.double().numpy()
    for (t, theirs), before in zip(run_scheduler(scheduler, x, learn_sigma, torch.Generator().manual_seed(8)), [*ts[1:], None]):
        abar, abar_before = ABAR[t], (1.0 if before is None else ABAR[before])
        beta = 1 - abar / abar_before
        eps, v = network_of(torch.from_numpy(mine), t).numpy().reshape(2, 2, channels, 4, 4).swapaxes(0, 1)
        x0 = (mine - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        x0 = x0.clip(-1, 1) if clip else x0
        mean = (np.sqrt(abar_before) * beta * x0 + np.sqrt(1 - beta) * (1 - abar_before) * mine) / (1 - abar)
        if before is None:
            mine = mean
        else:
            smallest = beta * (1 - abar_before) / (1 - abar)
            f = (v + 1) / 2 if learn_sigma else 0
            sigma = np.exp(0.5 * (f * np.log(beta) + (1 - f) * np.log(smallest)))
            mine = mean + sigma * torch.randn(2, channels, 4, 4, generator=noises).numpy()
        np.testing.assert_allclose(theirs.numpy(), mine, rtol=2e-4, atol=2e-4)
        mine = theirs.double().numpy()  # compare single steps, because the chain amplifies rounding


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [2, 50, 1000])
def test_ddim_steps_equal_the_closed_form(steps, clip):
    scheduler = make_scheduler("ddim", steps, config_with(learn_sigma=True), clip)
    ts = np.arange(0, 1000, 1000 // steps)[::-1]
    assert scheduler.timesteps.tolist() == ts.tolist()
    mine = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9)).double().numpy()
    for (t, theirs), before in zip(run_scheduler(scheduler, torch.from_numpy(mine).float()), [*ts[1:], None]):
        abar, abar_before = ABAR[t], (1.0 if before is None else ABAR[before])
        eps = network_of(torch.from_numpy(mine), t)[:, :3].numpy()
        x0 = (mine - np.sqrt(1 - abar) * eps) / np.sqrt(abar)
        if clip:
            x0 = x0.clip(-1, 1)
            eps = (mine - np.sqrt(abar) * x0) / np.sqrt(1 - abar)
        mine = np.sqrt(abar_before) * x0 + np.sqrt(1 - abar_before) * eps
        np.testing.assert_allclose(theirs.numpy(), mine, rtol=2e-4, atol=2e-4)
        mine = theirs.double().numpy()


@pytest.mark.parametrize("name, steps", [("ddpm", 250), ("ddim", 50), ("dpm++", 20), ("dpm++", 1), ("dpm++", 999)])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_every_sampler_finds_the_image_if_the_data_has_only_one(name, steps, learn_sigma):
    """If the data is one image x*, the exact eps is (x_t - sqrt(abar) x*) / sqrt(1 - abar), and every sampler must end at
    x*."""
    scheduler = make_scheduler(name, steps, config_with(learn_sigma=learn_sigma))
    target = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(10))
    for t in scheduler.timesteps.tolist():
        eps = (x - math.sqrt(ABAR[t]) * target) / math.sqrt(1 - ABAR[t])
        out = torch.cat([eps, -torch.ones_like(eps)], 1) if learn_sigma else eps
        x = reverse_step(scheduler, out, t, x, torch.Generator().manual_seed(t))
    torch.testing.assert_close(x, target.expand_as(x), rtol=0, atol=2e-3)


@pytest.mark.parametrize("clip", [False, True])
def test_dpm_steps_equal_the_closed_form(clip):
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095: multistep of order 2, with a first and a last step of order 1."""
    scheduler = make_scheduler("dpm++", 8, config_with(learn_sigma=True), clip)
    ts = scheduler.timesteps.tolist()
    mine = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(12)).double().numpy()
    alpha, sigma = np.sqrt(ABAR), np.sqrt(1 - ABAR)
    last, last_h = None, None
    for k, (t, theirs) in enumerate(run_scheduler(scheduler, torch.from_numpy(mine).float())):
        x0 = (mine - sigma[t] * network_of(torch.from_numpy(mine), t)[:, :3].numpy()) / alpha[t]
        x0 = x0.clip(-1, 1) if clip else x0
        if k == 7:
            mine = x0  # the limit h -> infinity
        else:
            s = ts[k + 1]
            h = math.log(alpha[s] / sigma[s]) - math.log(alpha[t] / sigma[t])
            d = x0 if last is None else x0 + h / (2 * last_h) * (x0 - last)
            mine = sigma[s] / sigma[t] * mine - alpha[s] * math.expm1(-h) * d
            last, last_h = x0, h
        np.testing.assert_allclose(theirs.numpy(), mine, rtol=2e-4, atol=2e-4)
        mine = theirs.double().numpy()


@pytest.mark.parametrize("steps", [1, 2, 8, 20, 100, 500, 999])
def test_times_of_dpm_are_spaced_evenly_in_log_snr(steps):
    times = make_scheduler("dpm++", steps, config_with()).timesteps.tolist()
    assert len(times) == steps and times[0] == 999 and (steps == 1 or times[-1] == 0)
    assert all(a > b for a, b in zip(times, times[1:]))
    log_snr = np.log(ABAR / (1 - ABAR))
    even = np.linspace(log_snr[999], log_snr[0], steps)
    for t, wanted in zip(times, even):
        if steps <= 100 and t > steps / 4:  # below, there are fewer times than steps
            assert abs(log_snr[t] - wanted) <= log_snr[max(t - 1, 0)] - log_snr[min(t + 1, 999)]


def test_clipping_limits_the_last_step_of_dpm():
    """The last step returns its prediction of x_0. Here the prediction lies far outside the limits."""
    scheduler = make_scheduler("dpm++", 5, config_with(learn_sigma=False), clip=True)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(11))
    target = torch.linspace(-3, 3, 16).view(1, 1, 4, 4)
    for t in scheduler.timesteps.tolist():
        x = reverse_step(scheduler, (x - math.sqrt(ABAR[t]) * target) / math.sqrt(1 - ABAR[t]), t, x)
    torch.testing.assert_close(x, target.clamp(-1, 1).expand_as(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name, steps, error, message",
    [
        ("rk4", 10, ValueError, r"sampler must be one of dpm\+\+, ddpm, ddim, euler, heun, got 'rk4'"),
        ("euler", 10, ValueError, r"one of dpm\+\+, ddpm, ddim for a model with prediction 'epsilon', got 'euler'"),
        ("ddpm", 1, ValueError, r"steps of ddpm must be in 2\.\.1000, got 1"),
        ("ddpm", 1001, ValueError, "steps of ddpm"),
        ("dpm++", 1000, ValueError, r"steps of dpm\+\+ must be in 1\.\.999"),
        ("ddim", 600, ValueError, "steps of ddim must divide 1000, got 600; the nearest that does is 500"),
        ("ddim", 10.0, TypeError, "steps must be an int, got 10.0"),
    ],
)
def test_wrong_schedules_are_named(name, steps, error, message):
    with pytest.raises(error, match=message):
        make_scheduler(name, steps, config_with(learn_sigma=True))


def test_samplers_have_default_numbers_of_steps():
    def steps(**changes):
        config = config_with(**changes)
        return [len(make_scheduler(name, None, config).timesteps) for name in samplers(config)]

    assert steps() == steps(prediction="v") == [20, 250, 50]
    assert steps(prediction="flow", learn_sigma=False) == [50, 2 * 25 - 1]


# Predictions and weights


def input_and_target(prediction, x0, noise, t):
    """Return x_t and the value that the model should predict, from the definitions."""
    if prediction == "flow":
        s = (t.double().view(-1, 1, 1, 1) + 1) / STEPS
        return (1 - s) * x0 + s * noise, noise - x0
    signal, sigma = (torch.from_numpy(a)[t].view(-1, 1, 1, 1) for a in (np.sqrt(ABAR), np.sqrt(1 - ABAR)))
    return signal * x0 + sigma * noise, noise if prediction == "epsilon" else signal * noise - sigma * x0


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_perfect_prediction_has_loss_0_and_errors_are_weighted(prediction, weighting):
    x0, y, _, noise, drop = batch()
    t = torch.tensor([0, 3, 200, 500, 900, 999])
    xt, target = input_and_target(prediction, x0, noise, t)
    changes = dict(prediction=prediction, weighting=weighting, learn_sigma=False)
    model = Given(target, **changes)
    losses = training_loss(model, x0, y, t=t, noise=noise, drop=drop)
    assert losses["loss"] < 1e-24 and losses["mse"] < 1e-24 and losses["vb"] == 0
    asked, told, _ = model.calls[0]
    torch.testing.assert_close(asked, xt, rtol=1e-12, atol=1e-12)
    assert torch.equal(told, t + 1 if prediction == "flow" else t)

    # Convert an error of 1 in the prediction to an error of x_0: solve the equations of x_t and of the target for x_0.
    one = torch.ones((), dtype=torch.float64)
    for i in range(6):
        error = torch.zeros_like(x0)
        error[i] = 1
        losses = training_loss(Given(target + error, **changes), x0, y, t=t, noise=noise, drop=drop)
        a, b = (
            input_and_target("flow" if prediction == "flow" else "epsilon", u, w, t[i : i + 1])[0].item()
            for u, w in ((one, 0 * one), (0 * one, one))
        )
        rows = {"epsilon": (0, 1), "v": (-b, a), "flow": (-1, 1)}[prediction]
        per_x0 = np.linalg.solve(np.array([(a, b), rows]), np.array([0.0, 1.0]))[0] if a > 0 else -1.0
        weight = min((a / b) ** 2, 5) * per_x0**2 if weighting == "min_snr" else 1
        assert losses["mse"].item() == pytest.approx(1 / 6, rel=1e-9)
        assert losses["loss"].item() == pytest.approx(weight / 6, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_v_and_epsilon_learn_the_same_variance(weighting):
    """The same eps_hat in both forms gives the same bound, which trains only the logits of the variance."""
    x0, y, t, noise, drop = batch()
    xt, _ = input_and_target("epsilon", x0, noise, t)
    g = torch.Generator().manual_seed(3)
    eps = noise + 0.1 * torch.randn(x0.shape, dtype=torch.float64, generator=g)
    logits = torch.randn(x0.shape, dtype=torch.float64, generator=g)
    signal, sigma = (torch.from_numpy(a)[t].view(-1, 1, 1, 1) for a in (np.sqrt(ABAR), np.sqrt(1 - ABAR)))
    found = {}
    for prediction, said in (("epsilon", eps), ("v", (eps - sigma * xt) / signal)):
        out = torch.cat([said, logits], 1).requires_grad_()
        losses = training_loss(Given(out, prediction=prediction, weighting=weighting), x0, y, t=t, noise=noise, drop=drop)
        (grad,) = torch.autograd.grad(losses["loss"], out)
        found[prediction] = losses["vb"], grad[:, 1:]
        assert grad[:, :1].abs().min() > 0
    for ours, theirs in zip(*found.values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name, steps", [("ddpm", 50), ("ddim", 20), ("dpm++", 8)])
@pytest.mark.parametrize("clip", [False, True])
def test_samplers_give_the_same_with_v_and_epsilon(name, steps, clip):
    schedulers = {p: make_scheduler(name, steps, config_with(prediction=p, learn_sigma=True), clip) for p in ("epsilon", "v")}
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    for t in schedulers["v"].timesteps.tolist():
        out = network_of(x, t)
        v = torch.cat([(out[:, :1] - math.sqrt(1 - ABAR[t]) * x) / math.sqrt(ABAR[t]), out[:, 1:]], 1)
        one, other = (
            reverse_step(schedulers[p], said, t, x, torch.Generator().manual_seed(t))
            for p, said in (("epsilon", out), ("v", v))
        )
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-3 if t > 900 and not clip else 1e-4)
        x = other


@pytest.mark.parametrize("name, steps, order", [("euler", 40, 1), ("heun", 40, 2)])
def test_flow_samplers_have_their_order(name, steps, order):
    config = config_with(prediction="flow", learn_sigma=False)

    def end(field, steps, clip=False):
        scheduler = make_scheduler(name, steps, config, clip)
        times = scheduler.timesteps.tolist()
        assert len(times) == (steps if name == "euler" else 2 * steps - 1) and times[0] == 1000 and times[-1] == 1
        x = torch.full((1, 1, 2, 2), 0.7)
        for t in times:
            x = reverse_step(scheduler, field(x, t / STEPS), t, x)
        return x

    point = torch.tensor([[-1.0, 0.2], [0.5, 3.0]]).view(1, 1, 2, 2)
    torch.testing.assert_close(end(lambda x, s: (x - point) / s, 7), point, rtol=0, atol=1e-5)  # the data is one image
    torch.testing.assert_close(end(lambda x, s: (x - point) / s, 7, True), point.clamp(-1, 1), rtol=0, atol=1e-5)
    # The data is N(0, 1/4), so x shrinks with the deviation of x_s and ends at 0.7 / 2.
    errors = [
        abs(end(lambda x, s: x * (s - (1 - s) / 4) / (s**2 + (1 - s) ** 2 / 4), n)[0, 0, 0, 0].item() - 0.35)
        for n in (steps, 2 * steps)
    ]
    assert 2 ** (order - 0.5) < errors[0] / errors[1] < 2 ** (order + 0.7), errors


def test_a_missing_diffusers_is_named_in_the_error(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="sampling needs diffusers: pip install diffusers"):
        make_scheduler("ddpm", 10, config_with(learn_sigma=True))


def test_docstring_examples_run():
    failed, attempted = doctest.testmod(diffusion)
    assert attempted and not failed
