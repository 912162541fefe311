"""A GPU run: the order of its steps, their limits, and what a failure leads to."""

import json
import sys

import pytest

from benchmarks import records
from benchmarks.gpu import pack
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.run import Run, libraries
from benchmarks.gpu.steps import PART_SECONDS, STEPS, Command, Setup, Step

pytestmark = pytest.mark.extended  # a newcomer has no GPU to run on


def test_steps_stand_in_the_order_of_what_they_decide():
    names = [step.name for step in STEPS]
    first = ["device", "cuda", "attend", "select", "stack", "triton", "counters"]
    assert names == [*first, "site", "planted", "engine"]
    assert [step.part for step in STEPS] == [1] * 7 + [2] * 3


def test_each_part_ends_within_six_minutes():
    assert PART_SECONDS < 360
    limits = [sum(step.limit for step in STEPS if step.part == part) for part in (1, 2)]
    assert max(limits) <= PART_SECONDS


def test_every_named_case_is_measured(tmp_path):
    builds = (tmp_path / "_tidal_C.so", tmp_path / "_tidal_C_other.so")
    setup = Setup(tmp_path, tmp_path, builds)
    said = {s.name: [" ".join(c.words) for c in s.commands(setup)] for s in STEPS}
    shapes = "64x32768:3264 16x32768:4096 16x131072:13104 1x131072:4096"
    flash, one, other, small, fp8 = said["attend"]
    assert "flash_attn" in flash and "--kv-cache-dtype fp8" in fp8
    assert "--select-blocks 4 2 1" in small
    assert all(shapes in words for words in (flash, one, other, said["triton"][1]))
    for size in ("16x65536:16", "64x131072:16", "16x65536:4", "64x131072:4"):
        assert all(size in words for words in said["select"])
    assert "--cases 64x32768:3264 1x131072:4096" in said["stack"][0]
    assert [w.split("--correction-interval ")[1][:2] for w in said["planted"]] == [
        "0 ",
        "16",
    ]
    assert "8x32768 --quick-start" in said["engine"][0]
    (attend,) = (step for step in STEPS if step.name == "attend")
    builds_used = [c.env.get("TIDAL_CUDA_LIBRARY") for c in attend.commands(setup)]
    assert builds_used == [None, *map(str, builds), str(builds[0]), str(builds[0])]


@pytest.mark.parametrize("where", ["environment", "site", None])
def test_the_sampler_of_flashinfer_is_off_where_flashinfer_is_missing(
    tmp_path, monkeypatch, where
):
    name = "VLLM_USE_FLASHINFER_SAMPLER"
    monkeypatch.delenv(name, raising=False)
    there = where == "environment"
    monkeypatch.setattr(gpu_run, "find_spec", lambda _: object() if there else None)
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    if where == "site":
        (site / "flashinfer").mkdir()
    done = Run(Setup(tmp_path, tmp_path / "work", site=site), ())
    command = Command([])
    said = done.environment(step("engine", 2, ""), command)
    assert said.get(name) == (None if where else "0")
    assert name not in done.environment(step("attend", 1, ""), command)


def test_flash_attention_comes_out_of_a_packed_site_without_vllm(tmp_path):
    inside = tmp_path / "unpacked/vllm/vllm_flash_attn"
    inside.mkdir(parents=True)
    for package in (inside, inside.parent):
        (package / "__init__.py").write_text("raise ImportError('of vLLM')\n")
    (inside / "_vllm_fa3_C.py").write_text("print('FlashAttention 3')\n")
    interface = "from . import _vllm_fa3_C\n"
    (inside / pack.INTERFACE).write_text(interface)
    pack.write_pieces(tmp_path / "unpacked", tmp_path / "site")

    def commands(setup: Setup):
        (unpacks, *_) = attend.commands(setup)
        yield unpacks
        yield Command(["-c", "import vllm_flash_attn.flash_attn_interface"])

    (attend,) = (step for step in STEPS if step.name == "attend")
    setup = Setup(tmp_path, tmp_path / "work", site=tmp_path / "site")
    ends = Run(setup, ()).one(Step("two", 1, 60, "", commands), deadline=1e9)
    assert ends == "passed", (tmp_path / "run.log").read_text()
    assert "two      | FlashAttention 3" in (tmp_path / "run.log").read_text()
    # It is unpacked once for all steps.
    (unpacks,) = (step for step in STEPS if step.name == "site")
    assert list(unpacks.commands(setup)) == []


def step(name: str, part: int, code: str, limit: float = 60, judges=False) -> Step:
    def commands(setup: Setup):
        yield Command(["-c", code.format(out=str(setup.results))])

    return Step(name, part, limit, f"tests {name}", commands, judges)


WRITES = (
    "from benchmarks import records; from pathlib import Path;"
    "records.append(Path('{{out}}'), {})"
)


def writes(**record) -> str:
    made = json.dumps(record).replace("{", "{{").replace("}", "}}")
    return WRITES.format(made)


RIGHT = writes(benchmark="parity", implementation="cuda", num_passed=3, num_failed=0)
WRONG = {
    "a test fails": writes(benchmark="parity", implementation="cuda", num_failed=1),
    "a check fails": writes(benchmark="attend", implementation="triton", wrong="off"),
    "it ends badly": "import sys; sys.exit(3)",
    "it hangs": "import time; time.sleep(600)",
}


def run(tmp_path, *steps: Step) -> tuple[int, dict[str, str], str]:
    done = Run(Setup(tmp_path, tmp_path / "work", python=sys.executable), steps)
    code = done.everything()
    found = records.read(done.setup.results)
    statuses = {r["step"]: r["status"] for r in found if r["benchmark"] == "step"}
    return code, statuses, (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("code", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_drops_the_second_part(tmp_path, code):
    limit = 4 if "sleep" in code else 60
    first = step("cuda", 1, code, limit, judges=True)
    later = step("attend", 1, RIGHT)
    status, statuses, summary = run(tmp_path, first, later, step("engine", 2, RIGHT))
    assert status == 1
    assert statuses["attend"] == "passed"  # the first part goes on
    assert statuses["engine"] == "dropped"
    assert "| engine | dropped | 0.0 | a kernel is wrong: " in summary


def test_what_is_no_kernel_drops_nothing(tmp_path):
    rival = writes(benchmark="attend", implementation="flash_attn", wrong="off")
    device = step("device", 1, rival + "; 1 / 0")
    status, statuses, _ = run(tmp_path, device, step("engine", 2, RIGHT))
    assert (status, statuses) == (1, {"device": "failed", "engine": "passed"})


def test_what_an_earlier_run_found_drops_nothing(tmp_path):
    wrong = step("cuda", 1, WRONG["a test fails"], judges=True)
    assert run(tmp_path, wrong)[0] == 0
    steps = step("cuda", 1, RIGHT, judges=True), step("engine", 2, RIGHT)
    assert run(tmp_path, *steps)[0] == 0


def test_a_command_that_hangs_leaves_time_to_the_next(tmp_path):
    hangs = "import time; time.sleep(600)"

    def commands(setup: Setup):
        yield Command(["-c", hangs])
        yield Command(["-c", "print('reached')"])
        yield Command(["-c", "print('as well')"])

    done = Run(Setup(tmp_path, tmp_path / "work"), ())
    assert done.one(Step("two", 1, 24, "", commands), deadline=1e9) == "timed out"
    log = (tmp_path / "run.log").read_text()
    assert "two      | reached" in log and "two      | as well" in log


def test_a_part_ends_at_its_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "PART_SECONDS", 5)
    hangs = "import time; time.sleep(600)"
    _, statuses, _ = run(tmp_path, step("a", 1, hangs, 200), step("b", 1, RIGHT))
    assert statuses == {"a": "timed out", "b": "timed out"}


def test_the_build_to_judge_comes_first(tmp_path):
    for name in ("_tidal_C_stages2.so", "_tidal_C.so", "other.so"):
        (tmp_path / name).touch()
    found = [path.name for path in libraries(tmp_path)]
    assert found == ["_tidal_C.so", "_tidal_C_stages2.so"]
    with pytest.raises(SystemExit, match=r"no _tidal_C\*.so there"):
        libraries(tmp_path / "nothing")
