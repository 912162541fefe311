"""The steps from an empty folder to an environment, and which steps are done."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tomllib

from environment.installer import Installer
from environment.progress import Step, StepFailed
from environment.torn import remove_torn_packages

TOOLS = ("pip", "setuptools>=78.1.1,<81", "wheel", "packaging")
BUILT_FROM = ("pyproject.toml", "setup.py")
REQUIREMENTS = Path(__file__).with_name("requirements.py")
# As in `tidal_vllm.versions`, which cannot be imported before it is installed.
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")
GPU_SIGNS = (
    "/dev/nvidiactl",
    "/dev/nvidia0",
    "/proc/driver/nvidia/version",
    "/dev/dxg",
)


def has_nvidia_gpu() -> bool:
    """Whether this machine may have an NVIDIA GPU; in doubt, all is installed."""
    return bool(shutil.which("nvidia-smi")) or any(map(os.path.exists, GPU_SIGNS))


@dataclass(frozen=True)
class Part:
    """One step: its title, what decides its outcome, and what it does."""

    title: str
    decided_by: tuple[str, ...]
    act: Callable[[Step], None]


class Environment:
    """A virtual environment with vLLM and tidal_vllm.

    Args:
        root: The repository.
        folder: Folder of the environment.
        full: Whether to install what only a GPU uses, even where none is found.
        wheels: Folder to install from, without network.
        tests: Whether what tests and linters need is installed, too.
        models: Whether what `tidal-vllm get-model` needs is installed, too.
        evaluate: Whether lm_eval is installed, too; with tests only.
    """

    def __init__(
        self,
        root: str,
        folder: str,
        *,
        vllm: str,
        torch: str,
        full: bool = False,
        wheels: str | None = None,
        tests: bool = True,
        models: bool = False,
        evaluate: bool = False,
    ) -> None:
        self.root, self.folder = Path(root), Path(folder)
        self.vllm, self.torch = f"vllm=={vllm}", f"torch=={torch}"
        self.wheels = os.path.abspath(wheels) if wheels else None
        self.tests = tests
        self.python = str(self.folder / "bin" / "python")
        self.log = self.folder / "setup.log"
        self._record_file = self.folder / "setup.json"
        self.record = self._read_record()
        self.full = full or has_nvidia_gpu() or self.record.get("full", False)
        self.models = models or self.record.get("models", False)
        self.evaluate = evaluate or self.record.get("evaluate", False)
        self._lock: int | None = None

    def is_ready(self) -> bool:
        """Whether every step is done, and nothing that decides a step has changed."""
        keys = self._keys(list(self._parts()))
        done = self.record.get("done", [])[: len(keys)]
        return self.record.get("complete", False) and done == keys

    def set_up(self) -> None:
        """Do the steps that are left; exit with a message where one fails."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            with self._locked():
                self.record = self._read_record()
                self._do(list(self._parts()))
        except StepFailed as failed:
            print(f"\ntidal_vllm cannot be set up: {failed}", file=sys.stderr)
            print("  The same command goes on from here.", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
            sys.exit(130)

    def fill(self, folder: str) -> None:
        """Put a wheel of everything that is installed into a folder."""
        installer = self._installer
        command = installer.pip("wheel", "--no-deps", "--wheel-dir", folder)
        try:
            with self._step(f"Filling {folder}") as step:
                beside = self._required(step, "beside")
                listed = subprocess.check_output(
                    installer.pip("list", "--format=freeze", "--exclude-editable"),
                    text=True,
                )
                step.run([*command, *installer.sources(), *listed.split(), *beside])
        except (StepFailed, subprocess.CalledProcessError) as failed:
            sys.exit(f"\n{failed}")
        except KeyboardInterrupt:
            sys.exit(130)
        print(f"Without network: python3 bootstrap.py --wheels {folder} test")

    def _parts(self) -> Iterator[Part]:
        yield Part(
            f"Creating {self.folder.name}",
            (str(self.folder), sys.version),
            self._create,
        )
        yield Part("Updating pip", TOOLS, self._install_tools)
        kind = "full" if self.full else "bare"
        yield Part(f"Installing {self.torch}", (self.torch, kind), self._install_torch)
        yield Part(f"Installing {self.vllm}", (self.vllm, kind), self._install_vllm)
        if not self.full:
            yield Part(
                "Installing what vLLM requires without a GPU",
                (REQUIREMENTS.read_text(), *BUILT_FOR_TORCH),
                self._install_requirements,
            )
        sources = [(self.root / name).read_text() for name in BUILT_FROM]
        yield Part(
            "Installing tidal_vllm", (str(self.root), *sources), self._install_package
        )
        yield Part(
            "Looking at " + ", ".join(BUILT_FOR_TORCH), (), self._keep_what_imports
        )
        if self.models:
            readers = tuple(self._extras("models"))
            yield Part("Installing what reads models", readers, self._install_readers)
        if self.tests:
            tools = tuple(self._extras("test", "lint", "bench", "models"))
            yield Part("Installing what tests need", tools, self._install_test_tools)
        if self.tests and self.evaluate:
            harness = tuple(self._extras("evaluate"))
            yield Part("Installing lm_eval", harness, self._install_harness)

    def _create(self, step: Step) -> None:
        if self._pip_works():
            step.say("it was there")
        else:
            self._clear()
            step.run([sys.executable, "-m", "venv", str(self.folder)])

    def _pip_works(self) -> bool:
        command = [self.python, "-c", "import pip, sys; print(sys.version)"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.check_output(command, stderr=subprocess.DEVNULL)
            return found.decode().strip() == sys.version
        return False

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in (self.log, self._record_file):
                path.unlink()

    def _install_tools(self, step: Step) -> None:
        pip = Installer(self.python, None, "", self.wheels)
        step.run(pip.install("--upgrade", *TOOLS, progress="off"))
        step.say(self._installer.why)

    def _install_torch(self, step: Step) -> None:
        step.run(self._installer.install(self.torch, bare=not self.full))

    def _install_vllm(self, step: Step) -> None:
        needed = [self.vllm, self.torch]
        step.run(self._installer.install(*needed, bare=not self.full))

    def _install_requirements(self, step: Step) -> None:
        bare = self._required(step, "bare")
        step.run(self._installer.install(*bare, bare=True))
        step.run(self._installer.install(*self._required(step, "rest")))
        beside = self._required(step, "beside")
        step.run(self._installer.install(*beside, bare=True))
        step.say("left out what only a GPU uses, which `pip check` will name")

    def _install_package(self, step: Step) -> None:
        if not self.full:
            os.environ.setdefault("TIDAL_BUILD_CUDA", "0")
            step.say("without CUDA kernels, which only a GPU runs")
        step.run(self._installer.install("--editable", str(self.root), bare=True))

    def _keep_what_imports(self, step: Step) -> None:
        """Builds for another torch break `import transformers`."""
        for name in BUILT_FOR_TORCH:
            if step.fails([self.python, "-c", f"import {name}"]):
                step.run(self._installer.pip("uninstall", "--yes", name))
                step.say(f"without {name}, which cannot be imported")

    def _install_test_tools(self, step: Step) -> None:
        self._install_beside_vllm(step, "test", "lint")
        # They require torch, and no more that is not there.
        bare = self._extras("models", "bench")
        step.run(self._installer.install(*bare, bare=True))

    def _install_harness(self, step: Step) -> None:
        self._install_beside_vllm(step, "evaluate")

    def _install_beside_vllm(self, step: Step, *extras: str) -> None:
        needed = self._extras(*extras)
        # Named again, so that nothing of vLLM's gets replaced.
        needed += [self.vllm] if self.full else self._required(step, "rest")
        step.run(self._installer.install(*needed, self.torch if self.full else "pip"))

    def _install_readers(self, step: Step) -> None:
        step.run(self._installer.install(*self._extras("models"), bare=True))

    def _extras(self, *names: str) -> list[str]:
        project = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        return [requirement for name in names for requirement in extras[name]]

    def _required(self, step: Step, kind: str) -> list[str]:
        command = [self.python, "-I", str(REQUIREMENTS), kind, *BUILT_FOR_TORCH]
        return step.run(command).split()

    @property
    def _installer(self) -> Installer:
        return Installer.choose(self.python, self.wheels)

    def _step(self, title: str) -> Step:
        keep_open = () if self._lock is None else (self._lock,)
        return Step(title, self.log, keep_open=keep_open)

    def _do(self, parts: list[Part]) -> None:
        keys, done = self._keys(parts), self.record.get("done", [])
        same = [a == b for a, b in zip(keys, done, strict=False)]
        finished = same.index(False) if False in same else len(same)
        if done and not finished:  # made by another Python, or in another place
            self._clear()
        interrupted = not self.record.get("complete")
        torn = remove_torn_packages(self.folder) if interrupted else []
        if torn:  # it belongs to one of the steps that install packages
            finished = min(finished, 2)
        self._write_record(keys[:finished], complete=finished == len(keys))
        for number, part in enumerate(parts[finished:], finished + 1):
            with self._step(f"[{number}/{len(parts)}] {part.title}") as step:
                if torn:
                    step.say(f"half installed before: {', '.join(torn)}")
                    torn = []
                part.act(step)
            self._write_record(keys[:number], complete=number == len(keys))

    @staticmethod
    def _keys(parts: list[Part]) -> list[str]:
        """What each step's outcome depends on, those before it included."""
        digest, keys = hashlib.sha256(), []
        for part in parts:
            digest.update(json.dumps([part.title, *part.decided_by]).encode())
            keys.append(digest.hexdigest()[:16])
        return keys

    def _read_record(self) -> dict:
        try:
            return json.loads(self._record_file.read_text())
        except (OSError, ValueError):
            return {}

    def _write_record(self, done: list[str], complete: bool) -> None:
        self.record = {
            "done": done,
            "full": self.full,
            "models": self.models,
            "evaluate": self.evaluate,
            "complete": complete,
        }
        fresh = self._record_file.with_suffix(".new")
        fresh.write_text(json.dumps(self.record))
        fresh.replace(self._record_file)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One set-up at a time. A command that outlives this process keeps the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Waiting for another set-up of", self.folder.name, flush=True)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(self._lock)
            self._lock = None
