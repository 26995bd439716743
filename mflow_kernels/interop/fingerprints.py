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
    tested: Mapping[str, set[str]], kind: type, modules: Iterable[nn.Module] = ()
) -> str:
    """Say which code of a class and of the modules in a layer is untested; "" if none is.

    The code of networks does not matter, because it runs as it is.

    Args:
        tested: the fingerprints of the tested versions of each module of the library.
    """
    names = {cls.__module__ for m in modules for cls in type(m).__mro__} & tested.keys()
    names |= {cls.__module__ for cls in kind.__mro__} & tested.keys() | {kind.__module__}
    untested = sorted(
        name for name in names if source_fingerprint(name) not in tested.get(name, ())
    )
    return f"the source of {untested[0]} is not that of a tested version" if untested else ""


@cache
def source_fingerprint(name: str) -> str:
    """Return 12 digits of the SHA-256 of an imported module's source without white space."""
    try:
        text = inspect.getsource(sys.modules[name])
    except OSError:  # the library was installed without its source
        return ""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:12]
