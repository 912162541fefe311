"""`benchmarks.quality.choice` weighs choices by the attention that a model has."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.attention_mass import block_lses, last_attention
from benchmarks.quality.choice import Study
from tests.support.models import build_random_model, random_prompt
from tidal_vllm.plan.rule import SelectionRule


def test_captured_mass_is_of_the_model(tmp_path):
    """Eager attention's weights say what the layer's own choice captures."""
    folder = build_random_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.tensor(random_prompt(100, seed=1))
    with torch.inference_mode():
        weights = model(tokens[None], output_attentions=True).attentions[0][0, :, -1]
    logits = next(iter(last_attention(model, tokens, positions=2))).logits
    rule = SelectionRule(
        token_budget=16,
        select_block_size=4,
        sink_tokens=0,
        recent_tokens=1,
        sparse_threshold=0,
    )
    study = Study(
        rule, select_layers=[0], num_kv_heads=model.config.num_key_value_heads
    )
    study.see_text(iter([logits[1:]]))
    found = {(r["choice"], r["by"]): r["captured_mass"] for r in study.results()}

    of_block = weights.unflatten(1, (25, 4)).sum(-1)
    assert torch.allclose(block_lses(logits[1:], 4).softmax(-1)[0], of_block, atol=1e-6)
    others = of_block[:, :24].sum(0).topk(3).indices
    best = of_block[:, others].sum(1) + of_block[:, 24]
    assert abs(found["own", "float32"]["mean"] - float(best.mean())) < 1e-4
    assert found["own", f"ranks {study.num_kv_heads}"]["mean"] > float(best.mean())
