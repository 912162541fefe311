"""What a worker's layers have to be, so that a plan works for them."""

from __future__ import annotations

from collections.abc import Iterable

from tidal_vllm.plan.roles import LayerPlan, Role, format_layers
from tidal_vllm.validators import TidalConfigError


def check_pipeline_stage(plan: LayerPlan, first_layer: int, end_layer: int) -> None:
    """Raise unless a pipeline stage can choose for itself.

    A selection does not travel between stages, so the first layer of the stage
    ``[first_layer, end_layer)`` that is SELECT or SPARSE must be a SELECT layer.
    """
    stage = range(first_layer, end_layer)
    selective = (Role.SELECT, Role.SPARSE)
    if not plan.sparse:
        return
    first = next((i for i in stage if plan.roles[i] in selective), None)
    if first is None or plan.roles[first] is Role.SELECT:
        return
    select = plan.layers(Role.SELECT)
    allowed = (
        f"the pipeline stage with layers {format_layers(stage)} starts with SPARSE "
        f"layer {first}, and selections do not travel between stages: must contain "
        f"{first}, e.g. {sorted({*select, first})}"
    )
    raise TidalConfigError("tidal.select_layers", list(select), allowed)


def check_full_layers(plan: LayerPlan, stage: range, built: Iterable[int]) -> None:
    """Raise unless the layers of a stage are what the model's config says.

    Args:
        built: Layers of the stage that vLLM built with full attention, on TIDAL.
    """
    expected = [i for i in stage if plan.roles[i] is not Role.OTHER]
    if plan.sparse and expected != sorted(built):
        raise ValueError(
            f"TIDAL runs full attention in layers {format_layers(sorted(built))}, but "
            f"by the model's config the full-attention layers are "
            f"{format_layers(expected)}: allowed are models of which both agree, or "
            "tidal.select_layers = []"
        )
