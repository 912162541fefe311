"""Which settings are tried, which is recommended, and what is said where none is."""

import types

import pytest

from tidal_vllm.calibrate.curve import knee, recommend
from tidal_vllm.calibrate.grid import settings_grid
from tidal_vllm.calibrate.result import CurvePoint, Measured, NotCalibrated
from tidal_vllm.config import TidalConfig

MAIN = TidalConfig(token_budget=256)


def measured(agreed: int, steps: int = 100) -> Measured:
    return Measured(1, steps, agreed, 0, 0, 0, 0.0)


def point(read_share: float, agreed: int, captured: float = 1.0, **config):
    """A point of the curve; by default its setting is the main one."""
    config = TidalConfig(**{"token_budget": 256} | config)
    return CurvePoint(config, measured(agreed), read_share, captured, captured)


def job(target: float | None = None, max_loss: float = 0.1) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        target_agreement=target, max_loss=max_loss, config=MAIN
    )


def test_one_thing_changes_along_the_grid():
    main = TidalConfig(token_budget=512)
    grid = settings_grid(main, longest=2000, kv_block_size=16)
    assert grid[0] == main and len(set(grid)) == len(grid)
    assert {c.token_budget for c in grid} == {128, 256, 512, 1024}
    assert {c.select_block_size for c in grid} == {4, 16}
    assert len({c.scope for c in grid}) == 3
    for other in grid[1:]:
        fields = ("token_budget", "select_block_size", "scope")
        assert sum(getattr(other, f) != getattr(main, f) for f in fields) == 1
    short = settings_grid(main, longest=600, kv_block_size=16)
    assert max(c.token_budget for c in short) == 512
    tight = settings_grid(TidalConfig(token_budget=32), longest=600, kv_block_size=16)
    budgets = {c.token_budget for c in tight}
    assert budgets == {16, 32, 64}, "8 tokens have no room for what is forced"


def test_knee():
    rising = [point(0.1, 99, 0.5), point(0.2, 99, 0.9), point(0.9, 100, 1.0)]
    assert knee(rising, max_loss=0.05) is rising[1]
    assert knee(rising, max_loss=0.001) is rising[2], "what disagrees is no knee"
    flat = [point(0.5, 100), point(0.1, 100), point(0.9, 100)]
    assert knee(flat, max_loss=0.01) is flat[1]
    assert knee(flat[:1], max_loss=0.01) is flat[0]


def test_the_cheapest_that_reaches_the_target():
    curve = [point(0.5, 100), point(0.1, 94), point(0.2, 98, scope="kv_head")]
    best = recommend(job(target=0.95), curve, lambda config: measured(390, 400))
    assert best.config == curve[2].config
    assert best.measured == measured(390, 400), "as confirmed"


def test_without_a_target_it_is_a_budget():
    curve = [point(0.5, 100), point(0.1, 100, scope="kv_head")]
    best = recommend(job(), curve, lambda config: measured(400, 400))
    assert best.config == MAIN


def test_the_next_where_one_does_not_keep_what_it_promised():
    small = {"token_budget": 128}
    curve = [point(0.5, 100), point(0.2, 100, **small)]

    def confirm(config: TidalConfig) -> Measured:
        return measured(400 if config == MAIN else 340, 400)

    assert recommend(job(target=0.95), curve, confirm).config == MAIN


@pytest.mark.parametrize(
    ("confirmed", "words"),
    [
        (
            None,
            ["reaches --target-agreement 0.99;", "agrees in 98 of 100", "(98.0000%)"],
        ),
        # 99 and 100 of the first 100 tokens agreed, but fewer of the further ones.
        ((395, 400), ["reaches --target-agreement 0.99;", "395 of 400", "(98.7500%)"]),
        (
            (100, 100),
            ["that reaches --target-agreement 0.99", "--max-loss 0.01", "96.3%"],
        ),
    ],
    ids=["never", "not when confirmed", "too few tokens"],
)
def test_says_why_no_setting_is_recommended(confirmed, words):
    """In words that what was measured last does not contradict."""
    agreed = (98, 97) if confirmed is None else (99, 100)
    curve = [point(0.2, agreed[0]), point(0.5, agreed[1], token_budget=512)]
    with pytest.raises(NotCalibrated) as failure:
        recommend(job(0.99, max_loss=0.01), curve, lambda config: measured(*confirmed))
    for word in words:
        assert word in str(failure.value)
