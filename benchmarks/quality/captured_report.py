"""Tables of what `benchmarks.quality.captured` measured."""


def name_of(record: dict) -> str:
    share = f"{100 * record['budget_share']:g}"
    return f"captured_{record['model']}_{record['length']}_{share}"


def table(record: dict) -> str:
    """One record as a Markdown table: a line for each way to choose."""
    lines = [
        "| | choice | captured | by layers with a choice | KV read |",
        "| --- | --- | --- | --- | --- |",
    ]
    group = ""
    for way in record["ways"]:
        shown = way["group"] if way["group"] != group else ""
        group = way["group"]
        cells = [shown, way["way"], _mass(way["captured_mass"])]
        cells += [_mass(way["of_choice"]), f"{100 * way['kv_read']:.1f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def overview(records: list[dict]) -> str:
    """All records in one table: what layers with a choice capture, by cell."""
    cells = [f"{r['length']}, {100 * r['budget_share']:g} %" for r in records]
    lines = [
        f"| choice | {' | '.join(cells)} |",
        "| --- |" + " --- |" * len(cells),
    ]
    found = [{way["way"]: way for way in record["ways"]} for record in records]
    for name in found[0]:
        row = [_mass(ways[name]["of_choice"]) if name in ways else "" for ways in found]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


def _mass(mass: dict) -> str:
    return f"{mass['mean']:.4f} ({mass['p1']:.3f})"
