"""The profile that a calibration writes: what was chosen, and what was measured."""

from __future__ import annotations

import glob
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from tidal_vllm import __version__
from tidal_vllm.calibrate.grid import recorder_settings
from tidal_vllm.calibrate.result import Job, Measured, Result
from tidal_vllm.profiles import model_names


def profile_fields(
    name: str, sha256: str, job: Job, result: Result, seconds: float
) -> dict[str, Any]:
    """The profile's content, as `profiles.load_profile` reads it.

    Args:
        name: The model's name; the profile is called after it.
        sha256: The hash of the model's config.
        seconds: What the calibration took.
    """
    dense, select = result.roles(result.chosen.candidate)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "name": f"{name}-calibrated",
        "models": [glob.escape(one) for one in dict.fromkeys(model_names(job.model))],
        "model": job.model,
        "config_sha256": sha256,
        "num_hidden_layers": job.num_layers,
        "dense_layers": dense,
        "select_layers": select,
        **recorder_settings(result.best.config),
        "correction_interval": result.interval,
        "source": f"tidal-vllm calibrate, {when}",
        "measured": _measured(job, result, seconds),
        "versions": versions(),
    }


def _measured(job: Job, result: Result, seconds: float) -> dict[str, Any]:
    tried = [
        {
            "select_layers": result.roles(one.candidate)[1],
            "expected_loss": round(one.candidate.loss, 6),
            "holds": one.holds,
            **_numbers(one.measured),
        }
        for one in result.tried
    ]
    curve = [
        {
            **recorder_settings(point.config),
            "kv_read_share": round(point.read_share, 4),
            "captured_mass": round(point.captured, 6),
            "captured_mass_worst": round(point.captured_worst, 6),
            **_numbers(point.measured),
        }
        for point in result.curve
    ]
    runner_up = result.runner_up and result.roles(result.runner_up.candidate)[1]
    return {
        "prompts": {
            "kinds": sorted({prompt.kind for prompt in job.prompts}),
            "count": len(job.prompts),
            "mean_tokens": job.mean_len,
        },
        "setting": recorder_settings(job.config),
        "max_loss": job.max_loss,
        "target_agreement": job.target_agreement,
        "recommended": _numbers(result.best.measured),
        "dense": {"right": result.dense.right, "judged": result.dense.judged},
        "stability": result.stability,
        "runner_up": runner_up,
        "tried": tried,
        "curve": curve,
        "correction": [
            {"correction_interval": n, **_numbers(measured)}
            for n, measured in result.intervals
        ],
        "seconds": round(seconds, 1),
    }


def _numbers(measured: Measured) -> dict[str, Any]:
    return {
        "tokens": measured.steps,
        "agreed": measured.agreed,
        "agreement_at_least": round(measured.sure_agreement, 4),
        "right": measured.right,
        "lost_logprob": round(measured.lost_logprob, 6),
    }


def versions() -> dict[str, str]:
    """What this process runs on."""
    packages = {name: version(name) for name in ("vllm", "torch", "transformers")}
    python = platform.python_version()
    return {"tidal_vllm": __version__, **packages, "python": python}
