"""The ablation script measures what it says, on a model that drifts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/correction_ablation.py"
TINY = {
    "--num-layers": "5",
    "--context": "96",
    "--output-tokens": "40",
    "--sequences": "2",
    "--token-budget": "64",
    "--snapshot-every": "4",
}


def run_script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    results = folder / "results.jsonl"
    settings = [part for pair in TINY.items() for part in pair]
    done = run_script(
        *settings, "--intervals", "off", "4", "--cache", folder, "--out", results
    )
    assert done.returncode == 0, done.stderr
    return results


def test_measures(results):
    runs = json.loads(results.read_text())["runs"]
    dense, off, often = runs["dense"], runs["off"], runs["4"]
    assert dense["kl_mean"] == 0 and dense["agreement"] == 1
    assert 0 < often["kl_mean"] < off["kl_mean"]
    *clean, last = off["kv_error_by_layer"]
    assert max(clean[:4]) < 1e-5 < 0.01 < last
    assert often["kv_error_by_layer"][-1] < 0.5 * last
    (off_trial,), (often_trial,) = off["trials"], often["trials"]
    assert off_trial["tokens"] == 1 and off_trial["corrections"] == 0
    # From the 64th token on everything is decoded sparsely. Each correction computes
    # 4 tokens again, and 5 steps lie between two of a sequence.
    assert 1.6 < often_trial["tokens"] < 1.9
    assert 2 * 6 <= often_trial["corrections"] <= 2 * 8


def test_reports(results, tmp_path):
    done = run_script("--report", results, "--images", tmp_path)
    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.glob("*.png")
    assert str(picture) in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    runs = json.loads(results.read_text())["runs"]
    assert f"| off | 1.00 | {runs['off']['kl_mean']:.4f} |" in done.stdout


def test_bad_settings():
    done = run_script("--intervals", "0")
    assert done.returncode == 2
    assert "0: must be >= 1, or off" in done.stderr
