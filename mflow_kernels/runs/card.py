"""The model card of an exported run: a README.md that a model hub shows."""

import json
import math
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from mflow_kernels.data.named import NAMED_DATASETS
from mflow_kernels.data.printable import counted, printable
from mflow_kernels.runs.config import RunConfig, TrainConfig
from mflow_kernels.runs.parser import as_option
from mflow_kernels.version import __version__

CARD = "README.md"
SAMPLES = "samples.png"  # mflow train draws it
_FIGURES = {
    "bits_per_dim": ("bits per dimension", ".3f"),
    "mean_squared_error": ("mean squared error of the projection, pixels in [0, 1]", ".5f"),
    "psnr": ("PSNR of the projection, dB", ".2f"),
}


def model_card(
    config: RunConfig, parameters: int, images: int | None, evaluation: Path, samples: bool
) -> str:
    """Return a card with the data, the figures, the command and the code that loads the model.

    Args:
        config: options of the run.
        parameters: number of the model's parameters.
        images: number of images that it was trained on, or None if the run does not know.
        evaluation: the figures that `mflow evaluate` wrote. The card says so if there are none.
        samples: whether the picture `SAMPLES` lies beside the card.
    """
    channels, size, _ = config.image_shape
    colours = "grey" if channels == 1 else "RGB"
    number = "Images" if images is None else counted(images, "image")
    data = f"{number} of {_text(config.data_name)}: {size}x{size}, {colours}, {config.n_bits} bits"
    if config.class_names:
        data += f", of the classes {', '.join(map(_text, config.class_names))}"
    dims = list(dict.fromkeys(stage.dim for stage in reversed(config.flows)))
    manifold = f"manifold{'s have' if dims[1:] else ' has'} {' in '.join(map(str, dims))} of"
    picture = f"![Samples]({SAMPLES})\n\n" if samples else ""
    return f"""---
library_name: mflow_kernels
tags:
- normalizing-flow
- manifold-learning
- density-estimation
---

# {_text(config.data_name)}

A manifold flow (arXiv 2206.03293) with {parameters:,} parameters. Its {manifold}
{math.prod(config.image_shape):,} dimensions. mflow_kernels {__version__} wrote this folder.

```python
from mflow_kernels import HierarchicalFlow

model = HierarchicalFlow.from_pretrained("this-folder")
{_sampling(config)}
model.postprocess(x)[0].save("sample.png")
```

{picture}## Data

{data}. The images are not in this folder.

## Figures

{_figures(evaluation)}

## Training

    {shlex.join(train_command(config))}
"""


def train_command(config: RunConfig) -> list[str]:
    """Return the `mflow train` command of a configuration: each option that is not the default.

    Paths are reduced to their last parts.
    """
    command = ["mflow", "train"]
    default = TrainConfig()
    for option in fields(TrainConfig):
        value, usual = (getattr(c, option.name) for c in (config, default))
        if value == usual or (option.name == "image_size" and config.data in NAMED_DATASETS):
            continue
        name = as_option(option.name)
        if isinstance(value, bool):
            command.append(name if value else f"--no-{name[2:]}")
        elif isinstance(value, list):
            command += [name, f"[{', '.join(map(str, value))}]"]
        elif (option.name == "data" and value not in NAMED_DATASETS) or option.name == "init_from":
            command += [name, Path(value).name]
        else:
            command += [name, "null" if value is None else str(value)]
    return [printable(part) for part in command]


def _sampling(config: RunConfig) -> str:
    context = f", context={config.class_names[0]!r}" if config.class_names else ""
    return f"x = model.sample(4, temperature=0.7{context})"


def _figures(path: Path) -> str:
    """Return the table of an evaluation's figures, all stages together."""
    try:
        whole: Any = json.loads(path.read_bytes())
        last = whole["stages"][-1]
        rows = [(label, format(last[name], form)) for name, (label, form) in _FIGURES.items()]
        images = int(whole["images"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "None yet: `mflow evaluate` computes them."
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"On {counted(images, 'held-out image')}:\n\n| figure | value |\n|---|---:|\n{table}"


def _text(name: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#|" else c for c in printable(name))
