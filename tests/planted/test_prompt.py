"""Where a prompt's chain is planted, and which prompts are refused."""

import pytest

from tidal_vllm.planted import PlantedPrompt, PlantedSpec, make_prompt
from tidal_vllm.planted.spec import BOS, EOS, SEP

DEPTHS = (0.05, 0.5, 0.9)


def needle_positions(prompt: PlantedPrompt, hops: int) -> list[tuple[int, ...]]:
    """For each answer token, the prompt positions to read for it, one per hop.

    Each stands behind the only place where its word is followed by another word.
    """
    ids, found = prompt.prompt_token_ids, []
    asked = ids[-1]
    for _ in prompt.answer_token_ids:
        positions = []
        for _ in range(hops):
            followed = zip(ids, ids[1:], strict=False)
            (before,) = [
                i
                for i, (t, after) in enumerate(followed)
                if t == asked and after != SEP
            ]
            positions.append(before + 1)
            asked = ids[before + 1]
        found.append(tuple(positions))
    return found


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
        found = needle_positions(prompt, hops)
        needle = {p for positions in found for p in positions}
        for token, positions in zip(answer, found, strict=True):
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
        for first, second in needle_positions(prompt, hops=2):
            assert abs(first - second) > 1000

    def test_depth_is_the_place_of_the_chain(self):
        for depth in DEPTHS:
            prompt = make_prompt(PlantedSpec(), 1000, depth, seed=5)
            (first,) = needle_positions(prompt, hops=1)[0]
            assert first == pytest.approx(1000 * depth, abs=15)

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
