"""The demo on a pretrained model, which is asked about a real document."""

import textwrap
from pathlib import Path
from typing import Any

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
QUESTION = "Which programming language is this document about?"


class DemoError(Exception):
    """Why this model or these contexts cannot be shown: one line."""


def run_text_demo(
    model_dir: Path,
    contexts: list[int],
    token_budget: int,
    question: str | None = None,
    go_on: bool = False,
) -> int:
    """Ask a model about its Python's documentation; print the comparison.

    Args:
        model_dir: A Hugging Face folder.
        contexts: Tokens of the document that each prompt holds.
        question: What follows the document, in the model's chat template. None: a
            question of ours; a model without a chat template continues the document.
        go_on: Whether every model continues the document.

    Returns:
        Exit code: 0. Sparse decoding is approximate, so no answer is wrong.

    Raises:
        DemoError: The folder holds no model, the question has no chat template to
            stand in, or a context is too long for the model or for the document.
    """
    log_errors_only()
    tokenizer, longest = _load(model_dir)
    asked = None if go_on else _question(tokenizer, model_dir, question)
    prompts = _prompts(tokenizer, contexts, asked)
    _check_fit(contexts, prompts, longest)
    # A question's answer ends where the model ends it, and has a step to be timed.
    ending = {"ignore_eos": True} if asked is None else {"min_tokens": 1}
    longest = max(map(len, prompts)) + ANSWER_TOKENS
    tidal = {"token_budget": token_budget}
    with dense_and_sparse(model_dir, longest, tidal) as (dense, sparse):
        startup = resolve(sparse.llm_engine.vllm_config)
        plan = format_plan(startup.plan, startup.config, longest, model_dir.name)
        print(f"\n{plan}\n", flush=True)
        compared = [
            compare(dense, sparse, p, max_tokens=ANSWER_TOKENS, **ending)
            for p in prompts
        ]
    for length, answers in zip(contexts, compared, strict=True):
        print(f"\nAfter {length} tokens of Python's documentation, {model_dir.name}:")
        if asked is not None:
            print(_paragraph("asked", asked))
        begin = "..." if asked is None else ""
        for name, given in (("dense", answers.dense), ("sparse", answers.sparse)):
            print(_paragraph(name, begin + given[-1].text))
    print(_table(list(map(len, prompts)), compared))
    return 0


def _load(model_dir: Path) -> tuple[Any, int | None]:
    """A model's tokenizer, and how many tokens the model reads, if it says so."""
    from transformers import AutoConfig, AutoTokenizer

    # Without an answer transformers asks on stdin whether the folder's code may run.
    own = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model_dir, **own)
        tokenizer = AutoTokenizer.from_pretrained(model_dir, **own)
        tokenizer("A word.")
    except Exception as error:  # of any class, with damaged files
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()
        raise DemoError(f"{model_dir} is no model's folder: {reason}") from error
    return tokenizer, getattr(config.get_text_config(), "max_position_embeddings", None)


def _question(tokenizer: Any, model_dir: Path, wanted: str | None) -> str | None:
    """What the model is asked; None where it continues the document."""
    if getattr(tokenizer, "chat_template", None):
        return wanted or QUESTION
    if wanted:
        raise DemoError(
            f"--question needs a chat template, and {model_dir} has none; without it "
            "the model continues the document"
        )
    return None


def _prompts(
    tokenizer: Any, contexts: list[int], question: str | None
) -> list[list[int]]:
    """The beginning of the document, once for each length, and the question."""
    # In a chat the template writes the special tokens.
    special = question is None
    tokens = _tokens(tokenizer, python_documentation(), special)
    if max(contexts) > len(tokens):
        raise DemoError(
            f"--contexts {max(contexts)} is too long: the document has {len(tokens)} "
            "tokens"
        )
    parts = [tokens[:length] for length in contexts]
    if question is None:
        return parts
    return [_ask(tokenizer, part, question) for part in parts]


def _ask(tokenizer: Any, document: list[int], question: str) -> list[int]:
    """A part of the document and the question, as the user's turn of a chat."""
    text = tokenizer.decode(document)
    turn = {"role": "user", "content": f"{text}\n\n{question}"}
    try:
        chat = tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # of any class: a template is a program
        reason, *_ = f"{type(error).__name__}: {error}".splitlines()
        raise DemoError(
            f"the model's chat template takes no question ({reason}); --continue "
            "does without it"
        ) from error
    return _tokens(tokenizer, chat, special=False)


def _tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    """A text's token ids, with or without the special ones that begin a prompt."""
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _check_fit(
    contexts: list[int], prompts: list[list[int]], longest: int | None
) -> None:
    """Refuse a context that leaves no room for the question and its answer."""
    context, prompt = max(contexts), max(map(len, prompts))
    if longest is None or prompt + ANSWER_TOKENS <= longest:
        return
    others = [f"{ANSWER_TOKENS} of them are its answer"]
    if beside := prompt - context:
        others.append(f"{beside} the question in its chat template")
    raise DemoError(
        f"--contexts {context} is too long: this model reads {longest} tokens, and "
        f"{', '.join(others)}; at most {longest - ANSWER_TOKENS - beside}"
    )


def _paragraph(name: str, text: str) -> str:
    start = f"  {name:<7} "
    return textwrap.fill(
        " ".join(text.split()),
        width=80,
        initial_indent=start,
        subsequent_indent=" " * 10,
    )


def _table(prompt_lens: list[int], compared: list[Answers]) -> str:
    lines = [
        "",
        "             same   tokens attended      decode, ms/token",
        "   prompt  tokens    dense   sparse    dense   sparse  speed-up",
        "  -------  ------  -------  -------  -------  -------  --------",
    ]
    for length, answers in zip(prompt_lens, compared, strict=True):
        dense, sparse = (a[-1].token_ids for a in (answers.dense, answers.sparse))
        same = f"{equal_tokens(dense, sparse)}/{len(dense)}"
        lines.append("  ".join([f"  {length:>7}", f"{same:>6}", *answers.cells()]))
    lines.append("  Same tokens: of the two answers, up to the first that differs.")
    return "\n".join([*lines, *footnotes(compared)])
