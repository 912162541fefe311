"""What holds for every run: its environment, its tiers, and that it leaves nothing.

`tests/README.md` documents the tiers.
"""

import os
import signal
from collections import Counter

import pytest

from tests.support.leftovers import Leftovers

# The models are tiny: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# A dependency of vLLM would start building CUDA programs behind its back.
os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"
# All models are built by code: a name that is no folder is an error, not a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A background job ignores SIGINT, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.support.fixtures",)

NOT_QUICK = ("extended", "serial")
_not_run = pytest.StashKey[Counter]()
_leftovers = pytest.StashKey[Leftovers]()
_left = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help="the newcomer's tier: without tests marked extended or serial",
    )


def _is_worker(config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config):
    config.stash[_not_run] = Counter()
    config.stash[_left] = []
    # pytest-xdist would begin with the files of the most tests, and so end with those
    # whose few tests take longest.
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Before pytest-xdist starts its workers, which inherit the environment."""
    if not _is_worker(session.config):
        session.config.stash[_leftovers] = Leftovers()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("quick"):
        return
    left = [i for i in items if any(map(i.get_closest_marker, NOT_QUICK))]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]
    config.stash[_not_run].update(item.nodeid.split("/")[1] for item in left)
    if _is_worker(config):
        config.workeroutput["not_run"] = dict(config.stash[_not_run])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Of pytest-xdist: every worker leaves out the same tests."""
    found = getattr(node, "workeroutput", {}).get("not_run", {})
    node.config.stash[_not_run] = Counter(found) | node.config.stash[_not_run]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """After the workers of pytest-xdist and all fixtures have ended."""
    if _is_worker(session.config):
        return
    session.config.stash[_left] = session.config.stash[_leftovers].collect()
    if session.config.stash[_left]:
        session.exitstatus = max(session.exitstatus, pytest.ExitCode.TESTS_FAILED)


def pytest_terminal_summary(terminalreporter, config):
    if left := config.stash[_left]:
        terminalreporter.section("left behind by this run", red=True)
        for line in left:
            terminalreporter.line(line)
    if not_run := config.stash[_not_run]:
        folders = ", ".join(f"{name} {n}" for name, n in sorted(not_run.items()))
        terminalreporter.section("not run")
        terminalreporter.line(
            f"{not_run.total()} tests that take longer were not run ({folders})."
        )
        terminalreporter.line("`python3 bootstrap.py test --all` runs everything.")
