"""Draw the pictures of the README, of docs/method.md and of the tutorial that show a run.

    mflow train --run-dir runs/default
    python -m benchmarks.readme_pictures runs/default

`python -m benchmarks.report` draws those that show figures of benchmarks, and
`python -m benchmarks.manifold --docs` frontier.png and plateau.png.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from PIL import Image

from benchmarks.harness.output import command_parser
from mflow_kernels.data.files import write_atomically
from mflow_kernels.evaluation.likelihood import held_out_images
from mflow_kernels.evaluation.pictures import draw_images
from mflow_kernels.evaluation.samples import (
    draw_samples,
    inpaint_images,
    known_pixels,
    project_images,
)
from mflow_kernels.runs.folder import Run, load_run

DOCS = Path(__file__).parent.parent / "docs"
PICTURES = DOCS / "pictures"
SAMPLES = 12
MISSING: tuple[Literal["half", "centre", "pixels"], ...] = ("half", "centre", "pixels")


def draw_run(run: Run, path: Path) -> None:
    """Draw held-out images of a run, their projections on the manifold, and samples."""
    images = held_out_images(run, None)[0].batch(range(SAMPLES))
    rows = {
        "held out": images,
        "projection": project_images(run.model, images),
        "sample": draw_samples(run.model, SAMPLES, 1.0, seed=0),
    }
    title = f"A run of mflow train: held-out {run.config.data_name}, their projections, and samples"
    draw_images(path, title, rows)


def draw_uses(run: Run, path: Path) -> None:
    """Draw digits with missing pixels filled in, and samples with and without v."""
    images = held_out_images(run, None)[0].batch(range(SAMPLES))
    rows = {"held out": images}
    for missing in MISSING:
        known = known_pixels(missing, images)
        rows[f"known: {missing}"] = images.where(known, images.new_full((), 128))
        rows[f"{missing} filled in"] = inpaint_images(run.model, images, known)
    for name, ambient in (("v = 0", False), ("v drawn", True)):
        drawn = draw_samples(run.model, SAMPLES, 1.0, seed=1, ambient=ambient)
        rows[f"sample, {name}"] = drawn
    draw_images(path, "Missing pixels filled in from the manifold, and samples on and off it", rows)
    small = Image.open(path).convert("L").quantize(64)  # all images are grey
    write_atomically(path, lambda temporary: small.save(temporary, format="png", optimize=True))


def draw_moons(path: Path) -> None:
    """Run the first page of the tutorial, which draws moons.png and saves a model."""
    page = (DOCS / "tutorial" / "density.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=folder, check=True)
        drawn = Path(folder, "moons.png").read_bytes()
    write_atomically(path, lambda temporary: temporary.write_bytes(drawn))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser("benchmarks.readme_pictures", __doc__)
    parser.add_argument("run", type=Path, help="run folder of mflow train")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder for the PNG files")
    options = parser.parse_args(arguments)
    run = load_run(str(options.run), "cpu")
    draw_run(run, options.out / "digits.png")
    draw_uses(run, options.out / "uses.png")
    draw_moons(options.out / "moons.png")


if __name__ == "__main__":
    main()
