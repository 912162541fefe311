"""Which kernels are chosen, what is refused and why, and what is advised."""

from types import ModuleType

import pytest
import torch

from tidal_vllm.kernels import Requirements, choose, choosing, describe, reference
from tidal_vllm.validators import TidalConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MODEL = {"head_size": 128, "dtype": torch.bfloat16}


def stub(reason: str = "") -> ModuleType:
    """A module of kernels that do not cover `reason`."""
    module = ModuleType("kernels")
    module.uncovered = lambda needed: reason
    module.cannot_run = lambda needed: reason
    return module


@pytest.fixture
def built(monkeypatch):
    """Pretend which modules of kernels can be imported, and an NVIDIA GPU."""

    def pretend(cuda: ModuleType | str, triton: ModuleType | str) -> None:
        found = {
            "tidal_vllm.kernels.cuda": cuda,
            "tidal_vllm.kernels.triton.ops": triton,
        }

        def load(name: str) -> tuple[ModuleType | None, str]:
            module = found[name]
            return (None, module) if isinstance(module, str) else (module, "")

        monkeypatch.setattr(choosing, "_load", load)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    return pretend


class TestAuto:
    def test_the_reference_on_a_cpu(self):
        kernels = choose(CPU, **MODEL)
        assert kernels.name == "reference"
        assert kernels.reason == "PyTorch reference ops (CPU)"
        assert kernels.ops is reference
        assert not kernels.capturable

    def test_cuda_where_it_is_built(self, built):
        cuda = stub()
        built(cuda=cuda, triton=stub())
        kernels = choose(GPU, **MODEL)
        assert (kernels.name, kernels.reason) == ("cuda", "CUDA extension")
        assert kernels.ops is cuda
        assert kernels.capturable

    def test_triton_where_it_is_not_and_says_so(self, built):
        built(cuda="No module named 'x'", triton=stub())
        kernels = choose(GPU, **MODEL)
        assert kernels.name == "triton"
        assert kernels.reason == (
            "Triton kernels on cuda (the CUDA extension is not built: "
            "No module named 'x')"
        )

    def test_triton_where_cuda_does_not_cover_the_model(self, built):
        built(cuda=stub(), triton=stub())
        kernels = choose(GPU, head_size=80, dtype=torch.bfloat16)
        assert kernels.name == "triton"
        assert "the CUDA extension does not cover head_size = 80" in kernels.reason

    def test_triton_where_the_driver_refuses_cuda(self, built):
        built(cuda=stub("cudaGetDevice: the driver is too old"), triton=stub())
        kernels = choose(GPU, **MODEL)
        assert kernels.name == "triton"
        assert "does not run here: cudaGetDevice: the driver is" in kernels.reason

    def test_the_reference_where_none_covers_it_with_every_reason(self, built):
        built(cuda=stub(), triton=stub("compute capability 7.5"))
        kernels = choose(GPU, head_size=128, dtype=torch.float32)
        assert kernels.name == "reference"
        for words in ("not fast", "torch.float32", "compute capability 7.5"):
            assert words in kernels.reason

    def test_nothing_for_a_cache_that_no_implementation_reads(self, built):
        built(cuda="gone", triton=stub("kv_cache_dtype = nvfp4"))
        with pytest.raises(TidalConfigError) as caught:
            choose(GPU, **MODEL, kv_cache_dtype="nvfp4")
        message = str(caught.value)
        assert message.startswith("tidal.kernels = 'auto': no implementation covers")
        for words in ("not built: gone", "cover kv_cache_dtype = nvfp4", "reference"):
            assert words in message

    def test_kernels_are_asked_about_what_is_needed(self, built):
        asked = []
        module = stub()
        module.uncovered = lambda needed: asked.append(needed) or ""
        built(cuda="gone", triton=module)
        choose(GPU, **MODEL, kv_cache_dtype="fp8", select_block_size=32)
        assert asked == [Requirements(GPU, 128, torch.bfloat16, "fp8", 32)]
        assert (asked[0].fp8, asked[0].cache_dtype) == (True, None)


def refused(requested: str, device: torch.device = CPU, **needed) -> str:
    with pytest.raises(TidalConfigError) as caught:
        choose(device, requested=requested, **{**MODEL, **needed})
    message = str(caught.value)
    assert message.startswith(f"tidal.kernels = {requested!r}: ")
    return message


class TestRefused:
    def test_cuda_on_a_cpu(self):
        message = refused("cuda")
        assert "the CUDA extension needs an NVIDIA GPU, not cpu" in message
        assert "allowed here: 'auto', 'reference'" in message

    def test_cuda_that_is_not_built(self, built):
        built(cuda="libcudart.so.13: cannot open", triton=stub())
        message = refused("cuda", GPU)
        assert "not built: libcudart.so.13: cannot open" in message
        assert "allowed here: 'auto', 'triton', 'reference'" in message

    def test_cuda_on_an_amd_gpu(self, built, monkeypatch):
        built(cuda=stub(), triton=stub())
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "needs an NVIDIA GPU" in refused("cuda", GPU)
        assert choose(GPU, **MODEL).name == "triton"

    def test_triton_that_cannot_be_imported(self, built):
        built(cuda="gone", triton="No module named 'triton'")
        message = refused("triton", GPU)
        assert "Triton cannot be imported: No module named 'triton'" in message

    def test_the_reference_with_a_quantised_cache(self):
        message = refused("reference", kv_cache_dtype="fp8")
        assert "do not read kv_cache_dtype = fp8; allowed here: 'none'" in message

    @pytest.mark.parametrize("given", ["cud", "CUDA", "", None, 3])
    def test_what_is_no_name(self, given):
        assert "must be one of 'auto', 'cuda', 'triton', 'reference'" in refused(given)


def test_describes_what_the_doctor_asks():
    assert describe("cpu").reason == "PyTorch reference ops (CPU)"


def test_a_module_that_breaks_on_import_counts_as_not_built(tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text("raise OSError('no libfoo.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choosing._load("broken_kernels") == (None, "no libfoo.so")


class TestAdvice:
    """How to build the CUDA extension, where that would help."""

    def advice(self, device=GPU, **needed) -> str:
        return choose(device, **{**MODEL, **needed}).advice

    def test_a_gpu_that_it_covers(self, built):
        built(cuda="no library", triton=stub())
        advice = self.advice()
        assert "not the CUDA kernels for it: no library" in advice
        assert "TIDAL_BUILD_CUDA=1" in advice

    def test_also_where_nothing_but_the_reference_runs(self, built):
        built(cuda="no library", triton="gone")
        assert choose(GPU, **MODEL).name == "reference"
        assert "TIDAL_BUILD_CUDA=1" in self.advice()

    def test_not_where_it_is_built(self, built):
        built(cuda=stub(), triton=stub())
        assert not self.advice()
        assert not self.advice(head_size=80)

    @pytest.mark.parametrize("requested", ["auto", "cuda"])
    def test_where_it_is_outdated(self, built, monkeypatch, requested):
        built(cuda=stub(), triton=stub())
        monkeypatch.setattr(
            choosing, "stale", lambda: "_tidal_C.so is of other sources"
        )
        advice = self.advice(requested=requested)
        assert advice.startswith("_tidal_C.so is of other sources. This builds it: ")
        assert not self.advice(requested="triton")

    @pytest.mark.parametrize(
        "needed",
        [{"head_size": 80}, {"dtype": torch.float32}, {"select_block_size": 3}],
        ids=str,
    )
    def test_not_for_a_model_that_it_would_not_cover(self, built, needed):
        built(cuda="no library", triton=stub())
        assert not self.advice(**needed)

    def test_not_for_an_older_gpu(self, built, monkeypatch):
        built(cuda="no library", triton=stub())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not self.advice()

    def test_not_without_an_nvidia_gpu(self, built, monkeypatch):
        built(cuda="no library", triton=stub())
        assert not self.advice(CPU)
        monkeypatch.setattr(torch.version, "cuda", None)
        assert not self.advice()
