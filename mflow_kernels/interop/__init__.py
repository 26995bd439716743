"""Models of other flow libraries, computed by our kernels after `accelerate(model)`."""

from mflow_kernels.interop.accelerate import accelerate, decelerate
from mflow_kernels.interop.plain import plain_module
from mflow_kernels.interop.published import (
    PublishedGlow,
    glow_from_chaiyujin,
    glow_from_openai,
    glow_from_rosinality,
)
from mflow_kernels.interop.report import Left, Replaced, Report

__all__ = [
    "Left",
    "PublishedGlow",
    "Replaced",
    "Report",
    "accelerate",
    "decelerate",
    "glow_from_chaiyujin",
    "glow_from_openai",
    "glow_from_rosinality",
    "plain_module",
]
