"""Tasks and texts from files that the user has: LongBench, and any haystack.

Source: "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
arXiv 2308.14508. A file is JSON Lines with the keys `input`, `context`, `answers`,
`length`, `dataset` and `all_classes`. Its English and code data sets are known here,
those of LongBench-E (`..._e`) among them; Chinese ones need a segmentation of words.

Metrics are LongBench's, but ROUGE-L is taken over the whole text at once, and code
similarity is difflib's ratio. The prompt is the context, one instruction of ours for
each metric, and the input. LongBench truncates long contexts; here they stay whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from benchmarks.quality.suites.metrics import METRICS, normalized
from benchmarks.quality.suites.task import CountTokens, Task, user

_TALK = 32  # output tokens besides the longest answer's


def token_f1(output: str, references: Sequence[str]) -> float:
    """The best F1 of normalized words, as of SQuAD."""
    found = Counter(normalized(output).split())
    best = 0.0
    for reference in references:
        wanted = Counter(normalized(reference).split())
        right = (found & wanted).total()
        best = max(best, 2 * right / max(found.total() + wanted.total(), 1))
    return best


def rouge_l(output: str, references: Sequence[str]) -> float:
    """The best F1 of the longest common subsequence of words."""
    best, found = 0.0, output.split()
    for reference in references:
        wanted = reference.split()
        row = [0] * (len(wanted) + 1)
        for word in found:
            before = row[:]
            for i, other in enumerate(wanted, 1):
                equal = word == other
                row[i] = before[i - 1] + 1 if equal else max(before[i], row[i - 1])
        best = max(best, 2 * row[-1] / max(len(found) + len(wanted), 1))
    return best


def named_class(output: str, references: Sequence[str]) -> float:
    """1 / (classes that the first line names), if the right one is among them.

    Args:
        references: The right class, then all classes. One whose name is part of the
            right one's does not count.
    """
    right, *classes = references
    line = _first_line(output)
    named = [c for c in classes if c in line and (c == right or c not in right)]
    return 1 / len(named) if right in named else 0.0


def named_number(output: str, references: Sequence[str]) -> float:
    """Share of the numbers in the output that are the reference's (its last one)."""
    found = re.findall(r"\d+", output)
    wanted = re.findall(r"\d+", references[0])
    return found.count(wanted[-1]) / len(found) if found and wanted else 0.0


def code_similarity(output: str, references: Sequence[str]) -> float:
    """difflib's best ratio of the first line that is neither comment nor fence."""
    for line in output.lstrip("\n").split("\n"):
        if not any(mark in line for mark in ("`", "#", "//")):
            return max(SequenceMatcher(None, line, r).ratio() for r in references)
    return 0.0


def token_f1_of_first_line(output: str, references: Sequence[str]) -> float:
    return token_f1(_first_line(output), references)


def rouge_l_of_first_line(output: str, references: Sequence[str]) -> float:
    return rouge_l(_first_line(output), references)


def _first_line(output: str) -> str:
    return output.lstrip("\n").partition("\n")[0]


_OWN_METRICS = (
    *(token_f1, rouge_l, named_class, named_number, code_similarity),
    *(token_f1_of_first_line, rouge_l_of_first_line),
)
METRICS.update((metric.__name__, metric) for metric in _OWN_METRICS)

_SHORT = "Answer the question by the text above, in as few words as possible."
_SUMMARY = "Write a summary of the text above."
_CLASS = "Name the class, in the way of the examples above and nothing else."
_CODE = "Write the next line of the code above and nothing else."
_PARAGRAPH = "Which paragraph above is this the abstract of? Answer: Paragraph, number."
_COUNT = "How many different paragraphs stand above? Answer with the number alone."
_BOOKS = ("narrativeqa", "qasper", "multifieldqa_en")
_HOPS = ("hotpotqa", "2wikimqa", "musique")
_SUMMARIES = ("gov_report", "qmsum", "multi_news")
DATASETS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_BOOKS + _HOPS, ("token_f1", _SHORT)),
    **dict.fromkeys(_SUMMARIES, ("rouge_l", _SUMMARY)),
    "triviaqa": ("token_f1_of_first_line", _SHORT),
    "samsum": ("rouge_l_of_first_line", _SUMMARY),
    "trec": ("named_class", _CLASS),
    "passage_retrieval_en": ("named_number", _PARAGRAPH),
    "passage_count": ("named_number", _COUNT),
    "lcc": ("code_similarity", _CODE),
    "repobench-p": ("code_similarity", _CODE),
}
"""By data set: the metric, and what stands between context and input."""
_KEYS = ("input", "context", "answers", "length", "dataset", "all_classes")


def from_file(path: str | Path, count_tokens: CountTokens) -> list[Task]:
    """The tasks of a LongBench file; a task's seed is its line number, from 1.

    Args:
        count_tokens: Of a text; for `max_new_tokens`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, holds no task, or a line is not LongBench's: the
            message has the line's number and the key.
    """
    lines = read_text(path).split("\n")
    tasks = [
        _task(path, number, line, count_tokens)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not tasks:
        raise ValueError(f"{path}: holds no task")
    return tasks


def read_text(path: str | Path) -> str:
    """The text of a file, such as a haystack.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason})") from None


def _task(path: str | Path, number: int, line: str, count_tokens: CountTokens) -> Task:
    fields = _fields(f"{path}, line {number}", line)
    dataset, answers = fields["dataset"], fields["answers"]
    metric, instruction = DATASETS[dataset.removesuffix("_e")]
    parts = [fields["context"], instruction, fields["input"]]
    references = answers
    if metric == "named_class":
        references = [answers[0], *fields["all_classes"]]
    return Task(
        suite=dataset,
        name=f"{dataset}-{fields['length']}-{number}",
        seed=number,
        messages=(user("\n\n".join(part for part in parts if part)),),
        answer=answers[0],
        references=tuple(references),
        metric=metric,
        max_new_tokens=max(map(count_tokens, answers)) + _TALK,
    )


def _fields(where: str, line: str) -> dict[str, Any]:
    """The fields of a line, each of the type that LongBench gives it."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({reason})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be a JSON object")
    for key in _KEYS:
        if key not in fields:
            raise ValueError(f"{where}: lacks the key {key!r}")
    for key in ("input", "context", "dataset"):
        if not isinstance(fields[key], str):
            raise ValueError(f"{where}: {key!r} must be a string")
    if type(fields["length"]) is not int:
        raise ValueError(f"{where}: 'length' must be an integer")
    if not _strings(fields["answers"]) or not fields["answers"]:
        raise ValueError(f"{where}: 'answers' must be a list of one or more strings")
    name = fields["dataset"].removesuffix("_e")
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise ValueError(f"{where}: 'dataset' is {name!r}; must be one of {known}")
    if name == "trec" and not (
        _strings(fields["all_classes"])
        and fields["answers"][0] in fields["all_classes"]
    ):
        raise ValueError(
            f"{where}: 'all_classes' must be strings, the answer among them"
        )
    return fields


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
