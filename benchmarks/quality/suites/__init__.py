"""Long-context test suites made by code: any length, any tokenizer, no download.

    from benchmarks.quality.suites import converse, make, score

    task = make("niah_multikey_2", 32768, seed=0, count_tokens=my_count)
    output = converse(task, my_model)   # or: one request with task.messages
    score(task, output)                 # 0 to 1; score(task, task.answer) == 1

* `make(suite, length, seed, count_tokens, **settings)` gives a `Task`: the
  conversation (`messages`, `follow_ups`), the `answer` of a perfect model, what the
  metric compares with (`references`), its name (`metric`) and `max_new_tokens`. A task
  is a function of these arguments. The prompt has at most `length` tokens and, where
  the items that fill it are small beside it, at least 90 % of them.
* `converse(task, ask)` asks turn by turn. Most tasks have one turn: their output may
  go to `score` without it.
* `SUITES` is the table: what each asks, its source, metric and default settings.
* `from_file(path, count_tokens)` gives the tasks of a LongBench file, and
  `make(..., text=...)` takes a haystack, such as RULER's essays, read by `read_text`.

`python -m benchmarks.quality.suites --suite NAME --length N --seed S` prints one task.
Each recipe is documented in its module, docs/suites.md has the table.
"""

from benchmarks.quality.suites.longbench import from_file, read_text
from benchmarks.quality.suites.metrics import METRICS
from benchmarks.quality.suites.table import SUITES, make, score
from benchmarks.quality.suites.task import (
    TURN_END,
    Message,
    Suite,
    Task,
    converse,
    flatten,
    whole_conversation,
)

__all__ = [
    "METRICS",
    "SUITES",
    "TURN_END",
    "Message",
    "Suite",
    "Task",
    "converse",
    "flatten",
    "from_file",
    "make",
    "read_text",
    "score",
    "whole_conversation",
]
