"""Triton's interpreter, more than twice as fast: it patches its language once.

As it comes, it goes through all of `triton.language` at each launch and each time that
one function calls another, which takes longer than what our kernels compute.
"""

from collections.abc import Callable

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
