"""Results as JSON lines, of which each is whole even where a process is killed."""

import json
import os
from pathlib import Path


def append(path: Path, record: dict) -> None:
    """Append one record by a single write.

    A process that is killed in the middle of a long write leaves the beginning of a
    line: the next record takes its place.
    """
    line = (json.dumps(record) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        end = os.lseek(file, 0, os.SEEK_END)
        if end and os.pread(file, 1, end - 1) != b"\n":
            os.ftruncate(file, os.pread(file, end, 0).rfind(b"\n") + 1)
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path, start: int = 0) -> list[dict]:
    """The whole records of a file from a byte on; none where there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        whole, _, _ = file.read().rpartition(b"\n")
        return [json.loads(line) for line in whole.splitlines()]
