"""The role of every layer of a model, as a plan that the start-up log shows."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class Role(enum.Enum):
    """What a layer does in a sparse decode step."""

    DENSE = "dense"  # attends to everything
    SELECT = "select"  # chooses, and attends to everything or to what it chose
    SPARSE = "sparse"  # attends to what was chosen
    OTHER = "other"  # does as the model has it: a sliding window, a state


@dataclass(frozen=True)
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
