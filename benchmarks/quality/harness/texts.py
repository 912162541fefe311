"""Natural text that every Python carries, cut into prompts; what tells models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tidal_vllm.natural_text import python_documentation

# Of a weight file: fine-tuned ones differ almost everywhere.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class Cut(NamedTuple):
    """A prompt, and how the text goes on: token ids."""

    prompt: list[int]
    continuation: list[int]


def read(path: Path | None) -> str:
    """A text file, or Python's documentation.

    Raises:
        ValueError: The file cannot be read as text; names it.
    """
    if path is None:
        return python_documentation()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {path}: {error}") from error


def cuts(
    tokens: Sequence[int], count: int, context: int, continuation: int
) -> list[Cut]:
    """Pieces of a text, spread evenly over it; they overlap only where it is short.

    Args:
        tokens: The text.
        context: Tokens of a prompt with its continuation.
        continuation: Tokens.

    Raises:
        ValueError: The text is shorter than one piece.
    """
    last = len(tokens) - context
    if last < 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens: must be {context} or more, those of "
            "one prompt and its continuation"
        )
    starts = [i * last // max(count - 1, 1) for i in range(count)]
    split = context - continuation
    pieces = [list(tokens[start : start + context]) for start in starts]
    return [Cut(piece[:split], piece[split:]) for piece in pieces]


def tokens_of(text: str, encode: Callable[[str], list[int]]) -> tuple[list[int], str]:
    """The tokens of a text, and a fingerprint of them."""
    tokens = encode(text)
    told = hashlib.sha256(repr(tokens).encode()).hexdigest()[:16]
    return tokens, told


def fingerprint_of(model: str) -> str:
    """What tells a model's folder from another of the same name.

    Returns:
        A hash of its config.json and of its weight files' names, sizes and some bytes
        of each; empty for a model that is named and not a folder.
    """
    folder = Path(model)
    if not folder.is_dir():
        return ""
    told = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        told.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * size // _SAMPLES)
                told.update(file.read(_SAMPLE_BYTES))
    return told.hexdigest()[:16]
