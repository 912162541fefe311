"""Checks of single values: each refuses with the key, the value and what is allowed.

Imports neither torch nor vLLM, nor anything of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_TOKENS = 2**31 - 1  # positions and block indices are int32 on the device


class TidalConfigError(ValueError):
    """A refused setting: the key, the value given and what would be allowed.

    Its arguments stay positional so that it survives pickling between vLLM's
    processes.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key, self.value, self.allowed = key, value, allowed

    def __str__(self) -> str:
        shown = repr(self.value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        return f"{self.key} = {shown}: {self.allowed}"


def check_int(key: str, value: object, minimum: int, allowed: str) -> None:
    """Refuse anything but an int (no bool, no 16.0) from ``minimum`` to MAX_TOKENS."""
    if type(value) is not int:
        raise TidalConfigError(key, value, allowed + _wrong_type(value, (int,)))
    if value > MAX_TOKENS:
        allowed += f", at most {MAX_TOKENS}"
    if not minimum <= value <= MAX_TOKENS:
        raise TidalConfigError(key, value, allowed)


def check_share(key: str, value: object, allowed: str) -> None:
    """Refuse anything but an int or a float in [0, 1)."""
    if type(value) not in (int, float):
        raise TidalConfigError(key, value, allowed + _wrong_type(value, (int, float)))
    if not 0 <= value < 1:
        raise TidalConfigError(key, value, allowed)


def check_bool(key: str, value: object) -> None:
    """Refuse anything but True and False."""
    if type(value) is not bool:
        allowed = "must be true or false" + _wrong_type(value, (bool,))
        raise TidalConfigError(key, value, allowed)


def check_choice(key: str, value: object, options: Iterable[str]) -> None:
    """Refuse anything but one of ``options``; suggest the nearest."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        allowed = "must be one of " + ", ".join(map(repr, options))
        raise TidalConfigError(key, value, allowed + suggestion(value, options))


def check_layers(key: str, value: object, alternative: str = "") -> tuple[int, ...]:
    """Return the layer indices ascending; refuse all but different ints >= 0."""
    allowed = f"must be a list of different layers >= 0 such as [2, 13]{alternative}"
    if not isinstance(value, list | tuple):
        raise TidalConfigError(key, value, allowed + _wrong_type(value, (list,)))
    for layer in value:
        if type(layer) is not int or layer < 0:
            raise TidalConfigError(key, value, f"{allowed}; {layer!r} is not one")
    repeated = sorted({layer for layer in value if value.count(layer) > 1})
    if repeated:
        raise TidalConfigError(key, value, f"{allowed}; {repeated} appears twice")
    return tuple(sorted(value))


def suggestion(given: object, known: Sequence[str]) -> str:
    """Say which known word was probably meant: "; did you mean 'x'?", or nothing."""
    near = difflib.get_close_matches(str(given).lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _wrong_type(value: object, types: tuple[type, ...]) -> str:
    return "" if type(value) in types else f", not a {type(value).__name__}"
