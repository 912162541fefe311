"""`tidal-vllm doctor`: what it finds here, and what it says where all is not well."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.processes import TIDAL_VLLM, run, run_python, write_distribution
from tidal_vllm import child_process, doctor, extension, probe

AT_ONCE = ["package", "vLLM", "torch", "profiles", "CUDA"]


def examine(*options: str, **kwargs) -> tuple[int, list[str]]:
    """The exit status, and what is said but the names of what is under way."""
    done = run([TIDAL_VLLM, "doctor", *options], **kwargs)
    assert "Traceback" not in done.stdout
    lines = done.stdout.splitlines()
    return done.returncode, [line for line in lines if not line.startswith("...")]


def test_all_is_well_here():
    """Down to an engine that answers; each stage is named before it runs."""
    done = run([TIDAL_VLLM, "doctor", "--engine"])
    assert done.returncode == 0, done.stdout
    *findings, last = done.stdout.splitlines()
    assert last.startswith("Ready")
    expected = [["ok", name] for name in AT_ONCE]
    for name in probe.STAGES:
        expected += [["...", name], ["ok", name]]
    assert [line.split()[:2] for line in findings] == expected
    found = "\n".join(findings)
    if not extension.LIBRARY.exists():
        assert "no compiled kernels in this installation" in found
    assert re.search(r"cpu, \d+ threads on \d+ cores \(TidalCpuPlatform\)", found)
    assert "PyTorch reference ops (CPU)" in found
    assert "vLLM configures a tiny model, with Tidal" in found
    assert re.search(r"a planted answer is found, [1-9]\d* of its steps sparse", found)


def test_an_engine_starts_on_request_only():
    stages = [finding.name for finding in doctor.examine()]
    assert stages == [*AT_ONCE, *probe.STAGES][:-1]


@pytest.mark.parametrize(
    "given, steps, said",
    [([1, 2], 5, r"the answer is \[1, 2\], planted was"), ([1, 3], 0, "no step was")],
)
def test_an_engine_that_answers_wrongly_or_densely(given, steps, said):
    with pytest.raises(RuntimeError, match=said):
        probe.judge_answer(given, [1, 3], {"sparse_steps": steps})


def assert_ends_with(lines: list[str], name: str, found: str, fix: str) -> None:
    """The last finding failed; all before it are fine."""
    *fine, failed, mended, last = lines
    assert [line.split()[0] for line in fine] == ["ok"] * len(fine)
    assert failed.split()[:2] == ["FAIL", name]
    assert found in failed
    assert mended.split()[0] == "fix"
    assert fix in mended
    assert last.startswith("Not ready")


@pytest.mark.parametrize(
    "allowed, name, found",
    [
        ("other", "device", "vLLM found no device"),
        ("tidal_cpu", "plug-in", "Unknown attention backend: 'TIDAL'"),
    ],
    ids=["both", "the_backend"],
)
def test_vllm_plugins_leaves_out(allowed, name, found):
    status, lines = examine(VLLM_PLUGINS=allowed)
    assert status == 1
    assert_ends_with(lines, name, found, f"VLLM_PLUGINS = {allowed!r} leaves out our")


@pytest.mark.parametrize(
    "stage, allowed, mended",
    [
        ("device", "", "tidal,tidal_cpu"),
        ("plug-in", "other", "other,tidal,tidal_cpu"),
        ("plug-in", "tidal_cpu", "tidal_cpu,tidal"),
        ("device", "tidal", "tidal,tidal_cpu"),
    ],
)
def test_says_how_to_mend_vllm_plugins(monkeypatch, stage, allowed, mended):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    fix = doctor.FIXES[stage]("")
    assert fix.endswith(f"leaves out our plug-ins: unset it or set {mended}")


@pytest.mark.parametrize("allowed", [None, "tidal,tidal_cpu,other"])
def test_leaves_vllm_plugins_alone(monkeypatch, allowed):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    for fix in (doctor.FIXES["device"](""), doctor.FIXES["plug-in"]("")):
        assert "VLLM_PLUGINS" not in fix
        assert "install tidal_vllm" in fix


def test_vllm_outside_the_range(tmp_path):
    write_distribution(tmp_path, "vllm", "0.35.0")
    status, lines = examine(first_on_path=tmp_path)
    assert status == 1
    found = "vllm 0.35.0 is outside the supported range"
    assert_ends_with(lines, "vLLM", found, "pip install 'vllm>=0.32,<0.34'")


def broken_package(folder: Path, name: str, code: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return folder


def test_the_torchvision_trap(tmp_path):
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    broken_package(tmp_path, "torchvision", code)
    status, lines = examine(first_on_path=tmp_path)
    assert status == 1
    assert_ends_with(
        lines, "imports", "operator torchvision::nms", "pip uninstall torchvision ("
    )


def test_a_torch_that_this_vllm_was_not_built_for(monkeypatch):
    installed = {"torch": "2.11.0", "vllm": "0.32.0"}
    monkeypatch.setattr(doctor, "version", installed.__getitem__)
    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy", "torch==2.13.0"])
    assert "install 'torch==2.13.0', which vLLM 0.32.0 needs" in doctor._fix_torch()
    installed["torch"] = "2.13.0+cpu"
    assert "reinstall vLLM and its torch" in doctor._fix_torch()


BREAK_SCHEDULER = """
import sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "tidal_vllm.scheduler":
            raise ImportError("cannot import name 'gone' from 'vllm.utils'")

sys.meta_path.insert(0, Finder)
"""


def test_a_vllm_that_lacks_a_name(tmp_path):
    """vLLM would import the module in mid-start only."""
    (tmp_path / "sitecustomize.py").write_text(BREAK_SCHEDULER)
    status, lines = examine(first_on_path=tmp_path)
    assert status == 1
    found = "ImportError: cannot import name 'gone' from 'vllm.utils'"
    assert_ends_with(lines, "modules", found, "lacks what tidal_vllm")


def test_the_cause_of_a_failed_engine_is_its_own():
    log = [
        "(EngineCore pid=7) ERROR torch.OutOfMemoryError: CUDA out of memory",
        "EngineDeadError: EngineCore encountered an issue",
    ]
    front_end = "RuntimeError: Engine core initialization failed. See root cause above."
    wanted = "OutOfMemoryError: CUDA out of memory"
    assert doctor.root_cause(log, front_end) == wanted
    assert doctor.root_cause(log, "ValueError: no") == "ValueError: no"


def test_warns_where_something_could_be_better():
    finding = doctor.Finding("kernels", True, "Triton kernels", "build them")
    said, advice = str(finding).splitlines()
    assert said.split() == ["WARN", "kernels", "Triton", "kernels"]
    assert advice.split() == ["fix", "build", "them"]


@pytest.mark.parametrize(
    "code, found",
    [
        ("raise ImportError('libfoo.so: no such file')", "ImportError: libfoo.so"),
        ("import os; os.write(2, b'wild pointer'); os.abort()", "wild pointer"),
        ("raise SystemExit('I quit')", "I quit (exit status 1)"),
    ],
    ids=["raises", "crashes", "exits"],
)
def test_survives_an_import_that(tmp_path, code, found):
    broken_package(tmp_path, "transformers", code)
    status, lines = examine(first_on_path=tmp_path)
    assert status == 1
    assert_ends_with(lines, "imports", found, "reinstall vLLM")


def test_a_broken_profile_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tidal_profiles").mkdir()
    (tmp_path / "tidal_profiles" / "mine.json").write_text("{")
    finding = doctor._profiles()
    assert not finding.ok
    assert "tidal_profiles/mine.json" in finding.found
    assert finding.fix == "mend or remove that file"


def test_kernels_of_other_sources(tmp_path, monkeypatch):
    """Shown with what mends it, where the sources are at hand; without, only shown."""
    record = {"targets": ["sm_80", "sm_90a"], "ptx": "compute_80", "nvcc": "13.0.88"}
    record |= {"torch_abi": "2.11", "sources": "0123456789"}
    library = tmp_path / "_tidal_C.so"
    content = b"\x7fELF" + extension.MARK + json.dumps(record).encode() + b"\0more"
    library.write_bytes(content)
    monkeypatch.setattr(doctor, "LIBRARY", library)
    finding = doctor._extension()
    made = "sm_80, sm_90a and PTX of compute_80, by nvcc 13.0.88, for torch 2.11 or "
    assert finding.found.startswith(f"{library}: {made}later, sources 01234567; ")
    assert "was built from other sources (01234567) than" in finding.found
    assert finding.fix.startswith("TIDAL_BUILD_CUDA=1 ")
    assert extension.stale(library, root=tmp_path) == ""
    library.write_bytes(b"\x7fELF")
    assert doctor._extension().found.endswith("says nothing of what it was made of")


def test_every_source_counts(tmp_path):
    """A module is outdated by a change of any file that it is compiled from."""
    (tmp_path / "csrc").mkdir()
    seen = set()
    for name in ("CMakeLists.txt", "csrc/b.cu", "csrc/a.cuh"):
        for text in ("one", "two"):
            (tmp_path / name).write_text(text)
            seen.add(extension.digest_of_sources(tmp_path))
    assert len(seen) == 6 and None not in seen


def test_a_registration_that_does_not_survive_spawning(monkeypatch):
    """Undo the cure: vLLM's own pickling of the choice is by value."""
    import copyreg

    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from tidal_vllm import plugin

    plugin.register()
    monkeypatch.delitem(copyreg.dispatch_table, AttentionBackendEnum)
    with pytest.raises(RuntimeError, match="is not a valid AttentionBackendEnum"):
        probe._reach_spawned_processes()


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    class Device:
        device_type = "cuda"

    monkeypatch.setattr("vllm.platforms.current_platform", Device())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="a GPU that torch .* cannot use"):
        probe._find_device()


def test_names_the_gpu(monkeypatch):
    class Device:
        device_type = "cuda"
        get_device_name = staticmethod(lambda: "NVIDIA H200")
        get_device_total_memory = staticmethod(lambda: 141 << 30)

    monkeypatch.setattr("vllm.platforms.current_platform", Device())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert probe._find_device().found == "cuda, NVIDIA H200, 141 GiB (Device)"


def test_a_process_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    (finding,) = doctor._probe_findings(["imports"], lambda name: None)
    assert not finding.ok
    assert finding.found.startswith("no answer within 0.2 s (exit status ")


def test_ignores_packages_in_the_current_folder(tmp_path, monkeypatch):
    broken_package(tmp_path, "torch", "raise ImportError('not the real one')")
    monkeypatch.chdir(tmp_path)
    assert child_process.run_python("import torch").returncode == 0


def test_the_examiner_itself_imports_nothing_that_may_break():
    code = "import sys; import tidal_vllm.doctor; print(*sys.modules)"
    loaded = run_python(code).stdout.split()
    assert not {"torch", "vllm", "transformers"} & set(loaded)
