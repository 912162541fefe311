"""One layer of one step, top to bottom: write KV, prefill, decode by role."""

from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionType,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from tidal_vllm.engine.batch import DecodePart, TidalMetadata
from tidal_vllm.engine.drafts import builds_draft, draft_startup
from tidal_vllm.engine.state import (
    SparseState,
    choose_implementations,
    dense_backend_of,
)
from tidal_vllm.kernels import DecodeArgs, Kernels
from tidal_vllm.plan.resolve import resolve
from tidal_vllm.plan.roles import Role
from tidal_vllm.registry import METHODS


class TidalImpl(AttentionImpl[TidalMetadata]):
    """Attention of one layer over the paged KV cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **of_some_models: Any,
    ) -> None:
        _require_absent(
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap or None,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            **of_some_models,
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        config = get_current_vllm_config()
        self.is_draft = builds_draft(config)
        startup = draft_startup(config) if self.is_draft else resolve(config)
        sliding_window = startup.window(sliding_window)
        self.sliding_window = sliding_window
        layer = (head_size, kv_cache_dtype, sliding_window is not None)
        self.kernels: Kernels | None = None
        if self.is_draft:
            of_target = next((impl.kernels for impl in impls_made(config)), None)
            self.dense_backend = dense_backend_of(config, *layer, of_target)
        else:
            self.kernels, self.dense_backend = choose_implementations(config, *layer)
        self.dense = self.dense_backend.get_impl_cls()(
            num_heads=num_heads,
            head_size=head_size,
            scale=scale,
            num_kv_heads=self.num_kv_heads,
            alibi_slopes=None,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            logits_soft_cap=None,
            attn_type=attn_type,
            kv_sharing_target_layer_name=None,
        )
        # FlashAttention reads queries of the cache's dtype, the decode ops 16-bit ones.
        self.quantizes_query = (
            self.dense_backend.get_name() == "FLASH_ATTN"
            and is_quantized_kv_cache(kv_cache_dtype)
            and self.dense.supports_quant_query_input
        )
        self.state: SparseState | None = None
        if sliding_window is None:
            self.state = self._find_state(config) or self.make_state(config)
        self.follows_keys = METHODS[startup.config.method].follows_keys
        self.told_plan = ""  # the start-up table that was logged for this engine

    def _find_state(self, vllm_config: VllmConfig) -> SparseState | None:
        """The state of a layer that was made before, if the state fits this layer."""
        for other in impls_made(vllm_config):
            if other._kind == self._kind and other.state is not None:
                return other.state
        return None

    @property
    def _kind(self) -> tuple[int, int, int, bool]:
        """What layers that share a state have in common; a draft model's are dense."""
        return (*self._shape, self.kernels is not None)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.num_heads, self.num_kv_heads, self.head_size)

    def make_state(self, vllm_config: VllmConfig) -> SparseState | None:
        """Allocate what SELECT and SPARSE layers share; None where there are none."""
        if self.kernels is None:
            return None
        return SparseState.allocate(
            resolve(vllm_config),
            self.kernels,
            vllm_config,
            *self._shape,
            torch.device(current_platform.device_type),
        )

    def get_impl_variants(self) -> tuple[AttentionImpl, ...]:
        """The implementations among which vLLM looks for its own."""
        return (self, self.dense)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.dense.process_weights_after_loading(act_dtype)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's K and V into the slots that the scheduler gave them."""
        self.dense.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        state, name = self.state, layer.layer_name
        if state is None or not self.follows_keys:
            return
        if extract_layer_index(name) in state.selection_index:  # not in DENSE layers
            state.method.keys_written(name, kv_cache, slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TidalMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; the step's decodes come first in the batch, prefills after.

        Args:
            layer: The vLLM layer; its name decides the role.
            query: `[num_tokens, num_heads, head_size]`.
            key, value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`,
                any strides, already holding this step's K and V.
            attn_metadata: None in vLLM's profiling run.
            output: `[num_tokens, num_heads, head_size]`, written.
        """
        batch = attn_metadata
        if batch is None:
            if self.quantizes_query:  # a copy, which memory profiling has to see
                _to_fp8(query, layer)
            return output.zero_()
        role = batch.roles[layer.layer_name] if batch.sparse else Role.DENSE
        if role in (Role.DENSE, Role.OTHER):
            self._attend_densely(
                layer, query, key, value, kv_cache, batch.dense, output
            )
            if batch.choosing and batch.roles[layer.layer_name] is Role.SELECT:
                self._choose(layer, batch, query, kv_cache)
            return output
        if batch.prefills is not None:
            rest = batch.prefill_tokens
            found = output[rest]  # a copy, where the tokens are not side by side
            self._attend_densely(
                layer,
                *(query[rest], key[rest], value[rest], kv_cache),
                batch.prefills,
                found,
            )
            if isinstance(rest, torch.Tensor):
                output[rest] = found
        for part in batch.parts:
            self._decode(layer, role, batch, part, query, kv_cache, output)
        return output

    def _attend_densely(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        if self.quantizes_query:
            query = _to_fp8(query, layer)
        self.dense.forward(layer, query, key, value, kv_cache, metadata, output)

    def _choose(
        self,
        layer: AttentionLayer,
        batch: TidalMetadata,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
    ) -> None:
        """Choose what the next drafts attend to, after a dense pass."""
        state = self.state
        assert state is not None  # a layer of this role has one
        rows = query[batch.choosing_tokens]
        for part in batch.choosing:
            args = self._args(layer, batch, state, part, rows, kv_cache, rows)
            state.method.select(layer.layer_name, args, part.seq_lens)

    def _decode(
        self,
        layer: AttentionLayer,
        role: Role,
        batch: TidalMetadata,
        part: DecodePart,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Let a SELECT layer choose; then attend to the chosen blocks."""
        state = self.state
        assert state is not None  # the batch is sparse, and this layer's role too
        args = self._args(layer, batch, state, part, query, kv_cache, output)
        attending_lens = part.seq_lens
        if role is Role.SELECT:
            state.method.select(layer.layer_name, args, part.select_lens)
            attending_lens = part.lens_after_select
        if attending_lens is not None:
            state.kernels.ops.sparse_decode(args, attending_lens)

    def _args(
        self,
        layer: AttentionLayer,
        batch: TidalMetadata,
        state: SparseState,
        part: DecodePart,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
    ) -> DecodeArgs:
        topk_blocks, topk_lens = part.topk[batch.selection_index[layer.layer_name]]
        return DecodeArgs(
            query=query[part.rows],
            kv_cache=kv_cache,
            block_table=part.block_table,
            output=output[part.rows],
            scale=self.scale,
            workspace=state.workspace,
            select_block_size=batch.rule.select_block_size,
            topk_blocks=topk_blocks,
            topk_lens=topk_lens,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
        )


def impls_made(vllm_config: VllmConfig) -> Iterator[TidalImpl]:
    """TIDAL's implementations of the layers that were made before, in their order."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        if isinstance(impl, TidalImpl):
            yield impl


# Values that vLLM's models pass for a feature that they do not use, where not None.
_ABSENT = {"chunk_lookback": -1}


def _require_absent(**arguments: Any) -> None:
    """Raise a ValueError that names the first argument that a layer really has."""
    for key, value in arguments.items():
        if value is None or (key in _ABSENT and value == _ABSENT[key]):
            continue
        if isinstance(value, torch.Tensor):
            value = f"a tensor of {[*value.shape]}"
        raise ValueError(
            f"{key} = {value}: not supported by the TIDAL attention backend; "
            f"allowed {_ABSENT.get(key)}"
        )


def _to_fp8(query: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
    """The query as vLLM's own layer would quantise it for FlashAttention."""
    from vllm import _custom_ops

    flat, _ = _custom_ops.scaled_fp8_quant(query.flatten(1), layer._q_scale)
    return flat.view(query.shape)
