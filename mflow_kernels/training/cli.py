"""The command line: `mflow prepare | train | sample | reconstruct | evaluate | plan |
presets | export`.

Each command first checks everything and returns its work, then the work is done: so bad input ends
before anything is written, and an error of the work itself is never mistaken for bad input.
"""

import errno
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # a function that needs torch or Lightning imports it: --help must be quick
    from mflow_kernels.training.options import OptionParser

_NEEDED = ("jsonargparse", "lightning", "matplotlib", "PIL", "rich", "tensorboard", "yaml")

Device = Literal["auto", "cpu", "cuda"]
Work = Callable[[], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mflow` with these arguments (by default the process's) and return its exit code:
    0, 1 for training that diverged or a full disk, 2 for bad input, told in one line on stderr."""
    # Else torch's threads spin while they wait, on a busy machine for the cores that they take.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"{', '.join(missing)} missing: pip install 'mflow_kernels[train]'", code=2)
    from jsonargparse import ArgumentError

    from mflow_kernels.training.options import explain
    from mflow_kernels.training.sources import DataError

    try:
        work = _check(list(sys.argv[1:] if argv is None else argv))
    except ArgumentError as error:
        return _fail(_as_option(explain(error)), code=2)
    except (ValueError, TypeError) as error:
        return _fail(_as_option(str(error)), code=2)
    except OSError as error:  # a folder of images is prepared in a cache
        return _fail_lacking(error)
    try:
        work()
    except DataError as error:
        return _fail(_as_option(str(error)), code=2)
    except FloatingPointError as error:
        return _fail(str(error), code=1)
    except OSError as error:
        return _fail_lacking(error)
    return 0


def train(options: dict[str, Any]) -> Work:
    """Train a manifold flow on images.

    With no further argument: on handwritten digits, on a CPU, in a few minutes. Writes one run
    folder: the configuration, metrics (CSV and TensorBoard), a checkpoint, pictures, an evaluation.
    """
    from mflow_kernels.training.config import TrainConfig

    overwrite, resume = options.pop("overwrite"), options.pop("resume")
    run_dir = options.pop("run_dir")
    config = TrainConfig(**options)
    folder = Path(run_dir or config.default_run_dir())

    from mflow_kernels.training.train import plan_run, run

    plan = plan_run(config, folder, overwrite=overwrite, resume=resume)

    def work() -> None:
        _report_skipped(plan.splits.skipped)
        pictures = run(plan)
        if not pictures:  # another rank's
            return
        print(f"\nRun folder: {folder}\nPictures:")
        for picture in pictures:
            print(f"  {picture}")

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
    from mflow_kernels.training.prepare import is_prepared_from
    from mflow_kernels.training.prepare import prepare as make
    from mflow_kernels.training.prepared import open_prepared
    from mflow_kernels.training.progress import counting
    from mflow_kernels.training.sources import find_images

    path = Path(out)
    _check_at_least("image_size", image_size, 1)
    if workers is not None:
        _check_at_least("workers", workers, 1)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"out: expected a folder that can be written, got {path.parent}")
    if path.is_dir() or Path(data).resolve() in path.resolve().parents:
        raise ValueError(f"out: expected a file outside of the images' folder, got {out!r}")
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
            with counting("checking", len(prepared.images)) as tell:
                prepared.verify(tell)
            print("made before; every byte is as it was written")
        else:
            try:
                prepared = make(source, path, image_size, workers)
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
    from mflow_kernels.training.pictures import draw_images, in_rows
    from mflow_kernels.training.runs import load_run
    from mflow_kernels.training.samples import draw_samples

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
        print(path)

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
    from mflow_kernels.training.evaluation import held_out_images
    from mflow_kernels.training.pictures import draw_residuals
    from mflow_kernels.training.runs import load_run
    from mflow_kernels.training.samples import project_images

    _check_at_least("number", number, 1)
    loaded = load_run(run, device)
    images, name, skipped = held_out_images(loaded, data)
    path = _png(output, loaded.folder / f"reconstructions-{name}.png")

    def work() -> None:
        _report_skipped(skipped)
        originals = images.batch(range(min(number, len(images))))
        title = f"{name}: images and their projections on the manifold"
        draw_residuals(path, title, originals, project_images(loaded.model, originals))
        print(path)

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
        ood: Folder or zip of other images, or digits, to tell from the held-out ones.
        device: Where to compute; auto takes a GPU if there is one.
    """
    from mflow_kernels.training.evaluation import (
        check_image_shape,
        evaluate_model,
        held_out_images,
        read_images,
    )
    from mflow_kernels.training.features import load_feature_network
    from mflow_kernels.training.report import Asked, write_report
    from mflow_kernels.training.runs import EVALUATION, load_run

    _check_at_least("draws", draws, 1)
    _check_at_least("feature_images", feature_images, 2)
    loaded = load_run(run, device)
    images, name, skipped = held_out_images(loaded, data)
    path = loaded.folder / (f"evaluation-{name}.json" if data else EVALUATION)
    folder = Path(out) if out else loaded.folder / (f"report-{name}" if data else "report")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: expected a folder, got {out!r}")
    network = None
    if feature_weights is None and features != "inception":
        raise ValueError(f"feature_weights: expected a file of weights of {features!r}, got none")
    if feature_weights is not None:
        network = features, load_feature_network(features, Path(feature_weights))
    others = []
    if ood is not None:
        others.append((Path(ood).resolve().name, read_images(ood, loaded.config.image_shape[1])[0]))
        check_image_shape(others[0][1], loaded.model, "ood")

    def work() -> None:
        _report_skipped(skipped)
        evaluation = evaluate_model(
            loaded.model, images, loaded.config.n_bits, data=name, device=loaded.device
        )
        evaluation.write(path)
        evaluation.print()
        print(path)
        asked = Asked(draws, network, feature_images, tuple(others))
        print(write_report(loaded, images, evaluation, folder, asked))

    return work


def plan(options: dict[str, Any]) -> Work:
    """Predict the memory that training needs.

    Takes the options of mflow train and tells, before anything is allocated, the peak memory of a
    training step and what it is for. No image is read: give their --image-size and --channels, or
    --data digits.
    """
    import torch

    from mflow_kernels.training.config import TrainConfig
    from mflow_kernels.training.plan import parse_memory, plan_model, report

    channels, text = options.pop("channels"), options.pop("gpu_memory")
    gpu_memory = None if text is None else parse_memory(text)
    config = TrainConfig(**{**options, "data": options["data"] or ""})
    there = config.device == "auto" and torch.cuda.is_available()
    gpu = gpu_memory is not None or config.device == "cuda" or there
    resolved = plan_model(config, channels, gpu=gpu)
    return lambda: print(report(resolved, gpu, gpu_memory))


def presets(name: str | None = None) -> Work:
    """Print a preset of mflow train, or their names.

    Args:
        name: Preset to print, in the form that --preset FILE takes.
    """
    from mflow_kernels.training.presets import PRESETS, preset_text

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
    from mflow_kernels.training.runs import export_run, load_run

    path = Path(out)
    if path.exists():
        raise ValueError(f"out: expected a new folder, but {path} exists")
    loaded = load_run(run, "cpu")

    def work() -> None:
        export_run(loaded, path)
        print(path)

    return work


def _check(argv: list[str]) -> Work:
    """The work that these arguments ask for; ArgumentError, ValueError or TypeError if bad."""
    parser, trainer, planner = _parsers()
    chosen = parser.parse_args(argv)
    preset = chosen[chosen.subcommand].get("preset") if chosen.subcommand else None
    if preset:
        from mflow_kernels.training.presets import preset_options

        # Its values take the place of the defaults: what is typed overrules them.
        for command in (trainer, planner):
            command.set_defaults(preset_options(preset))
        chosen = parser.parse_args(argv)
    if chosen.subcommand == "train":
        options = vars(chosen.train)
        options.pop("preset")
        if chosen.train.resume and not chosen.train.overwrite:
            # What the run recorded takes the place of the defaults: only what is typed can differ.
            trainer.set_defaults(_recorded(options))
            options = vars(parser.parse_args(argv).train)
            options.pop("preset")
        return train(options)
    if chosen.subcommand == "plan":
        options = vars(chosen.plan)
        options.pop("preset")
        return plan(options)
    commands: dict[str, Callable[..., Work]] = {
        "prepare": prepare,
        "sample": sample,
        "reconstruct": reconstruct,
        "evaluate": evaluate,
        "presets": presets,
        "export": export,
    }
    return commands[chosen.subcommand](**vars(chosen[chosen.subcommand]))


def _parsers() -> tuple["OptionParser", "OptionParser", "OptionParser"]:
    """The parser of the whole command line, and those of `mflow train` and `plan` within it."""
    from mflow_kernels.training.config import add_options
    from mflow_kernels.training.options import OptionParser

    parser = OptionParser(
        prog="mflow",
        description="Manifold learning and density estimation with normalizing flows on images.",
    )
    commands = parser.add_subcommands(
        metavar="COMMAND", title="commands", description="mflow COMMAND --help tells more of each."
    )
    preparer = OptionParser(description=_text(prepare))
    preparer.add_argument(
        "--out", required=True, metavar="FILE", help="File to write, such as celeba64.safetensors."
    )
    preparer.add_argument("--overwrite", action="store_true", help="Replace the file if it exists.")
    by_hand: set[str | int] = {"out", "overwrite"}
    preparer.add_function_arguments(prepare, as_group=False, as_positional=True, skip=by_hand)
    commands.add_subcommand("prepare", preparer, help=_text(prepare, lines=1))
    trainer = OptionParser(description=_text(train))
    trainer.add_argument(
        "--run-dir", help="Folder to write; by default a name in runs/ made from the options."
    )
    trainer.add_argument(
        "--overwrite", action="store_true", help="Replace the run folder if it exists."
    )
    trainer.add_argument(
        "--resume", action="store_true", help="Go on with the run folder from its last checkpoint."
    )
    preset = {
        "metavar": "NAME",
        "help": "Start from a preset (mflow presets lists them) or a YAML file with options; what "
        "is typed overrules it.",
    }
    trainer.add_argument("--preset", **preset)
    add_options(trainer)
    commands.add_subcommand("train", trainer, help=_text(train, lines=1))
    for command in (sample, reconstruct, evaluate):
        subparser = OptionParser(description=_text(command))
        subparser.add_function_arguments(command, as_group=False, as_positional=True)
        commands.add_subcommand(command.__name__, subparser, help=_text(command, lines=1))
    lister = OptionParser(description=_text(presets))
    lister.add_argument("name", nargs="?", help="Preset to print; by default the names of all.")
    commands.add_subcommand("presets", lister, help=_text(presets))
    planner = OptionParser(description=_text(plan))
    planner.add_argument(
        "--gpu-memory", metavar="SIZE", help="Tell the largest batch that fits a GPU of, say, 80GB."
    )
    planner.add_argument(
        "--channels",
        type=int,
        help="Colour channels of the images; by default 3, and 1 for the digits.",
    )
    planner.add_argument("--preset", **preset)
    add_options(planner)
    planner.set_defaults(data=None)
    commands.add_subcommand("plan", planner, help=_text(plan, lines=1))
    exporter = OptionParser(description=_text(export))
    exporter.add_argument("--out", required=True, metavar="FOLDER", help="New folder to write.")
    exporter.add_function_arguments(export, as_group=False, as_positional=True, skip={"out"})
    commands.add_subcommand("export", exporter, help=_text(export, lines=1))
    return parser, trainer, planner


def _recorded(options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from mflow_kernels.training.config import TrainConfig
    from mflow_kernels.training.runs import read_config

    names = {*options} - {"run_dir", "overwrite", "resume"}
    config = TrainConfig(**{name: options[name] for name in names})
    folder = Path(options["run_dir"] or config.default_run_dir())
    recorded = asdict(read_config(folder, "run_dir"))
    return {name: recorded[name] for name in names}


def _text(command: Callable[..., Work], lines: int | None = None) -> str:
    """A command's docstring up to its arguments."""
    text = (command.__doc__ or "").split("Args:")[0]
    return " ".join(" ".join(text.strip().split("\n")[:lines]).split())


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


def _report_skipped(skipped: Sequence[str]) -> None:
    if skipped:
        names = ", ".join(skipped[:5])
        more = ", ..." if len(skipped) > 5 else ""
        print(f"skipped {len(skipped)} files that are no images: {names}{more}", file=sys.stderr)


def _as_option(message: str) -> str:
    """The library names its arguments as Python does; here they are options."""
    from dataclasses import fields

    from mflow_kernels.training.config import TrainConfig

    name, colon, rest = message.partition(":")
    own = {"run_dir", "overwrite", "resume", "preset", "number", "temperature", "stages", "output"}
    own |= {"out", "workers"}
    own |= {"gpu_memory", "channels"}
    own |= {"draws", "features", "feature_weights", "feature_images", "ood"}
    if name in own or name in {option.name for option in fields(TrainConfig)}:
        return "--" + name.replace("_", "-") + colon + rest
    return message


def _fail_lacking(error: OSError) -> int:
    """Fail for a full disk or memory; raise any other error again."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        raise error
    return _fail(error.strerror or str(error), code=1)


def _fail(message: str, code: int) -> int:
    print(f"mflow: error: {message}", file=sys.stderr)
    return code
