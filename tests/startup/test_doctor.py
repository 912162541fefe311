"""`tidal-vllm doctor`: what it finds here, and what it says where all is not well."""

import re
from pathlib import Path

import pytest
import torch

from tidal_vllm import doctor

from .fresh import TIDAL_VLLM, run, run_python, write_distribution

CHECKS = ["package", "vLLM", "torch", *doctor.STAGES, "profiles"]


def examine(**kwargs) -> tuple[int, list[str]]:
    done = run([TIDAL_VLLM, "doctor"], **kwargs)
    assert "Traceback" not in done.stdout
    return done.returncode, done.stdout.splitlines()


def test_all_is_well_here():
    status, lines = examine()
    assert status == 0
    *findings, last = lines
    assert last.startswith("Ready")
    assert [line.split()[:2] for line in findings] == [["ok", name] for name in CHECKS]
    assert re.search(r"cpu, \d+ threads on \d+ cores \(TidalCpuPlatform\)", lines[4])
    assert "PyTorch reference ops (CPU)" in lines[7]


def assert_ends_with(lines: list[str], name: str, found: str, fix: str) -> None:
    """The last finding failed; all before it are fine."""
    *fine, failed, mended, last = lines
    assert [line[:4] for line in fine] == ["ok  "] * len(fine)
    assert failed.startswith(f"FAIL  {name}")
    assert found in failed
    assert re.match(r" +fix  ", mended)
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
    "allowed, mended",
    [
        ("", "tidal,tidal_cpu"),
        ("other", "other,tidal,tidal_cpu"),
        ("tidal_cpu", "tidal_cpu,tidal"),
        ("tidal", "tidal,tidal_cpu"),
    ],
)
def test_says_how_to_mend_vllm_plugins(monkeypatch, allowed, mended):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    for fix in (doctor.FIXES["device"](), doctor.FIXES["plug-in"]()):
        assert fix.endswith(f"leaves out our plug-ins: unset it or set {mended}")


@pytest.mark.parametrize("allowed", [None, "tidal,tidal_cpu,other"])
def test_leaves_vllm_plugins_alone(monkeypatch, allowed):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    for fix in (doctor.FIXES["device"](), doctor.FIXES["plug-in"]()):
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
    fix = "pip uninstall torchvision torchaudio torchcodec"
    if "+cpu" not in torch.__version__:
        fix = "reinstall vLLM and its torch"
    assert_ends_with(lines, "imports", "operator torchvision::nms", fix)


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


def test_a_registration_that_does_not_survive_spawning(monkeypatch):
    """Undo the cure: vLLM's own pickling of the choice is by value."""
    import copyreg

    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from tidal_vllm import plugin

    plugin.register()
    monkeypatch.delitem(copyreg.dispatch_table, AttentionBackendEnum)
    with pytest.raises(RuntimeError, match="is not a valid AttentionBackendEnum"):
        doctor._reach_spawned_processes()


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    class Device:
        device_type = "cuda"

    monkeypatch.setattr("vllm.platforms.current_platform", Device())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="a GPU that torch .* cannot use"):
        doctor._find_device()


def test_names_the_gpu(monkeypatch):
    class Device:
        device_type = "cuda"
        get_device_name = staticmethod(lambda: "NVIDIA H200")
        get_device_total_memory = staticmethod(lambda: 141 << 30)

    monkeypatch.setattr("vllm.platforms.current_platform", Device())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._find_device() == "cuda, NVIDIA H200, 141 GiB (Device)"


def test_a_process_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    done = doctor.run_python("import time; time.sleep(60)")
    assert doctor.last_words(done) == "no answer within 0.2 s (exit status 1)"


def test_ignores_packages_in_the_current_folder(tmp_path, monkeypatch):
    broken_package(tmp_path, "torch", "raise ImportError('not the real one')")
    monkeypatch.chdir(tmp_path)
    assert doctor.run_python("import torch").returncode == 0


def test_the_examiner_itself_imports_nothing_that_may_break():
    code = "import sys; import tidal_vllm.doctor; print(*sys.modules)"
    loaded = run_python(code).stdout.split()
    assert not {"torch", "vllm", "transformers"} & set(loaded)
