"""The parts of `benchmarks.quality` that need no running engine."""

import math

import pytest
import torch

from benchmarks.quality.__main__ import main
from benchmarks.quality.harness import report
from benchmarks.quality.harness.cells import Cell, parse_cell
from benchmarks.quality.harness.configurations import (
    Reads,
    in_cell,
    read_file,
    with_budget,
)
from benchmarks.quality.harness.scores import summary
from benchmarks.quality.harness.texts import fingerprint_of

ROLES = {"dense_layers": [0], "select_layers": [1, 3]}
NAMED = {
    "tidaldecode": ROLES | {"select_block_size": 16},
    "small blocks": ROLES | {"select_block_size": 4},
    "many sinks": ROLES | {"sink_tokens": 160},
    "quest": {"preset": "quest"},
    "sliding_window": {"preset": "sliding_window"},
}


@pytest.fixture(scope="module")
def reads(vllm_here, model_root):
    from benchmarks.quality.harness.engine import planner
    from tests.support.model_configs import write_model

    folder = str(write_model(model_root, "llama"))
    return Reads(planner(folder, max_model_len=4096, skip_tokenizer_init=True))


def test_divergence_is_torch_kl_div(vllm_here):
    from benchmarks.quality.harness.compare import divergence

    wanted, said = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    wanted[0, :20] = -math.inf
    wanted, said = wanted.log_softmax(-1), said.log_softmax(-1)
    kl_div = torch.nn.functional.kl_div(said, wanted.exp(), reduction="none").sum(-1)
    torch.testing.assert_close(divergence(wanted, said), kl_div)
    # What both leave out counts nothing; what only the second does is infinite.
    said[0, :10] = -math.inf
    torch.testing.assert_close(divergence(wanted, said)[0], kl_div[0])
    said[1, 5] = -math.inf
    assert divergence(wanted, said)[1] == math.inf


def test_the_last_write_of_a_step_counts(vllm_here):
    """Chunks of a correction show steps of their own before the one that is kept."""
    from benchmarks.quality.harness.compare import Pass

    logits = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    rows = {"sequences": [1, 0], "steps": [2, 0], "tokens": [7, 3]}
    dense = Pass(num_sequences=2, num_tokens=4)
    for each in logits[:2]:
        dense.see(**rows, logits=each)
    said = logits[1].log_softmax(-1)
    assert torch.equal(dense.kept[[1, 0], [2, 0]], said)
    assert dense.nll[1, 2] == -said[0, 7] and dense.nll[0, 0] == -said[1, 3]
    assert dense.nll.isnan().sum() == 6

    sparse = Pass(2, 4, reference=dense.kept)
    sparse.see(**rows, logits=logits[2])
    assert (sparse.kl[[1, 0], [2, 0]] > 0).all()
    sparse.see(**rows, logits=logits[1])
    assert sparse.kl[[1, 0], [2, 0]].tolist() == [0, 0]
    assert sparse.agreed[[1, 0], [2, 0]].tolist() == [1, 1]


def test_cells():
    assert parse_cell("4096:0.1:32x256") == Cell(4096, 0.1, 32, 256)
    for text in ("4096:0.1:32", "64:1.5:1x8", "64:0.0:1x8", "64:.5:0x8", "64:.5:1x0"):
        with pytest.raises(ValueError, match="must be CONTEXT:SHARE:SEQUENCESxTOKENS"):
            parse_cell(text)
    # The prompt keeps a token, and its own next one is forced too.
    assert parse_cell("64:.5:1x62").tokens == 62
    with pytest.raises(ValueError, match="must be"):
        parse_cell("64:.5:1x63")


@pytest.mark.parametrize("name", NAMED)
def test_the_largest_budget_that_reads_no_more(reads, name):
    settings = NAMED[name]
    budgets = [with_budget(settings, tokens) for tokens in range(4, 601, 4)]
    for share in (0.05, 0.3, 0.5, 0.7, 0.8):
        fitting = [b for b in budgets if b and reads.share(b, 600) <= share]
        most = max(fitting, key=lambda made: made["token_budget"], default=None)
        assert reads.budget_for(settings, share, 600) == most


def test_what_a_cell_compares(reads):
    """No budget without room for what is forced, and nothing twice."""
    found = in_cell(NAMED, reads, 600, 0.1, [0.9], "tidaldecode")
    names = [(made.name, made.budget.split(" 0")[0]) for made in found]
    assert names.count(("tidaldecode", "equal budget")) == 1
    assert ("many sinks", "equal budget") not in names
    assert ("many sinks", "equal bytes") in names
    own = next(made for made in found if made.name == "tidaldecode")
    assert own.settings["token_budget"] == 48
    read = reads.share(own.settings, 600)
    for made in found:
        if made.budget == f"equal bytes {read:.3f}":
            assert made.name != "tidaldecode"
            assert reads.share(made.settings, 600) <= read


def test_a_table_of_answers():
    """Pairs of one suite and number of tasks, whatever the order of the records."""
    dense = {"dense_layers": [], "select_layers": []}

    def record(suite, name, scores):
        settings = dense if name == "dense" else {"token_budget": 64}
        shared = {"setup": {"model": "m"}, "length": 100, "share": 0.1, "tasks": 4}
        made = {"suite": suite, "name": name, "settings": settings, "scores": scores}
        more = {"budget": "given", "kv_read": 0.5}
        return {"measure": "answers"} | shared | made | more

    records = [
        record("b", "dense", [1, 0, 1, 0]),
        record("a", "ours", [1, 1, 0, 1]),
        record("a", "dense", [1, 1, 1, 1]),
        record("b", "ours", [1, 0, 1, 0]),
    ]
    row = next(
        r for r in summary([{"measure": "run"}, *records]) if r["name"] == "ours"
    )
    assert row["suites"] == {"a": 0.75, "b": 0.5}
    assert (row["score"], row["dense"]) == (0.625, 0.75)
    assert row["difference"].estimate == -0.125
    # Seven of eight pairs are equal: unpaired, the interval would be far wider.
    assert -0.5 <= row["difference"].low < row["difference"].high == 0


def test_a_report_shows_answers_beside_dense():
    shared = {"benchmark": "quality", "measure": "answers", "suite": "json_kv"}
    shared |= {"setup": {"dtype": "auto"}, "cell": "json_kv:2000:0.1", "length": 2000}
    shared |= {"share": 0.1, "tasks": 2, "budget": "given", "kv_read": 1.0}
    found = [
        shared | {"name": name, "settings": {"name": name}, "scores": scores}
        for name, scores in (("dense", [1.0, 1.0]), ("sparse", [1.0, 0.0]))
    ]
    assert "| sparse | given | 100.0% | 0.500 | -0.500 (" in report.report(found)


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_a_report_of_nothing_is_refused(text, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["--report", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --report {path}: ")


def test_settings_of_a_file_are_refused_by_name(tmp_path):
    path = tmp_path / "configs.json"
    path.write_text('{"mine": {"scop": "kv_head"}}')
    with pytest.raises(ValueError, match=r"configs.json: 'mine': tidal.scop = "):
        read_file(path)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("share", "1.0", "above 0 and below 1"),
        ("reads", "1.5", "above 0, at most 1"),
        ("group", "0", "1 or more"),
        ("greedy", "-1", "0 or more"),
        ("max-num-batched-tokens", "0", "1 or more"),
        ("kv-cache-gib", "inf", "from 0.001 to 1000000"),
        ("gpu-memory-utilization", "0.0", "above 0, at most 1"),
    ],
)
def test_numbers_are_refused_before_a_model_is_read(
    option, value, allowed, tmp_path, capsys
):
    out = ["--out", str(tmp_path / "out.jsonl")]
    assert main(["a model", *out, f"--{option}", value]) == 2
    said = capsys.readouterr().err
    assert said == f"error: --{option} {value}: must be {allowed}\n"


def test_models_of_one_name_are_told_apart(tmp_path):
    """By their configuration, and by their weights."""

    def made(name, config, weights):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_bytes(weights)
        return fingerprint_of(str(folder))

    first = made("a", "{}", b"1")
    assert made("b", "{}", b"1") == first
    others = [("c", '{"a": 1}', b"1"), ("d", "{}", b"12"), ("e", "{}", b"2")]
    assert first not in [made(*other) for other in others]
    assert fingerprint_of("someone/model") == ""


def test_a_report_compares_sequence_by_sequence():
    """At the same budget, or else at the same bytes; not at others."""

    def record(name, budget, read, kl):
        shown = {"name": name, "budget": budget, "kv_read": read, "kl": kl}
        same = {"settings": {"token_budget": int(1000 * read)}, "tokens": 1}
        same |= {"benchmark": "quality", "measure": "forced", "cell": "64:0.5:2x1"}
        return same | {"setup": {}, "first": 0, "agreed": [1, 1], "nll": [0, 0]} | shown

    found = [
        record("dense", "given", 1.0, [0.0, 0.0]),
        record("ours", "equal budget", 0.3, [0.1, 0.5]),
        record("peer", "equal budget", 0.2, [0.2, 0.6]),
        record("peer", "equal bytes 0.303", 0.303, [0.0, 0.4]),
        record("peer", "equal bytes 0.400", 0.4, [0.0, 0.4]),
    ]
    rows = report.report(found, "ours").splitlines()
    shown = [row.split(" | ")[7].strip(" |") for row in rows if "%" in row]
    assert shown == [
        *("", ""),
        "+0.1000 (+0.1000 to +0.1000)",
        "-0.1000 (-0.1000 to -0.1000)",
        "",
    ]
    with pytest.raises(ValueError, match="--against mine: must be among ours, peer"):
        report.report(found, "mine")


def test_the_longest_greedy_continuations_count():
    shared = {"benchmark": "quality", "setup": {}, "cell": "64:0.5:1x2"}
    shared |= {"budget": "given", "kv_read": 1.0, "name": "mine", "settings": {}}
    found = [
        shared | {"measure": "greedy", "first": first, "of": of, "equal": [of]}
        for first, of in ((0, 4), (0, 8), (1, 8), (1, 4))
    ]
    ((line,),) = report.cells_of(found).values()
    assert line.equal == [8, 8]


def test_a_report_keeps_models_and_settings_apart():
    shared = {"benchmark": "quality", "measure": "forced", "cell": "64:0.5:1x2"}
    shared |= {"first": 0, "tokens": 2, "kl": [0.2], "agreed": [2], "nll": [1.0]}
    shared |= {"budget": "given", "kv_read": 1.0, "name": "mine"}
    found = [
        shared | {"setup": {"model": model}, "settings": {"sink_tokens": sinks}}
        for model, sinks in (("a", 1), ("a", 2), ("b", 1))
    ]
    cells = report.cells_of(found)
    assert [[line.kl for line in lines] for lines in cells.values()] == [
        [[0.1], [0.1]],
        [[0.1]],
    ]
