"""Drafts by the target itself, through sparse attention over what it chose.

While drafts are verified, densely, each SELECT layer chooses for every request by the
first row that is surely valid (`choose_for_drafts`). The drafts that follow in the same
step attend to that choice and to what is newer, in every layer (`SelfDraft`). The KV
that they write is written again when they are verified.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from tidal_vllm.engine.batch import TidalMetadata
from tidal_vllm.engine.parts import parts_of
from tidal_vllm.engine.state import SparseState
from tidal_vllm.plan.draft_length import Acceptance, StepCosts, best_draft_length
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.roles import Role
from tidal_vllm.registry import METHODS


def choose_for_drafts(
    state: SparseState,
    batch: TidalMetadata,
    common: CommonAttentionMetadata,
    is_prefill: torch.Tensor | None,
) -> None:
    """Let the SELECT layers of a dense step choose, by one row of each request.

    A request that decodes has its newest token in its first row, and a draft behind
    it, of which nobody knows yet what is kept. A prompt has it in its last row.
    """
    starts = common.query_start_loc
    counts = starts[1:] - starts[:-1]
    first, last = starts[:-1], starts[1:] - 1
    prefills = torch.zeros_like(counts, dtype=torch.bool)
    if is_prefill is not None:
        prefills = is_prefill.to(counts.device)
    lens = common.seq_lens - counts + 1
    rows = TidalMetadata.of_rows(
        common.seq_lens.where(prefills, lens), common.block_table_tensor, batch
    )
    batch.choosing, batch.choosing_tokens = (
        parts_of(state, rows),
        last.where(prefills, first),
    )
    assert state.drafts is not None  # in lossless mode
    state.drafts.begin(rows.seq_lens, batch.rule.select_block_size)


class SelfDraft(DraftModelProposer):
    """vLLM's proposer of a draft model, with the target for a model."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        startup = resolve(vllm_config)
        self.rule, plan = startup.rule, startup.plan
        draft_tokens = self.speculative_config.num_speculative_tokens
        self.acceptance = Acceptance.unknown(draft_tokens)
        keys_of = METHODS[startup.config.method].scoring_reads
        share = plan.count(Role.SELECT) / plan.num_full_layers
        self.select_share = share * keys_of(self.rule.select_block_size)

    def load_model(self, target_model: nn.Module) -> None:
        self.model = target_model
        self.weight_bytes = sum(p.nbytes for p in target_model.parameters())

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: Any = None
    ) -> None:
        ((group,),) = self.runner.attn_groups  # other models are refused
        self.kv_cache_gid, self.builder = 0, group.get_metadata_builder()

    def validate_same_kv_cache_group(self, kv_cache_config: Any) -> None:
        """There is one group, the target's."""

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a draft is profiled or captured."""

    def prepare_inputs_padded(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        spec_decode_metadata: SpecDecodeMetadata,
        valid_sampled_tokens_count: torch.Tensor,
    ) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor]:
        """vLLM's, and what became of the drafts is counted."""
        found = super().prepare_inputs_padded(
            common_attn_metadata, spec_decode_metadata, valid_sampled_tokens_count
        )
        counts = spec_decode_metadata.num_draft_tokens, found[2].tolist()
        for drafted, rejected in zip(*counts, strict=True):
            if drafted >= rejected:  # it is more where a request is discarded
                self.acceptance.count(drafted, drafted - rejected)
        return found

    def draft_length(self, seq_lens: list[int]) -> int:
        """Tokens to draft for sequences of these lengths: what reads least per token.

        Ranks see the same lengths and drafts, so they come to the same number.
        """
        spec = self.builder.kv_cache_spec
        layers = len(self.builder.roles)
        costs = StepCosts.of_batch(
            self.weight_bytes,
            layers * spec.page_size_bytes / spec.block_size,
            seq_lens,
            [self.rule.kept_tokens(n) for n in seq_lens],
            self.select_share,
        )
        return best_draft_length(self.acceptance.survival, costs)

    @torch.inference_mode()
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Decode greedily from each request's newest token.

        Args:
            next_token_ids: `[num_reqs]` int32.
            num_rejected_tokens_gpu: `[num_reqs]` int32, tokens of the last drafts that
                were not kept.

        Returns:
            `[num_reqs, length]`, at most `num_speculative_tokens`, and none where
            drafts do not pay. What stands there for a request amid its prompt means
            nothing.
        """
        common, num_reqs = common_attn_metadata, next_token_ids.shape[0]
        block_table = common.block_table_tensor[:num_reqs]
        lens = common.seq_lens[:num_reqs].clone()
        if num_rejected_tokens_gpu is not None:
            lens -= num_rejected_tokens_gpu
        amid_prompt = self.runner.discard_request_mask.gpu[:num_reqs]
        sequences = lens[~amid_prompt].tolist()
        length = self.draft_length(sequences) if sequences else 0
        if sequences and not length:
            self.acceptance.rest()
        chosen, self.builder.chooses = self.builder.chooses, not sequences or length > 0
        length = min(length, num_speculative_tokens) if chosen else 0
        if sequences:
            room = self.vllm_config.model_config.max_model_len - max(sequences)
            length = min(length, room)
        self.builder.counters.draft_tokens += length * len(sequences)
        self.builder.counters.undrafted_steps += not length
        tokens, found = next_token_ids, []
        for _ in range(length):
            lens += 1
            metadata = self.builder.build_for_self_draft(
                lens.masked_fill(amid_prompt, -1), block_table
            )
            slots = self._slots(lens, block_table).masked_fill(amid_prompt, -1)
            names = metadata.roles
            with set_forward_context(
                dict.fromkeys(names, metadata),
                self.vllm_config,
                num_tokens=num_reqs,
                slot_mapping=dict.fromkeys(names, slots),
            ):
                hidden = self.model(input_ids=tokens.int(), positions=lens.long() - 1)
            tokens = self.model.compute_logits(hidden).argmax(dim=-1)
            found.append(tokens)
        if not found:
            return next_token_ids.new_empty(num_reqs, 0)
        return torch.stack(found, dim=1)

    def _slots(self, lens: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
        """KV slots of the newest tokens."""
        size, newest = self.builder.kv_cache_spec.block_size, lens.long() - 1
        blocks = block_table.gather(1, (newest // size)[:, None])[:, 0].long()
        return blocks * size + newest % size


def draft_metadata(
    state: SparseState,
    like: TidalMetadata,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> TidalMetadata:
    """The metadata of one draft token of each request: every layer is SPARSE.

    Args:
        seq_lens: `[num_reqs]` int32, the draft token included; -1 leaves one out.
    """
    assert state.drafts is not None  # in lossless mode
    state.drafts.advance(seq_lens, like.rule.select_block_size, state.selection)
    batch = TidalMetadata.of_rows(seq_lens, block_table, like)
    batch.roles = dict.fromkeys(like.roles, Role.SPARSE)
    batch.parts = parts_of(state, batch)
    return batch
