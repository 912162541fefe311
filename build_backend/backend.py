"""The build backend: setuptools', and what an isolated build of the kernels needs.

`TIDAL_BUILD_CUDA=1` asks for the CUDA kernels (see setup.py). A build environment of
its own has none of torch, cmake and nvcc, so they become requirements of that build;
what is found without them is not required again.
"""

import os
import runpy
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

CUDA_BUILD = Path(__file__).parents[1] / "tidal_vllm/kernels/cuda_build.py"


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_tools()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_tools()]


def _tools():
    """Requirements for what a demanded build of the kernels does not find."""
    if os.environ.get("TIDAL_BUILD_CUDA") != "1":
        return []
    return runpy.run_path(str(CUDA_BUILD))["missing_requirements"]()
