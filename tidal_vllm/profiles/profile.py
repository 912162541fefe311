"""The layer roles of one model, and whether they fit another."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROFILE_KEY = "tidal.profile"  # the setting that every refusal names
PACKAGED_DIR = Path(__file__).parent
# Calibration writes the lower end of an interval with four digits.
_ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The layer roles of one model, as read from a file.

    Attributes:
        name: What ``tidal.profile`` calls it.
        models: Globs, case-insensitive, matched with the last component of a model's
            name. Empty: never chosen automatically.
        num_hidden_layers: Layers of the model; the profile fits no other count.
        dense_layers: 0-based DENSE layers, ascending.
        select_layers: 0-based SELECT layers, ascending; empty turns sparse decoding
            off. Every other layer is SPARSE.
        source: Where each number came from.
        notes: Anything else worth knowing.
        settings: Values of ``TidalConfig`` keys that go with the layers.
        model: The model that was measured; empty in a profile that was not.
        config_sha256: Hash of the measured model's config, see ``fingerprint``; or
            empty.
        measured: What calibration found, for people; or empty.
        versions: Packages that the calibration ran on, by name; or empty.
        path: The file.
    """

    name: str
    models: tuple[str, ...]
    num_hidden_layers: int
    dense_layers: tuple[int, ...]
    select_layers: tuple[int, ...]
    source: str
    notes: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str = ""
    config_sha256: str = ""
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    path: Path

    @property
    def label(self) -> str:
        """The name, and the file where it is not a packaged one."""
        if self.path.parent == PACKAGED_DIR:
            return self.name
        return f"{self.name} ({self.path})"

    def specificity(self, names: Sequence[str]) -> int:
        """Most literal characters of a glob that fits one of the names; 0: none."""
        return max(
            (
                sum(char not in "*?" for char in glob)
                for glob in self.models
                for name in names
                if fnmatch.fnmatchcase(name.lower(), glob.lower())
            ),
            default=0,
        )

    def misfit(self, model: str, num_layers: int, config_sha256: str) -> str | None:
        """Say why this profile is not for a model; None: it is for that model.

        Args:
            model: vLLM's model name; counts for a measured profile only.
            num_layers: The model's layer count.
            config_sha256: Hash of the model's config; empty where it is not known, and
                then unchecked.
        """
        if self.num_hidden_layers != num_layers:
            return (
                f"is for {self.num_hidden_layers} layers, but {model} has {num_layers}"
            )
        if not self.config_sha256:
            return None
        if not self.specificity(model_names(model)):
            names = ", ".join(self.models)
            return f"was measured on {self.model} and fits {names}, not {model}"
        if config_sha256 and config_sha256 != self.config_sha256:
            return (
                f"was measured on a model of another config: config_sha256 "
                f"{self.config_sha256[:12]}, but that of {model} is "
                f"{config_sha256[:12]}"
            )
        return self._missing_evidence()

    def _missing_evidence(self) -> str | None:
        """Say why what was measured proves too little; None: it proves enough."""
        recommended = self.measured.get("recommended", {})
        tokens, proven = (
            recommended.get("tokens"),
            recommended.get("agreement_at_least"),
        )
        max_loss = self.measured.get("max_loss")
        if tokens is None or proven is None or max_loss is None:
            return "does not say how sure what it recommends is"
        wanted = 1 - max_loss
        if proven >= wanted - _ROUNDING:
            return None
        return (
            f"rests on {tokens} tokens, which prove an agreement of {proven:.1%} with "
            f"dense attention where {wanted:.1%} was asked for"
        )


def model_names(model: str) -> tuple[str, ...]:
    """What a model may be called; a hub snapshot's folder is only a hash.

    Args:
        model: vLLM's model name: hub id, local folder or hub snapshot path.
    """
    parts = [part for part in model.split("/") if part]
    hub = [p.split("--")[-1] for p in parts if p.startswith("models--")]
    last = parts[-1:] if parts else []
    if os.path.isdir(model):  # a link such as models/current names its target
        last.append(os.path.basename(os.path.realpath(model)))
    return tuple(hub or last)
