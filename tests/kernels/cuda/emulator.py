"""The CUDA kernels' own source, run on the CPU by tests/kernels/cuda/host."""

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
PARTS = ("emulation.cpp", "fibers.cpp", "matrices.cpp", "visibility.cpp")
EMULATION = [HERE / "host" / name for name in PARTS]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror")
# NOTE: to optimise all kernels for all shapes takes longer than to run them.
OPTIMISED = {"emulated_device.cpp": "-O0"}


class KernelError(RuntimeError):
    """The op threw: a check failed, or a kernel broke a rule of the emulation."""


def sanitized_environment() -> dict[str, str]:
    """The environment of a program with AddressSanitizer.

    The sanitizer's runtime has to be loaded first, and vLLM's CPU platform puts
    libraries into LD_PRELOAD of the process that it runs in.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return inherited | {"ASAN_OPTIONS": "detect_leaks=0"}


def built_once(tmp_path_factory, name: str, sources: list[Path]) -> Path:
    """A sanitized program; with pytest-xdist one worker builds it for all."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    program = folder / name
    with FileLock(folder / f"{name}.lock"):
        if not program.exists():
            build(program, sources)
    return program


def build(program: Path, sources: list[Path]) -> None:
    """Compile all sources side by side, then link."""
    command = ["g++", *FLAGS, *SANITIZERS, "-g1", f"-I{CSRC}", f"-I{HERE / 'host'}"]
    objects = {source: f"{program}.{source.stem}.o" for source in sources}
    compilers = [
        subprocess.Popen(
            [*command, OPTIMISED.get(source.name, "-O1"), "-c", source, "-o", to]
        )
        for source, to in objects.items()
    ]
    failed = [compiler.args for compiler in compilers if compiler.wait()]
    assert not failed, failed
    unfinished = program.with_suffix(".unfinished")
    subprocess.run([*command, *objects.values(), "-o", unfinished], check=True)
    unfinished.rename(program)


class Emulator:
    """Runs one op per process, on tensors with their own strides and offsets.

    Args:
        runner: The program made of `host/run.cpp`.
        schedule: The order of threads; `host/emulation.h` says which number means what.
        processors: How many the GPU is said to have; more give a row more splits.
    """

    def __init__(self, runner: Path, schedule: int = 0, processors: int = 132) -> None:
        self.runner = runner
        self.schedule = schedule
        self.processors = processors

    def run(
        self,
        op: str,
        tensors: dict[str, torch.Tensor],
        outputs: tuple[str, ...],
        **numbers: float,
    ) -> None:
        """Run `op`; the tensors named in `outputs` are written.

        Raises:
            KernelError: the op threw; the message is its own.
            AssertionError: a sanitizer found something; the message is its report.
        """
        records = {
            "op": op,
            "schedule": self.schedule,
            "processors": self.processors,
            "outputs": " ".join(outputs),
            **numbers,
        }
        parts = [_record(name, str(value).encode()) for name, value in records.items()]
        for name, tensor in tensors.items():
            parts.append(_record(f"{name}.meta", _meta(tensor).encode()))
            parts.append(_record(name, _storage(tensor).tobytes()))
        done = subprocess.run(
            [str(self.runner)],
            input=b"".join(parts),
            capture_output=True,
            timeout=300,
            env=sanitized_environment(),
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-6000:]
        if not done.stdout.startswith(b"ok"):
            raise KernelError(done.stdout.decode())
        start = 2
        for name in outputs:
            target = _storage(tensors[name])
            end = start + target.nbytes
            part = torch.frombuffer(
                bytearray(done.stdout[start:end]), dtype=torch.uint8
            )
            torch.from_numpy(target).copy_(part)
            start = end
        assert start == len(done.stdout)


def _record(name: str, data: bytes) -> bytes:
    key = name.encode()
    return struct.pack("Q", len(key)) + key + struct.pack("Q", len(data)) + data


def _storage(tensor: torch.Tensor) -> np.ndarray:
    """All bytes of a tensor's storage, as a writable array."""
    storage = tensor.untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


def _meta(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    offset = tensor.storage_offset() * tensor.element_size()
    where = (tensor.device.type, 0, offset, tensor.dim())
    return " ".join(map(str, (dtype, *where, *tensor.shape, *tensor.stride())))
