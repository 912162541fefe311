"""How the profile of a model is found: by its name, or by the model's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tidal_vllm.profiles.load import load_profile
from tidal_vllm.profiles.profile import PACKAGED_DIR, PROFILE_KEY, Profile, model_names
from tidal_vllm.validators import TidalConfigError, suggestion

PROJECT_DIR = Path("tidal_profiles")
USER_DIR = "~/.config/tidal_vllm/profiles"


def find_profile(
    config_profile: str | None,
    model: str,
    num_layers: int,
    search_dirs: Sequence[Path] | None = None,
    config_sha256: str = "",
) -> Profile | None:
    """Find the profile that gives a model its layer roles.

    Args:
        config_profile: ``tidal.profile``: a name, a path to a .json file, or None for
            the first of ``search_dirs`` that knows the model's name and layer count;
            within one, the most specific glob wins, then the smaller profile name.
        model: vLLM's model name: hub id, local folder or hub snapshot path.
        num_layers: The model's layer count.
        search_dirs: Folders, first wins. None: ``./tidal_profiles``,
            ``~/.config/tidal_vllm/profiles``, then the packaged profiles.
        config_sha256: Hash of the model's config, see ``fingerprint``; empty:
            unchecked.

    Returns:
        The profile, or None where automatic search knows none; see
        ``near_miss`` for one that nearly fits.

    Raises:
        TidalConfigError: Unknown name; missing, malformed or truncated file; an
            explicit profile for another layer count, or measured on another model.
    """
    if config_profile is None:
        for profile in _matches(model, search_dirs):
            if profile.misfit(model, num_layers, config_sha256) is None:
                return profile
        return None
    profile = named_profile(config_profile, search_dirs)
    reason = profile.misfit(model, num_layers, config_sha256)
    if reason is not None:
        wanted = f"must be a profile with num_hidden_layers = {num_layers}"
        if profile.config_sha256:
            wanted += f", calibrated on this model: tidal-vllm calibrate {model}"
        raise TidalConfigError(PROFILE_KEY, config_profile, f"{reason}: {wanted}")
    return profile


def near_miss(
    model: str,
    num_layers: int,
    search_dirs: Sequence[Path] | None = None,
    config_sha256: str = "",
) -> str | None:
    """Say which profile knows the model's name but does not fit it, if any.

    Args:
        model, num_layers, search_dirs, config_sha256: As in ``find_profile``.
    """
    for profile in _matches(model, search_dirs):
        if reason := profile.misfit(model, num_layers, config_sha256):
            return (
                f"profile {profile.label} fits the name of {model} but {reason}: "
                "not used"
            )
    return None


def list_profiles(search_dirs: Sequence[Path] | None = None) -> tuple[Profile, ...]:
    """All profiles in search order: by folder, then by file name."""
    return tuple(p for folder in _folders(search_dirs) for p in _load_folder(folder))


def named_profile(name: str, search_dirs: Sequence[Path] | None = None) -> Profile:
    """The profile of a name, or in a file.

    Args:
        name: A profile's name, whatever the case, or a path to a .json file.
        search_dirs: As in ``find_profile``.

    Raises:
        TidalConfigError: Unknown name, or a file that cannot be used.
    """
    if name.lower().endswith(".json") or "/" in name:
        return load_profile(os.path.expanduser(name))
    profiles = list_profiles(search_dirs)
    for profile in profiles:
        if profile.name.lower() == name.lower():
            return profile
    known = sorted({profile.name for profile in profiles})
    allowed = (
        f"unknown profile{suggestion(name, known)}; must be a path to a .json file "
        f"or one of {', '.join(known)}"
    )
    raise TidalConfigError(PROFILE_KEY, name, allowed)


def _matches(model: str, search_dirs: Sequence[Path] | None) -> Iterator[Profile]:
    """Profiles that fit the model's name, best first."""
    names = model_names(model)
    for folder in _folders(search_dirs):
        fitting = [p for p in _load_folder(folder) if p.specificity(names)]
        yield from sorted(fitting, key=lambda p: (-p.specificity(names), p.name))


def _folders(search_dirs: Sequence[Path] | None) -> Sequence[Path]:
    """The folders given, else the project's, the user's and the packaged one."""
    if search_dirs is None:
        return PROJECT_DIR, Path(os.path.expanduser(USER_DIR)), PACKAGED_DIR
    return search_dirs


def _load_folder(folder: Path) -> list[Profile]:
    return [load_profile(path) for path in sorted(Path(folder).glob("*.json"))]
