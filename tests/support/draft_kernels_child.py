"""vLLM's Triton kernels around drafts beside ours, on the same numbers: no arguments.

In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import sys

import torch

from tests.support.interpreter import patch_once
from tidal_vllm.cpu import drafts

VOCAB = 40
SEEDS = range(12)


def cases(seed: int) -> dict[str, list]:
    """The arguments of each kernel, by its path; what is written comes first."""
    made = torch.Generator().manual_seed(seed)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=made, dtype=torch.int32)

    def probs(count: int) -> torch.Tensor:
        return torch.randn(count, VOCAB, generator=made).mul(2).softmax(-1)

    counts = torch.tensor([3, 0, 5, 1, 2], dtype=torch.int32)[
        torch.randperm(5, generator=made)
    ]
    ends = counts.cumsum(0).int()
    total, longest, rows = int(ends[-1]), int(counts.max()), len(counts)
    target, draft_probs = probs(total), probs(total)
    likeliest = target.argmax(-1)
    drafted = likeliest.int().where(
        torch.rand(total, generator=made) < 0.7, below(VOCAB, total)
    )
    drafted[below(total, 1).long()] = -1 if seed % 3 == 0 else 7
    bonus = below(VOCAB, rows, 1).long()
    greedy = torch.arange(rows) % 2 == seed % 2
    uniform = torch.rand(total, generator=made, dtype=torch.float64)
    noise = torch.rand(rows, VOCAB, generator=made) + 0.1
    q = draft_probs if seed % 2 else None
    output = torch.full((rows, longest + 1), -1, dtype=torch.int32)
    sampled = below(VOCAB, rows, longest + 1)
    sampled[torch.arange(longest + 1) > below(longest + 1, rows)[:, None]] = -1
    sampled[0, :] = -1
    starts = torch.cat([ends.new_zeros(1), (counts + 1).cumsum(0).int()])
    valid = (sampled != -1).sum(1).int().clamp(max=counts + 1)
    sampler, utils = drafts.SAMPLER, drafts.UTILS
    all_greedy = None if seed % 2 else greedy
    return {
        f"{sampler}.rejection_greedy_sample_kernel": [
            *(output, ends, drafted, likeliest, bonus, all_greedy),
            *(longest, None, None, False),
        ],
        f"{sampler}.rejection_random_sample_kernel": [
            *(output, ends, drafted, q, target, bonus, below(VOCAB, total)),
            *(uniform, greedy, longest, VOCAB, None, q is None, False),
        ],
        f"{sampler}.expand_kernel": [
            *(torch.zeros(total), torch.tensor([0.0, 1, 0.5, 0, 2]), ends, 0, 1, 128)
        ],
        f"{sampler}.sample_recovered_tokens_kernel": [
            *(torch.zeros_like(drafted), ends, drafted, q, target, noise),
            *(VOCAB, 64, q is None, False),
        ],
        f"{utils}.eagle_prepare_inputs_padded_kernel": [
            *(ends, valid, starts, torch.zeros_like(counts)),
            *(torch.zeros_like(counts), rows),
        ],
        f"{utils}.eagle_prepare_next_token_padded_kernel": [
            *(sampled, torch.rand(rows, generator=made) < 0.3, below(VOCAB, rows)),
            *(torch.zeros_like(counts), torch.zeros_like(counts), VOCAB - 3),
            *(longest + 1, rows, longest + 1, 8),
        ],
    }


def main() -> None:
    import pkgutil

    for seed in SEEDS:
        for path, arguments in cases(seed).items():
            theirs, ours = ([clone(a) for a in arguments] for _ in range(2))
            grid = (5, 5) if "recovered" in path else (5,)
            pkgutil.resolve_name(path)[grid](*theirs)
            drafts.kernels()[path](*ours)
            changed = False
            for before, a, b in zip(arguments, theirs, ours, strict=True):
                if isinstance(a, torch.Tensor):
                    assert torch.equal(a, b), (seed, path, a, b)
                    changed |= not torch.equal(before, a)
            print("same" if changed else "untouched", path.rpartition(".")[2])


def clone(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    patch_once()
    sys.exit(main())
