"""Cross-layer equalization: moves channel scales between products, so that their weights quantize well.

    min(max(x @ W1 + b1, 0), 6) @ W2    ->    min(max(x @ (W1 / s) + b1 / s, 0), 6 / s) @ (s * W2)    s = sqrt(r1 / r2)

Exact, because what stands between commutes with a positive factor per channel, or has a constant that is divided by it
(Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.1). Which
factors may move is found by a walk over the program (`_channel_walk`, with a rule per primitive in `_channel_rules`):
through rectifiers, pools, pads, reshapes and sums. Depthwise convs read and write channels of their own; the weights
that write and read a residual stream share its factors. How far they move is `_balance`'s part. Outputs agree to
float32 rounding.

Weights quantized per tensor need it. Where each channel of a weight has a scale of its own, its activation still has
one for all: then factors move only where most channels would be left with few codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.errors import QuantizationError
from qcompiler.ir import identity
from qcompiler.ir.constants import HUGE
from qcompiler.ir.program import Program
from qcompiler.passes._balance import WeightGroups, balance
from qcompiler.passes._channel_walk import Site, Walk
from qcompiler.passes._replaced import with_constants

#: Channels are far apart where the largest factor is so many times the middle one: most of them use an eighth of the
#: range that all share then, and 5 of its 8 bits. Trained networks stay below, unless something rescaled them.
FAR_APART = 8.0


def equalize(program: Program, least: float = 1.0) -> Program:
    """See the module's docstring.

    Args:
      program: in float, before `partition`.
      least: factors move only where the largest that a weight gets is so many times its middle one; 1 is everywhere.

    Notes `equalized`: `links`, weights that share channels (names of those that write and that read them, how many
    channels, the largest factor, up or down), and `pinned`, name of a weight -> why output channels of it stay.
    Norms that `fold_norms` noted are divided with the results that they describe.
    """
    walk = Walk(program)
    everything = walk.groups.roots(np.arange(len(walk.groups)))
    free = ~walk.groups.is_pinned(everything)
    if least > 1:
        free &= ~_beside_huge(walk)[everything]
        free &= _far_apart(walk, _factors(walk, free), least)[everything]
    factors = _factors(walk, free)
    products = {name: _divided(walk, sites[0], factors) for name, sites in walk.products.items()}
    numbers = [(site.eqn, site.position, _divided(walk, site, factors)) for site in walk.numbers]
    equalized = with_constants(
        program,
        "equalize",
        {name: array for name, array in products.items() if array is not None},
        [(eqn, position, array) for eqn, position, array in numbers if array is not None],
    )
    note = {"links": _links(walk, factors), "pinned": _pinned(walk)}
    return equalized.note("equalized", note).note("norms", _divided_norms(walk, factors))


def _far_apart(walk: Walk, factors: np.ndarray, least: float) -> np.ndarray:
    """Which groups are channels of a weight whose largest factor is so many times the middle one."""
    far = np.zeros(len(factors), bool)
    for sites in walk.products.values():
        own = _own(walk, sites[0])
        if own.size and np.max(factors[own]) >= least * np.median(factors[own]):
            far[own] = True
    return far


def _beside_huge(walk: Walk) -> np.ndarray:
    """Which groups divide numbers that stand for infinity, which a factor would take there."""
    huge = np.zeros(len(walk.groups), bool)
    for site in walk.numbers:
        held = np.abs(np.asarray(walk.constants.value(site.eqn.invars[site.position])).astype(np.float64))
        if np.max(held, initial=0.0, where=np.isfinite(held)) > HUGE:
            huge[np.unique(walk.groups.roots(site.outside))] = True
    return huge


def _own(walk: Walk, site: Site) -> np.ndarray:
    """The groups that a weight writes and that may move."""
    outside = np.unique(walk.groups.roots(site.outside))
    return outside[~walk.groups.is_pinned(outside)]


def _factors(walk: Walk, free: np.ndarray) -> np.ndarray:
    """The factor of each group, whatever it is tied to; of all that are not free, 1."""
    program, groups = walk.program, walk.groups
    everything = groups.roots(np.arange(len(groups)))
    if not free.any():
        return np.ones(len(groups))
    weights = []
    for name, sites in walk.products.items():
        outside, inside = groups.roots(sites[0].outside), groups.roots(sites[0].inside)
        if free[outside].any() or free[inside].any():
            magnitude = np.abs(np.asarray(program.weights[name]).astype(np.float64))
            alone = tuple(d for d in range(magnitude.ndim) if outside.shape[d] == inside.shape[d] == 1)
            with np.errstate(divide="ignore"):
                logs = np.log(magnitude.max(axis=alone, keepdims=True, initial=0.0))
            weights.append(WeightGroups(logs, outside, inside))
    bias = np.zeros(len(groups))
    for site in walk.numbers:
        if site.eqn.primitive.name in ("add", "sub"):
            held = np.abs(np.asarray(walk.constants.value(site.eqn.invars[site.position])).astype(np.float64))
            held, own = np.broadcast_arrays(held, groups.roots(site.outside))
            np.maximum.at(bias, own, held)
    return balance(weights, free, bias)[everything]


def _divided(walk: Walk, site: Site, factors: np.ndarray) -> np.ndarray | None:
    """A constant with the factors in it; None if they are 1."""
    by = factors[site.outside] / (1.0 if site.inside is None else factors[site.inside])
    if np.all(by == 1.0):
        return None
    held = np.asarray(walk.constants.value(site.eqn.invars[site.position]))
    array = (held.astype(np.float64) / by).astype(held.dtype)
    if np.isfinite(held).all() and not np.isfinite(array).all():
        raise QuantizationError(
            f"equalization overflows a constant of {identity.describe(site.eqn)}: recipe equalize=False"
        )
    return array


def _links(walk: Walk, factors: np.ndarray) -> list[dict[str, Any]]:
    """What moved, in the order of the program: one entry for channels that the same weights write."""
    found: dict[bytes, dict[str, Any]] = {}
    reads = {name: np.unique(walk.groups.roots(sites[0].inside)) for name, sites in walk.products.items()}
    for name, sites in walk.products.items():
        own = _own(walk, sites[0])
        if not own.size:
            continue
        readers = [n for n, inside in reads.items() if np.isin(inside, own).any()]
        largest = float(np.exp(np.max(np.abs(np.log(factors[own])))))
        entry = {"writers": [], "readers": readers, "channels": len(own), "largest_factor": largest}
        found.setdefault(own.tobytes(), entry)["writers"].append(name)
    return list(found.values())


def _pinned(walk: Walk) -> dict[str, str]:
    reasons = {name: walk.groups.why_pinned(sites[0].outside) for name, sites in walk.products.items()}
    return {name: "; ".join(why) for name, why in reasons.items() if why}


def _divided_norms(walk: Walk, factors: np.ndarray) -> dict[str, Any]:
    """What `fold_norms` noted of products, of their divided results."""
    norms = dict(walk.program.notes.get("norms", {}))
    for sites in walk.products.values():
        for site in sites:
            var = site.eqn.outvars[0]
            if (norm := norms.get(walk.program.ids[var])) is not None:
                by = factors[walk.of[var]]
                norms[walk.program.ids[var]] = {key: (np.asarray(norm[key]) / by).tolist() for key in norm}
    return norms
