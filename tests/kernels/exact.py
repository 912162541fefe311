"""Attention in float64, and how far from it fp32 arithmetic may be on any processor.

A bound that is tuned to one processor fails on the next, where vectors are wider, sums
go in another order or exponentials are coarser. These bounds follow from the terms
themselves, to first order in u = 2**-24, the unit roundoff of fp32:

A sum of n terms in any order errs by at most gamma(n) * sum |terms|, with gamma(n) =
min(n, 6 sqrt(n)) u: n u always (Higham, Accuracy and Stability of Numerical Algorithms,
section 4.2), 6 sqrt(n) u with a probability of failure below 4e-8 (Higham and Mary, A
New Approach to Probabilistic Rounding Error Analysis, 2019, theorem 2.4).

A score, scale * q.k, is such a sum over head_size products, each rounded as well as
the scale. An error d of the score less the largest is a relative error d of its weight,
beside that of the exponential:

    d = gamma(head_size + FEW) * scale * sum |q_i k_i| + FEW u |score - top| + EXP u

The output is sum w v / sum w, so with p the exact softmax, and r the unit roundoff of
what weights are rounded to before they meet V (0 where they stay fp32):

    |output - exact| <= sum p (d + r + gamma(n)) |v| + |exact| sum p (d + gamma(n))
    |lse - exact|    <= sum p d + gamma(n) + FEW u (|exact| + log n)

To this `assert_within` adds half a unit in the last place of the result's dtype.
"""

import math
from dataclasses import dataclass

import torch

from tests.kernels.naive import Positions, Rows

UNIT = 2.0**-24
# Of the coarsest exponential that runs, in units of u: `exp_u20` of ATen's attention
# on CPUs errs by 20 units in the last place, the others by 1 or 2.
EXP = 40
# Operations beside those of the sum: scaling, merging of parts, division.
FEW = 8


@dataclass(frozen=True)
class Exact:
    """Attention in float64, and the largest error of each number before rounding."""

    output: torch.Tensor
    output_error: torch.Tensor
    lse: torch.Tensor
    lse_error: torch.Tensor
    block_lse: torch.Tensor | None = None
    block_lse_error: torch.Tensor | None = None

    def __getitem__(self, rows: list[int] | slice) -> "Exact":
        return Exact(*(t if t is None else t[rows] for t in vars(self).values()))


_ATTENTION = ("output", "output_error", "lse", "lse_error")


def gamma(terms: torch.Tensor | int) -> torch.Tensor:
    """The relative error of a sum of so many terms, of the sum of their sizes."""
    terms = torch.as_tensor(terms, dtype=torch.float64)
    return torch.minimum(terms, 6 * terms.sqrt()) * UNIT


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    weights: float = 0.0,
) -> Exact:
    """One softmax for each query, over the tokens that it sees.

    Args:
        query: `[..., head_size]`.
        keys, values: `[..., tokens, head_size]`, broadcast with the queries.
        seen: `[..., tokens]` bool.
        weights: Unit roundoff of what the softmax is rounded to for the values.
    """
    query, keys, values = query.double(), keys.double(), values.double()

    def dot(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return scale * torch.einsum("...d,...td->...t", q, k)

    def mix(shares: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...t,...td->...d", shares, v)

    scores = dot(query, keys).masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    top = scores.amax(-1, keepdim=True) if seen.shape[-1] else scores.new_zeros(())
    share = (scores - lse[..., None]).exp().nan_to_num(0.0)  # without tokens: NaN
    below = (top - scores).nan_to_num(0.0, posinf=0.0)
    wrong = gamma(query.shape[-1] + FEW) * dot(query.abs(), keys.abs())
    wrong = wrong + FEW * UNIT * below + EXP * UNIT
    terms = seen.sum(-1).double()
    summing = gamma(terms + FEW)
    drift = (share * wrong).sum(-1)
    output = mix(share, values)
    error = mix(share * (wrong + weights + summing[..., None]), values.abs())
    error = error + output.abs() * (drift + summing)[..., None]
    size = lse.abs().nan_to_num(posinf=0.0) + terms.clamp(min=1).log()
    lse_error = (drift + summing + FEW * UNIT * size).masked_fill(lse.isinf(), 0.0)
    return Exact(output, error, lse, lse_error)


def decode(
    query: torch.Tensor,
    keys: Rows,
    values: Rows,
    scale: float,
    positions_of: Positions | None = None,
    size: int | None = None,
    weights: float = 0.0,
) -> Exact:
    """Every row and head, as `naive.decode`; with `size` also its blocks' lse.

    Args:
        keys, values: One `[seq_len, num_kv_heads, head_size]` per sequence.
        positions_of: (row, head) to the positions attended to; None: all.
        size: Tokens of a selection block.
        weights: Unit roundoff of what the softmax is rounded to for the values.
    """
    rows = []
    num_heads = query.shape[1]
    most = max((len(k) for k in keys), default=0)
    for row, (k, v) in enumerate(zip(keys, values, strict=True)):
        group = num_heads // k.shape[1]
        k, v = (t.transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
        seen = torch.ones(num_heads, k.shape[1], dtype=torch.bool)
        if positions_of is not None:
            seen[:] = False
            for head in range(num_heads):
                seen[head, list(positions_of(row, head))] = True
        rows.append(vars(attend(query[row], k, v, scale, seen, weights)))
        if size is not None:
            blocks = -(-most // size)
            pad = (0, 0, 0, blocks * size - k.shape[1])
            k = torch.nn.functional.pad(k.double(), pad).unflatten(1, (blocks, size))
            seen = torch.nn.functional.pad(seen, pad[2:]).unflatten(1, (blocks, size))
            part = attend(query[row][:, None], k, k, scale, seen)
            rows[-1]["block_lse"], rows[-1]["block_lse_error"] = (
                part.lse,
                part.lse_error,
            )
    if not rows:
        nothing = torch.zeros(query.shape).double()
        sums = nothing.sum(-1)
        return Exact(nothing, nothing, sums, sums)
    return Exact(*(_stack([row[name] for row in rows]) for name in rows[0]))


def extend(
    query: torch.Tensor,
    keys: Rows,
    values: Rows,
    query_lens: list[int],
    scale: float,
    window: int | None = None,
) -> Exact:
    """Causal, as `naive.extend`; one row for each query token."""
    found, first = [], 0
    for k, v, query_len in zip(keys, values, query_lens, strict=True):
        q = query[first : first + query_len]
        group = q.shape[1] // k.shape[1]
        k, v = (t.transpose(0, 1).repeat_interleave(group, 0) for t in (k, v))
        at = torch.arange(len(k[0]))
        behind = at[len(at) - query_len :, None, None] - at
        seen = (behind >= 0) & (behind < (window or math.inf))
        found.append(attend(q, k, v, scale, seen.expand(-1, q.shape[1], -1)))
        first += query_len
    return Exact(
        *(torch.cat([getattr(one, name) for one in found]) for name in _ATTENTION)
    )


def _stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.stack(tensors)


def half_unit(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of dtype, for numbers of that size."""
    info = torch.finfo(dtype)
    value = value.double().abs().clamp(min=info.tiny)
    _, exponent = torch.frexp(value)
    return torch.ldexp(torch.full_like(value, info.eps / 4), exponent)


def assert_within(
    actual: torch.Tensor,
    exact: torch.Tensor,
    error: torch.Tensor,
    what: str = "result",
    roundings: int = 1,
) -> None:
    """Each number within its error and the rounding of its dtype; -inf is -inf.

    Args:
        roundings: half units in the last place; 2 where numbers are cut off.
    """
    assert actual.shape == exact.shape
    found, exact, infinite = actual.cpu().double(), exact.double(), exact.isinf()
    largest = exact.abs().masked_fill(infinite, 0.0) + error
    allowed = error + roundings * half_unit(largest, actual.dtype)
    allowed = allowed.masked_fill(infinite, 0.0)
    off = (found - exact).abs().masked_fill(found == exact, 0.0)
    wrong = ~(off <= allowed)  # a NaN is wrong
    if wrong.any():
        worst = int((off / allowed.clamp(min=1e-300)).nan_to_num(math.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, one off by "
            f"{off.flatten()[worst]:.3g}, allowed {allowed.flatten()[worst]:.3g}"
        )
