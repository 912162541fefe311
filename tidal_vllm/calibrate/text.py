"""Prompts of natural text, to be continued: stretches of one long document.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tidal_vllm.calibrate.prompts import Prompt
from tidal_vllm.natural_text import python_documentation
from tidal_vllm.validators import TidalConfigError

TEXT = "text"
_SUFFIXES = (".txt", ".md")


def is_text(source: str) -> bool:
    """Whether `--prompts` names a text, and no list of prompts."""
    return source == TEXT or source.lower().endswith(_SUFFIXES)


class TextPrompts:
    """Prompts of one length from a document, in an order that is always the same.

    No right answer is known: what counts is how often sparse attention agrees with
    dense attention about the next token. Prompts may overlap, but no two answers
    continue at the same place.

    Args:
        source: What `--prompts` says.
        text: The document.
        tokenizer: The model's; None where its folder has none.

    Attributes:
        num_tokens: Tokens of the document, without what the tokenizer puts in front.

    Raises:
        TidalConfigError: There is no tokenizer.
    """

    def __init__(self, source: str, text: str, tokenizer: Any) -> None:
        self._source = source
        if tokenizer is None:
            reason = "is text, but the model has no tokenizer; give a JSON Lines file "
            reason += "with prompt_token_ids"
            raise TidalConfigError("--prompts", source, reason)
        start, tokens = list(tokenizer.encode("")), list(tokenizer.encode(text))
        # A beginning-of-sequence token, where the model is used to one.
        self._start = start if tokens[: len(start)] == start else []
        self._tokens = tokens[len(self._start) :]
        self.num_tokens = len(self._tokens)

    def cut(self, num_tokens: int, answer_tokens: int) -> None:
        """Say how long prompts and answers are.

        Raises:
            TidalConfigError: The document has too few tokens.
        """
        self._length = num_tokens - len(self._start)
        last = self.num_tokens - self._length
        if self._length < 1 or last < 0:
            reason = (
                f"has {self.num_tokens} tokens: too few for prompts of {num_tokens}"
            )
            raise TidalConfigError("--prompts", self._source, reason)
        self._places = list(range(0, last + 1, answer_tokens))
        random.Random("natural text").shuffle(self._places)

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self._places)

    def prompt(self, number: int) -> Prompt | None:
        """A prompt by its number; None: there are no more."""
        if number >= len(self._places):
            return None
        place = self._places[number]
        tokens = self._tokens[place : place + self._length]
        return Prompt(TEXT, (*self._start, *tokens))


def read_text(source: str) -> str:
    """The document that `--prompts` names: Python's documentation, or a text file.

    Raises:
        TidalConfigError: Unreadable, not UTF-8 or empty.
    """
    if source == TEXT:
        return python_documentation()
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = f"cannot be read as UTF-8 text ({error})"
        raise TidalConfigError("--prompts", source, reason) from None
    if not text.strip():
        raise TidalConfigError("--prompts", source, "holds no text")
    return text
