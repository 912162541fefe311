"""The tokenizer of a planted model: its words, its special tokens, its chats."""

import pytest

from tests.support.transformers_greedy import greedy
from tidal_vllm.planted import PlantedSpec, make_prompt
from tidal_vllm.planted.spec import BOS, EOS, SEP, UNK


class TestTokenizer:
    @pytest.fixture(scope="class")
    def tokenizer(self, planted):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(planted()[1])

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

    def test_chat_can_ask_again(self, tokenizer, planted):
        from transformers import LlamaForCausalLM

        spec, folder = planted()
        prompt = make_prompt(spec, 500, 0.5, seed=1)
        messages = [
            {"role": "user", "content": prompt.text},
            {"role": "assistant", "content": prompt.answer_text},
            {"role": "user", "content": prompt.text.rsplit(" ", 1)[1]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        model = LlamaForCausalLM.from_pretrained(folder)
        wanted = prompt.answer_token_ids
        assert greedy(model, [ids], len(wanted)) == [wanted]
