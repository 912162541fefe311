"""What a selection made at one layer captures of the attention of the others.

Runs beside dense attention, on the KV cache that it reads. Holds one decode step's
selections and one layer's block masses at a time; what it keeps of a step does not
depend on the length of the context.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tidal_vllm.config import TidalConfig
from tidal_vllm.kernels import DecodeArgs, Workspace, reference
from tidal_vllm.methods.ranks import AgreeingRanks
from tidal_vllm.plan.rule import SelectionRule, num_sets

# Tokens of a context whose arithmetic is not worth dividing among threads.
SHORT = 16384
WORST, MEAN, AVOIDABLE, OVERLAP = "worst", "mean", "avoidable", "overlap"
# How the ranks of a tensor parallel run combine: each has heads of its own.
_MERGE = {WORST: np.min, MEAN: np.mean, AVOIDABLE: np.max, OVERLAP: np.mean}


class Recorder:
    """Records single-sequence decode steps of one rank.

    Per step, and with i <= j positions of layers in ascending order:
        worst, mean: `[num_settings, num_layers, num_layers]`; entry `[s, i, j]` is the
            attention mass of layer j, 0 to 1, in the blocks that layer i selects under
            setting s: that of the worst of the rank's heads, and the heads' mean.
        avoidable: `[num_layers, num_layers]`, first setting: how much more of its mass
            a head of layer j has in the blocks that it would choose for itself alone,
            for the head where that is most.
        overlap: `[num_layers, num_layers]`, first setting: share of the blocks that
            layer j would select among those that layer i selects.

    Args:
        layers: Indices of the layers that take part, ascending.
        num_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        settings: Settings to record for; their block sizes divide the KV block size.
        ranks: For each setting the ranks that choose together, None where this rank
            chooses by itself; left empty, it does under all settings.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_heads: int,
        num_kv_heads: int,
        settings: Sequence[TidalConfig],
        ranks: Sequence[AgreeingRanks | None] = (),
    ) -> None:
        self._position = {layer: i for i, layer in enumerate(layers)}
        self._num_heads = num_heads
        self._rules = [SelectionRule.from_config(config) for config in settings]
        self._num_sets = [
            num_sets(config.scope, num_heads, num_kv_heads) for config in settings
        ]
        self._ranks = ranks or [None] * len(settings)
        self._finest = math.gcd(*(rule.select_block_size for rule in self._rules))
        self._steps: list[dict[str, np.ndarray]] = []
        self._chosen: list[list[torch.Tensor]] = []

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
    ) -> None:
        """Take in one layer of a decode step; layers come in ascending order.

        Args:
            layer: The layer's index.
            query: `[1, num_heads, head_size]`.
            kv_cache, block_table, seq_lens, scale: As in `kernels.reference`.

        Raises:
            RuntimeError: Several sequences decode in this step.
        """
        if query.shape[0] != 1:
            raise RuntimeError(
                f"{query.shape[0]} sequences decode in one step: calibration records "
                "one at a time (max_num_seqs = 1)"
            )
        position = self._position[layer]
        if position == 0:
            self._begin_step()
        args = DecodeArgs(
            query=query,
            kv_cache=kv_cache,
            block_table=block_table,
            output=torch.empty_like(query),
            scale=scale,
            select_block_size=self._finest,
        )
        with _threads(None if int(seq_lens[0]) > SHORT else 1):
            reference.score_blocks(args, seq_lens)
        with _threads(1):
            self._compare(position, args, seq_lens)

    def _compare(self, position: int, args: DecodeArgs, seq_lens: torch.Tensor) -> None:
        """Choose blocks under all settings, and add up what earlier choices capture.

        Args:
            args: After an op that left block_lse, of the finest blocks.
        """
        lse, fine = args.workspace.lse, args.workspace.block_lse
        block_lse, mass = {}, {}
        for size in {rule.select_block_size for rule in self._rules}:
            block_lse[size] = _coarser(fine, size // self._finest)
            mass[size] = (block_lse[size] - lse[..., None]).exp()
        step = self._steps[-1]
        for s, rule in enumerate(self._rules):
            size = rule.select_block_size
            args.workspace.block_lse = block_lse[size]
            chosen = _select(
                args, seq_lens, rule, self._num_sets[s], mass[size], self._ranks[s]
            )
            self._chosen[s].append(chosen)
            given = torch.stack(self._chosen[s])
            captured = _captured(mass[size][0], given)
            upto = slice(position + 1)
            step[WORST][s, upto, position] = captured.amin(1).cpu()
            step[MEAN][s, upto, position] = captured.mean(1).cpu()
            if s == 0:
                own = _select(args, seq_lens, rule, self._num_heads, mass[size])
                missed = _captured(mass[size][0], own[None]) - captured
                step[AVOIDABLE][upto, position] = missed.clamp_(min=0).amax(1).cpu()
                step[OVERLAP][upto, position] = _overlap(
                    given, mass[size].shape[2]
                ).cpu()

    def save(self, path: Path, num_steps: int) -> int:
        """Write the first steps to an .npz file and forget them all.

        Returns:
            Steps written: fewer than `num_steps` if fewer were seen.
        """
        steps, self._steps = self._steps[:num_steps], []
        if steps:
            stacked = {
                name: np.stack([step[name] for step in steps]) for name in _MERGE
            }
            np.savez_compressed(path, **stacked)
        return len(steps)

    def _begin_step(self) -> None:
        count, settings = len(self._position), len(self._rules)
        shapes = {
            WORST: (settings, count, count),
            MEAN: (settings, count, count),
            AVOIDABLE: (count, count),
            OVERLAP: (count, count),
        }
        self._steps.append(
            {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        )
        self._chosen = [[] for _ in self._rules]


def merge_ranks(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """The recordings of all ranks as one model's, by the arrays' names.

    Args:
        paths: What `Recorder.save` wrote, rank by rank.

    Returns:
        The arrays of `Recorder`, each with the steps in front: `[num_steps, ...]`. Of
        worst and avoidable the worst rank's, of mean and overlap the ranks' mean.
    """
    ranks = []
    for path in paths:
        with np.load(path) as found:
            ranks.append({name: found[name] for name in _MERGE})
    return {
        name: merge(np.stack([rank[name] for rank in ranks]), axis=0)
        for name, merge in _MERGE.items()
    }


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads on a CPU; None: with all of them.

    The ops here are small. To divide one takes as long as to compute it, and a hundred
    times as long where another process has one of the cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _select(
    args: DecodeArgs,
    seq_lens: torch.Tensor,
    rule: SelectionRule,
    num_sets: int,
    mass: torch.Tensor,
    ranks: AgreeingRanks | None = None,
) -> torch.Tensor:
    """The blocks that the rule selects by attention mass.

    Args:
        args: After an op that left block_lse, of the rule's select_block_size.
        mass: `[1, num_heads, num_blocks]`, of the same blocks; what `block_mass` of the
            reference sums over the heads of a set.

    Returns:
        [num_sets, kept] int64, block indices.
    """
    kept = rule.num_kept_blocks(int(seq_lens[0]))
    args.topk_blocks = seq_lens.new_empty((1, num_sets, kept), dtype=torch.int32)
    args.topk_lens = seq_lens.new_empty((1, num_sets), dtype=torch.int32)
    if ranks is not None:
        block_lse = args.workspace.block_lse.clone()
        args = ranks.weighed(
            replace(args, workspace=Workspace(args.workspace.lse, block_lse))
        )
        reference.select_blocks(args, seq_lens, rule)
    else:
        by_set = mass.unflatten(1, (num_sets, -1)).sum(2).nan_to_num_(0.0)
        reference.top_blocks(args, seq_lens, rule, by_set)
    return args.topk_blocks[0].long()


def _coarser(block_lse: torch.Tensor, times: int) -> torch.Tensor:
    """The log-sum-exp of blocks that are `times` as long."""
    if times == 1:
        return block_lse
    missing = -block_lse.shape[-1] % times
    padded = torch.nn.functional.pad(block_lse, (0, missing), value=-math.inf)
    return padded.unflatten(-1, (-1, times)).logsumexp(-1)


def _captured(mass: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Mass of each head in the sets it is given.

    Args:
        mass: `[num_heads, num_blocks]`.
        given: `[num_selections, num_sets, kept]`; the heads of a set are neighbours.

    Returns:
        `[num_selections, num_heads]`.
    """
    selections, sets, kept = given.shape
    by_set = mass.view(1, sets, -1, mass.shape[1])
    heads = by_set.shape[2]
    found = by_set.expand(selections, -1, -1, -1).gather(
        3, given[:, :, None].expand(-1, -1, heads, kept)
    )
    return found.sum(3).flatten(1)


def _overlap(given: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Share of the last selection's blocks that each one has: `[num_selections]`."""
    own = torch.zeros(given.shape[1], num_blocks, device=given.device)
    own.scatter_(1, given[-1], 1.0)
    return own.expand(len(given), -1, -1).gather(2, given).mean((1, 2))
