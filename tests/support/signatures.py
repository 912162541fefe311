"""What the tests of vLLM's insides ask of a function."""

import inspect
from collections.abc import Callable
from typing import Any


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of the function's parameters, in order."""
    return list(inspect.signature(function).parameters)
