"""Two ranks on a CPU train like one rank on the joined batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import not_about_kernels, perturbed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mflow_kernels import Glow
from mflow_kernels.testing import assert_close

RANKS = 2


def glow() -> Glow:
    torch.manual_seed(0)
    return perturbed(Glow((3, 8, 8), levels=2, steps=3, width=8, checkpoint_every=2)).double()


def batch() -> Tensor:
    """A batch whose two halves have different statistics."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x * torch.tensor([0.2, 0.2, 3.0, 3.0], dtype=torch.float64).view(4, 1, 1, 1)


def train(flow: nn.Module, x: Tensor) -> None:
    latents, logdet = flow(x)
    (sum(z.pow(4).sum() for z in latents) / len(x) - logdet.mean()).backward()


def one_rank(rank: int, folder: Path) -> None:
    """Compute and save what all tests check on one rank, so that they share a pair of processes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    flow, x = glow(), batch().chunk(RANKS)[rank]
    flow.initialize(x)
    train(DistributedDataParallel(flow), x)
    gradients = {name: p.grad for name, p in flow.named_parameters()}
    torch.save((flow.state_dict(), gradients), folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="expected finite values"):
        # The other rank's batch is finite, but both ranks must raise.
        glow().initialize(x * float("inf") if rank == 0 else x)
    torch.save(sharded(x), folder / f"sharded{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (folder,), nprocs=RANKS)
    return folder


def sharded(x: Tensor) -> list[list[Tensor]]:
    gradients = []
    for kind in ("static graph", "sharded"):
        flow = glow().to(memory_format=torch.contiguous_format)  # FSDP's condition
        parallel = (
            DistributedDataParallel(flow, static_graph=True)
            if kind == "static graph"
            else fully_shard(flow)
        )
        for _ in range(2):
            parallel.zero_grad()
            train(parallel, x)
        found = [p.grad for p in flow.parameters()]
        gradients.append([g.full_tensor() if isinstance(g, DTensor) else g for g in found])
    flow = glow().to(memory_format=torch.contiguous_format)
    fully_shard(flow.chain.layers[1])
    with pytest.raises(RuntimeError, match=r"replaced by another tensor .*FSDP2 of one layer"):
        train(flow, x)
    return gradients


@not_about_kernels
def test_a_static_graph_and_sharded_weights(ranks: Path) -> None:
    """DDP with `static_graph`, and FSDP2 of the whole flow. Layers cannot be sharded one by one,
    because their weights are gone in the backward pass."""
    flow = glow()
    train(flow, batch())
    for kind in torch.load(ranks / "sharded0.pt", weights_only=True):
        for found, p in zip(kind, flow.parameters(), strict=True):
            assert p.grad is not None
            assert_close(found, p.grad, terms=1000)


@not_about_kernels
def test_gradients_and_initialization_are_those_of_the_joined_batch(ranks: Path) -> None:
    flow = glow()
    flow.initialize(batch())
    train(flow, batch())
    for rank in range(RANKS):
        state, gradients = torch.load(ranks / f"{rank}.pt", weights_only=True)
        for name, value in flow.state_dict().items():
            if value.is_floating_point():
                assert_close(state[name], value, terms=1000, name=f"{name} of rank {rank}")
        for name, p in flow.named_parameters():
            assert p.grad is not None
            assert_close(gradients[name], p.grad, terms=1000, name=f"{name} of rank {rank}")
