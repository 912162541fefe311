"""The demo on the planted model, whose answers are known by construction."""

from dataclasses import dataclass
from pathlib import Path

from tidal_vllm.config import TidalConfig
from tidal_vllm.demo.engines import (
    Answers,
    compare,
    dense_and_sparse,
    equal_tokens,
    footnotes,
    log_errors_only,
)
from tidal_vllm.plan.layers import plan_layers
from tidal_vllm.plan.lengths import limit_plan
from tidal_vllm.plan.table import format_plan
from tidal_vllm.planted import (
    PlantedPrompt,
    PlantedSpec,
    build_planted_model,
    make_prompt,
)

CONTEXTS = [1000, 4000, 16000]
ANSWER_WORDS = 24
DEPTHS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Comparison:
    """All answers to one prompt, dense and sparse, beside the planted one."""

    prompt: PlantedPrompt
    answers: Answers

    def right_tokens(self) -> tuple[list[int], list[int]]:
        """Leading tokens that are as planted, of each answer, dense and sparse."""
        planted = self.prompt.answer_token_ids
        dense, sparse = (
            [equal_tokens(answer.token_ids, planted) for answer in answers]
            for answers in (self.answers.dense, self.answers.sparse)
        )
        return dense, sparse

    @property
    def wrong_answers(self) -> int:
        dense, sparse = self.right_tokens()
        planted = len(self.prompt.answer_token_ids)
        return sum(right < planted for right in (*dense, *sparse))


def run_demo(model_dir: Path, contexts: list[int], token_budget: int) -> int:
    """Ask the planted model at each context length; print the comparison.

    Returns:
        Exit code: 0 if every answer was exact, else 1.
    """
    log_errors_only()
    spec = PlantedSpec()
    print(f"Building the planted model in {model_dir} ...", flush=True)
    build_planted_model(model_dir, spec)
    prompts = [
        make_prompt(spec, length, DEPTHS[i % 3], seed=i, chain_len=ANSWER_WORDS)
        for i, length in enumerate(contexts)
    ]
    tidal = {
        "token_budget": token_budget,
        "dense_layers": list(spec.dense_layers),
        "select_layers": list(spec.select_layers),
    }
    config = TidalConfig(**tidal)
    longest = max(len(prompt.prompt_token_ids) for prompt in prompts) + 64
    plan = limit_plan(plan_layers(config, spec.num_layers, None), config, longest)
    print(format_plan(plan, config, longest, "the planted model"), flush=True)
    with dense_and_sparse(model_dir, longest, tidal) as (dense, sparse):
        comparisons = [
            Comparison(
                prompt,
                compare(
                    dense,
                    sparse,
                    prompt.prompt_token_ids,
                    max_tokens=len(prompt.answer_token_ids),
                ),
            )
            for prompt in prompts
        ]
    print(_table(comparisons))
    wrong = sum(comparison.wrong_answers for comparison in comparisons)
    print(
        f"\n{wrong} answers are wrong." if wrong else "\nEvery answer is exact.",
        "Each is a chain of words hidden in the prompt, known by construction.",
    )
    return 1 if wrong else 0


def _table(comparisons: list[Comparison]) -> str:
    lines = [
        "",
        "           exact answer tokens  tokens attended      decode, ms/token",
        "  context     dense   sparse    dense   sparse    dense   sparse  speed-up",
        "  -------  --------  -------  -------  -------  -------  -------  --------",
    ]
    for comparison in comparisons:
        prompt = comparison.prompt
        planted = len(prompt.answer_token_ids)
        cells = [f"  {len(prompt.prompt_token_ids):>7}"]
        for right, width in zip(comparison.right_tokens(), (8, 7), strict=True):
            cells.append(f"{f'{min(right)}/{planted}':>{width}}")
        lines.append("  ".join([*cells, *comparison.answers.cells()]))
    return "\n".join([*lines, *footnotes([c.answers for c in comparisons])])
