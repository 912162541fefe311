r"""Everything to do on a GPU machine, in order of what it decides; 2 x 6 minutes.

    python -m benchmarks.gpu.run --out DIR --prebuilt DIR --site DIR
    python -m benchmarks.gpu.run --rehearse --out DIR      every step, without a GPU

docs/gpu.md says what is needed, what each step decides and what is written.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from benchmarks import records
from benchmarks.gpu import pack, summary, unpack
from benchmarks.gpu.child import run_child
from benchmarks.gpu.steps import PART_SECONDS, ROOT, STEPS, Command, Setup, Step

REHEARSAL_SECONDS = 600
"""Limit of a step without a GPU, where a busy machine takes its time."""


class Run:
    """One run of some steps: prints, keeps records, and knows what has failed."""

    def __init__(self, setup: Setup, steps: Sequence[Step] = STEPS) -> None:
        self.setup, self.steps = setup, steps
        self.begun = time.monotonic()
        setup.out.mkdir(parents=True, exist_ok=True)
        self.log = (setup.out / "run.log").open("a", buffering=1)
        # Records of earlier runs stay in the file, and out of the summary.
        self.start = setup.results.stat().st_size if setup.results.exists() else 0

    def say(self, name: str, line: str) -> None:
        """Print and keep a line, with the seconds since the start."""
        line = f"[{time.monotonic() - self.begun:7.1f}] {name:<8} | {line}"
        print(line, flush=True)
        self.log.write(line + "\n")

    def everything(self) -> int:
        """Run all steps and sum up; 0 if every one of them went well."""
        statuses = {}
        for part in (1, 2):
            steps = [step for step in self.steps if step.part == part]
            if not steps:
                continue
            wrong = self.wrong_kernels(statuses) if part == 2 else []
            deadline = time.monotonic() + PART_SECONDS
            for step in steps:
                if wrong:
                    why = f"a kernel is wrong: {'; '.join(wrong)}"
                    status = self._end(step, "dropped", 0.0, why)
                else:
                    status = self.one(step, deadline)
                statuses[step.name] = status
        text = summary.of(records.read(self.setup.results, self.start))
        (self.setup.out / "summary.md").write_text(text)
        for line in text.splitlines():
            self.say("summary", line)
        self.log.close()
        return 0 if set(statuses.values()) <= {"passed"} else 1

    def wrong_kernels(self, statuses: dict[str, str]) -> list[str]:
        """Reasons to drop the second part: what is wrong, each in a few words."""
        found = records.read(self.setup.results, self.start)
        wrong = [
            f"{r['num_failed']} tests of {r['implementation']}"
            for r in found
            if r["benchmark"] == "parity" and r.get("num_failed")
        ]
        wrong += [
            f"{r['implementation']} in {r['benchmark']} ({r['wrong']})"
            for r in found
            if r.get("wrong") and r.get("implementation") in ("cuda", "triton")
        ]
        for step in self.steps:
            # A kernel that hangs, or takes its process with it, leaves no record.
            if step.judges and statuses.get(step.name) in ("failed", "timed out"):
                wrong.append(f"step {step.name} {statuses[step.name]}")
        return wrong

    def one(self, step: Step, deadline: float) -> str:
        """Run a step's commands; how it ended: passed, failed or timed out."""
        begun = time.monotonic()
        if self.setup.rehearse:
            ends = begun + REHEARSAL_SECONDS
        else:
            ends = min(begun + step.limit, deadline)
        self.say(step.name, f"{step.decides}; limit {ends - begun:.0f} s")
        commands, problems, hung = list(step.commands(self.setup)), [], False
        results = self.setup.results
        size = results.stat().st_size if results.exists() else 0
        for done, command in enumerate(commands):
            left = ends - time.monotonic()
            if left < 1:
                problems.append(f"no time for {len(commands) - done} commands")
                hung = True
                break
            # A command that hangs must leave time to those after it.
            limit = min(left, 2 * left / (len(commands) - done))
            words = [self.setup.python, *command.words]
            self.say(step.name, "+ " + " ".join(words))
            ended = run_child(
                words,
                limit,
                lambda line: self.say(step.name, line),
                self.environment(step, command),
                ROOT,
            )
            if not ended.well:
                problems.append(f"{' '.join(command.words[:2])}: {ended}")
                hung |= ended.timed_out
        if self.setup.rehearse:
            problems += self.skipped_since(size)
        status = "timed out" if hung else "failed" if problems else "passed"
        spent = time.monotonic() - begun
        return self._end(step, status, spent, "; ".join(problems))

    def skipped_since(self, start: int) -> list[str]:
        """What a rehearsal could not run: a GPU may lack it, a rehearsal must not."""
        found = records.read(self.setup.results, start)
        return [f"skipped: {r['skipped']}" for r in found if "skipped" in r]

    def environment(self, step: Step, command: Command) -> dict[str, str]:
        """The environment of a command; vLLM is on the path in part 2 only."""
        setup, paths = self.setup, [ROOT]
        fixed = {
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        site = unpack.place(setup.site, "vllm", setup.work) if setup.site else None
        if step.part == 1:
            if setup.fa3:
                paths.append(unpack.place(setup.fa3, pack.PACKAGE, setup.work))
            elif site:
                paths.append(_flash_attention_of(site, setup.work))
            # A rehearsal shows that nothing of this part imports vLLM.
            paths += [_without_vllm(setup.work)] if setup.rehearse else []
        else:
            if site:
                paths.append(site)
            paths += [_with_entry_points(setup.work)]
            in_site = site is not None and (site / "flashinfer").is_dir()
            if not in_site and find_spec("flashinfer") is None:
                # Its sampler is vLLM's choice on a GPU, whether it is there or not.
                fixed["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        fixed["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        if setup.rehearse and step.part == 1:
            # NOTE: vLLM takes the variable for a sign that Triton has a device.
            fixed["CUDA_VISIBLE_DEVICES"] = ""
        return os.environ | fixed | command.env

    def _end(self, step: Step, status: str, seconds: float, why: str) -> str:
        self.say(step.name, f"{status} after {seconds:.1f} s{why and ': ' + why}")
        record = {"benchmark": "step", "step": step.name, "status": status}
        record |= {"seconds": round(seconds, 1), "why": why or None}
        records.append(self.setup.results, record)
        return status


def _flash_attention_of(site: Path, work: Path) -> Path:
    """A folder whose package `vllm_flash_attn` is that of vLLM, without vLLM.

    The package's own __init__.py, which would import from the rest of vLLM, is not run.
    """
    package = work / "flash_attention" / pack.PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    inside = str(site.resolve() / "vllm" / pack.PACKAGE)
    (package / "__init__.py").write_text(f"__path__ = [{inside!r}]\n")
    return package.parent


def _without_vllm(work: Path) -> Path:
    """A folder in which `import vllm` is an ImportError."""
    package = work / "without_vllm/vllm/__init__.py"
    package.parent.mkdir(parents=True, exist_ok=True)
    package.write_text('raise ImportError("the first part runs without vLLM")\n')
    return package.parents[1]


def _with_entry_points(work: Path) -> Path:
    """A folder through which vLLM finds the plug-ins of this repository.

    Python looks for entry points in *.dist-info; no build tool has to be here.
    """
    import tomllib

    folder = work / "entry_points"
    if entry_points(group="vllm.general_plugins", name="tidal"):
        return folder  # the project is installed; the folder is empty
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    about = f"Metadata-Version: 2.1\nName: {project['name']}\n"
    (info / "METADATA").write_text(f"{about}Version: {project['version']}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {at}" for name, at in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def libraries(folder: Path | None) -> tuple[Path, ...]:
    """Builds of the CUDA extension in a folder, `_tidal_C.so` first.

    Raises:
        SystemExit: The folder has none.
    """
    if folder is None:
        return ()
    found = sorted(folder.glob("_tidal_C*.so"), key=lambda path: path.stem)
    if not found:
        raise SystemExit(f"--prebuilt {folder}: no _tidal_C*.so there")
    return tuple(path.resolve() for path in found)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    default = ROOT / "benchmarks/gpu/out"
    parser.add_argument("--out", type=Path, default=default, help="for the results")
    parser.add_argument("--prebuilt", type=Path, help="folder of _tidal_C*.so")
    parser.add_argument("--fa3", type=Path, help="FlashAttention 3, packed or not")
    parser.add_argument("--site", type=Path, help="vLLM, packed or not")
    parser.add_argument("--steps", nargs="+", choices=names, default=names)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="tidal-gpu-") as folder:
        work = Path(folder)
        fa3 = args.fa3
        if args.rehearse and not (fa3 or args.site):
            fa3 = pack.stage_interface(work / "fa3")
        setup = Setup(
            out=args.out.resolve(),
            work=work,
            libraries=libraries(args.prebuilt),
            fa3=fa3,
            site=args.site,
            rehearse=args.rehearse,
        )
        for given, package in ((setup.fa3, pack.PACKAGE), (setup.site, "vllm")):
            if given:
                unpack.place(given, package, work)  # says now what is missing
        steps = [step for step in STEPS if step.name in args.steps]
        return Run(setup, steps).everything()


if __name__ == "__main__":
    sys.exit(main())
