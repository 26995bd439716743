"""jsonargparse with options --spelled-so, short help and errors of one line."""

import argparse
import re
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter


class _Formatter(DefaultHelpFormatter):
    """Ends each help text with its default alone: types are clear from the texts."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        unsaid = default is None or default is False or default in ([], argparse.SUPPRESS)
        if unsaid or not action.option_strings:
            return text
        if default is True:
            default = action.option_strings[0]
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{text} (default: {default})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return action.dest.upper().replace("_", "-")


class OptionParser(ArgumentParser):
    """An ArgumentParser that raises its errors (see `explain`) rather than exit."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(exit_on_error=False, formatter_class=_Formatter, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> Any:
        return super().add_argument(*map(_hyphens, names), **kwargs)


def _hyphens(name: str) -> str:
    # jsonargparse adds a hidden --print_shtab of its own and looks for it by that name.
    own = not name.startswith("--") or name.startswith("--print_")
    return name if own else name.replace("_", "-")


def explain(error: Exception) -> str:
    """A parsing error as one line: which argument, what was expected, what came."""
    text = str(error)
    if '"subcommand" to be one of' in text:
        return "expected a command (mflow --help lists them)"
    if text.startswith("argument COMMAND: invalid choice: "):
        given = text.partition("choice: ")[2].partition(" (")[0]
        return f"expected a command (mflow --help lists them), got {given}"
    if "arguments are required: " in text:
        names = re.findall(r"\w+\.(\w+)", text.partition("required: ")[2])
        return f"{names[0]}: expected a value, got none"
    key = re.search(r'Parser key "(\w+)"', text)
    came = re.search(r"(?:Got|Given) value: (.*)", text)
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", text)
    if not (key and came and expected):
        return " ".join(text.split())
    kinds = [_in_words(kind) for kind in expected if "NoneType" not in kind]
    return f"{key[1]}: expected {' or '.join(kinds)}, got {came[1]}"


def _in_words(kind: str) -> str:
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    if choices:
        names = choices[1].replace("'", "")
        return f"one of {names}" if "," in names else names
    words = {"int": "a whole number", "float": "a number", "str": "text", "list": "a list"}
    return words.get(kind.removeprefix("<class '").removesuffix("'>"), kind)
