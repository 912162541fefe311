"""GraphWalks: walks in a graph that is given as a list of edges.

Source: OpenAI's data set GraphWalks (2025). A directed graph stands in the prompt, an
edge a line; asked for are either the nodes at a given distance from a node (the
frontier of a breadth-first search) or the parents of a node. The output ends with
`Final Answer: [a, b]`; the metric is the F1 of that set.

The distance of a node is that of the shortest path: a node that was reached earlier is
not in the frontier, nor is the start. Edges are drawn among all pairs of different
nodes and listed in random order. Unlike in the data set, the mean number of edges that
leave a node is fixed, so that answers stay short in long prompts; there are no worked
examples in front, and the prompt is in our own words.
"""

from __future__ import annotations

import random

from benchmarks.quality.suites.metrics import FINAL
from benchmarks.quality.suites.task import Draft, user

_SMALLEST = 24  # edges
_DRAWS = 100  # graphs tried for one that has an answer
Edges = list[tuple[str, str]]


def frontier(
    rng: random.Random, size: int, *, depth: int = 3, degree: int = 2
) -> Draft:
    """The nodes at distance `depth` from a random node that has such.

    Args:
        size: Edges, besides the 24 of the smallest graph.
        degree: Edges per node.

    Raises:
        ValueError: 100 random graphs had no node at this distance from another.
    """
    for _ in range(_DRAWS):
        edges, nodes = _graph(rng, size, degree)
        next_to: dict[str, list[str]] = {}
        for a, b in edges:
            next_to.setdefault(a, []).append(b)
        for start in rng.sample(nodes, min(len(nodes), _DRAWS)):
            seen, layer = {start}, [start]
            for _ in range(depth):
                reached = {b for a in layer for b in next_to.get(a, ())}
                layer = sorted(reached - seen)
                seen |= reached
            if layer:
                question = f"Which nodes are at distance {depth} from {start}?"
                return _draft(edges, question, layer)
    raise ValueError(f"no node has another at depth={depth} in graphs of this size")


def parents(rng: random.Random, size: int, *, degree: int = 2) -> Draft:
    """The nodes with an edge to a random node; arguments are those of `frontier`."""
    edges, _ = _graph(rng, size, degree)
    child = rng.choice(sorted({b for _, b in edges}))
    wanted = sorted(a for a, b in edges if b == child)
    return _draft(edges, f"Which nodes are parents of {child}?", wanted)


def _graph(rng: random.Random, size: int, degree: int) -> tuple[Edges, list[str]]:
    """Different edges in random order, and their nodes."""
    count = _SMALLEST + size
    names: dict[str, None] = {}
    while len(names) < max(count // degree, 8):
        names[f"{rng.getrandbits(40):010x}"] = None
    nodes = list(names)
    edges: dict[tuple[str, str], None] = {}
    while len(edges) < count:
        a, b = rng.sample(nodes, 2)
        edges[a, b] = None
    return list(edges), sorted({node for edge in edges for node in edge})


def _draft(edges: Edges, question: str, wanted: list[str]) -> Draft:
    listed = "\n".join(f"{a} -> {b}" for a, b in edges)
    prompt = (
        "Below is a directed graph, an edge a line: `a -> b` leads from node a to node "
        "b, and a is then a parent of b. The distance of a node is the number of edges "
        "on the shortest path that leads to it.\n\n"
        f"{listed}\n\n"
        f"{question} Think if you need to, then end with one line of this form, in any "
        f"order:\n{FINAL} [node, node]"
    )
    return Draft((user(prompt),), f"{FINAL} [{', '.join(wanted)}]", tuple(wanted))
