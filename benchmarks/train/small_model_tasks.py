"""What the small trained model learns: look-ups in source text, of known answer.

A sequence is cut into slots of 8 tokens. Some hold an item, the rest is source text,
byte by byte. An item is a fact or, later, a question about one:

    PAIR k v v v v . .     ASK  k  v v v v . .       retrieval
    LINK j k . . . . .     HOP  j  v v v v . .       two hops: j -> k -> values
    SPAN r r r r r r .     COPY r r  r r r r .       copying

Every slot is a function of the seed, the batch and the row: a resumed run sees what an
uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BYTES = 256
BOS, EOS, PAD, END, PAIR, ASK, LINK, HOP, SPAN, COPY = range(BYTES, BYTES + 10)
SPECIAL = ("bos", "eos", "pad", "end", "pair", "ask", "link", "hop", "span", "copy")
FIRST_KEY = BYTES + len(SPECIAL)
NUM_KEYS = NUM_VALUES = 256
FIRST_VALUE = FIRST_KEY + NUM_KEYS
VOCAB_SIZE = FIRST_VALUE + NUM_VALUES
SLOT = 8
ANSWER = 4  # tokens
TASKS = ("retrieval", "two hops", "copy")
_QUESTION_STARTS = {"retrieval": 2, "two hops": 2, "copy": 3}  # where answers start


@dataclass(frozen=True)
class Text:
    """Source text as one array of bytes, and where it came from."""

    bytes: np.ndarray
    about: dict

    @classmethod
    def load(cls, folder: Path | None, most: int) -> Text:
        """The .py files of a folder, by default Python's own library, in order."""
        root = folder or Path(sysconfig.get_path("stdlib"))
        content, files = b"", 0
        for path in sorted(root.rglob("*.py")):
            if "site-packages" not in path.parts:
                content += path.read_bytes()
                files += 1
            if len(content) >= most:
                break
        if len(content) < 1 << 14:
            raise SystemExit(f"--text {root}: holds {len(content)} bytes of .py files")
        content = content[:most]
        digest = hashlib.sha256(content).hexdigest()
        about = {"files": files, "bytes": len(content), "sha256": digest}
        return cls(np.frombuffer(content, np.uint8), about)


class _Sequence:
    """One sequence being filled."""

    def __init__(self, rng: np.random.Generator, text: Text, num_slots: int) -> None:
        self.rng = rng
        start = rng.integers(len(text.bytes) - num_slots * SLOT)
        stretch = text.bytes[start : start + num_slots * SLOT]
        self.tokens = stretch.astype(np.int64).reshape(num_slots, SLOT)
        self.is_answer = np.zeros_like(self.tokens, bool)
        self.keys = iter(FIRST_KEY + rng.permutation(NUM_KEYS))
        self.facts: dict[str, list[tuple]] = {task: [] for task in TASKS}

    def values(self, count: int) -> np.ndarray:
        return FIRST_VALUE + self.rng.integers(NUM_VALUES, size=count)

    def put(self, slot: int, *tokens) -> None:
        row = np.full(SLOT, END)
        flat = np.concatenate([np.atleast_1d(part) for part in tokens])
        row[: len(flat)] = flat
        self.tokens[slot] = row

    def tell(self, task: str, slots: list[int]) -> None:
        """Put a fact; two hops take two slots, in any order."""
        if task == "copy":
            span = self.values(6)
            self.put(slots[0], SPAN, span)
            self.facts[task].append((span,))
            return
        key, values = next(self.keys), self.values(ANSWER)
        self.put(slots[0], PAIR, key, values)
        if task == "retrieval":
            self.facts[task].append((key, values))
        else:
            alias = next(self.keys)
            self.put(slots[1], LINK, alias, key)
            self.facts[task].append((alias, values))

    def ask(self, task: str, slot: int) -> None:
        """Put a question about a random fact told so far."""
        fact = self.facts[task][self.rng.integers(len(self.facts[task]))]
        if task == "copy":
            self.put(slot, COPY, fact[0])
        else:
            self.put(slot, ASK if task == "retrieval" else HOP, *fact)
        start = _QUESTION_STARTS[task]
        self.is_answer[slot, start : start + ANSWER] = True


def make_sequence(
    rng: np.random.Generator, text: Text, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one training sequence, and which of them are answers: `[length]`."""
    num_slots = length // SLOT
    sequence = _Sequence(rng, text, num_slots)
    # A sixth of the slots tell, a sixth ask; keys must last.
    count = min(max(num_slots // 6, 4), NUM_KEYS // 3)
    slots = np.sort(rng.permutation(num_slots)[: 2 * count]).tolist()
    while slots:
        told = [task for task in TASKS if sequence.facts[task]]
        if told and rng.random() < 0.55:
            sequence.ask(told[rng.integers(len(told))], slots.pop(0))
            continue
        task = TASKS[rng.integers(len(TASKS))]
        needed = 2 if task == "two hops" else 1
        taken, slots = slots[:needed], slots[needed:]
        if len(taken) == needed:
            rng.shuffle(taken)
            sequence.tell(task, taken)
    return _with_bos(sequence)


def make_question(
    rng: np.random.Generator, text: Text, length: int, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and answer: facts of all tasks anywhere, one question at the end."""
    num_slots = length // SLOT
    sequence = _Sequence(rng, text, num_slots)
    slots = rng.permutation(num_slots - 1).tolist()
    facts = min(max((num_slots - 1) // 12, 1), NUM_KEYS // 6)
    for name in TASKS:
        for _ in range(facts if len(slots) > 2 * facts else 1):
            sequence.tell(name, [slots.pop(), slots.pop()])
    sequence.ask(task, num_slots - 1)
    tokens, is_answer = _with_bos(sequence)
    start = int(is_answer.argmax())
    return tokens[:start], tokens[start : start + ANSWER]


def make_batch(
    text: Text, seed: int, number: int, rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batch `number` of a run: tokens and answer mask, `[rows, length]`."""
    made = [
        make_sequence(np.random.default_rng([seed, number, row]), text, length)
        for row in range(rows)
    ]
    tokens, is_answer = zip(*made, strict=True)
    return np.stack(tokens), np.stack(is_answer)


def _with_bos(sequence: _Sequence) -> tuple[np.ndarray, np.ndarray]:
    tokens, is_answer = sequence.tokens.reshape(-1), sequence.is_answer.reshape(-1)
    tokens = np.concatenate([[BOS], tokens[:-1]])
    return tokens, np.concatenate([[False], is_answer[:-1]])


def token_names() -> list[str]:
    """Names of the tokens behind the bytes, in order of their ids."""
    keys = [f"<k{i}>" for i in range(NUM_KEYS)]
    values = [f"<v{i}>" for i in range(NUM_VALUES)]
    return [f"<{name}>" for name in SPECIAL] + keys + values
