"""The methods of choosing blocks: their names, and what is known of each in advance.

The front end plans and refuses with this table alone, before a tensor exists. The
class of a method does the rest, in the worker.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """What planning has to know of a method.

    Attributes:
        path: The class, a `tidal_vllm.methods.base.Method`.
        every_layer: Whether every full-attention layer that is not DENSE is a SELECT
            layer. Otherwise few are: those that the settings or a profile name.
        dense_layers: With every_layer, how many of the first full-attention layers are
            DENSE where the settings do not say.
        scored: What a SELECT layer reads to score the blocks: "keys", all of them;
            "key bounds", two vectors for each block; or "nothing".
        reference_only: Whether the method runs on the reference ops alone.
        follows_keys: Whether the method keeps something of each key that is written,
            so that KV may not arrive in another way.
    """

    path: str
    every_layer: bool = False
    dense_layers: int = 0
    scored: str = "keys"
    reference_only: bool = True
    follows_keys: bool = False


METHODS: dict[str, MethodEntry] = {
    "tidaldecode": MethodEntry(
        path="tidal_vllm.methods.tidaldecode.TidalDecode", reference_only=False
    ),
    "lessismore": MethodEntry(path="tidal_vllm.methods.lessismore.LessIsMore"),
    # Quest leaves the first two layers dense (arXiv 2406.10774, section 4.1).
    "quest": MethodEntry(
        path="tidal_vllm.methods.quest.Quest",
        every_layer=True,
        dense_layers=2,
        scored="key bounds",
        follows_keys=True,
    ),
    "sliding_window": MethodEntry(
        path="tidal_vllm.methods.sliding_window.SlidingWindow",
        every_layer=True,
        scored="nothing",
    ),
    "oracle": MethodEntry(
        path="tidal_vllm.methods.oracle.Oracle", every_layer=True, reference_only=False
    ),
}
