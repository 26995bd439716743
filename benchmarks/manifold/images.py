"""Digits and patches of photographs: likelihood, reconstructions and samples of every method."""

from benchmarks.manifold import pictures, tables
from benchmarks.manifold.comparison import ABOUT, Comparison, Settings, about_runs, finals, in_order
from benchmarks.manifold.judge import judge
from benchmarks.manifold.methods import RECIPES
from benchmarks.manifold.output import Row, Store, markdown
from benchmarks.manifold.sets import SETS

METRICS = {
    "bits": ("bits per dimension", ".3f"),
    "squared_error": ("reconstruction error (MSE)", ".5f"),
    "frechet_projections": ("Frechet distance of projections", ".2f"),
    "frechet_on": ("of samples, v = 0", ".1f"),
    "frechet_off": ("v drawn", ".1f"),
}
FURTHER = {
    "auroc_bits": ("AUROC of bits", ".3f"),
    "auroc_error": ("AUROC of the reconstruction error", ".3f"),
    "dimension": ("local dimension", ".0f"),
}
DIFFERENCES = "Differences on the same seed, with 95% confidence intervals of their means"
REFERENCE = "penalized, hierarchy"  # the method that the others are compared with, seed by seed

CLAIMED = (  # the methods with five seeds; the others have three
    "plain likelihood",
    "plain likelihood, prior flow",
    "penalized, hierarchy",
    "VAE, prior flow",
    "plain Jet",
    "plain Jet, prior flow",
    "penalized Jet, hierarchy",
    "plain TarFlow",
)
DRAWN = ("principal components, prior flow", "autoencoder, prior flow", "M-flow")  # beside them
OTHERS = ("M-flow", "penalized, hierarchy, spline prior", "penalized, hierarchy, TarFlow prior")
# CPU seconds of a training on the digits, and the methods that are trained for so long, with the
# number of their seeds. The first budget is that of all methods.
BUDGETS = {
    20.0: dict.fromkeys(CLAIMED, 5) | dict.fromkeys(OTHERS, 3),
    60.0: {
        "plain likelihood, prior flow": 5,
        "penalized, hierarchy": 5,
        "VAE, prior flow": 5,
        "plain Jet, prior flow": 3,
        "penalized Jet, hierarchy": 3,
        "plain TarFlow": 3,
    }
    | dict.fromkeys(OTHERS, 3),
    180.0: {
        "plain likelihood, prior flow": 5,
        "penalized, hierarchy": 5,
        "VAE, prior flow": 3,
        "plain Jet, prior flow": 3,
        "penalized Jet, hierarchy": 3,
        "plain TarFlow": 3,
    },
}
SHORTEST = min(BUDGETS)
# Methods that are also trained with other weights, for the frontier of likelihood against error.
FRONTIER = ("denoising flow", "penalized, hierarchy", "error bound, hierarchy")
FRONTIER_FACTORS = (1 / 16, 1 / 4, 4.0)
SEEDS, FEWER_SEEDS = range(5), range(3)


def comparison(name: str, quick: bool, seconds: float = SHORTEST) -> Comparison:
    key = name if seconds == SHORTEST else f"{name}-{seconds:g}s"
    rates, weights, extensions = (6.4e-3, 1.6e-2, 4e-2), (25.0, 100.0, 400.0), 3
    if quick:
        seconds, rates, weights, extensions = 2.5, (1.6e-2,), (100.0,), 0
    return Comparison(key, name, seconds, rates, weights, extensions)


def run(name: str, store: Store, quick: bool) -> None:
    """Make the runs of a set. The sweep on the digits chooses the settings of both sets."""
    digits = comparison("digits", quick)
    if quick:
        chosen = digits.choose(store, [*RECIPES])
        comparison(name, quick).compare(store, chosen, range(1))
        return
    chosen = {}
    for group, seeds in (
        ([method for method in RECIPES if method in CLAIMED], SEEDS),
        ([method for method in RECIPES if method not in CLAIMED], FEWER_SEEDS),
    ):
        settings = digits.choose(store, group)
        comparison(name, quick).compare(store, settings, seeds)
        chosen |= settings
    if name == "digits":
        _frontier(digits, store, chosen)


def run_longer(store: Store, quick: bool) -> None:
    """Make the runs on digits with more CPU time, each budget's settings from those before it."""
    chosen: dict[str, Settings] | None = None
    for seconds, methods in () if quick else BUDGETS.items():
        compared = comparison("digits", quick, seconds)
        chosen = compared.choose(store, [*methods], chosen)
        for name, seeds in methods.items():
            compared.compare(store, {name: chosen[name]}, range(seeds))


def run_one(store: Store, method: str, seed: int, seconds: float) -> Row:
    """Return the row of one method, seed and budget on digits, and make what the store lacks of it:
    the sweeps of this budget and of the shorter ones, and the training."""
    chosen = None
    for budget in sorted(budget for budget in BUDGETS if budget <= seconds):
        compared = comparison("digits", False, budget)
        chosen = compared.choose(store, [method], chosen)
    assert chosen is not None
    return compared.train(store, method, chosen[method], seed)


def _frontier(digits: Comparison, store: Store, chosen: dict[str, Settings]) -> None:
    for method in FRONTIER:
        for factor in FRONTIER_FACTORS:
            weight = factor * chosen[method].weight
            for seed in FEWER_SEEDS:
                digits.train(store, method, chosen[method]._replace(weight=weight), seed)


def report(name: str, store: Store) -> dict[str, str]:
    """Draw the pictures of the runs of a set, and return their tables by name."""
    rows = [_flat(row) for row in finals(store, name, "digits")]
    images, judged = SETS[name](), judge(name)
    drawn = [row for row in rows if row["method"] in (*CLAIMED, *DRAWN)]
    pictures.draw_samples(store.folder / f"samples_{name}.png", name, drawn, images.test.images)
    found = {n: finals(store, n, "digits") for n in SETS}
    frontier = _other_weights(store)
    pictures.draw_frontier(store.folder / "frontier.png", found, {"digits": frontier})
    n = len(images.test.images)
    floor = judged.frechet(images.train.images[:n], images.test)
    main = [
        markdown(rows, {"method": "method"}, METRICS | FURTHER),
        f"\nThe Frechet distance of {n} training images is {floor:.2f}; samples of a perfect "
        f"model would have about as much. The classifier is right on {judged.accuracy:.1%} of the "
        "test images.",
        about_runs(rows),
    ]
    details = []
    if differences := tables.differences(rows, REFERENCE, METRICS | FURTHER):
        details += [f"{DIFFERENCES}:\n", differences]
    details += ["Settings and costs:\n", markdown(rows, {"method": "method"}, ABOUT), ""]
    if name != "digits":
        return {name: "\n".join(main), f"{name}-details": "\n".join(details) + "\n"}
    details += ["The sweep, on seed 0:\n"]
    details += [tables.sweep(store.rows("digits-run-"))]
    shown = [row | {n: f"{row[n]:g}" for n in ("rate", "weight")} for row in frontier]
    keys = {"method": "method", "rate": "learning rate", "weight": "weight"}
    details += ["Other weights:\n", markdown(shown, keys, METRICS)]
    return {
        name: "\n".join(main),
        f"{name}-details": "\n".join(details) + "\n",
        f"{name}-budgets": _budgets(store),
    }


def _budgets(store: Store) -> str:
    """Return the table of all budgets on the digits, and draw it."""
    rows: list[Row] = []
    for seconds, methods in BUDGETS.items():
        name = comparison("digits", False, seconds).name
        rows += [_flat(row) for row in finals(store, name) if row["method"] in methods]
    rows = in_order(rows)
    pictures.draw_budgets(store.folder / "plateau.png", rows)
    shown = [row | {"seconds_of": f"{row['budget']:g} s"} for row in rows]
    keys = {"method": "method", "seconds_of": "CPU time"}
    about = {"rate_shown": ABOUT["rate_shown"], "steps_shown": ABOUT["steps_shown"]}
    return markdown(shown, keys, METRICS | FURTHER | about) + about_runs(shown)


def _other_weights(store: Store) -> list[Row]:
    """Return the runs of each method of FRONTIER at the rate with which most weights were tried."""
    found = []
    for method in FRONTIER:
        rows = [row for row in store.rows("digits-run-") if row["method"] == method]
        weights: dict[float, set[float]] = {}
        for row in rows:
            weights.setdefault(row["rate"], set()).add(row["weight"])
        most = max(weights, key=lambda rate: len(weights[rate]), default=None)
        if most is not None and len(weights[most]) > 1:
            found += [row for row in rows if row["rate"] == most]
    return in_order(found)


def _flat(row: Row) -> Row:
    """Return a row with the means of its AUROC over the sets."""
    if "failed" in row:
        return row
    sets = row["auroc"].values()
    means = {}
    for score in ("bits", "error"):
        values = [own[score] for own in sets if score in own]
        means[f"auroc_{score}"] = sum(values) / len(values) if values else None
    return row | means
