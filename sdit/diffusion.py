"""The diffusion process, the training objective and the samplers.

q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I), abar_t = prod_{s <= t} (1 - beta_s), t = 0 .. 999, beta linear from 1e-4 to
2e-2. The network predicts the noise eps, or v. With ``learn_sigma`` it also predicts the log variance of p(x_{t-1} | x_t), as a
position between its lower and upper limit (Nichol and Dhariwal, arXiv 2102.09672). With ``prediction="flow"`` the path from an
image to noise is a straight line, x_t = (1 - s) x_0 + s eps, s = t / 1000; a sampler then solves an ordinary differential
equation from noise to image.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SAMPLERS", "STEPS", "add_noise", "draw", "make_scheduler", "predict", "reverse_step", "samplers", "scale_noise",
    "training_loss",
]  # fmt: skip

STEPS = 1000
_BETAS = (1e-4, 2e-2)
_MAX_SNR = 5  # gamma of Min-SNR, the value of its paper


@lru_cache(maxsize=16)
def _flow_tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (1 - s, s) of flow for the times 1 .. 1000, (1000,) each."""
    s = torch.arange(1, STEPS + 1, dtype=torch.float64, device="cpu") / STEPS
    return (1 - s).to(device, dtype), s.to(device, dtype)


class _Tables(NamedTuple):
    """Coefficients of the diffusion for every time t, (1000,) each, computed in float64."""

    signal: Tensor  # sqrt(abar): x_t = signal x_0 + sigma eps
    sigma: Tensor  # sqrt(1 - abar)
    shift: Tensor  # beta / (sqrt(alpha) sigma): the mean of q(x_{t-1} | x_t, x_0) is x_t / sqrt(alpha) - shift eps
    log_beta: Tensor  # upper limit of the log variance of a reverse step
    log_posterior: Tensor  # its lower limit, from q(x_{t-1} | x_t, x_0); that variance is 0 at t = 0, so t = 1 stands for it


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


def _config_of(model):
    """Return the configuration of a model, also if DistributedDataParallel wraps it."""
    return model.config if hasattr(model, "config") else model.module.config


# Training


def draw(config, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    r"""Draw the random inputs of :func:`training_loss`, always in the same order: times, noise, dropped labels.

    If each of several processes draws for the whole batch and takes its slice, they train as one process does.

    Args:
        config: configuration of the model; channels, image_size and dropout_label are used.
        n: number of images.
        generator: the only source of randomness.

    Returns:
        t (n,) int64, uniform in 0 .. 999; noise (n, C, S, S) float32, normal; drop (n,) bool, True with probability
        dropout_label, where the label becomes the null label. All are on the generator's device.

    Raises:
        TypeError: generator is not a torch.Generator.

    Example:
        >>> import torch
        >>> from sdit import PRESETS
        >>> from sdit.diffusion import draw
        >>> t, noise, drop = draw(PRESETS["digits"], 4, torch.Generator().manual_seed(0))
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
    r"""Compute the training objective: the mean squared error of the prediction plus the variational bound of the variance.

    ::

        x_t       = signal x0 + sigma noise;    prediction, logits = halves of model(x_t, t, y)
        target    = noise                        config.prediction "epsilon"
                    signal noise - sigma x0                        "v"
                    noise - x0                                     "flow"
        mse       = mean (prediction - target)^2
        weight    = 1                            config.weighting "uniform"
                    min(snr, 5) (d x0_hat / d prediction)^2       "min_snr",  snr = (signal / sigma)^2:
                    min(snr, 5) / snr, min(snr, 5) / (snr + 1), min(snr, 5) sigma^2 for the three predictions
        vb        = mean over pixels, in bits, of  KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),  t > 0
                                                   -log P(x0 | x_1),                              t = 0
        p         = N(posterior mean at eps_hat, exp(f log beta_t + (1 - f) log beta~_t)),  f = (logits + 1) / 2
        P(x0)     = integral of p over x0's level of 256, [x0 - 1/255, x0 + 1/255]; the outermost two reach to infinity
        loss      = mean weight (prediction - target)^2 + vb

    signal and sigma are sqrt(abar_t) and sqrt(1 - abar_t). For "flow" they are 1 - s and s, with s = (t + 1) / 1000, and the
    model receives the time 1000 s. vb detaches eps_hat (for "v": signal v_hat + sigma x_t), so vb trains only the logits. P is
    exact (it does not use the common tanh approximation), and its logarithm is finite for any x0. Without config.learn_sigma
    the model outputs only its prediction, and vb is 0.

    The network runs under the caller's autocast. x_t and the loss stay in float32 (float64 for float64 x0). The CPU does not
    wait for the GPU if t, noise and drop are on the GPU or drawn on it.

    Args:
        model: called as model(x_t, t, y); has a ``config``; DistributedDataParallel may wrap it.
        x0: images (B, C, S, S) in [-1, 1], as :func:`sdit.data.to_batch` makes them.
        y: labels (B,), ints in 0 .. num_classes.
        generator: draws t, noise and drop where they are None, see :func:`draw`.
        t: times (B,), ints in 0 .. 999.
        noise: the shape of x0.
        drop: (B,) bool, True where the label becomes the null label.

    Returns:
        ``{"loss", "mse", "vb"}``, scalars; only loss has a gradient.

    Raises:
        TypeError: a dtype is wrong, or t, noise or drop is missing without a generator.
        ValueError: a shape is wrong, a value is out of range (checked for tensors on the CPU), or the number of output channels
            of the model does not fit its config.

    Source: Nichol and Dhariwal, Improved DDPM, arXiv 2102.09672; Ho et al., DDPM, arXiv 2006.11239. v: Salimans and Ho,
    Progressive distillation, arXiv 2202.00512. Flow: Liu et al., Rectified flow, arXiv 2209.03003. Weights: Hang et al.,
    Min-SNR, arXiv 2303.09556.

    Example:
        >>> import torch
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.diffusion import training_loss
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> x0, y = torch.zeros(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> losses = training_loss(model, x0, y, torch.Generator().manual_seed(0))
        >>> losses["loss"].backward()
        >>> list(losses)
        ['loss', 'mse', 'vb']
    """
    config = _config_of(model)
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

    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    t, noise, y, drop = t.to(x0.device), noise.to(x0), y.to(x0.device), drop.to(x0.device)
    xt, model_t, tables = add_noise(config, x0, noise, t)
    out = model(xt, model_t, torch.where(drop, config.num_classes, y)).to(x0.dtype)
    if out.shape[1] != (2 if config.learn_sigma else 1) * config.channels:
        outputs = f"{config.prediction} and variance" if config.learn_sigma else config.prediction
        raise ValueError(f"model must output {outputs}, got {out.shape[1]} channels")
    error = out[:, : config.channels] - _target(config.prediction, x0, noise, *tables[:2])
    square = error.square()
    mse = square.mean()
    loss = mse if config.weighting == "uniform" else (_min_snr(config.prediction, *tables[:2]) * square).mean()
    if not config.learn_sigma:
        return {"loss": loss, "mse": mse.detach(), "vb": torch.zeros_like(mse).detach()}
    error = error.detach() if config.prediction == "epsilon" else tables.signal * error.detach()  # of eps
    vb = _variational_bound(tables, x0, error, out[:, config.channels :], t == 0).mean()
    return {"loss": loss + vb, "mse": mse.detach(), "vb": vb.detach()}


def add_noise(config, x0, noise, t):
    """Return (x_t, the time that the model receives, the tables at t). Flow has only the first two tables."""
    flow = config.prediction == "flow"
    make = _flow_tables if flow else _tables
    if torch.compiler.is_compiling():  # the compiler traces what the cache would hold, and warns about the cache
        make = make.__wrapped__
    every = make(x0.device, x0.dtype)
    tables = tuple(table[t].view(-1, 1, 1, 1) for table in every)
    xt = tables[0] * x0 + tables[1] * noise  # autocast leaves elementwise arithmetic in float32, here and above
    return (xt, t + 1, tables) if flow else (xt, t, _Tables(*tables))


def _target(prediction, x0, noise, signal, sigma):
    if prediction == "epsilon":
        return noise
    return noise - x0 if prediction == "flow" else signal * noise - sigma * x0


def _min_snr(prediction, signal, sigma):
    snr = (signal / sigma).square()
    return snr.clamp(max=_MAX_SNR) * (1 / snr if prediction == "epsilon" else sigma.square())


def _check_ints(name, value, n, largest):
    if not isinstance(value, Tensor) or value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of ints, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one per image, got {tuple(value.shape)}")
    if torch.compiler.is_compiling():
        return
    if value.device.type == "cpu" and n and not (value.min() >= 0 and value.max() <= largest):
        raise ValueError(f"{name} must be in 0..{largest}, got {value.min()}..{value.max()}")


def _variational_bound(tables, x0, error, v, first):
    """Return the variational bound in bits per dimension, elementwise.

    The means of q and p differ by shift times the error of eps_hat. This form avoids the cancellation of large numbers where
    abar is small.
    """
    f = (v + 1) / 2
    log_variance = f * tables.log_beta + (1 - f) * tables.log_posterior
    distance = tables.shift * error  # mean of q - mean of p; the mean of q is x0 itself at t = 0
    d = tables.log_posterior - log_variance
    kl = 0.5 * (torch.expm1(d) - d + distance.square() * torch.exp(-log_variance))
    if first.device.type != "cpu" or torch.compiler.is_compiling():  # nonzero would make the CPU wait for the device
        first = first.view(-1, 1, 1, 1)
        return torch.where(first, -_log_likelihood(x0, distance, log_variance), kl) / math.log(2)
    i = first.nonzero().flatten()  # one image in a thousand; the likelihood of all images took a twelfth of a training step
    if len(i):
        kl = kl.index_put((i,), -_log_likelihood(x0[i], distance[i], log_variance[i]))
    return kl / math.log(2)


def _log_likelihood(x, distance, log_variance):
    """Return the log probability of the level of x, [x - 1/255, x + 1/255], under a normal with mean x - distance."""
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
    r"""Call model(x, t, y) with classifier-free guidance.

    ::

        prediction = prediction(null) + guidance (prediction(y) - prediction(null))

    The formula gives the same images for eps, v and flow. A learned variance is taken from the call with y. Guidance 1 takes
    one call of the model; any other value takes one call with twice the batch.

    Args:
        model, x, t, y: as in :func:`training_loss`.
        guidance: 1 gives the conditional prediction, 0 the unconditional one; above 1 moves further away from the unconditional
            one.

    Returns:
        A tensor of the same shape as the model's output.

    Raises:
        ValueError: guidance is not 1 and the model was trained without the null label (config.dropout_label is 0), or guidance
            is not finite.

    Source: Ho and Salimans, Classifier-free diffusion guidance, arXiv 2207.12598.

    Example:
        >>> import torch
        >>> from sdit import PRESETS, SDiT
        >>> from sdit.diffusion import predict
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([999, 0]), torch.tensor([3, 7])
        >>> predict(model, x, t, y, guidance=2.0).shape
        torch.Size([2, 2, 8, 8])
    """
    config = _config_of(model)
    check_guidance(config, guidance)
    if guidance == 1:
        return model(x, t, y)
    null = torch.full_like(y, config.num_classes)
    conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    eps = torch.lerp(unconditional[:, : config.channels], conditional[:, : config.channels], guidance)
    return torch.cat([eps, conditional[:, config.channels :]], dim=1)


def scale_noise(config, out: Tensor, x: Tensor, t: int, noise_scale: float) -> Tensor:
    r"""Multiply the noise that a model predicts by ``noise_scale`` (epsilon scaling).

    ::

        eps'    = noise_scale eps,    eps = signal v + sigma x for config.prediction "v"
        x0_hat' = (x - sigma eps') / signal

    A step of a sampler then removes noise_scale times as much noise. Above 1, less noise and fewer rare details are left in an
    image; below 1, more. The best scale is near 1 (about 1.02 for the models in the package).

    Args:
        config: configuration of the model; channels and prediction are used.
        out: output of the model for x at time t; a learned variance stays as it is.
        x: noisy images (B, C, S, S), float32 or float64.
        t: time of all images, 0 .. 999.
        noise_scale: a positive number.

    Returns:
        A tensor of the shape of out, of the same prediction.

    Raises:
        ValueError: t or a shape is wrong; noise_scale is not a positive number, or it is not 1 and config.prediction is "flow",
            whose first step starts from noise alone (signal = 0).

    Source: Ning et al., Elucidating the exposure bias in diffusion models, arXiv 2308.15321, who divide by a number above 1.

    Example:
        >>> import torch
        >>> from sdit import PRESETS
        >>> from sdit.diffusion import scale_noise
        >>> out = torch.ones(1, 2, 8, 8)
        >>> scale_noise(PRESETS["digits"], out, torch.zeros(1, 1, 8, 8), 500, 1.5)[0, :, 0, 0]
        tensor([1.5000, 1.0000])
    """
    check_noise_scale(config, noise_scale)
    if noise_scale == 1:
        return out
    prediction = out[:, : config.channels]
    if x.shape != prediction.shape:
        raise ValueError(f"x must have the shape of the prediction, {tuple(prediction.shape)}, got {tuple(x.shape)}")
    if not isinstance(t, int) or not 0 <= t < STEPS:
        raise ValueError(f"t must be an int in 0..{STEPS - 1}, got {t!r}")
    if config.prediction == "epsilon":
        prediction = noise_scale * prediction
    else:  # v' - v = (signal + sigma^2 / signal) (noise_scale - 1) eps, and signal^2 + sigma^2 = 1
        tables = _tables(x.device, x.dtype)
        prediction = prediction + (noise_scale - 1) * (prediction + tables.sigma[t] / tables.signal[t] * x)
    return torch.cat([prediction, out[:, config.channels :]], dim=1)


def check_noise_scale(config, scale: float) -> None:
    """Raise ValueError if a model with this ``config`` cannot use this scale."""
    if not is_number(scale) or not 0 < scale < math.inf:
        raise ValueError(f"noise_scale must be a positive number, got {scale!r}")
    if scale != 1 and config.prediction == "flow":
        raise ValueError(f"noise_scale must be 1 for a model with prediction 'flow', got {scale!r}")


def check_guidance(config, guidance: float, interval: tuple[float, float] | None = None) -> None:
    """Raise ValueError if a model with this ``config`` cannot use this guidance in this interval of times."""
    if not is_number(guidance) or not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}")
    if guidance != 1 and not config.dropout_label > 0:
        raise ValueError(
            f"guidance {guidance} needs a model that was trained with dropout_label > 0; this model only allows guidance 1"
        )
    if interval is None:
        return
    pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_number, interval))
    if not (pair and 0 <= interval[0] <= interval[1] <= STEPS):
        raise ValueError(f"guidance_interval must be two times, 0 <= low <= high <= {STEPS}, or None, got {interval!r}")
    if guidance == 1:
        raise ValueError(f"guidance_interval needs a guidance other than 1, got {interval!r} with guidance 1")


def check_recommended(config, settings: dict) -> None:
    """Raise ValueError if a checkpoint of a model with this ``config`` cannot recommend these settings of sampling."""
    names = ("guidance", "guidance_interval", "noise_scale")
    if not isinstance(settings, dict) or settings.keys() - set(names):
        raise ValueError(f"recommended must be a dict of {', '.join(names)}, got {settings!r}")
    check_guidance(config, settings.get("guidance", 1.0), settings.get("guidance_interval"))
    check_noise_scale(config, settings.get("noise_scale", 1.0))


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


SAMPLERS = {"dpm++": 20, "ddpm": 250, "ddim": 50, "euler": 50, "heun": 25}  # name: default number of steps


def samplers(config) -> dict[str, int]:
    """Return the entries of SAMPLERS that fit a model with this ``config``, the default sampler first."""
    return {name: n for name, n in SAMPLERS.items() if (name in ("euler", "heun")) == (config.prediction == "flow")}


def make_scheduler(name: str, steps: int | None, config, clip: bool = False):
    r"""Make the diffusers scheduler of a sampler, configured for this diffusion. :func:`reverse_step` performs its steps.

    - ``ddpm``: ancestral sampling at equally spaced times in 0 .. 999 (rounded). It uses the variance that the model predicts,
      or the variance of the posterior if the model predicts none.
    - ``ddim``: deterministic (eta 0), at t = 0, k, 2k, .. with k = 1000 / steps.
    - ``dpm++``: DPM-Solver++ (2M), deterministic, at times spaced evenly in log SNR: most steps lie where little noise is left.
    - ``euler``, ``heun``: only for prediction "flow". They solve dx/ds = prediction over equal steps of s from 1 to 1/1000,
      then one step to 0. heun calls the model twice in every step except the last.

    Args:
        name: one of ``samplers(config)``.
        steps: 2 .. 1000 for ddpm, euler and heun; a divisor of 1000 that is at least 2 for ddim; 1 .. 999 for dpm++; None for
            the default, ``SAMPLERS[name]``.
        config: configuration of the model; prediction and learn_sigma are used.
        clip: limit the predicted x_0 to [-1, 1] in every step.

    Returns:
        The scheduler, with its timesteps set.

    Raises:
        ValueError, TypeError: the name or the number of steps is not allowed.
        ImportError: diffusers is missing.

    Source: DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502; DPM-Solver++, arXiv 2211.01095; Rectified flow, arXiv 2209.03003.

    Example:
        >>> from sdit import PRESETS
        >>> from sdit.diffusion import make_scheduler
        >>> scheduler = make_scheduler("ddpm", 250, PRESETS["mnist"])
        >>> scheduler.timesteps[:3].tolist(), scheduler.timesteps[-1].item()
        ([999, 995, 991], 0)
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    if name not in samplers(config):
        allowed = ", ".join(samplers(config))
        raise ValueError(f"sampler must be one of {allowed} for a model with prediction {config.prediction!r}, got {name!r}")
    steps = SAMPLERS[name] if steps is None else steps
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps must be an int, got {steps!r}")
    least, most = (1, STEPS - 1) if name == "dpm++" else (2, STEPS)
    if not least <= steps <= most:
        raise ValueError(f"steps of {name} must be in {least}..{most}, got {steps}")
    if name == "ddim" and STEPS % steps:
        near = min((k for k in range(2, STEPS + 1) if STEPS % k == 0), key=lambda k: abs(k - steps))
        raise ValueError(f"steps of ddim must divide {STEPS}, got {steps}; the nearest that does is {near}")
    try:
        import diffusers
    except ImportError:
        raise ImportError("sampling needs diffusers: pip install diffusers") from None
    if config.prediction == "flow":
        kind = {"euler": diffusers.FlowMatchEulerDiscreteScheduler, "heun": diffusers.FlowMatchHeunDiscreteScheduler}[name]
        scheduler = kind(num_train_timesteps=STEPS)
        scheduler.clip = clip  # these schedulers do not clip; reverse_step does
        scheduler.set_timesteps(steps)
        return scheduler
    betas = {"num_train_timesteps": STEPS, "beta_start": _BETAS[0], "beta_end": _BETAS[1], "beta_schedule": "linear"}
    betas["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[config.prediction]
    if name == "ddpm":
        variance = "learned_range" if config.learn_sigma else "fixed_small"
        scheduler = diffusers.DDPMScheduler(**betas, variance_type=variance, clip_sample=clip, timestep_spacing="linspace")
    elif name == "ddim":
        scheduler = diffusers.DDIMScheduler(
            **betas, clip_sample=clip, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True
        )
    else:
        # This scheduler cannot clip. Dynamic thresholding with its threshold limited to [1, 1] does the same.
        limits = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0} if clip else {}
        scheduler = diffusers.DPMSolverMultistepScheduler(**betas, **limits)
        scheduler.set_timesteps(timesteps=_times_even_in_log_snr(steps))
        return scheduler
    scheduler.set_timesteps(steps)
    return scheduler


def _times_even_in_log_snr(steps: int) -> list[int]:
    """Return different times from 999 to 0, spaced evenly in log SNR as far as there are times between."""
    tables = _tables(torch.device("cpu"), torch.float64)
    log_snr = torch.log(tables.signal / tables.sigma).numpy()  # falls with the time
    wanted = np.linspace(log_snr[0], log_snr[-1], steps) if steps > 1 else log_snr[-1:]
    count = np.arange(steps)
    times = np.interp(-wanted, -log_snr, np.arange(STEPS)).round().astype(int)
    times = np.maximum.accumulate(times - count) + count  # each above the one before ..
    return np.minimum(times, STEPS - steps + count)[::-1].tolist()  # .. and none above 999


def reverse_step(scheduler, out: Tensor, t: int, x: Tensor, generator=None) -> Tensor:
    r"""Perform one step of a scheduler of :func:`make_scheduler`: from x at time t to x at its next timestep.

    Args:
        scheduler: a scheduler that no other run uses, because it may keep earlier predictions.
        out: the result of :func:`predict`, (B, C or 2C, S, S).
        t: one of the scheduler's timesteps, a Python number.
        x: x_t, (B, C, S, S).
        generator: draws the noise of ddpm: one generator, or one per image. The other samplers draw no noise.

    Returns:
        (B, C, S, S).
    """
    kind = type(scheduler).__name__
    if kind == "DDPMScheduler":
        return scheduler.step(out, t, x, generator=generator).prev_sample
    out = out[:, : x.shape[1]]
    if kind == "DDIMScheduler":  # recompute eps from the clipped x_0
        return scheduler.step(out, t, x, use_clipped_model_output=bool(scheduler.config.clip_sample)).prev_sample
    if getattr(scheduler, "clip", False):  # flow: x_0 = x - s out
        out = (x - (x - t / STEPS * out).clamp(-1, 1)) / (t / STEPS)
    return scheduler.step(out, t, x).prev_sample
