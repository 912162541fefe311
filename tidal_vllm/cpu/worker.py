"""The worker of the CPU default: vLLM's CPU worker without its compiled ops.

Changes vLLM at run time: `CPUModelRunner` in vLLM's CPU worker, the runner's `drafter`
in lossless mode, `ShortConv.forward_cuda`, two ops of `torch.ops._C` where they are
missing, and `torch.set_num_threads` is put back.
"""

from contextlib import AbstractContextManager, nullcontext

import psutil
import torch
import vllm.v1.worker.cpu_worker as stock
from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import (
    causal_conv1d_update_torch,
)
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from tidal_vllm.cpu import moe  # noqa: F401  it registers the experts and their ops
from tidal_vllm.cpu.lora import logits_of_prompts
from tidal_vllm.engine.self_draft import SelfDraft
from tidal_vllm.plan.resolve import drafts_itself


class TidalCpuModelRunner(CPUModelRunner):
    """vLLM's CPU model runner, with seeded sampling in chunked prefills.

    A chunk that does not end its prompt samples a token which is thrown away,
    and the request's generator goes back to where it was. vLLM does that by
    the generator's offset, which CPU generators lack: here by its state.
    """

    def __init__(self, vllm_config, device):
        super().__init__(vllm_config, device)
        if drafts_itself(vllm_config):
            self.drafter = SelfDraft(vllm_config, device, self)

    def _input_fits_in_drafter(self, common_attn_metadata):
        if isinstance(getattr(self, "drafter", None), SelfDraft):
            # It drafts as much as fits; else all requests would go without.
            return common_attn_metadata is not None
        return super()._input_fits_in_drafter(common_attn_metadata)

    def _sample(self, *args, **kwargs):
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs]
        rewind = {
            i: (generators[i], generators[i].get_state())
            for i in discarded.nonzero()[0].tolist()
            if i in generators
        }
        output = super()._sample(*args, **kwargs)
        for generator, state in rewind.values():
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args, **kwargs):
        generators = self.input_batch.generators
        held = dict(generators)
        generators.clear()
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(held)

    def _get_prompt_logprobs_dict(self, hidden_states, *args, **kwargs):
        if self.lora_config is None:
            return super()._get_prompt_logprobs_dict(hidden_states, *args, **kwargs)
        with logits_of_prompts(self.model, hidden_states):
            return super()._get_prompt_logprobs_dict(hidden_states, *args, **kwargs)


# NOTE: the stock worker's init_device builds its V1 runner by this name.
stock.CPUModelRunner = TidalCpuModelRunner

# NOTE: what vLLM has for its own CPU platform; elsewhere it takes Triton kernels.
ShortConv.forward_cuda = ShortConv.forward_native


def update_short_conv(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_state_indices: torch.Tensor,
    query_start_loc: torch.Tensor | None,
    pad_slot_id: int,
) -> torch.Tensor:
    """One token per sequence through a short convolution.

    Args:
        x: `[num_seqs, dim]`.
        conv_state: `[num_states, dim, width - 1]`, written.
        conv_state_indices: `[num_seqs]`, the state of each.
    """
    states = conv_state[conv_state_indices]
    output = causal_conv1d_update_torch(x[..., None], states, weight, bias, activation)
    conv_state[conv_state_indices] = states
    return output[..., 0]


_c_ops = torch.library.Library("_C", "FRAGMENT")
if not hasattr(torch.ops._C, "init_cpu_memory_env"):
    # The CPU build binds memory to a NUMA node with it; here the system decides.
    _c_ops.define("init_cpu_memory_env(int[] nodes) -> ()")
    _c_ops.impl("init_cpu_memory_env", lambda nodes: None, "CompositeExplicitAutograd")
if not hasattr(torch.ops._C, "causal_conv1d_update_cpu_vec"):
    _c_ops.define(
        "causal_conv1d_update_cpu_vec(Tensor x, Tensor(a!) conv_state, Tensor weight, "
        "Tensor? bias, str? activation, Tensor conv_state_indices, "
        "Tensor? query_start_loc, int pad_slot_id) -> Tensor"
    )
    _c_ops.impl(
        "causal_conv1d_update_cpu_vec", update_short_conv, "CompositeExplicitAutograd"
    )


class TidalCpuWorker(stock.CPUWorker):
    """vLLM's CPU worker on plain PyTorch."""

    def init_device(self) -> None:
        set_num_threads = torch.set_num_threads
        super().init_device()
        # The stock worker forbids it after binding threads; none are bound here.
        torch.set_num_threads = set_num_threads

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager:
        return nullcontext()

    def determine_available_memory(self) -> int:
        if self.parallel_config.pipeline_parallel_size > 1:
            # Eager mode skips the warm-up that would make the buffers which
            # pipeline stages receive their inputs in.
            self.model_runner.profile_run()
        wanted = self.cache_config.kv_cache_memory_bytes
        if wanted is None:
            return super().determine_available_memory()
        # The stock check looks at one NUMA node; nothing binds memory to it here.
        free = psutil.virtual_memory().available
        if wanted > free:
            raise ValueError(
                f"kv_cache_memory_bytes = {wanted}: only {free} bytes are free; lower "
                "it (--kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE)"
            )
        return wanted


def compute_slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    block_table_ptr: torch.Tensor,
    block_table_stride: int,
    slot_mapping_ptr: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    """vLLM's slot-mapping Triton kernel in PyTorch, under its parameter names.

    Args:
        query_start_loc_ptr: `[num_reqs + 1]` int32.
        positions_ptr: `[>= num_tokens]` int64, position of each token in its
            sequence.
        block_table_ptr: `[max_num_reqs, block_table_stride]` int32.
        slot_mapping_ptr: `[>= max_num_tokens]` int64, written: the slot of each
            token, `PAD_ID` from `num_tokens` on.
    """
    if TOTAL_CP_WORLD_SIZE != 1:
        raise ValueError(
            f"context parallel size = {TOTAL_CP_WORLD_SIZE}: only 1 without a GPU"
        )
    query_lens = query_start_loc_ptr.diff().to(torch.int64)
    total = int(query_start_loc_ptr[-1])
    rows = torch.repeat_interleave(torch.arange(query_lens.numel()), query_lens)
    positions = positions_ptr[:total]
    blocks = block_table_ptr[rows, positions // KV_CACHE_BLOCK_SIZE].to(torch.int64)
    slots = blocks * KV_CACHE_BLOCK_SIZE + positions % KV_CACHE_BLOCK_SIZE
    slot_mapping_ptr[:total] = slots
    slot_mapping_ptr[num_tokens:max_num_tokens] = PAD_ID
