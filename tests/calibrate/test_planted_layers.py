"""On planted models of one, two and three hops at random layers, it finds the layers.

Nine models run through vLLM's real engine and the collection code of the command, in
three engines: the weights of each model are loaded into the engine of its shape. The
command's search for the layers then runs on what was recorded of each. Whole commands,
in processes of their own, are in test_command.py.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.calibration_baselines import build_distracted_model, random_spec
from tests.calibrate.conftest import CONFIG
from tidal_vllm.calibrate import baselines
from tidal_vllm.calibrate.candidates import (
    assess,
    best_candidates,
    over_steps,
    worth_running,
)
from tidal_vllm.calibrate.engine import complete_settings
from tidal_vllm.config import TidalConfig
from tidal_vllm.planted import PlantedSpec, build_planted_model, make_prompt

SEEDS = range(3)
PROMPTS = 2
_shared = {}


class Model:
    """One planted model in the engine of its shape, recorded."""

    def __init__(
        self,
        start_engine,
        folder: Path,
        spec: PlantedSpec,
        context: int = 400,
        config: TidalConfig = CONFIG,
    ) -> None:
        self.config = config
        shape = (spec.hops, spec.num_layers)
        if shape not in _shared:
            _shared[shape] = start_engine(folder)
        self.engine = _shared[shape]
        reload = {"weights_path": str(folder)}
        self.engine._llm.collective_rpc("reload_weights", kwargs=reload)
        assert self.engine._llm.reset_prefix_cache()
        self.answers, losses, worst, overlap = [], [], [], []
        for i in range(PROMPTS):
            asked = make_prompt(spec, context, (i + 0.5) / PROMPTS, seed=i)
            with tempfile.TemporaryDirectory() as scratch:
                reply, found = self.engine.record(
                    asked.prompt_token_ids,
                    len(asked.answer_token_ids),
                    [{"token_budget": config.token_budget}],
                    Path(scratch),
                )
            assert list(reply.token_ids) == asked.answer_token_ids
            assert len(found["worst"]) == len(reply.token_ids) - 1
            self.answers.append((asked.prompt_token_ids, reply.token_ids))
            losses.append(found["avoidable"])
            worst.append(found["worst"][:, 0])
            overlap.append(found["overlap"])
        self.loss = over_steps(losses, 0.95)
        self.captured = over_steps(worst, 0.05)
        self.overlap = np.concatenate(overlap).mean(0)

    def agreement(self, select) -> float:
        settings = complete_settings(self.config, range(select[0]), select)
        replies = self.engine.trials(*zip(*self.answers, strict=True), settings)
        return float(np.mean([one for reply in replies for one in reply.agreed[1:]]))


@pytest.fixture(scope="module", autouse=True)
def forget_engines():
    yield
    _shared.clear()


@pytest.mark.extended
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_finds_the_planted_layers(start_engine, tmp_path, hops, seed):
    spec = random_spec(hops, seed)
    model = Model(start_engine, build_planted_model(tmp_path / "m", spec), spec)
    planted = spec.select_layers
    offered = worth_running(model.loss, model.captured, max_select=4, first_select=2)
    found = next(one for one in offered if one.loss < 0.05)
    assert found.select == planted
    assert min(offered).select == planted

    scores = {}
    for layer in planted:
        kept = [other for other in planted if other != layer]
        for instead in set(range(spec.num_layers)) - {*planted}:
            select = tuple(sorted([*kept, instead]))
            scores[select] = assess(model.loss, select).score
    assert min(scores.values()) > found.score + 0.005, "another layer is as good"

    assert model.agreement(planted) == 1.0
    nearest = min(scores, key=lambda s: (s[0] != 2, scores[s]))
    if hops > 1:
        assert model.agreement(nearest) < 0.5


def test_mean_overlap_errs_where_heads_are_distracted(start_engine, tmp_path):
    """Half of the heads move on at layer 5; the answers need layer 9."""
    spec = PlantedSpec(
        hops=2,
        num_layers=12,
        hop_layers=(2, 9),
        vocab_size=1024,
        max_position_embeddings=4096,
        seed=0,
    )
    folder = build_distracted_model(tmp_path / "m", spec, change_layer=5)
    larger = TidalConfig(token_budget=128)
    model = Model(start_engine, folder, spec, context=1000, config=larger)
    (ours,) = best_candidates(model.loss, 4, 2)
    theirs = baselines.mean_overlap(model.overlap, 2, 2)
    assert ours.select == (2, 9)
    assert theirs == (2, 5)
    assert model.agreement(ours.select) == 1.0
    assert model.agreement(theirs) < 0.5
