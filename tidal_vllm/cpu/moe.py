"""Mixtures of experts on the CPU default: routing and experts in PyTorch.

vLLM leaves unquantised experts to the platform where that comes from outside, and
takes a layer that was registered for it. Its routers are Python but for the two ops
that score and choose, which are compiled.

Changes vLLM at run time: `UnquantizedFusedMoEMethod`, by its `register_oot`, and two
ops of `torch.ops._moe_C` where they are missing.
"""

import torch
import torch.nn.functional as F
from vllm.model_executor.layers import activation
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts


@UnquantizedFusedMoEMethod.register_oot
class TidalCpuExperts(UnquantizedFusedMoEMethod):
    """Unquantised experts, one after the other, each for the tokens that chose it."""

    is_monolithic = False  # vLLM's routers choose the experts

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.activate = activation_of(moe)

    def forward_native(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts,
        shared_experts_input,
    ) -> torch.Tensor:
        """What the chosen experts of this rank add up to, weighted.

        Args:
            x: `[num_tokens, hidden_size]`.
            topk_weights: `[num_tokens, top_k]`.
            topk_ids: `[num_tokens, top_k]`, experts over all ranks; -1: none.
            shared_experts: vLLM runs these itself.
        """
        if layer.expert_map is not None:
            here = layer.expert_map[topk_ids.clamp(min=0)]
            topk_ids = here.masked_fill(topk_ids < 0, -1)
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        w13_bias, w2_bias = (getattr(layer, f"{w}_bias", None) for w in ("w13", "w2"))
        output = torch.zeros(x.shape, dtype=torch.float32)
        for expert in filter(lambda expert: expert >= 0, topk_ids.unique().tolist()):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            bias = None if w13_bias is None else w13_bias[expert]
            hidden = self.activate(F.linear(x[tokens], layer.w13_weight[expert], bias))
            bias = None if w2_bias is None else w2_bias[expert]
            added = F.linear(hidden, layer.w2_weight[expert], bias)
            weights = topk_weights[tokens, choices, None]
            output.index_add_(0, tokens, added.float() * weights.float())
        return output.to(x.dtype)


def activation_of(moe: FusedMoEConfig):
    """The function between an expert's two matrices, from vLLM's own layers.

    Raises:
        ValueError: For one that has no PyTorch code.
    """
    limit = moe.swiglu_limit
    alpha = 1.0 if moe.swiglu_alpha is None else moe.swiglu_alpha
    beta = 0.0 if moe.swiglu_beta is None else moe.swiglu_beta
    makers = {
        MoEActivation.SILU: (
            activation.SiluAndMul
            if limit is None
            else lambda: activation.SiluAndMulWithClamp(limit)
        ),
        MoEActivation.GELU: activation.GeluAndMul,
        MoEActivation.GELU_TANH: lambda: activation.GeluAndMul("tanh"),
        MoEActivation.SWIGLUOAI: activation.SwigluOAIAndMul,
        MoEActivation.SWIGLUOAI_UNINTERLEAVE: lambda: activation.SiluAndMulWithClamp(
            limit, alpha, beta
        ),
        MoEActivation.SWIGLUSTEP: activation.SwigluStepAndMul,
        MoEActivation.SILU_NO_MUL: lambda: F.silu,
        MoEActivation.GELU_NO_MUL: lambda: F.gelu,
        MoEActivation.GELU_TANH_NO_MUL: activation.GELUTanh,
        MoEActivation.RELU2_NO_MUL: lambda: lambda x: F.relu(x).square(),
    }
    if moe.activation not in makers:
        raise ValueError(
            f"activation of the experts = {moe.activation.value}: not available "
            f"without an accelerator; allowed {sorted(a.value for a in makers)}"
        )
    return makers[moe.activation]()


def choose_experts(
    scores: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
    scale: float = 1.0,
) -> None:
    """The experts with the largest scores.

    Args:
        scores: `[num_tokens, num_experts]`.
        topk_weights: `[num_tokens, top_k]` float32, written: their scores.
        topk_ids: `[num_tokens, top_k]`, written.
        renormalize: Whether the weights of a token add up to `scale`.
        bias: `[num_experts]`, counts for the choice only.
    """
    by = scores if bias is None else scores + bias
    ids = by.topk(topk_ids.shape[1], dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    topk_ids.copy_(ids)
    topk_weights.copy_(weights * scale)


def topk_softmax(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
) -> None:
    """vLLM's compiled op of that name, in PyTorch."""
    scores = gating_output.float().softmax(-1)
    choose_experts(scores, topk_weights, topk_ids, renormalize, bias)


def topk_sigmoid(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    token_expert_indices: torch.Tensor,
    gating_output: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
    routed_scaling_factor: float,
    is_padding: torch.Tensor | None,
) -> None:
    """vLLM's compiled op of that name, in PyTorch."""
    scores = gating_output.float().sigmoid()
    scale = routed_scaling_factor
    choose_experts(scores, topk_weights, topk_ids, renormalize, bias, scale)


_moe_ops = torch.library.Library("_moe_C", "FRAGMENT")
if not hasattr(torch.ops._moe_C, "topk_softmax"):
    _given = "Tensor token_expert_indices, Tensor gating_output, bool renormalize, "
    _given += "Tensor? bias, "
    for _op, _scale in ((topk_softmax, ""), (topk_sigmoid, "float scale, ")):
        _moe_ops.define(
            f"{_op.__name__}(Tensor(a!) topk_weights, Tensor(b!) topk_ids, {_given}"
            f"{_scale}Tensor? is_padding) -> ()"
        )
        _moe_ops.impl(_op.__name__, _op, "CompositeExplicitAutograd")
