"""The command line: `mflow prepare | train | sample | reconstruct | evaluate | plan |
presets | export`."""

import importlib.util
import inspect
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mflow_kernels.data.printable import printable
from mflow_kernels.training.commands import Work, plan, prepare, presets, train
from mflow_kernels.training.run_commands import evaluate, export, reconstruct, sample
from mflow_kernels.version import __version__

if TYPE_CHECKING:
    from mflow_kernels.runs.parser import OptionParser

_REQUIRED = (
    *("PIL", "filelock", "jinja2", "jsonargparse", "lightning", "matplotlib", "rich"),
    *("safetensors", "tensorboard", "torchmetrics", "torchvision", "yaml"),
)
_COMMANDS: dict[str, Callable[..., Work]] = {
    command.__name__: command
    for command in (prepare, train, sample, reconstruct, evaluate, presets, plan, export)
}
# Placeholders that the help shows for values; for other arguments it shows the argument's name.
_METAVARS = {"preset": "NAME", "gpu_memory": "SIZE", "class_name": "NAME"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mflow` with these arguments (default: the process's) and return its exit code.

    The code is 0 for success, 1 if training diverged or the disk or memory is full, 2 for bad
    input, and 130 after Ctrl-C. Each failure prints one line to stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:  # answered although packages are missing
        print(f"mflow_kernels {__version__}")
        return 0
    missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"{', '.join(missing)} missing: pip install 'mflow_kernels[train]'", code=2)
    from mflow_kernels.data.files import RESOURCE_ERRORS

    try:
        return _run(argv)
    except KeyboardInterrupt:
        return _fail("interrupted", code=128 + signal.SIGINT)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _fail(
            f"{name}{error.strerror or error}", code=1 if error.errno in RESOURCE_ERRORS else 2
        )
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(f"not enough memory: {' '.join(str(error).split())[:120]}", code=1)


def run_process() -> int:
    """Run `main` as a process of its own, which one Ctrl-C ends.

    Further ones are ignored where nothing else handles them. They would interrupt the message about
    the first, or the end of the interpreter.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not if it is closed
            stream.reconfigure(errors="backslashreplace")  # names that the locale cannot write
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as nohup and "&" set it
        signal.signal(signal.SIGINT, interrupt)
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(argv: list[str]) -> int:
    from jsonargparse import ArgumentError

    from mflow_kernels.data.files import FolderError
    from mflow_kernels.data.sources import DataError
    from mflow_kernels.runs.parser import explain

    try:
        with _loading():
            work = _check(argv)
    except ArgumentError as error:
        return _fail(_suggesting(_as_typed(explain(error), argv), argv), code=2)
    except (ValueError, TypeError) as error:
        return _fail(_as_typed(str(error), argv), code=2)
    try:
        work()
    except (DataError, FolderError) as error:
        return _fail(_as_typed(str(error), argv), code=2)
    except FloatingPointError as error:
        return _fail(str(error), code=1)
    return 0


def _check(argv: list[str]) -> Work:
    """Check the arguments and return the work.

    Raises:
        ArgumentError, ValueError, TypeError: an argument is bad.
    """
    from mflow_kernels.runs.arguments import with_short_options
    from mflow_kernels.runs.presets import preset_options

    parser, parsers = _parsers()
    chosen = parser.parse_args(argv)
    name, options = chosen.subcommand, vars(chosen[chosen.subcommand])
    command = _COMMANDS[name]
    if command not in (train, plan):
        if command is sample:
            options["class_name"] = options.pop("class")
        return command(**options)
    preset = options["preset"]
    resumes = command is train and options["resume"] and not options["overwrite"]
    if preset and resumes:
        raise ValueError(
            "preset: expected none with --resume, which reads the options from the run folder, "
            f"got {preset}"
        )
    if preset or resumes:
        # These become the defaults, so options on the command line override them.
        values = preset_options(preset) if preset else _recorded(options)
        if command is train:
            values.pop("channels", None)  # training takes them from the images
        parsers[name].set_defaults(values)
        options = vars(parser.parse_args(argv)[name])
    arguments = {parameter: options.pop(parameter) for parameter in _own_parameters(command)}
    options = with_short_options(options)
    given = parser.parse_args(argv, defaults=False)[name]
    if command is plan and given.get("data") is not None:
        from mflow_kernels.data.cache import check_exists

        check_exists(options["data"])  # a preset may name data that this machine does not have
    return command(options, **arguments)


def _parsers() -> tuple["OptionParser", dict[str, "OptionParser"]]:
    """Return the parser of the command line, and that of each command."""
    from mflow_kernels.runs.arguments import add_options
    from mflow_kernels.runs.parser import OptionParser, with_docstring

    parser = OptionParser(
        prog="mflow",
        description="Manifold learning and density estimation with normalizing flows on images.",
    )
    parser.add_argument("--version", action="version", version=f"mflow_kernels {__version__}")
    commands = parser.add_subcommands(
        metavar="COMMAND", title="commands", description="See mflow COMMAND --help."
    )
    parsers = {}
    for name, command in _COMMANDS.items():
        parsers[name] = _parser_of(with_docstring(command))
        if command in (train, plan):
            add_options(parsers[name])
        commands.add_subcommand(name, parsers[name], help=_text(command, lines=1))
    parsers["plan"].set_defaults(data=None)
    return parser, parsers


def _own_parameters(command: Callable[..., Work]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a command's function that are not the options of a run."""
    found = inspect.signature(command).parameters
    return {name: parameter for name, parameter in found.items() if name != "options"}


def _parser_of(command: Callable[..., Work]) -> "OptionParser":
    """Return the parser of a command, whose arguments are the parameters of its function."""
    from mflow_kernels.runs.arguments import argument_texts
    from mflow_kernels.runs.parser import OptionParser

    parser = OptionParser(description=_text(command))
    texts = argument_texts(command)
    for name, parameter in _own_parameters(command).items():
        kind, default = parameter.annotation, parameter.default
        how: dict[str, Any] = {"help": texts[name]}
        if kind is bool:  # jsonargparse would expect "--ambient true"
            parser.add_argument(f"--{name}", action="store_true", **how)
            continue
        how["type"] = str if kind == str | None else kind  # a name may be "null"
        if name == "name":
            parser.add_argument(name, nargs="?", **how)
        elif default is parameter.empty and name != "out":
            parser.add_argument(name, **how)
        else:
            if default is parameter.empty:
                how |= {"required": True, "metavar": "FILE" if command is prepare else "FOLDER"}
            else:
                how["default"] = default
            if name in _METAVARS:
                how["metavar"] = _METAVARS[name]
            option = "class" if name == "class_name" else name  # `class` is a Python keyword
            parser.add_argument(f"--{option}", **how)
    return parser


def _recorded(options: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import fields

    from mflow_kernels.runs.config import TrainConfig
    from mflow_kernels.runs.folder import read_config

    names = [option.name for option in fields(TrainConfig)]
    config = TrainConfig(**{name: options[name] for name in names})
    folder = Path(options["run_dir"] or config.default_run_dir())
    recorded = vars(read_config(folder, "run_dir"))
    return {name: recorded[name] for name in names}


def _text(command: Callable[..., Work], lines: int | None = None) -> str:
    """Return the help text of a command: its docstring up to Args, or its first `lines` lines."""
    text = (command.__doc__ or "").split("Args:")[0]
    return " ".join(" ".join(text.strip().split("\n")[:lines]).split())


def _as_typed(message: str, argv: list[str]) -> str:
    """Replace the names of Python arguments in a message by their options.

    A message starts with one name or with several. Later in the message, a word is taken for a name
    only if it has an underscore and is not quoted or part of a path.
    """
    from dataclasses import fields

    from mflow_kernels.runs.config import TrainConfig
    from mflow_kernels.runs.options import SHORT_STAGE_OPTIONS
    from mflow_kernels.runs.parser import as_option

    start, colon, rest = message.partition(":")
    if start.startswith("stages["):

        def of_stage(found: re.Match[str]) -> str:
            short = as_option(f"stage_{found[1]}")
            typed = any(word.partition("=")[0] == short for word in argv)
            return short if typed else f"--{found[0]}"

        return re.sub(r"stages\[\d+\](?:\.(\w+))?", of_stage, message)
    if (*argv[:1], start) in {("prepare", "data"), ("presets", "preset")}:
        return message  # these two are positional
    if start == "image_shape":
        return ("--patch" if " patch" in rest else "--levels") + colon + rest
    options = {"class"} | {option.name for option in fields(TrainConfig)}
    options |= {name for each in _COMMANDS.values() for name in _own_parameters(each)}
    options -= {"run", "name"}  # these are positional
    options |= {f"stage_{name}" for name in SHORT_STAGE_OPTIONS}
    names = start.split(", ")
    if not options.issuperset(names):
        return message
    if start != "preset":  # its message quotes a file, which spells options as Python does
        known = "|".join(sorted(name for name in options if "_" in name))
        rest = re.sub(
            rf"(?<!got )(?<![\w/.'-])({known})(?![\w/'-])", lambda m: as_option(m[0]), rest
        )
    return ", ".join(map(as_option, names)) + colon + rest


def _suggesting(message: str, argv: list[str]) -> str:
    """Add to a message about unknown options which ones may be meant."""
    from mflow_kernels.runs.parser import suggestion

    prefix, found, unknown = message.partition("unrecognized arguments: ")
    parsers = _parsers()[1]
    if prefix or not found or argv[0] not in parsers:
        return message
    options = re.findall(r"^ +(--[\w-]+)", parsers[argv[0]].format_help(), re.MULTILINE)
    names = [word for word in unknown.split() if word.startswith("--")]
    meant = [s for name in names if (s := suggestion(name, options)) is not None]
    return f"{message} (did you mean {', '.join(meant)}?)" if meant else message


@contextmanager
def _loading() -> Iterator[None]:
    """Show a line on a terminal while packages and data are loaded, and then remove it."""
    if not sys.stderr.isatty():
        yield
        return
    print("mflow: loading ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _is_out_of_memory(error: Exception) -> bool:
    # torch raises a plain RuntimeError if CPU memory runs out.
    name = type(error).__name__
    return name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


def _fail(message: str, code: int) -> int:
    print(f"mflow: error: {printable(message)}", file=sys.stderr)
    return code
