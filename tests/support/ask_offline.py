"""What a user's first script looks like: `python ask_offline.py MODEL`."""

import sys

from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

from tidal_vllm.engine.metrics import COUNTING_WORKER
from tidal_vllm.planted import load_spec, make_prompt


def main() -> None:
    model = sys.argv[1]
    llm = LLM(
        model,
        attention_backend="TIDAL",
        additional_config={"tidal": {"token_budget": 256, "select_layers": [2]}},
        worker_extension_cls=COUNTING_WORKER,
        max_model_len=2048,
        max_num_seqs=4,
        kv_cache_memory_bytes=1 << 27,
    )
    prompts = [make_prompt(load_spec(model), n, 0.5, seed=n) for n in (900, 60, 500)]
    greedy = SamplingParams(max_tokens=16, temperature=0)
    answers = llm.generate([prompt.text for prompt in prompts], greedy)
    for prompt, answer in zip(prompts, answers, strict=True):
        print("exact:", answer.outputs[0].text == " " + prompt.answer_text)
    print("sparse steps:", sparse_steps(llm))

    # Each step of each beam is a request of one token, which the prefill computes.
    before = sparse_steps(llm)
    asked = [{"prompt_token_ids": prompts[0].prompt_token_ids}]
    most = len(prompts[0].answer_token_ids)
    params = BeamSearchParams(beam_width=2, max_tokens=most)
    (found,) = llm.beam_search(asked, params)
    beam = found.sequences[0].tokens[len(prompts[0].prompt_token_ids) :]
    print("exact by beam search:", beam == prompts[0].answer_token_ids)
    print("sparse steps of beam search:", sparse_steps(llm) - before)


def sparse_steps(llm: LLM) -> int:
    return llm.collective_rpc("decode_counters")[0]["sparse_steps"]


if __name__ == "__main__":
    main()
