"""Pure decisions: each layer's role, what a set keeps, which path a batch takes.

Made once at start-up or from plain integers; knows neither torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence

from tidal_vllm.config import TidalConfig
from tidal_vllm.profiles import Profile
from tidal_vllm.validators import TidalConfigError

MIN_LAYERS = 4  # fewer leave nothing to gain: DENSE, DENSE, SELECT, then one SPARSE
FALLBACK_STRIDE = 4  # an unknown model selects again at every 4th layer

FALLBACK_WARNING = (
    "no profile knows this model: starting with the safest roles (of its full-"
    "attention layers the first two DENSE, the third and every 4th after it SELECT), "
    "which read more of the KV cache than tuned ones. Set "
    "tidal.dense_layers and tidal.select_layers, or tidal.profile. Do not guess one "
    "re-selection layer: Llama-3.1-8B at a budget of 256 tokens finds 40 % of the "
    "needles with layer 12 and 100 % with layer 13 (arXiv 2410.05076)"
)


class Role(enum.Enum):
    """What a layer does in a sparse decode step."""

    DENSE = "dense"  # attends to everything
    SELECT = "select"  # attends to everything, and chooses
    SPARSE = "sparse"  # attends to what was chosen
    OTHER = "other"  # does as the model has it: a sliding window, a state


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """What a set keeps of a sequence; all fields in tokens.

    Precondition, held by ``TidalConfig``: ``token_budget`` is a multiple of
    ``select_block_size`` and has room for the forced tokens.
    """

    token_budget: int
    select_block_size: int
    sink_tokens: int
    recent_tokens: int
    sparse_threshold: int

    @classmethod
    def from_config(cls, config: TidalConfig) -> SelectionRule:
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(cls)})

    @property
    def budget_blocks(self) -> int:
        """Blocks that a sequence longer than ``keep_all_len`` keeps."""
        return self.token_budget // self.select_block_size

    @property
    def keep_all_len(self) -> int:
        """Longest sequence that keeps all its blocks."""
        return max(self.token_budget, self.sparse_threshold)

    def num_blocks(self, seq_len: int) -> int:
        """Blocks of a sequence, the last one perhaps partly filled."""
        return -(-seq_len // self.select_block_size)

    def num_kept_blocks(self, seq_len: int) -> int:
        """Blocks that a set keeps of a sequence: all, or the budget's."""
        if seq_len <= self.keep_all_len:
            return self.num_blocks(seq_len)
        return self.budget_blocks

    def kept_tokens(self, seq_len: int) -> int:
        """Tokens in the kept blocks, the perhaps partly filled last one among them."""
        kept = self.num_kept_blocks(seq_len)
        unfilled = -seq_len % self.select_block_size
        return kept * self.select_block_size - unfilled

    def forced_blocks(self, seq_len: int) -> tuple[int, ...]:
        """Blocks with a sink or recent token, ascending; they are always kept."""
        total = self.num_blocks(seq_len)
        sink_end = min(self.num_blocks(self.sink_tokens), total)
        recent_start = max(seq_len - self.recent_tokens, 0) // self.select_block_size
        return (*range(sink_end), *range(max(recent_start, sink_end), total))


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The role of every layer, and why.

    Attributes:
        roles: One per layer of the model. DENSE or OTHER where sparse decoding is off.
        source: Where the roles come from, for the log; empty if nobody gave any.
        off_reason: Why no layer decodes sparsely; None where some do.
        warning: What the user should know before relying on the roles, or None.
    """

    roles: tuple[Role, ...]
    source: str
    off_reason: str | None = None
    warning: str | None = None

    @property
    def sparse(self) -> bool:
        """Whether any layer decodes sparsely."""
        return self.off_reason is None

    @property
    def num_layers(self) -> int:
        return len(self.roles)

    def layers(self, role: Role) -> tuple[int, ...]:
        """0-based indices of the layers with this role."""
        return tuple(i for i, r in enumerate(self.roles) if r is role)

    def count(self, role: Role) -> int:
        return self.roles.count(role)

    @property
    def num_full_layers(self) -> int:
        """Layers with full attention: all but the OTHER ones."""
        return self.num_layers - self.count(Role.OTHER)


def safest_roles(
    full_layers: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """DENSE and SELECT layers for a model nobody has measured."""
    return tuple(full_layers[:2]), tuple(full_layers[2::FALLBACK_STRIDE])


def plan_layers(
    config: TidalConfig,
    num_layers: int,
    profile: Profile | None,
    full_layers: Sequence[int] | None = None,
) -> LayerPlan:
    """Give each layer its role: explicit layers, else the profile's, else the safest.

    Args:
        config: ``dense_layers`` alone keeps the profile's SELECT layers;
            ``select_layers`` alone makes all layers before the first of them DENSE.
        num_layers: The model's layer count, over all pipeline stages.
        profile: What ``profiles.find_profile`` found for this model.
        full_layers: The layers with full attention, ascending; the others are OTHER.
            None: all.

    Raises:
        TidalConfigError: A layer outside the model or without full attention,
            overlapping roles, or a SPARSE layer before any SELECT layer.
    """
    full = range(num_layers) if full_layers is None else full_layers
    explicit = config.dense_layers is not None or config.select_layers is not None
    if not explicit and profile is None and len(full) < MIN_LAYERS:
        reason = (
            f"the model has {len(full)}{_full(full, num_layers)} layers, fewer than "
            f"{MIN_LAYERS}, and neither tidal.select_layers nor a profile gives them "
            "roles"
        )
        return all_dense(num_layers, "", reason, full)
    dense, select, source = _choose_layers(config, num_layers, profile, full)
    if not select:
        reason = f"no SELECT layer ({source}), so nothing chooses what to read"
        return all_dense(num_layers, source, reason, full)
    given = dict.fromkeys(full, Role.SPARSE)
    given |= dict.fromkeys(dense, Role.DENSE) | dict.fromkeys(select, Role.SELECT)
    roles = tuple(given.get(i, Role.OTHER) for i in range(num_layers))
    if Role.SPARSE not in roles:
        reason = (
            f"every{_full(full, num_layers)} layer is DENSE or SELECT ({source}), none "
            "is left to be SPARSE"
        )
        return all_dense(num_layers, source, reason, full)
    early = [i for i in range(min(select)) if roles[i] is Role.SPARSE]
    if early:
        allowed = (
            f"layers {format_layers(early)} would be SPARSE before the first SELECT "
            f"layer, {min(select)}: must contain them (or make {early[0]} a SELECT)"
        )
        if config.dense_layers is not None:
            raise TidalConfigError("tidal.dense_layers", list(dense), allowed)
        raise TidalConfigError("tidal.profile", source, f"its dense_layers: {allowed}")
    unknown = config.select_layers is None and profile is None
    return LayerPlan(roles, source, warning=FALLBACK_WARNING if unknown else None)


def all_dense(
    num_layers: int,
    source: str,
    reason: str,
    full_layers: Sequence[int] | None = None,
) -> LayerPlan:
    """Sparse decoding is off, for a reason that the start-up table states."""
    full = range(num_layers) if full_layers is None else full_layers
    roles = (Role.DENSE if i in full else Role.OTHER for i in range(num_layers))
    return LayerPlan(tuple(roles), source, off_reason=reason)


def num_sets(scope: str, num_heads: int, num_kv_heads: int) -> int:
    """Sets that are kept for one sequence on one rank."""
    return {"sequence": 1, "kv_head": num_kv_heads, "query_head": num_heads}[scope]


def check_pipeline_stage(plan: LayerPlan, first_layer: int, end_layer: int) -> None:
    """Raise unless a pipeline stage can choose for itself.

    A selection does not travel between stages, so the first layer of the stage
    ``[first_layer, end_layer)`` that is SELECT or SPARSE must be a SELECT layer.
    """
    stage = range(first_layer, end_layer)
    choosing = (Role.SELECT, Role.SPARSE)
    if not plan.sparse:
        return
    first = next((i for i in stage if plan.roles[i] in choosing), None)
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


def runs_sparse(plan: LayerPlan, rule: SelectionRule, max_decode_seq_len: int) -> bool:
    """Whether a batch takes the sparse path: any decode row above the threshold."""
    return plan.sparse and max_decode_seq_len > rule.sparse_threshold


def kv_read_share(plan: LayerPlan, config: TidalConfig, seq_len: int) -> float:
    """KV bytes that a decode step reads, as a share of dense, on average over steps.

    Of the full-attention layers alone: what OTHER layers read is the same either way.
    Exact for scopes "sequence" and "kv_head"; with "query_head" the heads of a group
    may keep different tokens, so under GQA up to group-size times the sparse part.
    """
    rule = SelectionRule.from_config(config)
    if not runs_sparse(plan, rule, seq_len):
        return 1.0
    kept, interval = rule.kept_tokens(seq_len), config.reselect_interval
    if config.select_attends == "chosen":
        selecting = seq_len / (2 * interval) + kept
    else:
        selecting = (seq_len + (interval - 1) * kept) / interval
    read = {Role.DENSE: seq_len, Role.SELECT: selecting, Role.SPARSE: kept}
    total = sum(plan.count(role) * tokens for role, tokens in read.items())
    return total / (plan.num_full_layers * seq_len)


def choices_of_layers(
    plan: LayerPlan, layers: Sequence[int], reselect_interval: int
) -> dict[int, int]:
    """Which of the kept choices each layer writes or reads, by layer.

    Args:
        layers: Those of a pipeline stage, ascending.
        reselect_interval: Where choices live for one step only, 1, the SELECT layers
            overwrite a single one in turn.
    """
    found, latest = {}, -1
    for layer in layers:
        if plan.roles[layer] is Role.SELECT and (latest < 0 or reselect_interval > 1):
            latest += 1
        if plan.roles[layer] in (Role.SELECT, Role.SPARSE):
            found[layer] = latest
    return found


def format_layers(layers: Iterable[int]) -> str:
    """Compact ranges of ascending layers: "0-1, 7, 12-31"; "none" if there are none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = (f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return ", ".join(texts) or "none"


def _choose_layers(
    config: TidalConfig,
    num_layers: int,
    profile: Profile | None,
    full_layers: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """DENSE and SELECT layers, and where they come from."""
    dense, select = config.dense_layers, config.select_layers
    _check_layers("tidal.dense_layers", dense, num_layers, full_layers)
    _check_layers("tidal.select_layers", select, num_layers, full_layers)
    if select is not None:
        if dense is not None:
            return dense, select, "tidal.dense_layers and tidal.select_layers"
        first = min(select, default=0)
        before = tuple(i for i in full_layers if i < first)
        return before, select, "tidal.select_layers"
    if profile is not None:
        origin = f"profile {profile.label}"
        base_dense, select = profile.dense_layers, profile.select_layers
        for key, layers in (("dense_layers", base_dense), ("select_layers", select)):
            key = f"tidal.profile {profile.label}: {key}"
            _check_layers(key, layers, num_layers, full_layers)
    else:
        origin = "the safest roles for an unknown model"
        base_dense, select = safest_roles(full_layers)
    if dense is None:
        return base_dense, select, origin
    _check_overlap(dense, select, origin)
    return dense, select, f"tidal.dense_layers and {origin}"


def _check_layers(
    key: str,
    layers: tuple[int, ...] | None,
    num_layers: int,
    full_layers: Sequence[int],
) -> None:
    outside = [i for i in layers or () if i not in full_layers]
    if not outside:
        return
    allowed = f"this model has {num_layers} layers: must be in 0..{num_layers - 1}"
    if len(full_layers) < num_layers:
        allowed = (
            f"of this model's {num_layers} layers these have full attention: "
            f"{format_layers(full_layers)}; must be among them"
        )
    raise TidalConfigError(key, list(layers or ()), f"{allowed}, {outside} not")


def _full(full_layers: Sequence[int], num_layers: int) -> str:
    """An adjective, where a model has other layers too."""
    return " full-attention" if len(full_layers) < num_layers else ""


def _check_overlap(
    dense: tuple[int, ...], select: tuple[int, ...], origin: str
) -> None:
    both = sorted({*dense} & {*select})
    if both:
        allowed = (
            f"overlaps select_layers = {list(select)} ({origin}) in {both}: must name "
            "other layers, or give tidal.select_layers too"
        )
        raise TidalConfigError("tidal.dense_layers", list(dense), allowed)
