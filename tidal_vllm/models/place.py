"""Where a model's folder goes, whether it fits there, and the work beside it."""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tidal_vllm.models.known import ModelError

# In a folder of unfinished work: get-model made it, and may remove it.
MARKER = ".made_by_tidal_vllm_get_model"


def absolute(path: Path, key: str) -> Path:
    """The path with `~` expanded, from the root.

    Args:
        key: The option or variable that the path is from, for the refusal.

    Raises:
        ModelError: The home folder or the working directory does not exist.
    """
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        missing = f"no home folder is known for {path.parts[0]}"
    except OSError:
        missing = "the working directory is gone"
    raise ModelError(f"{key} {path}: {missing}; give a path that starts with /")


def cache_folder() -> Path:
    """TIDAL_VLLM_CACHE, else `tidal_vllm` in XDG_CACHE_HOME or in ~/.cache.

    Raises:
        ModelError: There is no such place.
    """
    if own := os.environ.get("TIDAL_VLLM_CACHE"):
        return absolute(Path(own), "TIDAL_VLLM_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if shared.startswith(("/", "~")):  # others do not count, by its specification
        return absolute(Path(shared), "XDG_CACHE_HOME") / "tidal_vllm"
    return absolute(Path("~/.cache"), "TIDAL_VLLM_CACHE is not set, and") / "tidal_vllm"


def check_space(needs: dict[Path, int]) -> None:
    """Refuse where a disk is too full.

    Args:
        needs: Bytes by folder, which need not exist. Those on one disk add up.

    Raises:
        ModelError: Too little is free on a disk.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        there = next(p for p in (folder, *folder.parents) if p.exists())
        disk = _disk(there)
        first, others = disks.get(disk, (there, 0))
        disks[disk] = (first, others + size)
    for there, needed in disks.values():
        free = shutil.disk_usage(there).free
        if free < needed:
            raise ModelError(
                f"{megabytes(free)} are free in {there}; needed: {megabytes(needed)}. "
                "Free some, or name another disk: with --out for the model, with "
                "TIDAL_VLLM_CACHE for the download"
            )


def is_mount_point(folder: Path) -> bool:
    """Whether a folder that exists is one, bind mounts of the same disk included."""
    return os.path.ismount(folder) or _mount(folder) != _mount(folder.parent)


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` for this process alone; removed at the end.

    Another process that works there is waited for. What a killed one left is removed
    first. Parents that are missing are made, and removed unless something is in them
    at the end.

    Raises:
        ModelError: Something that get-model did not make has the folder's name.
        OSError: The folder cannot be made.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    place = folder.with_name(f".{folder.name}.partial")
    try:
        with _locked(place, folder):
            _claim(place)
            try:
                _clear(place)
                yield place
            finally:
                with contextlib.suppress(OSError):
                    _clear(place)
                    (place / MARKER).unlink()
                    place.rmdir()
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _disk(there: Path) -> int:
    return there.stat().st_dev


def _mount(folder: Path) -> str:
    """The kernel's number of the mount that a folder lies on; "" without /proc."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        lines = Path(f"/proc/self/fdinfo/{opened}").read_text().splitlines()
    except FileNotFoundError:
        return ""
    finally:
        os.close(opened)
    return next((line for line in lines if line.startswith("mnt_id:")), "")


@contextlib.contextmanager
def _locked(place: Path, folder: Path) -> Iterator[None]:
    """Make the folder unless it is there, and hold its lock."""
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            place.mkdir()
        try:
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its holder removed it just now
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise _in_the_way(place) from error
            raise
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Another process is making {folder}; waiting for it ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_still(place, lock):
                yield
                return
        finally:
            os.close(lock)


def _is_still(place: Path, opened: int) -> bool:
    """Whether the folder is the opened one, which its holder removes at the end."""
    try:
        return os.path.samestat(place.lstat(), os.fstat(opened))
    except FileNotFoundError:
        return False


def _claim(place: Path) -> None:
    names = os.listdir(place)
    if not names:
        (place / MARKER).touch()
    elif MARKER not in names:
        raise _in_the_way(place)


def _in_the_way(place: Path) -> ModelError:
    return ModelError(
        f"{place} is needed for unfinished work, and is not of get-model: move it "
        "away, or name another folder with --out"
    )


def _clear(place: Path) -> None:
    """Remove all but the marker, which goes last."""
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
