"""The documentation's code runs and prints what its comments say, and its commands exist."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop.test_published import chaiyujin_weights, openai_variables, rosinality_weights
from tiny_runs import TINY, write_images

from mflow_kernels import layers, ops
from mflow_kernels.training.cli import _parsers, main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"^ *print\(.*\) *# (.+)$", re.MULTILINE)
SHOWN = re.compile(r"^::: mflow_kernels\.([\w.]+)$", re.MULTILINE)
COMMAND = re.compile(r"^    (mflow .+)$", re.MULTILINE)
PUBLIC = {
    "models": ("mflow_kernels", "mflow_kernels.models"),
    "layers": ("mflow_kernels.layers",),
    "ops": ("mflow_kernels.ops",),
    "interop": ("mflow_kernels.interop",),
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that pages read: prepared images, an exported model, weights."""
    folder = tmp_path_factory.mktemp("files")
    faces = write_images(folder / "faces")
    prepared = str(folder / "celeba64.safetensors")
    prepare = ["prepare", str(faces), "--out", prepared, "--image-size", "8", "--workers", "1"]
    assert main(prepare) == 0
    run = str(folder / "run")
    assert main(["train", *TINY, "--data", prepared, "--run-dir", run]) == 0
    assert main(["export", run, "--out", str(folder / "photos")]) == 0
    variables = {name: a.astype(np.float32) for name, a in openai_variables().items()}
    np.savez(folder / "glow.npz", **variables)
    torch.save(rosinality_weights(), folder / "model.pt")
    torch.save({"graph": chaiyujin_weights()}, folder / "trained.pkg")
    for kind in ("good", "bad"):
        write_images(folder / "parts" / kind, channels=3)
    return folder


@pytest.fixture(scope="module")
def package() -> Any:
    """The package as mkdocstrings reads it."""
    griffe = pytest.importorskip("griffe", reason="needs the extra test-all")
    return griffe.load("mflow_kernels", search_paths=[ROOT], resolve_aliases=True)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_code_runs_and_prints_its_comments(
    page: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run in order, with the variables of the blocks before."""
    monkeypatch.chdir(files)
    if page.stem == "anomaly-detection":
        pytest.importorskip("anomalib")
    variables: dict[str, object] = {}
    for number, block in enumerate(BLOCK.findall(page.read_text()), start=1):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, f"{name(page)}, block {number}", "exec"), variables)
        expected = PRINTED.findall(block)
        assert not expected or output.getvalue().splitlines() == [e.strip() for e in expected]


WITH_COMMANDS = [p for p in (ROOT / "README.md", *PAGES) if COMMAND.search(p.read_text())]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `mflow` command of a page has options that exist, with values of the right type."""
    monkeypatch.chdir(ROOT)
    for command in COMMAND.findall(page.read_text()):
        parser, _ = _parsers()
        parser.parse_args(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("page", PUBLIC)
def test_api_pages_have_every_public_name(page: str, package: Any) -> None:
    """Each name has its docstring on the page, and an example."""
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    on_page = {path.rpartition(".")[2]: path for path in SHOWN.findall(text)}
    code = " ".join(BLOCK.findall(text))
    for module in PUBLIC[page]:
        for public in importlib.import_module(module).__all__:
            if module == "mflow_kernels" and public in (*layers.__all__, *ops.__all__):
                continue  # on the page of layers or operators
            assert not package[on_page[public]].is_module, f"{public} names a module, too"
            assert re.search(rf"\b{public}\b", code), public


def test_pictures_exist_and_are_small() -> None:
    for page in (ROOT / "README.md", *PAGES):
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / picture).stat().st_size < 80_000, picture


def test_every_environment_variable_is_on_its_page() -> None:
    folders = [ROOT / name for name in ("mflow_kernels", "benchmarks", "tests")]
    code = [p for f in folders for p in (*f.rglob("*.py"), *f.rglob("*.sh"))] + [ROOT / "setup.py"]
    read = r"""(?:environ(?:\.get\(|\[)|VARIABLE = |flag\(|\$\{)"?(MFLOW_\w+)"""
    found = {name for path in code for name in re.findall(read, path.read_text())}
    assert len(found) >= 8
    page = (ROOT / "docs" / "environment.md").read_text()
    assert not [name for name in found if f"`{name}`" not in page]
