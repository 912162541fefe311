"""The planted model answers as constructed, and only under the right roles."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tidal_vllm.planted import (
    PlantedSpec,
    build_planted_model,
    load_spec,
    make_prompt,
)
from tidal_vllm.planted.spec import BOS, CODE_SIZE, EOS, ROPE_THETA, SEP, UNK
from tidal_vllm.planted.weights import MIN_DISTANCE, codes

DEPTHS = (0.05, 0.5, 0.9)
HEADS = {"mha": (4, 4), "gqa": (4, 2), "gqa3": (6, 2), "mqa": (4, 1)}
BLOCK_SIZE = 16
BUDGET = 64


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")

    def build_once(**fields):
        spec = PlantedSpec(**fields)
        name = "-".join(str(value) for value in dataclasses.astuple(spec))
        return spec, build_planted_model(root / name.replace(" ", ""), spec)

    return build_once


def greedy(model, prompts):
    input_ids = torch.tensor([prompt.prompt_token_ids for prompt in prompts])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=len(prompts[0].answer_token_ids),
        do_sample=False,
    )
    return output[:, input_ids.shape[1] :].tolist()


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
def test_greedy_continues_the_chain(build, heads, hops, num_tokens):
    from transformers import LlamaForCausalLM

    num_heads, num_kv_heads = HEADS[heads]
    spec, folder = build(hops=hops, num_heads=num_heads, num_kv_heads=num_kv_heads)
    model = LlamaForCausalLM.from_pretrained(folder)
    prompts = [make_prompt(spec, num_tokens, depth, seed=7) for depth in DEPTHS]
    assert greedy(model, prompts) == [p.answer_token_ids for p in prompts]


def test_bfloat16_and_many_layers(build):
    from transformers import LlamaForCausalLM

    spec, folder = build(hops=3, num_layers=32, dtype="bfloat16")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    prompts = [make_prompt(spec, 500, depth, seed=7) for depth in DEPTHS]
    assert greedy(model, prompts) == [p.answer_token_ids for p in prompts]


class TestRoles:
    """Which layers may select: the ground truth that ``select_layers`` promises."""

    @pytest.fixture(scope="class", params=[1, 2, 3], ids="hops{}".format)
    def case(self, build, request):
        spec, folder = build(hops=request.param)
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


class TestTokenizer:
    @pytest.fixture(scope="class")
    def tokenizer(self, build):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(build()[1])

    @pytest.mark.parametrize("hops", [1, 2])
    def test_text_in_is_text_out(self, tokenizer, hops):
        prompt = make_prompt(PlantedSpec(hops=hops), 500, 0.5, seed=1)
        assert tokenizer(prompt.text).input_ids == prompt.prompt_token_ids
        decoded = tokenizer.decode(prompt.answer_token_ids, skip_special_tokens=True)
        assert decoded == prompt.answer_text
        assert tokenizer.decode(prompt.prompt_token_ids[1:]) == prompt.text

    def test_unknown_words_and_special_tokens(self, tokenizer):
        assert tokenizer("Hello <eos> .").input_ids == [BOS, UNK, EOS, SEP]
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
        assert (tokenizer.unk_token, tokenizer.pad_token) == ("<unk>", "<pad>")

    def test_streamed_text_continues_the_prompt(self, tokenizer):
        from tokenizers.decoders import DecodeStream

        prompt = make_prompt(PlantedSpec(), 500, 0.5, seed=1)
        stream = DecodeStream(ids=prompt.prompt_token_ids, skip_special_tokens=True)
        backend = tokenizer._tokenizer
        pieces = [stream.step(backend, i) or "" for i in prompt.answer_token_ids]
        assert "".join(pieces) == " " + prompt.answer_text

    def test_chat_ends_in_the_question(self, tokenizer):
        prompt = make_prompt(PlantedSpec(), 500, 0.5, seed=1)
        context, question = prompt.text.rsplit(" ", 1)
        asked = [
            {"role": "system", "content": context},
            {"role": "user", "content": question},
        ]
        for messages in (asked, [{"role": "user", "content": prompt.text}]):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert ids == prompt.prompt_token_ids

    def test_chat_can_ask_again(self, tokenizer, build):
        from transformers import LlamaForCausalLM

        spec, folder = build()
        prompt = make_prompt(spec, 500, 0.5, seed=1)
        messages = [
            {"role": "user", "content": prompt.text},
            {"role": "assistant", "content": prompt.answer_text},
            {"role": "user", "content": prompt.text.rsplit(" ", 1)[1]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        again = dataclasses.replace(prompt, prompt_token_ids=ids)
        model = LlamaForCausalLM.from_pretrained(folder)
        assert greedy(model, [again]) == [prompt.answer_token_ids]


class TestPrompt:
    @pytest.mark.parametrize("depth", [0, 0.5, 1])
    @pytest.mark.parametrize(
        ("hops", "num_tokens"), [(1, 200), (2, 1003), (3, 200), (4, 1003), (4, 50000)]
    )
    def test_links_are_where_they_should_be(self, hops, depth, num_tokens):
        spec = PlantedSpec(hops=hops)
        prompt = make_prompt(spec, num_tokens, depth, seed=5)
        ids, answer = prompt.prompt_token_ids, prompt.answer_token_ids
        assert len(ids) == num_tokens
        assert ids[0] == BOS and answer[-1] == EOS
        assert len(set(answer)) == len(answer) == 9
        asked = ids[-1]
        needle = {p for positions in prompt.needle_positions for p in positions}
        for token, positions in zip(answer, prompt.needle_positions, strict=True):
            assert len(positions) == hops
            for position in positions:
                assert ids[position - 1] == asked
                asked = ids[position]
                others = {i for i, t in enumerate(ids) if t == asked and i != position}
                assert {i + 1 for i in others} <= needle | {num_tokens}
            assert asked == token

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_hops_lie_far_apart(self, depth):
        prompt = make_prompt(PlantedSpec(hops=2), 4000, depth, seed=5)
        for first, second in prompt.needle_positions:
            assert abs(first - second) > 1000

    def test_depth_is_the_place_of_the_chain(self):
        for depth in DEPTHS:
            prompt = make_prompt(PlantedSpec(), 1000, depth, seed=5)
            assert prompt.needle_positions[0][0] == pytest.approx(1000 * depth, abs=15)

    def test_seed_fixes_everything(self):
        spec = PlantedSpec()
        assert make_prompt(spec, 500, 0.5, 1) == make_prompt(spec, 500, 0.5, 1)
        assert make_prompt(spec, 500, 0.5, 1) != make_prompt(spec, 500, 0.5, 2)

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        {
            "too short": ((10, 0.5, 0), "num_tokens=10: allowed is 12 or more"),
            "too long": ((131072, 0.5, 0), "num_tokens=131072: allowed is at most"),
            "depth in percent": ((500, 50, 0), r"depth=50: allowed is 0\.\.1"),
            "depth as text": ((500, "half", 0), "depth='half'"),
            "negative seed": ((500, 0.5, -1), "seed=-1"),
            "no answer": ((500, 0.5, 0, 0), "chain_len=0"),
            "too many words": ((5000, 0.5, 0, 1500), r"chain_len=1500: allowed is 1"),
        }.values(),
    )
    def test_refuses(self, arguments, complaint):
        with pytest.raises(ValueError, match=complaint):
            make_prompt(PlantedSpec(), *arguments)


class TestSpec:
    @pytest.mark.parametrize(
        ("fields", "complaint"),
        {
            "no hops": ({"hops": 0}, r"hops=0: allowed is 1\.\.4"),
            "hops as float": ({"hops": 2.0}, "hops=2.0: allowed are integers"),
            "hops as bool": ({"hops": True}, "hops=True: allowed are integers"),
            "few layers": ({"num_layers": 3}, "num_layers=3"),
            "few layers for hops": ({"hops": 2, "num_layers": 4}, "needs at least 5"),
            "ragged groups": ({"num_heads": 6, "num_kv_heads": 4}, "num_heads=6"),
            "small vocabulary": ({"vocab_size": 63}, "vocab_size=63"),
            "unknown dtype": ({"dtype": "fp8"}, "dtype='fp8': allowed are float32"),
            "hop count": ({"hop_layers": (2, 5)}, "hop_layers=.*hops=1"),
            "hop order": ({"hops": 2, "hop_layers": (2, 2)}, "hop_layers"),
            "hop range": ({"hops": 2, "hop_layers": (2, 8)}, "below num_layers=8"),
            "no room for the alias": ({"hops": 2, "hop_layers": (2, 3)}, "hop_layers"),
            "hop type": ({"hops": 2, "hop_layers": 5}, "hop_layers=5"),
        }.values(),
    )
    def test_refuses(self, fields, complaint):
        with pytest.raises(ValueError, match=complaint):
            PlantedSpec(**fields)

    @pytest.mark.parametrize("num_layers", [7, 8, 16, 32])
    @pytest.mark.parametrize("hops", [1, 2, 3, 4])
    def test_default_roles_are_allowed_ones(self, hops, num_layers):
        spec = PlantedSpec(hops=hops, num_layers=num_layers)
        assert PlantedSpec(
            hops=hops, num_layers=num_layers, hop_layers=spec.select_layers
        )
        assert spec.dense_layers == (0, 1)
        assert len(spec.select_layers) == hops == len(spec.alias_layers) + 1
        assert len(spec.output_layers) >= 1

    @pytest.mark.parametrize("vocab_size", [64, 1000, 16384])
    def test_no_two_codes_look_alike(self, vocab_size):
        words = codes(vocab_size, seed=0)
        assert words.shape == (vocab_size, CODE_SIZE)
        similarity = words[:200] @ words.T
        similarity[range(len(similarity)), range(len(similarity))] = 0
        assert similarity.max() <= CODE_SIZE - 2 * MIN_DISTANCE


class TestBuild:
    def test_reuses_and_replaces(self, tmp_path):
        folder = build_planted_model(tmp_path / "a" / "model", PlantedSpec())
        built = (folder / "model.safetensors").stat()
        assert build_planted_model(folder, PlantedSpec()) == folder
        assert (folder / "model.safetensors").stat() == built
        other = PlantedSpec(hops=2)
        build_planted_model(folder, other)
        assert load_spec(folder) == other
        assert [path.name for path in folder.parent.iterdir()] == ["model"]

    def test_equal_specs_build_equal_files(self, tmp_path):
        files = [
            {path.name: path.read_bytes() for path in folder.iterdir()}
            for folder in (
                build_planted_model(tmp_path / name, PlantedSpec(num_layers=4))
                for name in "ab"
            )
        ]
        assert files[0] == files[1]

    def test_leaves_foreign_folders_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("dear")
        with pytest.raises(ValueError, match="out_dir=.*something else"):
            build_planted_model(tmp_path, PlantedSpec())
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
        with pytest.raises(ValueError, match="planted.json"):
            load_spec(tmp_path)

    def test_config_is_a_plain_llama(self, build):
        spec, folder = build(hops=2)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["head_dim"] == spec.head_size == 128
        assert config["hidden_size"] == spec.hidden_size == 256
        assert (folder / "model.safetensors").stat().st_size < 20e6

    def test_import_is_light(self):
        root = Path(__file__).parents[2]
        heavy = "{'torch', 'vllm', 'transformers', 'tokenizers', 'safetensors'}"
        script = f"import sys, tidal_vllm.planted; print({heavy} & sys.modules.keys())"
        output = subprocess.run(
            [sys.executable, "-c", script],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert output.stdout.strip() == "set()"
