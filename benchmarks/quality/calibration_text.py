"""Which rule finds the layers of a pretrained model that have to select?

Natural text, no right answers: the layers that a profile names, beside those of other
rules, decode the tokens of dense attention at the profile's setting. The prompts are
further on in the text's order than those that a calibration records or confirms with.
One JSON line per rule goes to benchmarks/results/calibration_text.jsonl.

    python -m benchmarks.quality.calibration_text FOLDER --profile smollm2-135m-instruct
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from benchmarks.machine import describe_run
from tidal_vllm.calibrate import baselines
from tidal_vllm.calibrate.engine import (
    CalibrationEngine,
    Reply,
    complete_settings,
    engine_kwargs,
    switches,
)
from tidal_vllm.calibrate.evidence import wilson_lower
from tidal_vllm.calibrate.grid import recorder_settings
from tidal_vllm.calibrate.text import TEXT, TextPrompts, read_text
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers, safest_roles
from tidal_vllm.plan.steps import kv_read_share
from tidal_vllm.profiles import Profile
from tidal_vllm.profiles.search import named_profile

RESULTS = Path(__file__).parents[1] / "results" / "calibration_text.jsonl"
FIRST_PROMPT = 1000  # by number
FIRST_SELECT = 2
SETTINGS = ("token_budget", "select_block_size", "scope", "sink_tokens")
SETTINGS += ("recent_fraction",)


def choose(overlap: np.ndarray, ours: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """SELECT layers by each rule; none: what dense attention loses in a batch.

    Args:
        overlap: [num_layers, num_layers], as in `baselines.mean_overlap`.
        ours: The profile's.
    """
    count = len(overlap)
    first = FIRST_SELECT
    return {
        "calibrated": tuple(ours),
        "evenly spaced": baselines.evenly_spaced(count, len(ours), first),
        "mean overlap": baselines.mean_overlap(overlap, len(ours), first),
        "TidalDecode: layer 2 and one": baselines.mean_overlap(overlap, 2, first),
        "the default without a profile": safest_roles(range(count))[1],
        "dense once more": (),
    }


def measure(model: Path, profile: Profile, given: argparse.Namespace) -> list[dict]:
    """One line per rule."""
    config = TidalConfig(**{key: profile.settings[key] for key in SETTINGS})
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    text = TextPrompts(TEXT, read_text(TEXT), tokenizer)
    text.cut(given.context, given.decode_tokens)
    numbers = range(FIRST_PROMPT, FIRST_PROMPT + given.num_prompts)
    prompts = [text.prompt(number).token_ids for number in numbers]
    start = complete_settings(config, profile.dense_layers, profile.select_layers)
    longest = given.context + given.decode_tokens + 1
    with switches():
        engine = CalibrationEngine(
            engine_kwargs(str(model), start, max_model_len=longest)
        )
        try:
            replies, overlap = answer(engine, prompts, config, given)
            rules = choose(overlap, profile.select_layers)
            return [
                decode(engine, rule, config, rules[rule], prompts, replies)
                for rule in rules
            ]
        finally:
            engine.close()


def answer(
    engine: CalibrationEngine,
    prompts: list[tuple[int, ...]],
    config: TidalConfig,
    given: argparse.Namespace,
) -> tuple[list[Reply], np.ndarray]:
    """Dense answers to all prompts, and the mean overlap in the first of them."""
    replies, overlaps = [], []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in prompts[: given.record]:
            setting = [recorder_settings(config)]
            reply, found = engine.record(
                prompt, given.decode_tokens, setting, Path(folder)
            )
            replies.append(reply)
            overlaps.append(found["overlap"])
    rest = prompts[given.record :]
    replies += engine.answers(rest, [given.decode_tokens] * len(rest))
    return replies, np.concatenate(overlaps).mean(0)


def decode(
    engine: CalibrationEngine,
    rule: str,
    config: TidalConfig,
    select: tuple[int, ...],
    prompts: list[tuple[int, ...]],
    replies: list[Reply],
) -> dict:
    """How decoding does with these SELECT layers; none: dense attention once more."""
    settings = complete_settings(config, range(min(select, default=0)), select)
    share = 1.0
    if select:
        plan_config = TidalConfig(**settings)
        plan = plan_layers(plan_config, len(engine.layers), None)
        share = kv_read_share(plan, plan_config, len(prompts[0]))
    found = engine.trials(prompts, [reply.token_ids for reply in replies], settings)
    agreed = [one for reply in found for one in reply.agreed[1:]]
    lost = sum(
        sum(dense.logprobs[1:]) - sum(sparse.logprobs[1:])
        for dense, sparse in zip(replies, found, strict=True)
    )
    line = {
        "rule": rule,
        "select_layers": list(select),
        "kv_read_share": round(share, 4),
        "tokens": len(agreed),
        "agreed": sum(agreed),
        "agreement_at_least": round(wilson_lower(sum(agreed), len(agreed)), 4),
        "lost_logprob": round(lost / len(agreed), 4),
    }
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--profile", required=True, help="its name, or its file")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--record", type=int, default=2, help="of them for overlap")
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    profile = named_profile(given.profile)
    about = {"model": profile.name, "context": given.context}
    about["prompts"] = given.num_prompts
    about |= {key: profile.settings[key] for key in SETTINGS[:2]}
    lines = measure(given.model, profile, given)
    about["load_average"] = [round(load, 1) for load in os.getloadavg()]
    about |= describe_run("vllm")
    with given.out.open("w") as out:
        out.writelines(json.dumps(line | about) + "\n" for line in lines)


if __name__ == "__main__":
    main()
