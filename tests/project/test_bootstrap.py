"""What bootstrap.py says when it cannot set things up, and what it runs when it can."""

import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bootstrap.py"


@pytest.fixture
def bootstrap():
    spec = util.spec_from_file_location("bootstrap", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(bootstrap, capsys, check=None) -> str:
    with pytest.raises(SystemExit) as exit_info:
        (check or (lambda: bootstrap.check_machine("0.33.0")))()
    assert exit_info.value.code == 1
    return capsys.readouterr().err


def test_this_machine_is_accepted(bootstrap, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(20 << 30))
    bootstrap.check_machine("0.32.0")
    bootstrap.check_disk()


@pytest.mark.parametrize("found", [(3, 8, 1), (3, 10, 9), (3, 14, 0)])
def test_python_out_of_range(bootstrap, monkeypatch, capsys, found):
    monkeypatch.setattr(sys, "version_info", found)
    message = refusal(bootstrap, capsys)
    said = f"this is Python 3.{found[1]}; allowed with vLLM 0.33.0: 3.11 to 3.13"
    assert said in message
    assert "apt-get install python3.11" in message


def test_another_system(bootstrap, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "this is win32" in refusal(bootstrap, capsys)


def test_venv_missing(bootstrap, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    message = refusal(bootstrap, capsys)
    assert "module ensurepip is missing" in message
    assert "-venv`" in message


def test_disk_full(bootstrap, monkeypatch, capsys):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30))
    message = refusal(bootstrap, capsys, bootstrap.check_disk)
    assert "1.0 GiB are free" in message
    assert "needed: 12" in message


def test_what_old_pythons_parse():
    """They have to come far enough to say that they are too old."""
    import ast

    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported <= {"os", "shutil", "signal", "subprocess", "sys"}
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize(
    "arguments, mistake",
    [
        (["tests"], "tests is unknown; allowed: demo, test, setup, wheels"),
        (["--vllm", "0.31.0", "test"], "--vllm 0.31.0; allowed: 0.32.0, 0.33.0"),
        (["test", "--vllm", "0.33.0"], "--vllm has to stand before `test`"),
        (["--vllm"], "--vllm needs a value"),
        (["--quick", "demo"], "--quick is unknown; options: --vllm, --wheels, --full"),
        (["--wheels", "/no/such", "demo"], "--wheels /no/such: there is no such"),
        (["wheels"], "`wheels` takes one folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_shows_usage_and_installs_nothing(arguments, mistake):
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "python3 bootstrap.py test " in done.stderr
    assert mistake in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, folder, rest",
    [
        (["test", "tests/plan", "-k", "x"], ".venv", ["tests/plan", "-k", "x"]),
        (["--vllm", "0.33.0", "--full", "demo"], ".venv-0.33.0", []),
        (["--vllm=0.32.0", "setup"], ".venv", []),
    ],
)
def test_each_vllm_has_its_folder(bootstrap, arguments, folder, rest):
    options = bootstrap.Options(arguments)
    assert Path(options.folder) == SCRIPT.parent / folder
    assert options.rest == rest
    assert options.full is ("--full" in arguments)


@pytest.mark.parametrize(
    "arguments, fetches",
    [
        (["demo"], False),
        (["demo", "--model", "smollm2"], True),
        (["demo", "--contexts", "9", "--model=smollm2"], True),
        (["demo", "--model", "docs"], False),
        (["demo", "--model-dir", "x"], False),
        (["test", "--model", "x"], False),
    ],
    ids=lambda value: value if isinstance(value, bool) else " ".join(value),
)
def test_a_demo_that_fetches_a_model_needs_its_readers(bootstrap, arguments, fetches):
    assert bootstrap.Options(arguments).models is fetches


@pytest.mark.parametrize(
    "arguments, needed",
    [
        (["test"], False),
        (["test", "tests/serving", "--all"], True),
        (["setup"], False),
        (["wheels", "x"], True),
    ],
    ids=lambda value: value if isinstance(value, bool) else " ".join(value),
)
def test_all_tests_and_wheels_for_them_need_lm_eval(bootstrap, arguments, needed):
    assert bootstrap.Options(arguments).evaluate is needed


PYTEST = ["python", "-m", "pytest"]


@pytest.fixture
def commands(bootstrap, monkeypatch):
    monkeypatch.setattr(bootstrap.os, "sched_getaffinity", lambda pid: range(12))
    return lambda *arguments: bootstrap.test_commands("python", arguments)


PARALLEL = ["-n", "8", "--dist", "loadfile"]


def test_the_tests_of_a_newcomer(commands):
    assert commands("-k", "x") == [[*PYTEST, "--quick", *PARALLEL, "-k", "x"]]


@pytest.mark.parametrize(
    "given, others, alone",
    [
        ([], "not serial", "serial"),
        (["-m", "compat"], "not serial and (compat)", "serial and (compat)"),
        (["-mcompat or x"], "not serial and (compat or x)", "serial and (compat or x)"),
    ],
)
def test_all_tests(commands, given, others, alone):
    assert commands("--all", *given, "-x") == [
        [*PYTEST, "-m", others, *PARALLEL, "-x"],
        [*PYTEST, "-m", alone, "-x"],
    ]


@pytest.mark.parametrize(
    "statuses, expected",
    [((0, 0), 0), ((0, 5), 0), ((5, 0), 0), ((5, 5), 5), ((1, 0), 1), ((5, 3), 3)],
)
def test_both_parts_run_and_the_first_failure_counts(
    bootstrap, tmp_path, statuses, expected
):
    ran = tmp_path / "ran"
    code = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))"
    commands = [[sys.executable, "-c", code, str(ran), str(s)] for s in statuses]
    assert bootstrap.run_all(commands) == expected
    assert ran.read_text() == "xx"


def test_an_interrupted_part_is_the_last(bootstrap):
    interrupted = [sys.executable, "-c", "import sys; sys.exit(2)"]
    with pytest.raises(SystemExit) as exit_info:
        bootstrap.run_all([interrupted, ["no such program"]])
    assert exit_info.value.code == 2
