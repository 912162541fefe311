"""How long does a whole calibration take? The command as users run it, timed.

A planted model with two hops is built, calibrated in a process of its own with the
default options but for the context, and the layers found are checked. One JSON line is
appended to benchmarks/results/calibration_time.jsonl.

    python -m benchmarks.quality.calibration_time --layers 8 --context 4000
"""

import argparse
import json
import os
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
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    spec = PlantedSpec(
        hops=2, num_layers=given.layers, max_position_embeddings=2 * given.context
    )
    with tempfile.TemporaryDirectory() as folder:
        model = build_planted_model(Path(folder, "model"), spec)
        profile = Path(folder, "profile.json")
        line = [sys.executable, "-m", "tidal_vllm.cli", "calibrate", str(model)]
        line += ["--context", str(given.context), "-o", str(profile)]
        started = time.perf_counter()
        subprocess.run(line, check=True)
        seconds = time.perf_counter() - started
        found = load_profile(profile)
    if found.select_layers != spec.select_layers:
        raise SystemExit(f"found {found.select_layers}, not {spec.select_layers}")
    result = {
        "model": f"planted, {spec.hops} hops, {spec.num_layers} layers",
        "context": given.context,
        "prompts": found.measured["prompts"]["count"],
        "seconds": round(seconds, 1),
        "seconds_without_start_up": found.measured["seconds"],
        "select_layers": list(found.select_layers),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        **describe_run("vllm"),
    }
    with given.out.open("a") as out:
        out.write(json.dumps(result) + "\n")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
