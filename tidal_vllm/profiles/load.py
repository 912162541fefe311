"""A profile's file: its keys, and everything in it that is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.profiles.profile import PROFILE_KEY, Profile
from tidal_vllm.validators import TidalConfigError, check_int, check_layers, suggestion

_LAYERS = ("dense_layers", "select_layers")
_REQUIRED = ("name", "models", "num_hidden_layers", *_LAYERS, "source")
# Settings that a profile may recommend; what the user says wins over them.
SETTINGS = (
    "token_budget",
    "select_block_size",
    "scope",
    "sink_tokens",
    "recent_fraction",
    "correction_interval",
)
# A profile has all of these or none: what was measured counts for its model alone.
_MEASURED = ("model", "config_sha256", "measured", "versions")
_OPTIONAL = ("notes", *SETTINGS, *_MEASURED)


def load_profile(path: str | Path) -> Profile:
    """Read one file.

    Raises:
        TidalConfigError: No such file, a folder, unreadable, not JSON (with line and
            column), a missing, unknown or mistyped key, contradictory layers, or
            measured numbers that cannot be.
    """
    shown = str(path)
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TidalConfigError(
            PROFILE_KEY, shown, "no such file; must be an existing .json file"
        ) from None
    except IsADirectoryError:
        raise TidalConfigError(
            PROFILE_KEY, shown, "is a folder; must be a .json file"
        ) from None
    except (OSError, ValueError) as error:
        allowed = f"cannot be read ({error}); must be a UTF-8 .json file"
        raise TidalConfigError(PROFILE_KEY, shown, allowed) from None
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        allowed = (
            f"is not valid JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}; must be a JSON object"
        )
        raise TidalConfigError(PROFILE_KEY, shown, allowed) from None
    return _parse(fields, path, shown)


def _parse(fields: Any, path: Path, shown: str) -> Profile:
    """Check the keys, types and values of a file's content."""
    if not isinstance(fields, dict):
        allowed = f"must be a JSON object with keys {', '.join(_REQUIRED)}"
        raise TidalConfigError(
            PROFILE_KEY, shown, f"{allowed}, not {type(fields).__name__}"
        )
    _check_keys(fields, shown)
    try:
        return Profile(**_checked(fields), path=path)
    except TidalConfigError as error:
        raise TidalConfigError(PROFILE_KEY, shown, f"in this file {error}") from None


def _check_keys(fields: Mapping[str, Any], shown: str) -> None:
    known = _REQUIRED + _OPTIONAL
    for key in fields:
        if key not in known:
            allowed = f"unknown key {key!r}{suggestion(key, known)}"
            allowed += f"; the keys are {', '.join(known)}"
            raise TidalConfigError(PROFILE_KEY, shown, allowed)
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        allowed = f"lacks {', '.join(missing)}; must have {', '.join(_REQUIRED)}"
        raise TidalConfigError(PROFILE_KEY, shown, allowed)
    given = [key for key in _MEASURED if key in fields]
    missing = [key for key in _MEASURED if key not in fields]
    if given and missing:
        allowed = (
            f"has {', '.join(given)} but lacks {', '.join(missing)}: truncated; "
            "calibrate again, or, to keep layers and settings that nobody measured, "
            f"remove {', '.join(given)}"
        )
        raise TidalConfigError(PROFILE_KEY, shown, allowed)


def _checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``Profile``, from fields whose keys are right."""
    for key in ("name", "source", "notes", "model"):
        value = fields.get(key, "")
        needed = key in _REQUIRED or key in _MEASURED and key in fields
        if not isinstance(value, str) or (needed and not value.strip()):
            raise TidalConfigError(key, value, "must be a non-empty string")
    models = fields["models"]
    if not isinstance(models, list) or not all(
        isinstance(glob, str) and glob.strip("*? ") for glob in models
    ):
        allowed = 'must be a list of model name globs such as ["llama-3.1-8b*"]'
        raise TidalConfigError("models", models, allowed)
    layers = _checked_layers(fields)
    if "measured" in fields:
        _check_measured(fields)
    settings = {key: fields[key] for key in SETTINGS if key in fields}
    TidalConfig(**settings)
    kept = {f.name for f in dataclasses.fields(Profile)} & fields.keys()
    return {
        **{key: fields[key] for key in kept},
        **layers,
        "models": tuple(models),
        "settings": settings,
    }


def _checked_layers(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """DENSE and SELECT layers, ascending, within the model and apart."""
    count = fields["num_hidden_layers"]
    check_int("num_hidden_layers", count, 1, "must be an integer >= 1")
    layers = {key: check_layers(key, fields[key]) for key in _LAYERS}
    for key, indices in layers.items():
        if indices and indices[-1] >= count:
            allowed = f"must be in 0..{count - 1}: num_hidden_layers is {count}"
            raise TidalConfigError(key, fields[key], allowed)
    shared = sorted(set.intersection(*map(set, layers.values())))
    if shared:
        allowed = f"overlaps dense_layers in {shared}; must name other layers"
        raise TidalConfigError("select_layers", fields["select_layers"], allowed)
    return layers


def _check_measured(fields: Mapping[str, Any]) -> None:
    """Refuse measured numbers that no calibration can have found.

    Numbers may be missing: a profile that does not say how sure it is fits no model,
    see ``Profile.misfit``.
    """
    sha256, measured = fields["config_sha256"], fields["measured"]
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        allowed = "must be a SHA-256 hash, 64 hexadecimal digits"
        raise TidalConfigError("config_sha256", sha256, allowed)
    recommended = measured.get("recommended", {}) if isinstance(measured, dict) else {}
    objects = {"measured": measured, "versions": fields["versions"]}
    for key, value in (objects | {"measured.recommended": recommended}).items():
        if not isinstance(value, dict):
            raise TidalConfigError(key, value, "must be a JSON object")
    tokens, agreed = recommended.get("tokens", 1), recommended.get("agreed", 0)
    check_int("measured.recommended.tokens", tokens, 1, "must be an integer >= 1")
    allowed = f"must be an integer in 0..{tokens}, the number of tokens"
    check_int("measured.recommended.agreed", agreed, 0, allowed)
    if agreed > tokens:
        raise TidalConfigError("measured.recommended.agreed", agreed, allowed)
    _check_share("measured.max_loss", measured.get("max_loss", 0))
    proven = recommended.get("agreement_at_least", 0)
    # The lower end of an interval around the share that agreed, with four digits.
    most = agreed / tokens + 1e-4 if "agreed" in recommended else 1
    _check_share("measured.recommended.agreement_at_least", proven, min(most, 1))


def _check_share(key: str, value: object, most: float = 1) -> None:
    """Refuse anything but a number from 0 to ``most``."""
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise TidalConfigError(key, value, f"must be a number in 0..{most:.4g}")
