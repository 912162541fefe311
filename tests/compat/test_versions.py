"""vLLM outside the supported range: refused, with what was found and is allowed."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.processes import run_python, write_distribution
from tidal_vllm.versions import SUPPORTED_VLLM, TESTED, unsupported_vllm

pytestmark = pytest.mark.compat


@pytest.mark.parametrize(
    "found", ["0.32", "0.32.0", "0.32.4", "0.33.0", "0.33.1.post1", "0.32.0+cpu"]
)
def test_supports(found):
    assert unsupported_vllm(found) is None


@pytest.mark.parametrize(
    "found", ["0.31.9", "0.34.0", "0.34.0rc1", "0.35.0", "1.0.0", "0.3", "0.4.2"]
)
def test_supports_not(found):
    reason = unsupported_vllm(found)
    assert f"vllm {found} is outside the supported range" in reason
    assert SUPPORTED_VLLM in reason


@pytest.mark.parametrize("found", ["dev", "", "0", "0.x", "main.1"])
def test_supports_nothing_that_is_no_release(found):
    reason = unsupported_vllm(found)
    assert f"vllm {found}: not a release number" in reason
    assert SUPPORTED_VLLM in reason


def test_looks_at_the_installed_one():
    assert unsupported_vllm() is None


def test_ci_runs_on_the_installed_one_and_its_torch():
    torch = importlib.metadata.version("torch").split("+")[0]
    assert TESTED[importlib.metadata.version("vllm")] == torch


def test_says_that_vllm_is_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("tidal_vllm.versions.version", missing)
    assert unsupported_vllm() == (
        f"vLLM is not installed: tidal_vllm needs vllm{SUPPORTED_VLLM}"
    )


def test_the_range_is_that_of_the_package():
    required = importlib.metadata.requires("tidal_vllm")
    vllm = next(line for line in required if line.startswith("vllm"))
    assert sorted(vllm.removeprefix("vllm").split(",")) == sorted(
        SUPPORTED_VLLM.split(",")
    )


def test_every_python_of_ours_is_one_of_vllms():
    """So that pip names the Python, where it is too old, and not vLLM's releases."""
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    (ours,) = re.findall(r'^requires-python = "(.*?)"', pyproject.read_text(), re.M)
    ours = SpecifierSet(ours)
    vllms = SpecifierSet(importlib.metadata.metadata("vllm")["Requires-Python"])
    pythons = [f"3.{minor}.9" for minor in range(8, 20)]
    assert {*ours.filter(pythons)} <= {*vllms.filter(pythons)}
    assert "3.11.9" in ours


SELECT = """
from vllm.platforms import current_platform
print("platform:", type(current_platform).__name__, flush=True)
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
try:
    AttentionBackendEnum["TIDAL"].get_class()
except ImportError as error:
    print("selected:", error)
"""


@pytest.fixture(scope="module")
def beside_vllm_0_35(tmp_path_factory) -> list[str]:
    """What a process prints in which vLLM claims to be 0.35.0."""
    folder = write_distribution(tmp_path_factory.mktemp("later"), "vllm", "0.35.0")
    done = run_python(SELECT, first_on_path=folder)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Traceback" not in done.stdout
    return done.stdout.splitlines()


REASON = (
    "vllm 0.35.0 is outside the supported range: tidal_vllm uses internals of "
    f"vllm{SUPPORTED_VLLM}"
)


@pytest.mark.parametrize(
    "who", ["The TIDAL CPU platform is off:", "The TIDAL attention backend is off:"]
)
def test_the_plugins_say_why_they_are_off(beside_vllm_0_35, who):
    assert sum(f"{who} {REASON}" in line for line in beside_vllm_0_35) == 1


def test_our_platform_does_not_take_over(beside_vllm_0_35):
    assert "platform: UnspecifiedPlatform" in beside_vllm_0_35


def test_selecting_the_backend_says_why_not(beside_vllm_0_35):
    assert any(line.startswith(f"selected: {REASON}") for line in beside_vllm_0_35)
