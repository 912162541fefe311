"""Choices that hold for some steps: who keeps one, what is read, what is replayed."""

from contextlib import contextmanager

import pytest
import torch
from vllm.config import CUDAGraphMode

from tests.support.asking import generate, serve, tokens
from tests.support.engines import core, impls, reconfigured, runner
from tests.support.models import (
    MAX_LEN,
    NARROW,
    ROLES,
    random_arrivals,
    random_prompt,
)
from tests.support.replay import (
    Graph,
    captured,
    common_metadata,
    random_table,
    randomize_kv,
    run_layers,
)
from tests.support.spy import spying
from tests.support.watching import counters, watched
from tests.support.written_kernels import written_kernels
from tidal_vllm.config import SCOPES
from tidal_vllm.engine import state
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.planted import make_prompt

pytestmark = pytest.mark.extended

ENGINE_SETTINGS = ROLES
BUDGET, SIZE = NARROW["token_budget"], NARROW["select_block_size"]
EXACT = NARROW | {"token_budget": MAX_LEN, "min_sparse_len": 0}
ATTENDS = ["everything", "chosen"]
# Requests that come and go: rows are filled, moved and left.
ARRIVALS = random_arrivals(
    *((0, 100, 30), (0, 140, 7), (1, 90, 17), (3, 300, 21)),
    *((9, 72, 9), (14, 257, 12), (15, 110, 20), (30, 95, 11)),
)


@contextmanager
def following(llm, interval):
    """Check each step's choices against who the rows are; counts what was kept."""
    build, held, seen = TidalMetadataBuilder.build, {}, {"kept": 0, "moved": 0}

    def spied(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        ids = runner(llm).input_batch.req_ids[: metadata.num_decodes]
        last, ages = dict(held), []
        held.clear()
        if not metadata.sparse:
            return metadata
        for row, name in enumerate(ids):
            before, age = last.get(row, (None, 0))
            ages.append(age + 1 if before == name and age + 1 < interval else 0)
            seen["moved"] += before != name and name in {n for n, _ in last.values()}
        held.update({row: (n, ages[row]) for row, n in enumerate(ids)})
        lens, keeps = metadata.seq_lens[: len(ids)], torch.tensor(ages) > 0
        kept, chosen = lens.masked_fill(~keeps, -1), lens.masked_fill(keeps, -1)
        assert torch.equal(self.state.reuse.reuse_lens[: len(ids)], kept)
        assert torch.equal(self.state.reuse.select_lens[: len(ids)], chosen)
        seen["kept"] += sum(map(bool, ages))
        return metadata

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TidalMetadataBuilder, "build", spied)
        yield seen


@pytest.mark.parametrize("interval", [2, 4])
def test_requests_keep_their_own_choices_only(llm, interval):
    with (
        reconfigured(llm, **NARROW, reselect_interval=interval),
        following(llm, interval) as seen,
    ):
        serve(llm, ARRIVALS)
        counted = counters(llm)
    assert counted["decode_tokens"] // 3 < seen["kept"] < counted["decode_tokens"]
    assert seen["moved"] >= 2


@pytest.mark.parametrize("attends", ATTENDS)
def test_preempted_requests_answer_as_before(engine, random_llama, attends):
    """Their blocks go to others, and they come back in other rows: still exact."""
    llm = engine(
        random_llama, tidal=EXACT, max_model_len=640, num_gpu_blocks_override=41
    )
    prompts = [random_prompt(150 - 5 * n, seed=n) for n in range(4)]
    with reconfigured(llm, **EXACT | {"select_layers": []}):
        wanted = [generate(llm, [prompt], 60)[0].token_ids for prompt in prompts]
    settings = {"reselect_interval": 5, "select_attends": attends}
    with reconfigured(llm, **EXACT, **settings), watched(llm) as seen:
        assert tokens(generate(llm, prompts, 60)) == wanted
        assert counters(llm)["sparse_steps"] > 60
    assert seen.num_preemptions > 0


@pytest.mark.parametrize("attends", ATTENDS)
def test_what_select_layers_read(llm, attends):
    """Everything of rows that choose, the kept set of others; keys alone to score."""
    settings = {"reselect_interval": 4, "select_attends": attends}
    with reconfigured(llm, **NARROW, **settings):
        llm.reset_prefix_cache()
        unseen = tokens(serve(llm, ARRIVALS))
        llm.reset_prefix_cache()
        with spying() as steps:
            assert tokens(serve(llm, ARRIVALS)) == unseen
    op = "score_blocks" if attends == "chosen" else "dense_decode"
    mixed = 0
    for step in (step for step in steps if step.metadata.sparse):
        lens, sets = step.decode_lens, step.of("sparse_decode")
        scored = [c for c in step.of(op) if c.layer in ROLES["select_layers"]]
        assert [c.layer for c in scored] == ROLES["select_layers"]
        assert not [c for c in step.of("score_blocks") if c.op != op]
        (read,) = {str(c.tokens): c.tokens for c in scored}.values()
        chose = [n > 0 for (n,) in read]
        assert read == [[n if c else 0] for n, c in zip(lens, chose, strict=True)]
        mixed += len(set(chose)) == 2
        follows = {call.layer: call.tokens for call in sets}
        assert sorted(follows) == [1, 2, 3, 4, 5]
        for layer, found in follows.items():
            for (count,), n, chooses in zip(found, lens, chose, strict=True):
                if chooses and layer in ROLES["select_layers"] and op != "score_blocks":
                    assert count == 0
                elif n <= BUDGET or chooses:
                    assert count == min(n, BUDGET - -n % SIZE)
                else:  # at most three tokens more, perhaps in a new block
                    assert BUDGET - SIZE < count <= min(n, BUDGET + 3)
    assert mixed >= 5


@contextmanager
def dummy_steps(llm, how):
    """Before each step one of those that vLLM makes up for other ranks' sake.

    vLLM replays a CUDA graph there if it has one ("replayed"). Otherwise the V2 runner
    builds metadata as for a step ("eager"), and the V1 runner none.
    """
    model_runner = runner(llm)
    worker = core(llm).model_executor.driver_worker.worker
    step, dispatch = llm.llm_engine.step, model_runner.cudagraph_dispatcher.dispatch
    run, seen = model_runner._dummy_run, []

    def full_graph(*args, **kwargs):
        return CUDAGraphMode.FULL, dispatch(*args, **kwargs)[1]

    def dummy_run(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            if how == "replayed":
                patch.setattr(model_runner.cudagraph_dispatcher, "dispatch", full_graph)
            return run(*args, **kwargs, force_attention=how == "eager")

    def stepped():
        chosen = impls(llm)[0].state.selection
        before = chosen.topk_blocks.clone(), chosen.topk_lens.clone()
        worker.execute_dummy_batch()
        seen.append(torch.equal(chosen.topk_blocks, before[0]))
        assert torch.equal(chosen.topk_lens, before[1])
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "_dummy_run", dummy_run)
        patch.setattr(llm.llm_engine, "step", stepped)
        yield
    assert len(seen) > 30 and all(seen)


@pytest.mark.parametrize("how", ["replayed", "eager"])
def test_a_dummy_step_changes_no_choice(llm, how):
    """Neither the choices, nor who keeps one, nor what is counted."""
    with reconfigured(llm, **NARROW, reselect_interval=4):
        llm.reset_prefix_cache()
        wanted = serve(llm, ARRIVALS, logprobs=3), counters(llm)
    with reconfigured(llm, **NARROW, reselect_interval=4):
        llm.reset_prefix_cache()
        with dummy_steps(llm, how):
            found = serve(llm, ARRIVALS, logprobs=3)
        assert (found, counters(llm)) == wanted


class TestPlanted:
    """A chain that goes on at another place of the context in every step."""

    @pytest.fixture(scope="class")
    def asked(self, engine, planted):
        spec, folder = planted(hops=2)
        roles = {
            "dense_layers": list(spec.dense_layers),
            "select_layers": list(spec.select_layers),
            "token_budget": 64,
        }
        depths = (0.05, 0.5, 0.9)
        prompts = [make_prompt(spec, 1200, depth, seed=11) for depth in depths]
        wanted = torch.tensor([prompt.answer_token_ids for prompt in prompts])

        def share_of_right_words(**settings):
            llm = engine(folder, tidal=roles)
            with reconfigured(llm, **roles, **settings):
                ids = [prompt.prompt_token_ids for prompt in prompts]
                found = tokens(generate(llm, ids, wanted.shape[1]))
                assert counters(llm)["dense_steps"] == 0
            return (torch.tensor(found) == wanted).float().mean()

        return share_of_right_words

    @pytest.mark.parametrize("scope", SCOPES)
    def test_layers_that_attend_to_their_choice_find_it(self, asked, scope):
        assert asked(select_attends="chosen", scope=scope) == 1

    def test_a_choice_that_holds_loses_it(self, asked):
        """What `reselect_interval` cannot do, and why it is 1 by default."""
        assert asked(reselect_interval=1) == 1
        assert asked(reselect_interval=2) < 0.5


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("attends", ATTENDS)
def test_kernels_give_the_answers_of_the_reference(llm, monkeypatch, attends, limit):
    """Bit by bit, and also where the workspace holds one sequence at a time."""
    settings = NARROW | {"reselect_interval": 4, "select_attends": attends}
    with reconfigured(llm, **settings, kernels="reference"):
        llm.reset_prefix_cache()
        wanted = serve(llm, ARRIVALS, logprobs=3)
    if limit is not None:
        monkeypatch.setattr(state, "WORKSPACE_LIMIT", limit)
    with written_kernels(), reconfigured(llm, **settings, kernels="triton"):
        llm.reset_prefix_cache()
        assert serve(llm, ARRIVALS, logprobs=3) == wanted


class TestReplay:
    """A captured graph, run again over changed tensors."""

    @pytest.fixture(params=ATTENDS)
    def graphs(self, llm, request):
        settings = {"reselect_interval": 3, "select_attends": request.param}
        with written_kernels(), captured(llm, [4], **NARROW, **settings):
            randomize_kv(llm)
            yield llm
        llm.reset_prefix_cache()

    def test_each_replay_decides_for_itself(self, graphs):
        """Four steps of three sequences, one of which leaves: as eager steps do."""
        table = random_table(4)
        query = torch.randn(4, 4, 6, 32, generator=torch.Generator().manual_seed(3))
        lens = torch.tensor([[700, 40, 63, 0]]) + torch.tensor(
            [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, -63, 0], [3, 3, -63, 0]]
        )
        kept = [[], [0, 1, 2], [0, 1], []]
        graph, found = Graph(graphs, 4), []
        for step in range(4):
            found.append(graph.replay(lens[step].tolist(), table, query[step]))
            reuse = graph.builder.state.reuse
            assert (reuse.reuse_lens[:4] >= 0).nonzero().flatten().tolist() == kept[
                step
            ]
            is_zero = (found[step] == 0).flatten(2).all(2)
            assert torch.equal(is_zero, (lens[step] == 0).expand(is_zero.shape))

        builder = graph.builder
        builder.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        builder.num_steps += 1  # whatever was chosen is too old
        for step in range(4):
            rows = lens[step].count_nonzero()
            batch = common_metadata(
                [1] * rows, lens[step, :rows].tolist(), block_table_tensor=table[:rows]
            )
            eager = builder.build(0, batch)
            assert eager.sparse
            wanted = run_layers(graphs, eager, query[step, :rows])
            assert torch.equal(found[step][:, :rows], wanted)

    @pytest.mark.parametrize("replayed", [False, True])
    def test_a_chunk_of_a_prompt_leaves_no_choice(self, graphs, replayed):
        """Whether a graph was replayed, where it chose, the builder cannot know."""
        builder = Graph(graphs, 2).builder
        if not replayed:
            builder.vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        table, reuse = random_table(2), builder.state.reuse
        kept = []
        for step, prefilling in enumerate([[True, False], [False, False]]):
            lens = [300 + step, 400 + step]
            builder.build(
                0, common_metadata([1, 1], lens, prefilling, block_table_tensor=table)
            )
            kept.append((reuse.reuse_lens[:2] >= 0).tolist())
        assert kept == [[False, False], [False, True]]
