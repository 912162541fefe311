"""What an interrupted run leaves, and how an interruption arrives."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.calibrate.state import State
from tidal_vllm.validators import TidalConfigError


def test_state_resumes_and_forgets_what_was_cut_off(tmp_path):
    folder, manifest = tmp_path / "s", {"model": "m", "budget": (1, 2)}
    state = State(folder, manifest, restart=False)
    state.save_replies({"dense 0": {"token_ids": [1]}})
    state.save_recorded(0, {"worst": np.arange(3.0)})
    with (folder / "replies.jsonl").open("a") as log:
        log.write('{"key": "dense 1", "re')
    again = State(folder, manifest, restart=False)
    assert again.num_replies == 1 and again.reply("dense 1") is None
    assert again.recorded(0)["worst"].tolist() == [0, 1, 2]
    again.save_replies({"dense 1": {"token_ids": [2]}})
    lines = (folder / "replies.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["dense 0", "dense 1"]
    again.remove()
    assert not folder.exists()


def test_state_of_another_request_is_refused_or_thrown_away(tmp_path):
    folder = tmp_path / "s"
    State(folder, {"model": "m", "budget": 64}, False).save_replies({"a": {}})
    with pytest.raises(TidalConfigError, match="asked for other budget: repeat"):
        State(folder, {"model": "m", "budget": 32}, restart=False)
    assert State(folder, {"model": "m", "budget": 32}, restart=True).num_replies == 0


def test_a_folder_that_is_no_state_is_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TidalConfigError, match="no interrupted calibration"):
        State(tmp_path, {}, restart=True)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_drops_is_raised_with_the_next_answer(
    tmp_path, number
):
    before = signal.getsignal(number)

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # the handler runs in here, and what it raises is dropped

    with Interrupts() as interrupts:
        state = State(tmp_path / "state", {"model": "m"}, False, interrupts)
        state.save_replies({"a": {}})
        dropped = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "unraisablehook", dropped.append)
            Finalized()
        assert [hook.exc_type for hook in dropped] == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            state.save_replies({"b": {}})
    assert state.num_replies == 2
    assert interrupts.exit_code() == 128 + number
    assert signal.getsignal(number) is before


def test_a_background_job_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
