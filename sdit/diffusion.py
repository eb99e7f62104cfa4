"""The diffusion that SDiT is trained on, and the samplers that undo it.

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), abar_t = prod_{s <= t} (1 - beta_s), t = 0 .. 999, beta linear from 1e-4 to
2e-2. The network predicts the noise eps and, with ``learn_sigma``, where between its two extremes the logarithm of the variance
of p(x_{t-1} | x_t) lies (Nichol and Dhariwal, arXiv 2102.09672).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SAMPLERS", "STEPS", "draw", "make_scheduler", "predict", "reverse_step", "training_loss"]

STEPS = 1000
_BETAS = (1e-4, 2e-2)


class _Tables(NamedTuple):
    """Functions of t, (1000,) each, computed in float64."""

    signal: Tensor  # sqrt(abar): x_t = signal x_0 + sigma eps
    sigma: Tensor  # sqrt(1 - abar)
    shift: Tensor  # beta / (sqrt(alpha) sigma): the mean of q(x_{t-1} | x_t, x_0) is x_t / sqrt(alpha) - shift eps
    log_beta: Tensor  # the largest log variance of a reverse step
    log_posterior: Tensor  # the smallest: of q(x_{t-1} | x_t, x_0); at t = 0, where that is 0, its value at t = 1


@lru_cache(maxsize=16)
def _tables(device: torch.device, dtype: torch.dtype) -> _Tables:
    beta = torch.linspace(*_BETAS, STEPS, dtype=torch.float64, device="cpu")
    abar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), abar[:-1]])
    posterior = beta * (1 - before) / (1 - abar)
    posterior[0] = posterior[1]
    sigma = torch.sqrt(1 - abar)
    tables = _Tables(abar.sqrt(), sigma, beta / ((1 - beta).sqrt() * sigma), beta.log(), posterior.log())
    return _Tables(*(table.to(device, dtype) for table in tables))


def _config(model):
    """The configuration of a model, also of one inside DistributedDataParallel."""
    return model.config if hasattr(model, "config") else model.module.config


# Training


def draw(config, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All that ``training_loss`` leaves to chance for n images: t (n,) int64 uniform in 0..999, noise (n, C, S, S) float32
    normal, drop (n,) bool true with probability config.dropout_label. On the generator's device, always in this order.

    Several processes that draw for the whole batch and take their slices train as one process would.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(channels=1, image_size=8, dropout_label=0.1)
    >>> t, noise, drop = draw(config, 4, torch.Generator().manual_seed(0))
    >>> t.shape, noise.shape, drop.dtype
    (torch.Size([4]), torch.Size([4, 1, 8, 8]), torch.bool)
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    at = {"generator": generator, "device": generator.device}
    t = torch.randint(STEPS, (n,), **at)
    noise = torch.randn(n, config.channels, config.image_size, config.image_size, dtype=torch.float32, **at)
    drop = torch.rand(n, dtype=torch.float32, **at) < config.dropout_label
    return t, noise, drop


def training_loss(
    model,
    x0: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    drop: Tensor | None = None,
) -> dict[str, Tensor]:
    """The objective: ``{"loss", "mse", "vb"}``, scalars, of which ``loss`` = mse + vb has a gradient.

    - mse = mean (eps - eps_hat)^2, eps_hat and v the halves of model(x_t, t, y), x_t = sqrt(abar) x0 + sqrt(1 - abar) eps;
    - vb, only with config.learn_sigma (else 0): the term of the variational bound that belongs to t, in bits per dimension,
      with eps_hat detached, so that it trains v alone: KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), or -log p(x0 | x_1) at
      t = 0, where p's log variance is f log beta_t + (1 - f) log beta~_t, f = (v + 1) / 2, and p(x0 | x_1) is the normal
      density integrated over x0's level of 256 (the outermost two reach to infinity). The integral is exact, not the usual
      approximation by tanh, and its logarithm finite however unlikely x0 is.

    x0 (B, C, S, S) in [-1, 1], y (B,) int labels. ``t`` (B,) int, ``noise`` like x0 and ``drop`` (B,) bool (labels that become
    the null label) come from ``draw`` with ``generator`` where they are not given. The network runs under whatever autocast the
    caller has set; x_t and the loss are float32 (float64 for float64 x0) regardless. Nothing here waits for a GPU, if t, noise
    and drop are on it or drawn on it.

    Errors: ValueError for shapes and labels out of range, TypeError for dtypes or where neither generator nor values are given.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(channels=1, image_size=8, num_classes=10, learn_sigma=True, dropout_label=0.1)
    >>> class Zero(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.config = config
    ...     def forward(self, x, t, y):
    ...         return x.new_zeros(len(x), 2, 8, 8)
    >>> x0, y = torch.zeros(64, 1, 8, 8), torch.arange(64) % 10
    >>> losses = training_loss(Zero(), x0, y, torch.Generator().manual_seed(0))
    >>> abs(losses["mse"].item() - 1) < 0.1  # the mean square of the noise itself
    True
    """
    config = _config(model)
    expected = (config.channels, config.image_size, config.image_size)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        raise TypeError(
            f"x0 must be a floating-point tensor in [-1, 1], got {getattr(x0, 'dtype', type(x0).__name__)}; see to_batch"
        )
    if x0.ndim != 4 or tuple(x0.shape[1:]) != expected or not len(x0):
        raise ValueError(f"x0 must be (B, {', '.join(map(str, expected))}) with B > 0, got {tuple(x0.shape)}")
    n = len(x0)
    _check_ints("y", y, n, config.num_classes)
    if t is None or noise is None or drop is None:
        drawn = draw(config, n, generator)
        t, noise, drop = (a if a is not None else b for a, b in zip((t, noise, drop), drawn))
    _check_ints("t", t, n, STEPS - 1)
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if drop.shape != (n,) or drop.dtype != torch.bool:
        raise ValueError(f"drop must be a bool tensor of shape ({n},), got {drop.dtype} of shape {tuple(drop.shape)}")

    with torch.autocast(x0.device.type, enabled=False):
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        t, noise, y, drop = t.to(x0.device), noise.to(x0), y.to(x0.device), drop.to(x0.device)
        tables = _Tables(*(table[t].view(-1, 1, 1, 1) for table in _tables(x0.device, x0.dtype)))
        xt = tables.signal * x0 + tables.sigma * noise
    out = model(xt, t, torch.where(drop, config.num_classes, y))
    with torch.autocast(x0.device.type, enabled=False):
        out = out.to(x0.dtype)
        if out.shape[1] != (2 if config.learn_sigma else 1) * config.channels:
            raise ValueError(
                f"model must give {'eps and variance' if config.learn_sigma else 'eps'}, got {out.shape[1]} channels"
            )
        if not config.learn_sigma:
            mse = (out - noise).square().mean()
            return {"loss": mse, "mse": mse.detach(), "vb": torch.zeros_like(mse).detach()}
        eps, v = out.chunk(2, dim=1)
        mse = (eps - noise).square().mean()
        vb = _variational_bound(tables, x0, eps.detach() - noise, v, (t == 0).view(-1, 1, 1, 1)).mean()
        return {"loss": mse + vb, "mse": mse.detach(), "vb": vb.detach()}


def _check_ints(name, value, n, largest):
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of ints, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one per image, got {tuple(value.shape)}")
    if value.device.type == "cpu" and n and not (value.min() >= 0 and value.max() <= largest):
        raise ValueError(f"{name} must be in 0..{largest}, got {value.min()}..{value.max()}")


def _variational_bound(tables, x0, error, v, first):
    """Bits per dimension, elementwise. The means of q and p differ by shift times the error of eps_hat: said so, no large
    numbers cancel where abar is small."""
    f = (v + 1) / 2
    log_variance = f * tables.log_beta + (1 - f) * tables.log_posterior
    distance = tables.shift * error  # mean of q - mean of p; the mean of q is x0 itself at t = 0
    d = tables.log_posterior - log_variance
    kl = 0.5 * (torch.expm1(d) - d + distance.square() * torch.exp(-log_variance))
    return torch.where(first, -_log_likelihood(x0, distance, log_variance), kl) / math.log(2)


def _log_likelihood(x, distance, log_variance):
    """log of the normal mass of x's level, [x - 1/255, x + 1/255], around a mean that is x - distance."""
    scale = torch.exp(-0.5 * log_variance)
    low, high = (distance - 1 / 255) * scale, (distance + 1 / 255) * scale
    right = distance > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)  # in the lower tail, where log Phi is precise
    log_high = torch.special.log_ndtr(high)
    inner = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    lowest, highest = x < -0.999, x > 0.999
    tail = torch.where(lowest, distance + 1 / 255, 1 / 255 - distance) * scale
    return torch.where(lowest | highest, torch.special.log_ndtr(tail), inner)


# Sampling


def predict(model, x: Tensor, t: Tensor, y: Tensor, guidance: float = 1.0) -> Tensor:
    """model(x, t, y) with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    eps = eps(null) + guidance (eps(y) - eps(null)); the variance, where the model learns one, is that of y. Guidance 1 is one
    call of the model, any other one call with twice the batch.

    Errors: ValueError where the null label has never been trained (config.dropout_label is 0).
    """
    if guidance == 1:
        return model(x, t, y)
    config = _config(model)
    if not config.dropout_label > 0:
        raise ValueError(
            f"guidance {guidance} needs a model that was trained with dropout_label > 0; this one knows guidance 1"
        )
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    null = torch.full_like(y, config.num_classes)
    given, free = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    eps = torch.lerp(free[:, : config.channels], given[:, : config.channels], guidance)
    return torch.cat([eps, given[:, config.channels :]], dim=1)


SAMPLERS = {"ddpm": 250, "ddim": 50, "dpm++": 20}  # name: its usual number of steps


def make_scheduler(name: str, steps: int | None, config, clip: bool = False):
    """diffusers' scheduler ``name`` over ``steps`` of the 1000 steps, which this model was trained for.

    - ``ddpm``: ancestral sampling, respaced to 0 .. 999 in equal parts (rounded); the model's variance, or the smallest one
      where it learns none;
    - ``ddim``: deterministic (eta 0), t = 0, k, 2k, .. with k = 1000 / steps, which must divide 1000;
    - ``dpm++``: DPM-Solver++ (2M), deterministic.

    ``steps`` None is the usual number, ``SAMPLERS[name]``. ``clip`` limits the prediction of x_0 to [-1, 1] in every step.
    ``reverse_step`` takes its steps.

    >>> from types import SimpleNamespace
    >>> scheduler = make_scheduler("ddpm", 250, SimpleNamespace(learn_sigma=True))
    >>> scheduler.timesteps[:3].tolist(), scheduler.timesteps[-1].item()
    ([999, 995, 991], 0)
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    steps = SAMPLERS[name] if steps is None else steps
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an int, got {steps!r}")
    least, most = {"ddpm": (2, STEPS), "ddim": (2, STEPS), "dpm++": (1, STEPS - 1)}[name]
    if not least <= steps <= most:
        raise ValueError(f"steps of {name} must be in {least}..{most}, got {steps}")
    if name == "ddim" and STEPS % steps:
        near = min((k for k in range(2, STEPS + 1) if STEPS % k == 0), key=lambda k: abs(k - steps))
        raise ValueError(f"steps of ddim must divide {STEPS}, got {steps}; the nearest that does is {near}")
    try:
        import diffusers
    except ImportError:
        raise ImportError('sampling needs diffusers: pip install "sdit-kernels[sdit]"') from None
    betas = {"num_train_timesteps": STEPS, "beta_start": _BETAS[0], "beta_end": _BETAS[1], "beta_schedule": "linear"}
    if name == "ddpm":
        variance = "learned_range" if config.learn_sigma else "fixed_small"
        scheduler = diffusers.DDPMScheduler(**betas, variance_type=variance, clip_sample=clip, timestep_spacing="linspace")
    elif name == "ddim":
        scheduler = diffusers.DDIMScheduler(
            **betas, clip_sample=clip, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True
        )
    else:
        # It has no plain clipping, but thresholding at a quantile that is limited to [1, 1] is just that.
        limits = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0} if clip else {}
        scheduler = diffusers.DPMSolverMultistepScheduler(**betas, timestep_spacing="linspace", **limits)
    scheduler.set_timesteps(steps)
    return scheduler


def reverse_step(scheduler, out: Tensor, t: int, x: Tensor, generator=None) -> Tensor:
    """x of the step after t, from x_t and what the model says of it, (B, C or 2C, S, S).

    ``generator``, one or one for each image, draws the noise of ``ddpm``; the other samplers draw none.
    """
    kind = type(scheduler).__name__
    if kind == "DDPMScheduler":
        return scheduler.step(out, t, x, generator=generator).prev_sample
    eps = out[:, : x.shape[1]]
    if kind == "DDIMScheduler":  # where x_0 is clipped, the eps that leads to it
        return scheduler.step(eps, t, x, use_clipped_model_output=bool(scheduler.config.clip_sample)).prev_sample
    return scheduler.step(eps, t, x).prev_sample
