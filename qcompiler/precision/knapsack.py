"""Which candidate each layer gets: a multiple-choice knapsack with several budgets, groups and conversions, exactly.

    minimize    sum_i loss[i, c_i]  +  sum_(i,j) loss of converting from c_i to c_j
    subject to  sum_i cost_r[i, c_i] + sum_(i,j) cost_r of converting  <=  budget_r      for every resource r
                label_g(c_i) equal for all layers i of a group g

With x[i, c] = 1 where layer i gets candidate c, and y[e, p, q] = 1 where the ends of edge e read types p and q, it is a
mixed-integer linear program (HAWQ-V3, Yao et al. 2021, section 3.4, has the one without edges). Losses are taken to add
up; `repair` looks at what they truly come to.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from qcompiler.errors import RecipeError

#: Layer -> name of its candidate.
Config = dict[str, str]

#: The largest coefficient of the objective: HiGHS stops at an absolute gap of 1e-6, which is then 1e-11 of it.
_LARGEST = 1e5
#: What a sum may exceed its budget by, relatively: rounding of sums of float64.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers whose candidates must agree in something.

    Attributes:
      layers: at least two.
      label: candidate -> what must be equal among the layers (the type of the activations, say).
      why: in a few words, for messages.
    """

    layers: tuple[str, ...]
    label: Mapping[str, Hashable]
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """An edge between two layers that costs something where they read other types.

    Attributes:
      first, second: the layers.
      label: candidate -> the type on which the cost depends.
      cost: (label of the first, label of the second) -> resource -> what it costs; free where it is not said.
    """

    first: str
    second: str
    label: Mapping[str, Hashable]
    cost: Mapping[tuple[Hashable, Hashable], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is chosen, from what, under which budgets.

    Attributes:
      losses: layer -> candidate -> additive loss. Layers may have other candidates than each other.
      costs: resource -> layer -> candidate -> what it takes of the resource.
      budget: resource -> the most of it that all layers together may take.
      groups, conversions: see there.
      weights: resource -> its share in the objective beside the loss; without any, the loss alone is minimized.
    """

    losses: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, Mapping[str, Mapping[str, float]]] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, float] = dataclasses.field(default_factory=dict)
    groups: Sequence[Group] = ()
    conversions: Sequence[Conversion] = ()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if empty := [layer for layer, row in self.losses.items() if not row]:
            raise RecipeError(f"layer {empty[0]} has no candidates")
        for layer, row in self.losses.items():
            if wrong := [c for c, loss in row.items() if not np.isfinite(loss)]:
                raise RecipeError(
                    f"the loss of {layer} as {wrong[0]} is {row[wrong[0]]}: leave that candidate out, or calibrate on "
                    "data on which it is finite"
                )
            for resource in (*self.budget, *self.weights):
                lacking = row.keys() - self.costs.get(resource, {}).get(layer, {}).keys()
                if lacking:
                    raise RecipeError(f"nothing says what {layer} as {min(lacking)} costs of {resource}")
        strangers = {n for g in self.groups for n in g.layers} | {n for e in self.conversions for n in _ends(e)}
        if strangers := strangers - self.losses.keys():
            raise RecipeError(f"a group or conversion speaks of {min(strangers)}, which is no layer of the problem")

    def loss(self, config: Mapping[str, str]) -> float:
        """The predicted loss: the sum over layers."""
        return sum(self.losses[layer][candidate] for layer, candidate in config.items())

    def cost(self, config: Mapping[str, str], resource: str) -> float:
        """What a configuration takes of a resource, conversions counted."""
        table = self.costs[resource]
        of_layers = sum(table[layer][candidate] for layer, candidate in config.items())
        return of_layers + sum(_between(e, config).get(resource, 0.0) for e in self.conversions)

    def objective(self, config: Mapping[str, str]) -> float:
        """What is minimized: the loss, and resources by their weights."""
        return self.loss(config) + sum(w * self.cost(config, resource) for resource, w in self.weights.items())

    def allows(self, config: Mapping[str, str]) -> bool:
        """Whether a configuration keeps to the budgets and the groups."""
        if any(len({g.label[config[n]] for n in g.layers}) > 1 for g in self.groups):
            return False
        return all(
            self.cost(config, resource) <= most + _ROUNDING * abs(most) for resource, most in self.budget.items()
        )

    def minimum(self, resource: str) -> float:
        """The least that any configuration takes of a resource, whatever the budgets."""
        return self.cost(cheapest(dataclasses.replace(self, budget={}), resource), resource)


def choose(
    losses: Mapping[str, Mapping[str, float]],
    costs: Mapping[str, Mapping[str, Mapping[str, float]]],
    budget: Mapping[str, float],
    groups: Sequence[Group] = (),
    conversions: Sequence[Conversion] = (),
    weights: Mapping[str, float] | None = None,
) -> Config:
    """The configuration of least loss within all budgets; arguments are the attributes of `Problem`.

    Raises:
      RecipeError: the problem contradicts itself, or no configuration keeps to the budgets; says how little is
        reachable.
    """
    return solve(Problem(losses, costs, budget, groups, conversions, weights or {}))


def solve(problem: Problem) -> Config:
    """The optimum of a problem; see `choose`."""
    found = _solved(problem)
    if found is None:
        raise RecipeError(_why_infeasible(problem))
    return found


def cheapest(problem: Problem, resource: str) -> Config:
    """The configuration within all budgets that takes least of a resource.

    Raises:
      RecipeError: no configuration keeps to the budgets.
    """
    found = _solved(_of_one(problem, resource, problem.budget), resource)
    if found is None:
        raise RecipeError(_why_infeasible(problem))
    return found


def enumerate_configs(problem: Problem) -> list[Config]:
    """Every configuration that the problem allows; for small problems only, there are exponentially many."""
    rows = [list(row) for row in problem.losses.values()]
    configs = (dict(zip(problem.losses, chosen, strict=True)) for chosen in itertools.product(*rows))
    return [c for c in configs if problem.allows(c)]


def _of_one(problem: Problem, resource: str, budget: Mapping[str, float]) -> Problem:
    """The problem of taking least of a resource, which stands for the loss."""
    losses = {n: {c: problem.costs[resource][n][c] for c in row} for n, row in problem.losses.items()}
    return dataclasses.replace(problem, losses=losses, budget=budget, weights={})


def _ends(edge: Conversion) -> tuple[str, str]:
    return edge.first, edge.second


def _between(edge: Conversion, config: Mapping[str, str]) -> Mapping[str, float]:
    return edge.cost.get((edge.label[config[edge.first]], edge.label[config[edge.second]]), {})


def _why_infeasible(problem: Problem) -> str:
    """In words, which budget is too small and what could be reached."""
    free = dataclasses.replace(problem, budget={}, weights={})
    if _solved(free) is None:
        raise RecipeError(
            "no configuration gives the layers of every group one type: "
            + "; ".join(f"{', '.join(g.layers)} ({g.why})" for g in problem.groups)
        )
    for resource, most in problem.budget.items():
        if (least := problem.minimum(resource)) > most + _ROUNDING * abs(most):
            return (
                f"no configuration of these candidates keeps to {resource} <= {most:g}; the smallest reachable is "
                f"{least:g}: raise the budget, or add a cheaper candidate"
            )
    *others, last = problem.budget
    for n in range(1, len(others) + 1):
        # The first budget that those before it leave no room for.
        kept = {r: problem.budget[r] for r in [*others, last][:n]}
        resource = [*others, last][n]
        found = _solved(_of_one(problem, resource, kept), resource)
        if found is not None and (least := problem.cost(found, resource)) > problem.budget[resource]:
            return (
                f"no configuration keeps to all budgets at once: with {_listed(kept)} the smallest reachable "
                f"{resource} is {least:g}, and {problem.budget[resource]:g} is asked for"
            )
    return f"no configuration keeps to {_listed(problem.budget)} at once"


def _listed(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{resource} <= {most:g}" for resource, most in budget.items())


def _solved(problem: Problem, of_edges: str | None = None) -> Config | None:
    """The optimum, or None if nothing is feasible.

    Args:
      problem: whose `losses` are minimized.
      of_edges: the resource of conversions that counts as loss too.
    """
    program = _MILP(problem, of_edges)
    while True:
        config = program.solve()
        if config is None or problem.allows(config):
            return config
        # Within the solver's tolerance of a budget, but beyond it.
        program.forbid(config)


class _MILP:
    """The mixed-integer linear program of a problem: its variables in a row, its constraints as sparse rows."""

    def __init__(self, problem: Problem, of_edges: str | None) -> None:
        self.problem = problem
        self.at: dict[tuple[Hashable, ...], int] = {}
        objective: list[float] = []
        for layer, row in problem.losses.items():
            for candidate, loss in row.items():
                self.at[layer, candidate] = len(objective)
                extra = sum(w * problem.costs[r][layer][candidate] for r, w in problem.weights.items())
                objective.append(loss + extra)
        self.choices = len(objective)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        for layer, row in problem.losses.items():
            self.rows.append(({self.at[layer, c]: 1.0 for c in row}, 1.0, 1.0))
        self._group()
        for number, edge in enumerate(problem.conversions):
            for pair in self._pairs(number, edge):
                cost = edge.cost.get(pair, {})
                extra = sum(w * cost.get(r, 0.0) for r, w in problem.weights.items())
                self.at[number, *pair] = len(objective)
                objective.append(extra + (cost.get(of_edges, 0.0) if of_edges else 0.0))
            self._tie(number, edge)
        self._spend()
        self.objective = np.asarray(objective)

    def _labels(self, layer: str, label: Mapping[str, Hashable]) -> dict[Hashable, list[int]]:
        """Label -> the variables of a layer's candidates that have it."""
        found: dict[Hashable, list[int]] = {}
        for candidate in self.problem.losses[layer]:
            found.setdefault(label[candidate], []).append(self.at[layer, candidate])
        return found

    def _group(self) -> None:
        for group in self.problem.groups:
            first, *others = (self._labels(layer, group.label) for layer in group.layers)
            for other in others:
                for label in first.keys() | other.keys():
                    row = dict.fromkeys(first.get(label, ()), 1.0) | dict.fromkeys(other.get(label, ()), -1.0)
                    self.rows.append((row, 0.0, 0.0))

    def _pairs(self, number: int, edge: Conversion) -> list[tuple[Hashable, Hashable]]:
        first, second = (self._labels(n, edge.label) for n in _ends(edge))
        return list(itertools.product(first, second))

    def _tie(self, number: int, edge: Conversion) -> None:
        """y[p, q] sums to x[p] over q and to x[q] over p: with x of zeros and ones, y is exactly x[p] x[q]."""
        ends = [self._labels(n, edge.label) for n in _ends(edge)]
        for side, labels in enumerate(ends):
            for label, choices in labels.items():
                row = {self.at[number, *p]: -1.0 for p in itertools.product(*ends) if p[side] == label}
                self.rows.append((row | dict.fromkeys(choices, 1.0), 0.0, 0.0))

    def _spend(self) -> None:
        for resource, most in self.problem.budget.items():
            row: dict[int, float] = {}
            for layer, candidates in self.problem.losses.items():
                for candidate in candidates:
                    row[self.at[layer, candidate]] = self.problem.costs[resource][layer][candidate]
            for number, edge in enumerate(self.problem.conversions):
                for pair in self._pairs(number, edge):
                    row[self.at[number, *pair]] = edge.cost.get(pair, {}).get(resource, 0.0)
            # Bytes go into millions: rows of one size meet the solver's absolute tolerance alike.
            size = max(abs(most), max(map(abs, row.values())), 1e-300)
            self.rows.append(({k: v / size for k, v in row.items()}, -np.inf, most / size + _ROUNDING))

    def forbid(self, config: Config) -> None:
        """Leaves a configuration out."""
        chosen = {self.at[layer, candidate]: 1.0 for layer, candidate in config.items()}
        self.rows.append((chosen, -np.inf, len(chosen) - 1.0))

    def solve(self) -> Config | None:
        """The optimum, or None."""
        # Loading the solvers takes as long as all of qcompiler.
        from scipy import optimize, sparse

        count = len(self.objective)
        entries = [(i, k, v) for i, (row, _, _) in enumerate(self.rows) for k, v in row.items()]
        i, k, v = zip(*entries, strict=True)
        matrix = sparse.csr_array((v, (i, k)), shape=(len(self.rows), count))
        low, high = ([r[side] for r in self.rows] for side in (1, 2))
        largest = np.abs(self.objective).max()
        found = optimize.milp(
            self.objective * (_LARGEST / largest if largest > 0 else 1.0),
            constraints=optimize.LinearConstraint(matrix, low, high),
            integrality=np.arange(count) < self.choices,
            bounds=optimize.Bounds(0.0, 1.0),
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:
            return None
        if found.x is None:
            raise RecipeError(f"the solver found no assignment of precisions: {found.message}")
        return {layer: max(row, key=lambda c: found.x[self.at[layer, c]]) for layer, row in self.problem.losses.items()}
