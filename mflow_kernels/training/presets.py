"""Configurations that come with the package, one YAML file each."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError

from mflow_kernels.training.config import add_options
from mflow_kernels.training.options import OptionParser, explain

PRESETS = ("digits", "celeba64", "celeba128", "celeba256", "celebahq1024")


def preset_text(name: str) -> str:
    """The YAML of a preset, or of a file of one's own.

    Raises:
        ValueError: neither a preset nor a file.
    """
    if name in PRESETS:
        return (files("mflow_kernels.training") / "presets" / f"{name}.yaml").read_text()
    if not Path(name).is_file():
        raise ValueError(
            f"preset: expected {', '.join(PRESETS)} or a YAML file with options, got {name!r}"
        )
    return Path(name).read_text()


def preset_options(name: str) -> dict[str, Any]:
    """The options that a preset gives, by their names in TrainConfig.

    Raises:
        ValueError: no such preset; unknown options or values of the wrong type in it.
    """
    text = preset_text(name)
    parser = OptionParser()
    add_options(parser)
    try:
        values = vars(parser.parse_string(text))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise ValueError(f"preset: {name}: {explain(error)}") from None
    return {option: values[option] for option in yaml.safe_load(text) or {}}
