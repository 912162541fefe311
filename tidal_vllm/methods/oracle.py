"""The oracle: every layer chooses by its own exact attention mass."""

from tidal_vllm.methods.tidaldecode import TidalDecode


class Oracle(TidalDecode):
    """What exact scores in every layer would give: a bound for the other methods.

    Each layer scores all keys, as `TidalDecode` does, and attends to its own choice.
    It reads half of what dense attention reads, so it is there to be compared with: a
    method could win back at most what it loses against the oracle, by choosing better
    blocks.
    """
