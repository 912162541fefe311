"""The options of `tidal-vllm calibrate`, and what they refuse by themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from tidal_vllm.calibrate.prompts import BUILTIN
from tidal_vllm.config import DEFAULT_BLOCK_SIZE, SCOPES
from tidal_vllm.profiles import PROJECT_DIR
from tidal_vllm.validators import TidalConfigError

MOST_CONTEXT = 8192  # tokens, where --context is not given
BUDGET_SHARE = 8  # where --budget is not given: one in so many tokens of the context
MOST_BUDGET = 4096  # tokens, where --budget is not given
LEAST_LOSS = 0.0001  # takes 38,413 tokens to prove


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command; `command.run` takes what they parse to."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model folder, or a name on the hub")
    add(
        "--prompts",
        default=BUILTIN,
        metavar="builtin|text|FILE",
        help="`text`: stretches of Python's documentation, to be continued; a .txt or "
        ".md FILE: stretches of that; another FILE: JSON Lines with `prompt` or "
        "`prompt_token_ids`, and `answer` or `answer_token_ids` where known (default: "
        "synthetic look-ups)",
    )
    add(
        "--num-prompts",
        type=int,
        default=12,
        metavar="N",
        help="built-in prompts, or stretches of text, to record (default: "
        "%(default)s); more are asked to confirm, as many as --max-loss takes",
    )
    add(
        "--context",
        type=int,
        metavar="TOKENS",
        help="length of the built-in prompts and of stretches of text, or the most "
        f"that a prompt of a file may have (default: {MOST_CONTEXT}, or what the model "
        "allows)",
    )
    add(
        "--decode-tokens",
        type=int,
        default=16,
        metavar="N",
        help="tokens of an answer that is not known as tokens (default: %(default)s)",
    )
    add(
        "--budget",
        type=int,
        metavar="TOKENS",
        help="tokens a SPARSE layer may attend to (default: 1 in "
        f"{BUDGET_SHARE} of the context, at most {MOST_BUDGET}); the curve tries "
        "others too",
    )
    add(
        "--select-block-size",
        type=int,
        default=DEFAULT_BLOCK_SIZE,
        metavar="TOKENS",
        help="tokens of a selection block (default: %(default)s)",
    )
    add("--scope", default=SCOPES[0], metavar="|".join(SCOPES))
    add(
        "--dense-layers",
        type=int,
        default=2,
        metavar="N",
        help="first layers that stay DENSE (default: %(default)s)",
    )
    add(
        "--max-select-layers",
        type=int,
        default=4,
        metavar="M",
        help="most SELECT layers to try (default: %(default)s)",
    )
    add(
        "--max-loss",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="drop of accuracy and of agreement with dense attention that is "
        "tolerated; a smaller one takes more tokens to prove (default: %(default)s)",
    )
    add(
        "--target-agreement",
        type=float,
        metavar="SHARE",
        help="recommend the cheapest setting with this agreement, of those within "
        "--max-loss (default: the knee of the curve)",
    )
    add("--tensor-parallel-size", type=int, default=1, metavar="N")
    add(
        "--engine-args",
        default="{}",
        metavar="JSON",
        help="more arguments of vLLM's engine",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="PROFILE.json",
        help=f"(default: {PROJECT_DIR}/MODEL.json, where it is found by itself); the "
        "report goes beside it as .html",
    )
    add(
        "--restart",
        action="store_true",
        help="throw away what an interrupted run left, instead of resuming it",
    )


def check_numbers(given: argparse.Namespace) -> None:
    """Refuse what no model could be calibrated with.

    Raises:
        TidalConfigError: The first option that is out of range.
    """
    least = {"num_prompts": 1, "decode_tokens": 2, "dense_layers": 0}
    least |= {"max_select_layers": 1, "tensor_parallel_size": 1}
    least |= {"select_block_size": 1, "context": 1, "budget": 1}
    for key, low in least.items():
        value = getattr(given, key)
        if value is not None and value < low:
            raise TidalConfigError(_option(key), value, f"must be {low} or more")
    for key in ("max_loss", "target_agreement"):
        value = getattr(given, key)
        if value is not None and not 0 <= value <= 1:
            raise TidalConfigError(_option(key), value, "must be a share, 0 to 1")
    if given.max_loss < LEAST_LOSS:
        reason = f"must be {LEAST_LOSS} or more: no number of tokens proves that "
        reason += "none is lost, and a smaller share takes too many"
        raise TidalConfigError("--max-loss", given.max_loss, reason)
    if given.scope not in SCOPES:
        reason = f"must be one of {', '.join(SCOPES)}"
        raise TidalConfigError("--scope", given.scope, reason)


def _option(key: str) -> str:
    return "--" + key.replace("_", "-")
