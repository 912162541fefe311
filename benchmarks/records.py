"""Results as JSON lines, of which each is whole even where a process is killed."""

import json
import os
from pathlib import Path


def append(path: Path, record: dict) -> None:
    """Append one record by a single write, so that no line is ever half there."""
    line = (json.dumps(record) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
    finally:
        os.close(file)


def read(path: Path, start: int = 0) -> list[dict]:
    """The records of a file from a byte on; none where there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        return [json.loads(line) for line in file.read().splitlines()]
