"""Export sampling with torch.export, then load the file and sample without the model.

python examples/export_and_sample.py [sampler.pt2]
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mflow_kernels import Glow


class Sampler(nn.Module):
    """Turns latents, finest first, into images."""

    def __init__(self, glow: Glow) -> None:
        super().__init__()
        self.glow = glow

    def forward(self, *latents: Tensor) -> Tensor:
        return self.glow.inverse(latents)[0]


def normal(glow: Glow, n: int, temperature: float, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        temperature * torch.randn(n, *shape, generator=generator) for shape in glow.latent_shapes
    )


def main(path: Path) -> None:
    torch.manual_seed(0)
    glow = Glow((3, 16, 16), levels=2, steps=2, width=16).eval()
    glow.initialize(torch.rand(16, 3, 16, 16) - 0.5)
    latents = normal(glow, 4, temperature=0.7, seed=1)
    with torch.no_grad():
        torch.export.save(torch.export.export(Sampler(glow), latents), path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")

    # From here on only the file is used. `import mflow_kernels.ops` registers its operators.
    sampler = torch.export.load(path).module()
    images = sampler(*normal(glow, 4, temperature=0.7, seed=2))
    with torch.no_grad():
        expected = Sampler(glow)(*normal(glow, 4, temperature=0.7, seed=2))
    print(f"images {tuple(images.shape)}, off the model's by {(images - expected).abs().max():.1e}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "sampler.pt2")
