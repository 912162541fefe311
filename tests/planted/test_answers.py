"""The planted model answers as constructed, and only under the right roles."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.transformers_greedy import greedy
from tidal_vllm.planted import make_prompt
from tidal_vllm.planted.spec import ROPE_THETA, UNK

DEPTHS = (0.05, 0.5, 0.9)
HEADS = {"mha": (4, 4), "gqa": (4, 2), "gqa3": (6, 2), "mqa": (4, 1)}
BLOCK_SIZE = 16
BUDGET = 64


class RoleSimulator:
    """A Llama in plain torch whose decode steps obey layer roles (batch of one)."""

    def __init__(self, spec, folder):
        self.spec = spec
        self.tensors = load_file(folder / "model.safetensors")
        self.frequency = ROPE_THETA ** (-torch.arange(64) / 64)

    def rope(self, x, positions):
        angle = (positions[:, None] * self.frequency).repeat(1, 2)
        half = torch.cat((-x[..., 64:], x[..., :64]), dim=-1)
        return x * angle.cos() + half * angle.sin()

    def norm(self, x, name):
        weight = self.tensors[f"{name}.weight"]
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    def forward(self, token_ids, past, attend):
        """Logits of the last token; ``past`` holds [key, value] per layer, extended."""
        start = past[0][0].shape[1] if past[0] else 0
        positions = torch.arange(start, start + len(token_ids))
        causal = torch.arange(start + len(token_ids)) <= positions[:, None]
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        for layer in range(self.spec.num_layers):
            name = f"model.layers.{layer}"
            normed = self.norm(x, f"{name}.input_layernorm")
            q, k, v = (
                F.linear(normed, self.tensors[f"{name}.self_attn.{proj}_proj.weight"])
                .view(len(token_ids), -1, 128)
                .transpose(0, 1)
                for proj in "qkv"
            )
            q, k = self.rope(q, positions), self.rope(k, positions)
            if past[layer]:
                k = torch.cat((past[layer][0], k), dim=1)
                v = torch.cat((past[layer][1], v), dim=1)
            past[layer] = [k, v]
            group = self.spec.num_heads // self.spec.num_kv_heads
            logits = q @ k.repeat_interleave(group, dim=0).mT * 128**-0.5
            weights = attend(layer, logits.masked_fill(~causal, -torch.inf))
            out = weights @ v.repeat_interleave(group, dim=0)
            out = out.transpose(0, 1).flatten(1)
            x = x + F.linear(out, self.tensors[f"{name}.self_attn.o_proj.weight"])
        x = self.norm(x[-1], "model.norm")
        return F.linear(x, self.tensors["lm_head.weight"])

    def accuracy(self, prompt, attend_step, past=None):
        """Share of answer tokens predicted when the true ones before are given."""
        past = list(past or self.prefill(prompt))
        inputs = [prompt.prompt_token_ids[-1], *prompt.answer_token_ids[:-1]]
        predicted = [
            self.forward([token], past, attend_step()).argmax().item()
            for token in inputs
        ]
        pairs = zip(predicted, prompt.answer_token_ids, strict=True)
        return sum(a == b for a, b in pairs) / len(inputs), predicted

    def prefill(self, prompt):
        past = [[] for _ in range(self.spec.num_layers)]
        self.forward(prompt.prompt_token_ids[:-1], past, dense)
        return past


def dense(layer, logits):
    return logits.softmax(dim=-1)


def with_roles(spec, select_layers):
    """A step in which SELECT layers choose the heaviest blocks for SPARSE ones."""

    def step():
        kept = None

        def attend(layer, logits):
            nonlocal kept
            weights = dense(layer, logits)
            length = logits.shape[-1]
            if layer in select_layers:
                mass = weights.sum(dim=(0, 1))
                mass = F.pad(mass, (0, -length % BLOCK_SIZE))
                mass = mass.view(-1, BLOCK_SIZE).sum(dim=1)
                mass[0] = mass[-1] = torch.inf
                top = torch.zeros_like(mass, dtype=torch.bool)
                top[mass.topk(BUDGET // BLOCK_SIZE).indices] = True
                kept = top.repeat_interleave(BLOCK_SIZE)[:length]
            elif layer not in spec.dense_layers:
                weights = dense(layer, logits.masked_fill(~kept, -torch.inf))
            return weights

        return attend

    return step


def with_window(spec):
    """A step in which all but the dense layers see only the last BUDGET tokens."""

    def attend(layer, logits):
        if layer not in spec.dense_layers:
            logits = logits.clone()
            logits[..., :-BUDGET] = -torch.inf
        return dense(layer, logits)

    return lambda: attend


@pytest.mark.parametrize(
    ("hops", "num_tokens", "heads"),
    [(1, 2000, "gqa"), *((2, 500, heads) for heads in HEADS)],
)
def test_greedy_continues_the_chain(planted, heads, hops, num_tokens):
    from transformers import LlamaForCausalLM

    num_heads, num_kv_heads = HEADS[heads]
    spec, folder = planted(hops=hops, num_heads=num_heads, num_kv_heads=num_kv_heads)
    model = LlamaForCausalLM.from_pretrained(folder)
    prompts = [make_prompt(spec, num_tokens, depth, seed=7) for depth in DEPTHS]
    wanted = [prompt.answer_token_ids for prompt in prompts]
    asked = [prompt.prompt_token_ids for prompt in prompts]
    assert greedy(model, asked, len(wanted[0])) == wanted


def test_bfloat16_and_many_layers(planted):
    from transformers import LlamaForCausalLM

    spec, folder = planted(hops=3, num_layers=32, dtype="bfloat16")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    prompts = [make_prompt(spec, 500, depth, seed=7) for depth in DEPTHS]
    wanted = [prompt.answer_token_ids for prompt in prompts]
    asked = [prompt.prompt_token_ids for prompt in prompts]
    assert greedy(model, asked, len(wanted[0])) == wanted


class TestRoles:
    """Which layers may select: the ground truth that ``select_layers`` promises."""

    @pytest.fixture(scope="class", params=[1, 2, 3], ids="hops{}".format)
    def case(self, planted, request):
        spec, folder = planted(hops=request.param)
        simulator = RoleSimulator(spec, folder)
        prompts = [make_prompt(spec, 1000, depth, seed=3) for depth in (0.05, 0.5)]
        return spec, simulator, [(p, simulator.prefill(p)) for p in prompts]

    @staticmethod
    def accuracy(case, attend_step):
        _, simulator, prompts = case
        scores = [simulator.accuracy(p, attend_step, past)[0] for p, past in prompts]
        return sum(scores) / len(scores)

    def test_dense_and_right_layers_answer(self, case):
        spec = case[0]
        assert self.accuracy(case, lambda: dense) == 1.0
        assert self.accuracy(case, with_roles(spec, spec.select_layers)) == 1.0

    def test_more_select_layers_do_no_harm(self, case):
        spec = case[0]
        assert self.accuracy(case, with_roles(spec, range(2, spec.num_layers))) == 1.0

    def test_every_other_choice_of_one_layer_collapses(self, case):
        spec = case[0]
        first, *later = spec.select_layers
        for i, right in enumerate(later):
            for wrong in set(range(first + 1, spec.num_layers)) - set(later):
                chosen = {first, *later[:i], wrong, *later[i + 1 :]}
                accuracy = self.accuracy(case, with_roles(spec, chosen))
                assert accuracy < 0.1, (wrong, right)

    def test_layer_one_chooses_nothing_useful(self, case):
        spec = case[0]
        chosen = (1, *spec.select_layers[1:])
        assert self.accuracy(case, with_roles(spec, chosen)) < 0.1

    def test_sliding_window_fails(self, case):
        assert self.accuracy(case, with_window(case[0])) < 0.1

    def test_one_layer_that_misses_is_answered_by_unk(self, case):
        spec, simulator, [(prompt, past), *_] = case
        broken = spec.output_layers[-1]

        def attend(layer, logits):
            return dense(layer, logits.roll(40, -1) if layer == broken else logits)

        accuracy, predicted = simulator.accuracy(prompt, lambda: attend, past)
        assert accuracy == 0.0
        assert set(predicted) == {UNK}

    def test_swapped_kv_heads_fail(self, case):
        spec, simulator, [(prompt, past), *_] = case
        swapped = [[tensor.flip(0) for tensor in layer] for layer in past]
        assert simulator.accuracy(prompt, lambda: dense, swapped)[0] < 0.1
