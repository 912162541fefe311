"""The README: its commands parse, its paths exist, its numbers were measured."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from tidal_vllm.cli import main
from tidal_vllm.config import PRESETS, TidalConfig
from tidal_vllm.versions import TESTED, unsupported_vllm

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


def table_behind(comment: str) -> list[list[str]]:
    """The cells of each row of a README table, its head first."""
    lines = README.split(f"<!-- {comment} -->")[1].strip().splitlines()
    rows = lines[: next(i for i, line in enumerate(lines) if line[:1] != "|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [cells[0], *cells[2:]]


def test_the_support_table_is_what_ci_runs():
    head, *rows = table_behind("table: tidal_vllm/versions.py")
    assert head == ["vLLM", "torch", "Python", "what CI runs"]
    assert {vllm: torch for vllm, torch, *_ in rows} == TESTED
    assert not any(map(unsupported_vllm, TESTED))
    (pythons,) = re.findall(
        r"^requires-python = (.*)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    first, end = re.findall(r"[>=<]3\.(\d+)", pythons)
    assert {python for *_, python, _ in rows} == {f"3.{first} to 3.{int(end) - 1}"}
    ci = (ROOT / ".ci/run").read_text()
    for number, (vllm, _, _, runs) in enumerate(rows):
        # The first is what bootstrap.py installs where nothing is asked for.
        chosen = f" --vllm {vllm}" if number else ""
        for arguments in re.findall(r"`(.*?)`", runs):
            assert re.search(rf"bootstrap\.py{chosen} {arguments}\s", ci), (vllm, ci)
    assert {*re.findall(r"--vllm (\S+)", ci)} == {*list(TESTED)[1:]}


def test_the_releases_are_those_that_the_set_up_installs():
    tree = ast.parse((ROOT / "bootstrap.py").read_text())
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert ast.literal_eval(constants["TORCH"]) == TESTED


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
