"""The commands of `mflow` that read a trained run; see `commands`."""

import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from mflow_kernels.data.printable import printable
from mflow_kernels.runs.options import Device, check_at_least
from mflow_kernels.training.commands import Work, report_skipped

Missing = Literal["half", "centre", "pixels"]


def sample(
    run: str,
    number: int = 60,
    temperature: float = 1.0,
    seed: int = 0,
    stages: int | None = None,
    ambient: bool = False,
    output: str | None = None,
    device: Device = "auto",
    class_name: str | None = None,
    files: str | None = None,
) -> Work:
    """Draw images from a trained model. A class-conditional model draws a row for each class.

    Args:
        run: Folder that mflow train or mflow export wrote.
        number: Number of images.
        temperature: Standard deviation of the manifold coordinates; less than 1 gives images that
            differ less from each other, not better ones.
        seed: Seed of the random numbers.
        stages: Number of stages to use, from the first; all by default.
        ambient: Also draw the off-manifold coordinates of samples, which otherwise are zero.
        output: PNG file to write; by default a file in the run folder.
        device: Device to compute on; auto uses a GPU if there is one.
        class_name: Name of the class to draw; by default a row for each class is drawn.
        files: New folder for the images themselves, each as a PNG file of its own size; names begin
            with the class.
    """
    from mflow_kernels.data.files import check_can_be_written
    from mflow_kernels.evaluation.pictures import draw_images, in_rows
    from mflow_kernels.evaluation.samples import draw_samples, samples_by_class, write_images
    from mflow_kernels.runs.folder import load_model

    check_at_least("number", number, 1)
    check_at_least("seed", seed, 0)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected at least 0, got {temperature}")
    loaded = load_model(run, device)
    count = len(loaded.model.stages)
    if stages is not None and not 1 <= stages <= count:
        raise ValueError(f"stages: expected 1 to {count}, got {stages}")
    names = loaded.model.class_names
    if class_name is not None and class_name not in names:
        known = f"one of {', '.join(names)}" if names else "none, because the model has no classes"
        raise ValueError(f"class: expected {known}, got {class_name}")
    chosen = None if class_name is None else names.index(class_name)
    suffix = f"-stages{stages}" if stages else ""
    suffix += "" if chosen is None else f"-{_in_file_name(names[chosen], chosen)}"
    suffix += "-ambient" if ambient else ""
    path = _png(output, loaded.folder / f"samples-T{temperature:g}-seed{seed}{suffix}.png")
    folder = None if files is None else Path(files)
    if folder is not None:
        if os.path.lexists(folder):
            raise ValueError(f"files: expected a new folder, but {folder} exists")
        check_can_be_written(folder, "files")

    def work() -> None:
        model, how = loaded.model, f"at T = {temperature:g}, seed {seed}"
        how = f"off the manifold {how}" if ambient else how
        title = f"{number} samples {how}"
        if names and class_name is None:
            each = max(1, number // len(names))
            rows = samples_by_class(model, each, temperature, seed, stages, ambient)
            title = f"{each} samples of each class {how}"
        else:
            images = draw_samples(model, number, temperature, seed, stages, chosen, ambient)
            rows = {class_name or "": images}
        draw_images(path, title, in_rows(rows))
        print(printable(str(path)))
        if folder is not None:
            files_of = {_in_file_name(c, names.index(c)) if c else "": rows[c] for c in rows}
            write_images(folder, files_of, "files")
            print(printable(str(folder)))

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
        run: Folder that mflow train or mflow export wrote.
        data: Folder or zip of images, or file of mflow prepare (of CelebA, the test part is used);
            by default the images that the run held out (an export has none).
        number: Number of images.
        missing: Hide a part of each image and draw it filled in from the manifold instead: half
            hides the right half, centre a square in the middle, and pixels hides three in four
            pixels, chosen at random.
        output: PNG file to write; by default a file in the run folder.
        device: Device to compute on; auto uses a GPU if there is one.
    """
    from mflow_kernels.data.files import check_can_be_written
    from mflow_kernels.evaluation.likelihood import held_out_images
    from mflow_kernels.evaluation.pictures import draw_images, in_rows
    from mflow_kernels.evaluation.samples import draw_projections, inpaint_images, known_pixels
    from mflow_kernels.runs.folder import load_model, name_results

    check_at_least("number", number, 1)
    loaded = load_model(run, device)
    model = loaded.model
    if missing and model.manifold_dim == math.prod(model.input_shape):
        raise ValueError(
            "missing: expected a model whose manifold has fewer dimensions than its images, got "
            f"{model.manifold_dim} of {model.manifold_dim}"
        )
    images, name, skipped, warning, _, source = held_out_images(loaded, data)
    suffix = f"-missing-{missing}" if missing else ""
    chosen = None if output is None else _png(output, Path())
    if chosen is None:
        check_can_be_written(loaded.folder, "run")

    def work() -> None:
        path = chosen
        if path is None:
            short = name_results(loaded.folder, source, name)
            path = loaded.folder / f"reconstructions-{short}{suffix}.png"
        report_skipped(skipped)
        _warn(warning)
        if missing is None:
            title = f"{printable(name)}: images and their projections on the manifold"
            draw_projections(path, title, model, images, number)
        else:
            originals = images.first(number)
            classes = None if images.classes is None else images.classes[:number]
            title = f"{printable(name)}: images whose missing pixels the manifold fills in"
            known = known_pixels(missing, originals)
            filled = inpaint_images(model, originals, known, classes)
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
    ambient: bool = False,
    quick: bool = False,
    device: Device = "auto",
) -> Work:
    """Evaluate a trained model on held-out images.

    Prints likelihood and reconstruction error, and FID, KID, precision and recall with
    --feature-weights, and writes them to evaluation.json in the run folder.
    Then writes a report with all metrics and pictures as a web page, report.html.

    Args:
        run: Folder that mflow train or mflow export wrote.
        data: Folder or zip of images, or file of mflow prepare (of CelebA, the test part is used);
            by default the images that the run held out (an export has none). With this option the
            metrics go to evaluation-NAME.json.
        out: Folder for the report; by default report (with --data, report-NAME) in the run folder.
        draws: Dequantizations of each image; more than 1 adds importance-weighted bits per
            dimension.
        feature_weights: File with the weights of the network for FID, KID, precision and recall
            (docs/evaluation.md says where to get it). Without it, these are left out. Nothing is
            downloaded.
        features: That network: inception, which FID is defined with, or the name of an image
            classifier of torchvision.
        feature_images: Largest number of samples and of held-out images that these compare.
        ood: Other images that get out-of-distribution scores too: a folder or zip of images, a file
            of mflow prepare, or the name of a data set, such as digits.
        ambient: Also draw the off-manifold coordinates of samples, which otherwise are zero.
        quick: Leave out the density on the manifold, the OOD score, the local and the intrinsic
            dimension, which take most of the time on a CPU.
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
    from mflow_kernels.evaluation.sample_quality import sample_quality
    from mflow_kernels.runs.folder import EVALUATION, load_model, name_results

    check_at_least("draws", draws, 1)
    check_at_least("feature_images", feature_images, 2)
    loaded = load_model(run, device)
    images, name, skipped, warning, held_out, source = held_out_images(loaded, data)
    n_bits = loaded.n_bits
    check_can_be_written(loaded.folder, "run")
    if out is not None:
        check_can_be_written(Path(out), "out")
    network = None
    if feature_weights is None and features != "inception":
        raise ValueError(f"feature_weights: expected a file of weights of {features!r}, got none")
    if feature_weights is not None:
        network = features, load_feature_network(features, Path(feature_weights))
    others = []
    if ood is not None:
        try:
            other = load_evaluation_set(ood, loaded.model.input_shape[1]).images
        except ValueError as error:
            raise ValueError(str(error).replace("data:", "ood:", 1)) from None
        others.append((Path(ood).resolve().name, other))
        check_image_shape(others[0][1], loaded.model, "ood")

    def work() -> None:
        path, folder = loaded.folder / EVALUATION, loaded.folder / "report"
        if data:
            short = name_results(loaded.folder, source, name)
            path = loaded.folder / f"evaluation-{short}.json"
            folder = loaded.folder / f"report-{short}"
        with folder_to_write(Path(out) if out else folder, "out") as folder:
            report_skipped(skipped)
            _warn(warning)
            options = ReportOptions(
                draws,
                feature_images if network else 0,
                tuple(others),
                quick,
                ambient,
                held_out,
                warning,
            )
            print(describe_work(loaded, images, options), file=sys.stderr)
            evaluation = evaluate_model(loaded.model, images, n_bits, data=name)
            evaluation.write(path)
            evaluation.print()
            if network:
                found = sample_quality(loaded, images, network, feature_images, ambient)
                evaluation = replace(evaluation, samples=found)
                evaluation.write(path)
                evaluation.print_samples()
            print(printable(str(path)))
            report = write_report(loaded, images, evaluation, folder, options)
            print(printable(str(report)))

    return work


def export(run: str, out: str) -> Work:
    """Write a trained model as safetensors and JSON.

    ManifoldFlow.from_pretrained and HierarchicalFlow.from_pretrained load the folder.

    Args:
        run: Folder that mflow train wrote; its averaged weights are exported.
        out: New folder to write.
    """
    from mflow_kernels.data.files import check_is_text
    from mflow_kernels.runs.folder import export_run, load_run

    path = Path(out)
    check_is_text(path.absolute(), "out")  # safetensors takes no other path
    if path.exists():
        raise ValueError(f"out: expected a new folder, but {path} exists")
    loaded = load_run(run, "cpu")

    def work() -> None:
        export_run(loaded, path)
        print(printable(str(path)))

    return work


def _in_file_name(name: str, number: int) -> str:
    """Return the name of a class for a file; a number is added if characters are replaced."""
    kept = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:80]
    return kept if kept == name else f"{kept}-class{number}"


def _png(output: str | None, default: Path) -> Path:
    path = Path(output) if output else default
    if path.suffix.lower() != ".png":
        raise ValueError(f"output: expected a name ending in .png, got {output!r}")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected an existing folder, got {path.parent}")
    return path


def _warn(text: str | None) -> None:
    if text is not None:
        print(f"warning: {printable(text)}", file=sys.stderr)
