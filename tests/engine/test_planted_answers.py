"""The planted model answers under sparse decoding exactly where it can."""

import pytest

from tests.support.asking import generate, tokens
from tests.support.engines import MiB, reconfigured, runner
from tests.support.watching import counters
from tidal_vllm.config import SCOPES
from tidal_vllm.planted import make_prompt

DEPTHS = (0.05, 0.5, 0.9)
NUM_TOKENS = 1200
LAYOUTS = ("LBNHC", "LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def roles(spec):
    return {
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
    }


def answer_all(llm, prompts):
    max_tokens = max(len(p.answer_token_ids) for p in prompts)
    asked = [p.prompt_token_ids for p in prompts]
    given = tokens(generate(llm, asked, max_tokens))
    return [
        ids[: len(p.answer_token_ids)] for ids, p in zip(given, prompts, strict=True)
    ]


def assert_answered(llm, prompts):
    """Every answer exact, and decoded sparsely."""
    before = counters(llm)
    assert answer_all(llm, prompts) == [p.answer_token_ids for p in prompts]
    counted = counters(llm)
    assert counted["sparse_steps"] > before["sparse_steps"]
    assert counted["dense_steps"] == before["dense_steps"]


def assert_only_the_first_word_is_right(answers, prompts):
    """The first word comes from the prompt, which is dense; then all goes wrong."""
    for answer, prompt in zip(answers, prompts, strict=True):
        pairs = zip(answer, prompt.answer_token_ids, strict=True)
        assert [a == b for a, b in pairs] == [True] + [False] * (len(answer) - 1)


class PlantedQuestions:
    """A planted model in an engine, and questions to it."""

    def __init__(self, engine, planted, hops, block_size=16, **fields):
        self.spec, self.folder = planted(hops=hops, **fields)
        self.start = lambda **more: engine(
            self.folder,
            tidal=roles(self.spec),
            **{"block_size": block_size, "kv_cache_memory_bytes": 96 * MiB} | more,
        )
        self.llm = self.start()
        self.prompts = [self.prompt(depth) for depth in DEPTHS]

    def prompt(self, depth, num_tokens=NUM_TOKENS, seed=11):
        return make_prompt(self.spec, num_tokens, depth, seed=seed)

    def under(self, llm=None, **settings):
        return reconfigured(llm or self.llm, **roles(self.spec) | settings)


@pytest.fixture(scope="module", params=[1, 2], ids="hops{}".format)
def case(engine, planted, request):
    return PlantedQuestions(engine, planted, request.param)


@pytest.fixture(scope="module")
def two_hops(engine, planted):
    return PlantedQuestions(engine, planted, hops=2)


@pytest.mark.parametrize("token_budget", [64, 1024])
@pytest.mark.parametrize("scope", SCOPES)
def test_budgets_and_scopes(case, scope, token_budget):
    with case.under(scope=scope, token_budget=token_budget) as llm:
        assert_answered(llm, case.prompts)


@pytest.mark.parametrize("select_block_size", [1, 8])
@pytest.mark.parametrize("scope", SCOPES)
def test_select_block_sizes(two_hops, scope, select_block_size):
    settings = {"scope": scope, "select_block_size": select_block_size}
    with two_hops.under(token_budget=64, **settings) as llm:
        assert_answered(llm, two_hops.prompts)


@pytest.mark.parametrize("preset", ["tidaldecode", "lessismore"])
def test_presets(two_hops, preset):
    with two_hops.under(preset=preset, token_budget=32) as llm:
        assert_answered(llm, two_hops.prompts)


def test_a_longer_context(two_hops):
    """A hundred times the budget, read in many tiles."""
    llm = two_hops.start(max_model_len=8192, kv_cache_memory_bytes=160 * MiB)
    prompts = [two_hops.prompt(0.1, 6400)]
    for scope in SCOPES:
        with two_hops.under(llm, token_budget=64, scope=scope):
            assert_answered(llm, prompts)


@pytest.mark.extended
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kv_cache_layouts(two_hops, layout):
    llm = two_hops.start(layout=layout)
    assert llm.llm_engine.vllm_config.cache_config.kv_cache_layout == layout
    cache = runner(llm).kv_caches[0]
    blocks, heads, block_size = cache.stride()[:3]
    order = {"B": blocks, "H": heads, "N": block_size}
    assert sorted(order, key=order.get, reverse=True) == [
        letter for letter in layout if letter in order
    ]
    for scope in SCOPES:
        with two_hops.under(llm, token_budget=64, scope=scope):
            assert_answered(llm, two_hops.prompts)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("block_size", "select_block_sizes"),
    [(128, (1, 16, 128)), (96, (48, 32, 3)), (48, (48,))],
    ids=lambda value: f"kv{value}" if isinstance(value, int) else "",
)
def test_kv_block_sizes(two_hops, block_size, select_block_sizes):
    """The budget counts tokens, whatever the size of vLLM's blocks."""
    llm = two_hops.start(block_size=block_size)
    assert runner(llm).kv_caches[0].shape[2] == block_size
    for select_block_size in select_block_sizes:
        settings = {
            "select_block_size": select_block_size,
            "token_budget": max(6 * select_block_size, 48),
        }
        with two_hops.under(llm, **settings):
            assert_answered(llm, two_hops.prompts)


@pytest.mark.parametrize("lengths", [(100, 1800), (1800, 90, 900), (300,) * 4])
def test_batch_mixes(two_hops, lengths):
    """Rows below the budget, above it, and far above it in one batch."""
    prompts = [two_hops.prompt(0.3, n, seed=i) for i, n in enumerate(lengths)]
    with two_hops.under(token_budget=64) as llm:
        assert_answered(llm, prompts)


@pytest.mark.extended
@pytest.mark.parametrize(
    "heads",
    [(4, 4), (6, 2), (4, 1)],
    ids=["MHA", "GQA, 3 heads a group", "MQA"],
)
def test_heads(engine, planted, heads):
    num_heads, num_kv_heads = heads
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    case = PlantedQuestions(engine, planted, hops=2, **shape)
    for scope in SCOPES:
        with case.under(token_budget=64, scope=scope) as llm:
            assert_answered(llm, case.prompts)


@pytest.mark.extended
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(engine, planted, dtype):
    case = PlantedQuestions(engine, planted, hops=2, dtype=dtype)
    assert str(runner(case.llm).kv_caches[0].dtype) == f"torch.{dtype}"
    for scope in SCOPES:
        with case.under(token_budget=64, scope=scope) as llm:
            assert_answered(llm, case.prompts)


def window(token_budget, select_block_size):
    """Settings whose sink and recent tokens fill the budget: nothing is chosen."""
    blocks = token_budget // select_block_size
    recent = (blocks - 2) * select_block_size + 1
    return {
        "token_budget": token_budget,
        "select_block_size": select_block_size,
        "sink_tokens": select_block_size,
        "recent_fraction": (recent + 0.5) / token_budget,
    }


@pytest.mark.parametrize("select_block_size", [1, 16])
def test_a_sliding_window_of_the_same_budget_fails(two_hops, select_block_size):
    settings = window(64, select_block_size)
    with two_hops.under(**settings) as llm:
        answers = answer_all(llm, two_hops.prompts)
        counted = counters(llm)
    assert counted["sparse_steps"]
    assert_only_the_first_word_is_right(answers, two_hops.prompts)


@pytest.mark.compat
@pytest.mark.parametrize("wrong", [None, 4, 6], ids=["none", "early", "late"])
def test_two_hops_fail_under_the_wrong_second_select_layer(two_hops, wrong):
    first, second = two_hops.spec.select_layers
    assert wrong != second
    select_layers = [first] if wrong is None else [first, wrong]
    with two_hops.under(token_budget=64, select_layers=select_layers) as llm:
        answers = answer_all(llm, two_hops.prompts)
    assert_only_the_first_word_is_right(answers, two_hops.prompts)


@pytest.mark.compat
def test_more_select_layers_than_needed_do_no_harm(two_hops):
    first, second = two_hops.spec.select_layers
    select_layers = [first, second - 1, second, second + 1]
    with two_hops.under(token_budget=64, select_layers=select_layers) as llm:
        assert_answered(llm, two_hops.prompts)
