"""What survives an interruption: one folder beside the profile that is to be written.

    manifest.json     what the run was asked for; another request is refused
    replies.jsonl     one line per finished answer, appended
    recorded-N.npz    what was recorded while prompt N was answered

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.validators import TidalConfigError

_FORMAT = 1


class State:
    """The folder of one calibration run.

    Args:
        folder: Made if it is not there.
        manifest: All that the results depend on, as JSON takes it.
        restart: Throw away what an earlier run left.
        interrupts: Checked whenever an answer has been saved.

    Raises:
        TidalConfigError: The folder holds a run that was asked for something else, or
            something that is no run.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        restart: bool,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.folder = folder
        self._interrupts = interrupts or Interrupts()
        manifest = json.loads(json.dumps({"format": _FORMAT} | manifest))
        path = folder / "manifest.json"
        if folder.exists():
            earlier = _read(path, folder)
            if restart:
                shutil.rmtree(folder)
            elif earlier != manifest:
                keys = earlier.keys() | manifest.keys()
                changed = [k for k in keys if earlier.get(k) != manifest.get(k)]
                raise TidalConfigError(
                    "-o",
                    str(folder),
                    "holds an interrupted run that was asked for other "
                    f"{', '.join(sorted(changed))}: repeat its command to resume "
                    "it, or add --restart to throw it away",
                )
        self._replies: dict[str, dict[str, Any]] = {}
        self._log = folder / "replies.jsonl"
        if folder.exists():
            self._resume()
        else:
            folder.mkdir(parents=True)
            path.write_text(json.dumps(manifest, indent=2) + "\n")

    @property
    def num_replies(self) -> int:
        """How many answers are kept."""
        return len(self._replies)

    def reply(self, key: str) -> dict[str, Any] | None:
        """What was saved under a key, if anything."""
        return self._replies.get(key)

    def save_replies(self, replies: dict[str, dict[str, Any]]) -> None:
        """Keep answers, by their keys.

        Raises:
            KeyboardInterrupt: There was one; the answers are kept nevertheless.
        """
        self._replies |= replies
        with self._log.open("a") as log:
            for key, reply in replies.items():
                log.write(json.dumps({"key": key, "reply": reply}) + "\n")
        self._interrupts.check()

    def recorded(self, prompt: int) -> dict[str, np.ndarray]:
        """What was recorded while a prompt was answered, by name."""
        with np.load(self.folder / f"recorded-{prompt}.npz") as found:
            return dict(found)

    def save_recorded(self, prompt: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep what was recorded while a prompt was answered."""
        np.savez_compressed(self.folder / f"recorded-{prompt}.npz", **arrays)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def _resume(self) -> None:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by the interruption: that answer is asked again
            self._replies[entry["key"]] = entry["reply"]
        with self._log.open("w") as log:
            for key, reply in self._replies.items():
                log.write(json.dumps({"key": key, "reply": reply}) + "\n")


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "format" not in found:
        raise TidalConfigError(
            "-o", str(folder), "is in the way: it is no interrupted calibration"
        )
    return found
