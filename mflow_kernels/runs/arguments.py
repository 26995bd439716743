"""The options of a run as arguments of a parser, and as values in a YAML file."""

import dataclasses
import inspect
import re
from typing import Any, get_args, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from mflow_kernels.data.named import LABELS, NAMED_DATASETS
from mflow_kernels.runs.options import (
    DataOptions,
    HierarchyOptions,
    MemoryOptions,
    ModelOptions,
    ObjectiveOptions,
    TrainingOptions,
)
from mflow_kernels.runs.parser import OptionParser, parse_yaml, with_docstring


def parse_config(text: str | bytes, source: str) -> dict[str, Any]:
    """Return the options of RunConfig that a YAML file sets; see `parse_yaml`."""
    parser = OptionParser()
    add_options(parser)
    # RunConfig has these beyond TrainConfig.
    parser.add_argument("--channels", type=int)
    parser.add_argument("--crop", type=int | None)
    parser.add_argument("--class_names", type=list[str])
    return parse_yaml(parser, text, source)


def add_options(parser: ArgumentParser) -> None:
    """Add every option of TrainConfig to `parser`, in groups."""
    for options in (
        DataOptions,
        ModelOptions,
        HierarchyOptions,
        ObjectiveOptions,
        MemoryOptions,
        TrainingOptions,
    ):
        # Added by hand, because jsonargparse expects lists as "[64,32]", which shells expand, and
        # booleans as "--reversible false", and takes a folder named "null" for no folder.
        by_hand = {
            option.name: option
            for option in dataclasses.fields(options)
            if isinstance(_default(option), bool | list) or option.name in ("classes", "init_from")
        }
        parser.add_class_arguments(with_docstring(options), as_group=True, skip={*by_hand})
        group = (parser.groups or {})[options.__name__]
        for action in group._group_actions:
            action.help = (action.help or "").replace("{named_datasets}", _named_datasets())
        texts = argument_texts(options)
        types = get_type_hints(options)
        for name, option in by_hand.items():
            how: dict[str, Any]
            if types[name] is bool:
                how = {"action": ActionYesNo(no_prefix="no-")}
            elif name == "classes":
                how = {"nargs": "?", "const": LABELS, "type": str, "metavar": "ATTRIBUTES"}
            elif name == "init_from":
                how = {"type": str, "metavar": "RUN"}
            else:
                (kind,) = get_args(types[name])
                how = {"nargs": "*", "type": kind, "metavar": name.split("_")[-1].upper()}
            group.add_argument(f"--{name}", default=_default(option), help=texts[name], **how)


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
