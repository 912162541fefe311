"""Builds of the kernels that a GPU measured: a commit, and what was changed in it."""

FIRST = "6add55e"
ATTEND, SELECT, TRITON = "98ef302 -DTIDAL_KEEP_BLOCK_LSE=1", "a544ee9", "45ff83b"
"""Those whose kernels are the project's: dense and sparse decoding by CUDA, choosing by
CUDA, and all ops by Triton."""
PRESENT = (ATTEND, SELECT, TRITON)
