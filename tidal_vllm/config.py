"""Every knob of the TIDAL backend: unit, range, default and what is refused.

Read once at start-up from ``--additional-config '{"tidal": {...}}'``. Imports neither
torch nor vLLM; which layers a model really has is checked in ``plan/layers.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from tidal_vllm.registry import METHODS
from tidal_vllm.validators import (
    TidalConfigError,
    check_bool,
    check_choice,
    check_int,
    check_layers,
    check_share,
    suggestion,
)

# How many sets of blocks a scope keeps for one sequence on one rank, given the rank's
# query heads and KV heads. Neighbouring query heads share a set.
NUM_SETS: dict[str, Callable[[int, int], int]] = {
    "sequence": lambda num_heads, num_kv_heads: 1,
    "kv_head": lambda num_heads, num_kv_heads: num_kv_heads,
    "query_head": lambda num_heads, num_kv_heads: num_heads,
}
SCOPES = tuple(NUM_SETS)
SELECT_ATTENDS = ("everything", "chosen")
RANK_CHOICES = ("agreed", "own")
KERNELS = ("auto", "cuda", "triton", "reference")
MODES = ("sparse", "lossless")
DEFAULT_DRAFT_TOKENS = 8
MAX_DRAFT_TOKENS = 128  # `MAX_SPEC_LEN` of vLLM's rejection sampler

# SmolLM2-135M, 4,096 tokens forced at 4K of context, a budget of 400 tokens, 36.9 % of
# dense's KV read: the KL from dense decoding is 0.0514 nats with blocks of 16 tokens,
# 0.0396 of 8, 0.0292 of 4, 0.0240 of 2, 0.0264 of 1 (SELECT layers attend to
# everything; cell 4096:0.1:32x128 of benchmarks/results/quality.jsonl). On an H100 such
# a layer takes up to 1.05 of FlashAttention 3's time with blocks of 16, 1.08 of 4, 1.11
# of 2, 1.13 of 1.
DEFAULT_BLOCK_SIZE = 4

# What a preset stands for: a method of choosing blocks, and knobs.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "method": "tidaldecode",
        "token_budget": 4096,
        "select_block_size": DEFAULT_BLOCK_SIZE,
        "scope": "sequence",
        "sink_tokens": 4,
        "recent_fraction": 0.25,
        "select_attends": "chosen",
    },
} | {name: {"method": name} | entry.preset for name, entry in METHODS.items()}


# Drafts are verified densely: nothing is left to correct or to keep from others.
LOSSLESS_NEEDS: dict[str, Any] = {
    "method": "tidaldecode",
    "select_attends": "chosen",
    "reselect_interval": 1,
    "correction_interval": None,
    "publish_polluted": False,
}


class _FromPreset:
    """Default of the fields that a preset fills in."""

    def __repr__(self) -> str:
        return "<from the preset>"


_FROM_PRESET: Any = _FromPreset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TidalConfig:
    """The validated configuration; building one with a bad value raises.

    Attributes:
        preset: Named starting point, one of ``PRESETS``: "default", or the settings of
            a paper: "tidaldecode", "lessismore", "quest", "sliding_window", "oracle".
            Any key given explicitly wins over it.
        method: How blocks are chosen, one of ``registry.METHODS``; their docstrings
            define them. "tidaldecode" (default): by attention mass, in few layers.
            "lessismore": in few layers, by merging the heads' own rankings. In every
            layer choose "quest" (by bounds of a block's keys), "sliding_window" (the
            sinks and the newest tokens) and "oracle" (by the layer's own attention
            mass).
        token_budget: Tokens that one selection may hold, forced ones included. A
            positive multiple of ``select_block_size`` with room for the forced tokens.
            Default 4096.
        select_block_size: Tokens per selection block, >= 1; must divide the KV cache
            block size (``check_kv_block_size``). Default 4; 1 selects single tokens.
        scope: Which heads share one selection: "sequence" (all heads, default),
            "kv_head" (the query heads of one KV head) or "query_head" (each head has
            its own). ``rank_choice`` says what becomes of heads on several ranks.
        sink_tokens: Tokens at the start of a sequence that are always kept, >= 0.
            Default 4.
        recent_fraction: Share of ``token_budget`` forced to the newest tokens, in
            [0, 1). 0 forces only the current token. Default 0.25.
        dense_layers: 0-based layers that attend to everything and choose nothing.
            Null (default): from the profile; where ``select_layers`` is given, all
            layers before the first of those.
        select_layers: 0-based layers that read all keys and choose the blocks that
            later SPARSE layers attend to. Null (default): from the profile. Empty:
            sparse decoding is off.
        profile: Where the layer roles come from: the name of a packaged or user
            profile, or a path to a .json file. Null (default): by the model's name.
        min_sparse_len: Tokens, >= 0. Sequences up to this length keep all their
            blocks, so their attention is exact. Null (default): ``token_budget``. May
            be below the budget; sequences between the two take the sparse path over all
            their blocks.
        reselect_interval: Decode steps, >= 1, for which a SELECT layer's selection
            holds. In the steps between, the layer attends to its own selection as a
            SPARSE layer does; tokens that are newer than the selection are always kept.
            1 (default): the layer selects in every step.
        select_attends: What a SELECT layer attends to once it has selected:
            "chosen" (default): the layer reads all keys to select, and then the keys
            and values of the selected blocks; or "everything", which a method by which
            every layer chooses does not allow.
        rank_choice: Who chooses a selection whose heads lie on several tensor parallel
            ranks: "agreed", the sum of their attention mass over all of them, so that
            the choice does not depend on the number of ranks, or "own", each rank by
            the heads that it has. Null (default): "agreed"; "own" with a method whose
            ranks cannot agree. Changes nothing on one rank.
        correction_interval: Decode steps, >= 1, after which the KV that sparse layers
            wrote is recomputed densely. Null (default): never.
        publish_polluted: Whether vLLM's prefix cache may hand out KV that sparse
            layers wrote and that was not corrected. Default false.
        kernels: What runs the decode ops: "cuda" (the extension, where it is built),
            "triton", "reference" (PyTorch, without CUDA graphs), or "auto" (default):
            the first of these that covers GPU and model, on a CPU the reference.
            "triton" on a CPU needs Triton's interpreter (TRITON_INTERPRET=1).
        mode: "sparse" (default): answers come from sparse decoding. "lossless": sparse
            decoding drafts, and the dense model verifies; answers are the dense
            model's.
        draft_tokens: Tokens that are drafted before they are verified, in
            [1, ``MAX_DRAFT_TOKENS``], in lossless mode. Null (default): 8 there.
    """

    preset: str = "default"
    method: str = _FROM_PRESET
    token_budget: int = _FROM_PRESET
    select_block_size: int = _FROM_PRESET
    scope: str = _FROM_PRESET
    sink_tokens: int = _FROM_PRESET
    recent_fraction: float = _FROM_PRESET
    dense_layers: tuple[int, ...] | None = None
    select_layers: tuple[int, ...] | None = None
    profile: str | None = None
    min_sparse_len: int | None = None
    reselect_interval: int = 1
    select_attends: str = _FROM_PRESET
    rank_choice: str | None = None
    correction_interval: int | None = None
    publish_polluted: bool = False
    kernels: str = "auto"
    mode: str = "sparse"
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        check_choice("tidal.preset", self.preset, PRESETS)
        attends = self.select_attends
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is _FROM_PRESET:
                self._set(name, value)
        check_choice("tidal.method", self.method, METHODS)
        needs = METHODS[self.method].every_layer or self.mode == "lossless"
        if attends is _FROM_PRESET and needs:
            self._set("select_attends", "chosen")  # of another's preset
        check_choice("tidal.scope", self.scope, SCOPES)
        self._check_select_attends()
        self._check_rank_choice()
        check_choice("tidal.kernels", self.kernels, KERNELS)
        allowed = "must be an integer >= 1 (decode steps)"
        check_int("tidal.reselect_interval", self.reselect_interval, 1, allowed)
        self._check_tokens()
        self._check_layers()
        self._check_profile()
        self._check_correction()
        self._check_mode()

    @classmethod
    def from_additional_config(
        cls, additional_config: Mapping[str, Any] | None
    ) -> TidalConfig:
        """Read ``additional_config["tidal"]`` of vLLM's configuration.

        Args:
            additional_config: vLLM's ``additional_config``. None, or one without a
                "tidal" entry, gives the defaults; entries of others are left alone.

        Raises:
            TidalConfigError: Anything unknown, mistyped, out of range or
                contradictory, and this package's keys outside the "tidal" object.
        """
        if additional_config is None:
            return cls()
        if not isinstance(additional_config, Mapping):
            allowed = 'must be a JSON object such as {"tidal": {"token_budget": 4096}}'
            raise TidalConfigError("additional_config", additional_config, allowed)
        if "tidal" not in additional_config:
            _refuse_misplaced(additional_config)
            return cls()
        settings = additional_config["tidal"]
        if not isinstance(settings, Mapping):
            allowed = f"must be a JSON object with keys among {', '.join(KEYS)}"
            raise TidalConfigError("tidal", settings, allowed)
        for key, value in settings.items():
            if key not in KEYS:
                allowed = "unknown key" + suggestion(key, KEYS)
                allowed += f"; the keys are {', '.join(KEYS)}"
                raise TidalConfigError(f"tidal.{key}", value, allowed)
        return cls(**settings)

    @property
    def recent_tokens(self) -> int:
        """Newest tokens that are always kept, the current one included; >= 1."""
        return max(1, math.floor(self.recent_fraction * self.token_budget))

    @property
    def sparse_threshold(self) -> int:
        """Longest sequence, in tokens, that is exact whatever the budget."""
        if self.min_sparse_len is None:
            return self.token_budget
        return self.min_sparse_len

    @property
    def max_blocks(self) -> int:
        """Blocks that the row of a selection must have room for.

        More than the budget's blocks where ``min_sparse_len`` exceeds the budget, and
        where a selection holds for several steps or drafts, whose tokens may begin new
        blocks. Not limited by the longest sequence that the model allows.
        """
        size = self.select_block_size
        longest = max(self.token_budget, self.sparse_threshold)
        # Behind the row that chose a draft may be kept whole, and the next one begun.
        newer = self.reselect_interval - 1 + 2 * (self.draft_tokens or 0)
        return -(-longest // size) + -(-newer // size)

    def check_kv_block_size(self, kv_block_size: int) -> None:
        """Raise unless ``select_block_size`` divides vLLM's KV cache block size."""
        if kv_block_size % self.select_block_size == 0:
            return
        divisors = [n for n in range(1, kv_block_size + 1) if kv_block_size % n == 0]
        allowed = (
            f"must divide the KV cache block size ({kv_block_size} tokens): one of "
            f"{', '.join(map(str, divisors))}"
        )
        raise TidalConfigError(
            "tidal.select_block_size", self.select_block_size, allowed
        )

    def check_max_model_len(self, max_model_len: int) -> None:
        """Raise if no output of this model can be as long as the interval."""
        interval, longest = self.correction_interval, max_model_len - 1
        if interval is not None and interval > longest:
            allowed = (
                "must be at most the longest possible output, max_model_len - 1 = "
                f"{longest} decode steps, or null (no correction)"
            )
            raise TidalConfigError("tidal.correction_interval", interval, allowed)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_select_attends(self) -> None:
        check_choice("tidal.select_attends", self.select_attends, SELECT_ATTENDS)
        if METHODS[self.method].every_layer and self.select_attends != "chosen":
            allowed = (
                f"with method {self.method!r} every layer chooses, and none would be "
                "sparse: must be 'chosen'"
            )
            raise TidalConfigError("tidal.select_attends", self.select_attends, allowed)

    def _check_rank_choice(self) -> None:
        agree = METHODS[self.method].ranks_agree
        if self.rank_choice is None:
            self._set("rank_choice", "agreed" if agree else "own")
        check_choice("tidal.rank_choice", self.rank_choice, RANK_CHOICES)
        if self.rank_choice == "agreed" and not agree:
            allowed = (
                f"with method {self.method!r} ranks cannot agree: must be 'own', or "
                "null"
            )
            raise TidalConfigError("tidal.rank_choice", self.rank_choice, allowed)

    def _check_tokens(self) -> None:
        size = self.select_block_size
        allowed = "must be an integer >= 1 (tokens) that divides the KV block size"
        check_int("tidal.select_block_size", size, 1, allowed)
        allowed = f"must be a positive multiple of select_block_size ({size})"
        check_int("tidal.token_budget", self.token_budget, 1, allowed)
        if self.token_budget % size:
            raise TidalConfigError("tidal.token_budget", self.token_budget, allowed)
        allowed = "must be an integer >= 0 (tokens)"
        check_int("tidal.sink_tokens", self.sink_tokens, 0, allowed)
        allowed = "must be a number in [0, 1), a share of token_budget"
        check_share("tidal.recent_fraction", self.recent_fraction, allowed)
        self._set("recent_fraction", float(self.recent_fraction))
        if self.min_sparse_len is not None:
            allowed = (
                "must be an integer >= 0 (tokens), or null for token_budget "
                f"({self.token_budget})"
            )
            check_int("tidal.min_sparse_len", self.min_sparse_len, 0, allowed)
        self._check_room_for_forced()

    def _check_room_for_forced(self) -> None:
        size = self.select_block_size
        needed = self._forced_blocks(self.token_budget)
        if needed <= self.token_budget // size:
            return
        # Enough for any recent_fraction f < 1: n >= sink_blocks + f * n + 2.
        sink_blocks = -(-self.sink_tokens // size)
        enough = math.ceil((sink_blocks + 2) / (1 - self.recent_fraction))
        allowed = (
            f"must have room for its forced tokens: {self.sink_tokens} sink and "
            f"{self.recent_tokens} recent tokens can touch {needed} blocks of {size}, "
            f"it holds {self.token_budget // size}; raise it (e.g. to "
            f"{enough * size}) or lower sink_tokens or recent_fraction"
        )
        raise TidalConfigError("tidal.token_budget", self.token_budget, allowed)

    def _forced_blocks(self, token_budget: int) -> int:
        """Most blocks that the forced tokens touch, over all sequence lengths."""
        size = self.select_block_size
        recent = max(1, math.floor(self.recent_fraction * token_budget))
        return -(-self.sink_tokens // size) + -(-(recent - 1) // size) + 1

    def _check_profile(self) -> None:
        name = self.profile
        if name is not None and (not isinstance(name, str) or not name.strip()):
            allowed = (
                "must be the name of a profile, a path to a .json file, or null "
                "(chosen by the model's name)"
            )
            raise TidalConfigError("tidal.profile", name, allowed)

    def _check_correction(self) -> None:
        if self.correction_interval is not None:
            allowed = "must be an integer >= 1 (decode steps), or null (no correction)"
            check_int("tidal.correction_interval", self.correction_interval, 1, allowed)
        check_bool("tidal.publish_polluted", self.publish_polluted)

    def _check_mode(self) -> None:
        check_choice("tidal.mode", self.mode, MODES)
        allowed = f"must be an integer in [1, {MAX_DRAFT_TOKENS}], or null"
        if self.mode == "sparse":
            if self.draft_tokens is not None:
                allowed = "drafts come with tidal.mode = 'lossless': must be null"
                raise TidalConfigError("tidal.draft_tokens", self.draft_tokens, allowed)
            return
        if self.draft_tokens is None:
            self._set("draft_tokens", DEFAULT_DRAFT_TOKENS)
        check_int("tidal.draft_tokens", self.draft_tokens, 1, allowed)
        if self.draft_tokens > MAX_DRAFT_TOKENS:
            raise TidalConfigError("tidal.draft_tokens", self.draft_tokens, allowed)
        for key, value in LOSSLESS_NEEDS.items():
            if (given := getattr(self, key)) != value:
                shown = "null" if value is None else repr(value)
                allowed = f"must be {shown} with tidal.mode = 'lossless'"
                raise TidalConfigError(f"tidal.{key}", given, allowed)

    def _check_layers(self) -> None:
        for name in ("dense_layers", "select_layers"):
            value = getattr(self, name)
            if value is not None:
                nullable = ", or null (from the profile)"
                self._set(name, check_layers(f"tidal.{name}", value, nullable))
        shared = sorted({*(self.dense_layers or ())} & {*(self.select_layers or ())})
        if shared:
            allowed = (
                f"overlaps dense_layers = {list(self.dense_layers or ())} in {shared}: "
                "must name other layers, a layer has one role"
            )
            raise TidalConfigError(
                "tidal.select_layers", list(self.select_layers or ()), allowed
            )


KEYS = tuple(field.name for field in dataclasses.fields(TidalConfig))


def _refuse_misplaced(additional_config: Mapping[str, Any]) -> None:
    """Catch what would otherwise be ignored: "Tidal", or known keys one level up."""
    for key, value in additional_config.items():
        known = key in KEYS and "_" in key
        if known or str(key).strip().lower() == "tidal":
            inner = f'{{"tidal": {{"{key}": ...}}}}' if known else '{"tidal": {...}}'
            allowed = f"would be ignored; settings must stand inside {inner}"
            raise TidalConfigError(f"additional_config.{key}", value, allowed)
