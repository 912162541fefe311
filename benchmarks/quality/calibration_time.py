"""How long does a whole calibration take? The command as users run it, timed.

Without --model a planted model with two hops is built, calibrated in a process of its
own with the default options but for the context, and the layers found are checked. With
it, that folder's model is calibrated on natural text. Options that are not listed here
go to `tidal-vllm calibrate`. One JSON line is appended to
benchmarks/results/calibration_time.jsonl.

    python -m benchmarks.quality.calibration_time --layers 8 --context 4000
    python -m benchmarks.quality.calibration_time --model FOLDER --context 3000 \\
        --num-prompts 8 --budget 300 --select-block-size 4 --max-loss 0.1
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import describe_run
from tidal_vllm.planted import PlantedSpec, build_planted_model
from tidal_vllm.profiles import load_profile

RESULTS = Path(__file__).parents[1] / "results" / "calibration_time.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a folder (default: a planted model)"
    )
    parser.add_argument("--layers", type=int, default=8, help="of the planted model")
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.model:
            result = measure(given.model, given.context, ["--prompts", "text", *more])
            result = {"model": given.model.name} | result
        else:
            spec = PlantedSpec(
                hops=2,
                num_layers=given.layers,
                max_position_embeddings=2 * given.context,
            )
            model = build_planted_model(Path(folder, "model"), spec)
            result = measure(model, given.context, more)
            if result["select_layers"] != list(spec.select_layers):
                raise SystemExit(f"found {result['select_layers']}, not {spec}")
            result = {"model": f"planted, 2 hops, {given.layers} layers"} | result
    with given.out.open("a") as out:
        out.write(json.dumps(result | describe_run("vllm")) + "\n")
    print(f"{result['seconds']:.0f} s")


def measure(model: Path, context: int, more: list[str]) -> dict:
    """Calibrate a model in a process of its own.

    Returns:
        What it took, wall and CPU seconds, and the layers.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "profile.json")
        line = [sys.executable, "-m", "tidal_vllm.cli", "calibrate", str(model)]
        line += ["--context", str(context), "-o", str(path), *more]
        started, cpu = time.perf_counter(), _cpu_seconds()
        subprocess.run(line, check=True)
        seconds = time.perf_counter() - started
        found = load_profile(path)
        return {
            "context": context,
            "prompts": found.measured["prompts"]["count"],
            "options": more,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(_cpu_seconds() - cpu, 1),
            "seconds_without_start_up": found.measured["seconds"],
            "select_layers": list(found.select_layers),
            "agreed": found.measured["recommended"]["agreed"],
            "tokens": found.measured["recommended"]["tokens"],
            "load_average": [round(load, 1) for load in os.getloadavg()],
        }


def _cpu_seconds() -> float:
    """CPU time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
