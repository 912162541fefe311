"""A pytest plug-in for GPU runs: picks an implementation's tests, keeps each outcome.

    pytest -p benchmarks.gpu.parity --implementation cuda --records FILE tests/kernels

A test belongs to the implementation that its parameters name: those of `IMPLEMENTATION`
below. Where no test has passed, the run has failed, whatever pytest says.
"""

import json
from pathlib import Path

import pytest

from benchmarks import records

# Parameters of tests/kernels that say what is tested, and what they say.
NAMING = ("kernels", "kernels_of_module", "requested", "engine_kernels")
OTHERS = {"cuda": {"triton", "emulation"}, "triton": {"cuda", "auto", "emulation"}}
REPORTER = "tidal-parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("GPU runs")
    group.addoption("--implementation", choices=list(OTHERS), default="cuda")
    group.addoption("--records", type=Path, default=Path("parity.jsonl"))
    group.addoption("--setups", type=json.loads, help="a JSON list of parts of ids")
    group.addoption(
        "--rehearse", action="store_true", help="without a GPU: only collect and skip"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that starts the others
        config.pluginmanager.register(Reporter(config), REPORTER)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    name, setups = config.option.implementation, config.option.setups
    kept = [item for item in items if _tested(item).isdisjoint(OTHERS[name])]
    if setups is not None:
        for setup in setups:
            if not any(_has(item, setup) for item in kept):
                raise pytest.UsageError(f"--setups: no test has {setup!r} in its id")
        chosen = setups[:1] if config.option.rehearse else setups
        kept = [
            item
            for item in kept
            if any(_has(item, setup) for setup in chosen) or "graph" in item.nodeid
        ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _tested(item: pytest.Item) -> set[str]:
    """The implementations that a test's parameters name."""
    params = getattr(item, "callspec", None)
    given = params.params if params is not None else {}
    return {given[name] for name in NAMING if name in given}


def _has(item: pytest.Item, setup: str) -> bool:
    """Whether a set-up's name is one whole part of a test's id."""
    params = getattr(item, "callspec", None)
    return params is not None and setup in params.id.split("-")


class Reporter:
    """Writes a record for each test, and one for all of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.out: Path = config.option.records
        self.about = {"benchmark": "parity", "implementation": None}
        self.about["implementation"] = config.option.implementation
        self.rehearse: bool = config.option.rehearse
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        record = self.about | {"test": report.nodeid, "outcome": report.outcome}
        record["seconds"] = round(report.duration, 3)
        if report.failed:
            record["error"] = str(report.longrepr)[-2000:]
        records.append(self.out, record)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        counts = {f"num_{outcome}": n for outcome, n in self.counts.items()}
        records.append(self.out, self.about | counts)
        enough = "skipped" if self.rehearse else "passed"
        if not self.counts["passed"] and not self.counts[enough]:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
        elif session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK
