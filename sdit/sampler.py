"""The samplers: guidance, the scale of the noise, and the steps from noise to an image."""

import math

import numpy as np
import torch
from torch import Tensor

from .diffusion import BETAS, STEPS, config_of, make_tables

__all__ = ["SAMPLERS", "make_scheduler", "predict", "reverse_step", "samplers", "scale_noise"]


def predict(model, x: Tensor, t: Tensor, y: Tensor, guidance: float = 1.0) -> Tensor:
    r"""Call model(x, t, y) with classifier-free guidance.

    ::

        prediction = prediction(null) + guidance (prediction(y) - prediction(null))

    The formula gives the same images for eps, v and flow. A learned variance is taken from the call with y. Guidance 1 takes
    one call of the model; any other value takes one call with twice the batch.

    Args:
        model, x, t, y: as in :func:`sdit.diffusion.training_loss`.
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
        >>> from sdit.sampler import predict
        >>> model = SDiT(PRESETS["digits"], dim=32, depth=2)
        >>> x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([999, 0]), torch.tensor([3, 7])
        >>> predict(model, x, t, y, guidance=2.0).shape
        torch.Size([2, 2, 8, 8])
    """
    config = config_of(model)
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
        >>> from sdit.sampler import scale_noise
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
        tables = make_tables(x.device, x.dtype)
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
        >>> from sdit.sampler import make_scheduler
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
    betas = {"num_train_timesteps": STEPS, "beta_start": BETAS[0], "beta_end": BETAS[1], "beta_schedule": "linear"}
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
    tables = make_tables(torch.device("cpu"), torch.float64)
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
