"""The built-in prompts, and what an interrupted run leaves."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from tidal_vllm.calibrate.grid import settings_grid
from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.calibrate.prompts import Prompt, built_in, from_file
from tidal_vllm.calibrate.state import State
from tidal_vllm.config import TidalConfig
from tidal_vllm.validators import TidalConfigError


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, with `encode` and `decode` as a model's tokenizer has them."""

    class Bytes:
        def encode(self, text):
            return [1, *text.encode()]

        def decode(self, ids):
            return bytes(i for i in ids if i != 1).decode()

    return Bytes()


def test_chains_have_their_answer_at_all_depths():
    made = built_in("none", None, 512, count=5, num_tokens=300)
    places = []
    for prompt in made:
        ids = list(prompt.token_ids)
        assert len(ids) == 300 and len(set(ids) & set(range(16))) == 0
        answer, asked = list(prompt.answer_ids), ids[-1]
        places.append(ids.index(asked))
        assert ids[places[-1] + 1 : places[-1] + 9] == answer
        assert ids.count(asked) == 2
        assert prompt.is_right([*answer, 0], None)
        assert not prompt.is_right(answer[::-1], None)
    assert places == sorted(places) and places[0] < 50 and places[-1] > 230
    assert made[0] != made[1]


@pytest.mark.parametrize("num_tokens", [600, 2000])
def test_prose_holds_its_needles(tokenizer, num_tokens):
    made = built_in("none", tokenizer, 256, count=6, num_tokens=num_tokens)
    assert {prompt.kind for prompt in made} == {"needle", "two hops"}
    for prompt in made:
        assert num_tokens - 80 < len(prompt.token_ids) <= num_tokens
        text = tokenizer.decode(prompt.token_ids)
        number, asked = prompt.answer_text, text.split()[-2]
        if prompt.kind == "two hops":
            (line,) = [s for s in text.split(". ") if s.startswith(f"{asked} has the")]
            asked = line.split()[-1].rstrip(".")
        assert f"The secret number of {asked} is {number}." in text
        assert prompt.is_right(tokenizer.encode(f" {number}."), tokenizer.decode)
        assert not prompt.is_right(tokenizer.encode(" 12"), tokenizer.decode)


def test_prose_that_cannot_be_that_short(tokenizer):
    with pytest.raises(TidalConfigError, match="the question alone takes"):
        built_in("none", tokenizer, 256, count=1, num_tokens=60)


def test_a_file_of_text(tokenizer):
    lines = [{"prompt": "ab", "answer": "c"}, {"prompt_token_ids": [5, 6]}]
    first, second = from_file("f", lines, tokenizer, 256)
    assert first.token_ids == (1, 97, 98) and first.is_right([99], tokenizer.decode)
    assert second == Prompt("file", (5, 6)) and not second.judged


def test_one_thing_changes_along_the_grid():
    main = TidalConfig(token_budget=512)
    grid = settings_grid(main, longest=2000, kv_block_size=16)
    assert grid[0] == main and len(set(grid)) == len(grid)
    assert {c.token_budget for c in grid} == {128, 256, 512, 1024}
    assert {c.select_block_size for c in grid} == {4, 16}
    assert len({c.scope for c in grid}) == 3
    for other in grid[1:]:
        fields = ("token_budget", "select_block_size", "scope")
        assert sum(getattr(other, f) != getattr(main, f) for f in fields) == 1
    short = settings_grid(main, longest=600, kv_block_size=16)
    assert max(c.token_budget for c in short) == 512


# State


def test_state_resumes_and_forgets_what_was_cut_off(tmp_path):
    folder, manifest = tmp_path / "s", {"model": "m", "budget": (1, 2)}
    state = State(folder, manifest, restart=False)
    state.save_reply("dense 0", {"token_ids": [1]})
    state.save_recorded(0, {"worst": np.arange(3.0)})
    with (folder / "replies.jsonl").open("a") as log:
        log.write('{"key": "dense 1", "re')
    again = State(folder, manifest, restart=False)
    assert again.num_replies == 1 and again.reply("dense 1") is None
    assert again.recorded(0)["worst"].tolist() == [0, 1, 2]
    again.save_reply("dense 1", {"token_ids": [2]})
    lines = (folder / "replies.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["dense 0", "dense 1"]
    again.remove()
    assert not folder.exists()


def test_state_of_another_request_is_refused_or_thrown_away(tmp_path):
    folder = tmp_path / "s"
    State(folder, {"model": "m", "budget": 64}, False).save_reply("a", {})
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
        state.save_reply("a", {})
        dropped = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "unraisablehook", dropped.append)
            Finalized()
        assert [hook.exc_type for hook in dropped] == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            state.save_reply("b", {})
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
