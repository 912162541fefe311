"""Triton's interpreter, more than twice as fast: it patches its language once.

As it comes, it goes through all of `triton.language` at each launch and each time that
one function calls another, which takes longer than what our kernels compute.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import interpreter


class _StaysPatched:
    def restore(self) -> None:
        """Only interpreted kernels use the language in such a process."""


def patch_once() -> None:
    """Call it in a process that was started with TRITON_INTERPRET=1."""
    patch, patched = interpreter._patch_lang, set()

    def patch_lang(fn: Callable) -> _StaysPatched:
        # What is patched depends on the names that a kernel's file knows.
        if fn.__module__ not in patched:
            patch(fn)
            patched.add(fn.__module__)
        return _StaysPatched()

    interpreter._patch_lang = patch_lang


def record_variants() -> set[tuple]:
    """The variants of our kernels that a GPU would compile, as they are launched.

    Triton compiles a kernel anew for other dtypes, constants and options, and for an
    integer or an address that is 1 or a multiple of 16 and was not before.
    """
    run, found = interpreter.InterpretedFunction.run, set()

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.fn.__module__.startswith("tidal_vllm"):
            found.add(_variant(self, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    interpreter.InterpretedFunction.run = recorded
    return found


def _variant(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The kernel's name, and what is compiled into it of each argument."""
    signature = inspect.signature(kernel.fn)
    options = {k: v for k, v in kwargs.items() if k not in signature.parameters}
    given = {k: v for k, v in kwargs.items() if k in signature.parameters}
    free = kernel.kwargs["do_not_specialize"] or ()
    key: list[tuple] = [(name, value) for name, value in options.items()]
    for name, value in signature.bind(*args, **given).arguments.items():
        if signature.parameters[name].annotation is not inspect.Parameter.empty:
            key.append((name, value))  # tl.constexpr
        elif isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name not in free:
            key.append((name, value == 1, value % 16 == 0, value >= 1 << 31))
        else:
            key.append((name, type(value)))
    return (kernel.fn.__name__, *((k, *map(str, v)) for k, *v in key))
