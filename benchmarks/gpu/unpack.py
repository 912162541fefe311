"""Packages that are brought along, packed or not.

    python -m benchmarks.gpu.unpack FOLDER TARGET    part-00, part-01, ... into TARGET

The parts, one after the other, are an archive (tar, xz) whose top folders are packages.
"""

import os
import subprocess
import sys
from pathlib import Path


def place(given: Path, package: str, work: Path) -> Path:
    """The folder that holds a package, or will once `given` is unpacked below `work`.

    Raises:
        SystemExit: `given` holds neither the package nor an archive.
    """
    if (given / package).is_dir():
        return given
    if not _parts(given):
        raise SystemExit(f"{given}: holds neither {package}/ nor part-00, part-01, ...")
    return work / package


def unpack(folder: Path, target: Path) -> None:
    """Unpack the archive in a folder, on all cores where xz can."""
    target.mkdir(parents=True)
    with subprocess.Popen(
        ["tar", "-xJ", "-C", str(target)],
        stdin=subprocess.PIPE,
        env=os.environ | {"XZ_OPT": "-T0"},
    ) as tar:
        assert tar.stdin is not None
        for part in _parts(folder):
            tar.stdin.write(part.read_bytes())
        tar.stdin.close()
    if tar.returncode:
        raise SystemExit(f"{folder}: tar ended with {tar.returncode}")


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


if __name__ == "__main__":
    unpack(*map(Path, sys.argv[1:3]))
