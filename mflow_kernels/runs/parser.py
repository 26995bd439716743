"""jsonargparse with options --spelled-like-this, short help, and errors of one line."""

import argparse
import ast
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from mflow_kernels.version import __version__


class _Formatter(DefaultHelpFormatter):
    """Appends the default to each help text, but not the type, which the texts make clear."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        hidden = default is None or default is False or default in ([], argparse.SUPPRESS)
        if hidden or not action.option_strings:
            return text
        if default is True:
            default = action.option_strings[0]
        if isinstance(default, list):
            default = f"[{', '.join(map(str, default))}]"
        return f"{text} (default: {default})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.upper().replace("_", "-")


def as_option(name: str) -> str:
    """Return the spelling of an argument on the command line."""
    option, dot, rest = name.partition(".")  # of a value such as stages[0].max_steps
    return "--" + option.replace("_", "-") + dot + rest


class OptionParser(ArgumentParser):
    """An ArgumentParser that raises its errors instead of exiting; see `explain`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(exit_on_error=False, formatter_class=_Formatter, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> Any:
        return super().add_argument(*map(_hyphens, names), **kwargs)


def _hyphens(name: str) -> str:
    # jsonargparse adds a hidden --print_shtab and looks for it by that name.
    keep = not name.startswith("--") or name.startswith("--print_")
    return name if keep else name.replace("_", "-")


class _Loader(yaml.SafeLoader):
    """A loader for which a date is text, as in the name of a folder."""


_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def load_yaml(text: str | bytes) -> Any:
    """Read YAML, with dates as text."""
    return yaml.load(text, _Loader)


def with_docstring(thing: Any) -> Any:
    """Restore the docstring of a class or function, from which its help is made.

    Python removes docstrings under -OO and PYTHONOPTIMIZE=2; this reads them from the source.
    """
    if sys.flags.optimize >= 2:
        definition = ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
        assert isinstance(definition, ast.ClassDef | ast.FunctionDef)
        # Keep the indentation of the source, as Python does.
        thing.__doc__ = ast.get_docstring(definition, clean=False)
    return thing


def explain(error: Exception) -> str:
    """Return one line for a parsing error: the argument, what was expected, and what was given."""
    text = str(error)
    if '"subcommand" to be one of' in text:
        return "expected a command (mflow --help lists them)"
    if text.startswith("argument COMMAND: invalid choice: "):
        given = text.partition("choice: ")[2].partition(" (")[0]
        return f"expected a command (mflow --help lists them), got {given}"
    if unknown := re.fullmatch("Option '(.+)' is not accepted", text):
        return f"{unknown[1]}: mflow_kernels {__version__} has no such option"
    if "arguments are required: " in text:
        names = re.findall(r"\w+\.(\w+)", text.partition("required: ")[2])
        return f"{names[0]}: expected a value, got none"
    stages = re.fullmatch(r'(?:Parser key "|argument --)(stages)"?: (\S.*)', text)
    if stages:  # of `read_stages`; "[0].steps: ..." is about one value
        return f"{stages[1]}{'' if stages[2][0] == '[' else ': '}{stages[2]}"
    key = re.search(r'Parser key "(\w+)"', text)
    came = re.search(r"(?:Got|Given) value: (.*)", text)
    expected = re.findall(r"Expected (?:an? )?(.+?)(?:\. Got value|\n|$)", text)
    if not (key and came and expected):
        return " ".join(text.split())
    kinds = [_in_words(kind) for kind in expected if "NoneType" not in kind]
    return f"{key[1]}: expected {' or '.join(kinds)}, got {came[1]}"


def suggestion(given: str, options: Iterable[str]) -> str | None:
    """Return the option that an unknown one may stand for: --lr for --learning-rate, or a typo."""
    name = given.partition("=")[0].lstrip("-").replace("_", "-").lower()
    names = [option.lstrip("-") for option in options]
    short = [n for n in names if len(name) > 1 and "".join(w[0] for w in n.split("-") if w) == name]
    joined = [n for n in names if n.replace("-", "") == name.replace("-", "")]
    found = [*short, *joined, *difflib.get_close_matches(name, names, 1)]
    return f"--{found[0]}" if found else None


def _in_words(kind: str) -> str:
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if choices:
        names = choices[1].replace("'", "")
        return f"one of {names}" if "," in names else names
    words = {"int": "a whole number", "float": "a number", "str": "text", "list": "a list"}
    return words.get(kind.removeprefix("<class '").removesuffix("'>"), kind)
