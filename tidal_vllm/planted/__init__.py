"""The planted model: a Llama checkpoint whose answers are known by construction.

Links ``w0 -> w1 -> ... -> <eos>`` between unique words are hidden in random ones; a
prompt that ends in ``w0`` must be continued by ``w1 w2 ... <eos>``, greedily and
exactly. The heads that do it are written by code, so which layer has to look where is
known too: the ground truth of the engine tests, the demo and the calibration.

    spec = PlantedSpec(hops=2)
    model_dir = build_planted_model("/tmp/planted", spec)
    prompt = make_prompt(spec, num_tokens=4000, depth=0.5, seed=0)

``spec`` describes the model and says which layers must select, ``weights`` builds it,
``tokenizer`` makes it usable as text, ``prompt`` asks and answers.
"""

from tidal_vllm.planted.build import build_planted_model, load_spec
from tidal_vllm.planted.prompt import PlantedPrompt, make_prompt
from tidal_vllm.planted.spec import PlantedSpec

__all__ = [
    "PlantedPrompt",
    "PlantedSpec",
    "build_planted_model",
    "load_spec",
    "make_prompt",
]
