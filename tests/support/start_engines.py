"""A script: start each engine of a JSON list, print what came of it as JSON.

Its own process, since engines of one process share vLLM's process groups.
"""

import json
import os
import sys

START, OUTCOME = "starting engine ", "came of it: "
PROMPT = [3, 4, 5] * 40


def start(name: str, arguments: dict) -> tuple[dict, object]:
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(**arguments)
    except Exception as error:
        return {"name": name, "error": str(error)}, None
    sampling = SamplingParams(
        max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False
    )
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling)
    return {
        "name": name,
        "tokens": list(answer.outputs[0].token_ids),
        "counters": llm.collective_rpc("decode_counters")[0],
    }, llm


def main() -> None:
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()
    # NOTE: an engine that is collected takes the process groups of all with it.
    kept = []
    for name, arguments in json.loads(sys.argv[1]).items():
        print(START + name, flush=True)
        outcome, llm = start(name, arguments)
        kept.append(llm)
        print(f"\n{OUTCOME}{json.dumps(outcome)}", flush=True)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
