"""Which rule finds the layers that have to select? On models where that is known.

Every rule gets the same recordings of dense attention and as many SELECT layers; what
each chooses is then decoded for real, beside dense attention, in vLLM's engine. One
JSON line per model and rule goes to benchmarks/results/calibration_baselines.jsonl.

Models: planted ones of one, two and three hops at random layers, and `distracted` ones,
where half of the heads attend to something else that no answer depends on.

    python -m benchmarks.quality.calibration_baselines --seeds 3
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.machine import describe_run
from tidal_vllm.calibrate import baselines
from tidal_vllm.calibrate.candidates import (
    LOSS_QUANTILE,
    assess,
    best_candidates,
    exhaustive_candidate,
    over_steps,
)
from tidal_vllm.calibrate.engine import (
    CalibrationEngine,
    complete_settings,
    engine_kwargs,
    switches,
)
from tidal_vllm.config import TidalConfig
from tidal_vllm.planted import PlantedSpec, build_planted_model, make_prompt
from tidal_vllm.planted.spec import CODE_SIZE, HEAD_SIZE
from tidal_vllm.planted.weights import MATCH_PAIRS

RESULTS = Path(__file__).parents[1] / "results" / "calibration_baselines.jsonl"
CONFIG = TidalConfig(token_budget=128)
CONTEXT, PROMPTS = 1000, 4
FIRST_SELECT = 2
# The scores of a distractor have 0.6 times this standard deviation: they are neither
# uniform nor sharp.
DISTRACTION = 3.0


def random_spec(hops: int, seed: int, num_layers: int = 12) -> PlantedSpec:
    """A planted model with its hops at random layers."""
    rng = random.Random(f"hops {hops} {seed}")
    later = sorted(rng.sample(range(4, num_layers), hops - 1))
    return PlantedSpec(
        hops=hops,
        num_layers=num_layers,
        hop_layers=(2, *later),
        vocab_size=1024,
        max_position_embeddings=4096,
        seed=seed,
    )


def build_distracted_model(folder: Path, spec: PlantedSpec, change_layer: int) -> Path:
    """A planted model whose second half of heads looks elsewhere from layer 3 on.

    Those heads compare tokens by a random rotation of their codes, one up to
    `change_layer` and another from there on, and write nothing; the others write twice
    as much. The answers, and where they have to be looked up, stay the same.
    """
    build_planted_model(folder, spec)
    tensors = load_file(folder / "model.safetensors")
    half = spec.num_heads // 2
    dims = [pair + offset for offset in (0, HEAD_SIZE // 2) for pair in MATCH_PAIRS]
    for layer in range(3, spec.num_layers):
        prefix = f"model.layers.{layer}.self_attn."
        query, key, output = (tensors[f"{prefix}{x}_proj.weight"] for x in "qko")
        query = query.view(spec.num_heads, HEAD_SIZE, -1)
        key = key.view(spec.num_kv_heads, HEAD_SIZE, -1)
        output = output.view(-1, spec.num_heads, HEAD_SIZE)
        query[half:], key[spec.num_kv_heads // 2 :] = 0.0, 0.0
        output[:, half:] = 0.0
        output[:, :half] *= 2
        for head in range(half, spec.num_heads):
            name = f"{spec.seed} {head} {layer < change_layer}"
            generator = torch.Generator().manual_seed(
                random.Random(name).getrandbits(32)
            )
            noise = torch.randn(CODE_SIZE, CODE_SIZE, generator=generator)
            rotation = torch.linalg.qr(noise).Q
            query[head, dims, :CODE_SIZE] = DISTRACTION * rotation
        key[spec.num_kv_heads // 2 :, dims, :CODE_SIZE] = torch.eye(CODE_SIZE)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def start(model: Path) -> CalibrationEngine:
    settings = complete_settings(CONFIG, range(FIRST_SELECT), [FIRST_SELECT])
    more = {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 28, "block_size": 16}
    return CalibrationEngine(engine_kwargs(str(model), settings, **more))


def record(engine: CalibrationEngine, spec: PlantedSpec, folder: Path):
    """Dense answers to some prompts, avoidable loss and overlap of all layers."""
    answers, losses, overlaps = [], [], []
    for i in range(PROMPTS):
        asked = make_prompt(spec, CONTEXT, (i + 0.5) / PROMPTS, seed=i)
        wanted = len(asked.answer_token_ids)
        setting = {"token_budget": CONFIG.token_budget}
        reply, recorded = engine.record(
            asked.prompt_token_ids, wanted, [setting], folder
        )
        if list(reply.token_ids) != asked.answer_token_ids:
            raise RuntimeError(f"dense attention answers {reply}, not {asked}")
        answers.append((asked, reply))
        losses.append(recorded["avoidable"])
        overlaps.append(recorded["overlap"])
    return answers, over_steps(losses, LOSS_QUANTILE), np.concatenate(overlaps).mean(0)


def choose(loss: np.ndarray, overlap: np.ndarray, num_select: int) -> dict:
    """SELECT layers by each rule."""
    full = FIRST_SELECT + num_select
    count = len(loss)
    (ours,) = best_candidates(loss, full, FIRST_SELECT)
    return {
        "ours": ours.select,
        "exhaustive search": exhaustive_candidate(loss, full, FIRST_SELECT).select,
        "mean overlap (TidalDecode)": baselines.mean_overlap(
            overlap, num_select, FIRST_SELECT
        ),
        "adjacent change (DELTA-style)": baselines.adjacent_change(
            overlap, num_select, FIRST_SELECT
        ),
        "evenly spaced": baselines.evenly_spaced(count, num_select, FIRST_SELECT),
    }


def decode(engine: CalibrationEngine, answers, select) -> dict:
    """How sparse decoding with these layers does against dense attention."""
    settings = complete_settings(CONFIG, range(select[0]), select)
    prompts = [asked.prompt_token_ids for asked, _ in answers]
    replies = engine.trials(
        prompts, [reply.token_ids for _, reply in answers], settings
    )
    agreed = [reply.agreed[1:] for reply in replies]
    tokens = [token for answer in agreed for token in answer]
    return {
        "agreement": sum(tokens) / len(tokens),
        "right": sum(map(all, agreed)),
        "prompts": len(agreed),
    }


def measure(name: str, model: Path, spec: PlantedSpec) -> list[dict]:
    """One line per rule."""
    with tempfile.TemporaryDirectory() as folder, switches():
        engine = start(model)
        try:
            answers, loss, overlap = record(engine, spec, Path(folder))
            lines = []
            for rule, select in choose(loss, overlap, spec.hops).items():
                line = {"model": name, "layers": spec.num_layers, "rule": rule}
                line |= {"planted": list(spec.select_layers), "chosen": list(select)}
                line |= {"expected_loss": round(assess(loss, select).loss, 4)}
                lines.append(line | decode(engine, answers, select))
            return lines
        finally:
            engine.close()


def cases(root: Path, seeds: int):
    """Name, folder and spec of each model."""
    for hops in (1, 2, 3):
        for seed in range(seeds):
            spec = random_spec(hops, seed)
            name = f"planted-{hops}-hops-{seed}"
            yield name, build_planted_model(root / name, spec), spec
    for seed in range(seeds):
        spec = PlantedSpec(
            hops=2,
            num_layers=12,
            hop_layers=(2, 9),
            vocab_size=1024,
            max_position_embeddings=4096,
            seed=seed,
        )
        name = f"distracted-{seed}"
        yield name, build_distracted_model(root / name, spec, change_layer=5), spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    about = describe_run("vllm")
    about |= {"context": CONTEXT, "token_budget": CONFIG.token_budget}
    right: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as root, arguments.out.open("w") as out:
        for name, model, spec in cases(Path(root), arguments.seeds):
            for line in measure(name, model, spec):
                out.write(json.dumps(line | about) + "\n")
                right.setdefault(line["rule"], []).append(line["right"] == PROMPTS)
                print(
                    f"{name:20} {line['rule']:30} {line['chosen']!s:14} "
                    f"loss {line['expected_loss']:6.3f}  "
                    f"agreement {line['agreement']:6.1%}  "
                    f"right {line['right']}/{line['prompts']}",
                    flush=True,
                )
    for rule, found in right.items():
        print(f"{rule:30} all answers right on {sum(found)} of {len(found)} models")


if __name__ == "__main__":
    main()
