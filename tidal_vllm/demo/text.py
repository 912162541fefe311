"""The demo on a pretrained model, which continues a real document."""

import textwrap
from pathlib import Path

from tidal_vllm.demo.engines import (
    Answers,
    compare,
    dense_and_sparse,
    equal_tokens,
    footnotes,
    log_errors_only,
)
from tidal_vllm.natural_text import python_documentation
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.table import format_plan

CONTEXTS = [3000]
ANSWER_TOKENS = 64


class DemoError(Exception):
    """Why this model or these contexts cannot be shown: one line."""


def run_text_demo(model_dir: Path, contexts: list[int], token_budget: int) -> int:
    """Let a model continue its Python's documentation; print the comparison.

    Args:
        model_dir: A Hugging Face folder.
        contexts: Tokens of the document that each prompt holds.

    Returns:
        Exit code: 0. Sparse decoding is approximate, so no answer is wrong.

    Raises:
        DemoError: The folder holds no model, or a context is too long for the model or
            for the document.
    """
    log_errors_only()
    prompts = _prompts(model_dir, contexts)
    longest = max(contexts) + ANSWER_TOKENS
    tidal = {"token_budget": token_budget}
    with dense_and_sparse(model_dir, longest, tidal) as (dense, sparse):
        startup = resolve(sparse.llm_engine.vllm_config)
        plan = format_plan(startup.plan, startup.config, longest, model_dir.name)
        print(f"\n{plan}\n", flush=True)
        compared = [
            compare(dense, sparse, p, max_tokens=ANSWER_TOKENS, ignore_eos=True)
            for p in prompts
        ]
    for length, answers in zip(contexts, compared, strict=True):
        print(f"\nAfter {length} tokens of Python's documentation, {model_dir.name}:")
        for name, given in (("dense", answers.dense), ("sparse", answers.sparse)):
            print(_paragraph(name, given[-1].text))
    print(_table(contexts, compared))
    return 0


def _prompts(model_dir: Path, contexts: list[int]) -> list[list[int]]:
    """The beginning of the document, once for each length."""
    from transformers import AutoConfig, AutoTokenizer

    # Without an answer transformers asks on stdin whether the folder's code may run.
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model_dir, **own)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, **own)
        tokens = tokenizer(python_documentation(), verbose=False)["input_ids"]
    except Exception as error:  # of any class, with damaged files
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()
        raise DemoError(f"{model_dir} is no model's folder: {reason}") from error
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and max(contexts) + ANSWER_TOKENS > longest:
        raise DemoError(
            f"--contexts {max(contexts)} is too long: this model reads {longest} "
            f"tokens, and {ANSWER_TOKENS} of them are its answer; at most "
            f"{longest - ANSWER_TOKENS}"
        )
    if max(contexts) > len(tokens):
        raise DemoError(
            f"--contexts {max(contexts)} is too long: the document has {len(tokens)} "
            "tokens"
        )
    return [tokens[:length] for length in contexts]


def _paragraph(name: str, text: str) -> str:
    start = f"  {name:<7} ..."
    return textwrap.fill(
        " ".join(text.split()),
        width=80,
        initial_indent=start,
        subsequent_indent=" " * 10,
    )


def _table(contexts: list[int], compared: list[Answers]) -> str:
    lines = [
        "",
        "             same   tokens attended      decode, ms/token",
        "  context  tokens    dense   sparse    dense   sparse  speed-up",
        "  -------  ------  -------  -------  -------  -------  --------",
    ]
    for length, answers in zip(contexts, compared, strict=True):
        dense, sparse = (a[-1].token_ids for a in (answers.dense, answers.sparse))
        same = f"{equal_tokens(dense, sparse)}/{len(dense)}"
        lines.append("  ".join([f"  {length:>7}", f"{same:>6}", *answers.cells()]))
    lines.append("  Same tokens: of the two answers, up to the first that differs.")
    return "\n".join([*lines, *footnotes(compared)])
