"""Each method in vLLM's engine, against the model that obeys its definition."""

import pytest
import torch

from tests.support.asking import generate, serve
from tests.support.engines import reconfigured
from tests.support.models import (
    LFM2,
    NUM_LAYERS,
    ROLES,
    build_random_model,
    random_prompt,
)
from tests.support.oracle import Oracle
from tests.support.watching import counters, watched
from tidal_vllm.config import SCOPES
from tidal_vllm.methods.quest import Quest
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import TidalConfigError

PROMPTS = [random_prompt(n, seed=n) for n in (40, 150, 333)]
MAX_TOKENS = 16
SETTINGS = {"token_budget": 64, "select_block_size": 8}
EVERY_LAYER = [name for name, entry in METHODS.items() if entry.every_layer]


def roles_of(method):
    """Roles for the oracle, which names every SELECT layer."""
    if method not in EVERY_LAYER:
        return ROLES
    choosing = {"select_layers": [*range(1, NUM_LAYERS)], "select_attends": "chosen"}
    return {"dense_layers": [0]} | choosing


def settings_of(method, **more):
    roles = {"dense_layers": [0]} if method in EVERY_LAYER else ROLES
    return roles | {"method": method} | SETTINGS | more


def assert_right(answers, prompts, folder, method, scope="sequence"):
    settings = SETTINGS | {"scope": scope, "method": method}
    oracle = Oracle(folder, **roles_of(method), **settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted, logprobs = oracle.generate(prompt, len(answer.token_ids))
        assert answer.token_ids == wanted
        for step, expected in zip(answer.logprobs, logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob == pytest.approx(expected[token].item(), abs=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["lessismore", "sliding_window", "oracle"])
def test_answers(engine, random_llama, method, scope):
    llm = engine(random_llama, tidal=ROLES)
    with reconfigured(llm, **settings_of(method, scope=scope)):
        answers = generate(llm, PROMPTS, MAX_TOKENS, logprobs=5)
        assert counters(llm)["sparse_steps"] == MAX_TOKENS - 1
    assert_right(answers, PROMPTS, random_llama, method, scope=scope)


@pytest.mark.parametrize("scope", ["query_head", "sequence"])
def test_answers_of_quest(engine, random_llama, scope):
    llm = engine(random_llama, tidal=settings_of("quest", scope=scope))
    answers = generate(llm, PROMPTS, MAX_TOKENS, logprobs=5)
    assert_right(answers, PROMPTS, random_llama, "quest", scope=scope)


class TestBoundsOfQuest:
    """In every layer and step, of all blocks of every row, from the cache itself."""

    @pytest.fixture
    def seen(self, monkeypatch):
        seen, select = {"rows": 0}, Quest.select

        def checked(self, layer_name, args, seq_lens):
            size = self.rule.select_block_size
            block_size, width = args.kv_cache.shape[2:]
            for row, seq_len in enumerate(seq_lens.tolist()):
                if seq_len <= 0:
                    continue
                position = torch.arange(seq_len)
                blocks = args.block_table[row, position // block_size].long()
                offsets = position % block_size
                keys = args.kv_cache[blocks, :, offsets, : width // 2]
                at = blocks * (block_size // size) + offsets // size
                for first in range(0, seq_len, size):
                    low, high = self.bounds[layer_name][at[first]].unbind(1)
                    assert torch.equal(low, keys[first : first + size].amin(0))
                    assert torch.equal(high, keys[first : first + size].amax(0))
                seen["rows"] += 1
            select(self, layer_name, args, seq_lens)

        monkeypatch.setattr(Quest, "select", checked)
        return seen

    def test_after_preemption_reuse_and_hits(self, engine, random_llama, seen):
        llm = engine(
            random_llama,
            tidal=settings_of("quest"),
            max_model_len=256,
            num_gpu_blocks_override=28,
            max_num_batched_tokens=64,
        )
        shared = random_prompt(96, seed=1)
        prompts = [shared + random_prompt(n, seed=n) for n in (60, 50, 43, 37)]
        arrivals = [(4 * i, prompt, 40) for i, prompt in enumerate(prompts)]
        with watched(llm) as scheduled:
            serve(llm, arrivals)
            again = serve(llm, arrivals[::-1])
        assert scheduled.num_preemptions > 0
        assert all(answer.num_cached_tokens for answer in again)
        assert seen["rows"] > 500

    def test_after_corrections(self, engine, random_llama, seen):
        """A correction writes keys again, over those of sparse layers."""
        settings = settings_of("quest", correction_interval=8)
        llm = engine(random_llama, tidal=settings, max_num_batched_tokens=64)
        generate(llm, PROMPTS, 40)
        assert seen["rows"] > 100


class TestRefusals:
    def test_quest_stays_as_the_engine_was_started(self, engine, random_llama):
        llm = engine(random_llama, tidal=ROLES)
        with (
            pytest.raises(TidalConfigError, match="method = 'quest': .* stays as"),
            reconfigured(llm, **settings_of("quest")),
        ):
            pass

    def test_quest_does_not_take_parts_of_blocks_from_the_prefix_cache(
        self, engine, tmp_path
    ):
        """vLLM copies their blocks, which no layer sees."""
        kinds = ["conv", "full_attention"] * 3
        folder = build_random_model(
            tmp_path / "lfm2", "lfm2", layer_types=kinds, **LFM2
        )
        with pytest.raises(ValueError, match="prefix_match_unit = 16 with mamba_cache"):
            engine(
                folder,
                tidal={"method": "quest", "dense_layers": []} | SETTINGS,
                enable_prefix_caching=True,
                mamba_cache_mode="align",
                block_size=64,
                prefix_match_unit=16,
            )
