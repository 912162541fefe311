"""Every suite: solvable from its prompt, of the length asked for, by its seed."""

import hashlib
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.suites import (
    SUITES,
    TURN_END,
    converse,
    flatten,
    make,
    prose,
    score,
    whole_conversation,
)
from benchmarks.quality.suites.__main__ import count_words
from benchmarks.quality.suites.filling import largest
from tests.benchmarks.quality.solvers import SOLVERS
from tests.support.processes import child_environment

ROOT = Path(__file__).parents[3]
EVERY = pytest.mark.parametrize("suite", SUITES)


def used(task):
    return count_words(flatten(whole_conversation(task)))


@EVERY
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(2000, 4000))
def test_a_solver_that_reads_the_prompt(suite, seed, length):
    task = make(suite, length, seed, count_words)
    assert 0.9 * length < used(task) <= length
    assert score(task, task.answer) == 1
    assert score(task, converse(task, SOLVERS[suite])) == 1
    assert score(task, "") == 0
    other = make(suite, length, seed + 1, count_words)
    assert other.messages[0] != task.messages[0] or suite in ("mrcr", "multi_turn")
    assert score(task, other.answer) < 0.5, "the answer is another one by each seed"
    for turn in task.answer.split(TURN_END):
        assert count_words(turn) < task.max_new_tokens


@EVERY
def test_length_is_counted_by_the_given_tokenizer(suite):
    """Bytes: a length that would be four times too long in words."""
    task = make(suite, 12_000, 1, lambda text: len(text.encode()))
    assert 10_800 < len(flatten(whole_conversation(task)).encode()) <= 12_000


@EVERY
def test_a_length_that_is_too_short(suite):
    with pytest.raises(ValueError, match=f"length=20 .*{suite}.* [0-9]+ tokens"):
        make(suite, 20, 0, count_words)


DIGEST = f"""
import hashlib, json
from dataclasses import asdict
from benchmarks.quality.suites import SUITES, make
tasks = [asdict(make(s, 6000, 5, lambda t: len(t) // 3)) for s in {list(SUITES)}]
"""


def test_equal_arguments_give_equal_tasks_in_other_processes():
    """Whose strings have other hashes, and so their sets another order."""
    tasks = [asdict(make(s, 6000, 5, lambda t: len(t) // 3)) for s in SUITES]
    here = hashlib.sha256(json.dumps(tasks).encode()).hexdigest()
    line = "print(hashlib.sha256(json.dumps(tasks).encode()).hexdigest())"
    for hash_seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", DIGEST + line],
            cwd=ROOT,
            env={**child_environment(), "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == here, done.stderr


# Shortcuts: what a model finds that does not look for the answer.


def depth(task, sign):
    """Where in the prompt a text stands, 0 to 1."""
    text = flatten(task.messages)
    (place,) = (match.start() for match in re.finditer(re.escape(sign), text))
    return place / len(text)


def signs_of(suite, task):
    """The places where the answer stands in the prompt."""
    if suite == "path_traversal":
        return [f"From {line.split(',')[0]} there is" for line in task.references]
    if suite == "variable_tracking":
        return [f"VAR {name} = " for name in task.references]
    if suite == "graphwalks_parents":
        child = re.search(r"parents of (\w+)\?", task.messages[0]["content"])[1]
        return [f"{node} -> {child}\n" for node in task.references]
    if suite == "mrcr":
        return task.references[1:]
    if suite == "multi_turn":
        return [f"code {code}." for code in task.references]
    return task.references


@pytest.mark.parametrize(
    "suite",
    [
        *(suite for suite in SUITES if suite.startswith("niah")),
        *("variable_tracking", "graphwalks_parents", "mrcr", "path_traversal"),
        *("json_kv", "multi_turn"),
    ],
)
def test_answers_stand_anywhere(suite):
    """Mean and spread of a uniform distribution, 1/2 and 1/12, over many seeds."""
    depths = []
    for seed in range(60):
        task = make(suite, 3000, seed, count_words)
        depths += [depth(task, sign) for sign in signs_of(suite, task)]
    mean = sum(depths) / len(depths)
    spread = sum((d - mean) ** 2 for d in depths) / len(depths)
    assert abs(mean - 0.5) < 0.12
    assert 0.05 < spread < 0.115


def test_order_does_not_tell_which_needle_is_asked_for():
    """Of four keys, of equal requests, of facts: each is asked for."""

    def rank(suite, pattern, seed):
        task = make(suite, 1500, seed, count_words)
        found = re.findall(pattern, flatten(task.messages), re.MULTILINE)
        return found.index(task.references[0])

    for suite, pattern, ranks in (
        ("niah_multikey_1", r"is: (\d+)\.", 4),
        ("niah_multiquery", r"is: (\d+)\.", 4),
        ("multi_turn", r"code (\d+)\.", 8),
    ):
        seen = {rank(suite, pattern, seed) for seed in range(60)}
        assert seen == set(range(ranks)), suite
    numbers = set()
    for seed in range(40):
        task = make("mrcr", 1500, seed, count_words)
        numbers.add(re.search(r"number (\d)", task.messages[-1]["content"])[1])
    assert numbers == set("1234")


def test_near_requests_surround_the_equal_ones():
    """Neither form nor subject alone tells them from the others."""
    task = make("mrcr", 4000, 3, count_words)
    requests = [m["content"] for m in task.messages[:-1:2]]
    (equal,) = {r for r in requests if requests.count(r) == 4}
    form, subject = re.match(r"Write a (.*) about the (.*)\.", equal).groups()
    assert sum(f" {form} about" in r for r in requests) > 12
    assert sum(r.endswith(f" {subject}.") for r in requests) > 8


def test_lists_are_in_random_order():
    """Frequent words do not come first, nor one chain behind the other."""
    for suite, pattern in (("common_words", r"\. (\w+)"), ("frequent_words", r"(\w+)")):
        task = make(suite, 1500, 0, count_words)
        text = task.messages[0]["content"].split("\n\n")[1]
        found = list(dict.fromkeys(re.findall(pattern, text)))
        assert set(found[: len(task.references)]) != set(task.references), suite
    task = make("variable_tracking", 1500, 0, count_words)
    names = re.findall("VAR (.*) = ", task.messages[0]["content"])
    own = [name in task.references for name in names]
    assert own not in (sorted(own), sorted(own, reverse=True))


# Recipes: what solvers cannot see.


def test_what_is_asked_for_in_each():
    counts = {s: len(make(s, 2000, 0, count_words).references) for s in SUITES}
    several = {"niah_multivalue": 4, "niah_multiquery": 4, "variable_tracking": 5}
    several |= {"common_words": 10, "frequent_words": 3, "multi_turn": 4, "mrcr": 2}
    several["path_traversal"] = 16
    for suite in ("graphwalks_bfs", "graphwalks_parents", "countdown"):
        counts.pop(suite)
    assert counts == {suite: several.get(suite, 1) for suite in counts}
    uuids = {s for s in SUITES if "-" in make(s, 1500, 0, count_words).references[0]}
    assert uuids == {"niah_single_3", "niah_multikey_3", "json_kv"}


@pytest.mark.parametrize(
    "words",
    [
        prose.word_keys(random.Random(0), 3120),
        prose.word_keys(random.Random(0), 7000),
        prose.made_up_words(random.Random(0), 4000, syllables=1),
    ],
    ids=["two words", "three words", "made up"],
)
def test_words_do_not_run_out(words):
    """A key is unique, and a wrong word contains no right one."""
    assert len(set(words)) == len(words)
    assert len({word.count("-") for word in words}) == 1
    if "-" not in words[0]:
        assert {len(word) for word in words} == {6}


def test_prose_is_grammatical():
    text = prose.paragraph(random.Random(0), 500)
    assert re.search("[Aa]n [aeiou]", text) and not re.search(r"\b[Aa] [aeiou]", text)


def test_frequent_words_follow_the_zeta_distribution():
    task = make("frequent_words", 20_000, 2, count_words)
    text = task.messages[0]["content"].split("\n\n")[1].split()
    counts = [text.count(word) for word in ("...", *task.references)]
    # 6 / pi^2 of the words are dots, and rank k stands 1 / k^2 times as often.
    total = counts[0] / 0.6079
    assert counts[1:] == pytest.approx([counts[0] / k**2 for k in (2, 3, 4)], abs=1)
    assert len(text) == pytest.approx(total, rel=0.02), "counts are rounded down"


def test_common_words_stand_ten_times_as_often():
    task = make("common_words", 4000, 2, count_words)
    words = re.findall(r"\d+\. (\w+)", task.messages[0]["content"])
    assert {words.count(word) for word in words} == {30, 3}
    assert {words.count(word) for word in task.references} == {30}


def test_no_node_is_reached_twice():
    """A frontier holds no node of an earlier one, where edges lead back to it."""
    task = make("graphwalks_bfs", 600, 0, count_words, depth=4, degree=3)
    assert score(task, converse(task, SOLVERS["graphwalks_bfs"])) == 1


def test_no_city_leads_to_itself():
    for seed in range(10):
        text = make("path_traversal", 1500, seed, count_words).messages[0]["content"]
        assert not re.search(r"From (\w+) there is a \w+ to \1\.", text)


def test_countdown_keeps_to_its_lines():
    for seed in range(20):
        task = make("countdown", 900, seed, count_words, min_lines=46, max_lines=48)
        assert 46 <= task.references.index("Solution:") <= 48
        (numbers,) = re.findall(
            r"Numbers: \[(.*?)\], target: \d+$", task.messages[0]["content"]
        )
        given = sorted(map(int, numbers.split(", ")))
        left = list(given)
        for equation in task.references[-3:]:
            a, sign, b, _, c = equation.split()
            left.remove(int(a))
            left.remove(int(b))
            assert eval(f"{a} {sign} {b}") == int(c)
            left.append(int(c))
        assert task.messages[0]["content"].endswith(f"target: {left[0]}")


# Arguments


def test_a_given_text_is_the_haystack():
    text = "First sentence of mine. Second one,\nover two lines! A third?"
    task = make("niah_single_2", 1000, 0, count_words, text=text)
    prompt = task.messages[0]["content"]
    assert prompt.count("Second one, over two lines!") > 20
    assert not re.search("painters|sailors|bakers", prompt)
    assert score(task, converse(task, SOLVERS["niah_single_2"])) == 1


@pytest.mark.parametrize(
    ("suite", "given", "words"),
    [
        ("niah", {}, ["niah", "niah_single_1"]),
        ("json_kv", {"keys": "words"}, ["keys", "json_kv", "none"]),
        ("mrcr", {"needle": 2}, ["needle", "needles", "sentences"]),
        ("niah_single_1", {"haystack": "hay"}, ["haystack", "hay", "essay"]),
        ("niah_single_1", {"text": "Hay."}, ["text", "essay", "noise"]),
        ("niah_single_2", {"text": " "}, ["text", "no sentence"]),
        ("niah_single_2", {"num_queries": 2}, ["num_queries=2", "num_keys=1"]),
        ("common_words", {"other_count": 30}, ["common_count=30", "other_count=30"]),
        ("frequent_words", {"alpha": 1.0}, ["alpha=1.0", "above 1"]),
        ("frequent_words", {"alpha": 5.0}, ["alpha=5.0", "equally frequent"]),
        ("multi_turn", {"questions": 9}, ["questions=9", "facts=8"]),
        ("graphwalks_bfs", {"depth": 90}, ["depth=90"]),
    ],
)
def test_wrong_arguments(suite, given, words):
    with pytest.raises(ValueError) as error:
        make(suite, 2000, 0, count_words, **given)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("items", [0, 1, 5, 9, 1000, 123_456])
@pytest.mark.parametrize("each", [1, 7, 900])
def test_the_largest_size_that_fits(items, each):
    """Few looks, however long the prompt, and none where nothing fits."""
    looks = []

    def count(size):
        looks.append(size)
        return 50 + each * size + (size % 3 if each > 1 else 0)

    length = 50 + each * items + 2
    size = largest(count, length)
    assert count(size) <= length
    assert count(size + 1) > length or count(size) >= 0.99 * length
    assert len(looks) < 20
    assert largest(count, 49) is None


def test_an_output_of_several_turns_holds_each_answer_in_its_turn():
    task = make("multi_turn", 800, 0, count_words)
    right = task.answer.split(TURN_END)
    seen = []

    def ask(messages):
        seen.append(messages)
        return right[len(seen) - 1] + TURN_END

    assert score(task, converse(task, ask)) == 1
    assert len(seen) == 4
    assert [m["content"].rstrip() for m in seen[3][-6:-1:2]] == right[:3]
    assert score(task, TURN_END.join(reversed(right))) == 0
    assert score(task, right[0]) == 0.25
