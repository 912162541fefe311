"""Which rows keep the last step's choice, and what a kept choice becomes."""

import random

import pytest
import torch

from tidal_vllm.engine.reuse import Reuse
from tidal_vllm.engine.selection import Selection

BLOCK_SIZE, SIZE = 8, 4
ROWS, MAX_BLOCKS = 6, 12
CPU = torch.device("cpu")


def selection(num_choices=2, num_sets=2):
    return Selection.allocate(num_choices, ROWS, num_sets, MAX_BLOCKS, CPU)


class Sequence:
    """One that decodes: its tokens, and the KV blocks they are in."""

    def __init__(self, pool, length):
        self.pool, self.length, self.blocks = pool, length, []
        self.grow(0)

    def grow(self, tokens):
        self.length += tokens
        while len(self.blocks) * BLOCK_SIZE < self.length:
            self.blocks.append(self.pool.pop())

    def free(self):
        self.pool += self.blocks[::-1]  # the first to be taken again


class Engine:
    """Rows of decodes, step by step, as a model runner hands them to the builder."""

    def __init__(self, interval):
        self.reuse, self.selection = Reuse.allocate(interval, ROWS, CPU), selection()
        self.interval, self.step = interval, 0
        self.held = {}  # by row, of the last step: a sequence and the age of its choice

    def run(self, rows, padding=0, sparse=True):
        """Advance over a step's rows; returns which kept their choice."""
        self.step += 1
        if not sparse:
            self.held = {}
            return None
        lens = torch.tensor([s.length for s in rows] + [0] * padding).int()
        table = torch.zeros(len(lens), 16, dtype=torch.int32)
        for row, sequence in enumerate(rows):
            table[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        self.reuse.advance(self.step, lens, table, BLOCK_SIZE, SIZE, self.selection)
        chosen = self.reuse.select_lens[: len(lens)]
        kept = self.reuse.reuse_lens[: len(lens)]
        keeps = kept >= 0
        assert torch.equal(chosen, lens.masked_fill(keeps, -1))
        assert torch.equal(kept, lens.masked_fill(~keeps, -1))
        return keeps.tolist()

    def expected(self, rows, padding=0):
        """By who is who; remembers the step."""
        ages = []
        for row, sequence in enumerate(rows):
            last, age = self.held.get(row, (None, 0))
            keeps = last is sequence and age + 1 < self.interval
            ages.append(age + 1 if keeps else 0)
        self.held = {row: (s, ages[row]) for row, s in enumerate(rows)}
        return [age > 0 for age in ages] + [False] * padding


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_keeps_what_its_own_sequence_chose(interval, seed):
    """Sequences come, go and swap rows; freed blocks are taken at once."""
    draw = random.Random(seed)
    pool, rows, engine, kept = list(range(1, 60)), [], Engine(interval), 0
    for _ in range(300):
        for sequence in rows:
            sequence.grow(1)
        for sequence in [s for s in rows if s.length > 100 or draw.random() < 0.05]:
            rows.remove(sequence)
            sequence.free()
        if len(rows) < 4 and draw.random() < 0.3:
            rows.append(Sequence(pool, draw.randint(2, 30)))
        if draw.random() < 0.1:
            draw.shuffle(rows)
        if draw.random() < 0.05:
            engine.run(rows, sparse=False)
            continue
        padding = draw.randint(0, 2)
        wanted = engine.expected(rows, padding)
        assert engine.run(rows, padding) == wanted
        kept += sum(wanted)
    assert kept > 100


def test_a_successor_in_the_same_slots_chooses_anew():
    """As long as the one before, in its blocks: only the step tells them apart."""
    pool, engine = list(range(1, 9)), Engine(interval=4)
    first = Sequence(pool, 20)
    assert engine.run([first]) == [False]
    first.free()
    second = Sequence(pool, 21)
    assert second.blocks == first.blocks
    engine.step += 1  # its prefill
    assert engine.run([second]) == [False]
    second.grow(1)
    assert engine.run([second]) == [True]


def test_a_sequence_that_sat_out_a_step_chooses_anew():
    pool, engine = list(range(1, 9)), Engine(interval=4)
    one, other = Sequence(pool, 10), Sequence(pool, 20)
    assert engine.run([one, other]) == [False, False]
    one.grow(1)
    assert engine.run([one]) == [True]
    one.grow(1)
    other.grow(1)
    assert engine.run([one, other]) == [True, False]


def test_a_sequence_that_got_two_tokens_chooses_anew():
    engine, one = Engine(interval=4), Sequence(list(range(1, 9)), 10)
    engine.run([one])
    one.grow(2)
    assert engine.run([one]) == [False]


def test_a_row_that_is_forgotten_chooses_anew():
    pool, engine = list(range(1, 9)), Engine(interval=4)
    rows = [Sequence(pool, 10), Sequence(pool, 20)]
    engine.run(rows)
    engine.reuse.forget(torch.tensor([False, True]))
    for sequence in rows:
        sequence.grow(1)
    assert engine.run(rows) == [True, False]


def test_a_kept_choice_gets_the_blocks_of_new_tokens():
    """One per block, in every choice and set, behind what each of them holds."""
    pool, engine = list(range(1, 30)), Engine(interval=100)
    one, other = Sequence(pool, 15), Sequence(pool, 21)
    engine.run([one, other])
    blocks, lens = engine.selection.topk_blocks, engine.selection.topk_lens
    blocks[0, 0, 0, :2], blocks[0, 0, 1, :3] = torch.tensor([0, 3]), torch.arange(1, 4)
    blocks[1, 0, :, :1], blocks[:, 1, :, :1] = 3, 5
    lens[:, :2] = torch.tensor([[[2, 3], [1, 1]], [[1, 1], [1, 1]]])
    for _ in range(6):  # 16 to 21 tokens, and 22 to 27
        one.grow(1)
        other.grow(1)
        assert engine.run([one, other]) == [True, True]

    def chosen(choice, row, which):
        return blocks[choice, row, which, : lens[choice, row, which]].tolist()

    assert [chosen(0, 0, 0), chosen(0, 0, 1)] == [[0, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert [chosen(1, 0, 0), chosen(1, 0, 1)] == [[3, 4, 5]] * 2
    assert chosen(0, 1, 0) == chosen(1, 1, 1) == [5, 6]
    assert (blocks[:, 2:] == -1).all() and (lens[:, 2:] == 0).all()


def test_a_row_that_chooses_is_left_alone():
    engine, one = Engine(interval=4), Sequence(list(range(1, 9)), 16)
    engine.selection.topk_lens[:, 0] = MAX_BLOCKS  # full, from another sequence
    before = engine.selection.topk_blocks.clone()
    one.grow(1)
    assert engine.run([one]) == [False]
    assert torch.equal(engine.selection.topk_blocks, before)
    assert (engine.selection.topk_lens[:, 0] == MAX_BLOCKS).all()
