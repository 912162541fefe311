r"""Pack vLLM, or its FlashAttention 3 alone, for a GPU machine without a network.

    python -m benchmarks.gpu.pack --out DIR [--from SITE_PACKAGES]
    python -m benchmarks.gpu.pack --site --out DIR [--python 3.12] [--have FILE]

Where vLLM is installed: DIR/part-00 becomes an archive (tar, xz) of the package
`vllm_flash_attn`, with vLLM's compiled module and the interface beside it. Torch comes
with the GPU machine. The compiled module of vLLM 0.32.0 has 173 MB, packed 11.1 MiB;
packing takes minutes. `benchmarks.gpu.run --fa3 DIR` unpacks it.

With `--site` the archive, in pieces part-00, part-01, ..., holds vLLM and what an
engine imports (`pack_site.py`); pip needs a network. `--python` names the GPU machine's
Python, and `--have` a file of the distributions that it has, one a line or between
commas. `benchmarks.gpu.run --site DIR` unpacks all, FlashAttention 3 with it.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import pack_site

PACKAGE = "vllm_flash_attn"
INTERFACE, COMPILED = "flash_attn_interface.py", "_vllm_fa3_C*.so"
LIMIT = 16 << 20
"""Bytes of the archive: what may be brought along."""
PIECE = 52 << 20
"""Bytes of a piece of vLLM's archive: what one transfer may have."""


def installed() -> Path:
    """The folder of vLLM's FlashAttention.

    Raises:
        SystemExit: vLLM is not installed.
    """
    found = find_spec("vllm")
    if found is None or found.origin is None:
        raise SystemExit("vLLM is not installed here: --from names its site-packages")
    return Path(found.origin).parent / PACKAGE


def stage_interface(folder: Path, source: Path | None = None) -> Path:
    """Make the package without its compiled module, for a rehearsal.

    Returns:
        `folder`, which holds the package.
    """
    source = source or installed()
    package = folder / PACKAGE
    package.mkdir(parents=True)
    # Not vLLM's own __init__.py, which imports from the rest of vLLM.
    (package / "__init__.py").touch()
    shutil.copy(source / INTERFACE, package)
    return folder


def pack(source: Path, out: Path) -> Path:
    """Write the archive, OUT/part-00.

    Raises:
        SystemExit: A file is missing, or the archive is too large.
    """
    compiled = sorted(source.glob(COMPILED))
    if not compiled or not (source / INTERFACE).exists():
        raise SystemExit(f"{source}: lacks {INTERFACE} or {COMPILED}")
    out.mkdir(parents=True, exist_ok=True)
    archive = out / "part-00"
    with tempfile.TemporaryDirectory() as folder:
        staged = stage_interface(Path(folder) / "staged", source)
        with tarfile.open(archive, "w:xz", preset=6) as packed:
            packed.add(staged / PACKAGE, PACKAGE)
            packed.add(compiled[0], f"{PACKAGE}/{compiled[0].name}")
    size = archive.stat().st_size
    if size > LIMIT:
        raise SystemExit(f"{archive} has {size} bytes; allowed are {LIMIT}")
    return archive


def write_pieces(folder: Path, out: Path, piece: int = PIECE) -> list[Path]:
    """Write all of a folder as OUT/part-00, part-01, ...; earlier pieces are removed.

    Args:
        piece: Bytes of a piece; the last one may have fewer.

    Returns:
        The pieces. `unpack.unpack` puts them together.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part-*"):
        old.unlink()
    pieces: list[Path] = []
    with subprocess.Popen(
        ["tar", "-cJ", "-C", str(folder), "."],
        stdout=subprocess.PIPE,
        env=os.environ | {"XZ_OPT": "-6 -T0"},  # in blocks: read by all cores as well
    ) as tar:
        assert tar.stdout is not None
        for number in itertools.count():
            content = tar.stdout.read(piece)
            if not content:
                break
            pieces.append(out / f"part-{number:02}")
            pieces[-1].write_bytes(content)
    if tar.returncode:
        raise SystemExit(f"{folder}: tar ended with {tar.returncode}")
    return pieces


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="where", type=Path, help="its site-packages")
    parser.add_argument("--site", action="store_true", help="all of vLLM")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--have", type=Path, help="what the GPU machine has")
    args = parser.parse_args()
    source = args.where / "vllm" / PACKAGE if args.where else installed()
    if args.site:
        have = args.have.read_text() if args.have else ""
        with tempfile.TemporaryDirectory() as folder:
            pack_site.stage(Path(folder), source.parent, args.python, have)
            files = sum(path.is_file() for path in Path(folder).rglob("*"))
            print(f"{files} files")
            pieces = write_pieces(Path(folder), args.out)
    else:
        pieces = [pack(source, args.out)]
    for piece in pieces:
        print(f"{piece}: {piece.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
