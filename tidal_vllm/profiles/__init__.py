"""Known models' layer roles, and how the profile of a model is found.

A profile is one JSON file: ``name``, ``models`` (globs of model names),
``num_hidden_layers``, ``dense_layers``, ``select_layers``, ``source`` (where each
number came from), if useful ``notes`` and settings of ``TidalConfig`` such as
``token_budget``. Layers are 0-based. One that ``tidal-vllm calibrate`` wrote also has
``model``, ``config_sha256``, ``measured``, ``versions`` and ``checksum``. Knows neither
torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tidal_vllm.config import TidalConfig
from tidal_vllm.profiles.fingerprint import checksum
from tidal_vllm.validators import TidalConfigError, check_int, check_layers, suggestion

PACKAGED_DIR = Path(__file__).parent
PROJECT_DIR = Path("tidal_profiles")
USER_DIR = "~/.config/tidal_vllm/profiles"

_KEY = "tidal.profile"
_REQUIRED = (
    "name",
    "models",
    "num_hidden_layers",
    "dense_layers",
    "select_layers",
    "source",
)
# Settings that a profile may recommend; what the user says wins over them.
SETTINGS = (
    "token_budget",
    "select_block_size",
    "scope",
    "sink_tokens",
    "recent_fraction",
    "correction_interval",
)
_MEASURED = ("model", "config_sha256", "measured", "versions", "checksum")
_OPTIONAL = ("notes", *SETTINGS, *_MEASURED)


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
        config_sha256: Of the model measured, see ``fingerprint``; or empty.
        measured: What calibration found, for people; or empty.
        versions: What it ran on; or empty.
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

    def specificity(self, model_names: Sequence[str]) -> int:
        """Most literal characters of a glob that fits one of the names; 0: none."""
        return max(
            (
                sum(char not in "*?" for char in glob)
                for glob in self.models
                for name in model_names
                if fnmatch.fnmatchcase(name.lower(), glob.lower())
            ),
            default=0,
        )

    def misfit(self, model: str, num_layers: int, config_sha256: str) -> str | None:
        """Say why this is no profile for a model; None: it is one.

        Args:
            model: vLLM's model name; counts for a measured profile only.
            config_sha256: The model's; empty where it is not known, and unchecked.
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
        return self._doubt()

    def _doubt(self) -> str | None:
        """Say why the evidence of a measured profile does not do; None: it does."""
        shown = self.measured.get("recommended"), self.measured.get("max_loss")
        try:
            proven, wanted = float(shown[0]["agreement_at_least"]), 1 - float(shown[1])
            tokens = int(shown[0]["tokens"])
        except (KeyError, TypeError, ValueError):
            return "does not say how sure what it recommends is"
        if proven >= wanted - 1e-4:  # written with four digits
            return None
        return (
            f"rests on {tokens} tokens, which prove an agreement of {proven:.1%} with "
            f"dense attention where {wanted:.1%} was asked for"
        )


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
        config_sha256: The model's, see ``fingerprint``; empty: unchecked.

    Returns:
        The profile, or None where automatic search knows none; see
        ``near_miss`` for one that nearly fits.

    Raises:
        TidalConfigError: Unknown name; missing, malformed, truncated or changed file;
            an explicit profile for another layer count, or measured on another model.
    """
    if config_profile is None:
        for profile in _matches(model, search_dirs):
            if profile.misfit(model, num_layers, config_sha256) is None:
                return profile
        return None
    if config_profile.lower().endswith(".json") or "/" in config_profile:
        profile = load_profile(os.path.expanduser(config_profile))
    else:
        profile = by_name(config_profile, search_dirs)
    reason = profile.misfit(model, num_layers, config_sha256)
    if reason is not None:
        wanted = f"must be a profile with num_hidden_layers = {num_layers}"
        if profile.config_sha256:
            wanted += f", calibrated on this model: tidal-vllm calibrate {model}"
        raise TidalConfigError(_KEY, config_profile, f"{reason}: {wanted}")
    return profile


def near_miss(
    model: str,
    num_layers: int,
    search_dirs: Sequence[Path] | None = None,
    config_sha256: str = "",
) -> str | None:
    """Say which profile knows the model's name but does not fit it, if any."""
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


def default_search_dirs() -> tuple[Path, ...]:
    """The project's folder, the user's and the packaged one."""
    return PROJECT_DIR, Path(os.path.expanduser(USER_DIR)), PACKAGED_DIR


def load_profile(path: str | Path) -> Profile:
    """Read one file.

    Raises:
        TidalConfigError: No such file, a folder, unreadable, not JSON (with line and
            column), a missing, unknown or mistyped key, contradictory layers.
    """
    shown = str(path)
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TidalConfigError(
            _KEY, shown, "no such file; must be an existing .json file"
        ) from None
    except IsADirectoryError:
        raise TidalConfigError(
            _KEY, shown, "is a folder; must be a .json file"
        ) from None
    except (OSError, ValueError) as error:
        allowed = f"cannot be read ({error}); must be a UTF-8 .json file"
        raise TidalConfigError(_KEY, shown, allowed) from None
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        allowed = (
            f"is not valid JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}; must be a JSON object"
        )
        raise TidalConfigError(_KEY, shown, allowed) from None
    return _parse(fields, path, shown)


def _parse(fields: Any, path: Path, shown: str) -> Profile:
    """Check the keys, types and layers of a file's content."""
    known = _REQUIRED + _OPTIONAL
    if not isinstance(fields, dict):
        allowed = f"must be a JSON object with keys {', '.join(_REQUIRED)}"
        raise TidalConfigError(_KEY, shown, f"{allowed}, not {type(fields).__name__}")
    _check_untouched(fields, shown)
    for key in fields:
        if key not in known:
            allowed = f"unknown key {key!r}{suggestion(key, known)}"
            allowed += f"; the keys are {', '.join(known)}"
            raise TidalConfigError(_KEY, shown, allowed)
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        allowed = f"lacks {', '.join(missing)}; must have {', '.join(_REQUIRED)}"
        raise TidalConfigError(_KEY, shown, allowed)
    try:
        return Profile(**_checked(fields), path=path)
    except TidalConfigError as error:
        raise TidalConfigError(_KEY, shown, f"in this file {error}") from None


def _check_untouched(fields: dict[str, Any], shown: str) -> None:
    """Refuse a measured profile that is not as calibration wrote it."""
    given = [key for key in _MEASURED if key in fields]
    if not given:
        return
    missing = [key for key in _MEASURED if key not in fields]
    cure = (
        "calibrate again, or, to keep layers and settings that nobody measured, remove "
        + ", ".join(given)
    )
    if missing:
        reason = f"has {', '.join(given)} but lacks {', '.join(missing)}: truncated"
    elif fields["checksum"] != checksum(fields):
        reason = "was changed after it was measured: its checksum does not fit"
    else:
        return
    raise TidalConfigError(_KEY, shown, f"{reason}; {cure}")


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    for key in ("name", "source", "notes", "model", "config_sha256"):
        value = fields.get(key, "")
        if not isinstance(value, str) or (key in _REQUIRED and not value.strip()):
            raise TidalConfigError(key, value, "must be a non-empty string")
    models = fields["models"]
    if not isinstance(models, list) or not all(
        isinstance(glob, str) and glob.strip("*? ") for glob in models
    ):
        allowed = 'must be a list of model name globs such as ["llama-3.1-8b*"]'
        raise TidalConfigError("models", models, allowed)
    count = fields["num_hidden_layers"]
    check_int("num_hidden_layers", count, 1, "must be an integer >= 1")
    layers = {key: check_layers(key, fields[key]) for key in _REQUIRED[3:5]}
    for key, indices in layers.items():
        if indices and indices[-1] >= count:
            allowed = f"must be in 0..{count - 1}: num_hidden_layers is {count}"
            raise TidalConfigError(key, fields[key], allowed)
    both = sorted({*layers["dense_layers"]} & {*layers["select_layers"]})
    if both:
        allowed = f"overlaps dense_layers in {both}; must name other layers"
        raise TidalConfigError("select_layers", fields["select_layers"], allowed)
    for key in ("measured", "versions"):
        if not isinstance(fields.get(key, {}), dict):
            raise TidalConfigError(key, fields[key], "must be a JSON object")
    settings = {key: fields[key] for key in SETTINGS if key in fields}
    TidalConfig(**settings)
    kept = {f.name for f in dataclasses.fields(Profile)} & fields.keys()
    return {
        **{key: fields[key] for key in kept},
        **layers,
        "models": tuple(models),
        "settings": settings,
    }


def model_names(model: str) -> tuple[str, ...]:
    """What a model may be called; a hub snapshot's folder is only a hash."""
    parts = [part for part in model.split("/") if part]
    hub = [p.split("--")[-1] for p in parts if p.startswith("models--")]
    last = parts[-1:] if parts else []
    if os.path.isdir(model):  # a link such as models/current names its target
        last.append(os.path.basename(os.path.realpath(model)))
    return tuple(hub or last)


def _matches(model: str, search_dirs: Sequence[Path] | None) -> Iterator[Profile]:
    """Profiles that fit the model's name, best first."""
    names = model_names(model)
    for folder in _folders(search_dirs):
        fitting = [p for p in _load_folder(folder) if p.specificity(names)]
        yield from sorted(fitting, key=lambda p: (-p.specificity(names), p.name))


def by_name(name: str, search_dirs: Sequence[Path] | None) -> Profile:
    profiles = list_profiles(search_dirs)
    for profile in profiles:
        if profile.name.lower() == name.lower():
            return profile
    known = sorted({profile.name for profile in profiles})
    allowed = (
        f"unknown profile{suggestion(name, known)}; must be a path to a .json file "
        f"or one of {', '.join(known)}"
    )
    raise TidalConfigError(_KEY, name, allowed)


def _folders(search_dirs: Sequence[Path] | None) -> Sequence[Path]:
    return default_search_dirs() if search_dirs is None else search_dirs


def _load_folder(folder: Path) -> list[Profile]:
    return [load_profile(path) for path in sorted(Path(folder).glob("*.json"))]
