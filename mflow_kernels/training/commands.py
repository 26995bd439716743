"""The commands of `mflow`. Their docstrings are the help texts.

A command checks its input and returns a function that does the work. Bad input therefore stops it
before anything is written, and an error during the work is not mistaken for bad input. Commands
import torch and Lightning inside the functions, so that --help is fast.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mflow_kernels.data.printable import printable

if TYPE_CHECKING:
    from mflow_kernels.runs.config import TrainConfig

Device = Literal["auto", "cpu", "cuda"]
Missing = Literal["half", "centre", "pixels"]
Work = Callable[[], None]


def train(options: dict[str, Any]) -> Work:
    """Train a manifold flow on images.

    Without options, trains on handwritten digits in a few minutes on a CPU. Writes a run folder
    with the configuration, metrics (CSV and TensorBoard), a checkpoint, pictures and an evaluation.
    """
    from mflow_kernels.runs.config import TrainConfig

    overwrite, resume = options.pop("overwrite"), options.pop("resume")
    run_dir, find_rate = options.pop("run_dir"), options.pop("find_learning_rate")
    config = TrainConfig(**options)
    folder = Path(run_dir or config.default_run_dir())
    if find_rate:
        return _find_learning_rate(config, resume=resume)

    from mflow_kernels.training.interrupts import exit_on_signals
    from mflow_kernels.training.train import check_run, describe_resume, train_and_evaluate

    checked = check_run(config, folder, overwrite=overwrite, resume=resume)

    def work() -> None:
        if not checked.ranks.rank:
            _report_skipped(checked.splits.skipped)
            if checked.resumes:
                print(describe_resume(checked), file=sys.stderr)
        with exit_on_signals():
            pictures = train_and_evaluate(checked)
        if not pictures:  # only rank 0 draws
            return
        print(f"\nRun folder: {printable(str(folder))}\nPictures:")
        for picture in pictures:
            print(f"  {printable(str(picture))}")

    return work


def _find_learning_rate(config: "TrainConfig", resume: bool) -> Work:
    from mflow_kernels.training.interrupts import exit_on_signals
    from mflow_kernels.training.range_test import describe_tests, find_learning_rates
    from mflow_kernels.training.train import load

    if resume:
        raise ValueError(
            "find_learning_rate: expected a new run, got --resume (--init-from RUN tests rates "
            "from the weights of a run)"
        )
    loaded = load(config)
    if loaded.ranks.world > 1:
        raise ValueError(
            f"find_learning_rate: expected one process, got {loaded.ranks.world} of torchrun"
        )

    def work() -> None:
        try:
            with exit_on_signals():
                tests = find_learning_rates(loaded)
        except SystemExit:
            print("interrupted; nothing was written", file=sys.stderr)
            raise
        print(describe_tests(tests))

    return work


def prepare(
    data: str, out: str, overwrite: bool, image_size: int = 64, workers: int | None = None
) -> Work:
    """Decode and resize a data set into one file that training reads at memory speed.

    Give that file to --data of the other commands. If preparation is interrupted, the same command
    continues it. If the file is complete, the command verifies it.

    Args:
        data: Folder or zip of images; CelebA as downloaded keeps its official partition.
        out: File to write.
        overwrite: Replace the file if it exists.
        image_size: Side of the square images in pixels.
        workers: Number of processes that decode; by default one for each core.
    """
    from mflow_kernels.data.files import follow_links
    from mflow_kernels.data.prepare import is_prepared_from, prepare_images
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
        raise ValueError(
            f"out: expected a file of mflow prepare to overwrite, got another kind: {out}"
        )
    source = find_images(data)
    complete = not overwrite and is_prepared_from(path, source, image_size)
    if path.exists() and not complete and not overwrite:
        raise ValueError(
            f"out: {out} exists and was not made from these images at {image_size}x{image_size} "
            "(--overwrite replaces it)"
        )

    def work() -> None:
        if complete:
            prepared = open_prepared(path)
            with progress_bar("checking", len(prepared.images)) as progress:
                prepared.verify(progress)
            print("the file is complete; every image is intact")
        else:
            try:
                prepared = prepare_images(source, path, image_size, workers, overwrite)
            except KeyboardInterrupt:
                print("interrupted; the same command continues the preparation", file=sys.stderr)
                raise SystemExit(128 + signal.SIGINT) from None
        print(prepared.summary())

    return work


def sample(
    run: str,
    number: int = 60,
    temperature: float = 0.7,
    seed: int = 0,
    stages: int | None = None,
    ambient: bool = False,
    output: str | None = None,
    device: Device = "auto",
    class_name: str | None = None,
) -> Work:
    """Draw images from a trained model. A class-conditional model draws a row for each class.

    Args:
        run: Folder that mflow train wrote.
        number: Number of images.
        temperature: Standard deviation of the manifold coordinates; less than 1 gives more typical
            images.
        seed: Seed of the random numbers.
        stages: Number of stages to use, from the first; all by default.
        ambient: Also draw the off-manifold coordinates, which otherwise are zero.
        output: PNG file to write; by default a file in the run folder.
        device: Device to compute on; auto uses a GPU if there is one.
    """
    from mflow_kernels.evaluation.pictures import draw_images, in_rows
    from mflow_kernels.evaluation.samples import draw_samples, samples_by_class
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
    names = loaded.model.class_names
    if class_name is not None and class_name not in names:
        known = f"one of {', '.join(names)}" if names else "none, because the model has no classes"
        raise ValueError(f"class: expected {known}, got {class_name}")
    if class_name is not None:
        suffix += f"-class{names.index(class_name)}"
    suffix += "-ambient" if ambient else ""
    path = _png(output, loaded.folder / f"samples-T{temperature:g}-seed{seed}{suffix}.png")

    def work() -> None:
        model, how = loaded.model, f"at T = {temperature:g}, seed {seed}"
        how = f"off the manifold {how}" if ambient else how
        title = f"{number} samples {how}"
        if names and class_name is None:
            each = max(1, number // len(names))
            rows = samples_by_class(model, each, temperature, seed, stages, ambient)
            title = f"{each} samples of each class {how}"
        else:
            chosen = None if class_name is None else names.index(class_name)
            images = draw_samples(model, number, temperature, seed, stages, chosen, ambient)
            rows = {"" if class_name is None else class_name: images}
        draw_images(path, title, in_rows(rows))
        print(printable(str(path)))

    return work


def reconstruct(
    run: str,
    data: str | None = None,
    number: int = 24,
    missing: Missing | None = None,
    output: str | None = None,
    device: Device = "auto",
) -> Work:
    """Draw images, their projections on the manifold and the differences.

    Args:
        run: Folder that mflow train wrote.
        data: Folder or zip of images, or file of mflow prepare (of CelebA, the test part is used);
            by default the images that the run held out.
        number: Number of images.
        missing: Hide a part of each image and draw it filled in from the manifold instead: half
            hides the right half, centre a square in the middle, and pixels three in four pixels at
            random.
        output: PNG file to write; by default a file in the run folder.
        device: Device to compute on; auto uses a GPU if there is one.
    """
    from mflow_kernels.evaluation.likelihood import held_out_images
    from mflow_kernels.evaluation.pictures import draw_images, draw_residuals, in_rows
    from mflow_kernels.evaluation.samples import inpaint_images, known_pixels, project_images
    from mflow_kernels.runs.folder import load_run

    _check_at_least("number", number, 1)
    loaded = load_run(run, device)
    images, name, skipped, warning = held_out_images(loaded, data)
    suffix = f"-missing-{missing}" if missing else ""
    path = _png(output, loaded.folder / f"reconstructions-{name}{suffix}.png")

    def work() -> None:
        _report_skipped(skipped)
        _warn(warning)
        originals = images.batch(range(min(number, len(images))))
        classes = None if images.classes is None else images.classes[: len(originals)]
        if missing is None:
            title = f"{printable(name)}: images and their projections on the manifold"
            projections = project_images(loaded.model, originals, classes=classes)
            draw_residuals(path, title, originals, projections)
        else:
            title = f"{printable(name)}: images whose missing pixels the manifold fills in"
            known = known_pixels(missing, originals)
            filled = inpaint_images(loaded.model, originals, known, classes)
            seen = originals.where(known, originals.new_full((), 128))
            rows = {"original": originals, "known pixels": seen, "filled in": filled}
            draw_images(path, title, in_rows(rows))
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
    quick: bool = False,
    ambient: bool = False,
    device: Device = "auto",
) -> Work:
    """Evaluate a trained model on held-out images.

    Prints likelihood and reconstruction error and writes them to evaluation.json in the run folder.
    Then writes a report with all metrics and pictures as a web page, report.html.

    Args:
        run: Folder that mflow train wrote.
        data: Folder or zip of images, or file of mflow prepare (of CelebA, the test part is used);
            by default the images that the run held out. With this option the metrics go to
            evaluation-NAME.json.
        out: Folder for the report; by default report (with --data, report-NAME) in the run folder.
        draws: Dequantizations of each image; more than 1 adds importance-weighted bits per
            dimension.
        feature_weights: File with the weights of the network for FID and KID (docs/evaluation.md
            says where to get it). Without it, FID and KID are left out. Nothing is downloaded.
        features: Network for FID and KID: inception, which FID is defined with, or the name of an
            image classifier of torchvision.
        feature_images: Largest number of samples and of held-out images that FID and KID compare.
        ood: Other images that get out-of-distribution scores too: any value of --data, or the name
            of a data set that mflow train --help lists.
        quick: Leave out the figures that need Jacobians.
        ambient: Also draw the off-manifold coordinates of samples, which otherwise are zero.
        device: Device to compute on; auto uses a GPU if there is one.
    """
    from mflow_kernels.data.files import check_can_be_written, folder_to_write
    from mflow_kernels.data.splits import load_evaluation_set
    from mflow_kernels.evaluation.features import load_feature_network
    from mflow_kernels.evaluation.likelihood import (
        check_image_shape,
        evaluate_model,
        held_out_images,
    )
    from mflow_kernels.evaluation.report import ReportOptions, describe_work, write_report
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
            options = ReportOptions(draws, network, feature_images, tuple(others), quick, ambient)
            print(describe_work(loaded, images, options), file=sys.stderr)
            evaluation = evaluate_model(
                loaded.model, images, loaded.config.n_bits, data=name, device=loaded.device
            )
            evaluation.write(path)
            evaluation.print()
            print(printable(str(path)))
            report = write_report(loaded, images, evaluation, folder, options)
            print(printable(str(report)))

    return work


def plan(options: dict[str, Any]) -> Work:
    """Predict the memory, steps, disk and hours that training needs.

    Takes the options of mflow train, allocates nothing and reads no image. Give a file of mflow
    prepare or the name of a data set as --data, or else give --images, --image-size and --channels.
    """
    import torch

    from mflow_kernels.data.prepared import is_prepared, open_prepared
    from mflow_kernels.runs.config import TrainConfig
    from mflow_kernels.training.memory import describe_peak, parse_memory, resolve_config
    from mflow_kernels.training.plan import describe_fit, describe_training

    channels, text = options.pop("channels"), options.pop("gpu_memory")
    images = options.pop("images")
    if images is not None:
        _check_at_least("images", images, 1)
    gpu_memory = None if text is None else parse_memory(text)
    if options["data"] and is_prepared(path := Path(options["data"])):
        form = open_prepared(path).record.format
        options["image_size"] = options["image_size"] or form.size
        channels = channels if channels is not None else form.channels
    config = TrainConfig(**{**options, "data": options["data"] or ""})
    there = config.device == "auto" and torch.cuda.is_available()
    gpu = gpu_memory is not None or config.device == "cuda" or there
    resolved = resolve_config(config, channels, gpu=gpu)
    parts = [describe_peak(resolved, gpu), describe_training(resolved, images)]
    if gpu_memory is not None:
        parts.append(describe_fit(resolved, gpu_memory))
    return lambda: print("\n\n".join(parts))


def presets(name: str | None = None) -> Work:
    """Print a preset of mflow train, or the names of all presets.

    Args:
        name: Preset to print, as a YAML file that --preset accepts.
    """
    from mflow_kernels.runs.presets import PRESETS, preset_text

    text = "\n".join(PRESETS) if name is None else preset_text(name).rstrip()
    return lambda: print(text)


def export(run: str, out: str) -> Work:
    """Write a trained model as safetensors and JSON.

    ManifoldFlow.from_pretrained and HierarchicalFlow.from_pretrained load the folder, using plain
    PyTorch.

    Args:
        run: Folder that mflow train wrote; its averaged weights are exported.
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
