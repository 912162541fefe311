"""What a planted model is made of, and which of its layers have to select."""

import math
from dataclasses import dataclass

HEAD_SIZE = 128
CODE_SIZE = 48
ROPE_THETA = 1e10
DTYPES = ("float32", "bfloat16", "float16")

BOS, EOS, UNK, PAD, SEP = SPECIAL_IDS = range(5)

_RANGES = {
    "hops": (1, 4),
    "num_layers": (4, 32),
    "num_heads": (1, 128),
    "num_kv_heads": (1, 128),
    "vocab_size": (64, 16384),
    "max_position_embeddings": (64, 1 << 20),
    "seed": (0, (1 << 63) - 1),
}


@dataclass(frozen=True)
class PlantedSpec:
    """A planted model, completely: equal specs build equal files.

    One hop: the needle ``w0 w1 ... wn <eos>`` is contiguous. Two hops: ``w_i a_i .``
    and, far away, ``a_i w_{i+1} .``; the alias ``a_i`` has to be found before the word
    that follows it can be. More hops lengthen the list of aliases.

    ======================  =====================================================
    layer                   what its heads do
    ======================  =====================================================
    0                       look at the previous token, store its code
    1                       uniform attention, writes nothing
    hop_layers[0] == 2      find the word of hop 1, write nothing
    3 .. hop_layers[1] - 1  the same; the last of them writes the alias
    hop_layers[k]           the first, and for a middle hop the only one, to follow
                            the alias of hop k to what hop k + 1 finds
    output_layers           find the word of the last hop; each writes its share of
                            the answer, and ``<unk>`` wins unless *all* agree
    ======================  =====================================================

    The right SELECT layers are ``select_layers``; ``dense_layers`` come before them.
    Later layers of a hop are no substitute: the layer ``hop_layers[k]`` (k > 0) would
    still attend to the blocks of the hop before, and miss. Earlier layers cannot know
    the alias. More SELECT layers than these do no harm.

    NOTE: keys and values depend on the tokens alone, not on what sparse layers found:
    answers cannot show whether polluted KV was corrected.

    Attributes:
        hops: Look-ups per answered word, 1..4.
        num_layers: 4..32; at least ``hops + 3`` for several hops.
        num_heads: Query heads, a multiple of ``num_kv_heads``.
        num_kv_heads: KV heads. Each KV head stores keys and values under its own signs,
            so that a query head that reads another KV head's cache fails.
        vocab_size: Words and the 5 special tokens, 64..16384.
        max_position_embeddings: Longest sequence, tokens.
        hop_layers: The layer at which each hop starts; left empty, an even spread.
            Starts with 2, rises, and its second entry is at least 4.
        dtype: Type of the saved weights: float32, bfloat16 or float16.
        seed: Seed of the codes, signs and words.

    Raises:
        ValueError: A value is out of range or contradicts another.
    """

    hops: int = 1
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 2048
    max_position_embeddings: int = 131072
    hop_layers: tuple[int, ...] = ()
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, (low, high) in _RANGES.items():
            check_int(key, getattr(self, key), low, high)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: allowed are multiples of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: allowed are {', '.join(DTYPES)}")
        if self.hops > 1 and self.num_layers < self.hops + 3:
            raise ValueError(
                f"num_layers={self.num_layers}: hops={self.hops} needs at least "
                f"{self.hops + 3}"
            )
        object.__setattr__(self, "hop_layers", self._resolve_hop_layers())

    def _resolve_hop_layers(self) -> tuple[int, ...]:
        if self.hop_layers == ():
            spread = (self.num_layers - 2) / self.hops
            later = (max(k + 3, 2 + int(k * spread)) for k in range(1, self.hops))
            return (2, *later)
        listed = isinstance(self.hop_layers, tuple | list)
        layers = tuple(self.hop_layers) if listed else ()
        if (
            len(layers) != self.hops
            or not all(type(layer) is int for layer in layers)
            or list(layers) != sorted(set(layers))
            or layers[0] != 2
            or layers[-1] >= self.num_layers
            or (self.hops > 1 and layers[1] < 4)
        ):
            raise ValueError(
                f"hop_layers={self.hop_layers!r}: allowed are hops={self.hops} rising "
                f"layers, the first 2, the second at least 4, all below "
                f"num_layers={self.num_layers}"
            )
        return layers

    @property
    def head_size(self) -> int:
        """Size of each head, in elements."""
        return HEAD_SIZE

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers before the first hop."""
        return (0, 1)

    @property
    def select_layers(self) -> tuple[int, ...]:
        """The layers that have to select: the first layer of each hop."""
        return self.hop_layers

    @property
    def alias_layers(self) -> tuple[int, ...]:
        """The one layer that writes alias k, for each k in 1..hops-1."""
        return tuple(
            self.hop_layers[1] - 1 if k == 0 else self.hop_layers[k]
            for k in range(self.hops - 1)
        )

    @property
    def output_layers(self) -> range:
        """The layers that write the answer."""
        return range(max(3, self.hop_layers[-1]), self.num_layers)

    @property
    def num_codes(self) -> int:
        """Code-sized subspaces of the residual: current, previous, output, aliases."""
        return 3 + self.hops - 1

    @property
    def hidden_size(self) -> int:
        """A multiple of 64, and of ``num_heads`` because transformers demands it."""
        step = math.lcm(64, self.num_heads)
        return math.ceil((self.num_codes * CODE_SIZE + 2) / step) * step


def check_int(key: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless ``value`` is an int in ``low..high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key}={value!r}: allowed are integers {low}..{high}")
    if not low <= value <= high:
        raise ValueError(f"{key}={value}: allowed is {low}..{high}")
