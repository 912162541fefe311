"""The demo's table where vLLM's own backend runs the dense engine, as on a GPU."""

from types import SimpleNamespace

from tidal_vllm.demo.engines import read_answer
from tidal_vllm.engine.metrics import CountingWorker


def test_a_backend_that_counts_nothing_attends_to_everything():
    worker = CountingWorker()
    builder = SimpleNamespace()  # vLLM's own
    group = SimpleNamespace(metadata_builders=[builder])
    worker.model_runner = SimpleNamespace(attn_groups=[[group]])
    counted = worker.decode_counters()
    assert set(counted.values()) == {0}
    output = SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=[5, 6, 7, 8], text="")],
        metrics=SimpleNamespace(first_token_ts=1.0, last_token_ts=2.5),
    )
    answer = read_answer(output, 100, counted, worker.decode_counters())
    assert answer.attended == 102, "steps at 101, 102 and 103 tokens"
    assert answer.seconds_per_token == 0.5
