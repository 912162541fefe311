"""select_blocks: which blocks each set keeps, exactly."""

import math

import pytest
import torch

from tests.kernels import naive
from tests.kernels.batches import make_batch
from tests.kernels.exact import EXP, FEW, UNIT, assert_within
from tests.support.rules import rule_of
from tidal_vllm.kernels import Workspace, reference
from tidal_vllm.kernels.workspace import FIRST_DIGITS


def masses(*shape, levels=4096, seed=0):
    """Random multiples of 1 / levels: equal ones are ties, others differ clearly."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, shape, generator=rng) / levels


def relative(scores):
    """The relative error of exp(score) for a score that was rounded."""
    return (EXP + FEW * (1 + scores.abs())) * UNIT


def select(
    kernels,
    mass,
    seq_lens,
    rule,
    *,
    num_sets=1,
    max_blocks=None,
    stride=0,
    in_quads=False,
):
    """Run the op on block_lse = log(mass) and lse = 0.

    Whatever the op must not read holds NaN, and what it must not write holds 7. With
    `in_quads` the lines of block_lse and mass begin at multiples of 16 bytes.
    """
    rows, heads, used = mass.shape
    spare, mass_spare = (4 + -used % 4,) * 2 if in_quads else (5, 3)
    most = -(-max(rule.token_budget, rule.sparse_threshold) // rule.select_block_size)
    max_blocks = max_blocks or most
    wide = torch.full((rows, heads, used + spare), math.nan)
    block_lse = wide[..., :used]
    block_lse.copy_(mass.log())
    for row, seq_len in enumerate(seq_lens):
        block_lse[row, :, -(-max(seq_len, 0) // rule.select_block_size) :] = math.nan
    blocks = torch.full((rows + 1, num_sets, max_blocks + stride), 7, dtype=torch.int32)
    lens = torch.full((rows + 1, num_sets + stride), 7, dtype=torch.int32)
    tensors = {
        "block_lse": block_lse,
        "lse": torch.zeros(rows, heads),
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "topk_blocks": blocks[..., :max_blocks],
        "topk_lens": lens[:, :num_sets],
        "mass": torch.full((rows + 1, num_sets, used + mass_spare), math.nan),
        "arrivals": torch.zeros(rows + 1, heads, dtype=torch.int32),
        "digit_counts": torch.zeros(
            rows + 1, num_sets, FIRST_DIGITS, dtype=torch.int32
        ),
    }
    counters = ("arrivals", "digit_counts")
    outputs = ("topk_blocks", "topk_lens", *counters)
    kernels.run("select_blocks", tensors, outputs, **vars(rule))
    for name in counters:
        assert not tensors[name].any(), f"{name} do not end as zeros"
    return tensors, blocks, lens


def check(kernels, mass, seq_lens, rule, **how):
    tensors, blocks, lens = select(kernels, mass, seq_lens, rule, **how)
    expected = torch.full_like(blocks, 7)
    expected_lens = torch.full_like(lens, 7)
    num_sets = tensors["topk_blocks"].shape[1]
    batch = make_batch([0] * mass.shape[0], num_kv_heads=1, group=mass.shape[1])
    args = batch.args(
        workspace=Workspace(lse=tensors["lse"], block_lse=tensors["block_lse"]),
        topk_blocks=expected[..., : tensors["topk_blocks"].shape[2]],
        topk_lens=expected_lens[:, :num_sets],
    )
    reference.select_blocks(args, tensors["seq_lens"], rule)
    assert torch.equal(lens, expected_lens)
    assert torch.equal(blocks, expected)


def case(name, *given, quick=False):
    return pytest.param(*given, id=name, marks=[] if quick else pytest.mark.extended)


# Number of blocks, lengths, budget, block size, sinks, recent tokens, levels of mass.
CASES = [
    case("64K", 4096, [65536, 65521, 4097, 4096], 4096, 16, 16, 1024, 4096, quick=True),
    case("ties", 300, [4800, 4777], 1024, 16, 16, 300, 3, quick=True),
    case("two chunks and a bit", 1025, [16400, 16399, 16385], 1024, 16, 0, 1, 4096),
    case("ties in three chunks", 34000, [34000, 33333], 9000, 1, 1, 340, 50),
    case("ties beyond the list", 20000, [20000], 9000, 1, 1, 340, 3),
    case("ties beyond the masks", 70001, [70001], 40000, 1, 1, 340, 3),
    # A thread block takes up to three of the tiles of 2,048: there are 615.
    case("many tiles", 8300, [8300, 8200, 4097, *[-1] * 120], 1024, 1, 4, 300, 4096),
    case("one more than forced", 300, [4800, 4777], 48, 16, 16, 1, 4096),
    case("single tokens", 3000, [3000, 2999, 1025, 17], 1024, 1, 1, 340, 3),
    case("single tokens, all free", 3000, [3000, 2999, 1025, 17], 1024, 1, 0, 1, 4096),
    case("blocks of 64", 400, [25600, 25599, 700], 2048, 64, 0, 618, 4096),
    case("tiny", 9, [9, 8, 5, 4, 3, 0], 4, 1, 1, 1, 3),
    case("rows left out", 40, [-1, 40, 0, -(2**31), 3, -40], 4, 1, 0, 1, 3, quick=True),
    case("all rows left out", 9, [-1, -9], 4, 1, 0, 1, 3),
]


@pytest.mark.parametrize("blocks, lens, budget, size, sinks, recent, levels", CASES)
def test_it_means_what_the_reference_says(
    kernels, blocks, lens, budget, size, sinks, recent, levels
):
    rule = rule_of(budget, size, sinks, recent)
    check(kernels, masses(len(lens), 1, blocks, levels=levels), lens, rule)


@pytest.mark.extended
@pytest.mark.parametrize("blocks", [1023, 1024, 70001])
def test_any_number_of_blocks(kernels, blocks):
    """65,536 blocks of 16 are a million tokens, so each warp takes many blocks."""
    mass = masses(1, 1, blocks, levels=2**20, seed=blocks)
    check(kernels, mass, [blocks * 16 - 3], rule_of(4096, 16, 4, 1024))


@pytest.mark.extended
@pytest.mark.parametrize(
    "kept, levels", [(1, 4096), (2, 1), (1023, 2), (1998, 4096), (1999, 2)]
)
def test_any_room(kernels, kept, levels):
    check(kernels, masses(1, 1, 2000, levels=levels), [2000], rule_of(kept, 1))


@pytest.mark.extended
@pytest.mark.parametrize("spread", [2**-24, 2**-10, 80.0])
def test_masses_that_differ_in_any_bit(kernels, spread):
    """The choice must be exact, judged by the masses that the kernel computed."""
    steps = torch.randint(0, 200, (1, 1, 3000), generator=torch.Generator()) / 200
    tensors = {
        "block_lse": -0.69 - spread * 16 * steps,
        "lse": torch.zeros(1, 1),
        "seq_lens": torch.tensor([3000], dtype=torch.int32),
        "topk_blocks": torch.zeros(1, 1, 700, dtype=torch.int32),
        "topk_lens": torch.zeros(1, 1, dtype=torch.int32),
        "mass": torch.zeros(1, 1, 3000),
        "arrivals": torch.zeros(1, 1, dtype=torch.int32),
        "digit_counts": torch.zeros(1, 1, FIRST_DIGITS, dtype=torch.int32),
    }
    if spread == 80.0:
        tensors["block_lse"] /= 16
    rule = rule_of(700, 1, 2, 30)
    kernels.run("select_blocks", tensors, ("topk_blocks", "mass"), **vars(rule))
    mass = tensors["mass"][0, 0]
    block_lse = tensors["block_lse"][0, 0].double()
    assert_within(mass, block_lse.exp(), block_lse.exp() * relative(block_lse))
    expected = naive.select(mass.tolist(), 3000, rule)
    assert tensors["topk_blocks"][0, 0].tolist() == expected


def dealt_masses(rows, heads, blocks):
    """Masses over 24 powers of two that differ clearly, each of one head alone."""
    rng = torch.Generator().manual_seed(blocks)
    order = torch.rand(rows, 1, blocks, generator=rng).argsort()
    owner = torch.randint(0, heads, (rows, 1, blocks), generator=rng)
    return torch.exp2(-24.0 * order / blocks) * (owner == torch.arange(heads)[:, None])


@pytest.mark.extended
@pytest.mark.parametrize("in_quads", [False, True])
def test_the_longest_rows_that_are_held(kernels, in_quads):
    """Masses 32 to 16,415, of which few have the first digit of the smallest kept."""
    lens, rule = [16425, 16426, 8201], rule_of(700, 1, 40, 9)
    check(kernels, dealt_masses(3, 1, 16430), lens, rule, in_quads=in_quads)


@pytest.mark.extended
@pytest.mark.parametrize("heads, num_sets", [(33, 1), (66, 2)])
def test_loads_of_four_blocks_of_many_heads(kernels, heads, num_sets):
    """Four threads share 33 heads; the last load is of fewer than four blocks."""
    lens, rule = [1302, 1025, -1], rule_of(128, 1, 2, 9)
    mass = dealt_masses(3, heads, 1302)
    check(kernels, mass, lens, rule, num_sets=num_sets, in_quads=True)


@pytest.mark.extended
def test_masses_over_the_whole_range(kernels):
    exponents = torch.randint(-120, 0, (2, 1, 1500), generator=torch.Generator())
    mass = torch.exp2(exponents.float())
    mass[0, 0, ::3] = 0.0
    check(kernels, mass, [1500, 1499], rule_of(700, 1, 3, 50))


def test_a_nan_weighs_nothing_and_infinity_everything(kernels):
    mass = masses(1, 1, 300)
    mass[0, 0, 5::7] = math.nan
    mass[0, 0, 100] = math.inf
    check(kernels, mass, [300], rule_of(200, 1))
    check(kernels, torch.full((1, 1, 300), math.nan), [300], rule_of(20, 1))


@pytest.mark.extended
@pytest.mark.parametrize("num_sets", [2, 8])
def test_a_set_sums_the_mass_of_its_own_heads(kernels, num_sets):
    """Random masses have no ties, so the order of a sum decides nothing."""
    rng = torch.Generator().manual_seed(3)
    mass = torch.rand(3, 8, 500, generator=rng) + 0.01
    summed = mass.unflatten(1, (num_sets, -1)).sum(2).sort(-1).values
    assert (summed.diff() / summed[..., 1:]).min() > 1e-8
    check(kernels, mass, [500, 333, 0], rule_of(128, 1, 2, 9), num_sets=num_sets)


@pytest.mark.extended
def test_heads_weigh_alike_whatever_their_lse(kernels):
    share = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.75, 0.05]]])
    lse = torch.tensor([[50.0, 0.0]])
    tensors = {
        "block_lse": share.log() + lse[..., None],
        "lse": lse,
        "seq_lens": torch.tensor([4], dtype=torch.int32),
        "topk_blocks": torch.zeros(1, 1, 2, dtype=torch.int32),
        "topk_lens": torch.zeros(1, 1, dtype=torch.int32),
        "mass": torch.zeros(1, 1, 4),
        "arrivals": torch.zeros(1, 2, dtype=torch.int32),
        "digit_counts": torch.zeros(1, 1, FIRST_DIGITS, dtype=torch.int32),
    }
    outputs = ("topk_blocks", "topk_lens", "mass")
    kernels.run("select_blocks", tensors, outputs, **vars(rule_of(2, 1)))
    assert tensors["topk_blocks"].tolist() == [[[2, 3]]]
    scores, wanted = tensors["block_lse"].double(), share.double().sum(1)[0]
    error = (share * relative(scores - lse[..., None])).sum(1)[0]
    error += wanted * relative(lse).max()  # lse is rounded, and so is the sum
    assert_within(tensors["mass"][0, 0], wanted, error)


@pytest.mark.extended
def test_a_row_up_to_the_threshold_keeps_all_its_blocks(kernels):
    lens, rule = [0, 1, 31, 32, 33, 47, 48, 49], rule_of(32, 16, threshold=48)
    check(kernels, masses(len(lens), 2, 6), lens, rule, num_sets=2)


@pytest.mark.extended
def test_strided_results(kernels):
    rule = rule_of(64, 1, 2, 9)
    check(kernels, masses(3, 4, 300), [300, 64, 299], rule, num_sets=4, stride=5)


def test_max_blocks_beyond_what_is_kept(kernels):
    rule = rule_of(64, 1, 2, 9)
    check(kernels, masses(2, 1, 300), [300, 20], rule, max_blocks=250)
