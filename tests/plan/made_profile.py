"""A profile that no file holds."""

from tidal_vllm.profiles import PACKAGED_DIR, Profile


def make_profile(
    dense: tuple[int, ...] = (0, 1),
    select: tuple[int, ...] = (2, 5),
    num_layers: int = 8,
    name: str = "eight",
) -> Profile:
    """A profile of these DENSE and SELECT layers, for models whose name begins so."""
    return Profile(
        name=name,
        models=(f"{name}*",),
        num_hidden_layers=num_layers,
        dense_layers=dense,
        select_layers=select,
        source="this test",
        path=PACKAGED_DIR / f"{name}.json",
    )
