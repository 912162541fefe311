import math

import pytest
import torch

from tests.kernels.exact import EXP, FEW, UNIT, assert_within, half_unit
from tidal_vllm.kernels.reference import merge_states


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_it_joins_two_softmaxes():
    """Each lse comes rounded to fp32, a relative error of the weight."""
    scores, values = random(3, 4, 20).double() * 10, random(3, 20, 8).double()
    states = []
    for part in (slice(0, 7), slice(7, 20)):
        weights = scores[..., part].softmax(-1)
        states.append((weights @ values[:, part]).float())
        states.append(scores[..., part].logsumexp(-1).float())
    out, lse = merge_states(*states)
    exact_lse = scores.logsumexp(-1)
    rounding = 2 * half_unit(exact_lse, torch.float32)
    error = rounding + (EXP + FEW * (1 + exact_lse.abs())) * UNIT
    assert_within(lse, exact_lse, error)
    shares = scores.softmax(-1)
    error = 2 * error[..., None] * (shares @ values.abs())
    assert_within(out, shares @ values, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_set_changes_nothing_bit_for_bit(dtype):
    out, lse = random(5, 3, 8).to(dtype), random(5, 3)
    nothing = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for merged in (merge_states(out, lse, *nothing), merge_states(*nothing, out, lse)):
        assert merged[0].dtype == dtype
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)


def test_two_empty_sets_are_empty():
    nothing = torch.zeros(2, 3, 8), torch.full((2, 3), -math.inf)
    out, lse = merge_states(*nothing, *nothing)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_a_far_heavier_state_wins():
    one, other = torch.full((1, 1, 4), 1.0), torch.full((1, 1, 4), 2.0)
    out, lse = merge_states(
        one, torch.tensor([[900.0]]), other, torch.tensor([[-900.0]])
    )
    assert torch.equal(out, one)
    assert lse.item() == 900.0
