"""A corrected token gets its request's adapter, as when it was decoded."""

import json

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from .harness import correcting, params
from .models import EXACT, NUM_LAYERS, random_prompt

PROMPTS = [random_prompt(60, seed=1), random_prompt(50, seed=2)]
# NOTE: on the CPU, vLLM 0.32 gives requests without an adapter the one in the last
# slot. A second slot, left empty, keeps them clean.
SLOTS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for name, width in {"q_proj": 128, "v_proj": 64}.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in {"A": (8, 128), "B": (width, 8)}.items():
                weight = torch.randn(shape, generator=generator) * 0.3
                tensors[f"{key}.lora_{part}.weight"] = weight
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoRARequest("adapter", 1, str(folder))


def test_lora(engines, adapter):
    """One request with an adapter beside one without, corrected in the same steps."""

    def answers(llm, adapters):
        llm.reset_prefix_cache()
        inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(
            inputs, params(40), lora_request=adapters, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    wanted = answers(engines(**SLOTS), [adapter, None])
    base = answers(engines(**SLOTS), [None, None])
    assert wanted[0] != base[0]
    assert wanted[1] == base[1]
    llm = engines(EXACT, **SLOTS)
    with correcting(llm, 6, exact_up_to=32) as counters:
        assert answers(llm, [adapter, None]) == wanted
    assert counters.corrections == 2 * 5
