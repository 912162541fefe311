"""`benchmarks.quality.captured` compares ways to choose, and checks its own measure."""

from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks.quality import captured
from benchmarks.quality.attention_mass import LayerAttention, choose, rows
from benchmarks.quality.captured_study import HISTORY, Study
from benchmarks.quality.captured_ways import BASE, ORACLE, Way, first_ways, score
from tidal_vllm.config import TidalConfig
from tidal_vllm.methods.quest import share_scores, upper_bounds
from tidal_vllm.plan.roles import LayerPlan, Role
from tidal_vllm.plan.steps import kv_read_share

LENGTH, BUDGET, POSITIONS = 1024, 96, 4


@pytest.fixture(scope="module")
def layers() -> list[LayerAttention]:
    """Seven layers of four query heads and two KV heads, at random."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    num_rows = POSITIONS + HISTORY
    nth = torch.arange(LENGTH)
    hidden = nth[None, None] > nth[-num_rows:, None, None]
    return [
        LayerAttention(
            logits=(3 * random(num_rows, 4, LENGTH)).masked_fill(hidden, -torch.inf),
            query=random(num_rows, 4, 8),
            key=random(2, LENGTH, 8),
            value_norms=random(2, LENGTH).abs(),
        )
        for _ in range(7)
    ]


def test_nothing_of_as_many_blocks_captures_more_than_the_oracle(layers):
    ways = {way.name: way for way in first_ways()}
    more = replace(ways[ORACLE], name="more blocks", blocks=BUDGET // 2)
    study = Study([*ways.values(), more], BUDGET, POSITIONS)
    study.see_text(layers, fold=0)
    assert study.above_oracle == 0


def test_an_oracle_that_misses_the_best_blocks_is_found_out(layers):
    """By one head's blocks at one position of one layer."""
    oracle = next(way for way in first_ways() if way.name == ORACLE)
    exact = replace(oracle, name="as good")
    study = Study([oracle, exact], BUDGET, POSITIONS)
    attend, seen = study._attend, []

    def spoil(way, choice, *others):
        mass = attend(way, choice, *others)
        if way.name == ORACLE and not seen:
            seen.append(layers)
            mass[1, 2] -= 1e-4
        return mass

    study._attend = spoil
    study.see_text(layers, fold=0)
    assert study.above_oracle == 1


@pytest.mark.parametrize("above", [0, 1])
def test_a_beaten_oracle_is_an_error(monkeypatch, above):
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(captured, name, MagicMock())
    monkeypatch.setattr(captured, "texts", lambda *_: [])
    monkeypatch.setattr(captured, "study_cell", lambda *_: ([], above))
    monkeypatch.setattr("sys.argv", ["captured", "--model", "folder"])
    assert captured.main() == above


@pytest.mark.parametrize("attends", ["everything", "chosen"])
def test_kv_reads_are_those_of_the_plan(layers, attends):
    way = Way(attends=attends)
    study = Study([way], BUDGET, POSITIONS)
    study.see_text(layers, fold=0)
    roles = tuple(
        Role.DENSE if n < 2 else Role.SELECT if way.chooses(n) else Role.SPARSE
        for n in range(len(layers))
    )
    config = TidalConfig(
        token_budget=BUDGET, select_block_size=4, select_attends=attends
    )
    plan = LayerPlan(roles, "")
    lens = range(LENGTH - POSITIONS + 1, LENGTH + 1)
    expected = sum(kv_read_share(plan, config, n) for n in lens) / POSITIONS
    assert study.found[BASE].kv_read() == pytest.approx(expected, abs=1e-6)


def test_an_old_choice_also_keeps_what_came_since(layers):
    """Of the two blocks that began in the last 8 steps, the choice knew none."""
    way = Way(age=8)
    study = Study([way], BUDGET, POSITIONS)
    seen = layers[0]
    weights = study._weights(seen)[way.size]
    kept = study._choose(way, seen, weights).kept[-1]
    then = slice(-9, -8)
    old = choose(weights[then].sum(1, keepdim=True), [LENGTH - 8], way.rule(BUDGET))[0]
    assert not old[0, -2:].any()
    old[0, -2:] = True
    assert torch.equal(kept, old)


def test_quests_bounds_are_those_of_the_method(layers):
    way = Way(score="quest", size=16)
    seen, rule = layers[0], way.rule(BUDGET)
    num_rows, num_blocks = len(seen.query), LENGTH // 16
    about = rows(rule, (LENGTH,) * num_rows, num_blocks, "cpu")
    weights = torch.zeros(num_rows, 4, num_blocks)
    found = score(way, seen, weights, 1, about)[-1]

    blocks = seen.key.unflatten(1, (-1, 16))
    bounds = torch.stack([blocks.amin(2), blocks.amax(2)]).permute(2, 1, 0, 3)
    scores = upper_bounds(seen.query[-1:], bounds[None]) * 8**-0.5
    forced = torch.zeros(1, num_blocks, dtype=torch.bool)
    forced[0, list(rule.forced_blocks(LENGTH))] = True
    assert torch.allclose(found, share_scores(scores, 1, forced)[0], atol=1e-5)
