"""Batches of prompts, further prompts that run out, and what is not asked again."""

from types import SimpleNamespace

import pytest

from tidal_vllm.calibrate.answers import Answers
from tidal_vllm.calibrate.engine import MOST_AT_ONCE, CalibrationEngine, Reply
from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.calibrate.prompts import Prompt
from tidal_vllm.calibrate.state import State

PROMPTS = tuple(Prompt("file", (n, 7)) for n in range(5))
TOKENS = (1, 2, 3)


class Engine:
    """Takes two prompts at once; under `{"wrong": n}` prompt n disagrees."""

    layers = (0, 1, 2)

    def __init__(self):
        self.asked = []

    def record(self, prompt, max_tokens, settings, folder):
        return self.answers([prompt], [max_tokens])[0], {"worst": [0.0]}

    def batches(self, lengths):
        count = len(lengths)
        return [range(i, min(i + 2, count)) for i in range(0, count, 2)]

    def answers(self, prompts, max_tokens):
        return [Reply(TOKENS, (True,) * 3, (0.0,) * 3) for _ in prompts]

    def trials(self, prompts, tokens, setting):
        self.asked.append((setting["wrong"], [prompt[0] for prompt in prompts]))
        return [
            Reply(TOKENS, (True, prompt[0] != setting["wrong"], True), (0.0, -1.0, 0.0))
            for prompt in prompts
        ]


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def make_answers(tmp_path, engine):
    def make(further=None, interrupts=None) -> Answers:
        job = SimpleNamespace(
            prompts=PROMPTS, further=further, decode_tokens=3, decode=None, max_loss=0.1
        )
        state = State(tmp_path / "state", {}, False, interrupts)
        answers = Answers(job, state, lambda: engine)
        answers.record([])
        return answers

    return make


def test_each_batch_is_tried_under_all_settings(make_answers, engine):
    """While its prompts are in the prefix cache; each setting has its own numbers."""
    found = make_answers().measure("", [{"wrong": 1}, {"wrong": 9}])
    batches = [[0, 1], [2, 3], [4]]
    assert engine.asked == [(wrong, b) for b in batches for wrong in (1, 9)]
    assert [(m.steps, m.agreed) for m in found] == [(10, 9), (10, 10)]
    assert [m.lost_logprob for m in found] == [0.5, 0.5]


def test_what_is_known_is_not_asked_again(make_answers, engine):
    make_answers().measure("", [{"wrong": 9}], count=3)
    engine.asked.clear()
    make_answers().measure("", [{"wrong": 9}, {"wrong": 8}])
    assert engine.asked == [(8, [0, 1]), (9, [3]), (8, [2, 3]), (9, [4]), (8, [4])]


def test_an_interrupt_loses_no_answer_of_a_batch(make_answers, engine):
    class Pressed(Interrupts):
        def check(self):
            if engine.asked:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_answers(interrupts=Pressed()).measure("", [{"wrong": 9}])
    engine.asked.clear()
    make_answers().measure("", [{"wrong": 9}])
    assert engine.asked == [(9, [2, 3]), (9, [4])]


def test_confirming_ends_where_there_are_no_more_prompts(make_answers):
    """35 tokens would be needed; 5 + 2 prompts give 14."""

    def further(number):
        return Prompt("text", (number, 7)) if number < 7 else None

    found = make_answers(further).confirm({"wrong": 99})
    assert (found.prompts, found.steps) == (7, 14)


def test_batches_fit_the_kv_cache():
    """1,024 blocks of 16 tokens for each of two groups of layers."""
    spec = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    cache = SimpleNamespace(num_blocks=2048, kv_cache_groups=[spec, spec])
    core = SimpleNamespace(scheduler=SimpleNamespace(kv_cache_config=cache))
    engine = object.__new__(CalibrationEngine)
    engine._llm = SimpleNamespace(
        llm_engine=SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
    )
    assert engine.batches([]) == []
    assert engine.batches([8000, 8000, 8000]) == [range(2), range(2, 3)]
    assert engine.batches([8192, 8192]) == [range(1), range(1, 2)], "no room for rests"
    assert engine.batches([20_000, 10]) == [range(1), range(1, 2)]
    assert list(map(len, engine.batches([10] * 40))) == [MOST_AT_ONCE, MOST_AT_ONCE, 8]
