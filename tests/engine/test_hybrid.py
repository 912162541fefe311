"""Models that mix full attention with sliding windows or states: only the former take
part, and answers are those of the definition."""

import pytest
import torch

from tests.support.asking import generate, tokens
from tests.support.engines import MiB, builders, reconfigured, runner, scheduler
from tests.support.models import (
    LFM2,
    build_random_model,
    build_windowed_planted_model,
    hybrid_layers,
    random_prompt,
)
from tests.support.oracle import Oracle
from tests.support.watching import counters
from tidal_vllm.plan.roles import Role
from tidal_vllm.planted import make_prompt

WINDOW = 24
# Windows or states in layers 0, 3 and 6; what is left takes the roles.
OTHER = [i % 3 == 0 for i in range(8)]
ROLES = {"dense_layers": [1], "select_layers": [2, 5]}
SLIDES = "sliding_attention"
FAMILIES = {
    "exaone4": (SLIDES, {"sliding_window": WINDOW}),
    "gemma3": (SLIDES, {"sliding_window": WINDOW, "query_pre_attn_scalar": 32}),
    "lfm2": ("conv", LFM2),
}
# Seeds without a near tie between two blocks: rounding would decide.
PROMPTS = [random_prompt(n, seed=n + 1) for n in (5, 40, 150, 333)]
MAX_TOKENS = 2 * WINDOW
NUM_PROMPT_TOKENS = 700


def windowed_kwargs(**more):
    return {"max_num_batched_tokens": 64, "kv_cache_memory_bytes": 96 * MiB} | more


STATES = pytest.param("lfm2", marks=pytest.mark.compat)


@pytest.fixture(scope="module", params=["exaone4", "gemma3", STATES])
def folder(request, tmp_path_factory):
    word, fields = FAMILIES[request.param]
    return build_random_model(
        tmp_path_factory.mktemp(request.param),
        request.param,
        num_hidden_layers=len(OTHER),
        layer_types=[word if other else "full_attention" for other in OTHER],
        **fields,
    )


@pytest.mark.extended
class TestRandomModels:
    """Prefills in chunks of 64 tokens, decodes beyond two windows."""

    def test_dense_answers_as_transformers_does(self, engine, folder):
        from transformers import AutoModelForCausalLM

        llm = engine(folder, tidal={"select_layers": []}, **windowed_kwargs())
        answers = generate(llm, PROMPTS, MAX_TOKENS, logprobs=5)
        oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            whole = torch.tensor([prompt + answer.token_ids])
            with torch.no_grad():
                logprobs = oracle(whole).logits[0].log_softmax(-1)
            steps = logprobs[len(prompt) - 1 : -1]
            assert steps.argmax(-1).tolist() == answer.token_ids
            assert_logprobs(answer, steps)

    @pytest.mark.parametrize(
        ("scope", "interval"), [("sequence", 1), ("kv_head", 4), ("query_head", 1)]
    )
    def test_sparse_answers_as_the_oracle_does(self, engine, folder, scope, interval):
        settings = {
            "scope": scope,
            "token_budget": 64,
            "select_block_size": 8,
            "reselect_interval": interval,
        }
        llm = engine(folder, tidal=ROLES, **windowed_kwargs())
        prompt = PROMPTS[2]  # all its decodes are sparse
        with reconfigured(llm, **ROLES | settings):
            (answer,) = generate(llm, [prompt], MAX_TOKENS, logprobs=5)
            assert counters(llm)["sparse_steps"] == MAX_TOKENS - 1
        wanted, steps = Oracle(folder, **ROLES | settings).generate(prompt, MAX_TOKENS)
        assert answer.token_ids == wanted
        assert_logprobs(answer, steps)

    def test_dense_and_sparse_differ(self, engine, folder):
        """Or the tests above would show nothing."""
        llm = engine(folder, tidal=ROLES, **windowed_kwargs())
        with reconfigured(llm, **ROLES, token_budget=64, select_block_size=8):
            sparse = tokens(generate(llm, PROMPTS, MAX_TOKENS))
        with reconfigured(llm, select_layers=[]):
            assert tokens(generate(llm, PROMPTS, MAX_TOKENS)) != sparse


def assert_logprobs(answer, steps):
    for step, wanted in zip(answer.logprobs, steps, strict=True):
        for token, logprob in step.items():
            assert logprob == pytest.approx(wanted[token].item(), abs=1e-3)


class Planted:
    """A planted model between windows of 16 tokens, in an engine."""

    def __init__(self, engine, planted, root, idle_after, **kwargs):
        self.spec, plain = planted(hops=2, num_layers=9)
        name = f"windowed-{'-'.join(map(str, idle_after))}"
        self.folder = root / name
        if not self.folder.exists():
            build_windowed_planted_model(
                self.folder, plain, self.spec, idle_after, window=16
            )
        self.at = hybrid_layers(self.spec, idle_after)
        self.roles = {
            "dense_layers": [self.at[1]],
            "select_layers": [self.at[i] for i in self.spec.select_layers],
            "token_budget": 128,
        }
        self.llm = engine(self.folder, tidal=self.roles, **windowed_kwargs(**kwargs))
        depths = (0.05, 0.5, 0.9)
        self.prompts = [
            make_prompt(self.spec, NUM_PROMPT_TOKENS, depth, seed=11)
            for depth in depths
        ]

    def answers(self):
        """Whether each token of each answer is right."""
        longest = max(len(prompt.answer_token_ids) for prompt in self.prompts)
        asked = [prompt.prompt_token_ids for prompt in self.prompts]
        given = tokens(generate(self.llm, asked, longest))
        return [
            [a == b for a, b in zip(ids, prompt.answer_token_ids, strict=False)]
            for ids, prompt in zip(given, self.prompts, strict=True)
        ]

    def groups(self):
        kinds = scheduler(self.llm).kv_cache_config.kv_cache_groups
        return [type(group.kv_cache_spec).__name__ for group in kinds]


FULL, WINDOWED = "FullAttentionSpec", "SlidingWindowSpec"
# The layers behind which a window stands; the KV cache groups that vLLM makes of it.
GROUPS = {
    "one full group": (tuple(range(1, 9)), {}, [WINDOWED, FULL]),
    "four full groups": ((4,), {}, [WINDOWED] + 4 * [FULL]),
    "no hybrid KV cache manager": (
        (2, 5),
        {"disable_hybrid_kv_cache_manager": True},
        [FULL],
    ),
}


FOUR_GROUPS = pytest.param("four full groups", marks=pytest.mark.compat)


@pytest.fixture(
    scope="module",
    params=["one full group", FOUR_GROUPS, "no hybrid KV cache manager"],
)
def case(engine, planted, tmp_path_factory, request):
    idle_after, kwargs, groups = GROUPS[request.param]
    root = tmp_path_factory.mktemp("windowed")
    case = Planted(engine, planted, root, idle_after, **kwargs)
    assert case.groups() == groups
    return case


class TestPlantedModels:
    def test_all_answers_are_right_and_sparse(self, case):
        with reconfigured(case.llm, **case.roles):
            assert all(map(all, case.answers()))
            counted = counters(case.llm)
        num_tokens = max(len(p.answer_token_ids) for p in case.prompts) - 1
        assert counted["dense_steps"] == 0
        # Once per step and row, however many groups there are.
        assert counted["decode_tokens"] == num_tokens * len(case.prompts)
        assert counted["sparse_context_tokens"] < counted["context_tokens"] / 4

    def test_a_wrong_select_layer_fails(self, case):
        first, second = case.roles["select_layers"]
        wrong = case.at[case.spec.select_layers[1] + 1]
        with reconfigured(case.llm, **case.roles | {"select_layers": [first, wrong]}):
            assert not any(all(answer[1:]) for answer in case.answers())

    def test_each_layer_has_the_role_of_its_index(self, case):
        roles = {}
        for builder in builders(case.llm):
            roles |= {int(n.split(".")[2]): r for n, r in builder.roles.items()}
        full = {*case.at[1:]}
        assert {i for i, role in roles.items() if role is not Role.OTHER} == full
        assert {i for i, role in roles.items() if role is Role.SELECT} == {
            *case.roles["select_layers"]
        }
        assert sum(builder.is_primary for builder in builders(case.llm)) == 1

    def test_all_groups_share_one_selection(self, case):
        states = {id(b.state) for b in builders(case.llm) if b.state is not None}
        assert len(states) == 1


def test_a_model_built_otherwise_than_its_config_says_is_refused(
    engine, planted, tmp_path, monkeypatch
):
    from tidal_vllm.plan import resolve as startup

    case = Planted(engine, planted, tmp_path, (4,))
    monkeypatch.setattr(startup, "_full_layers", lambda kinds: tuple(range(10)))
    with (
        pytest.raises(ValueError, match="TIDAL runs full attention in layers 1-4, 6-9"),
        reconfigured(
            case.llm, select_layers=case.roles["select_layers"], token_budget=256
        ),
    ):
        pass


def test_more_than_one_window_of_context_is_freed(case):
    """What is checked above is attention without the blocks behind the window."""
    if WINDOWED not in case.groups():
        pytest.skip("nothing is freed where vLLM keeps one group")
    for _ in range(2):  # then from the prefix cache, which has only what was kept
        case.answers()
    tables = runner(case.llm).input_batch.block_table.block_tables
    windowed, full = tables[0].block_table.cpu, tables[-1].block_table.cpu
    used = NUM_PROMPT_TOKENS // 16
    assert (full[0, :used] > 0).all()
    assert not windowed[0, : used - 6].all()
