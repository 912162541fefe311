"""When a speed-up may be told, and when the machine was too busy."""

import subprocess
import sys
from pathlib import Path

import pytest

from tidal_vllm.fair_timing import Race, waiting_and_running


@pytest.mark.parametrize(
    "dense, sparse, told",
    [
        ([4.0, 4.1, 3.9, 4.0, 4.0], [2.0] * 5, 2.0),
        ([4.0, 4.0, 4.0, 4.0, 40.0], [2.0, 20.0, 2.0, 2.0, 2.0], 2.0),
        ([1.0] * 5, [2.0] * 5, 0.5),
        ([3.0], [2.0], 1.5),
    ],
    ids=["quiet", "an_outlier_each", "slower", "one_trial"],
)
def test_tells_the_median(dense, sparse, told):
    race = Race(dense, sparse, waited=0.1, ran=10.0)
    assert race.speed_up == pytest.approx(told)
    assert not race.reason_unclear()


def test_trials_that_disagree_are_no_speed_up():
    race = Race([4.0, 4.0, 4.0, 9.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0])
    assert race.reason_unclear().endswith("the trials range from 2.00x to 4.50x")


def test_waiting_for_a_core_is_no_speed_up():
    race = Race([4.0] * 5, [2.0] * 5, waited=3.0, ran=7.0)
    assert "waiting for a core 30 % of its time" in race.reason_unclear()


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this kernel keeps no such time"
)
def test_counts_the_time_of_processes_below():
    code = "import sys; sum(range(2_000_000)); print(flush=True); sys.stdin.read()"
    before = waiting_and_running()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        after = waiting_and_running()
    assert sum(after) > sum(before)
