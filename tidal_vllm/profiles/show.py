"""`tidal-vllm profiles`: all profiles as a table, or one in full."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tidal_vllm.profiles.profile import Profile
from tidal_vllm.profiles.search import list_profiles, named_profile


def list_all(search_dirs: Sequence[Path] | None = None) -> str:
    """One line per profile, in the order in which they are searched."""
    head = ("NAME", "LAYERS", "DENSE", "SELECT", "BUDGET", "MODELS", "FROM")
    rows = [head, *map(_row, list_profiles(search_dirs))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def show(name: str, search_dirs: Sequence[Path] | None = None) -> str:
    """A profile's file as it stands, behind a line that says where the file is.

    Args:
        name: A profile's name, or the path of a .json file.

    Raises:
        TidalConfigError: Unknown name, or a file that cannot be used.
    """
    profile = named_profile(name, search_dirs)
    fields = json.loads(profile.path.read_text(encoding="utf-8"))
    return f"# {profile.path}\n{json.dumps(fields, indent=2)}"


def _row(profile: Profile) -> tuple[str, ...]:
    return (
        profile.name,
        str(profile.num_hidden_layers),
        _listed(profile.dense_layers),
        _listed(profile.select_layers),
        str(profile.settings.get("token_budget", "-")),
        " ".join(profile.models) or "(by name only)",
        f"measured, {profile.path}" if profile.measured else _source(profile),
    )


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers)) or "-"


def _source(profile: Profile) -> str:
    return "packaged" if profile.label == profile.name else str(profile.path)
