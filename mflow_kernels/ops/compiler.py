"""Triton, or a stand-in if Triton is not installed.

The stand-in lets modules define kernels; nothing launches them, because the references and the C++
loops do not need Triton. Every module of kernels imports Triton from here.
"""

from types import SimpleNamespace
from typing import Any

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

# Whether kernels in Gluon can be compiled. Its interface changes with Triton's versions, and
# Triton's interpreter does not know it.
GLUON = triton.__version__.startswith("3.9.") and not triton.knobs.runtime.interpret


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. On the host, Triton's own function takes ten calls."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is positive."""
    return 1 << (n - 1).bit_length()
