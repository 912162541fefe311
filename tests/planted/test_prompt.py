"""Where a prompt's chain is planted, and which prompts are refused."""

import pytest

from tidal_vllm.planted import PlantedSpec, make_prompt
from tidal_vllm.planted.spec import BOS, EOS

DEPTHS = (0.05, 0.5, 0.9)


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
