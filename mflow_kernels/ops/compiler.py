"""Triton, or a stand-in if Triton is not installed.

The stand-in lets modules define kernels; nothing launches them, because the references and the C++
loops do not need Triton. Every module of kernels imports Triton from here.
"""

import os
from types import SimpleNamespace
from typing import Any, Literal, cast

Kernels = Literal["auto", "torch"]
VARIABLE = "MFLOW_KERNELS"


def requested() -> Kernels:
    """The value of $MFLOW_KERNELS, by default "auto": "torch" turns all kernels and loops off.

    Raises:
        ValueError: another value.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "torch"):
        raise ValueError(f"{VARIABLE}: expected auto or torch, got {value!r}")
    return cast(Kernels, value)


KERNELS = requested()

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    TRITON_INSTALLED = False

    class _Constant:
        def __init__(self, value: Any) -> None:
            self.value = value

    def _jit(function: Any = None, **options: Any) -> Any:
        return function or _jit

    triton = SimpleNamespace(__version__="0", jit=_jit)
    tl = SimpleNamespace(constexpr=_Constant, float32=None, float64=None)
else:
    TRITON_INSTALLED = True

# Whether kernels in Gluon can be compiled: its interface changes with Triton's versions, and these
# are known (tests/versions). Triton's interpreter does not know Gluon.
GLUON_VERSIONS = ("3.6.", "3.7.", "3.9.")
GLUON = triton.__version__.startswith(GLUON_VERSIONS) and not triton.knobs.runtime.interpret


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host, Triton's own function takes ten calls."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is positive."""
    return 1 << (n - 1).bit_length()
