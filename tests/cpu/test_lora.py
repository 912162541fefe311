"""Adapters: each token gets its request's, also with base requests in the batch."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from vllm.lora.request import LoRARequest

from tests.support.asking import sampling_params
from tests.support.drifting import EXACT, NUM_LAYERS
from tests.support.models import random_prompt
from tests.support.transformers_greedy import greedy
from tests.support.watching import correcting

RANK = 8
LORA = {"enable_lora": True, "max_lora_rank": RANK, "max_num_seqs": 6}
# Output and input size of each kind of layer that an adapter can be for.
MODULES = {
    "self_attn.q_proj": (128, 128),
    "self_attn.k_proj": (64, 128),
    "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}
MAX_TOKENS = 24


@dataclass
class Adapter:
    """One of the adapters, and the model with its weights merged in."""

    request: LoRARequest
    merged: LlamaForCausalLM

    def answer(self, prompt: list[int]) -> list[int]:
        (tokens,) = greedy(self.merged, [prompt], MAX_TOKENS)
        return tokens

    def prompt_logprobs(self, prompt: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = self.merged(torch.tensor([prompt])).logits[0, :-1]
        return logits.log_softmax(-1)[torch.arange(len(prompt) - 1), prompt[1:]]


def write_adapter(folder: Path, model: Path, number: int) -> Adapter:
    generator = torch.Generator().manual_seed(number)
    merged = LlamaForCausalLM.from_pretrained(model).eval()
    sizes = {
        f"model.layers.{layer}.{name}": size
        for layer in range(NUM_LAYERS)
        for name, size in MODULES.items()
    }
    sizes |= {"model.embed_tokens": (128, 512), "lm_head": (512, 128)}
    tensors = {}
    for name, (output, inputs) in sizes.items():
        a = torch.randn(RANK, inputs, generator=generator) * 0.2
        b = torch.randn(output, RANK, generator=generator) * 0.2
        embeds = name.endswith("embed_tokens")
        parts = "lora_embedding_{}" if embeds else "lora_{}.weight"
        for part, weight in {"A": a, "B": b}.items():
            tensors[f"base_model.model.{name}.{parts.format(part)}"] = weight
        delta = b @ a
        merged.get_submodule(name).weight.data += delta.T if embeds else delta
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [name.rpartition(".")[2] for name in sizes],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return Adapter(LoRARequest(str(number), number, str(folder)), merged)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, drifting) -> list[Adapter]:
    root = tmp_path_factory.mktemp
    return [write_adapter(root("adapter"), drifting, number) for number in (1, 2)]


@pytest.fixture(scope="module")
def batch(adapters, dense_answers):
    """`batch(max_loras)`: a base request before and behind each adapter's.

    Gives prompts, adapters and right answers; every slot of the engine is full.
    """

    def make(max_loras):
        given = [None]
        for adapter in adapters[:max_loras]:
            given += [adapter, None]
        prompts = [random_prompt(60 - i, seed=i) for i in range(len(given))]
        without = dense_answers(prompts, MAX_TOKENS)
        wanted = [
            adapter.answer(prompt) if adapter else base
            for adapter, prompt, base in zip(given, prompts, without, strict=True)
        ]
        assert sum(map(list.__ne__, wanted, without)) == max_loras
        return prompts, given, wanted

    return make


def ask(llm, prompts, given, **more):
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling_params(MAX_TOKENS, **more),
        lora_request=[adapter and adapter.request for adapter in given],
        use_tqdm=False,
    )


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("max_loras", [1, 2])
def test_base_requests_beside_adapters(small_engine, batch, max_loras):
    prompts, given, wanted = batch(max_loras)
    llm = small_engine(EXACT, max_loras=max_loras, **LORA)
    assert tokens(ask(llm, prompts, given)) == wanted
    base = range(0, len(prompts), 2)
    alone = ask(llm, [prompts[i] for i in base], [None] * len(base))
    assert all(output.num_cached_tokens == 48 for output in alone)
    assert tokens(alone) == [wanted[i] for i in base]


def test_corrected_tokens(small_engine, batch):
    """Corrected in the same steps."""
    prompts, given, wanted = batch(2)
    llm = small_engine(EXACT, max_loras=2, **LORA)
    with correcting(llm, 6, exact_up_to=32) as counters:
        assert tokens(ask(llm, prompts, given)) == wanted
    assert counters.corrections == 2 * len(prompts)


def test_prompt_logprobs(small_engine, batch):
    """Logits of whole prompts, of which vLLM's mapping has one row each."""
    prompts, given, _ = batch(2)
    llm = small_engine(EXACT, max_loras=2, **LORA)
    outputs = ask(llm, prompts, given, prompt_logprobs=0)
    for adapter, output in list(zip(given, outputs, strict=True))[1::2]:
        scored = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        found = torch.tensor([of[token].logprob for of, token in list(scored)[1:]])
        wanted = adapter.prompt_logprobs(output.prompt_token_ids)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
