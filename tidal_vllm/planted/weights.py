"""The tensors of the planted model.

The residual stream is cut into subspaces of CODE_SIZE: the current token's code, the
previous token's, the answer's, one per alias; then a flag of separator tokens and a
large constant that keeps every token's norm the same. A code is a vector of +1 and -1.
All values that matter are small dyadic numbers, so bfloat16 and float16 hold them.
"""

import random
from typing import TYPE_CHECKING

from tidal_vllm.planted.spec import (
    CODE_SIZE,
    HEAD_SIZE,
    ROPE_THETA,
    SEP,
    UNK,
    PlantedSpec,
)

if TYPE_CHECKING:
    import torch

INTERMEDIATE_SIZE = 64
RMS = 8.0
MIN_DISTANCE = 12

PREVIOUS_PAIRS = 12
PREVIOUS_LOGIT = 384.0
MATCH_PAIRS = range(40, 64)
MATCH_QUERY = 32.0
FLAG_PAIR = 39
FLAG_KEY = -64.0
UNK_MARGIN = 32.0


class _Layout:
    """Where the subspaces lie, and the value of the constant."""

    def __init__(self, spec: PlantedSpec) -> None:
        codes = [
            slice(i * CODE_SIZE, (i + 1) * CODE_SIZE) for i in range(spec.num_codes)
        ]
        self.current, self.previous, self.output, *self.aliases = codes
        self.flag = spec.num_codes * CODE_SIZE
        self.constant = self.flag + 1
        hidden_size = spec.hidden_size
        square = hidden_size * RMS**2 - 2 * CODE_SIZE
        self.value = (square / (hidden_size - self.constant)) ** 0.5


def codes(vocab_size: int, seed: int) -> "torch.Tensor":
    """A linear code's words, so that no two tokens look alike.

    Returns:
        [vocab_size, CODE_SIZE] float32 of +1 and -1, MIN_DISTANCE or more signs apart:
        the cosine of two tokens is at most 0.5.
    """
    import torch

    rng = random.Random(f"codes {seed}")
    num_bits = (vocab_size - 1).bit_length()
    messages = torch.arange(1 << num_bits)[:, None] >> torch.arange(num_bits) & 1
    while True:
        generator = torch.tensor(
            [[rng.getrandbits(1) for _ in range(CODE_SIZE)] for _ in range(num_bits)]
        )
        words = (messages.float() @ generator.float()) % 2
        if words[1:].sum(dim=1).min() >= MIN_DISTANCE:
            return 1 - 2 * words[:vocab_size]


def state_dict(spec: PlantedSpec) -> "dict[str, torch.Tensor]":
    """All tensors of the checkpoint under their Hugging Face names, in spec.dtype."""
    import torch

    layout = _Layout(spec)
    hidden_size = spec.hidden_size
    token_codes = codes(spec.vocab_size, spec.seed)

    embedding = torch.zeros(spec.vocab_size, hidden_size)
    embedding[:, layout.current] = token_codes
    embedding[:, layout.constant :] = layout.value
    embedding[SEP, layout.flag] = 1.0

    share = output_share(spec)
    gain = UNK_MARGIN / (0.5 * share * CODE_SIZE)
    agreement = (len(spec.output_layers) - 0.5) * share * CODE_SIZE * gain
    lm_head = torch.zeros(spec.vocab_size, hidden_size)
    lm_head[:, layout.output] = gain * token_codes
    lm_head[UNK] = 0.0
    lm_head[UNK, layout.constant] = agreement / layout.value

    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.full((hidden_size,), RMS),
        "lm_head.weight": lm_head,
    }
    for layer in range(spec.num_layers):
        tensors |= _layer(spec, layout, layer)
    dtype = getattr(torch, spec.dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def output_share(spec: PlantedSpec) -> float:
    """What one output layer adds of the answer's code: dyadic, at most 1 in all."""
    return 0.5 ** (len(spec.output_layers) - 1).bit_length()


def _layer(spec: PlantedSpec, layout: _Layout, layer: int) -> "dict[str, torch.Tensor]":
    import torch

    hidden_size = spec.hidden_size
    query = torch.zeros(spec.num_heads, HEAD_SIZE, hidden_size)
    key = torch.zeros(spec.num_kv_heads, HEAD_SIZE, hidden_size)
    value = torch.zeros(spec.num_kv_heads, HEAD_SIZE, hidden_size)
    output = torch.zeros(hidden_size, spec.num_heads, HEAD_SIZE)

    signs = _signs(spec, layer)
    _write_attention(spec, layout, layer, query, key, signs[0])
    destination, share = _destination(spec, layout, layer)
    group_size = spec.num_heads // spec.num_kv_heads
    for kv_head in range(spec.num_kv_heads):
        value[kv_head, :CODE_SIZE, layout.current] = torch.diag(signs[1, kv_head])
    for head in range(spec.num_heads if destination else 0):
        output[destination, head, :CODE_SIZE] = torch.diag(
            signs[1, head // group_size] * share / spec.num_heads
        )

    prefix = f"model.layers.{layer}"
    mlp = torch.zeros(INTERMEDIATE_SIZE, hidden_size)
    return {
        f"{prefix}.input_layernorm.weight": torch.full((hidden_size,), RMS),
        f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden_size),
        f"{prefix}.self_attn.q_proj.weight": query.flatten(0, 1),
        f"{prefix}.self_attn.k_proj.weight": key.flatten(0, 1),
        f"{prefix}.self_attn.v_proj.weight": value.flatten(0, 1),
        f"{prefix}.self_attn.o_proj.weight": output.flatten(1, 2),
        f"{prefix}.mlp.gate_proj.weight": mlp,
        f"{prefix}.mlp.up_proj.weight": mlp.clone(),
        f"{prefix}.mlp.down_proj.weight": mlp.T.contiguous(),
    }


def _signs(spec: PlantedSpec, layer: int) -> "torch.Tensor":
    """[2, num_kv_heads, CODE_SIZE]: the signs of each KV head's keys and values."""
    import torch

    rng = random.Random(f"signs {spec.seed} {layer}")
    count = 2 * spec.num_kv_heads * CODE_SIZE
    flat = torch.tensor([rng.choice((-1.0, 1.0)) for _ in range(count)])
    return flat.view(2, spec.num_kv_heads, CODE_SIZE)


def _write_attention(
    spec: PlantedSpec,
    layout: _Layout,
    layer: int,
    query: "torch.Tensor",
    key: "torch.Tensor",
    signs: "torch.Tensor",
) -> None:
    """Fill the query and key projections: whom this layer's heads look at.

    Args:
        query: [num_heads, HEAD_SIZE, hidden_size], zeros; written.
        key: [num_kv_heads, HEAD_SIZE, hidden_size], zeros; written.
        signs: [num_kv_heads, CODE_SIZE].
    """
    import torch

    if layer == 1:
        return
    head_signs = signs.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0)
    if layer == 0:
        _write_previous_token(layout, query, key, head_signs, signs)
        return

    half = HEAD_SIZE // 2
    dims = [pair + offset for offset in (0, half) for pair in MATCH_PAIRS]
    hop = sum(start <= layer for start in spec.hop_layers)
    source = layout.current if hop == 1 else layout.aliases[hop - 2]
    query[:, dims, source] = MATCH_QUERY * torch.diag_embed(head_signs)
    key[:, dims, layout.previous] = torch.diag_embed(signs)
    query[:, FLAG_PAIR, layout.constant] = MATCH_QUERY / layout.value
    key[:, FLAG_PAIR, layout.flag] = FLAG_KEY


def _write_previous_token(
    layout: _Layout,
    query: "torch.Tensor",
    key: "torch.Tensor",
    head_signs: "torch.Tensor",
    signs: "torch.Tensor",
) -> None:
    """Constant query and key; RoPE and one position of rotation make distance 1 win.

    Weights that fall with the pair's frequency keep distances 0 and 2 (the nearest
    rivals) and all up to 2**20 at least 11 % of PREVIOUS_LOGIT below.
    """
    import torch

    half = HEAD_SIZE // 2
    pairs = torch.arange(PREVIOUS_PAIRS)
    frequency = ROPE_THETA ** (-pairs / half)
    weight = torch.linspace(1.0, 0.2, PREVIOUS_PAIRS)
    weight *= PREVIOUS_LOGIT * HEAD_SIZE**0.5 / weight.sum() / layout.value
    head_signs, signs = head_signs[:, pairs], signs[:, pairs]
    query[:, pairs, layout.constant] = head_signs * weight * frequency.cos()
    query[:, pairs + half, layout.constant] = -head_signs * weight * frequency.sin()
    key[:, pairs, layout.constant] = signs / layout.value


def _destination(
    spec: PlantedSpec, layout: _Layout, layer: int
) -> tuple[slice | None, float]:
    """The subspace this layer writes what it found to, and how much of it."""
    if layer == 0:
        return layout.previous, 1.0
    if layer in spec.alias_layers:
        return layout.aliases[spec.alias_layers.index(layer)], 1.0
    if layer in spec.output_layers:
        return layout.output, output_share(spec)
    return None, 0.0
