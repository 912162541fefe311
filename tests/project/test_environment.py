"""How an environment is set up: what is installed by whom, and how it is resumed.

Packages are a few bytes, made here; nothing is fetched.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from environment import installer, steps
from environment.installer import Installer
from environment.progress import Step, StepFailed
from environment.torn import remove_torn_packages
from tidal_vllm import versions

ROOT = Path(__file__).parents[2]


def write_wheel(folder: Path, name: str, version: str, requires: tuple = ()) -> Path:
    """A package of one module."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
    files = {
        f"{name.replace('-', '_')}.py": "",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": wheel + "Tag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    folder.mkdir(exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A vLLM with all kinds of requirements, as wheels."""
    folder = tmp_path_factory.mktemp("wheels")
    requires = {
        "torch": ("numpy", "cuda-toolkit[cublas,cusolver]==13", "triton"),
        "cuda-toolkit": (
            "nvidia-cublas; extra == 'cublas'",
            "nvidia-cusolver; extra == 'cusolver'",
            "nvidia-cufft; extra == 'cufft'",
        ),
        "vllm": (
            *("torch==2", "xgrammar>=1", "torchvision==3", "pydantic>=1"),
            *("flashinfer-python==5", "humming_kernels[cu13]==5"),
            *("pandas; extra == 'bench'", "winloop; sys_platform == 'win32'"),
        ),
        "xgrammar": ("torch", "triton; platform_system == 'Linux'", "pydantic"),
        "pydantic": ("typing-inspection",),
        "triton": (),
        "numpy": (),
        "typing-inspection": (),
        "nvidia-cublas": (),
    }
    versions = {"torch": "2", "cuda-toolkit": "13"}
    for name, lines in requires.items():
        write_wheel(folder, name, versions.get(name, "1"), lines)
    return folder


@pytest.fixture
def plain_pip(monkeypatch):
    """Nobody told pip anything."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def environment(tmp_path, wheels, plain_pip, monkeypatch):
    """A real one without its first steps, whose pip is the one of these tests."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for name in ("pip", "packaging"):
        source = Path(__import__(name).__file__).parent
        (packages / name).symlink_to(source)
    monkeypatch.setattr(steps, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(installer.shutil, "which", lambda name: None)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    made = steps.Environment(
        str(ROOT), str(folder), vllm="1", torch="2", wheels=str(wheels), tests=False
    )
    made.packages = packages
    return made


def installed(environment) -> set[str]:
    found = environment.packages.glob("*.dist-info")
    return {path.name.partition("-")[0].replace("_", "-") for path in found}


def parts_of(environment, *words: str) -> list[steps.Part]:
    parts = [
        part for word in words for part in environment._parts() if word in part.title
    ]
    assert len(parts) == len(words)
    return parts


INSTALLING = ("torch==", "vllm==", "without a GPU")


def test_leaves_out_what_only_a_gpu_uses(environment, wheels):
    write_wheel(wheels, "torchvision", "3", ("torch==2",))
    environment.full = False
    environment._do(parts_of(environment, *INSTALLING))
    assert installed(environment) == {
        *("torch", "vllm", "xgrammar", "cuda-toolkit", "numpy", "pydantic", "triton"),
        *("typing-inspection", "nvidia-cublas", "torchvision"),
    }


def test_goes_on_where_it_was_interrupted(environment, tmp_path, capsys):
    """A step that is done is not done again; one that is torn is, as a whole."""
    began = []

    def part(number: int, act=lambda step: None, decided_by=()):
        def run(step):
            began.append(number)
            act(step)

        return steps.Part(f"part {number}", (str(number), *decided_by), run)

    def tear(step):
        torn = environment.packages / "half-1.dist-info"
        torn.mkdir()
        (torn / "METADATA").write_text("Name: half\nVersion: 1\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment._do([part(1), part(2, tear), part(3)])
    environment.record = environment._read_record()
    environment._do([part(1), part(2), part(3)])
    assert began == [1, 2, 2, 3]
    assert "half" not in installed(environment)
    assert "half installed before: half" in capsys.readouterr().out
    # What decides a step's outcome has changed: it is done again, and what follows.
    environment._do([part(1), part(2, decided_by=("changed",)), part(3)])
    assert began == [1, 2, 2, 3, 2, 3]


@pytest.mark.parametrize(
    "damage", ["gone", "short", "no record", "cut", "empty", "unfinished", "none"]
)
def test_finds_torn_packages(tmp_path, damage):
    packages = tmp_path / "lib/python3.11/site-packages"
    metadata = packages / "one-1.dist-info"
    metadata.mkdir(parents=True)
    (packages / "one.py").write_text("1 + 1")
    (packages / "~umpy").mkdir()
    record = "one.py,sha256=x,5\none.pyc,,\none-1.dist-info/RECORD,,\n"
    (metadata / "RECORD").write_text(record)
    (metadata / "INSTALLER").write_text("pip")
    if damage == "gone":
        (packages / "one.py").unlink()
    elif damage == "short":
        (packages / "one.py").write_text("1 +")
    elif damage == "no record":
        (metadata / "RECORD").unlink()
    elif damage in ("cut", "empty"):
        (metadata / "RECORD").write_text(record[:30] if damage == "cut" else "")
    elif damage == "unfinished":
        (metadata / "INSTALLER").unlink()
    torn = damage != "none"
    assert remove_torn_packages(tmp_path) == (["one"] if torn else [])
    assert metadata.exists() is not torn
    assert not (packages / "~umpy").exists()


def test_an_environment_of_another_place_is_made_anew(environment, monkeypatch):
    done = []
    monkeypatch.setattr(environment, "_clear", lambda: done.append("cleared"))
    part = steps.Part("part", ("here",), lambda step: done.append("part"))
    environment.record = {"done": ["of another Python"]}
    environment._do([part])
    assert done == ["cleared", "part"]
    assert json.loads(environment._record_file.read_text())["done"]


def test_a_gpu_or_a_wish_installs_everything(environment, monkeypatch):
    def titles(**kwargs):
        made = steps.Environment(
            str(ROOT), str(environment.folder), vllm="1", torch="2", **kwargs
        )
        return [part.title for part in made._parts()]

    left_out = "Installing what vLLM requires without a GPU"
    assert left_out in titles()
    assert left_out not in titles(full=True)
    monkeypatch.setattr(steps, "has_nvidia_gpu", lambda: True)
    assert left_out not in titles()
    monkeypatch.setattr(steps, "has_nvidia_gpu", lambda: False)
    environment.full = True
    environment._write_record([], complete=False)
    assert left_out not in titles(), "what was once installed stays"


def test_what_requires_torch_brings_none(environment):
    """Where torch has not all of its requirements, the installer would fetch them."""
    commands = []
    step = SimpleNamespace(run=lambda command: commands.append(command) or "")
    environment._install_readers(step)
    environment._install_test_tools(step)
    for name, count in (("xformers", 1), ("accelerate", 2)):
        named = [c for c in commands if any(word.startswith(name) for word in c)]
        assert len(named) == count
        assert all("--no-deps" in command for command in named)


def test_what_reads_models_is_installed_on_request_and_stays(environment):
    def titles(**kwargs):
        made = steps.Environment(
            str(ROOT), str(environment.folder), vllm="1", torch="2", **kwargs
        )
        made._write_record([], complete=False)
        return [part.title for part in made._parts()]

    readers = "Installing what reads models"
    assert readers not in titles(tests=False)
    assert readers in titles(tests=False, models=True)
    assert titles()[-2:] == [readers, "Installing what tests need"]
    assert titles(evaluate=True)[-1] == titles()[-1] == "Installing lm_eval"
    assert titles(tests=False)[-1] == readers, "a demo needs no lm_eval"


def test_the_package_knows_the_same_companions_of_torch():
    assert steps.BUILT_FOR_TORCH == versions.BUILT_FOR_TORCH


def test_keeps_what_can_be_imported(environment, wheels):
    for name in steps.BUILT_FOR_TORCH:
        write_wheel(wheels, name, "3")
    with environment._step("Installing") as step:
        step.run(environment._installer.install(*steps.BUILT_FOR_TORCH))
    (environment.packages / "torchaudio.py").write_text("raise OSError('no symbol')")
    (looking,) = parts_of(environment, "Looking at")
    with environment._step("Looking") as step:
        looking.act(step)
    assert {"torchvision", "torchcodec"} <= installed(environment)
    assert "torchaudio" not in installed(environment)


@pytest.mark.parametrize(
    "settings, uv, by",
    [
        ([], "/bin/uv", "uv"),
        (["find-links"], "/bin/uv", "pip"),
        ([], None, "pip"),
    ],
)
def test_who_installs(monkeypatch, settings, uv, by):
    monkeypatch.setattr(installer.shutil, "which", lambda name: uv)
    monkeypatch.setattr(installer, "pip_settings", lambda python: settings)
    chosen = Installer.choose("python")
    command = chosen.install("torch==2", bare=True)
    if by == "uv":
        assert command[:5] == ["/bin/uv", "pip", "install", "--python", "python"]
    else:
        assert command[:4] == ["python", "-m", "pip", "--no-input"]
        assert ("find-links" in chosen.why) is bool(settings)
    assert command[-3:] == ["--no-deps", "--no-build-isolation", "torch==2"]


def test_a_folder_of_wheels_is_all_that_is_looked_at(monkeypatch):
    """So uv may install from it, whatever pip is told."""
    monkeypatch.setattr(installer.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(installer, "pip_settings", lambda python: ["index-url"])
    for chosen in (Installer.choose("p", "/w"), Installer("p", None, "", "/w")):
        words = chosen.install("torch")
        assert words[-4:] == ["--no-index", "--find-links", "/w", "torch"]


def test_settings_of_pip_that_uv_would_ignore(tmp_path, plain_pip, monkeypatch):
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "5")
    assert installer.pip_settings(sys.executable) == []
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nconstraint = c.txt\n[install]\nfind-links = /w\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost/simple")
    found = set(installer.pip_settings(sys.executable))
    assert {"constraint", "find-links", "index-url"} <= found
    assert "default-timeout" not in found


SCROLL = "[print('line', n) for n in range(40)]; print('Progress 5000000 of 9000000')"


@pytest.mark.parametrize("live", [False, True])
def test_one_line_per_step_and_all_else_in_the_log(tmp_path, capsys, live):
    log = tmp_path / "log"
    with Step("[1/1] Doing", log, live=live) as step:
        step.run([sys.executable, "-c", SCROLL])
        step.say("a note")
    shown = capsys.readouterr().out
    assert "line 39\n" in log.read_text()
    assert "\nProgress" not in log.read_text()
    if live:
        assert shown.count("\n") == 1
        *drawn, last = shown.split("\r\033[K")
        assert last.startswith("[1/1] Doing: done in ")
        assert all(line.startswith("[1/1] Doing: ") for line in drawn if line)
    else:
        assert shown.startswith("[1/1] Doing\n    done in ")
        assert "line" not in shown
    assert shown.endswith(" s; a note\n")


def test_a_failing_step_shows_the_end_of_its_log(tmp_path, capsys):
    log = tmp_path / "setup.log"
    with (
        pytest.raises(StepFailed) as failed,
        Step("[1/1] Failing", log, live=False) as step,
    ):
        step.run([sys.executable, "-c", f"{SCROLL}; exit(3)"])
    message = str(failed.value)
    assert message.startswith("[1/1] Failing: exit status 3. The last lines of ")
    assert "setup.log" in message
    assert message.endswith("line 39")
    assert "line 10" not in message
    assert "stopped in" in capsys.readouterr().out
