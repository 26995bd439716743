"""The commands of the command line, with their help.

Each first checks everything and returns its work, then the work is done: so bad input ends before
anything is written, and an error of the work itself is never mistaken for bad input. A function
that needs torch or Lightning imports it: --help must be quick.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mflow_kernels.data.printable import printable

Device = Literal["auto", "cpu", "cuda"]
Work = Callable[[], None]


def train(options: dict[str, Any]) -> Work:
    """Train a manifold flow on images.

    With no further argument: on handwritten digits, on a CPU, in a few minutes. Writes one run
    folder: the configuration, metrics (CSV and TensorBoard), a checkpoint, pictures, an evaluation.
    """
    from mflow_kernels.runs.config import TrainConfig

    overwrite, resume = options.pop("overwrite"), options.pop("resume")
    run_dir = options.pop("run_dir")
    config = TrainConfig(**options)
    folder = Path(run_dir or config.default_run_dir())

    from mflow_kernels.training.train import plan_run, run

    plan = plan_run(config, folder, overwrite=overwrite, resume=resume)

    def work() -> None:
        if not plan.ranks.rank:
            _report_skipped(plan.splits.skipped)
            if plan.resumes:
                print(f"goes on from step {plan.first_step}", file=sys.stderr)
        pictures = run(plan)
        if not pictures:  # another rank's
            return
        print(f"\nRun folder: {printable(str(folder))}\nPictures:")
        for picture in pictures:
            print(f"  {printable(str(picture))}")

    return work


def prepare(
    data: str, out: str, overwrite: bool, image_size: int = 64, workers: int | None = None
) -> Work:
    """Decode and resize a data set once, into one file that training reads at memory speed.

    Give that file to --data. A command that was killed goes on when it is given again; one that was
    done checks the file.

    Args:
        data: Folder or zip of images; CelebA as downloaded keeps its official partition.
        out: File to write.
        overwrite: Replace it if it exists.
        image_size: Side of the square images in pixels.
        workers: Processes that decode; by default one for each core.
    """
    from mflow_kernels.data.files import follow_links
    from mflow_kernels.data.prepare import is_prepared_from
    from mflow_kernels.data.prepare import prepare as make
    from mflow_kernels.data.prepared import is_prepared, open_prepared
    from mflow_kernels.data.progress import progress_bar
    from mflow_kernels.data.sources import find_images

    path = follow_links(Path(out), "out")
    _check_at_least("image_size", image_size, 1)
    if workers is not None:
        _check_at_least("workers", workers, 1)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"out: expected a folder that can be written, got {Path(out).parent}")
    images = Path(os.path.realpath(data))
    if path.is_dir() or images in (path, *path.parents):
        raise ValueError(f"out: expected a file outside of the images' folder, got {out!r}")
    if path.exists() and overwrite and not is_prepared(path):
        raise ValueError(f"out: --overwrite expected a file of mflow prepare, got another: {out}")
    source = find_images(data)
    made = not overwrite and is_prepared_from(path, source, image_size)
    if path.exists() and not made and not overwrite:
        raise ValueError(
            f"out: {out} exists and is not made from these images at {image_size}x{image_size} "
            "(--overwrite replaces it)"
        )

    def work() -> None:
        if made:
            prepared = open_prepared(path)
            with progress_bar("checking", len(prepared.images)) as progress:
                prepared.verify(progress)
            print("made before; every byte is as it was written")
        else:
            try:
                prepared = make(source, path, image_size, workers, overwrite)
            except KeyboardInterrupt:
                print("interrupted; the same command goes on", file=sys.stderr)
                raise SystemExit(128 + signal.SIGINT) from None
        print(prepared.summary())

    return work


def sample(
    run: str,
    number: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
    stages: int | None = None,
    output: str | None = None,
    device: Device = "auto",
) -> Work:
    """Draw images from a trained model.

    Args:
        run: Folder that mflow train wrote.
        number: How many images.
        temperature: Standard deviation of the manifold coordinates; below 1 draws likelier images.
        seed: Seed of the draw.
        stages: Use only the first so many stages; all by default.
        output: PNG file to write; by default a name in the run folder.
        device: Where to compute; auto takes a GPU if there is one.
    """
    from mflow_kernels.evaluation.pictures import draw_images, in_rows
    from mflow_kernels.evaluation.samples import draw_samples
    from mflow_kernels.runs.folder import load_run

    _check_at_least("number", number, 1)
    _check_at_least("seed", seed, 0)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    loaded = load_run(run, device)
    count = len(loaded.model.stages)
    if stages is not None and not 1 <= stages <= count:
        raise ValueError(f"stages: expected 1 to {count}, got {stages}")
    suffix = f"-stages{stages}" if stages else ""
    path = _png(output, loaded.folder / f"samples-T{temperature:g}-seed{seed}{suffix}.png")

    def work() -> None:
        images = draw_samples(loaded.model, number, temperature, seed, stages)
        title = f"{number} samples at T = {temperature:g}, seed {seed}"
        draw_images(path, title, in_rows({"": images}))
        print(printable(str(path)))

    return work


def reconstruct(
    run: str,
    data: str | None = None,
    number: int = 24,
    output: str | None = None,
    device: Device = "auto",
) -> Work:
    """Show images beside their projections on the manifold.

    Args:
        run: Folder that mflow train wrote.
        data: Folder or zip of images or file of mflow prepare (of CelebA, its test part); by
            default the images that the run held out.
        number: How many images.
        output: PNG file to write; by default a name in the run folder.
        device: Where to compute; auto takes a GPU if there is one.
    """
    from mflow_kernels.evaluation.likelihood import held_out_images
    from mflow_kernels.evaluation.pictures import draw_residuals
    from mflow_kernels.evaluation.samples import project_images
    from mflow_kernels.runs.folder import load_run

    _check_at_least("number", number, 1)
    loaded = load_run(run, device)
    images, name, skipped, warning = held_out_images(loaded, data)
    path = _png(output, loaded.folder / f"reconstructions-{name}.png")

    def work() -> None:
        _report_skipped(skipped)
        _warn(warning)
        originals = images.batch(range(min(number, len(images))))
        title = f"{printable(name)}: images and their projections on the manifold"
        draw_residuals(path, title, originals, project_images(loaded.model, originals))
        print(printable(str(path)))

    return work


def evaluate(
    run: str,
    data: str | None = None,
    out: str | None = None,
    draws: int = 1,
    feature_weights: str | None = None,
    features: str = "inception",
    feature_images: int = 10_000,
    ood: str | None = None,
    device: Device = "auto",
) -> Work:
    """Evaluate a trained model on held-out images.

    Prints likelihood and reconstruction error and writes them to evaluation.json in the run's
    folder; then writes a report with all figures and pictures: report.html, which a browser opens.

    Args:
        run: Folder that mflow train wrote.
        data: Folder or zip of images or file of mflow prepare (of CelebA, its test part); by
            default the images that the run held out. Its figures go to evaluation-NAME.json.
        out: Folder to write the report to; by default report, or report-NAME, in the run's folder.
        draws: Dequantizations of each image; more than 1 adds importance-weighted bits per
            dimension.
        feature_weights: File of the weights of the network that FID and KID are computed with
            (docs/evaluation.md says which); without it they are left out. Nothing is downloaded.
        features: That network; inception, which FID is defined with, or an image classifier of
            torchvision by its name there.
        feature_images: How many samples and how many held-out images FID and KID compare, at most.
        ood: Other images, which the report tries to tell from the held-out images. Takes what
            --data takes, and the names of data sets that mflow train --help lists.
        device: Where to compute; auto takes a GPU if there is one.
    """
    from mflow_kernels.data.files import check_can_be_written, folder_to_write
    from mflow_kernels.data.splits import load_evaluation_set
    from mflow_kernels.evaluation.features import load_feature_network
    from mflow_kernels.evaluation.likelihood import (
        check_image_shape,
        evaluate_model,
        held_out_images,
    )
    from mflow_kernels.evaluation.report import Asked, write_report
    from mflow_kernels.runs.folder import EVALUATION, load_run

    _check_at_least("draws", draws, 1)
    _check_at_least("feature_images", feature_images, 2)
    loaded = load_run(run, device)
    images, name, skipped, warning = held_out_images(loaded, data)
    path = loaded.folder / (f"evaluation-{name}.json" if data else EVALUATION)
    folder = Path(out) if out else loaded.folder / (f"report-{name}" if data else "report")
    check_can_be_written(folder, "out")
    network = None
    if feature_weights is None and features != "inception":
        raise ValueError(f"feature_weights: expected a file of weights of {features!r}, got none")
    if feature_weights is not None:
        network = features, load_feature_network(features, Path(feature_weights))
    others = []
    if ood is not None:
        try:
            other = load_evaluation_set(ood, loaded.config.image_shape[1]).images
        except ValueError as error:
            raise ValueError(str(error).replace("data:", "ood:", 1)) from None
        others.append((Path(ood).resolve().name, other))
        check_image_shape(others[0][1], loaded.model, "ood")

    def work() -> None:
        with folder_to_write(folder, "out"):
            _report_skipped(skipped)
            _warn(warning)
            evaluation = evaluate_model(
                loaded.model, images, loaded.config.n_bits, data=name, device=loaded.device
            )
            evaluation.write(path)
            evaluation.print()
            print(printable(str(path)))
            asked = Asked(draws, network, feature_images, tuple(others))
            report = write_report(loaded, images, evaluation, folder, asked)
            print(printable(str(report)))

    return work


def plan(options: dict[str, Any]) -> Work:
    """Predict the memory that training needs.

    Takes the options of mflow train and tells, before anything is allocated, the peak memory of a
    training step and what it is for. No image is read: give their --image-size and --channels, or
    the name of a data set as --data.
    """
    import torch

    from mflow_kernels.runs.config import TrainConfig
    from mflow_kernels.training.memory import parse_memory, report, resolve_config

    channels, text = options.pop("channels"), options.pop("gpu_memory")
    gpu_memory = None if text is None else parse_memory(text)
    config = TrainConfig(**{**options, "data": options["data"] or ""})
    there = config.device == "auto" and torch.cuda.is_available()
    gpu = gpu_memory is not None or config.device == "cuda" or there
    resolved = resolve_config(config, channels, gpu=gpu)
    return lambda: print(report(resolved, gpu, gpu_memory))


def presets(name: str | None = None) -> Work:
    """Print a preset of mflow train, or their names.

    Args:
        name: Preset to print, in the form that --preset FILE takes.
    """
    from mflow_kernels.runs.presets import PRESETS, preset_text

    text = "\n".join(PRESETS) if name is None else preset_text(name).rstrip()
    return lambda: print(text)


def export(run: str, out: str) -> Work:
    """Write a trained model as safetensors and JSON.

    ManifoldFlow.from_pretrained and HierarchicalFlow.from_pretrained read that folder, in plain
    PyTorch.

    Args:
        run: Folder that mflow train wrote; its averaged weights are taken.
        out: New folder to write.
    """
    from mflow_kernels.runs.folder import export_run, load_run

    path = Path(out)
    if path.exists():
        raise ValueError(f"out: expected a new folder, but {path} exists")
    loaded = load_run(run, "cpu")

    def work() -> None:
        export_run(loaded, path)
        print(printable(str(path)))

    return work


def _png(output: str | None, default: Path) -> Path:
    path = Path(output) if output else default
    if path.suffix.lower() != ".png":
        raise ValueError(f"output: expected a name ending in .png, got {output!r}")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected an existing folder, got {path.parent}")
    return path


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _warn(text: str | None) -> None:
    if text is not None:
        print(f"warning: {text}", file=sys.stderr)


def _report_skipped(skipped: Sequence[str]) -> None:
    if skipped:
        names = ", ".join(map(printable, skipped[:5]))
        more = ", ..." if len(skipped) > 5 else ""
        files = "file" if len(skipped) == 1 else "files"
        print(f"skipped {len(skipped)} {files} that cannot be read: {names}{more}", file=sys.stderr)
