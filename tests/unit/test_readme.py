"""The README: its commands parse, its paths exist, its numbers were measured."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from tidal_vllm.cli import main
from tidal_vllm.config import PRESETS, TidalConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
]
RESULTS = ROOT / "benchmarks/results/decode_engine.jsonl"


def test_the_newcomers_two_commands_come_first_and_ci_runs_them():
    assert COMMANDS[:2] == ["python3 bootstrap.py demo", "python3 bootstrap.py test"]
    ci = (ROOT / ".ci/run").read_text()
    assert all(command in ci for command in COMMANDS[:2])


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\((?!http)(.*?)\)", README)))
)
def test_linked_paths_exist(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\b(?:tests|benchmarks|docs)/\w[\w./]*", README)))
)
def test_named_paths_exist(path):
    assert (ROOT / path.rstrip(".")).exists()


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("tidal-vllm ")]
)
def test_own_commands_parse(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([*shlex.split(command)[1:], "--help"])
    assert exit_info.value.code == 0


def test_python_examples_compile():
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    for example in examples:
        ast.parse(example)


def test_configuration_table_is_the_configuration():
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE))
    config = TidalConfig()
    defaults = {
        name: PRESETS["default"].get(name, getattr(config, name))
        for name in TidalConfig.__dataclass_fields__
    }
    assert {key: json.loads(value) for key, value in rows.items()} == defaults


@pytest.mark.parametrize("text", re.findall(r"--additional-config '(.*?)'", README))
def test_configuration_examples_are_accepted(text):
    TidalConfig.from_additional_config(json.loads(text))


def test_the_measured_table_is_what_was_measured():
    table = README.split("<!-- table: ")[1].split("<!-- end of table -->")[0]
    rows = re.findall(r"^\| (\d+)K \|(.*)\|$", table, re.MULTILINE)
    summaries = {
        record["summary"]["context"]: record["summary"]
        for record in map(json.loads, RESULTS.read_text().splitlines())
        if record["setup"]["hops"] == 1
    }
    assert {1024 * int(context) for context, _ in rows} == set(summaries)
    for context, cells in rows:
        summary = summaries[1024 * int(context)]
        assert summary["exact"]
        assert [cell.strip() for cell in cells.split("|")] == [
            f"{summary['dense_attention_ms']:.1f}",
            f"{summary['sparse_attention_ms']:.1f}",
            f"{summary['attention_speedup']:.2f}x",
            f"{summary['dense_step_ms']:.1f}",
            f"{summary['sparse_step_ms']:.1f}",
            f"{summary['step_speedup']:.2f}x",
        ]
