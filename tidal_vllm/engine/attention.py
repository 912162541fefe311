"""One layer of one step, top to bottom: write KV, prefill, decode by role."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from tidal_vllm.engine.metadata import TidalMetadata
from tidal_vllm.engine.state import SparseState, choose_implementations
from tidal_vllm.plan.policy import Role
from tidal_vllm.plan.resolve import resolve


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
        sliding_window = resolve(config).window(sliding_window)
        self.sliding_window = sliding_window
        self.kernels, self.dense_backend = choose_implementations(
            config, head_size, kv_cache_dtype, sliding_window is not None
        )
        self.dense = self.dense_backend.get_impl_cls()(
            num_heads,
            head_size,
            scale,
            self.num_kv_heads,
            None,
            sliding_window,
            kv_cache_dtype,
            None,
            attn_type,
            None,
        )
        # Ours read 16-bit queries; FlashAttention wants them as the cache is.
        self.quantizes_query = (
            self.dense_backend.get_name() == "FLASH_ATTN"
            and is_quantized_kv_cache(kv_cache_dtype)
            and self.dense.supports_quant_query_input
        )
        self.state: SparseState | None = None
        if sliding_window is None:
            self.state = self._find_state(config) or self.make_state(config)

    def _find_state(self, vllm_config: VllmConfig) -> SparseState | None:
        """That of a layer made before, if it fits this one."""
        for layer in vllm_config.compilation_config.static_forward_context.values():
            other = getattr(layer, "impl", None)
            alike = isinstance(other, TidalImpl) and other._kind == self._kind
            if alike and other.state is not None:
                return other.state
        return None

    @property
    def _kind(self) -> tuple[int, int, int, bool]:
        """A draft model's layers, which are dense, do not share the state of ours."""
        shape = (self.num_heads, self.num_kv_heads, self.head_size)
        return (*shape, self.kernels is not None)

    def make_state(self, vllm_config: VllmConfig) -> SparseState | None:
        """Allocate what SELECT and SPARSE layers share; None where there are none."""
        if self.kernels is None:
            return None
        return SparseState.allocate(
            resolve(vllm_config),
            self.kernels,
            vllm_config,
            self.num_heads,
            self.num_kv_heads,
            self.head_size,
            torch.device(current_platform.device_type),
        )

    def get_impl_variants(self) -> tuple[AttentionImpl, ...]:
        """vLLM looks through these for its own implementations."""
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
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`,
                any strides, already holding this step's K and V.
            attn_metadata: None in vLLM's profiling run.
            output: `[num_tokens, num_heads, head_size]`, written.
        """
        batch = attn_metadata
        if batch is None:
            return output.zero_()
        tokens = (query, key, value)
        role = batch.roles[layer.layer_name] if batch.sparse else Role.DENSE
        if role in (Role.DENSE, Role.OTHER):
            self._dense(layer, tokens, kv_cache, batch.dense, output)
            return output
        if batch.num_prefills:
            first = batch.num_decode_tokens
            rest = (rows[first:] for rows in tokens)
            self._dense(layer, rest, kv_cache, batch.prefills, output[first:])
        for rows in batch.passes:
            self._decode(layer, role, rows, query[rows], kv_cache, batch, output[rows])
        return output

    def _dense(self, layer, tokens, kv_cache, metadata, output) -> None:
        query, key, value = tokens
        if self.quantizes_query:
            query = _to_fp8(query, layer)
        self.dense.forward(layer, query, key, value, kv_cache, metadata, output)

    def _decode(
        self, layer, role: Role, rows: slice, query, kv_cache, batch, output
    ) -> None:
        state, rule = self.state, batch.rule
        kernels, choice = state.kernels, batch.choices[layer.layer_name]
        chosen = (
            state.selection.topk_blocks[choice, rows],
            state.selection.topk_lens[choice, rows],
        )
        paged = (query, kv_cache, batch.block_table[rows])
        keys = {
            "scale": self.scale,
            "k_scale": layer._k_scale_float,
            "workspace": state.workspace,
            "select_block_size": rule.select_block_size,
        }
        both = keys | {"v_scale": layer._v_scale_float, "output": output}
        follow = batch.seq_lens  # of the rows that attend to what is chosen
        if role is Role.SELECT:
            choose = batch.select_lens[rows]
            if state.attends_to_chosen:
                kernels.score_blocks(*paged, choose, **keys)
            else:
                kernels.dense_decode(*paged, choose, **both)
                follow = batch.reuse_lens
            kernels.select_blocks(
                choose,
                rule=rule,
                workspace=state.workspace,
                topk_blocks=chosen[0],
                topk_lens=chosen[1],
            )
        if follow is not None:
            kernels.sparse_decode(*paged, *chosen, follow[rows], **both)


# What vLLM's models pass for "not here", where that is not None.
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
