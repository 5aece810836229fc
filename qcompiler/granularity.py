"""`Granularity`: which elements of a weight share a scale."""

from __future__ import annotations

import dataclasses

from qcompiler.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Which elements of a weight share a scale and a zero point.

    Attributes:
      channel_group: so many consecutive output channels; 1: each has its own; None: all share one, per tensor. Of a
        weight with several channel dimensions (heads and features), those along the last in the result are grouped.
      input_group: so many consecutive weights of a channel, along what a product sums over, share a step and a zero
        point of their own; the steps are integer multiples of the channel's scale, so that sums stay int32
        (`numerics.groups`). A kernel of fewer input channels has neighbouring taps in its groups. None: one group. A
        weight whose channels have no more elements than that has one group, as have weights of 7 and 8 bits, whose
        steps are those of int8 itself.

    Raises:
      RecipeError: a group is of less than 1.
    """

    channel_group: int | None = 1
    input_group: int | None = None

    def __post_init__(self) -> None:
        for name, what in (("channel_group", "channels"), ("input_group", "weights")):
            size = getattr(self, name)
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise RecipeError(f"{name} is a number of {what} of at least 1, or None; got {size!r}")


#: Granularities that have a name.
GRANULARITIES = {
    "tensor": Granularity(channel_group=None),
    "channel": Granularity(),
    **{f"group{n}": Granularity(input_group=n) for n in (32, 64, 128)},
}


def named(which: str | Granularity) -> Granularity:
    """The granularity of a name, or itself.

    Raises:
      RecipeError: there is none of that name.
    """
    if isinstance(which, Granularity):
        return which
    if not isinstance(which, str) or which not in GRANULARITIES:
        known = ", ".join(map(repr, sorted(GRANULARITIES)))
        raise RecipeError(f"unknown granularity {which!r}; known: {known}, or pass a qc.Granularity")
    return GRANULARITIES[which]
