"""What the package takes for granted inside vLLM; each breaks here first, and loudly.

A failure means: read the named place of the package again before raising the
supported range of vLLM.
"""

import dataclasses
import enum
import inspect
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops
from vllm.compilation import backends
from vllm.config import (
    AttentionConfig,
    CompilationConfig,
    CUDAGraphMode,
    replace,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import builtin_platform_plugins
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2ModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import (
    StandaloneARSpeculator,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.support.engines import runner
from tests.support.models import NUM_LAYERS, ROLES
from tests.support.signatures import parameters
from tidal_vllm.engine import backend as backend_module
from tidal_vllm.engine import setup_checks
from tidal_vllm.engine.attention import TidalImpl
from tidal_vllm.engine.backend import TidalBackend
from tidal_vllm.engine.metadata import TidalMetadataBuilder
from tidal_vllm.names import NAME
from tidal_vllm.plugin import register
from tidal_vllm.versions import unsupported_vllm

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def llm(engine, random_llama):
    return engine(random_llama, tidal=ROLES)


def test_this_vllm_is_supported():
    assert unsupported_vllm() is None, version("vllm")


class TestRegistry:
    """plugin.py"""

    def test_a_member_can_be_registered_once(self):
        register()
        assert AttentionBackendEnum[NAME].name == NAME
        with pytest.raises(ValueError):
            AttentionBackendEnum.register(NAME, "somewhere.Else")
        with pytest.raises(ValueError, match="Unknown attention backend"):
            AttentionBackendEnum["NOBODY"]

    def test_members_would_pickle_by_value(self):
        assert enum.Enum.__reduce_ex__(AttentionBackendEnum.FLASH_ATTN, 2) == (
            AttentionBackendEnum,
            (AttentionBackendEnum.FLASH_ATTN.value,),
        )

    def test_the_choice_of_a_backend_stands_in_the_attention_config(self):
        fields = {field.name for field in dataclasses.fields(AttentionConfig)}
        assert {"backend", "backend_per_kind"} <= fields

    def test_builtin_platforms_are_detectors(self):
        assert {"cuda", "rocm", "xpu", "cpu"} <= builtin_platform_plugins.keys()
        assert all(callable(d) for d in builtin_platform_plugins.values())


class TestBackend:
    """engine/backend.py"""

    FINE = AttentionSelectorConfig(
        head_size=64, dtype=torch.float32, kv_cache_dtype="auto", block_size=16
    )
    REFUSED = {
        "head_size": 48,
        "dtype": torch.float64,
        "kv_cache_dtype": "fp8",
        "use_mla": True,
        "has_sink": True,
        "use_sparse": True,
        "use_mm_prefix": True,
        "use_per_head_quant_scales": True,
        "attn_type": "encoder_only",
        "use_non_causal": True,
        "use_batch_invariant": True,
        "use_pcp": True,
        "use_dcp": True,
        "use_rswa": True,
    }
    # What a backend need not support and ours does.
    ACCEPTED = {
        "use_kv_connector": True,
        "block_size": 48,
        "has_sliding_window": True,
    }

    def vllms_reasons(self, **asked):
        """The reasons in vLLM's own words."""
        check = AttentionBackend.validate_configuration.__func__
        asked = self.FINE._replace(**asked)._asdict()
        return check(TidalBackend, device_capability=None, **asked)

    def our_reasons(self, **asked):
        asked = self.FINE._replace(**asked)._asdict()
        return TidalBackend.validate_configuration(device_capability=None, **asked)

    def test_a_plain_layer_is_accepted(self):
        assert self.our_reasons() == []
        for key, value in self.ACCEPTED.items():
            assert self.our_reasons(**{key: value}) == []

    @pytest.mark.parametrize("key", REFUSED)
    def test_each_refusal_is_translated(self, key):
        asked = {key: self.REFUSED[key]}
        (theirs,) = self.vllms_reasons(**asked)
        (ours,) = self.our_reasons(**asked)
        assert theirs != ours
        assert "allowed" in ours

    def test_no_translation_is_left_over(self):
        said = {
            reason
            for key, value in self.REFUSED.items()
            for reason in self.vllms_reasons(**{key: value})
        }
        assert backend_module._EXPLAINED.keys() <= said

    def test_the_selector_asks_for_nothing_new(self):
        known = {*self.REFUSED, *self.ACCEPTED, "use_adaptive_verification"}
        assert set(AttentionSelectorConfig._fields) == known
        asked = set(parameters(AttentionBackend.validate_configuration))
        assert asked == known | {"device_capability"}

    def test_the_cache_is_written_apart(self):
        assert AttentionBackend.forward_includes_kv_cache_update is True
        write = CPUAttentionBackendImpl.do_kv_cache_update
        assert parameters(TidalImpl.do_kv_cache_update) == parameters(write)

    def test_forward_takes_what_vllm_gives(self):
        given = parameters(AttentionImpl.forward)
        assert parameters(TidalImpl.forward) == given

    def test_kv_cache_layouts(self):
        names = {"LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"}
        assert set(KVCacheLayout.__members__) == names
        assert set(TidalBackend.supported_kv_cache_layouts()) == set(KVCacheLayout)


class TestMetadata:
    """engine/metadata.py"""

    def test_fields_of_the_common_metadata(self):
        fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
        assert fields >= {
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "is_prefilling",
        }

    def test_rows_can_be_split_off(self):
        """A field that `requests_from` does not know would stay the whole batch's."""
        split = {
            *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs"),
            *("num_actual_tokens", "block_table_tensor", "slot_mapping", "positions"),
            *("is_prefilling", "seq_lens_cpu_upper_bound", "req_idx"),
            *("_num_computed_tokens_cache", "_token_to_req_indices_cache"),
        }
        valid_for_part = {"max_query_len", "max_seq_len", "causal"}
        refused = {
            *("logits_indices_padded", "num_logits_indices", "max_logits_per_req"),
            *("encoder_seq_lens", "encoder_seq_lens_cpu", "mm_req_doc_ranges"),
            *("dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound"),
            *("rswa_prefix_lens", "replayssm_decode_base_cpu"),
        }
        fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
        assert fields == split | valid_for_part | refused

    def test_the_builder_is_made_as_vllm_makes_it(self):
        made = parameters(AttentionMetadataBuilder.__init__)[1:]
        assert made == ["kv_cache_spec", "layer_names", "vllm_config", "device"]
        assert AttentionMetadataBuilder.requires_block_table_width is False
        wide = [*made, "block_table_width"]  # given where a builder asks for it
        assert parameters(TidalMetadataBuilder.__init__)[1:] == wide
        assert parameters(AttentionMetadataBuilder.build) == parameters(
            TidalMetadataBuilder.build
        )

    def test_all_layers_are_one_group_with_numbered_names(self, llm):
        (groups,) = runner(llm).attn_groups
        (group,) = groups
        layers = [extract_layer_index(name) for name in group.layer_names]
        assert layers == list(range(NUM_LAYERS))
        (builder,) = group.metadata_builders
        assert type(builder) is TidalMetadataBuilder

    def test_the_cache_holds_k_and_v_side_by_side(self, llm):
        for cache in runner(llm).kv_caches:
            assert cache.shape[1:] == (2, 16, 2 * 32)


class TestDenseBackends:
    """engine/dense.py: what is composed with."""

    @pytest.fixture(params=["FLASH_ATTN", "TRITON_ATTN"])
    def dense(self, request):
        return AttentionBackendEnum[request.param].get_class()

    def test_roles(self, dense):
        assert dense.forward_includes_kv_cache_update is False
        assert dense.supported_kv_cache_layouts() is None  # any
        impl, builder = dense.get_impl_cls(), dense.get_builder_cls()
        made = parameters(AttentionImpl.__init__)
        assert parameters(impl.__init__)[: len(made)] == made
        assert parameters(impl.forward) == parameters(AttentionImpl.forward)
        written = parameters(TidalImpl.do_kv_cache_update)
        assert parameters(impl.do_kv_cache_update) == written
        made = ["kv_cache_spec", "layer_names", "vllm_config", "device"]
        assert parameters(builder.__init__)[1:] == made
        assert builder.requires_block_table_width is False
        assert parameters(builder.build) == parameters(AttentionMetadataBuilder.build)

    def test_they_leave_padding_alone_and_take_any_strides(self, dense):
        source = inspect.getsource(dense.get_impl_cls().forward)
        assert "query[:num_actual_tokens]" in source
        assert "output[:num_actual_tokens]" in source
        assert "kv_cache.transpose(1, 2)" in source

    def test_a_builder_keeps_what_its_metadata_points_to(self):
        """Hence one for the whole batch and one for the prefills in it."""
        builder = AttentionBackendEnum["FLASH_ATTN"].get_class().get_builder_cls()
        kept = inspect.getsource(builder._store_scheduler_metadata)
        assert "return self.scheduler_metadata[:n]" in kept

    def test_it_looks_for_its_implementation_through_ours(self):
        from vllm.v1.attention.backends import flash_attn

        source = inspect.getsource(flash_attn._get_sliding_window_configs)
        assert "layer.impl.get_impl_variants()" in source

    def test_vllm_quantises_queries_only_for_who_wants_it(self):
        assert AttentionImpl.supports_quant_query_input is False
        source = inspect.getsource(Attention.__init__)
        assert "self.impl.supports_quant_query_input" in source
        assert "_q_scale" in inspect.getsource(Attention.forward)
        quantise = parameters(_custom_ops.scaled_fp8_quant)
        assert quantise[:2] == ["input", "scale"]


class TestGraphs:
    """engine/batch.py: which batches a full CUDA graph is replayed for."""

    def test_modes(self):
        full = {
            mode.name for mode in CUDAGraphMode if mode.decode_mode().name == "FULL"
        }
        assert full == {"FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}
        assert all(CUDAGraphMode[name].has_full_cudagraphs() for name in full)
        assert {"cudagraph_mode", "cudagraph_capture_sizes"} <= {
            field.name for field in dataclasses.fields(CompilationConfig)
        }

    def test_v1_pads_for_a_full_graph_only(self):
        """And takes any batch of single tokens for decodes."""
        source = inspect.getsource(GPUModelRunner.execute_model)
        assert "pad_attn = cudagraph_mode == CUDAGraphMode.FULL" in source
        uniform = GPUModelRunner._is_uniform_decode
        assert uniform(1, 1, num_tokens=3, num_reqs=3)
        assert not uniform(2, 1, num_tokens=4, num_reqs=3)

    def test_v1_captures_drafts_of_one_length(self):
        source = inspect.getsource(GPUModelRunner.__init__)
        assert "self.uniform_decode_query_len = 1 + self.num_spec_tokens" in source
        uniform = GPUModelRunner._is_uniform_decode
        assert uniform(3, 3, num_tokens=6, num_reqs=2)
        assert not uniform(3, 3, num_tokens=5, num_reqs=2)

    def test_v2_rounds_their_tokens_up(self):
        source = inspect.getsource(CudaGraphManager._init_candidates)
        assert "rounded_num_tokens = round_up(num_tokens, decode_query_len)" in source

    @pytest.mark.parametrize(
        ("parallel_drafting", "v2", "longest"),
        [(False, False, 4), (False, True, 4), (True, False, 7), (True, True, 4)],
    )
    def test_query_tokens_of_a_draft(self, parallel_drafting, v2, longest):
        speculation = SimpleNamespace(
            num_speculative_tokens=3, parallel_drafting=parallel_drafting
        )
        config = SimpleNamespace(speculative_config=speculation, use_v2_model_runner=v2)
        assert max_decode_query_len(config) == longest

    def test_v1_gives_a_draft_a_backend_of_its_own(self):
        source = inspect.getsource(SpecDecodeBaseProposer._create_draft_vllm_config)
        assert "backend=spec_cfg.attention_backend" in source
        source = inspect.getsource(SpecDecodeBaseProposer.initialize_attn_backend)
        assert "attention_groups[backend_key].layer_names.append" in source

    def test_drafts_are_built_under_a_tag(self):
        """`engine/drafts.py` knows their layers by it."""
        assert backends.model_tag == "backbone"
        for load, tag in (
            (SpecDecodeBaseProposer._get_model, "eagle_head"),
            (DraftModelProposer._get_model, "draft_model"),
            (load_eagle_model, "eagle_head"),
            (StandaloneARSpeculator.load_draft_model, "draft_model"),
        ):
            source = inspect.getsource(load)
            tagged = source.index(f'with set_model_tag("{tag}"):')
            assert tagged < source.index("get_model(", tagged)
        with backends.set_model_tag("eagle_head"):
            assert backends.model_tag == "eagle_head"

    def test_a_drafts_config_shares_the_layers(self, llm, monkeypatch):
        """So it is not taken for a user's, whose settings have no effect."""
        told, config = [], runner(llm).vllm_config
        monkeypatch.setattr(setup_checks, "_warn_once", told.append)
        other = replace(config.attention_config, backend=None)
        again = replace(config, attention_config=other)
        assert again.compilation_config is config.compilation_config
        assert told == []

    def test_v2_pads_for_a_full_graph_only(self):
        source = inspect.getsource(DefaultModelState.prepare_attn)
        padded = source.index("num_reqs = input_batch.num_reqs_after_padding")
        plain = source.index("num_reqs = input_batch.num_reqs\n")
        assert source.index("cudagraph_mode == CUDAGraphMode.FULL") < padded < plain
        # NOTE: of the real rows only.
        assert "is_prefilling=torch.from_numpy(input_batch.is_prefilling_np)" in source

    def test_v2_takes_a_prompts_last_token_for_a_decode(self):
        source = inspect.getsource(V2ModelRunner.gather_batch_req_state)
        assert "(prefill_runs_as_decode_np | ~is_prefilling_np).all()" in source

    def test_state_is_found_where_layers_register(self):
        source = inspect.getsource(Attention.__init__)
        made = source.index("self.impl = impl_cls(")
        assert made < source.index("static_forward_context[prefix] = self")
