"""The forecast of whole steps, on launches made up by hand."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.reports import forecast
from mflow_kernels.training.account import Kernel
from mflow_kernels.training.cards import CARDS

CARD = CARDS["H100"]


def kernel(name: str, moved: int, flops: int = 0) -> Kernel:
    return Kernel(name, moved, 0, flops, torch.bfloat16)


KERNELS = [
    kernel("convolution", 10**6, 10**12),
    kernel("add", 3 * 10**9),
    kernel("relu", 10**9),
    kernel("network", 10**6, 10**12),
]


def test_a_forecast_is_above_the_bound() -> None:
    row = forecast.forecast("a spec", "sample", "plain, channels_last", KERNELS, 10**6)
    assert row.bound == pytest.approx(2e12 / 989e12 + 4e9 / 3.35e12)
    products = 1e12 / 989e12 * (1 / 0.5 + 1 / 0.3)
    assert row.device == pytest.approx(4 * 2e-6 + products + 4e9 / (0.8 * 3.35e12))
    assert row.host == pytest.approx(3 * 8e-6 + 12e-6)
    assert row.eager == row.device > row.bound
    trained = forecast.forecast("a spec", "train", "plain, channels_last", KERNELS, 10**6)
    assert trained.optimizer == pytest.approx(4 * 9 * 1e6 / (0.8 * 3.35e12))
    assert (trained.device, row.optimizer) == (row.device, 0)
    many = forecast.forecast("a spec", "sample", "plain", [kernel("add", 4)] * 100, 0)
    assert many.eager == many.host == pytest.approx(8e-4)


def test_every_kernel_of_ours_is_known() -> None:
    """A kernel with another name would be forecast as cuDNN's."""
    names = {
        name.strip("_")
        for file in (Path(forecast.__file__).parents[2] / "mflow_kernels" / "ops").glob("*.py")
        for name in re.findall(r"^def (_?\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert len(names) > 15
    splines = {name for name in names if name.startswith("spline")}  # no Glow has them
    assert all(name.startswith(forecast.OURS) for name in names - splines)


def test_a_float32_product_of_ours_is_three() -> None:
    product = Kernel("conv1x1", 1, 0, 10**12, torch.float32)
    assert forecast.device_seconds(product, CARD) == pytest.approx(2e-6 + 1e12 / (0.1 * 495e12))


def test_a_compiler_fuses_what_is_between_products() -> None:
    assert [k.name for k in forecast.fused(KERNELS)] == ["convolution", "add", "network"]


def test_measurements_fill_the_last_column(tmp_path: Path) -> None:
    def result(task: str, variant: str, *seconds: float) -> dict[str, object]:
        about = {"spec": "a spec", "task": task, "variant": variant}
        return {"extra_info": about, "stats": {"data": seconds}}

    file = tmp_path / "models.json"
    made = [result("train", "plain, channels_last", 0.1, 0.3, 0.2), {"extra_info": {}}]
    file.write_text(json.dumps({"benchmarks": made}))
    rows = [
        forecast.forecast("a spec", "train", variant, KERNELS, 10)
        for variant in ("plain, channels_last", "plain, compiled")
    ]
    *_, eager, compiled = forecast.table(rows, forecast.measured([file])).splitlines()
    assert eager.endswith(" 200.0")
    assert compiled.endswith(f" {1e3 * rows[1].optimizer:.1f}")  # nothing after the forecast


def test_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert forecast.main(["--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 4 + 3
    assert all(name in "\n".join(lines) for name in forecast.VARIANTS)
