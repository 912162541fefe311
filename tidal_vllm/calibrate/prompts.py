"""What the model is asked: built-in look-ups with known answers, or the user's file.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tidal_vllm.planted import load_spec, make_prompt
from tidal_vllm.planted.build import MARKER
from tidal_vllm.validators import TidalConfigError, suggestion

BUILTIN = "builtin"
_FILE_KEYS = ("prompt", "prompt_token_ids", "answer", "answer_token_ids")
_CHAIN = 8  # tokens of an answer
_GOLDEN = 0.618034  # its multiples spread evenly over 0 to 1
_RESERVED_IDS = 16  # smallest ids are special tokens, as a rule
_NAMES = (
    *("Abel", "Berta", "Cyril", "Dora", "Egon", "Frida", "Gustav", "Hanna", "Igor"),
    *("Judith", "Konrad", "Lotte", "Magnus", "Nadia", "Oskar", "Paula", "Quentin"),
    *("Rosa", "Silvan", "Thea", "Ulrich", "Vera", "Walter", "Xenia", "Yannick", "Zoe"),
)
_WHO = ("farmer", "teacher", "sailor", "painter", "doctor", "baker", "pilot", "judge")
_DID = ("visited", "described", "remembered", "sold", "praised", "painted", "crossed")
_WHAT = ("river", "castle", "market", "forest", "bridge", "garden", "harbour", "tower")
_HOW = ("quietly", "at dawn", "last winter", "with a friend", "in the rain", "twice")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        kind: What the prompt asks for, in the report's words.
        token_ids: The question.
        answer_ids: The right answer, where it is known as tokens.
        answer_text: The right answer, where it is known as text; at most one of the
            two is known.
    """

    kind: str
    token_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] | None = None
    answer_text: str | None = None

    @property
    def judged(self) -> bool:
        """Whether the right answer is known."""
        return self.answer_ids is not None or self.answer_text is not None

    def is_right(
        self, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str] | None
    ) -> bool:
        """Whether the model's tokens are, or contain as text, the known answer."""
        if self.answer_ids is not None:
            return tuple(token_ids[: len(self.answer_ids)]) == self.answer_ids
        return self.answer_text is not None and self.answer_text in decode(token_ids)


def read_file(path: str) -> list[dict[str, Any]]:
    """The lines of a prompt file, with the checks that need no model.

    Raises:
        TidalConfigError: Unreadable, empty, or a line that is no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = (
            f"cannot be read ({error}); must be {BUILTIN!r}, 'text', a text file "
            "(.txt, .md) or a UTF-8 JSON Lines file"
        )
        raise TidalConfigError("--prompts", path, reason) from None
    lines = [
        _read_line(path, number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise TidalConfigError("--prompts", path, "holds no prompt; needs at least one")
    return lines


def _read_line(path: str, number: int, line: str) -> dict[str, Any]:
    def refuse(reason: str) -> TidalConfigError:
        return TidalConfigError("--prompts", path, f"line {number}: {reason}")

    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise refuse(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(fields, dict):
        raise refuse("must be a JSON object with `prompt` or `prompt_token_ids`")
    for key, value in fields.items():
        if key not in _FILE_KEYS:
            hint = suggestion(key, _FILE_KEYS)
            raise refuse(
                f"unknown key {key!r}{hint}; the keys are {', '.join(_FILE_KEYS)}"
            )
        if key.endswith("_ids"):
            ok = isinstance(value, list) and all(type(i) is int for i in value)
        else:
            ok = isinstance(value, str)
        if not ok or not value:
            wanted = "list of token ids" if key.endswith("_ids") else "string"
            raise refuse(f"{key} must be a non-empty {wanted}")
    for pair in (_FILE_KEYS[:2], _FILE_KEYS[2:]):
        if all(key in fields for key in pair):
            raise refuse(f"has both {pair[0]} and {pair[1]}: must have one of them")
    if not set(_FILE_KEYS[:2]) & fields.keys():
        raise refuse("lacks `prompt` or `prompt_token_ids`")
    return fields


def from_file(
    path: str, lines: Sequence[dict[str, Any]], tokenizer: Any, vocab_size: int
) -> list[Prompt]:
    """The prompts of a file.

    Args:
        lines: What ``read_file`` returned.
        tokenizer: The model's, or None where its folder has none.

    Raises:
        TidalConfigError: Text without a tokenizer, or a token the model lacks.
    """
    prompts = []
    for number, fields in enumerate(lines, 1):
        for key in ("prompt", "answer"):
            if key in fields and tokenizer is None:
                reason = f"prompt {number}: {key} is text, but the model has no "
                reason += f"tokenizer; give {key}_token_ids"
                raise TidalConfigError("--prompts", path, reason)
        ids = fields.get("prompt_token_ids")
        answer = fields.get("answer_token_ids")
        for given in (ids or [], answer or []):
            wrong = [i for i in given if not 0 <= i < vocab_size]
            if wrong:
                reason = f"prompt {number}: token {wrong[0]} is not in the model's "
                reason += f"vocabulary, 0..{vocab_size - 1}"
                raise TidalConfigError("--prompts", path, reason)
        ids = ids or tokenizer.encode(fields["prompt"])
        prompts.append(
            Prompt(
                kind="file",
                token_ids=tuple(ids),
                answer_ids=tuple(answer) if answer else None,
                answer_text=fields.get("answer"),
            )
        )
    return prompts


def built_in(
    model: str, tokenizer: Any, vocab_size: int, count: int, num_tokens: int
) -> list[Prompt]:
    """Synthetic look-ups of one length, the needles at all depths.

    Args:
        model: A planted model's folder gets its own questions.
        tokenizer: The model's: needles and two-hop needles in made-up prose, by turns.
            None: chains of random token ids, to be continued from their first.
        vocab_size: Number of the model's tokens.
        count: Number of prompts.
        num_tokens: Length of each prompt, tokens; a prompt of prose may be shorter.

    Raises:
        TidalConfigError: Too short to hold a needle.
    """
    try:
        return [
            _question(model, tokenizer, vocab_size, num_tokens, (i + 0.5) / count, i)
            for i in range(count)
        ]
    except ValueError as error:
        raise TidalConfigError(
            "--context", num_tokens, f"no built-in prompt: {error}"
        ) from None


def one_more(
    model: str, tokenizer: Any, vocab_size: int, number: int, num_tokens: int
) -> Prompt:
    """Another prompt like those of `built_in`, without end.

    Args:
        number: The prompt's number; consecutive numbers have depths far apart.
    """
    depth = number * _GOLDEN % 1
    return _question(model, tokenizer, vocab_size, num_tokens, depth, number)


def _question(
    model: str,
    tokenizer: Any,
    vocab_size: int,
    num_tokens: int,
    depth: float,
    seed: int,
) -> Prompt:
    if Path(model, MARKER).is_file():
        spec = load_spec(model)
        made = make_prompt(spec, num_tokens, depth, seed=seed, chain_len=_CHAIN)
        asked, answer = made.prompt_token_ids, made.answer_token_ids
        return Prompt("planted", tuple(asked), tuple(answer))
    if tokenizer is None:
        return _chain(vocab_size, num_tokens, depth, seed)
    return _prose(tokenizer, num_tokens, depth, hops=1 + seed % 2, seed=seed)


def _chain(vocab_size: int, num_tokens: int, depth: float, seed: int) -> Prompt:
    """A run of random tokens that occurs once before, to be continued."""
    rng = random.Random(f"chain {seed}")
    words = list(range(min(_RESERVED_IDS, vocab_size // 4), vocab_size))
    if num_tokens < 4 * _CHAIN or len(words) < 4 * _CHAIN:
        raise ValueError(f"needs {4 * _CHAIN} tokens, and as many in the vocabulary")
    rng.shuffle(words)
    needle, haystack = words[: _CHAIN + 1], words[_CHAIN + 1 :]
    tokens = [*rng.choices(haystack, k=num_tokens - 1), needle[0]]
    start = int(depth * (num_tokens - 1 - len(needle)))
    tokens[start : start + len(needle)] = needle
    return Prompt("chain", tuple(tokens), tuple(needle[1:]))


def _prose(
    tokenizer: Any, num_tokens: int, depth: float, hops: int, seed: int
) -> Prompt:
    """Made-up sentences with a secret number in them; two hops go by another name."""
    rng = random.Random(f"prose {seed}")
    asked, keeper, *others = rng.sample(_NAMES, k=len(_NAMES))
    number = str(rng.randrange(100_000, 1_000_000))
    if hops == 1:
        keeper = asked
    facts = [f"The secret number of {keeper} is {number}."]
    if hops == 2:
        facts.append(f"{asked} has the same secret number as {keeper}.")
    facts += [
        f"The secret number of {name} is {rng.randrange(100_000, 1_000_000)}."
        for name in others[:3]
    ]
    question = (
        f"\n\nQuestion: What is the secret number of {asked}?"
        f"\nAnswer: The secret number of {asked} is"
    )

    def text(num_sentences: int) -> str:
        filler = random.Random(f"filler {seed}")
        sentences = [_sentence(filler) for _ in range(num_sentences)]
        for i, fact in enumerate(facts):
            place = int(((depth + i / len(facts)) % 1) * (len(sentences) + 1))
            sentences.insert(place, fact)
        return " ".join(sentences) + question

    fixed, some = (len(tokenizer.encode(text(n))) for n in (0, 64))
    per_sentence = (some - fixed) / 64
    wanted = int((num_tokens - fixed) / per_sentence)
    while wanted > 0:
        ids = tokenizer.encode(text(wanted))
        if len(ids) <= num_tokens:
            kind = "needle" if hops == 1 else "two hops"
            return Prompt(kind, tuple(ids), answer_text=number)
        wanted -= 1 + int((len(ids) - num_tokens) / per_sentence)
    raise ValueError(f"the question alone takes {fixed} tokens")


def _sentence(rng: random.Random) -> str:
    who, did, what, how = (rng.choice(words) for words in (_WHO, _DID, _WHAT, _HOW))
    return f"The {who} {did} the {what} {how}."
