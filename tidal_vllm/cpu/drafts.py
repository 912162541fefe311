"""vLLM's Triton kernels around drafts, in PyTorch, under their parameter names.

They verify drafts (`vllm.v1.sample.rejection_sampler`) and say what to draft from next
(`vllm.v1.spec_decode.utils`). Requests are few on a CPU, so there is a loop over them.
"""

from collections.abc import Callable, Iterator

import torch

SAMPLER, UTILS = "vllm.v1.sample.rejection_sampler", "vllm.v1.spec_decode.utils"


def kernels() -> dict[str, Callable[..., None]]:
    """What stands in for each kernel, by the kernel's path."""
    return {
        f"{SAMPLER}.rejection_greedy_sample_kernel": rejection_greedy_sample,
        f"{SAMPLER}.rejection_random_sample_kernel": rejection_random_sample,
        f"{SAMPLER}.expand_kernel": expand,
        f"{SAMPLER}.sample_recovered_tokens_kernel": sample_recovered_tokens,
        f"{UTILS}.eagle_prepare_inputs_padded_kernel": prepare_inputs_padded,
        f"{UTILS}.eagle_prepare_next_token_padded_kernel": prepare_next_token_padded,
    }


def _spans(cu_num_draft_tokens: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Each request with the first of its draft tokens, and the end of them."""
    ends = cu_num_draft_tokens.tolist()
    yield from zip(range(len(ends)), [0, *ends], ends, strict=False)


def rejection_greedy_sample(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    target_argmax_ptr: torch.Tensor,
    bonus_token_ids_ptr: torch.Tensor,
    is_greedy_ptr: torch.Tensor | None,
    max_spec_len: int,
    uniform_probs_ptr: torch.Tensor | None,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    SYNTHETIC_MODE: bool,
) -> None:
    """Keep a draft up to the first token that is not the likeliest; write that one.

    Args:
        output_token_ids_ptr: `[num_reqs, max_spec_len + 1]` int32, written.
        cu_num_draft_tokens_ptr: `[num_reqs]` int32, ends of the requests' drafts.
        draft_token_ids_ptr, target_argmax_ptr: `[num_tokens]`.
        bonus_token_ids_ptr: `[num_reqs, 1]`, what follows a draft that is kept whole.
        is_greedy_ptr: `[num_reqs]` bool; None: all are.
    """
    _refuse_synthetic(SYNTHETIC_MODE)
    for request, start, end in _spans(cu_num_draft_tokens_ptr):
        if is_greedy_ptr is not None and not is_greedy_ptr[request]:
            continue
        found, wanted = draft_token_ids_ptr[start:end], target_argmax_ptr[start:end]
        kept = int((found == wanted).int().cumprod(0).sum())
        row = output_token_ids_ptr[request]
        row[: kept + 1][: end - start] = wanted[: kept + 1]
        if kept == end - start:
            row[kept] = bonus_token_ids_ptr[request]


def rejection_random_sample(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    draft_probs_ptr: torch.Tensor | None,
    target_probs_ptr: torch.Tensor,
    bonus_token_ids_ptr: torch.Tensor,
    recovered_token_ids_ptr: torch.Tensor,
    uniform_probs_ptr: torch.Tensor,
    is_greedy_ptr: torch.Tensor,
    max_spec_len: int,
    vocab_size: int,
    synthetic_conditional_rates_ptr: torch.Tensor | None,
    NO_DRAFT_PROBS: bool,
    SYNTHETIC_MODE: bool,
) -> None:
    """Keep each draft token with probability min(1, p / q), arXiv 2211.17192.

    Args:
        draft_probs_ptr: `[num_tokens, vocab_size]`, q; None: 1 for the draft's token.
        target_probs_ptr: `[num_tokens, vocab_size]`, p.
        recovered_token_ids_ptr: `[num_tokens]`, what is written for a token that is
            not kept.
        uniform_probs_ptr: `[num_tokens]` fp64 in [0, 1).
    """
    _refuse_synthetic(SYNTHETIC_MODE)
    tokens = draft_token_ids_ptr.long()
    at = tokens.clamp(min=0)[:, None]
    target = target_probs_ptr.gather(1, at)[:, 0].double()
    drafted = torch.ones_like(target)
    if draft_probs_ptr is not None:
        drafted = draft_probs_ptr.gather(1, at)[:, 0].double()
    # A token of -1 pads a draft.
    keeps = (tokens >= 0) & (drafted > 0) & (target / drafted >= uniform_probs_ptr)
    for request, start, end in _spans(cu_num_draft_tokens_ptr):
        if is_greedy_ptr[request]:
            continue
        kept = int(keeps[start:end].int().cumprod(0).sum())
        row = output_token_ids_ptr[request]
        row[:kept] = draft_token_ids_ptr[start : start + kept]
        if kept == end - start:
            row[kept] = bonus_token_ids_ptr[request]
        else:
            row[kept] = recovered_token_ids_ptr[start + kept]


def _refuse_synthetic(synthetic: bool) -> None:
    if synthetic:
        raise ValueError(
            "rejection_sample_method = synthetic: not available without Triton; "
            "allowed: standard"
        )


def expand(
    output_ptr: torch.Tensor,
    input_ptr: torch.Tensor,
    cu_num_tokens_ptr: torch.Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int,
) -> None:
    """A request's value for each of its tokens.

    Args:
        output_ptr: `[num_tokens]`, written.
        input_ptr: `[num_reqs]`; `replace_from` becomes `replace_to`.
    """
    counts = cu_num_tokens_ptr.diff(prepend=cu_num_tokens_ptr.new_zeros(1))
    values = input_ptr.masked_fill(input_ptr == replace_from, replace_to)
    output_ptr.copy_(values.repeat_interleave(counts))


def sample_recovered_tokens(
    output_token_ids_ptr: torch.Tensor,
    cu_num_draft_tokens_ptr: torch.Tensor,
    draft_token_ids_ptr: torch.Tensor,
    draft_probs_ptr: torch.Tensor | None,
    target_probs_ptr: torch.Tensor,
    inv_q_ptr: torch.Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    NO_DRAFT_PROBS: bool,
    USE_FP64_GUMBEL: bool,
) -> None:
    """Sample what is written for a token that is not kept: from max(p - q, 0).

    Args:
        output_token_ids_ptr: `[num_tokens]` int32, written.
        inv_q_ptr: `[num_reqs, vocab_size]`, 1 / exponential noise: the largest product
            is a sample.
    """
    counts = cu_num_draft_tokens_ptr.diff(prepend=cu_num_draft_tokens_ptr.new_zeros(1))
    if draft_probs_ptr is None:
        at = draft_token_ids_ptr.long()[:, None]
        rest = target_probs_ptr.scatter(1, at.clamp(min=0), 0.0)
        rest = rest.where(at >= 0, target_probs_ptr)
    else:
        rest = (target_probs_ptr - draft_probs_ptr).clamp(min=0)
    noise = inv_q_ptr.repeat_interleave(counts, dim=0)
    output_token_ids_ptr.copy_((rest * noise).argmax(dim=-1))


def prepare_inputs_padded(
    cu_num_draft_tokens_ptr: torch.Tensor,
    valid_sampled_tokens_count_ptr: torch.Tensor,
    query_start_loc_gpu_ptr: torch.Tensor,
    token_indices_to_sample_ptr: torch.Tensor,
    num_rejected_tokens_gpu_ptr: torch.Tensor,
    num_reqs: int,
) -> None:
    """How many tokens of each draft were not kept, and where the last kept one stands.

    Args:
        valid_sampled_tokens_count_ptr: `[num_reqs]` int32, tokens kept, and one more.
        query_start_loc_gpu_ptr: `[>= num_reqs + 1]` int32.
        token_indices_to_sample_ptr, num_rejected_tokens_gpu_ptr: `[num_reqs]` int32,
            written.
    """
    ends = cu_num_draft_tokens_ptr[:num_reqs]
    drafted = ends.diff(prepend=ends.new_zeros(1))
    rejected = drafted + 1 - valid_sampled_tokens_count_ptr[:num_reqs]
    rejected = rejected.masked_fill(drafted == 0, 0)
    last = query_start_loc_gpu_ptr[1 : num_reqs + 1] - 1
    token_indices_to_sample_ptr.copy_(last - rejected)
    num_rejected_tokens_gpu_ptr.copy_(rejected)


def prepare_next_token_padded(
    sampled_token_ids_ptr: torch.Tensor,
    discard_request_mask_ptr: torch.Tensor,
    backup_next_token_ids_ptr: torch.Tensor,
    next_token_ids_ptr: torch.Tensor,
    valid_sampled_tokens_count_ptr: torch.Tensor,
    vocab_size: int,
    num_sampled_tokens_per_req: int,
    num_reqs: int,
    stride_sampled_token_ids: int,
    BLOCK_SIZE_TOKENS: int,
) -> None:
    """The newest token of each request, and how many it was given in this step.

    Args:
        sampled_token_ids_ptr: `[num_reqs, num_sampled_tokens_per_req]` int32; -1 where
            a draft was not kept.
        discard_request_mask_ptr: `[>= num_reqs]` bool, requests amid their prompt.
        backup_next_token_ids_ptr: `[>= num_reqs]` int32, for those.
        next_token_ids_ptr, valid_sampled_tokens_count_ptr: `[num_reqs]` int32, written.
    """
    sampled = sampled_token_ids_ptr[:num_reqs]
    valid = (sampled != -1) & (sampled < vocab_size)
    valid &= ~discard_request_mask_ptr[:num_reqs, None]
    counts = valid.sum(dim=1)
    places = torch.arange(sampled.shape[1])
    last = places.where(valid, -1).amax(dim=1)
    newest = sampled.gather(1, last.clamp(min=0)[:, None])[:, 0]
    backup = backup_next_token_ids_ptr[:num_reqs]
    next_token_ids_ptr.copy_(newest.where(counts > 0, backup))
    valid_sampled_tokens_count_ptr.copy_(counts)
