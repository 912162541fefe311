"""Hundreds of random engine steps: exact answers, and no block is lost."""

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.support.asking import sampling_params
from tests.support.drifting import BLOCK_SIZE, EXACT
from tests.support.engines import scheduler
from tests.support.models import random_prompt
from tests.support.watching import correcting

START = 24  # tokens from which decoding counts as polluting
LONGEST = 200


@dataclass
class Asked:
    prompt: list[int]
    max_tokens: int
    sampling: dict


@dataclass
class Walk:
    """One engine under random requests; `step` checks what must always hold."""

    llm: object
    rng: random.Random
    asked: dict[str, Asked] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    seen: Counter = field(default_factory=Counter)

    def arrive(self) -> None:
        rng = self.rng
        prompt = random_prompt(rng.randint(1, 110), seed=rng.randrange(9))
        if self.answers and rng.random() < 0.5:  # a follow-up turn
            past = rng.choice(list(self.answers))
            talk = self.asked[past].prompt + self.answers[past]
            prompt = talk[: rng.randint(1, len(talk))] + prompt[: rng.randint(0, 9)]
        prompt = prompt[: LONGEST - 30]
        sampling = {}
        if rng.random() < 0.3:
            sampling = {"temperature": 1.0, "seed": rng.randrange(100), "top_k": 8}
        max_tokens = rng.randint(1, min(60, LONGEST - len(prompt)))
        name = str(len(self.asked))
        self.asked[name] = Asked(prompt, max_tokens, sampling)
        self.llm.llm_engine.add_request(
            name, {"prompt_token_ids": prompt}, sampling_params(max_tokens, **sampling)
        )

    def abort(self) -> None:
        running = scheduler(self.llm).running
        split = [request for request in running if _is_split(request)]
        if running:
            request = self.rng.choice(split or running)
            self.seen["aborted"] += 1
            self.seen["aborted while split"] += bool(split)
            name = next(n for n in self.asked if request.request_id.startswith(f"{n}-"))
            self.llm.llm_engine.abort_request([name])

    def step(self) -> None:
        core = scheduler(self.llm)
        waiting = [r.num_preemptions for r in core.requests.values()]
        for output in self.llm.llm_engine.step():
            if output.finished:
                self.answers[output.request_id] = list(output.outputs[0].token_ids)
                self.seen["cached tokens"] += output.num_cached_tokens or 0
        self.seen["steps"] += 1
        now = [r.num_preemptions for r in core.requests.values()]
        self.seen["preempted"] += max(sum(now) - sum(waiting), 0)
        self.check()

    def check(self) -> None:
        core = scheduler(self.llm)
        known = {request.request_id for request in core.running}
        assert core._clean_positions.keys() == known
        for request in core.running:
            clean, computed = core.clean_position(request), request.num_computed_tokens
            assert START - 1 <= clean <= computed or clean == computed
            (blocks,) = core.kv_cache_manager.get_blocks(request.request_id).blocks
            hashed = [block.block_hash is not None for block in blocks]
            assert hashed == sorted(hashed, reverse=True)
            assert sum(hashed) == clean // BLOCK_SIZE
            assert all(block.ref_cnt > 0 for block in blocks)
            self.seen["split steps"] += _is_split(request)


@pytest.mark.parametrize(("interval", "max_num_batched_tokens"), [(6, 64), (17, 20)])
def test_random_walk(small_engine, dense_answers, interval, max_num_batched_tokens):
    llm = small_engine(
        EXACT | {"correction_interval": 8},
        max_model_len=256,
        num_gpu_blocks_override=24,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=5,
    )
    pool = scheduler(llm).kv_cache_manager.block_pool
    num_free = pool.get_num_free_blocks()
    walk = Walk(llm, random.Random(interval))
    with correcting(llm, interval, START) as counters:
        while walk.seen["steps"] < 300:
            # Calm and busy times.
            if walk.rng.random() < (0.25 if walk.seen["steps"] // 25 % 2 else 0.08):
                walk.arrive()
            split = any(map(_is_split, scheduler(llm).running))
            if walk.rng.random() < (0.2 if split else 0.02):
                walk.abort()
            walk.step()
        while llm.llm_engine.has_unfinished_requests():
            walk.step()
        llm.llm_engine.step()
    print(dict(walk.seen), counters)

    seen = walk.seen
    assert counters.corrections > 20
    for what in ("preempted", "aborted", "cached tokens"):
        assert seen[what] > 0, what
    # Too long for one step of the second walk: split.
    if max_num_batched_tokens == 20:
        assert seen["split steps"] > 0
        assert seen["aborted while split"] > 0
    assert pool.get_num_free_blocks() == num_free
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)
    assert not scheduler(llm).requests

    finished = [name for name in walk.answers if _is_whole(walk, name)]
    assert len(finished) > 20
    for sampling in {str(walk.asked[name].sampling) for name in finished}:
        alike = [n for n in finished if str(walk.asked[n].sampling) == sampling]
        asked = [walk.asked[name] for name in alike]
        wanted = dense_answers(
            [one.prompt for one in asked],
            [one.max_tokens for one in asked],
            **asked[0].sampling,
        )
        assert [walk.answers[name] for name in alike] == wanted


def _is_split(request) -> bool:
    """Whether a correction, or the way back from a preemption, takes many steps."""
    return request.is_prefill_chunk and request.num_output_tokens > 0


def _is_whole(walk: Walk, name: str) -> bool:
    return len(walk.answers[name]) == walk.asked[name].max_tokens
