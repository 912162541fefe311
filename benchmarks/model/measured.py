"""What an H100 measured, and this model beside it: as it was, and as it is today.

The model takes the bandwidth and FlashAttention's share of it as inputs. Both columns
get those that were measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import records
from benchmarks.gpu.builds import FIRST, PRESENT
from benchmarks.model import design
from benchmarks.model.attend import dense_decode, score_blocks, sparse_decode
from benchmarks.model.design import TRITON, TRITON_GUESSED, Design
from benchmarks.model.hardware import ASSUMED_H100, Gpu
from benchmarks.model.machine_code import COUNTED, RESULTS
from benchmarks.model.select import select_blocks
from benchmarks.model.step import decode_step, dense_backend
from benchmarks.model.targets import FP8, H100, SHAPE, case, even
from tidal_vllm.config import TidalConfig

MEASURED = RESULTS / "gpu_h100.jsonl"
OPS = {
    "dense": "dense",
    "dense + block_lse": "dense with scores",
    "score_blocks": "score_blocks",
    "sparse": "sparse",
    "select": "select",
    "all dense": "32 layers of FlashAttention",
    "by roles": "32 layers by roles",
}


@dataclass(frozen=True)
class Measured:
    """One measured case, and what the model says to it. Times in us.

    Attributes:
        us: As it was measured.
        before: The model before anything was measured.
        now: The model with constants fitted to what was measured.
    """

    kernels: str
    op: str
    case: str
    us: float
    before: float
    now: float


def compare(counts: Path = COUNTED) -> list[Measured]:
    """Every op and case that was measured, by op.

    Args:
        counts: Instructions per tile; the prototype's where there is no such file.
    """
    found = records.read(MEASURED)
    bandwidth = next(r for r in found if r.get("query") == "bandwidth")
    assumed = replace(ASSUMED_H100, read_tb_per_s=bandwidth["read_tb_per_s"])
    before = {"cuda": design.guessed(counts), "triton": TRITON_GUESSED}
    now = {"cuda": design.today(counts), "triton": TRITON}
    compared = [
        Measured(
            *(_kernels(record), OPS[record["op"]], _case(record), record["median_us"]),
            _predict(assumed, before, record, found),
            _predict(H100, now, record, found),
        )
        for record in cases(found)
    ]
    order = list(OPS.values())
    return sorted(compared, key=lambda m: (order.index(m.op), m.kernels))


def cases(found: Sequence[dict]) -> list[dict]:
    """The newest record of each case, by the builds of today's kernels if there is one.

    FlashAttention alone is no case: it is an input. Nor is dense without scores once
    more, in the runs for smaller selection blocks.
    """
    timed = [r for r in found if r.get("op") in OPS and "median_us" in r]
    alone = {r["run"] for r in found if r["benchmark"] == "attend"}
    # A stack is predicted from FlashAttention alone, in the same run.
    timed = [r for r in timed if r["benchmark"] != "stack" or r["run"] in alone]
    newest: dict[tuple, dict] = {}
    for builds in ((FIRST, None), PRESENT):
        for record in timed:
            left_out = record["op"] == "dense" and record.get("select_block_size") != 16
            if record.get("build") in builds and not left_out:
                newest[_kernels(record), record["op"], _case(record)] = record
    return list(newest.values())


def _kernels(record: dict) -> str:
    return {"cuda": "CUDA", "triton": "Triton"}.get(record["implementation"], "")


def _rows(record: dict) -> int:
    return record["rows"] if record["op"] == "select" else record["batch"]


def _case(record: dict) -> str:
    said = [case(_rows(record), record["context"])]
    op = record["op"]
    if op in ("sparse", "by roles"):
        said.append(f"budget {record['token_budget']}")
    if op == "by roles":
        said.append(f"SELECT layers attend to {record['select_attends']}")
    elif op not in ("dense", "all dense"):
        said.append(f"blocks of {record['select_block_size']}")
    if record.get("kv_cache_dtype") == "fp8":
        said.append("fp8")
    return ", ".join(said)


def _predict(
    gpu: Gpu, designs: dict[str, Design], record: dict, found: Sequence[dict]
) -> float:
    """The model's time of what a record measured."""
    op, size = record["op"], record.get("select_block_size", 0)
    lens = even(_rows(record), record["context"])
    shape = FP8 if record.get("kv_cache_dtype") == "fp8" else SHAPE
    if op in ("all dense", "by roles"):
        share = _flash_attention(found, record)["share_of_read"]
        if op == "all dense":
            layer = dense_backend(gpu, shape, lens, share)
            return shape.num_layers * layer.us + gpu.graph_us
        config = TidalConfig(
            token_budget=record["token_budget"],
            select_block_size=16,  # of all stacks that were measured
            select_attends=record["select_attends"],
            reselect_interval=record["reselect_interval"],
        )
        kernels = designs[record["implementation"]]
        step = decode_step(gpu, kernels, shape, lens, config, share)
        return step.us + gpu.graph_us
    kernels = designs[record["implementation"]]
    if op == "select":
        made = select_blocks(gpu, kernels, shape, lens, size)
    elif op == "score_blocks":
        made = score_blocks(gpu, kernels, shape, lens, size)
    elif op == "sparse":
        kept = even(_rows(record), record["token_budget"])
        made = sparse_decode(gpu, kernels, shape, kept, size)
    else:
        made = dense_decode(gpu, kernels, shape, lens, 0 if op == "dense" else size)
    return made.alone_us(gpu)


def _flash_attention(found: Sequence[dict], record: dict) -> dict:
    """FlashAttention alone, in the same run on the same batch."""
    wanted = {"benchmark": "attend", "op": "dense", "implementation": "flash_attn"}
    wanted |= {key: record[key] for key in ("run", "batch", "context")}
    return next(r for r in found if wanted.items() <= r.items())
