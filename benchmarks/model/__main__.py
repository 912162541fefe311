r"""What should a decode step's attention take, by a model? Nothing runs on a GPU.

    python -m benchmarks.model --gpu h100 --shape llama-3.1-8b --batch 64 \
        --context 32768 --budget 3264 --fa-share 0.987
    python -m benchmarks.model --write-page

Prints each op of a step, with its bytes, launches, waves and tail, then the step
against dense attention in all layers. docs/performance_model.md says what is assumed.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from benchmarks.model import design, machine_code, page
from benchmarks.model.hardware import GPUS, SHAPES, Gpu
from benchmarks.model.step import Step, decode_step
from tidal_vllm.config import PRESETS, SCOPES, SELECT_ATTENDS, TidalConfig
from tidal_vllm.plan.rule import may_differ_in_group
from tidal_vllm.validators import TidalConfigError

DESIGNS = ("cuda", "triton", "cuda-audited", "triton-audited")
COLUMNS = (
    *(
        "role",
        "op",
        "layers",
        "us",
        "least us",
        "share",
        "bytes",
        "other",
        "launches",
        "blocks",
    ),
    *("splits", "waves", "tail us"),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--batch", type=_positive, default=64, help="rows")
    parser.add_argument("--context", type=_positive, default=32768, help="tokens")
    parser.add_argument("--budget", type=_positive, default=4096, help="tokens")
    parser.add_argument("--select-block-size", type=_positive, default=16)
    parser.add_argument(
        "--scope",
        choices=[scope for scope in SCOPES if not may_differ_in_group(scope)],
        default="sequence",
    )
    parser.add_argument(
        "--select-attends",
        choices=SELECT_ATTENDS,
        default=PRESETS["default"]["select_attends"],
    )
    parser.add_argument("--reselect-interval", type=_positive, default=1)
    parser.add_argument("--fp8", action="store_true", help="KV cache in e4m3")
    parser.add_argument("--kernels", choices=DESIGNS, default="cuda")
    parser.add_argument(
        "--fa-share",
        type=_share,
        default=page.FA_SHARE,
        help="FlashAttention's share of read bandwidth, above 0, at most 1; an input",
    )
    parser.add_argument(
        "--counts",
        type=Path,
        default=machine_code.COUNTED,
        help="instructions per tile; where it does not exist, a prototype's",
    )
    parser.add_argument(
        "--json", type=Path, help="append the prediction as a line here"
    )
    parser.add_argument(
        "--write-page", action="store_true", help="make the tables of the page anew"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed integers from 1")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed above 0, at most 1")
    return share


def design_of(args: argparse.Namespace) -> design.Design:
    return {
        "cuda": design.today(args.counts),
        "triton": design.TRITON,
        "cuda-audited": design.AUDITED,
        "triton-audited": design.TRITON_AUDITED,
    }[args.kernels]


def lines(step: Step, gpu: Gpu) -> list[str]:
    """The printed table: an op a line, of one layer."""
    shown = [COLUMNS]
    for part in step.parts:
        op = part.prediction
        shown.append(
            (
                part.role.name,
                op.op,
                f"{part.times}",
                f"{op.us:.1f}",
                f"{op.least_us:.1f}",
                f"{op.share_of_read(gpu) * op.alone_us(gpu) / op.us:.3f}",
                f"{op.kv_bytes / 1e6:.1f} MB",
                f"{op.other_bytes / 1e6:.1f} MB",
                f"{op.launches}",
                *((f"{op.blocks}", f"{op.splits}") if part.ours else ("", "")),
                *((f"{op.waves:.2f}", f"{op.tail_us:.1f}") if part.ours else ("", "")),
            )
        )
    widths = [max(len(line[i]) for line in shown) for i in range(len(COLUMNS))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in shown]


def record(args: argparse.Namespace, step: Step, kernels: design.Design) -> dict:
    """One prediction as JSON; `source` says that nothing was measured."""
    asked = {k: v for k, v in vars(args).items() if k not in ("json", "write_page")}
    ops = [
        {"role": part.role.name, "layers": part.times, "turns": part.turns}
        | dataclasses.asdict(part.prediction)
        for part in step.parts
    ]
    return {
        "source": "model, not measured",
        **{key: str(v) if isinstance(v, Path) else v for key, v in asked.items()},
        "instructions": {
            f"{kernel}, {stored}, blocks of {block or 'any size'}": [
                loop.instructions,
                loop.source,
            ]
            for (kernel, stored, block), loop in kernels.loops.items()
        },
        "ops": ops,
        "step_us": step.us,
        "dense_us": step.dense_us,
        "speedup": step.speedup,
        "launches": step.launches,
        "kv_read_share": step.kv_bytes / step.dense_kv_bytes,
    }


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.write_page:
        text = page.PAGE.read_text()
        page.PAGE.write_text(page.written(text, page.tables(args.counts)))
        return 0
    gpu, shape, kernels = GPUS[args.gpu], SHAPES[args.shape], design_of(args)
    if args.fp8:
        shape = dataclasses.replace(shape, stored="fp8")
        if not any(stored == "fp8" for _, stored, _ in kernels.loops):
            raise SystemExit(
                f"--fp8 --kernels {args.kernels}: allowed with CUDA kernels"
            )
    try:
        config = TidalConfig(
            token_budget=args.budget,
            select_block_size=args.select_block_size,
            scope=args.scope,
            select_attends=args.select_attends,
            reselect_interval=args.reselect_interval,
        )
    except TidalConfigError as error:
        raise SystemExit(str(error)) from None
    lens = (args.context,) * args.batch
    step = decode_step(gpu, kernels, shape, lens, config, args.fa_share)
    print(f"A MODEL'S NUMBERS, not measured: {kernels.name}, {args.gpu}, {args.shape}")
    print(f"{args.batch} rows of {args.context} tokens, budget {args.budget}")
    print("\n".join(lines(step, gpu)))
    print(
        f"step: {step.us:.0f} us, {step.launches} launches; dense in all layers: "
        f"{step.dense_us:.0f} us at FlashAttention's share {args.fa_share} (an input); "
        f"speed-up {step.speedup:.2f}, by a model"
    )
    if args.json:
        with args.json.open("a") as out:
            out.write(json.dumps(record(args, step, kernels)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
