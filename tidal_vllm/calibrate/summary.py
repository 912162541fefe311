"""A calibration's result in sentences: the lines for the terminal, and their parts."""

from __future__ import annotations

from tidal_vllm.calibrate.result import CurvePoint, Job, Measured, Result, Tried
from tidal_vllm.plan.roles import format_layers


def describe(job: Job, result: Result, seconds: float) -> str:
    """The result in a few lines of at most 88 columns."""
    chosen, best = result.chosen, result.best
    dense, select = result.roles(chosen.candidate)
    lines = [
        f"SELECT layers {format_layers(select)}, DENSE {format_layers(dense)} "
        f"of {all_layers(job)}",
        f"  {did(chosen.measured)}",
        f"  {sure(chosen.measured)}",
        f"  {stable(result)}",
        f"  runner-up: {runner_up(result)}",
        f"Recommended: {setting(best)}, {correction(result.interval)}",
        f"  {did(best.measured)}",
        f"  {sure(best.measured)}; --max-loss asks for {1 - job.max_loss:.1%}",
        f"  reads {best.read_share:.0%} of the KV; captures {best.captured:.1%} of the "
        f"attention mass, {best.captured_worst:.1%} in the worst head",
        f"{seconds:.0f} s",
    ]
    if result.dense.judged and 2 * result.dense.right < result.dense.judged:
        lines.insert(
            0,
            f"NOTE: dense attention itself answers {result.dense.right} of "
            f"{result.dense.judged} prompts: trust the agreement, not the accuracy"
            "; --prompts text asks for no answers",
        )
    return "\n".join(lines)


def setting(point: CurvePoint) -> str:
    """What is set at a point of the curve."""
    config = point.config
    return (
        f"budget {config.token_budget} tokens, block {config.select_block_size}, "
        f"scope {config.scope}"
    )


def did(measured: Measured) -> str:
    """How decoding went."""
    agreed = f"agrees with dense in {measured.agreed} of {measured.steps} tokens"
    if not measured.judged:
        return agreed
    return (
        f"{agreed}, answers {measured.right} of {measured.judged} prompts "
        f"(dense {measured.dense_right})"
    )


def all_layers(job: Job) -> str:
    """How many layers take part, and how many the model has besides."""
    full = len(job.full_layers)
    if full == job.num_layers:
        return str(full)
    return f"{full} full-attention layers (the model has {job.num_layers})"


def correction(interval: int | None) -> str:
    """How often tokens are computed again; the interval is in decode steps."""
    return f"corrected every {interval} steps" if interval else "no correction"


def sure(measured: Measured) -> str:
    """The least agreement that is certain."""
    return f"at least {measured.sure_agreement:.1%} with 95% confidence"


def stable(result: Result) -> str:
    """How often other prompts of the same kind would give the same layers."""
    return f"{result.stability:.0%} of resamples of the prompts give the same layers"


def runner_up(result: Result) -> str:
    """The next best candidate, and how it did."""
    other = result.runner_up
    if other is None:
        return "none was run"
    _, select = result.roles(other.candidate)
    full, chosen = other.candidate.num_full, result.chosen.candidate.num_full
    size = f"{full} full layers, not {chosen}"
    if full == chosen:
        size = "as many full layers"
    agreement = f"agreement {other.measured.agreement:.1%}"
    return f"SELECT {format_layers(select)} ({size}), {agreement}, {verdict(other)}"


def verdict(tried: Tried) -> str:
    """Whether a candidate holds."""
    if tried.holds:
        return "holds"
    return "too few tokens to tell" if tried.promises else "does not hold"
