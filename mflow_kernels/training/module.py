"""Training of all stages of a hierarchical flow, as one LightningModule and one `fit`."""

import math
import time
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mflow_kernels.layers import FlowStep, InvertibleConv1x1, ReversibleChain
from mflow_kernels.layers.conv1x1 import condition_number
from mflow_kernels.layers.step import fold
from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.objectives import Terms, bits_per_dimension
from mflow_kernels.training.config import TrainConfig
from mflow_kernels.training.data import (
    BatchStream,
    OrderedBatches,
    Splits,
    dequantize,
    stream_generator,
)

_TRAIN_NOISE, _VALID_NOISE = 1, 2  # keys of stream_generator; 0 is the data order's
_WARM_UP_STEPS = 100
_BOUND_EVERY = 100  # steps between two bounds of the weights' condition
_FINAL_RATE = 0.02  # of the highest learning rate, at the end of a stage


class FlowTraining(LightningModule):
    """Trains the stages one after another, each for the same number of steps.

    The stage, the batch, its noise and the learning rate are functions of `global_step` alone, so a
    run that resumes at any step goes on bit for bit. The earlier stages are frozen. Everything is
    logged in nats per dimension of the stage's own data, except bits_per_dim: of the image, under
    all stages up to the trained one.

    Args:
        model: the flow to train, on the device or still on the CPU.
        splits: images; `train` is trained on, `valid` watched.
        config: batch size, steps, seed, learning rate and the limits of drift and condition are
            read.
    """

    def __init__(self, model: HierarchicalFlow, splits: Splits, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._splits = splits
        self._config = config
        self._stream = BatchStream(splits.train, config.batch_size, config.seed)
        self.steps_per_stage = config.steps_per_stage(self._stream.batches_per_pass)
        self.validation_interval = min(self._stream.batches_per_pass, self.steps_per_stage)
        self._dims = math.prod(splits.train.image_shape)
        self._step_started = 0.0
        self._loss = torch.zeros(())

    @property
    def total_steps(self) -> int:
        return self.steps_per_stage * len(self.model.stages)

    @property
    def stage(self) -> int:
        """The stage that the next step trains, from 0."""
        return self._stage_of(self.global_step)

    @property
    def trained_stage(self) -> int:
        """The stage that the last step trained: at a boundary, `stage` is already the next."""
        return self._stage_of(max(0, self.global_step - 1))

    def _stage_of(self, step: int) -> int:
        return min(step // self.steps_per_stage, len(self.model.stages) - 1)

    def train_dataloader(self) -> BatchStream:
        config = self._config
        return BatchStream(self._splits.train, config.batch_size, config.seed, self.global_step)

    def val_dataloader(self) -> OrderedBatches:
        return OrderedBatches(self._splits.valid, self._config.batch_size)

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(stage.parameters())} for stage in self.model.stages]
        optimizer = torch.optim.Adam(groups, lr=self._config.learning_rate)
        rates = [self._rate_of_stage(stage) for stage in range(len(groups))]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self._step_started = time.perf_counter()
        if self.global_step % self.steps_per_stage == 0:
            with torch.no_grad():
                self.model.initialize(self._dequantize(batch, _TRAIN_NOISE), self.stage)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        stage = self.stage
        for chain in self._chains(stage):
            chain.drift = None
        x = self._dequantize(batch, _TRAIN_NOISE)
        terms, log_likelihood = self._terms(x, stage)
        dims = math.prod(cast(ManifoldFlow, self.model.stages[stage]).input_shape)
        loss = terms.loss.mean() / dims
        self._loss = loss.detach()
        metrics = {
            name: getattr(terms, name).detach().mean() / dims
            for name in ("loss", "on_manifold", "off_manifold", "logdet", "penalty")
        }
        bits = bits_per_dimension(log_likelihood.detach(), self._dims, self._config.n_bits)
        self.log_dict({**metrics, "bits_per_dim": bits.mean(), "stage": float(stage)})
        return loss

    def on_after_backward(self) -> None:
        """Stop before the optimizer uses the gradients of a loss that is not finite, or of states
        that were not rebuilt well enough. One look at the device for both."""
        drifts = [c.drift for c in self._chains(self.stage) if c.drift is not None]
        figures = torch.stack([self._loss, *drifts]).tolist()
        loss, limit = figures[0], self._config.max_drift
        where = f"at step {self.global_step} (stage {self.stage + 1})"
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} {where}; a lower --learning-rate may help"
            )
        if not drifts:
            return
        # NaN is no number to compare by: it is the largest.
        drift = max(figures[1:], key=lambda value: math.inf if math.isnan(value) else value)
        if not drift <= limit:
            every = self._config.checkpoint_every
            closer = f"--checkpoint-every {every // 2 if every else 4} or " if every != 1 else ""
            raise FloatingPointError(
                f"rebuilt states drifted by {drift:.2g} {where}, more than --max-drift {limit:g}: "
                f"the gradients would be wrong; --resume with {closer}--no-reversible goes on, in "
                "more memory"
            )
        self.log("drift", drift)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Before anything is saved, so that a run that resumes goes on from bounded weights too.
        limit, done = self._config.max_condition, (self.global_step + 1) % self.steps_per_stage
        if limit is not None and done % _BOUND_EVERY == 0:
            for module in self.model.stages[self.stage].modules():
                if isinstance(module, InvertibleConv1x1):
                    module.bound_condition_(limit)

    def _chains(self, stage: int) -> list[ReversibleChain]:
        modules = self.model.stages[stage].modules()
        return [module for module in modules if isinstance(module, ReversibleChain)]

    def _terms(self, x: Tensor, stage: int) -> tuple[Terms, Tensor]:
        """The objective of one stage, and log p(x) (N,) of all stages up to it."""
        outside = x.new_zeros(len(x))
        with torch.no_grad():
            for earlier in cast(list[ManifoldFlow], list(self.model.stages)[:stage]):
                latents, logdet = earlier.latents(x)
                outside = outside + logdet + earlier.objective.off_density(earlier, latents)
                x = earlier.gather(latents)
        terms = cast(ManifoldFlow, self.model.stages[stage]).terms(x)
        return terms, outside + terms.log_likelihood

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        seconds = time.perf_counter() - self._step_started
        rate = self.optimizers().param_groups[self.trained_stage]["lr"]  # type: ignore[union-attr]
        self.log_dict({"images_per_second": len(batch) / seconds, "learning_rate": rate})

    def on_validation_epoch_start(self) -> None:
        steps = [m for m in self.model.stages[self.trained_stage].modules() if type(m) is FlowStep]
        with torch.no_grad():
            folded = [condition_number(fold([step], torch.float64).weight[0]) for step in steps]
        condition = torch.stack([step.conv.condition_number() for step in steps]).max()
        # What is inverted is W with actnorm's scale folded in; what --max-condition bounds is W.
        figures = {"condition": condition, "folded_condition": torch.stack(folded).max()}
        self.log_dict({name: value.float() for name, value in figures.items()})

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        generator = stream_generator(0, _VALID_NOISE, batch_idx, device=self.device)
        x = dequantize(batch, self._config.n_bits, generator)
        log_prob = self.model.log_prob(x, self.trained_stage + 1)
        bits = bits_per_dimension(log_prob, self._dims, self._config.n_bits)
        self.log("heldout_bits_per_dim", bits.mean(), batch_size=len(batch))
        self.log("stage", float(self.trained_stage), batch_size=len(batch))

    def _dequantize(self, batch: Tensor, key: int) -> Tensor:
        generator = stream_generator(self._config.seed, key, self.global_step, device=self.device)
        return dequantize(batch, self._config.n_bits, generator)

    def _rate_of_stage(self, stage: int) -> Any:
        steps = self.steps_per_stage
        warm_up = max(1, min(_WARM_UP_STEPS, steps // 5))

        def rate(step: int) -> float:
            own = step - stage * steps
            if not 0 <= own < steps:
                return 0.0
            falling = _FINAL_RATE + (1 - _FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * own / steps))
            return min((own + 1) / warm_up, falling)

        return rate
