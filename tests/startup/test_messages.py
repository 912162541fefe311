"""The wording of what is said before an engine runs: one golden file.

The other tests look for what a message has to contain: key, value, what is allowed.
This one shows every change of the words, to be read as a user reads them.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.startup.test_bad_settings import (
    PROFILE_FILES,
    SETTINGS,
    SETTINGS_WITH_ARGUMENTS,
)
from tests.startup.test_unsupported_models import ARGUMENTS, MODELS, SPECULATION
from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.roles import LayerPlan, all_dense
from tidal_vllm.plan.table import format_plan
from tidal_vllm.profiles import PACKAGED_DIR, Profile

GOLDEN = Path(__file__).with_name("messages.txt")
LONG_NAME = "/models/" + "long-" * 30
PROFILE = Profile(
    name="two-choices",
    models=("org/*",),
    num_hidden_layers=32,
    dense_layers=(0, 1),
    select_layers=(2, 13),
    source="this test",
    path=PACKAGED_DIR / "two-choices.json",
)


def tables() -> Iterator[tuple[str, str]]:
    """Start-up tables: of a profile, without sparse layers, wrapped, of a hybrid."""

    def table(plan: LayerPlan, name: str, ranks: int = 1, **settings: object) -> str:
        return format_plan(plan, TidalConfig(**settings), 1 << 17, name, ranks)

    plan = plan_layers(TidalConfig(), 32, PROFILE)
    yield "table: a profile", table(plan, "org/model")
    yield "table: two ranks that agree", table(plan, "org/model", 2)
    own = {"scope": "kv_head", "rank_choice": "own"}
    yield "table: four ranks that do not", table(plan, "org/model", 4, **own)
    each = table(plan, "org/model", 2, scope="query_head")
    yield "table: ranks that share no set", each
    plan = all_dense(8, "", "a test wants it")
    yield "table: off", table(plan, "this model")
    drafts = {"mode": "lossless", "token_budget": 2048}
    plan = plan_layers(TidalConfig(), 32, PROFILE)
    yield "table: lossless mode", table(plan, "org/model", **drafts)
    many = {"dense_layers": list(range(0, 126, 3)), "select_layers": [1, 2, 124]}
    many |= {"preset": "lessismore", "min_sparse_len": 100_000}
    plan = plan_layers(TidalConfig(**many), 126, None)
    yield "table: many layers, a preset", table(plan, LONG_NAME, **many)
    plan = plan_layers(TidalConfig(), 18, None, full_layers=(2, 5, 8, 11, 14, 17))
    yield "table: one layer of three has full attention", table(plan, "org/third")
    quest = {"preset": "quest"}
    plan = plan_layers(TidalConfig(**quest), 36, None)
    yield "table: every layer chooses", table(plan, "org/quest", **quest)


def refusals(refusal: Callable[..., str], folder: Path) -> Iterator[tuple[str, str]]:
    """The refusals of settings, arguments and models, from the cases beside."""
    for name, (settings, *_) in SETTINGS.items():
        yield f"setting: {name}", refusal(settings)
    for name, (settings, arguments, *_) in SETTINGS_WITH_ARGUMENTS.items():
        yield f"setting with arguments: {name}", refusal(settings, **arguments)
    for name, (text, *_) in PROFILE_FILES.items():
        path = folder / f"{name}.json"
        if text is not None:
            path.write_text(text)
        yield f"profile: {name}", refusal({"profile": str(path)})
    for name in MODELS:
        runner = "pooling" if name == "encoder" else "auto"
        yield f"model: {name}", refusal(model=name, runner=runner)
    for name, (arguments, *_) in ARGUMENTS.items():
        yield f"argument: {name}", refusal(**arguments)
    with pytest.MonkeyPatch.context() as patch:
        # As on a GPU: without Triton the platform refuses speculative decoding.
        patch.setattr("vllm.triton_utils.HAS_TRITON", True)
        for name, (tidal, more, *_) in SPECULATION.items():
            tidal = {"token_budget": 64, "select_layers": [2]} | tidal
            given = {"method": "ngram", "num_speculative_tokens": 2} | more
            yield f"speculation: {name}", refusal(tidal, speculative_config=given)


def test_wording(refusal, model_root, tmp_path):
    parts = []
    for title, text in (*tables(), *refusals(refusal, tmp_path)):
        text = re.sub(r"(?s).*Value error, (.*) \[type=.*", r"\1", text)
        text = text.replace(str(model_root), "MODELS").replace(str(tmp_path), "FOLDER")
        parts.append(f"== {title}\n{text}\n")
    found = tmp_path / GOLDEN.name
    found.write_text("\n".join(parts))
    assert found.read_text() == GOLDEN.read_text(), (
        f"if it is meant: cp {found} {GOLDEN}"
    )
