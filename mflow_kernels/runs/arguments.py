"""The options of a run as arguments of a parser, and as values in a YAML file."""

import dataclasses
import inspect
import re
from argparse import SUPPRESS, ArgumentTypeError
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from mflow_kernels.data.named import LABELS, NAMED_DATASETS
from mflow_kernels.runs.options import (
    SHORT_STAGE_OPTIONS,
    DataOptions,
    HierarchyOptions,
    MemoryOptions,
    ModelOptions,
    ObjectiveOptions,
    StageOptions,
    TrainingOptions,
)
from mflow_kernels.runs.parser import OptionParser, explain, load_yaml, with_docstring


def parse_config(text: str | bytes, source: str) -> dict[str, Any]:
    """Return the options of RunConfig that a YAML file sets. `source` names it in messages.

    Raises:
        ValueError: the text is not YAML or not a mapping, an option is unknown, or a value has the
            wrong type.
    """
    parser = OptionParser()
    add_options(parser)
    # RunConfig has these beyond TrainConfig.
    parser.add_argument("--channels", type=int)
    parser.add_argument("--crop", type=int | None)
    parser.add_argument("--class_names", type=list[str])
    try:
        given = load_yaml(text)
        if given is None:  # the file is empty or has only comments
            return {}
        if not isinstance(given, dict):
            raise ValueError(f"expected options and their values, got a {type(given).__name__}")
        for name, value in given.items():
            # A few lines of YAML aliases can expand to more nested lists than fit in memory.
            items = value if isinstance(value, list) else [value]
            nested = [item.values() if isinstance(item, dict) else [item] for item in items]
            if any(isinstance(inner, list | dict) for values in nested for inner in values):
                raise ValueError(f"{name}: expected a value or a list of values, got deep nesting")
        # Not parse_string: jsonargparse takes more texts for numbers than PyYAML, which wrote them.
        values = vars(parser.parse_object(given))
        return {name: values[name] for name in given}
    except RecursionError:
        raise ValueError(f"{source}: expected options and their values, got deep nesting") from None
    except (ArgumentError, yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {explain(error)}") from None


class StagesError(ArgumentTypeError, TypeError):
    """An error whose message argparse and jsonargparse both pass on."""


def read_stages(value: Any) -> list[StageOptions]:
    """Return the further flows of a list, or of its YAML text.

    Raises:
        StagesError: the value is no list of mappings, or an option is unknown or has a value
            of the wrong type.
    """
    try:
        found = load_yaml(value) if isinstance(value, str) else value
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise StagesError(f"expected a list in YAML ({explain(error)})") from None
    if not isinstance(found, list):
        raise StagesError(f"expected a list such as [{{dim: 32}}], got {value}")
    parser, stages = OptionParser(), []
    parser.add_class_arguments(with_docstring(StageOptions))
    names = list(vars(StageOptions()))
    for number, each in enumerate(found):
        values = vars(each) if isinstance(each, StageOptions) else each
        if not isinstance(values, dict):
            raise StagesError(f"[{number}]: expected options such as {{dim: 32}}, got {each}")
        for name in {**values}.keys() - names:
            raise StagesError(f"[{number}]: expected {', '.join(names)}, got {name}")
        try:
            stages.append(StageOptions(**vars(parser.parse_object(values))))
        except (ArgumentError, TypeError, ValueError) as error:
            raise StagesError(f"[{number}].{explain(error)}") from None
    return stages


def with_short_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with those for all further flows, such as stage_dim, set in `stages`."""
    rest = {name: value for name, value in options.items() if not name.startswith("stage_")}
    given = {name[6:]: value for name, value in options.items() if name not in rest}
    return rest | {"stages": [dataclasses.replace(stage, **given) for stage in rest["stages"]]}


def add_options(parser: ArgumentParser) -> None:
    """Add every option of TrainConfig to `parser`, in groups, and the short ones for all further
    flows. A short option that is not given is absent from the parsed values."""
    for options in (
        DataOptions,
        ModelOptions,
        HierarchyOptions,
        ObjectiveOptions,
        MemoryOptions,
        TrainingOptions,
    ):
        title = inspect.cleandoc(with_docstring(options).__doc__).partition("Args:")[0]
        group = parser.add_argument_group(" ".join(title.split()).rstrip("."))
        texts, types = argument_texts(options), get_type_hints(options)
        # Not by add_class_arguments: jsonargparse expects booleans as "--reversible false", takes a
        # folder named "null" for no folder, and explains a bad list of stages in many lines.
        for option in dataclasses.fields(options):
            name, how = option.name, dict[str, Any](type=types[option.name])
            if types[name] in (bool, bool | None):
                how = {"action": ActionYesNo(no_prefix="no-")}
            elif name == "classes":
                how = {"nargs": "?", "const": LABELS, "type": str, "metavar": "ATTRIBUTES"}
            elif name == "init_from":
                how = {"type": str, "metavar": "RUN"}
            elif name == "stages":
                how = {"type": read_stages, "metavar": "LIST"}
            text = texts[name].replace("{named_datasets}", _named_datasets())
            group.add_argument(f"--{name}", default=_default(option), help=text, **how)
        if options is not HierarchyOptions:
            continue
        texts, types = argument_texts(with_docstring(StageOptions)), get_type_hints(StageOptions)
        for name in SHORT_STAGE_OPTIONS:
            default = getattr(StageOptions(), name)
            text = texts[name] if default is None else f"{texts[name]} (default: {default})"
            group.add_argument(f"--stage_{name}", type=types[name], default=SUPPRESS, help=text)


def _named_datasets() -> str:
    return ", ".join(f'"{name}" ({named.description})' for name, named in NAMED_DATASETS.items())


def _default(option: "dataclasses.Field[Any]") -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def argument_texts(thing: Any) -> dict[str, str]:
    """Return the text for each argument in the docstring of a class or function."""
    # Python before 3.13 keeps the indentation of the source; `cleandoc` removes it.
    lines = inspect.cleandoc(thing.__doc__ or "").partition("Args:")[2]
    texts = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in texts}
