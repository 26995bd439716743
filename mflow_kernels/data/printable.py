"""Names and messages that a terminal shows as text and never obeys."""

import unicodedata

# Control characters (escape sequences start with one), invisible format marks (those that reverse
# the direction of text among them), lone surrogates (bytes that are no UTF-8), private and
# unassigned characters, line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def printable(text: str) -> str:
    r"""The text with every character that a terminal would obey or hide as an escape: \x1b, \u202e.

    The result is one line, and can be encoded in UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )
