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
from mflow_kernels.runs.parser import OptionParser, explain, load_yaml, parse_yaml, with_docstring


def parse_config(text: str | bytes, source: str) -> dict[str, Any]:
    """Return the options of RunConfig that a YAML file sets; see `parse_yaml`."""
    parser = OptionParser()
    add_options(parser)
    # RunConfig has these beyond TrainConfig.
    parser.add_argument("--channels", type=int)
    parser.add_argument("--crop", type=int | None)
    parser.add_argument("--class_names", type=list[str])
    return parse_yaml(parser, text, source, _with_stages)


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
    names = [option.name for option in dataclasses.fields(StageOptions)]
    for number, each in enumerate(found):
        if isinstance(each, StageOptions):
            stages.append(each)
            continue
        if not isinstance(each, dict):
            raise StagesError(f"[{number}]: expected options such as {{dim: 32}}, got {each}")
        for name in each:
            if name not in names:
                expected = ", ".join(names)
                raise StagesError(f"[{number}]: expected {expected}, got {name}")
        try:
            stages.append(StageOptions(**vars(parser.parse_object(each))))
        except (ArgumentError, TypeError, ValueError) as error:
            raise StagesError(f"[{number}].{explain(error)}") from None
    return stages


def with_short_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with those for all further flows, such as stage_dim, set in `stages`."""
    short = [f"stage_{name}" for name in SHORT_STAGE_OPTIONS if f"stage_{name}" in options]
    rest = {name: value for name, value in options.items() if name not in short}
    given = {name.removeprefix("stage_"): options[name] for name in short}
    return rest | {"stages": [dataclasses.replace(stage, **given) for stage in rest["stages"]]}


def _with_stages(given: dict[Any, Any]) -> dict[Any, Any]:
    """Return the options of a file with `stages`. Earlier versions wrote lists such as stage_steps
    instead, with a value for each further flow, one for all, or none."""
    old = [name for name in given if str(name).startswith("stage_")]
    if not old:
        return given
    if "stages" in given:
        raise ValueError(f"{old[0]}: expected its values in the list stages")
    lists: dict[str, Any] = {"dim": given.get("stage_dims", [None]), "coupling": ["affine"]}
    lists |= {name[6:]: given[name] for name in old if name != "stage_dims"}
    if "channels" in given:  # a whole configuration, from before these options
        lists = {"delta": [1.0], "learning_rate": []} | lists
        if "classes" not in given and lists.get("weight") == []:
            lists["weight"] = [given.get("weight")]
    count = len(lists["dim"]) if isinstance(lists["dim"], list) else 1
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) not in {0, 1, count}:
            raise ValueError(f"stage_{name}: expected a list of 1 or {count}, got {values}")
        if len(values) < 2:
            lists[name] = (values or [2.0 if name == "delta" else None]) * count
    stages = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return {name: given[name] for name in given if name not in old} | {"stages": stages}


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
        # Added by hand, because jsonargparse expects booleans as "--reversible false", takes a
        # folder named "null" for no folder, and explains a bad list of stages in many lines.
        by_hand = {
            option.name: option
            for option in dataclasses.fields(options)
            if isinstance(_default(option), bool) or option.name in ("classes", "init_from")
        }
        if options is HierarchyOptions:
            by_hand |= {o.name: o for o in dataclasses.fields(options)}
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
                how = {"type": read_stages, "metavar": "LIST"}
            group.add_argument(f"--{name}", default=_default(option), help=texts[name], **how)
        if options is HierarchyOptions:
            _add_short_options(group)


def _add_short_options(group: Any) -> None:
    texts = argument_texts(with_docstring(StageOptions))
    types = get_type_hints(StageOptions)
    for option in dataclasses.fields(StageOptions):
        if option.name in SHORT_STAGE_OPTIONS:
            text = texts[option.name]
            if option.default is not None:
                text += f" (default: {option.default})"
            group.add_argument(
                f"--stage_{option.name}", type=types[option.name], default=SUPPRESS, help=text
            )


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
