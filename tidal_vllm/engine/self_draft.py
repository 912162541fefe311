"""Drafts by the target itself, through sparse attention over what it chose.

While drafts are verified, densely, each SELECT layer chooses for every request by the
first row that is surely valid (`choose_for_drafts`). The drafts that follow in the same
step attend to that choice and to what is newer, in every layer (`SelfDraft`). The KV
that they write is written again when they are verified.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from tidal_vllm.engine.batch import TidalMetadata
from tidal_vllm.engine.parts import parts_of
from tidal_vllm.engine.state import SparseState
from tidal_vllm.plan.roles import Role


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
    state.drafts.begin(rows.seq_lens, batch.rule.select_block_size)


class SelfDraft(DraftModelProposer):
    """vLLM's proposer of a draft model, with the target for a model."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner

    def load_model(self, target_model: nn.Module) -> None:
        self.model = target_model

    def initialize_attn_backend(self, kv_cache_config, kernel_block_sizes=None) -> None:
        ((group,),) = self.runner.attn_groups  # other models are refused
        self.kv_cache_gid, self.builder = 0, group.get_metadata_builder()

    def validate_same_kv_cache_group(self, kv_cache_config) -> None:
        """There is one group, the target's."""

    def dummy_run(self, *args, **kwargs) -> None:
        """Nothing of a draft is profiled or captured."""

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
        sampling_metadata,
        mm_embed_inputs=None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings=None,
    ) -> torch.Tensor:
        """Decode greedily from each request's newest token.

        Args:
            next_token_ids: `[num_reqs]` int32.
            num_rejected_tokens_gpu: `[num_reqs]` int32, tokens of the last drafts that
                were not kept.

        Returns:
            `[num_reqs, num_speculative_tokens]`. What stands there for a request amid
            its prompt means nothing.
        """
        common, num_reqs = common_attn_metadata, next_token_ids.shape[0]
        block_table = common.block_table_tensor[:num_reqs]
        lens = common.seq_lens[:num_reqs].clone()
        if num_rejected_tokens_gpu is not None:
            lens -= num_rejected_tokens_gpu
        amid_prompt = self.runner.discard_request_mask.gpu[:num_reqs]
        tokens, found = next_token_ids, []
        for _ in range(num_speculative_tokens):
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
    state.drafts.advance(seq_lens, like.rule.select_block_size, state.selection)
    batch = TidalMetadata.of_rows(seq_lens, block_table, like)
    batch.roles = dict.fromkeys(like.roles, Role.SPARSE)
    batch.parts = parts_of(state, batch)
    return batch
