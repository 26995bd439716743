"""Models of other flow libraries on our kernels, in one line: `accelerate(model)`."""

from mflow_kernels.interop.accelerate import accelerate, decelerate
from mflow_kernels.interop.report import Left, Replaced, Report

__all__ = ["Left", "Replaced", "Report", "accelerate", "decelerate"]
