"""Check whether the adapters were tested with the installed version of a library's code.

Version numbers are not enough: FrEIA's development branch calls itself 0.2, as the release does,
but clamps differently. A layer is therefore left alone if the tests did not run against the source
of its module.
"""

import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from functools import cache

from torch import nn


def why_untested(
    tested: Mapping[str, set[str]],
    kind: type,
    modules: Iterable[nn.Module] = (),
    functions: Iterable[str] = (),
) -> str:
    """Say which code of a class and of the modules in a layer is untested; "" if none is.

    The code of networks does not matter, because it runs as it is.

    Args:
        tested: the fingerprints of the tested versions of each module of the library.
        functions: the library's modules with functions that the layer calls.
    """
    names = {cls.__module__ for m in modules for cls in type(m).__mro__} & tested.keys()
    names |= {cls.__module__ for cls in kind.__mro__} & tested.keys() | {kind.__module__}
    untested = sorted(
        name
        for name in names.union(functions)
        if source_fingerprint(name) not in tested.get(name, ())
    )
    return f"the source of {untested[0]} is not that of a tested version" if untested else ""


def original_of(tested: Mapping[str, set[str]], cls: type) -> type | None:
    """Return the class of a library that `cls` is a copy of, in a module with tested code.

    Other packages copy a library's module, as anomalib does with FrEIA's `AllInOneBlock`.
    """
    digest = source_fingerprint(cls.__module__)
    for name, digests in tested.items():
        if digest in digests:
            original = getattr(sys.modules.get(name), cls.__name__, None)
            return original if isinstance(original, type) else None
    return None


@cache
def source_fingerprint(name: str) -> str:
    """Return 12 digits of the SHA-256 of an imported module's source without white space."""
    try:
        text = inspect.getsource(sys.modules[name])
    except (OSError, TypeError, KeyError):  # installed without its source, or made in a notebook
        return ""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:12]
