"""vLLM packed for a GPU machine: what is taken, and whose machine code is kept."""

import struct
from pathlib import Path

import pytest

from benchmarks.gpu import fat_binary, pack, pack_site, unpack

pytestmark = pytest.mark.extended  # a newcomer has no GPU to run on

PTX, CODE = 1, 2


def entry(kind: int, gpu: int, content: bytes, header: int = 64) -> bytes:
    made = struct.pack("<HHIQ12xI", kind, 0x101, header, len(content), gpu)
    return made.ljust(header, b"h") + content


def fat(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def test_other_machine_code_is_zeroed_and_nothing_moves():
    host = b"\x50\xed\x55\xba\x90\x90 a program that compares with the magic number"
    nought = bytes(8)

    def module(old: bytes, new: bytes, ptx: bytes, larger: bytes) -> bytes:
        first = fat(
            entry(CODE, 80, old), entry(CODE, 90, b"kept"), entry(PTX, 90, ptx, 80)
        )
        second = fat(entry(CODE, 100, new, 112), entry(CODE, 90, larger))
        return host + first + host + second + host

    one = bytearray(module(b"code 8.0", b"code10.0", b"ptx  9.0", b"kept as well"))
    assert fat_binary.zero_others(one, 90) == (16, 24)
    assert one == module(nought, nought, nought, b"kept as well")
    other = bytearray(module(b"code 8.0", nought, nought, b"kept as well"))
    fat_binary.zero_others(other, 80)
    expected = module(b"code 8.0", nought, nought, bytes(12))
    assert other == expected.replace(b"kept", bytes(4))


@pytest.mark.parametrize(
    "wrong",
    [
        fat(entry(7, 90, b"of a kind that nobody knows")),
        fat(entry(CODE, 80, b"longer than the module"))[:-4],
        fat(entry(CODE, 80, b"cut off in its header"))[:40],
    ],
)
def test_an_unknown_layout_is_refused(wrong):
    with pytest.raises(ValueError, match="fat binary"):
        fat_binary.zero_others(bytearray(wrong), 90)


def write(folder: Path, **files: bytes | str) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_what_is_taken_of_vllm(tmp_path):
    source, target = tmp_path / "here/vllm", tmp_path / "there"
    both = fat(entry(CODE, 80, b"old"), entry(CODE, 90, b"new"))
    modules = {f"{name}.abi3.so": b"no fat binary" for name in pack_site.COMPILED}
    flash = "vllm_flash_attn/_vllm_fa3_C.abi3.so"
    taken = {
        **modules,
        "__init__.py": "",
        "third_party/__init__.py": "",
        "third_party/flash_linear_attention/chunk.py": "",
        "v1/deep_gemm/settings.json": "",
    }
    left = {
        "vllm-rs": b"a program",
        "_moe_C_stable_libtorch.abi3.so": both,
        "vllm_flash_attn/_vllm_fa2_C.abi3.so": both,
        "third_party/deep_gemm/__init__.py": "",
        "third_party/fmha_sm100/kernel.cuh": "",
        "third_party/tml_fa4/__init__.py": "",
        "v1/__pycache__/engine.cpython-311.pyc": b"",
    }
    write(source, **taken, **left)
    about = {"METADATA": "Name: vllm\nVersion: 1.2\n", "entry_points.txt": "[a]\n"}
    write(tmp_path / "here/vllm-1.2.dist-info", **about, RECORD="")
    with pytest.raises(SystemExit, match="no machine code of compute capability 9.0"):
        write(source, **{flash: fat(entry(CODE, 80, b"old"))})
        pack_site.copy_vllm(source, tmp_path / "refused")
    write(source, **{flash: both})
    pack_site.copy_vllm(source, target)
    info = {f"vllm-1.2.dist-info/{name}" for name in about}
    assert files_of(target) == {f"vllm/{name}" for name in taken} | info
    packed = (target / "vllm" / flash).read_bytes()
    assert packed == both.replace(b"old", bytes(3))
    (source / flash).unlink()
    with pytest.raises(SystemExit, match="lacks vllm_flash_attn/_vllm_fa3_C"):
        pack_site.copy_vllm(source, tmp_path / "lacking")


def test_dependencies_have_the_versions_that_are_installed(tmp_path):
    """Of those that an engine imports, what the GPU machine has is left out."""
    for name in ("pydantic_core", "loguru", "PyYAML", "tqdm", "torch"):
        about = f"Name: {name}\nVersion: 1.2\n"
        write(tmp_path / f"{name}-1.2.dist-info", METADATA=about)
    found = pack_site.requirements(tmp_path, "Tqdm, triton,\npyyaml\n")
    assert found == ["loguru==1.2", "pydantic-core==1.2"]


def test_an_archive_of_many_pieces(tmp_path):
    write(tmp_path / "site", **{"vllm/one.py": bytes(range(256)) * 8, "six.py": "6"})
    write(tmp_path / "out", **{"part-99": "of an earlier archive", "notes": ""})
    pieces = pack.write_pieces(tmp_path / "site", tmp_path / "out", piece=25)
    assert len(pieces) > 10
    assert {path.name for path in pieces} | {"notes"} == files_of(tmp_path / "out")
    assert {path.stat().st_size for path in pieces[:-1]} == {25}
    unpack.unpack(tmp_path / "out", tmp_path / "unpacked")
    assert files_of(tmp_path / "unpacked") == {"vllm/one.py", "six.py"}
