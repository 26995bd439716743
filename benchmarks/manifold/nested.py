"""Manifolds that nest: the reconstruction error of one model at several dimensions.

    mflow train --preset digits_nested --run-dir runs/nested
    python -m benchmarks.manifold.nested runs/nested --docs docs/method.md

The stages of a hierarchy are manifolds that nest, and so are the selections of d latents of one
image flow. For every d of the runs' stages, the table compares them with principal components. Each
run has a JSON file in the output folder, named after its options and weights, and is not measured
again if the file exists.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.output import command_parser, save_text
from benchmarks.manifold.comparison import about_runs
from benchmarks.manifold.figures import project
from benchmarks.manifold.output import Row, Store, fill_in, markdown, run_key
from benchmarks.manifold.principal_components import PrincipalComponents
from mflow_kernels import ManifoldFlow, manifold_mask_from_data
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.splits import load_splits
from mflow_kernels.runs.folder import Run, load_run

IMPORTANCE_IMAGES = 250  # training images that choose the most important latents
COLUMNS = {
    "stages": ("stages of the hierarchy", ".5f"),
    "coarsest": ("coarsest latents of the image flow", ".5f"),
    "important": ("most important latents of the image flow", ".5f"),
    "components": ("principal components", ".5f"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmarks.manifold.nested", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of mflow train")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of the table")
    parser.add_argument("--docs", type=Path, help="Markdown file that takes the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    store = Store(options.out)
    runs = [load_run(str(folder)) for folder in options.runs]
    rows = [store.row(f"nested-{run_key(run)}", partial(measure, run)) for run in runs]
    text = table(rows)
    save_text(store.folder / "nested.md", text)
    print(text)
    if options.docs:
        fill_in(options.docs, store.folder)


@torch.no_grad()
def measure(run: Run) -> Row:
    """Return the errors of a run's manifolds, and those of others of the same dimensions."""
    splits = load_splits(run.config.data, run.config.image_size)
    generator = torch.Generator().manual_seed(0)
    train, held_out = (
        dequantize(part.batch(range(len(part))), run.config.n_bits, generator)
        for part in (splits.train, splits.test)
    )
    image_flow = run.model.stages[0]
    assert isinstance(image_flow, ManifoldFlow)
    flow = image_flow.flow
    rows: dict[str, dict[str, float]] = {}
    for count, stage in enumerate(run.config.flows, start=1):
        d = stage.dim
        chosen = manifold_mask_from_data(flow, train[:IMPORTANCE_IMAGES], d, generator=generator)
        charts = {
            "coarsest": ManifoldFlow(flow, d),
            "important": ManifoldFlow(flow, mask=chosen),
            "components": ManifoldFlow(PrincipalComponents(train, d), d),
        }
        rows[str(d)] = {
            "stages": _error(held_out, run.model.project(held_out, stages=count).clamp(-0.5, 0.5)),
            **{name: _error(held_out, project(chart, held_out)) for name, chart in charts.items()},
        }
    return {"seed": run.config.seed, "errors": rows}


def table(rows: Sequence[Row]) -> str:
    """Return a table of errors, one line for each dimension, and the provenance."""
    lines = [{"d": d} | errors for row in rows for d, errors in row["errors"].items()]
    return markdown(lines, {"d": "d"}, COLUMNS) + "\n" + about_runs(rows)


def _error(x: Tensor, projected: Tensor) -> float:
    return (projected - x).square().mean().item()


if __name__ == "__main__":
    main()
