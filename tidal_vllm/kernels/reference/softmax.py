"""The softmax of one tile, and how tiles or disjoint sets of tokens are joined."""

import torch


def tile_state(
    scores: torch.Tensor, values: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """A tile's largest score, and its sum and output relative to that score.

    Args:
        scores: `[head groups, heads, tokens]` fp32; overwritten. `kv_runs.KVRuns` says
            what a head group is.
        values: `[head groups, tokens, head_size]` fp32. Without values there is no
            output.
    """
    lowest = torch.finfo(scores.dtype).min  # where all scores are -inf
    top = scores.amax(-1, keepdim=True).clamp_(min=lowest)
    weights = scores.sub_(top).exp_()
    state = (top, weights.sum(-1, keepdim=True))
    return state if values is None else (*state, torch.bmm(weights, values))


def join_tiles(
    states: list[tuple[torch.Tensor, ...]], lse: torch.Tensor, output: torch.Tensor
) -> None:
    """Join the tiles of one row.

    Args:
        states: What `tile_state` returned, tile by tile.
        lse: `[num_heads]` fp32, written.
        output: `[num_heads, head_size]`, written where the states have outputs.
    """
    if len(states) == 1:
        top, total, *outs = states[0]
    else:
        tops, sums, *outs = (torch.stack(each) for each in zip(*states, strict=True))
        top = tops.amax(0)
        weights = (tops - top).exp_()
        total = (weights * sums).sum(0)
        outs = [(weights * out).sum(0) for out in outs]
    for out in outs:
        # The largest score itself makes the total 1 or more, but for an empty set.
        output.copy_((out / total.clamp(min=1)).flatten(0, 1))
    lse.copy_(total.log_().add_(top).flatten())


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the attention over two disjoint sets of tokens into that over their union.

    Args:
        out_a, out_b: [..., head_size]; finite, zeros where lse is -inf.
        lse_a, lse_b: [...] fp32; -inf where the set is empty.

    Returns:
        output in out_a's dtype, and lse fp32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)  # -inf less -inf is no weight
    weight_a = (lse_a - finite).exp()[..., None]
    weight_b = (lse_b - finite).exp()[..., None]
    output = out_a.float() * weight_a + out_b.float() * weight_b
    return output.to(out_a.dtype), lse
