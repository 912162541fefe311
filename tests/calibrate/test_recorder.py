"""What is recorded, against attention written out over a whole sequence."""

import numpy as np
import pytest
import torch

from tidal_vllm.calibrate.recorder import SHORT, Recorder, merge_ranks
from tidal_vllm.config import TidalConfig
from tidal_vllm.kernels import reference
from tidal_vllm.methods.ranks import AgreeingRanks
from tidal_vllm.plan.rule import num_sets

HEADS, KV_HEADS, HEAD_SIZE, KV_BLOCK = 6, 2, 32, 16
LAYERS = (1, 4, 5)  # of a hybrid model, say
SCALE = HEAD_SIZE**-0.5
SETTINGS = [
    TidalConfig(token_budget=64, select_block_size=8),
    TidalConfig(token_budget=32, select_block_size=4, scope="kv_head"),
    TidalConfig(token_budget=64, select_block_size=16, scope="query_head"),
]


def sequence(seq_len: int, seed: int):
    """Queries, keys of one layer, and the same in a paged cache full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(1, HEADS, HEAD_SIZE, generator=generator)
    kv = torch.randn(seq_len, KV_HEADS, 2 * HEAD_SIZE, generator=generator)
    used = -(-seq_len // KV_BLOCK)
    blocks = torch.randperm(used + 3, generator=generator)[:used].int() + 1
    shape = (used + 4, KV_HEADS, KV_BLOCK, 2 * HEAD_SIZE)
    cache = torch.full(shape, float("nan"))
    slots = blocks.long()[torch.arange(seq_len) // KV_BLOCK] * KV_BLOCK
    slots += torch.arange(seq_len) % KV_BLOCK
    reference.write_kv(kv[..., :HEAD_SIZE], kv[..., HEAD_SIZE:], cache, slots)
    return query, kv[..., :HEAD_SIZE], (cache, blocks[None], torch.tensor([seq_len]))


def block_mass(query, keys, size: int) -> np.ndarray:
    """[heads, blocks]: softmax written out."""
    keys = keys.repeat_interleave(HEADS // KV_HEADS, 1).double()
    scores = torch.einsum("hd,thd->ht", query[0].double(), keys) * SCALE
    weights = scores.softmax(-1).numpy()
    edges = range(0, weights.shape[1], size)
    return np.stack([weights[:, e : e + size].sum(1) for e in edges], 1)


def keep(mass: np.ndarray, config: TidalConfig, sets: int, seq_len: int) -> np.ndarray:
    """[sets, blocks] bool: the heaviest blocks of each set beside the forced ones."""
    size = config.select_block_size
    total = mass.reshape(sets, -1, mass.shape[1]).sum(1)
    total[:, : -(-config.sink_tokens // size)] = np.inf
    total[:, (seq_len - config.recent_tokens) // size :] = np.inf
    kept = np.zeros(total.shape, bool)
    for chosen, row in zip(kept, total, strict=True):
        chosen[np.argsort(-row, kind="stable")[: config.token_budget // size]] = True
    return kept


def by_head(kept: np.ndarray) -> np.ndarray:
    return kept.repeat(HEADS // len(kept), 0)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two steps: their sequences, and what the recorder made of them."""
    recorder = Recorder(LAYERS, HEADS, KV_HEADS, SETTINGS)
    steps = []
    for seq_len in (301, 302):
        step = [sequence(seq_len, seed=seq_len + layer) for layer in LAYERS]
        for layer, (query, _, paged) in zip(LAYERS, step, strict=True):
            recorder.observe(layer, query, *paged, SCALE)
        steps.append((seq_len, step))
    path = tmp_path_factory.mktemp("recorded") / "rank-0.npz"
    assert recorder.save(path, 5) == 2
    assert recorder.save(path, 5) == 0, "a recording is saved once"
    return steps, merge_ranks([path])


def test_ranks_that_choose_together_record_what_one_rank_records(recorded, tmp_path):
    """Half of the heads each; the sum over both is taken from a first pass."""
    steps, wanted = recorded
    sums: list[torch.Tensor] = []

    def record(rank: int, sum_over_ranks) -> Recorder:
        ranks = [AgreeingRanks(1, 0, sum_over_ranks), None, None]
        recorder = Recorder(LAYERS, HEADS // 2, 1, SETTINGS, ranks)
        for _, step in steps:
            for layer, (query, _, (cache, *rest)) in zip(LAYERS, step, strict=True):
                query = query[:, rank * HEADS // 2 :][:, : HEADS // 2]
                recorder.observe(layer, query, cache[:, [rank]], *rest, SCALE)
        return recorder

    for rank in range(2):
        record(rank, lambda mass: sums.append(mass.clone()) or mass)
    both = [one + other for one, other in zip(sums[:6], sums[6:], strict=True)]
    paths = [tmp_path / f"rank-{rank}.npz" for rank in range(2)]
    for rank, path in enumerate(paths):
        given = iter(both)
        record(rank, lambda _, given=given: next(given)).save(path, 2)
    found = merge_ranks(paths)
    for name in ("worst", "mean"):
        assert found[name][:, 0] == pytest.approx(wanted[name][:, 0], abs=1e-5)
    assert found["overlap"] == pytest.approx(wanted["overlap"])


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_captured_mass(recorded, number):
    steps, found = recorded
    config = SETTINGS[number]
    sets = num_sets(config.scope, HEADS, KV_HEADS)
    for t, (seq_len, layers) in enumerate(steps):
        masses = [
            block_mass(query, keys, config.select_block_size)
            for query, keys, _ in layers
        ]
        for i, j in [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]:
            kept = by_head(keep(masses[i], config, sets, seq_len))
            captured = (masses[j] * kept).sum(1)
            for name, wanted in (("worst", captured.min()), ("mean", captured.mean())):
                assert found[name][t, number, i, j] == pytest.approx(wanted, abs=1e-5)


def test_avoidable_loss_and_overlap(recorded):
    steps, found = recorded
    config = SETTINGS[0]
    for t, (seq_len, layers) in enumerate(steps):
        masses = [block_mass(q, k, config.select_block_size) for q, k, _ in layers]
        for i, j in [(0, 1), (0, 2), (1, 2), (2, 2)]:
            given = keep(masses[i], config, 1, seq_len)
            own = (masses[j] * keep(masses[j], config, HEADS, seq_len)).sum(1)
            missed = own - (masses[j] * by_head(given)).sum(1)
            assert missed.max() > 0.01, "too easy a case"
            assert found["avoidable"][t, i, j] == pytest.approx(missed.max(), abs=1e-5)
            mine = keep(masses[j], config, 1, seq_len)
            wanted = (given & mine).sum() / mine.sum()
            assert found["overlap"][t, i, j] == pytest.approx(wanted)


def test_nothing_is_said_of_earlier_layers(recorded):
    _, found = recorded
    for name in ("avoidable", "overlap"):
        assert not found[name][:, 2, :2].any() and not found[name][:, 1, 0].any()


def test_a_short_sequence_loses_nothing(tmp_path):
    recorder = Recorder(LAYERS, HEADS, KV_HEADS, SETTINGS[:1])
    for layer in LAYERS:
        query, _, paged = sequence(50, layer)
        recorder.observe(layer, query, *paged, SCALE)
    recorder.save(tmp_path / "rank-0.npz", 1)
    found = merge_ranks([tmp_path / "rank-0.npz"])
    assert found["worst"][0, 0, 0] == pytest.approx([1, 1, 1])
    assert found["avoidable"].max() < 1e-6


def test_ranks_count_as_their_worst(tmp_path):
    shape = (1, 1, 2, 2)
    values = {"worst": (0.4, 0.7), "mean": (0.5, 0.7), "overlap": (0.2, 0.4)}
    values |= {"avoidable": (0.1, 0.3)}
    paths = [tmp_path / f"rank-{rank}.npz" for rank in (0, 1)]
    for rank, path in enumerate(paths):
        np.savez(path, **{name: np.full(shape, v[rank]) for name, v in values.items()})
    found = {name: array.flat[0] for name, array in merge_ranks(paths).items()}
    assert found == pytest.approx(
        {"worst": 0.4, "mean": 0.6, "overlap": 0.3, "avoidable": 0.3}
    )


def test_a_batch_is_refused():
    recorder = Recorder(LAYERS, HEADS, KV_HEADS, SETTINGS)
    query, _, (cache, table, lens) = sequence(40, 0)
    with pytest.raises(RuntimeError, match="2 sequences decode in one step"):
        recorder.observe(
            1,
            query.expand(2, -1, -1),
            cache,
            table.expand(2, -1),
            lens.expand(2),
            SCALE,
        )


@pytest.mark.parametrize("seq_len", [100, SHORT + 1])
def test_the_engine_s_threads_stay(seq_len, monkeypatch):
    """Choosing takes one thread; scoring takes all where the sequence is long."""
    seen = {}

    def watched(name):
        op = getattr(reference, name)

        def run(*args):
            seen[name] = torch.get_num_threads()
            return op(*args)

        monkeypatch.setattr(reference, name, run)

    watched("score_blocks")
    watched("top_blocks")
    recorder = Recorder(LAYERS, HEADS, KV_HEADS, SETTINGS)
    query, _, paged = sequence(seq_len, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        recorder.observe(LAYERS[0], query, *paged, SCALE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {"score_blocks": 1 if seq_len == 100 else 2, "top_blocks": 1}


def test_memory_does_not_grow_with_the_context():
    """At 128K tokens, what is kept between layers is selections, not masses."""
    recorder = Recorder((0, 1), HEADS, KV_HEADS, SETTINGS[:1])
    seq_len = 1 << 17
    query = torch.randn(1, HEADS, HEAD_SIZE)
    cache = torch.randn(64, KV_HEADS, KV_BLOCK, 2 * HEAD_SIZE)
    table = (torch.arange(seq_len // KV_BLOCK) % 64).int()[None]
    recorder.observe(0, query, cache, table, torch.tensor([seq_len]), SCALE)
    held = [t for setting in recorder._chosen for t in setting]
    held += [torch.from_numpy(a) for step in recorder._steps for a in step.values()]
    assert sum(t.nbytes for t in held) < 1024
