"""LoRA on the CPU default: PyTorch ops for which "no adapter" is a case.

vLLM marks a row without an adapter with slot -1, and the PyTorch ops of 0.32 index
with that: the row gets the adapter in the last slot. Here each slot reads and writes
its own rows, so a row without an adapter keeps the base layer's output bit for bit.

Changes vLLM at run time: `compute_logits` of the model, during one call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_first_token: ContextVar[int | None] = ContextVar("first_token", default=None)


@contextmanager
def logits_of_prompts(model: nn.Module, hidden_states: torch.Tensor) -> Iterator[None]:
    """The model's logits are asked for slices of these, as for prompt logprobs.

    vLLM's mapping has one row per token to sample; it would not fit.

    Args:
        model: Its `compute_logits` is told where the slice begins.
        hidden_states: `[num_tokens, hidden_size]`, of this step.
    """
    stock = model.compute_logits

    def compute_logits(part: torch.Tensor) -> torch.Tensor | None:
        offset = part.storage_offset() - hidden_states.storage_offset()
        token = _first_token.set(offset // hidden_states.stride(0))
        try:
            return stock(part)
        finally:
            _first_token.reset(token)

    model.compute_logits = compute_logits
    try:
        yield
    finally:
        del model.compute_logits


class TidalPunicaWrapper(PunicaWrapperCPU):
    """vLLM's `PunicaWrapperCPU`, one adapter after the other.

    `apply_lora_full_linear`, for classifiers, is vLLM's: it masks its rows itself.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._tokens: dict[int, torch.Tensor] = {}
        self._samples: dict[int, torch.Tensor] = {}

    def update_metadata(self, *args, **kwargs) -> None:
        super().update_metadata(*args, **kwargs)
        self._tokens = rows_of_slots(self.token_lora_indices)
        self._samples = rows_of_slots(self.sampler_indices)

    def _apply_shrink(
        self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
    ) -> None:
        shrink(y, x, w_t_all, self._tokens, scale)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        y = y[:, y_offset : y_offset + y_slice_size]
        expand(y, x, w_t_all, self._tokens, add_inputs)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs,
    ) -> None:
        expand(y, x, lora_b_stacked, self._tokens, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs,
    ) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        rows, first = self._samples, _first_token.get()
        if first is not None:
            rows = rows_of_slots(self.token_lora_indices[first : first + len(x)])
        if buffer is None:
            shape = (len(x), lora_b_stacked.shape[-1])
            buffer = torch.zeros(shape, dtype=torch.float32, device=x.device)
        shrink(buffer, x, lora_a_stacked, rows, scale)
        expand(y, buffer, lora_b_stacked, rows, add_inputs=True)


def rows_of_slots(indices: torch.Tensor) -> dict[int, torch.Tensor]:
    """The rows of each slot that has any.

    Args:
        indices: `[num_rows]`, the slot of each row; -1: no adapter.
    """
    slots = indices.unique().tolist()
    return {slot: (indices == slot).nonzero()[:, 0] for slot in slots if slot >= 0}


def shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    rows_of: dict[int, torch.Tensor],
    scale: float,
) -> None:
    """`y = scale * A x` for the rows that have an adapter.

    Args:
        y: `[num_rows, rank]`, written.
        x: `[num_rows, input_size]`.
        lora_a: `[max_loras, 1, rank, input_size]`.
    """
    for slot, rows in rows_of.items():
        weight = lora_a[slot].squeeze(0).to(y.dtype)
        y[rows, : len(weight)] = scale * (x[rows].to(y.dtype) @ weight.T)


def expand(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_b: torch.Tensor,
    rows_of: dict[int, torch.Tensor],
    add_inputs: bool,
) -> None:
    """`y += B x` for the rows that have an adapter, or `y = B x`.

    Args:
        y: `[num_rows, output_size]`, written; may be padded, as `lora_b` may be.
        x: `[num_rows, rank]`.
        lora_b: `[max_loras, 1, output_size, rank]`.
    """
    for slot, rows in rows_of.items():
        weight = lora_b[slot].squeeze(0).to(x.dtype)
        width = min(y.shape[1], len(weight))
        delta = (x[rows] @ weight[:width].T).to(y.dtype)
        if add_inputs:
            delta += y[rows, :width]
        y[rows, :width] = delta
