"""Compare methods at equal CPU time: choose the settings of each, then train it with all seeds.

Every run is one JSON file in the output folder. A run whose file exists is not repeated, so a
comparison that was stopped continues where it was.

1. Cost: the CPU seconds of one step of each method give the number of its steps.
2. Sweep: each method is trained with settings of one grid, on seed 0 and with the whole CPU time,
   and judged on validation data. While the best setting lies at an end of the grid, the grid is
   extended there. Of settings whose scores differ by noise only, the smallest rate is taken.
3. Comparison: each method is trained with its best setting and all seeds. All runs are measured on
   test data.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.manifold import figures, training
from benchmarks.manifold.methods import RECIPES
from benchmarks.manifold.output import Row, Store
from benchmarks.manifold.sets import SETS
from benchmarks.manifold.training import Method
from mflow_kernels.data.batches import BatchStream
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.splits import ImageSet

BATCH = 64
NOISE = 0.1  # of a score, which is of few validation images; high rates fail on some seeds
COST_ROUNDS = 3  # rounds of timing; the smallest cost counts, as other processes only add time


class Settings(NamedTuple):
    """The choice of a sweep: learning rate, and weight of the reconstruction error."""

    rate: float
    weight: float


@dataclass(frozen=True)
class Comparison:
    """A set of images on which methods are compared.

    Attributes:
        name: name of the comparison, in file names.
        set: name of the images.
        seconds: CPU seconds of a training.
        rates: learning rates of the sweep, a geometric sequence that rises.
        weights: weights of the sweep, of the same kind. The middle one is used while rates are
            compared, and the other ones are then compared at the best rate. Methods whose recipe
            has a weight have no others.
        extensions: how often each grid is extended at most.
    """

    name: str
    set: str
    seconds: float
    rates: tuple[float, ...]
    weights: tuple[float, ...]
    extensions: int

    def choose(
        self, store: Store, found: Sequence[str], start: Mapping[str, Settings] | None = None
    ) -> dict[str, Settings]:
        """Make the runs of the sweep that the store lacks; return the best settings by method.

        Args:
            found: methods.
            start: settings by method, of a shorter training. A sweep then has two rates, this one
                and the next smaller one, and keeps the weight.
        """
        self._measure_costs(store, found)
        chosen = {}
        for name in found:
            row = store.row(
                f"{self.name}-settings-{name}",
                lambda name=name: self._sweep(store, name, start and start[name])._asdict(),
            )
            chosen[name] = Settings(row["rate"], row["weight"])
        return chosen

    def compare(self, store: Store, chosen: Mapping[str, Settings], seeds: Sequence[int]) -> None:
        """Make the runs of the comparison that the store lacks."""
        self._measure_costs(store, list(chosen))
        for seed in seeds:
            for name, settings in chosen.items():
                self.train(store, name, settings, seed)

    def train(self, store: Store, name: str, settings: Settings, seed: int) -> Row:
        """Return the row of one training, from the store or made now.

        Trainings with seed 0 are also measured on validation data, because they may be of a sweep.
        """
        steps = self.steps(store, name)
        about = {"set": self.name, "method": name, "seed": seed, "budget": self.seconds}
        about |= settings._asdict() | {"steps": steps}
        key = f"{self.name}-run-{name}-rate{settings.rate}-weight{settings.weight}-seed{seed}"
        return store.row(key, lambda: about | self._train(name, settings, seed, steps))

    def steps(self, store: Store, name: str) -> list[int]:
        """Return the number of steps of each phase, once the method's cost is known."""
        return [
            max(2, round(self.seconds * phase_share / cost))
            for phase_share, cost in self._costs(store, name)
        ]

    def fit(
        self, name: str, settings: Settings, seed: int, steps: Sequence[int]
    ) -> tuple[Method, float]:
        """Train a method; return it and the CPU seconds.

        Raises:
            FloatingPointError: the loss or the gradient is not finite.
        """
        method, batches = self._start(name, settings, seed)
        return method, training.train(method, batches, steps, settings.rate)

    def _train(
        self, name: str, settings: Settings, seed: int, steps: Sequence[int]
    ) -> dict[str, Any]:
        try:
            method, seconds = self.fit(name, settings, seed, steps)
        except FloatingPointError as error:
            return {"failed": str(error)}
        row: dict[str, Any] = {"seconds": seconds, "parameters": method.parameters()}
        if seed == 0:
            row["validation"] = figures.validate(self.set, method)
        return row | figures.measure(self.set, method)

    def _start(self, name: str, settings: Settings, seed: int) -> tuple[Method, Iterator[Tensor]]:
        """Build a method with new networks, and its data."""
        torch.manual_seed(seed)  # for the weights
        generator = torch.Generator().manual_seed(seed)
        train = SETS[self.set]().train.images
        data = dequantize(train, 8, torch.Generator().manual_seed(0))
        method = RECIPES[name].build(data, settings.weight, generator)
        noise = torch.Generator().manual_seed(seed + 1)
        stream = BatchStream(ImageSet(train), BATCH, seed)
        return method, (dequantize(batch, 8, noise) for batch in stream)

    def _sweep(self, store: Store, name: str, start: Settings | None) -> Settings:
        """Search the best rate and then, at this rate, the best weight."""
        if not self._costs(store, name):
            return Settings(0.0, 1.0)  # nothing to train

        def swept(rate: float, weight: float) -> Row:
            return self.train(store, name, Settings(rate, weight), 0)

        fixed = RECIPES[name].weight
        if start is None:
            rates = [float(f"{rate * RECIPES[name].slower:.3g}") for rate in self.rates]
            weight = fixed or self.weights[len(self.weights) // 2]
        else:
            smaller = start.rate * self.rates[0] / self.rates[1]
            rates, weight = [float(f"{smaller:.3g}"), start.rate], start.weight
        rows = self._search(rates, lambda rate: swept(rate, weight))
        if start is None and RECIPES[name].weighted and fixed is None:
            rate = self._best(rows)["rate"]
            rows += self._search(self.weights, lambda weight: swept(rate, weight))
        best = self._best(rows)
        return Settings(best["rate"], best["weight"])

    def _best(self, rows: Sequence[Row]) -> Row:
        """Return the best row, or one of a smaller rate whose score is as good within NOISE."""
        best = min(rows, key=self._order)
        if RECIPES[best["method"]].by_likelihood:
            return best
        near = [row for row in rows if self._order(row) <= (1 + NOISE) * self._order(best)]
        return min(near, key=lambda row: (row["rate"], self._order(row)))

    def _search(self, grid: Sequence[float], result: Callable[[float], Row]) -> list[Row]:
        """Return the results for a grid, extended while the best one is at an end of it."""
        rows = {value: result(value) for value in grid}
        for _ in range(self.extensions):
            tried = sorted(rows)
            best = min(tried, key=lambda value: self._order(rows[value]))
            if best not in (tried[0], tried[-1]):
                break
            inner = tried[1] if best == tried[0] else tried[-2]
            beyond = float(f"{best * best / inner:.3g}")
            rows[beyond] = result(beyond)
        return list(rows.values())

    def _order(self, row: Row) -> float:
        """Return what the sweep minimizes: the score, or the bits per dimension of methods that
        maximize only the likelihood. Plain likelihood is the reference for these."""
        key = "bits" if RECIPES[row["method"]].by_likelihood else "score"
        rank = None if "failed" in row else row["validation"][key]
        return math.inf if rank is None or not math.isfinite(rank) else rank

    def _measure_costs(self, store: Store, found: Sequence[str]) -> None:
        """Time a few steps of all methods in turn, so that a busy machine disturbs all alike."""
        todo = [name for name in found if not store.has(self._cost_key(name))]
        costs: dict[str, list[list[float]]] = {name: [] for name in todo}
        settings = Settings(1e-4, self.weights[0])
        for _ in range(COST_ROUNDS):
            for name in todo:
                method, batches = self._start(name, settings, 0)
                costs[name].append(training.step_seconds(method, batches, settings.rate))
        for name in todo:
            shares = [phase.share for phase in self._start(name, settings, 0)[0].phases]
            least = [min(column) for column in zip(*costs[name], strict=True)]
            cost = {"shares": shares, "step_seconds": least}
            store.row(self._cost_key(name), lambda cost=cost: cost)

    def _costs(self, store: Store, name: str) -> list[tuple[float, float]]:
        """Return the share and the seconds per step of each phase."""
        found = store.read(self._cost_key(name))
        return list(zip(found["shares"], found["step_seconds"], strict=True))

    def _cost_key(self, name: str) -> str:
        return f"{self.name}-cost-{name}"


def finals(store: Store, name: str, swept: str | None = None) -> list[Row]:
    """Return the rows of a comparison with the settings of a sweep, in the order of the methods.

    Args:
        name: of the comparison.
        swept: name of the comparison whose sweep chose the settings; by default, `name`.
    """
    rows = store.rows(f"{name}-run-")
    found = {row["method"] for row in rows}
    keys = {method: f"{swept or name}-settings-{method}" for method in found}
    chosen = {method: store.read(key) for method, key in keys.items() if store.has(key)}
    return in_order(
        [
            row
            for row in rows
            if (best := chosen.get(row["method"]))
            and (row["rate"], row["weight"]) == (best["rate"], best["weight"])
        ]
    )


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return rows in the order of the methods, with the columns of ABOUT."""
    order = list(RECIPES)

    def place(row: Row) -> tuple[int, float, float, int]:
        return order.index(row["method"]), row["budget"], row["weight"], row["seed"]

    return [
        row
        | {
            "rate_shown": row["rate"] if row["steps"] else "-",
            "weight_shown": row["weight"] if RECIPES[row["method"]].weighted else "-",
            "steps_shown": " + ".join(map(str, row["steps"])) or "-",
        }
        for row in sorted(rows, key=place)
    ]


# Columns about a training.
ABOUT = {
    "rate_shown": ("learning rate", "g"),
    "weight_shown": ("weight", "g"),
    "steps_shown": ("steps", ""),
    "parameters": ("parameters", ".0f"),
    "seconds": ("CPU s", ".1f"),
}


def about_runs(rows: Sequence[Row]) -> str:
    """Return a line with seeds, dates, versions and machines of these runs.

    Rows of earlier versions did not record their machine.
    """
    found = {"seeds": {row["seed"] for row in rows}}
    names = {"commits": "commit", "dates": "date", "torch": "torch", "on": "cpu"}
    for name, key in names.items():
        found[name] = {row["made"][key] for row in rows if key in row["made"]}
    parts = [f"{name} {', '.join(map(str, sorted(v)))}" for name, v in found.items() if v]
    return f"\nRuns: {'; '.join(parts)}.\n"
