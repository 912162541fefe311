"""The sdist, and the wheel with the kernels inside, installed without its sources."""

import subprocess
import sys
import sysconfig
import tarfile
from zipfile import ZipFile

import pytest
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from tests.kernels.cuda import release
from tests.kernels.cuda.emulator import CSRC, ROOT
from tests.kernels.cuda.test_build import TARGETS, needs_nvcc
from tests.support.processes import run

sys.path.append(str(ROOT / "build_backend"))

from wheel_tag import oldest_glibc  # noqa: E402

pytestmark = [pytest.mark.extended, pytest.mark.serial]


def test_the_sdist_holds_what_the_kernels_are_built_from(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{source.name}" for source in CSRC.iterdir()}
    assert sources | {"CMakeLists.txt", "build_backend/backend.py"} <= names


@needs_nvcc
def test_one_wheel_serves_every_python(made):
    *_, tags = parse_wheel_filename(made.wheel.name)
    (tag,) = tags
    assert (tag.interpreter, tag.abi) == ("py3", "none")
    assert tag.platform.startswith("manylinux_2_")
    assert tag in set(sys_tags()), "cannot be installed where it was built"


def test_a_wheel_without_kernels_serves_every_machine(tmp_path):
    """Also where an earlier build left a module among the sources."""
    sources = release.copy_sources(tmp_path / "sources")
    (sources / release.MODULE).write_bytes(b"of an earlier build")
    wheel, _ = release.build_wheel(sources, tmp_path / "out", TIDAL_BUILD_CUDA="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert release.MODULE not in ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def installed(made, tmp_path_factory):
    """The folder of programs of a fresh environment, which this one's packages serve.

    Their .pth files are not read there, so an editable tidal_vllm is not among them.
    """
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "theirs.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python")]
    install = [*pip, "install", "--no-deps", "--no-index", str(made.wheel)]
    subprocess.run(install, check=True)
    return folder / "bin"


@needs_nvcc
def test_installed_it_registers_and_the_doctor_shows_the_kernels(installed, tmp_path):
    done = run([installed / "tidal-vllm", "doctor"], PYTHONPATH="")
    lines = [x for x in done.stdout.splitlines() if not x.startswith("...")]
    said = {line.split()[1]: line for line in lines[:-1]}
    assert done.returncode == 0, done.stdout
    assert said["plug-in"].startswith("ok")
    assert said["CUDA"].startswith("ok")
    (module,) = installed.parent.glob(f"lib/python*/site-packages/{release.MODULE}")
    targets = f"{', '.join(TARGETS)} and PTX of compute_80"
    assert f"{module}: {targets}, by nvcc " in said["CUDA"]


@pytest.mark.parametrize(
    "symbols, wanted",
    [
        ("(GLIBC_2.2.5)", 17),
        ("(GLIBC_2.3.4) (GLIBC_2.28)", 28),
        ("(GLIBC_2.28) (GLIBCXX_3.4.29)", 34),
        ("(GLIBC_2.34) (GLIBCXX_3.4.25)", 34),
        ("(GLIBC_2.28) (GLIBCXX_3.4.23)", 28),
        ("(CXXABI_1.3) (CXXABI_1.3.15) (CXXABI_1.3.9)", 39),
    ],
)
def test_the_oldest_system_follows_from_the_symbols(symbols, wanted):
    assert oldest_glibc(symbols) == wanted


def test_a_libstdcxx_that_the_table_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"uses GLIBCXX_3\.4\.99; allowed: up to"):
        oldest_glibc("(GLIBCXX_3.4.99)")
