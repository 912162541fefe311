"""Greedy answers of a model that transformers runs."""

from typing import Any

import torch


def greedy(model: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The tokens of each answer, `max_tokens` of them, whatever they mean."""
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers
