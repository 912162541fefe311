"""What the backend says of a GPU: which dense backend, what is supported, what not."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.engines import builders
from tests.support.models import ROLES
from tests.support.replay import common_metadata
from tidal_vllm.config import TidalConfig
from tidal_vllm.engine import backend, dense, state, support
from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.engine.prefills import requests_from
from tidal_vllm.engine.torch_dense import ReferenceBackend
from tidal_vllm.kernels import choose
from tidal_vllm.validators import TidalConfigError


def pretend(monkeypatch, device_type, capability=None, has_flash=True):
    """Let the package see a GPU where it decides; vLLM's own code still sees a CPU."""
    platform = SimpleNamespace(
        device_type=device_type,
        is_cuda=lambda: device_type == "cuda" and capability is not None,
        get_device_capability=lambda: capability,
    )
    monkeypatch.setattr(dense, "current_platform", platform)
    monkeypatch.setattr(backend, "current_platform", platform)
    monkeypatch.setattr(support, "current_platform", platform)
    monkeypatch.setattr(dense, "_has_flash", lambda head_size: has_flash)


class TestDenseBackend:
    ASKED = AttentionSelectorConfig(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
    )
    HOPPER = DeviceCapability(9, 0)

    @pytest.mark.parametrize(
        ("capability", "has_flash", "wanted"),
        [
            (HOPPER, True, "FLASH_ATTN"),
            (DeviceCapability(8, 0), True, "FLASH_ATTN"),
            (HOPPER, False, "TRITON_ATTN"),
            (DeviceCapability(7, 5), True, "TRITON_ATTN"),
            (None, True, "TRITON_ATTN"),  # not NVIDIA's
        ],
    )
    def test_on_a_gpu(self, monkeypatch, capability, has_flash, wanted):
        pretend(monkeypatch, "cuda", capability, has_flash)
        assert dense.choose_dense_backend(self.ASKED, None).get_name() == wanted

    def test_on_a_cpu(self):
        kernels = choose("cpu", head_size=128, dtype=torch.bfloat16)
        assert dense.choose_dense_backend(self.ASKED, None) is ReferenceBackend
        assert dense.choose_dense_backend(self.ASKED, kernels) is ReferenceBackend
        interpreted = dataclasses.replace(kernels, name="triton")
        found = dense.choose_dense_backend(self.ASKED, interpreted)
        assert found.get_name() == "TRITON_ATTN"

    def test_says_why_none_will_do(self, monkeypatch):
        pretend(monkeypatch, "cuda", self.HOPPER)
        with pytest.raises(ValueError) as refusal:
            dense.choose_dense_backend(self.ASKED._replace(head_size=20), None)
        assert str(refusal.value) == (
            "no dense attention backend covers this set-up: FLASH_ATTN: head_size not "
            "supported; TRITON_ATTN: head_size not supported"
        )


class TestFp8Caches:
    """Whether a method can do with one, on a GPU."""

    def kernels(self, monkeypatch, method):
        gpu = SimpleNamespace(device_type="cuda")
        monkeypatch.setattr(state, "current_platform", gpu)
        monkeypatch.setattr(state, "choose", lambda device, **needed: needed)
        given = (128, torch.bfloat16, "fp8")
        return state._kernels_of(TidalConfig(method=method), *given)

    def test_the_kernels_read_it(self, monkeypatch):
        found = self.kernels(monkeypatch, "lessismore")
        assert (found["requested"], found["kv_cache_dtype"]) == ("auto", "fp8")

    def test_refused_where_the_method_reads_keys(self, monkeypatch):
        with pytest.raises(TidalConfigError) as caught:
            self.kernels(monkeypatch, "quest")
        assert (caught.value.key, caught.value.value) == ("tidal.method", "quest")
        assert "kv_cache_dtype = fp8" in caught.value.allowed


class TestSupport:
    """What a layer may ask for on a GPU; on a CPU: test_vllm_assumptions.py."""

    def reasons(self, **asked):
        asked = TestDenseBackend.ASKED._replace(**asked)._asdict()
        return TidalBackend.validate_configuration(
            device_capability=TestDenseBackend.HOPPER, **asked
        )

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch):
        pretend(monkeypatch, "cuda", TestDenseBackend.HOPPER)

    @pytest.mark.parametrize(
        "asked",
        [
            {},
            {"dtype": torch.float16},
            {"block_size": 32},
            {"head_size": 64},
            {"kv_cache_dtype": "fp8"},
            {"kv_cache_dtype": "bfloat16"},
        ],
    )
    def test_accepted(self, asked):
        assert self.reasons(**asked) == []

    @pytest.mark.parametrize(
        ("asked", "reason"),
        [
            (
                {"dtype": torch.float32},
                "dtype = torch.float32: allowed [torch.bfloat16, torch.float16]",
            ),
            (
                {"kv_cache_dtype": "fp8_e5m2"},
                "kv_cache_dtype = fp8_e5m2: allowed "
                "['auto', 'float16', 'bfloat16', 'fp8', 'fp8_e4m3']",
            ),
            ({"block_size": 8}, "block_size = 8: allowed are multiples of 16"),
        ],
        ids=["dtype", "kv_cache_dtype", "block_size"],
    )
    def test_refused(self, asked, reason):
        assert self.reasons(**asked) == [reason]

    def test_the_dense_backend_has_a_say(self, monkeypatch):
        def nobody(asked, kernels, capability):
            assert (asked.head_size, capability) == (64, TestDenseBackend.HOPPER)
            raise ValueError("nobody can")

        monkeypatch.setattr(backend, "choose_dense_backend", nobody)
        assert self.reasons(head_size=64) == ["nobody can"]

    def test_layouts_differ_by_device(self, monkeypatch):
        on_gpu = TidalBackend.supported_kv_cache_layouts()
        monkeypatch.undo()
        on_cpu = TidalBackend.supported_kv_cache_layouts()
        assert (on_gpu[0].name, on_cpu[0].name) == ("LBNHC", "LBHNC")
        assert {*on_gpu} == {*on_cpu} == {*KVCacheLayout}
        assert len(on_gpu) == len(on_cpu) == len(KVCacheLayout)


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_vllms_builders_take_our_batches(engine, random_llama, name):
    """What needs no GPU of them: impl and builder are made, and describe a batch."""
    llm = engine(random_llama, tidal=ROLES)
    (ours,) = builders(llm)
    backend_cls = AttentionBackendEnum[name].get_class()
    impl = backend_cls.get_impl_cls()(
        *(6, 32, 0.1, 2, None, None, "auto", None, "decoder", None)
    )
    assert impl.num_queries_per_kv == 3
    made = (ours.kv_cache_spec, ours.layer_names, ours.vllm_config, ours.device)
    builder = backend_cls.get_builder_cls()(*made)
    whole = common_metadata([1, 1, 5, 3], [100, 200, 5, 33])
    for first, batch in ((0, whole), (2, requests_from(whole, 2))):
        found = builder.build(0, batch, False)
        assert found.num_actual_tokens == 10 - first
        assert (
            found.query_start_loc.tolist() == ([0, 1, 2, 7, 10], [0, 5, 8])[first > 0]
        )
        assert torch.equal(found.seq_lens, whole.seq_lens[first:])
        assert torch.equal(found.block_table, whole.block_table_tensor[first:])
        assert torch.equal(found.slot_mapping, whole.slot_mapping[first:])
