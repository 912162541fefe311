"""Tensor parallel ranks that choose together, and ranks that do not."""

import pytest

from tests.support.engines import engine_kwargs
from tests.support.models import NARROW, build_random_model, random_prompt
from tests.support.processes import run_child

pytestmark = pytest.mark.extended

PROMPT = random_prompt(300, seed=7)


def test_ranks_choose_what_one_rank_chooses(tmp_path, random_llama):
    """Through vLLM's all-reduce; the ranks of one KV head have half its query heads.

    Where each rank chooses by its own heads, the ranks differ.
    """
    one_kv_head = build_random_model(
        tmp_path / "one_kv_head", "llama", num_key_value_heads=1
    )

    def job(model, num_ranks=1, **settings):
        # A selection for each SELECT layer, so that all can be looked at.
        settings = NARROW | {"reselect_interval": 2} | settings
        kwargs = {"model": str(model)} | engine_kwargs(settings)
        if num_ranks > 1:
            kwargs |= {"tensor_parallel_size": num_ranks}
            kwargs |= {"distributed_executor_backend": "mp"}
        return {
            "kwargs": kwargs,
            "prompts": [PROMPT],
            "max_tokens": 12,
            "start_method": "fork",
            "chosen": True,
        }

    jobs = [
        job(random_llama),
        job(random_llama, 2),
        job(random_llama, 2, rank_choice="own"),
        job(one_kv_head, scope="kv_head"),
        job(one_kv_head, 2, scope="kv_head"),
    ]
    results = run_child(tmp_path, jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    one, agreed, own, one_shared, agreed_shared = results
    assert [len(result["chosen"]) for result in results] == [1, 2, 2, 1, 2]
    for alone, together in ((one, agreed), (one_shared, agreed_shared)):
        (wanted,) = alone["chosen"]
        assert together["chosen"] == [wanted, wanted]
        assert together["tokens"] == alone["tokens"]
    assert own["chosen"][0] != own["chosen"][1]
