"""The report of a made-up result, with and without what draws its pictures."""

import importlib.util
import types

import numpy as np
import pytest

from tests.calibrate.pages import check_html, pictures_of
from tidal_vllm.calibrate.candidates import assess
from tidal_vllm.calibrate.report import write_report
from tidal_vllm.calibrate.result import CurvePoint, Measured, Result, Tried
from tidal_vllm.calibrate.summary import describe
from tidal_vllm.config import TidalConfig

LAYERS = (1, 3, 4, 7, 9)  # of a hybrid model of 10 layers
MEASURED = Measured(
    prompts=4, steps=40, agreed=38, judged=4, right=3, dense_right=4, lost_logprob=0.25
)
JOB = types.SimpleNamespace(
    model="a <model>", num_layers=10, full_layers=LAYERS, max_loss=0.1
)
FIELDS = {
    "source": "this test",
    "versions": {"vllm": "0"},
    "measured": {
        "prompts": {"kinds": ["file"], "count": 4, "mean_tokens": 400},
        "seconds": 1.5,
    },
}


@pytest.fixture
def result() -> Result:
    loss = np.triu(np.random.default_rng(0).random((5, 5)), 1)
    tried = [
        Tried(assess(loss, select), MEASURED, holds, True)
        for select, holds in (((1, 3), True), ((1, 4), False))
    ]
    curve = [
        CurvePoint(TidalConfig(token_budget=budget), MEASURED, share, 0.7, 0.5)
        for budget, share in ((64, 0.4), (128, 0.5), (256, 0.7))
    ]
    return Result(
        layers=LAYERS,
        dense=MEASURED,
        loss=loss,
        captured=1 - loss,
        overlap=loss,
        tried=tried,
        stability=0.9,
        curve=curve,
        best=curve[1],
        intervals=[(8, MEASURED)],
        interval=8,
        others={"evenly spaced": assess(loss, (1, 2))},
    )


def test_says_what_was_found(result, tmp_path):
    write_report(tmp_path / "r.html", JOB, result, FIELDS)
    page = (tmp_path / "r.html").read_text()
    check_html(page)
    assert len(pictures_of(page)) == 2
    assert "http" not in page, "a page that needs nothing else"
    assert "SELECT layers <b>3, 7</b>, DENSE 1, all others of 5 full-attention" in page
    assert "a &lt;model&gt;" in page and "budget 128 tokens" in page
    assert f"<td>{result.loss[1, 2]:.3f}</td>" in page, "layer 3 for layer 4"
    for table in (page, describe(JOB, result, seconds=1.5)):
        assert "Runner-up: SELECT 3, 9" in table or "runner-up: SELECT 3, 9" in table
        assert "corrected every 8 steps" in table


def test_without_matplotlib_it_says_what_to_install(result, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_report(tmp_path / "r.html", JOB, result, FIELDS)
    page = (tmp_path / "r.html").read_text()
    check_html(page)
    assert pictures_of(page) == []
    assert page.count("pip install &#x27;tidal_vllm[calibrate]&#x27;") == 2
    assert f"<td>{result.loss[1, 2]:.3f}</td>" in page, "the numbers are there"
