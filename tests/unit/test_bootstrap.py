"""What bootstrap.py says when it cannot set things up."""

import shutil
import subprocess
import sys
from collections import namedtuple
from importlib import util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path, monkeypatch):
    spec = util.spec_from_file_location("bootstrap", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STAMP", str(tmp_path / "no stamp"))
    return module


def refusal(bootstrap, capsys) -> str:
    with pytest.raises(SystemExit) as exit_info:
        bootstrap.check_machine()
    assert exit_info.value.code == 1
    return capsys.readouterr().err


def test_this_machine_is_accepted(bootstrap, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(20 << 30))
    bootstrap.check_machine()


@pytest.mark.parametrize("found", [(3, 8, 1), (3, 14, 0)])
def test_python_out_of_range(bootstrap, monkeypatch, capsys, found):
    monkeypatch.setattr(sys, "version_info", found)
    message = refusal(bootstrap, capsys)
    assert f"this is Python 3.{found[1]}; allowed: 3.10 to 3.13" in message
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
    message = refusal(bootstrap, capsys)
    assert "1.0 GiB are free" in message
    assert "needed: 12" in message


def test_a_failing_step_is_named(bootstrap, capsys):
    with pytest.raises(SystemExit) as exit_info:
        bootstrap.run_step("[1/1] Failing", [sys.executable, "-c", "exit(3)"])
    assert exit_info.value.code == 1
    assert "[1/1] Failing: exit status 3" in capsys.readouterr().err


def test_unknown_word_shows_usage_and_installs_nothing():
    done = subprocess.run(
        [sys.executable, SCRIPT, "tests"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "python3 bootstrap.py test " in done.stdout
