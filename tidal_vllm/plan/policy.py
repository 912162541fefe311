# ruff: noqa
"""To be removed."""

from tidal_vllm.plan.layers import *  # noqa
from tidal_vllm.plan.layers import (
    FALLBACK_WARNING,
    MIN_LAYERS,
    plan_layers,
    safest_roles,
)  # noqa
from tidal_vllm.plan.roles import LayerPlan, Role, all_dense, format_layers  # noqa
from tidal_vllm.plan.rule import SelectionRule, num_sets  # noqa
from tidal_vllm.plan.stages import check_full_layers, check_pipeline_stage  # noqa
from tidal_vllm.plan.steps import selection_indices, kv_read_share, runs_sparse  # noqa

choices_of_layers = selection_indices
