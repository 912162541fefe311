"""Which role each layer gets: from settings, from a profile, or the safest ones."""

from __future__ import annotations

from collections.abc import Sequence

from tidal_vllm.config import TidalConfig
from tidal_vllm.plan.roles import LayerPlan, Role, all_dense, format_layers
from tidal_vllm.profiles import Profile
from tidal_vllm.registry import METHODS
from tidal_vllm.validators import TidalConfigError

MIN_LAYERS = 4  # fewer leave nothing to gain: DENSE, DENSE, SELECT, then one SPARSE
# An unknown model selects again at every 6th layer. SmolLM2-135M, 4,096 tokens forced
# at 4K of context, a budget of 400 tokens: with SELECT layers 2, 8, 14 and 20 the KL
# from dense decoding is 0.0243 nats and 27.9 % of dense's KV is read, with every 4th
# from 2 on 0.0292 and 36.9 %. At a budget that reads 36.9 % too, the four have 0.0085
# (all attend to everything; cell 4096:0.1:32x128 of benchmarks/results/quality.jsonl).
# Attending to what they choose, layer 26 of 30 as a fifth lowers the KL by 0.0012 and
# reads 1.7 points of dense more; spent on a larger budget of the four, those bytes
# lower it by 0.0053 (cell 4096:0.1:8x128, on a CPU).
FALLBACK_STRIDE = 6

FALLBACK_WARNING = (
    "no profile knows this model: starting with the safest roles (of its full-"
    "attention layers the first two DENSE, the third SELECT, and every "
    f"{FALLBACK_STRIDE}th after it that is not among the last {FALLBACK_STRIDE - 1}). "
    "tidal-vllm calibrate finds the model's own. Or set tidal.dense_layers and "
    "tidal.select_layers, or tidal.profile. "
    "Do not guess one re-selection layer: Llama-3.1-8B at a budget of 256 tokens finds "
    "40 % of the needles with layer 12 and 100 % with layer 13 (arXiv 2410.05076)"
)


def safest_roles(
    full_layers: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """DENSE and SELECT layers for a model nobody has measured."""
    end = max(len(full_layers) - FALLBACK_STRIDE + 1, 3)
    return tuple(full_layers[:2]), tuple(full_layers[2:end:FALLBACK_STRIDE])


def plan_layers(
    config: TidalConfig,
    num_layers: int,
    profile: Profile | None,
    full_layers: Sequence[int] | None = None,
) -> LayerPlan:
    """Give each layer its role: explicit layers, else the profile's, else the safest.

    With a method by which every layer chooses, all that are not DENSE are SELECT.

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
    if METHODS[config.method].every_layer:
        return _plan_every_layer(config, num_layers, full)
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


def _plan_every_layer(
    config: TidalConfig, num_layers: int, full: Sequence[int]
) -> LayerPlan:
    """All layers choose, but for the DENSE ones."""
    if config.select_layers == ():
        source = "tidal.select_layers"
        reason = f"no SELECT layer ({source}), so nothing chooses what to read"
        return all_dense(num_layers, source, reason, full)
    for key in ("select_layers", "profile"):
        value = getattr(config, key)
        if value is not None:
            shown = list(value) if isinstance(value, tuple) else value
            allowed = f"with method {config.method!r} every layer chooses: must be null"
            if key == "select_layers":
                allowed += ", or [] (sparse decoding off)"
            raise TidalConfigError(f"tidal.{key}", shown, allowed)
    _check_layers("tidal.dense_layers", config.dense_layers, num_layers, full)
    dense, source = config.dense_layers, "tidal.dense_layers"
    if dense is None:
        dense = tuple(full[: METHODS[config.method].dense_layers])
        source = f"method {config.method!r}"
    choosing = [i for i in full if i not in dense]
    if not choosing:
        reason = f"every{_full(full, num_layers)} layer is DENSE ({source})"
        return all_dense(num_layers, source, reason, full)
    given = dict.fromkeys(dense, Role.DENSE) | dict.fromkeys(choosing, Role.SELECT)
    return LayerPlan(tuple(given.get(i, Role.OTHER) for i in range(num_layers)), source)


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
