"""Mixtures of experts where vLLM has no compiled code for them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from tests.support.engines import engine_kwargs
from tests.support.models import ROLES, build_random_model, random_prompt
from tests.support.processes import run_child
from tests.support.transformers_greedy import greedy
from tidal_vllm.cpu import moe as cpu_moe

# What each stands for: softmax whose weights are made to add up to one; softmax as it
# is, beside shared experts behind a gate; sigmoid, chosen with a bias, then scaled.
MAX_TOKENS = 16
MODELS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
    },
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, dict]:
    """An engine for each family; only engines for experts make groups for them."""
    root, made = tmp_path_factory.mktemp("moe"), {}
    for family, fields in MODELS.items():
        folder = build_random_model(root / family, family, **fields)
        made[family] = {
            "kwargs": {"model": str(folder)} | engine_kwargs(ROLES),
            "prompts": [random_prompt(length, seed=length) for length in (70, 41)],
            "max_tokens": MAX_TOKENS,
        }
    return made


@pytest.fixture(scope="module")
def given(tmp_path_factory, jobs) -> dict[str, list[list[int]]]:
    """Its answers. A process that imports nothing of ours but through vLLM."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    results = run_child(tmp_path_factory.mktemp("child"), [*jobs.values()], **env)
    return {
        family: result["tokens"] for family, result in zip(jobs, results, strict=True)
    }


@pytest.mark.extended
@pytest.mark.parametrize("family", MODELS)
def test_answers_are_those_of_transformers(jobs, given, family):
    job = jobs[family]
    model = AutoModelForCausalLM.from_pretrained(job["kwargs"]["model"]).eval()
    assert given[family] == greedy(model, job["prompts"], MAX_TOKENS)


@pytest.mark.parametrize("case", ["all here", "half elsewhere", "weighted inputs"])
def test_experts(case):
    """Against a loop over tokens; expert parallel ranks hold a part of the experts."""
    num_experts, hidden, inner, top_k = 4, 8, 6, 1 if case == "weighted inputs" else 2
    layer = SimpleNamespace(
        w13_weight=torch.randn(num_experts, 2 * inner, hidden),
        w13_bias=torch.randn(num_experts, 2 * inner),
        w2_weight=torch.randn(num_experts, hidden, inner),
        w2_bias=torch.randn(num_experts, hidden),
        apply_router_weight_on_input=case == "weighted inputs",
        expert_map=None,
    )
    held = list(range(num_experts))  # by expert: where this rank has it
    if case == "half elsewhere":
        held = [-1, 0, -1, 1, 2, 3, -1, -1]
        layer.expert_map = torch.tensor(held)
    x = torch.randn(5, hidden)
    ids = torch.stack([torch.randperm(len(held))[:top_k] for _ in x]).to(torch.int32)
    weights = torch.rand(5, top_k)
    ids[-1, 0] = -1  # padding

    wanted = torch.zeros_like(x)
    for token in range(5):
        for choice in range(top_k):
            expert = held[ids[token, choice]] if ids[token, choice] >= 0 else -1
            if expert < 0:
                continue
            weight = weights[token, choice]
            given = x[token] * (weight if layer.apply_router_weight_on_input else 1)
            both = layer.w13_weight[expert] @ given + layer.w13_bias[expert]
            middle = F.silu(both[:inner]) * both[inner:]
            added = layer.w2_weight[expert] @ middle + layer.w2_bias[expert]
            wanted[token] += added * (
                1 if layer.apply_router_weight_on_input else weight
            )

    method = SimpleNamespace(activate=lambda x: F.silu(x[:, :inner]) * x[:, inner:])
    run = cpu_moe.TidalCpuExperts.forward_native
    found = run(method, layer, x, weights, ids, None, None)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_an_activation_without_pytorch_code_is_refused():
    moe = SimpleNamespace(
        swiglu_limit=None,
        swiglu_alpha=None,
        swiglu_beta=None,
        activation=MoEActivation.SITU,
    )
    with pytest.raises(ValueError, match="activation of the experts = situ: not") as no:
        cpu_moe.activation_of(moe)
    assert "allowed ['gelu', " in str(no.value)
