"""The tables of docs/lossless.md, from what `benchmarks.engine.lossless` measured."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.model.page import markdown

PAGE = Path(__file__).parents[2] / "docs/lossless.md"
MODES = ("dense", "sparse", "lossless")


def tables(found: Sequence[dict]) -> dict[str, str]:
    """Markdown: what is kept of drafts, and how fast answers come."""
    kept = [
        [
            f"{r['context'] // 1024}K, {r['share']:.0%}",
            f"{r['draft_tokens']}",
            f"{r['mean_kept']:.2f}",
            ", ".join(f"{share:.2f}" for share in r["kept_by_place"]),
            f"{r['answered']}, {r['different'] or 'none'}",
        ]
        for r in found
        if r["measure"] == "acceptance"
    ]
    fast = [
        [
            r["model"],
            f"{r['context'] // 1024}K",
            f"{r['token_budget']}",
            *(f"{r[f'{mode}_ms']:.0f}" for mode in MODES),
            f"{r['speedup']:.2f}x",
            "yes" if not r["different"] else "NO",
            "yes" if r["sparse_as_dense"] else "no",
        ]
        for r in found
        if r["measure"] == "speed"
    ]
    first = ("context, budget", "draft", "kept", "kept by place", "tokens, different")
    second = ("model", "context", "budget", *MODES, "dense / lossless")
    second += ("lossless as dense", "sparse as dense")
    return {"acceptance": markdown(first, kept), "speed": markdown(second, fast)}
