"""What a GPU run makes of what it found: verdicts, counters, packed packages."""

import pytest

from benchmarks.gpu import counters, pack, summary, unpack
from benchmarks.gpu.targets import TARGETS

BIG = {"batch": 64, "context": 32768}


def attend(op: str, us: float, **more) -> dict:
    case = BIG | {"implementation": "cuda", "select_block_size": 16}
    case |= {"kv_cache_dtype": "auto", "benchmark": "attend", "op": op}
    return case | {"median_us": us} | more


def verdict(part: str, *found: dict) -> tuple[float | None, str]:
    (target,) = (t for t in TARGETS if t.text.startswith(part) and "64 x 32" in t.text)
    return summary.verdict(target, found)


FLASH = attend("dense", 2000.0, implementation="flash_attn", select_block_size=None)
SPARSE = {"token_budget": 3264}


def test_targets_are_those_that_were_set():
    """Bounds by their texts' first words, the tightest of each kind."""
    found = {(t.text.split(",")[0], t.bound) for t in TARGETS}
    assert {
        ("dense that keeps scores / FlashAttention 3", 1.05),
        ("sparse at 3264 / FlashAttention 3", 0.11),
        ("sparse at 13104", 0.8),
        ("sparse at 4096", 0.7),
        ("launches of a SPARSE layer", 1),
        ("sparse over fp8", 1.7),
        ("select_blocks", 15),
        ("select_blocks", 30),
        ("select_blocks by cuda / reading its bytes", 2.0),
        ("select_blocks", 1.5),
        ("attention of 32 layers", 5.0),
        ("attention of 32 layers", 2.5),
    } <= found


@pytest.mark.parametrize("us, said", [(2100.0, "pass"), (2101.0, "FAIL")])
def test_a_bound_belongs_to_what_passes(us, said):
    kept = attend("dense + block_lse", us)
    measured, found = verdict("dense that keeps", FLASH, kept)
    assert (measured, found) == (us / 2000, said)


@pytest.mark.parametrize("share, said", [(0.8, "pass"), (0.79, "FAIL")])
def test_a_lower_bound(share, said):
    found = attend("sparse", 200.0, share_of_copy=share, **SPARSE)
    assert verdict("sparse at 3264, share", found)[1] == said


def test_without_records_a_target_was_not_run():
    assert verdict("dense that keeps", FLASH) == (None, "not run")
    other = attend("dense + block_lse", 100.0, context=1024)
    assert verdict("dense that keeps", FLASH, other) == (None, "not run")
    assert all(summary.verdict(target, []) == (None, "not run") for target in TARGETS)


def test_fp8_is_compared_with_bf16():
    half = attend("sparse", 100.0, kv_cache_dtype="fp8", **SPARSE)
    whole = attend("sparse", 180.0, **SPARSE)
    assert verdict("sparse over fp8", half, whole) == (1.8, "pass")


def test_each_build_has_a_table_of_its_own():
    slow = attend("dense + block_lse", 3000.0, library="_tidal_C.so")
    fast = attend("dense + block_lse", 2000.0, library="_tidal_C_b.so")
    one, other = summary.of([FLASH, slow, fast]).split("| target with ")[1:]
    assert one.startswith("_tidal_C.so") and "| 1.5 | FAIL |" in one
    assert other.startswith("_tidal_C_b.so") and "| 1 | pass |" in other


def test_steps_and_wrong_answers_are_told():
    step = {"benchmark": "step", "step": "cuda", "status": "failed"}
    wrong = {"benchmark": "attend", "implementation": "cuda", "wrong": "off by 1"}
    text = summary.of([step | {"seconds": 3.5, "why": "exit | status 1"}, wrong])
    assert "| cuda | failed | 3.5 | exit / status 1 |" in text
    assert "Wrong: cuda, attend: off by 1" in text


def test_counters_are_read_from_what_ncu_prints():
    """Made up after the raw page of Nsight Compute: names, units, a row per kernel."""
    printed = (
        "==PROF== Connected\nanother line\n"
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum"\n'
        '"","","ns","byte"\n'
        '"0","sparse_decode","66,112","214,748,364"\n'
        '"1","select_blocks","9000","17"\n'
    )
    one, other = counters.read_counters(printed)
    assert one["kernel"] == "sparse_decode"
    assert one["gpu__time_duration.sum"] == 66112.0
    assert one["units"]["dram__bytes_read.sum"] == "byte"
    assert other["dram__bytes_read.sum"] == 17.0
    assert counters.read_counters("==ERROR== no permission") == []


def test_a_package_travels_as_an_archive(tmp_path):
    vllm, out, work = (tmp_path / name for name in ("vllm", "out", "work"))
    vllm.mkdir()
    (vllm / pack.INTERFACE).write_text("FA3_AVAILABLE = True\n")
    with pytest.raises(SystemExit, match="lacks flash_attn_interface.py or _vllm_fa3"):
        pack.pack(vllm, out)
    (vllm / "_vllm_fa3_C.abi3.so").write_bytes(b"machine code")
    whole = pack.pack(vllm, out)
    # As where transfers are limited: in pieces.
    content = whole.read_bytes()
    whole.write_bytes(content[:100])
    (out / "part-01").write_bytes(content[100:])
    target = unpack.place(out, pack.PACKAGE, work)
    assert target == work / pack.PACKAGE
    unpack.unpack(out, target)
    assert unpack.place(target, pack.PACKAGE, work) == target
    found = {path.name for path in (target / pack.PACKAGE).iterdir()}
    assert found == {"__init__.py", "flash_attn_interface.py", "_vllm_fa3_C.abi3.so"}
    with pytest.raises(SystemExit, match="holds neither vllm/ nor part-00"):
        unpack.place(work, "vllm", work)
