"""The CUDA extension of this installation, looked at without loading it.

It cannot be loaded beside a torch without CUDA, and the doctor looks at it there too.
Neither torch nor vLLM is imported here.
"""

import hashlib
import json
import mmap
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

# TIDAL_CUDA_LIBRARY names another build of the extension, to compare two of them.
LIBRARY = Path(
    os.environ.get("TIDAL_CUDA_LIBRARY", Path(__file__).with_name("_tidal_C.so"))
)
SOURCE_ROOT = Path(__file__).parents[1]  # of a checkout; site-packages holds no csrc/
# CMakeLists.txt writes a JSON object behind these words into the module.
MARK = b"tidal_vllm build record: "


@dataclass(frozen=True)
class BuildRecord:
    """What a module was made of.

    Attributes:
        targets: GPU architectures that it has machine code for, such as "sm_90a".
        ptx: The architecture of the code that other GPUs compile when they load it.
        nvcc: Version of the compiler.
        torch_abi: The oldest torch whose stable ABI it fits.
        sources: `digest_of_sources` of what it was compiled from.
    """

    targets: tuple[str, ...]
    ptx: str
    nvcc: str
    torch_abi: str
    sources: str

    def __str__(self) -> str:
        return (
            f"{', '.join(self.targets)} and PTX of {self.ptx}, by nvcc {self.nvcc}, "
            f"for torch {self.torch_abi} or later, sources {self.sources[:8]}"
        )


def read_record(library: Path = LIBRARY) -> BuildRecord | None:
    """The record inside a module; None where there is no module or no record."""
    if not library.exists() or not library.stat().st_size:
        return None
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        begin = content.find(MARK)
        if begin < 0:
            return None
        text = content[begin + len(MARK) : content.find(b"\0", begin)]
    given = json.loads(text)
    return BuildRecord(**given | {"targets": tuple(given["targets"])})


def digest_of_sources(root: Path = SOURCE_ROOT) -> str | None:
    """What CMakeLists.txt computes of the sources; None where they are not at hand."""
    build = root / "CMakeLists.txt"
    if not build.exists() or not (root / "csrc").is_dir():
        return None
    files = [build, *sorted(p for p in (root / "csrc").iterdir() if p.is_file())]
    lines = (
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  "
        f"{file.relative_to(root).as_posix()}\n"
        for file in files
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stale(library: Path = LIBRARY, root: Path = SOURCE_ROOT) -> str:
    """Why the module is not the one of the sources at hand; empty if it may be."""
    record, sources = read_record(library), digest_of_sources(root)
    if record is None or sources is None or record.sources == sources:
        return ""
    return (
        f"{library.name} was built from other sources ({record.sources[:8]}) than "
        f"{root / 'csrc'} holds now ({sources[:8]})"
    )


def advise(reason: str) -> str:
    """The advice for a user whose GPU has no CUDA kernels, for the given reason."""
    return (
        f"There is a GPU, but not the CUDA kernels for it: {reason}. "
        f"This builds them: {how_to_build()}"
    )


def how_to_build() -> str:
    """The command that builds the extension into this installation.

    What it takes and does not find, the build brings itself.
    """
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    return f"TIDAL_BUILD_CUDA=1 {pip} -v --no-deps {_source()}"


def _source() -> str:
    """What pip is to build: the place that this package was installed from."""
    try:
        text = distribution("tidal_vllm").read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    origin = json.loads(text) if text else {}
    url = urlparse(origin.get("url", ""))
    folder = Path(unquote(url.path))
    if url.scheme != "file" or folder.suffix == ".whl":
        return "REPOSITORY"
    where = shlex.quote(str(folder))
    return f"-e {where}" if origin.get("dir_info", {}).get("editable") else where
