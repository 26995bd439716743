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
        unsaid = default is None or default is False or default == argparse.SUPPRESS
        if unsaid or not action.option_strings:
            return text
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{text} (default: {default})"


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
    key = re.search(r'Parser key "(\w+)"', text)
    came = re.search(r"(?:Got|Given) value: (.*)", text)
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", text)
    if not (key and came and expected):
        return " ".join(text.split())
    types = " or ".join(_TYPES.get(e, e.removeprefix("typing.Literal")) for e in expected)
    return f"{key[1]}: expected {types}, got {came[1]}"


_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "text",
    "<class 'bool'>": "true or false",
    "<class 'list'>": "a list",
    "<class 'NoneType'>": "nothing",
}
