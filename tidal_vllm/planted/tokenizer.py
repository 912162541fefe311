"""One word, one token: the planted model's vocabulary and tokenizer files."""

import itertools
import json
import random
from functools import lru_cache
from pathlib import Path

from tidal_vllm.planted.spec import BOS, EOS, PAD, SEP, SPECIAL_IDS, UNK, PlantedSpec

SPECIAL_WORDS = {
    BOS: "<bos>",
    EOS: "<eos>",
    UNK: "<unk>",
    PAD: "<pad>",
    SEP: ".",
}

# NOTE: nothing may follow the last message: its last word is the question.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


@lru_cache(maxsize=8)
def vocabulary(spec: PlantedSpec) -> tuple[str, ...]:
    """The word of each token id, made up of two or three syllables."""
    syllables = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]
    count = spec.vocab_size - len(SPECIAL_IDS)
    made_up = itertools.chain(
        itertools.product(syllables, repeat=2), itertools.product(syllables, repeat=3)
    )
    short = len(syllables) ** 2
    pool = ["".join(word) for word in itertools.islice(made_up, max(short, count))]
    random.Random(f"words {spec.seed}").shuffle(pool)
    return (*(SPECIAL_WORDS[i] for i in SPECIAL_IDS), *pool[:count])


def to_text(spec: PlantedSpec, token_ids: list[int]) -> str:
    """Token ids as text: the words, joined by single spaces."""
    words = vocabulary(spec)
    return " ".join(words[i] for i in token_ids)


def write_tokenizer(folder: Path, spec: PlantedSpec) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing folder."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    ids = {word: i for i, word in enumerate(vocabulary(spec))}
    bos, eos, unk, pad = (SPECIAL_WORDS[i] for i in (BOS, EOS, UNK, PAD))
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unk))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, BOS)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True) for word in (bos, eos, unk, pad)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
