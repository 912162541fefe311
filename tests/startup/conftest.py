"""What came of starting small engines, each with arguments of its own."""

import json
import sys

import pytest

from tests.support import start_engines
from tests.support.model_configs import write_model
from tests.support.processes import INTERPRETER, run
from tidal_vllm.engine.metrics import COUNTING_WORKER

ENGINE = {
    "attention_backend": "TIDAL",
    "worker_extension_cls": COUNTING_WORKER,
    "additional_config": {"tidal": {"token_budget": 64, "select_layers": [2]}},
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 2,
    "load_format": "dummy",
    "kv_cache_memory_bytes": 1 << 24,
}
ENGINES: dict[str, dict] = {
    "alibi": {},
    "soft_cap": {},
    "kv_sharing": {},
    "sinks": {},
    # Granite passes arguments to its layers that others do not: `sinks=None`.
    "unselected": {"model": "granite", "attention_backend": None},
    "sparse": {"model": "llama"},
    "sliding_window": {"attention_backend": None},
    "some_layers_slide": {
        "additional_config": {"tidal": {"token_budget": 64, "select_layers": [1]}}
    },
    "never_slides": {},
    "speculative": {
        "model": "llama",
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        },
    },
}


@pytest.fixture(scope="session")
def started(model_root) -> dict[str, dict]:
    """What came of starting each of `ENGINES`: error or answer, and the log."""
    arguments = {}
    for name, given in ENGINES.items():
        model = write_model(model_root, given.get("model", name))
        arguments[name] = ENGINE | given | {"model": str(model)}
    # Speculative decoding needs Triton. Its interpreter does not cover the V2 runner,
    # which is vLLM's default beside Triton and not ours.
    command = [sys.executable, start_engines.__file__, json.dumps(arguments)]
    done = run(command, **INTERPRETER)
    assert done.returncode == 0, done.stdout[-4000:]
    outcomes = {}
    for text in done.stdout.split(start_engines.START)[1:]:
        log, _, outcome = text.partition(start_engines.OUTCOME)
        fields = json.loads(outcome.splitlines()[0])
        outcomes[fields.pop("name")] = fields | {"log": log}
    return outcomes
