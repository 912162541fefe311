"""The script for a GPU machine: its parts, what they would run, how it resumes."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu/run.sh"


def run(out: Path, *arguments: str, **env: str):
    done = subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=os.environ | {"OUT": str(out), "SITE": str(out / "site")} | env,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def python(tmp_path):
    """An interpreter that says what it was asked to run, and fails in one bench."""
    path = tmp_path / "python"
    path.write_text(
        '#!/bin/sh\necho "ran $*"\ncase "$*" in *bench_sparse*) exit 3;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


def parts(out: Path) -> list[str]:
    return run(out, "--list")[1].split()


def test_a_dry_run_names_every_command(tmp_path):
    code, output, errors = run(tmp_path, "--dry-run")
    assert (code, errors) == (0, "")
    for part in parts(tmp_path):
        assert f"== {part}\n" in output
    commands = [line for line in output.splitlines() if line.startswith("+ ")]
    assert len(commands) >= 12
    words = " ".join(commands)
    modules = re.findall(r"-m (benchmarks\.\S+)", words)
    scripts = {word for word in words.split() if word.endswith(".py")}
    scripts |= {module.replace(".", "/") + ".py" for module in modules}
    assert {"setup.py", "benchmarks/engine/decode_engine.py"} < scripts
    assert all((ROOT / script).is_file() for script in scripts)
    assert not (tmp_path / "done").exists()


def test_refuses_an_unknown_part(tmp_path):
    code, output, errors = run(tmp_path, "stack", "stuck")
    assert (code, output) == (2, "")
    assert "stuck: no such part; allowed: site smoke build" in errors


def test_goes_on_after_a_failure_and_resumes(tmp_path, python):
    code, output, errors = run(tmp_path, PYTHON=python)
    assert code == 1
    assert errors == "failed: sparse\n"
    assert output.count("== sparse FAILED") == 1
    names = parts(tmp_path)
    assert names.count("done") == len(names) // 2  # all others
    assert (
        "ran -m benchmarks.kernels.bench_sparse"
        in (tmp_path / "sparse.log").read_text()
    )

    code, output, _ = run(tmp_path, PYTHON=python)
    assert code == 1
    assert [line for line in output.splitlines() if line.startswith("==")][0] == (
        "== sparse"
    )
    assert output.count("ran ") == 1


def test_a_part_that_is_named_runs_again(tmp_path, python):
    for _ in range(2):
        code, output, _ = run(tmp_path, "stack", PYTHON=python)
        assert code == 0
        assert f"--out {tmp_path}/gpu.jsonl" in output
        assert "== stack done in" in output


def test_says_what_is_missing(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    code, output, _ = run(tmp_path, PYTHON=str(python))
    assert code == 1
    assert "vLLM is not installed; PACKED must name the folder" in output
    assert "== smoke" not in output  # nothing runs without it
