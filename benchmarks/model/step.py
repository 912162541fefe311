"""A decode step's attention: all layers by their roles, against dense in all of them.

Attention alone, as benchmarks/kernels/bench_stack.py measures it: kernels follow each
other in one CUDA graph, and what a model does between them is not there.
"""

from dataclasses import dataclass

from benchmarks.model.attend import (
    Prediction,
    dense_decode,
    score_blocks,
    sparse_decode,
)
from benchmarks.model.design import Design
from benchmarks.model.hardware import EMPTY, Gpu, Shape
from benchmarks.model.select import select_blocks
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.roles import LayerPlan, Role
from tidal_vllm.plan.rule import SelectionRule, num_sets
from tidal_vllm.plan.steps import runs_sparse
from tidal_vllm.profiles.load import load_profile
from tidal_vllm.profiles.profile import PACKAGED_DIR


@dataclass(frozen=True)
class Part:
    """One op of a step.

    Attributes:
        role: Of its layers.
        times: Layers that run it.
        turns: Of these, the share that does not leave all rows out, on average.
        ours: Whether the kernel is this project's.
    """

    role: Role
    times: int
    turns: float
    ours: bool
    prediction: Prediction

    def us(self, gpu: Gpu) -> float:
        idle = self.prediction.launches * gpu.launch_us + EMPTY
        each = self.turns * self.prediction.us + (1 - self.turns) * idle
        return self.times * each


@dataclass(frozen=True)
class Step:
    """A decode step's attention. A model's numbers, not measured."""

    parts: tuple[Part, ...]
    us: float
    dense_us: float
    """Of the dense backend in all layers."""
    kv_bytes: float
    dense_kv_bytes: int

    @property
    def speedup(self) -> float:
        return self.dense_us / self.us

    @property
    def launches(self) -> int:
        return sum(part.times * part.prediction.launches for part in self.parts)


def plan_of(shape: Shape, config: TidalConfig) -> LayerPlan:
    """The roles of the packaged profile of a shape's name."""
    profile = load_profile(PACKAGED_DIR / f"{shape.name}.json")
    return plan_layers(config, shape.num_layers, profile)


def dense_backend(
    gpu: Gpu, shape: Shape, lens: tuple[int, ...], fa_share: float
) -> Prediction:
    """vLLM's FlashAttention, of which only its share of read, alone, is an input."""
    kv_bytes = sum(lens) * shape.token_bytes
    least_us = gpu.least_us(kv_bytes)
    alone_us = kv_bytes / (fa_share * gpu.read_bytes_per_us)
    return Prediction(
        op="FlashAttention",
        us=max(least_us, alone_us - gpu.graph_us),
        kv_bytes=kv_bytes,
        other_bytes=0,
        launches=1,
        blocks=0,
        waves=0.0,
        tail_us=0.0,
        splits=0,
        least_us=least_us,
    )


def decode_step(
    gpu: Gpu,
    design: Design,
    shape: Shape,
    lens: tuple[int, ...],
    config: TidalConfig,
    fa_share: float,
) -> Step:
    """One step over rows of these lengths; the average of `reselect_interval` steps."""
    plan, rule = plan_of(shape, config), SelectionRule.from_config(config)
    block, interval = config.select_block_size, config.reselect_interval
    sets = num_sets(config.scope, shape.num_heads, shape.num_kv_heads)
    dense = dense_backend(gpu, shape, lens, fa_share)
    if not runs_sparse(plan, rule, max(lens)):
        parts = [Part(Role.DENSE, shape.num_layers, 1.0, False, dense)]
        return _step(gpu, design, shape, parts, dense)
    sparse = sparse_decode(
        gpu, design, shape, tuple(map(rule.kept_tokens, lens)), block
    )
    chosen = select_blocks(gpu, design, shape, lens, block, sets)
    selecting, turn = plan.count(Role.SELECT), 1 / interval
    parts = [
        Part(Role.DENSE, plan.count(Role.DENSE), 1.0, False, dense),
        Part(Role.SPARSE, plan.count(Role.SPARSE), 1.0, True, sparse),
        Part(Role.SELECT, selecting, turn, True, chosen),
    ]
    if config.select_attends == "chosen":
        scored = score_blocks(gpu, design, shape, lens, block)
        parts.append(Part(Role.SELECT, selecting, turn, True, scored))
        parts.append(Part(Role.SELECT, selecting, 1.0, True, sparse))
    else:
        kept = dense_decode(gpu, design, shape, lens, block)
        parts.append(Part(Role.SELECT, selecting, turn, True, kept))
        if interval > 1:
            parts.append(Part(Role.SELECT, selecting, 1 - turn, True, sparse))
    return _step(gpu, design, shape, parts, dense)


def _step(
    gpu: Gpu, design: Design, shape: Shape, parts: list[Part], dense: Prediction
) -> Step:
    us = sum(part.us(gpu) for part in parts)
    if design.dependent_launch:
        # Edges between two kernels of ours: behind each but the first of them.
        edges = max(0, sum(part.times for part in parts if part.ours) - 1)
        us -= edges * (gpu.launch_us - gpu.dependent_launch_us)
    return Step(
        parts=tuple(parts),
        us=us,
        dense_us=shape.num_layers * dense.us,
        kv_bytes=sum(p.times * p.turns * p.prediction.kv_bytes for p in parts),
        dense_kv_bytes=shape.num_layers * dense.kv_bytes,
    )
