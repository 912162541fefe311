r"""Pack FlashAttention 3 for a GPU machine without a network: two files of vLLM's.

    python -m benchmarks.gpu.pack --out DIR [--from SITE_PACKAGES]

Where vLLM is installed: DIR/part-00 becomes an archive (tar, xz) of the package
`vllm_flash_attn`, with vLLM's compiled module and the interface beside it. Torch comes
with the GPU machine. The compiled module of vLLM 0.32.0 has 173 MB, packed 11.1 MiB;
packing takes minutes. `benchmarks.gpu.run --fa3 DIR` unpacks it.
"""

import argparse
import shutil
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "vllm_flash_attn"
INTERFACE, COMPILED = "flash_attn_interface.py", "_vllm_fa3_C*.so"
LIMIT = 16 << 20
"""Bytes of the archive: what may be brought along."""


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="site", type=Path, help="its site-packages")
    args = parser.parse_args()
    source = args.site / "vllm" / PACKAGE if args.site else installed()
    archive = pack(source, args.out)
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
