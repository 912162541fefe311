"""Child processes of a GPU run: their lines, their limits, and what is left of them."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.gpu.child import run_child

pytestmark = pytest.mark.extended  # a newcomer has no GPU to run on

ROOT = Path(__file__).parents[3]


def python(code: str, limit: float = 60.0) -> tuple[list[str], object]:
    lines: list[str] = []
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    ended = run_child([sys.executable, "-c", code], limit, lines.append, env)
    return lines, ended


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def test_lines_of_both_streams_and_the_status():
    code = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    lines, ended = python(code)
    assert sorted(lines) == ["one", "two"]
    assert (ended.status, ended.timed_out, ended.well) == (3, False, False)


# How a command starts a process that sleeps, and whether it then hangs itself.
SLEEPERS = {
    "hangs, same session": ("subprocess.Popen(sleep)", True),
    "hangs, own session": ("subprocess.Popen(sleep, start_new_session=True)", True),
    "ends before it": ("subprocess.Popen(sleep)", False),
}


@pytest.mark.parametrize("start, hangs", SLEEPERS.values(), ids=SLEEPERS)
def test_nothing_is_left_of_what_was_started(start, hangs):
    """The command hears no SIGTERM, and its child keeps the pipe open."""
    wait = "time.sleep(600)" if hangs else ""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"print({start}.pid)\n{wait}"
    )
    (pid,), ended = python(code, limit=10.0 if hangs else 300.0)
    assert ended.timed_out is hangs
    deadline = time.monotonic() + 20
    while is_running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(pid))


@pytest.mark.parametrize("hangs", [False, True])
def test_shared_memory_of_a_killed_command_is_removed(hangs):
    """Python's resource tracker, another process of the command, has to live on."""
    code = (
        "import os, time\nfrom multiprocessing.shared_memory import SharedMemory\n"
        "print(SharedMemory(create=True, size=16).name)\n"
        f"time.sleep({600 if hangs else 0})\nos._exit(0)"
    )
    (name, *_), ended = python(code, limit=10.0 if hangs else 300.0)
    assert ended.timed_out is hangs
    assert not Path("/dev/shm", name).exists()


def test_records_are_whole_after_a_kill(tmp_path):
    out = tmp_path / "out.jsonl"
    code = (
        "from pathlib import Path\nfrom benchmarks import records\n"
        f"while True: records.append(Path({str(out)!r}), {{'long': 'x' * 300_000}})"
    )
    _, ended = python(code, limit=6.0)
    assert ended.timed_out
    found = records.read(out)
    assert found and all(len(record["long"]) == 300_000 for record in found)


def test_a_record_takes_the_place_of_an_unfinished_one(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text('{"a": 1}\n{"b": ')
    assert records.read(out) == [{"a": 1}]
    records.append(out, {"c": 2})
    assert records.read(out) == [{"a": 1}, {"c": 2}]
