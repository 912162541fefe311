"""The start-up table: what each layer will do, and what that reads."""

from __future__ import annotations

import textwrap

from tidal_vllm.config import NUM_SETS, TidalConfig
from tidal_vllm.plan.lengths import format_length, shown_lengths
from tidal_vllm.plan.roles import LayerPlan, Role, format_layers
from tidal_vllm.plan.rule import SelectionRule, may_differ_in_group
from tidal_vllm.plan.steps import draft_read_share, kv_read_share
from tidal_vllm.registry import METHODS

WIDTH = 80


def format_plan(
    plan: LayerPlan,
    config: TidalConfig,
    max_model_len: int,
    model_name: str = "this model",
    num_ranks: int = 1,
) -> str:
    """The start-up table: lines of at most 80 columns, no trailing newline.

    Args:
        max_model_len: vLLM's; what is read is not shown for longer sequences.
        num_ranks: Tensor parallel ranks.
    """
    if len(model_name) > 40:
        model_name = "..." + model_name[-37:]
    title = f"TIDAL sparse decoding of {model_name}, {plan.num_layers} layers"
    rows = [
        (f"{role.name} {plan.count(role)}", format_layers(plan.layers(role)))
        for role in (Role.DENSE, Role.SELECT, Role.SPARSE)
    ]
    if others := plan.layers(Role.OTHER):
        what = f"{format_layers(others)}: as the model has them, a window or a state"
        rows.append((f"{Role.OTHER.name} {len(others)}", what))
    if plan.source:
        rows.append(("roles from", plan.source))
    if plan.sparse:
        rows += _budget_rows(plan, config, max_model_len)
        if NUM_SETS[config.scope](num_ranks, 1) < num_ranks:
            rows.append(("ranks", _rank_text(config, num_ranks)))
    lines = [line for row in rows for line in _row(*row)]
    if plan.off_reason:
        lines += _row("OFF", f"every step is dense: {plan.off_reason}")
    return "\n".join([title, *lines])


def _budget_rows(
    plan: LayerPlan, config: TidalConfig, max_model_len: int
) -> list[tuple[str, str]]:
    rule = SelectionRule.from_config(config)
    budget = (
        f"{rule.token_budget} tokens per set: {rule.budget_blocks} blocks of "
        f"{rule.select_block_size}, scope {config.scope}"
    )
    sink = f"first {rule.sink_tokens} tokens, " if rule.sink_tokens else ""
    recent = "current token"
    if rule.recent_tokens > 1:
        recent = f"newest {rule.recent_tokens} tokens"
    threshold = f"{rule.sparse_threshold} tokens of context"
    if rule.sparse_threshold < rule.keep_all_len:
        threshold += f" (up to {rule.keep_all_len} every block is kept)"
    at_least = "at least " if may_differ_in_group(config.scope) else ""
    alone = plan.num_full_layers < plan.num_layers
    whose = ", of the full-attention layers" if alone else ""
    return [
        ("method", _method_text(config)),
        ("budget", budget),
        ("forced", f"{sink}{recent}, within the budget"),
        ("sparse above", threshold),
        ("KV read", f"{at_least}{_shares(plan, config, max_model_len)}{whose}"),
        *_mode_rows(config),
    ]


def _mode_rows(config: TidalConfig) -> list[tuple[str, str]]:
    if config.mode == "sparse":
        return [
            ("selection", _selection_text(config)),
            ("correction", _correction_text(config)),
        ]
    drafts = f"{config.draft_tokens} tokens, sparse in every layer"
    verified = "dense, all tokens of a draft at once; SELECT layers choose meanwhile"
    return [("lossless", "answers are the dense model's"), ("drafts", drafts)] + [
        ("verification", verified)
    ]


def _shares(plan: LayerPlan, config: TidalConfig, max_model_len: int) -> str:
    read = kv_read_share if config.mode == "sparse" else draft_read_share
    shares = [
        f"{read(plan, config, length):.1%} at {format_length(length)}"
        for length in shown_lengths(max_model_len)
    ]
    whose = " for a draft's token" if config.mode == "lossless" else ""
    return ", ".join(shares).replace("% at", f"% of dense{whose} at", 1)


def _method_text(config: TidalConfig) -> str:
    entry, text = METHODS[config.method], config.method
    if not entry.captures_graphs:
        text += ", without full CUDA graphs"
    if share := entry.keeps_beside(config.select_block_size):
        text += f"; it takes {share:.1%} of the KV cache's memory beside it"
    return text


def _selection_text(config: TidalConfig) -> str:
    steps = config.reselect_interval
    often = "in every step" if steps == 1 else f"every {steps} steps"
    what = "everything" if config.select_attends == "everything" else "what they chose"
    return f"{often}; SELECT layers then attend to {what}"


def _rank_text(config: TidalConfig, num_ranks: int) -> str:
    how = "those that share a set agree on it"
    if config.rank_choice == "own":
        how = "each chooses by its own heads"
    return f"{num_ranks}, tensor parallel: {how}"


def _correction_text(config: TidalConfig) -> str:
    interval = config.correction_interval
    shared = "shared" if config.publish_polluted else "not shared"
    rest = f"other KV of sparse layers is {shared} through the prefix cache"
    if interval is None:
        return f"off; {rest.removeprefix('other ')}"
    return f"after {interval} sparse decode steps; {rest}"


def _row(label: str, text: str) -> list[str]:
    indent = f"  {label:<13}"
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent)
    )
