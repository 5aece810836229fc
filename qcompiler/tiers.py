"""Tiers of sensitivity: layers in order of what they lose, cut into high, medium and low."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qcompiler.errors import RecipeError
from qcompiler.ir import patterns

TIERS = ("high", "medium", "low")


def check(shares: Sequence[float], criticality: Mapping[str, float]) -> None:
    """Raises `RecipeError` unless shares and criticality are what `split` takes."""
    # 0.7 + 0.3 may come to a little more than 1.
    if len(shares) != 2 or not all(0 <= s <= 1 for s in shares) or sum(shares) > 1 + 1e-9:
        raise RecipeError(f"shares are those of the high and of the medium tier, at most 1 together; got {shares!r}")
    if wrong := {glob: weight for glob, weight in criticality.items() if not 0 < weight < math.inf}:
        raise RecipeError(f"criticality is a positive weight per glob, got {wrong}")


def split(
    losses: Mapping[str, float], shares: Sequence[float], criticality: Mapping[str, float]
) -> dict[str, tuple[str, ...]]:
    """Tier -> layers, the most sensitive first; equal ones in their order.

    Args:
      losses: layer id -> loss; one that is not known (NaN) counts as the worst.
      shares: of the layers that are high and medium; the rest is low.
      criticality: glob on a layer's id or module path -> factor on its loss; the first that matches, 1 if none does.

    Raises:
      RecipeError: see `check`; or a glob matches no layer.
    """
    check(shares, criticality)
    names = {layer: (layer, layer.rpartition("/")[0]) for layer in losses}
    meant = lambda glob, layer: any(patterns.matches(glob, name) for name in names[layer])
    for glob in criticality:
        if not any(meant(glob, layer) for layer in losses):
            raise RecipeError(f"the criticality of {glob!r} is of no layer; there are {', '.join(losses)}")

    def harm(layer: str) -> float:
        weighted = losses[layer] * next((f for glob, f in criticality.items() if meant(glob, layer)), 1.0)
        return math.inf if math.isnan(weighted) else weighted

    ordered = sorted(losses, key=harm, reverse=True)
    high, medium = (round(sum(shares[:k]) * len(ordered)) for k in (1, 2))
    parts = ordered[:high], ordered[high:medium], ordered[medium:]
    return {tier: tuple(part) for tier, part in zip(TIERS, parts, strict=True)}
