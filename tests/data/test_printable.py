import os

import pytest

from mflow_kernels.data.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\nb\r\tc\x7f\x9b31m", "a\\nb\\r\\tc\\x7f\\x9b31m"),
        ("naïve 图像 🙂 é", "naïve 图像 🙂 é"),
        ("gpj.\u202egnp", "gpj.\\u202egnp"),
        ("\u2028\u2029\u200b\ufeff\U000e0041", "\\u2028\\u2029\\u200b\\ufeff\\U000e0041"),
        (os.fsdecode(b"\xff\xfe.png"), "\\udcff\\udcfe.png"),
    ],
)
def test_characters_that_a_terminal_would_obey_are_escaped(text, shown):
    assert printable(text) == shown
    printable(text).encode()
