"""Questions to a planted model, with the answers it must give."""

import random
from dataclasses import dataclass

from tidal_vllm.planted.spec import BOS, EOS, SEP, SPECIAL_IDS, PlantedSpec, check_int
from tidal_vllm.planted.tokenizer import to_text

_LINK_SIZE = 3
_SCATTER = 64


@dataclass(frozen=True)
class PlantedPrompt:
    """One question.

    Attributes:
        prompt_token_ids: ``<bos>``, haystack, needle, haystack, the asking word.
        answer_token_ids: What greedy decoding gives: ``chain_len`` words, ``<eos>``.
        text: The prompt as text, without ``<bos>``, which the tokenizer adds.
        answer_text: The answer's words, without ``<eos>``. As a completion it comes
            with a leading space, so that ``text`` and it can be joined.
    """

    prompt_token_ids: list[int]
    answer_token_ids: list[int]
    text: str
    answer_text: str


def make_prompt(
    spec: PlantedSpec, num_tokens: int, depth: float, seed: int, chain_len: int = 8
) -> PlantedPrompt:
    """Hide a chain of unique words in random ones and ask for it by its first word.

    Haystack words may repeat but are never words of the needle.

    Args:
        spec: The model asked.
        num_tokens: Length of the prompt, ``<bos>`` and question included.
        depth: Where the needle lies, 0 (start) to 1 (end). With several hops the links
            of hop k are scattered around ``(depth + k / hops) mod 1``, so that the
            hops of one word lie far apart.
        seed: Seed of the words and places.
        chain_len: Words in the answer, at least 1.

    Raises:
        ValueError: A value is out of range, or the needle does not fit the prompt, the
            vocabulary or the model.
    """
    check_int("seed", seed, 0, (1 << 63) - 1)
    check_int("chain_len", chain_len, 1, spec.max_position_embeddings)
    check_int("num_tokens", num_tokens, 1, spec.max_position_embeddings)
    if isinstance(depth, bool) or not isinstance(depth, int | float):
        raise ValueError(f"depth={depth!r}: allowed is a number 0..1")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: allowed is 0..1")
    _check_fit(spec, num_tokens, chain_len)

    rng = random.Random(f"prompt {seed} {num_tokens} {depth} {chain_len}")
    words = list(range(len(SPECIAL_IDS), spec.vocab_size))
    rng.shuffle(words)
    chain = [words.pop() for _ in range(chain_len + 1)]
    steps = list(zip(chain, [*chain[1:], EOS], strict=True))
    links = [
        [first, *(words.pop() for _ in range(spec.hops - 1)), last]
        for first, last in steps
    ]
    tokens = [BOS, *rng.choices(words, k=num_tokens - 2), chain[0]]
    if spec.hops == 1:
        _place_chain(tokens, links, depth)
    else:
        _place_links(tokens, links, depth, rng)
    answer = [*chain[1:], EOS]
    return PlantedPrompt(
        prompt_token_ids=tokens,
        answer_token_ids=answer,
        text=to_text(spec, tokens[1:]),
        answer_text=to_text(spec, answer[:-1]),
    )


def _check_fit(spec: PlantedSpec, num_tokens: int, chain_len: int) -> None:
    num_links = chain_len + 1
    if spec.hops == 1:
        needle = num_links + 1
    else:
        needle = num_links * _LINK_SIZE * (spec.hops + 1)
    if num_tokens < needle + 2:
        raise ValueError(
            f"num_tokens={num_tokens}: allowed is {needle + 2} or more with "
            f"chain_len={chain_len} and hops={spec.hops}"
        )
    if num_tokens + num_links > spec.max_position_embeddings:
        raise ValueError(
            f"num_tokens={num_tokens}: allowed is at most "
            f"{spec.max_position_embeddings - num_links} with chain_len={chain_len} "
            f"and max_position_embeddings={spec.max_position_embeddings}"
        )
    # NOTE: the haystack keeps half of the words, so that it stays random.
    most = (spec.vocab_size - len(SPECIAL_IDS)) // 2 // spec.hops - 1
    if chain_len > most:
        raise ValueError(
            f"chain_len={chain_len}: allowed is 1..{most} with "
            f"vocab_size={spec.vocab_size} and hops={spec.hops}"
        )


def _place_chain(tokens: list[int], links: list[list[int]], depth: float) -> None:
    """Write the needle's words in a row."""
    needle = [link[0] for link in links] + [links[-1][-1]]
    start = 1 + int(depth * (len(tokens) - 2 - len(needle)))
    tokens[start : start + len(needle)] = needle


def _place_links(
    tokens: list[int], links: list[list[int]], depth: float, rng: random.Random
) -> None:
    """Scatter ``x y .`` for each hop of each link; hops in regions of their own."""
    hops = len(links[0]) - 1
    span = len(tokens) - 2
    width = min(span // (hops + 1), _SCATTER * len(links))
    for hop in range(hops):
        centre = depth + hop / hops
        centre -= centre > 1
        start = 1 + int(centre * (span - width))
        slots = rng.sample(range(width // _LINK_SIZE), len(links))
        for link, slot in zip(links, slots, strict=True):
            place = start + slot * _LINK_SIZE
            tokens[place : place + _LINK_SIZE] = [link[hop], link[hop + 1], SEP]
