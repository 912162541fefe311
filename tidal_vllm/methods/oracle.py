"""The oracle: every layer chooses by its own exact attention mass."""

from tidal_vllm.methods.tidaldecode import TidalDecode


class Oracle(TidalDecode):
    """The best that a budget allows, as the oracle top-k of arXiv 2410.05076, figure 2.

    Each layer scores all keys, as `TidalDecode` does, and attends to its own choice.
    It reads half of what dense attention reads, so it is there to be compared with: a
    method could win back at most what it loses against the oracle, by choosing better
    blocks.
    """
