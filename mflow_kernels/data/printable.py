"""Text for people: numbers with their nouns, and characters that a terminal would obey or hide."""

import unicodedata

# Unicode categories: control characters, which start escape sequences; format marks, some of which
# reverse the direction of text; surrogates, which stand for bytes that are not UTF-8; private and
# unassigned characters; line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 image", "1,000 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    r"""Replace each character that a terminal would obey or hide by its escape: \x1b, \u202e.

    The result is one line and valid UTF-8.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )
