"""Which code of other libraries ours was held to.

Versions do not tell: FrEIA's development branch calls itself 0.2, as the release does, and clamps
otherwise. So a layer whose module's text is none of those that the tests ran against is left.
"""

import hashlib
import inspect
import sys
from collections.abc import Iterable
from functools import cache

from torch import nn

# The first digits of SHA-256 of a module's text without white space, as `_digest` computes them.
TESTED = {
    "FrEIA.framework.graph_inn": {"48fb2462d7df"},  # 0.2
    "FrEIA.framework.sequence_inn": {"f2e1294a353b"},
    "FrEIA.modules.all_in_one_block": {"26fd4fedc6ce"},
    "FrEIA.modules.coupling_layers": {"1bff124c37e0"},
    "FrEIA.modules.fixed_transforms": {"7d893a8aee36"},
    "FrEIA.modules.invertible_resnet": {"733b52c6cfd1"},
    "FrEIA.modules.orthogonal": {"ae4785021aaf"},
    "FrEIA.modules.reshapes": {"b6fb9488d40d"},
    "nflows.transforms.base": {"1e7189db9cca"},  # 0.14
    "nflows.transforms.conv": {"d25c64424048"},
    "nflows.transforms.coupling": {"95cdd65ed1f6"},
    "nflows.transforms.linear": {"4eea9c6d8259"},
    "nflows.transforms.lu": {"6461862c2d76"},
    "nflows.transforms.normalization": {"15a59aa508ae"},
    "nflows.transforms.permutations": {"db20ec3d915a"},
    "nflows.transforms.reshape": {"14ee2ee3508a"},
    # 1.7.0 and 1.7.1, 1.7.2 and 1.7.3, development at c6616b1
    "normflows.core": {"e3c18e2d0536", "b15b268b1a0c", "fbfd5a0fb76c"},
    "normflows.flows.affine.coupling": {"2d15f2291305", "125df0e5894a"},
    "normflows.flows.affine.glow": {"f7431e0626d8"},
    "normflows.flows.mixing": {"67e059c2ebe2", "d4aaac22037c", "054f98c56e9d"},
    "normflows.flows.normalization": {"59c81946ef8b"},
    "normflows.flows.reshape": {"2f0c071c401a"},
    "normflows.nets.cnn": {"795b7764d029"},
    "normflows.nets.mlp": {"ae0867dade37"},
}


def why_untested(kind: type, modules: Iterable[nn.Module] = ()) -> str:
    """Where the code of a class of theirs, or of what is inside a layer of it, is not what ours was
    held to; "" if all of it is. Networks, which run as they are, do not matter."""
    names = {cls.__module__ for m in modules for cls in type(m).__mro__} & TESTED.keys()
    names |= {cls.__module__ for cls in kind.__mro__} & TESTED.keys() | {kind.__module__}
    untested = sorted(name for name in names if _digest(name) not in TESTED.get(name, ()))
    return f"{untested[0]} is not as in any version that this was tested with" if untested else ""


@cache
def _digest(name: str) -> str:
    try:
        text = inspect.getsource(sys.modules[name])
    except OSError:  # a library without its source
        return ""
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:12]
