"""Packages that an interrupted installation left half written."""

import csv
import shutil
from pathlib import Path


def remove_torn_packages(environment: Path) -> list[str]:
    """Make pip and uv forget half-written packages, so that they are installed anew.

    pip and uv take a package for installed as soon as its metadata is there, which may
    be before its files are.

    Returns:
        The names of the packages found.
    """
    torn = []
    for packages in environment.glob("lib/python*/site-packages"):
        for rest_of_pip in packages.glob("~*"):
            shutil.rmtree(rest_of_pip, ignore_errors=True)
        for metadata in sorted(packages.glob("*.dist-info")):
            if not _is_whole(metadata):
                shutil.rmtree(metadata)
                torn.append(metadata.name.partition("-")[0])
    return torn


def _is_whole(metadata: Path) -> bool:
    # NOTE: pip and uv write this file last, after a package's commands.
    if not (metadata / "INSTALLER").exists():
        return False
    try:
        with (metadata / "RECORD").open(newline="") as record:
            rows = [(row[0], row[2]) for row in csv.reader(record) if row]
        sizes = {path: int(size) if size else None for path, size in rows}
    except (OSError, csv.Error, ValueError, IndexError):
        return False
    return bool(sizes) and all(
        _has_size(metadata.parent / path, size)
        for path, size in sizes.items()
        if not path.endswith(".pyc")
    )


def _has_size(path: Path, size: int | None) -> bool:
    try:
        found = path.stat().st_size
    except OSError:
        return False
    return size is None or found == size
