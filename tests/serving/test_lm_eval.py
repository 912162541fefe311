"""lm-evaluation-harness as users start it, on questions whose answers are known.

It asks vLLM through `LLM`, with what docs/evaluation.md says.
"""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, run
from tidal_vllm.planted import make_prompt

pytestmark = pytest.mark.extended

BUDGET = 256
PLACES = [(900, 0.2), (700, 0.5), (1200, 0.6)]
DOC = ROOT / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def task(served, tmp_path_factory) -> Path:
    """The document's task, over questions to the planted model."""
    pytest.importorskip("lm_eval", reason="not installed: the extra `evaluate`")
    folder = tmp_path_factory.mktemp("task")
    (written,) = re.findall(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL)
    questions = folder / "questions.jsonl"
    assert "questions.jsonl" in written
    (folder / "task.yaml").write_text(
        written.replace("questions.jsonl", str(questions))
    )
    prompts = [make_prompt(served.spec, n, depth, seed=n) for n, depth in PLACES]
    lines = [
        json.dumps({"question": prompt.text, "answer": prompt.answer_text})
        for prompt in prompts
    ]
    questions.write_text("\n".join(lines))
    return folder


def evaluate(model: Path, task: Path, out: Path, **arguments: object) -> tuple:
    """The score, and what the command printed."""
    given = {
        "pretrained": str(model),
        "max_model_len": 2048,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 27,
        **arguments,
    }
    words = ["--model", "vllm", "--model_args", json.dumps(given), "--tasks", "long"]
    words += ["--include_path", task, "--batch_size", "auto", "--output_path", out]
    done = run(
        [sys.executable, "-m", "lm_eval", *words],
        first_on_path=ROOT,
        HF_HOME=str(out / "cache"),
        HF_DATASETS_OFFLINE="1",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (results,) = out.rglob("results_*.json")
    return json.loads(results.read_text())["results"]["long"], done.stdout


def test_dense_score(served, task, tmp_path):
    score, printed = evaluate(served.folder, task, tmp_path)
    assert score["exact_match,none"] == 1.0
    assert re.search(r"SPARSE +[1-9]", printed) is None


def test_sparse_score(served, task, tmp_path):
    score, printed = evaluate(
        served.folder,
        task,
        tmp_path,
        attention_backend="TIDAL",
        additional_config={
            "tidal": {"token_budget": BUDGET, "select_layers": [2]},
        },
        worker_extension_cls="tests.support.logged_steps.LoggingWorker",
    )
    assert score["exact_match,none"] == 1.0
    assert f"budget       {BUDGET} tokens per set" in printed
    *_, last = re.findall(r"counted: ({.*?})", printed)
    counted = ast.literal_eval(last)
    assert counted["dense_steps"] == 0
    assert counted["decode_tokens"] == 8 * len(PLACES), "words of each answer"
    assert counted["sparse_context_tokens"] <= BUDGET * counted["decode_tokens"]
