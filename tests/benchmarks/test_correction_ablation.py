"""The ablation script measures what it says, on a model that drifts."""

import json
import sys
from pathlib import Path

import pytest

TINY = {
    "--num-layers": "5",
    "--context": "96",
    "--output-tokens": "40",
    "--sequences": "2",
    "--token-budget": "64",
    "--snapshot-every": "4",
}


@pytest.fixture(scope="module")
def run_script(vllm_here):
    """`run_script(*arguments)`: what the script does, here."""
    from vllm import envs

    envs.disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        from benchmarks.quality import correction_ablation

        def run(*arguments):
            patch.setattr(sys, "argv", ["correction_ablation.py", *map(str, arguments)])
            return correction_ablation.main()

        yield run


@pytest.fixture(scope="module")
def results(run_script, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    results = folder / "results.jsonl"
    settings = [part for pair in TINY.items() for part in pair]
    intervals = ("--intervals", "off", "4")
    kept = ("--cache", folder, "--out", results)
    assert run_script(*settings, *intervals, *kept) == 0
    return results


def test_measures(results):
    runs = json.loads(results.read_text())["runs"]
    dense, off, often = runs["dense"], runs["off"], runs["4"]
    assert dense["kl_mean"] == 0 and dense["agreement"] == 1
    assert 0 < often["kl_mean"] < off["kl_mean"]
    # What the SELECT layer, 2, attends to its choice alone is first in the KV of 3.
    *clean, last = off["kv_error_by_layer"]
    assert max(clean[:3]) < 1e-5 < 0.01 < min(clean[3], last)
    assert often["kv_error_by_layer"][-1] < 0.5 * last
    (off_trial,), (often_trial,) = off["trials"], often["trials"]
    assert off_trial["tokens"] == 1 and off_trial["corrections"] == 0
    # From the 64th token on everything is decoded sparsely. Each correction computes
    # 4 tokens again, and 5 steps lie between two of a sequence.
    assert 1.6 < often_trial["tokens"] < 1.9
    assert 2 * 6 <= often_trial["corrections"] <= 2 * 8


def test_reports(run_script, results, tmp_path, capsys):
    assert run_script("--report", results, "--images", tmp_path) == 0
    shown = capsys.readouterr().out
    (picture,) = tmp_path.glob("*.png")
    assert str(picture) in shown
    assert picture.read_bytes()[:4] == b"\x89PNG"
    runs = json.loads(results.read_text())["runs"]
    assert f"| off | 1.00 | {runs['off']['kl_mean']:.4f} |" in shown


def test_bad_settings(run_script, capsys):
    with pytest.raises(SystemExit) as refused:
        run_script("--intervals", "0")
    assert refused.value.code == 2
    assert "0: must be >= 1, or off" in capsys.readouterr().err
