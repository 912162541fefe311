"""LongProc's countdown: a search written out, step by step, up to its solution.

Source: "LongProc: Benchmarking Long-Context Language Models on Long Procedural
Generation", arXiv 2501.05414. Four numbers are to give a target by +, -, * and /, each
used once. The order of the search is prescribed, so there is one right trace of it;
it ends with the three equations of the solution. The prompt is filled with solved
examples. The metric is the share of lines up to the first wrong one. LongProc gives
the solution a score of its own; here its lines come last, and count like the others.
The form of a line is ours, and shorter than LongProc's.
"""

from __future__ import annotations

import random

from benchmarks.quality.suites.metrics import CLOSE, OPEN
from benchmarks.quality.suites.task import Draft, user

MOST = 2000  # the largest result that the search keeps
_LARGEST = 30  # of the given numbers
_EXAMPLE = (3, 8)  # lines of a worked example's search
_RULES = f"""\
Four numbers are to give a target. Each is used once; + - * / are allowed. Search for
the solution in this very order, and write each step as a line:
- Take the pairs of the numbers that are left: first with second, first with third,
  and so on, then second with third.
- Of a pair, let a be the larger number and b the other. Try a + b, a - b, a * b and
  a / b, in this order.
- Where a / b is not a whole number, or b is 0, write `a / b; not whole`. Where a result
  c is above {MOST}, write `a * b = c; above {MOST}`. Go on with what is next.
- Otherwise the numbers left are c and then those that were not taken, in their order.
  If there are others than c, write `a + b = c; left [c, d]` and search there before
  going on. If c is alone, write `a + b = c; not T`, where T is the target, or, if it
  is the target, `a + b = c; found`, and stop.
- Behind the search, write `Solution:` and the three equations that led to the target.
"""


def draft(
    rng: random.Random, size: int, *, min_lines: int = 24, max_lines: int = 48
) -> Draft:
    """A problem whose search has `min_lines` to `max_lines` lines.

    Args:
        size: Worked examples, besides one.
    """
    lines, (numbers, target) = _problem(rng, min_lines, max_lines)
    examples = []
    for _ in range(size + 1):
        shown, (given, wanted) = _problem(rng, *_EXAMPLE)
        examples.append(f"{_asked(given, wanted)}\n" + _written(shown))
    newline = "\n\n"
    prompt = (
        f"{_RULES}\nExamples:\n\n{newline.join(examples)}\n\n"
        f"Now write the search and the solution between {OPEN} and {CLOSE} for:\n"
        f"{_asked(numbers, target)}"
    )
    return Draft((user(prompt),), _written(lines), tuple(lines))


def _asked(numbers: list[int], target: int) -> str:
    return f"Numbers: {numbers}, target: {target}"


def _written(lines: list[str]) -> str:
    return "\n".join([OPEN, *lines, CLOSE])


def _problem(
    rng: random.Random, fewest: int, most: int
) -> tuple[list[str], tuple[list[int], int]]:
    """A search of so many lines with its solution's, and its numbers and target.

    Any first result of the search within these lines may be the target.
    """
    while True:
        numbers = rng.sample(range(1, _LARGEST + 1), 4)
        lines: list[str] = []
        steps: list[str] = []
        results: dict[int, int] = {}
        _search(numbers, None, lines, [], results, most)
        targets = [c for c, at in results.items() if fewest <= at <= most]
        if not targets:
            continue
        target = rng.choice(targets)
        lines, steps = [], []
        _search(numbers, target, lines, steps, {}, most)
        return [*lines, "Solution:", *steps], (numbers, target)


def _search(
    left: list[int],
    target: int | None,
    lines: list[str],
    steps: list[str],
    results: dict[int, int],
    most: int,
) -> bool:
    """Depth-first search; whether it ended: the target was found, or lines are out.

    Args:
        target: None: none, to see what there is.
        lines: Gets the lines.
        steps: The equations that led here; those of the solution in the end.
        results: Gets each number that the search arrives at, and the line where it
            first does, from 1.
        most: Lines after which the search ends.
    """
    for i in range(len(left)):
        for j in range(i + 1, len(left)):
            a, b = max(left[i], left[j]), min(left[i], left[j])
            rest = [n for k, n in enumerate(left) if k not in (i, j)]
            for sign in "+-*/":
                if len(lines) == most:
                    return True
                if sign == "/" and (b == 0 or a % b):
                    lines.append(f"{a} / {b}; not whole")
                    continue
                c = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign]
                equation = f"{a} {sign} {b} = {c}"
                if c > MOST:
                    lines.append(f"{equation}; above {MOST}")
                    continue
                steps.append(equation)
                if rest:
                    lines.append(f"{equation}; left {[c, *rest]}")
                    if _search([c, *rest], target, lines, steps, results, most):
                        return True
                else:
                    results.setdefault(c, len(lines) + 1)
                    found = c == target
                    lines.append(f"{equation}; {'found' if found else f'not {target}'}")
                    if found:
                        return True
                steps.pop()
    return False
