"""What the CPU default takes for granted inside vLLM; see test_vllm_assumptions.py."""

import inspect

import pytest
from vllm import _custom_ops
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.utils import convert_mapping
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    select_unquantized_moe_backend,
)
from vllm.model_executor.models import registry
from vllm.platforms import current_platform

from tests.support.signatures import parameters
from tidal_vllm.cpu.lora import TidalPunicaWrapper
from tidal_vllm.cpu.moe import TidalCpuExperts, topk_sigmoid, topk_softmax

pytestmark = pytest.mark.compat


class TestCpuRefusals:
    """cpu/refusals.py"""

    def test_models_are_inspected_by_a_method_that_may_find_none(self):
        inspect_model = registry._ModelRegistry._try_inspect_model_cls
        assert parameters(inspect_model) == ["self", "model_arch"]
        asked = inspect.getsource(registry._ModelRegistry.inspect_model_cls)
        assert "self._try_inspect_model_cls(" in asked
        stock = inspect.getsource(registry._try_inspect_model_cls)
        assert "return model.inspect_model_cls()" in stock
        assert "return None" in stock


class TestCpuLora:
    """cpu/lora.py"""

    def test_the_wrapper_is_one_of_vllms(self):
        assert current_platform.get_punica_wrapper().endswith(".TidalPunicaWrapper")
        overridden = [
            *("_apply_shrink", "_apply_expand", "add_lora_embedding"),
            "add_lora_logits",
        ]
        for name in overridden:
            stock, ours = (
                parameters(getattr(cls, name))
                for cls in (PunicaWrapperCPU, TidalPunicaWrapper)
            )
            assert stock == ours

    def test_everything_else_of_it_goes_through_what_is_overridden(self):
        source = inspect.getsource
        assert "self._apply_shrink(" in source(PunicaWrapperCPU.add_shrink)
        assert "self._apply_expand(" in source(PunicaWrapperCPU.add_expand)
        assert "self.add_shrink(" in source(PunicaWrapperCPU.add_lora_linear)
        assert "self.add_expand(" in source(PunicaWrapperCPU.add_lora_linear)
        mask = source(PunicaWrapperCPU._select_full_linear_output)
        assert "(indices >= 0)" in mask

    def test_a_row_without_an_adapter_has_slot_minus_one(self):
        mapping = LoRAMapping((0, 7), (0, 7), is_prefill=True)
        tokens, samples, *_ = convert_mapping(mapping, [7], 2, 512, "cpu")
        assert tokens.tolist() == samples.tolist() == [-1, 0]


class TestCpuMoe:
    """cpu/moe.py"""

    def test_experts_are_left_to_a_platform_from_outside(self):
        source = inspect.getsource(select_unquantized_moe_backend)
        assert "return UnquantizedMoeBackend.OOT, None" in source
        assert op_registry_oot["UnquantizedFusedMoEMethod"] is TidalCpuExperts
        stock = UnquantizedFusedMoEMethod.forward_native
        assert parameters(TidalCpuExperts.forward_native) == parameters(stock)

    @pytest.mark.parametrize("op", [topk_softmax, topk_sigmoid])
    def test_the_ops_that_choose_have_our_parameters(self, op):
        """By position, from the wrapper that the routers call."""
        call = inspect.getsource(getattr(_custom_ops, op.__name__))
        given = call.rpartition(f"_moe_C.{op.__name__}(")[2].partition(")")[0]
        names = [name.strip() for name in given.split(",") if name.strip()]
        ours = parameters(op)
        assert [n.replace("e_score_correction_bias", "bias") for n in names] == ours
