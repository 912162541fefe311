"""Tasks from a LongBench file, texts from the user, and the command that prints."""

import json

import pytest

from benchmarks.quality.suites import SUITES, from_file, make, score
from benchmarks.quality.suites.__main__ import count_words, main
from tests.project.test_pages import text_of

LINE = {
    "input": "Who built the bridge?",
    "context": "Ann built the bridge.",
    "answers": ["Ann", "Ann Lee"],
    "length": 4,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "7",
}
CLASS = {"dataset": "trec_e", "answers": ["Date"], "all_classes": ["Date", "City"]}


def write(path, *lines):
    text = "\n".join(
        x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines
    )
    path.write_text(text, encoding="utf-8")
    return path


def test_tasks_of_a_file(tmp_path):
    lines = [LINE, "", {**LINE, **CLASS}, {**LINE, "dataset": "lcc", "input": ""}]
    # A separator of lines in the eyes of Python, but not of JSON Lines.
    lines[3]["context"] = "x = 1\u2028y"
    path = write(tmp_path / "f.jsonl", *lines)
    qa, classes, code = tasks = from_file(path, count_words)
    assert [(t.suite, t.seed) for t in tasks] == [
        *(("hotpotqa", 1), ("trec_e", 3), ("lcc", 4))
    ]
    assert all(score(task, task.answer) == 1 for task in tasks)
    assert score(qa, "By Ann Lee.") == pytest.approx(0.8)
    assert score(classes, "City") == 0 and score(classes, "City, Date") == 0.5
    (message,) = qa.messages
    assert message["content"].startswith("Ann built the bridge.\n\n")
    assert message["content"].endswith("\n\nWho built the bridge?")
    assert code.messages[0]["content"].endswith("nothing else.")
    assert qa.max_new_tokens == 2 + 32


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'input': 1}", ["not valid JSON", "column 2"]),
        ("[1]", ["JSON object"]),
        ({k: v for k, v in LINE.items() if k != "length"}, ["lacks", "'length'"]),
        ({**LINE, "context": None}, ["'context'", "string"]),
        ({**LINE, "length": "4"}, ["'length'", "integer"]),
        ({**LINE, "answers": []}, ["'answers'", "one or more"]),
        ({**LINE, "answers": [1]}, ["'answers'", "strings"]),
        ({**LINE, "dataset": "dureader"}, ["'dataset'", "dureader", "hotpotqa"]),
        ({**LINE, **CLASS, "all_classes": ["City"]}, ["'all_classes'"]),
    ],
)
def test_a_malformed_line(tmp_path, line, words):
    path = write(tmp_path / "f.jsonl", LINE, line)
    with pytest.raises(ValueError) as error:
        from_file(path, count_words)
    for word in (str(path), "line 2: ", *words):
        assert word in str(error.value)


def test_files_without_tasks(tmp_path):
    with pytest.raises(ValueError, match="holds no task"):
        from_file(write(tmp_path / "f.jsonl", "", ""), count_words)
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="b: is not UTF-8"):
        from_file(tmp_path / "b", count_words)


def test_the_command_prints_a_task_for_a_reader(tmp_path, capsys):
    text = write(tmp_path / "essays.txt", "An essay of mine. And its end.")
    line = "--suite niah_single_2 --length 500 --seed 4"
    main([*line.split(), "--text", str(text)])
    task = make("niah_single_2", 500, 4, count_words, text=text.read_text())
    shown = capsys.readouterr().out
    assert f"[user]\n{task.messages[0]['content']}\n" in shown
    assert f"[answer]\n{task.answer}\n" in shown and task.name in shown
    main([])
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()] == list(SUITES)
    for wrong in (["--suite", "x"], ["--suite", "mrcr", "--length", "9"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "must be one of" in (err := capsys.readouterr().err) or "short" in err


def test_the_page_has_every_suite():
    rows = [
        line.strip("|").split("|") for line in text_of("docs/suites.md").split("\n")
    ]
    shown = {
        row[0].strip().strip("`"): [cell.strip().strip("`") for cell in row[1:]]
        for row in rows
        if len(row) == 4 and "`" in row[0]
    }
    assert shown == {
        name: [suite.asks, suite.metric, suite.source] for name, suite in SUITES.items()
    }
