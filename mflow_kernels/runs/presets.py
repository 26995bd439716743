"""Presets: configurations that come with the package, one YAML file each."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from mflow_kernels.data.files import read_regular
from mflow_kernels.runs.arguments import parse_config

PRESETS = (
    *("digits", "digits_nested", "celeba64", "celeba128", "celeba256", "celebahq1024"),
    *("jet_digits", "jet64"),
)


def preset_text(name: str) -> str:
    """Return the YAML text of a preset or of a user's file.

    Raises:
        ValueError: `name` is neither a preset nor a file that can be read.
    """
    if name in PRESETS:
        return (files("mflow_kernels.runs") / "presets" / f"{name}.yaml").read_text("utf-8")
    try:
        return read_regular(Path(name)).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"preset: {name}: expected text in UTF-8 ({error.reason})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"preset: expected {', '.join(PRESETS)} or a YAML file with options, got {name!r} "
            f"({reason})"
        ) from None


def preset_options(name: str) -> dict[str, Any]:
    """Return the options that a preset sets, by their names in RunConfig.

    The config.yaml of a run is a preset too.

    Raises:
        ValueError: `name` is not a preset or file, or it has unknown options or values of the
            wrong type.
    """
    values = parse_config(preset_text(name), f"preset: {name}")
    # A run's config.yaml also has values from its data. Among these, `mflow plan` takes `channels`.
    return {name: value for name, value in values.items() if name not in ("crop", "class_names")}
