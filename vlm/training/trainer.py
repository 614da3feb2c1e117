"""The training loop."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlm.data.loader import TrainingLoader
from vlm.data.sample import Batch
from vlm.errors import TrainingError
from vlm.models.encoder import MAIN, Encoder
from vlm.models.growth import only_new_rows
from vlm.models.masked import Hidden
from vlm.models.pretraining import Encoded, PretrainingModel
from vlm.text.caption_ids import text_id
from vlm.training.checkpoint import Checkpoints, Progress
from vlm.training.config import ScheduleConfig
from vlm.training.reporter import Reporter
from vlm.training.schedule import learning_rate_share
from vlm.training.step import CachedContrast


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long the loop runs and how often it does what."""

    schedule: ScheduleConfig
    learning_rate: float
    max_gradient_norm: float
    report_every: int
    evaluate_every: int
    checkpoint_every: int
    micro_batches: int
    seed: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured; reading the tensors waits for the device."""

    loss: Tensor
    """The loss of the global batch."""
    parts: Mapping[str, Tensor]
    """What it is made of, by head and objective, where it has more than one part."""
    accuracy: Tensor
    """Share of images and texts whose most similar candidate in the batch is right."""
    candidates: int
    """How many texts an image was compared with."""
    gradient_norm: Tensor
    """Before clipping."""
    logit_scale: Tensor
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Runs built parts; it builds nothing itself."""

    config: LoopConfig
    accelerator: Accelerator
    """Devices, processes and mixed precision."""
    model: nn.Module
    """The `PretrainingModel` as the accelerator prepared it."""
    optimizer: torch.optim.Optimizer
    """As the accelerator prepared it."""
    contrast: CachedContrast[Batch]
    """The forward and backward passes of a step."""
    loader: TrainingLoader
    """This rank's batches."""
    checkpoints: Checkpoints
    reporter: Reporter
    evaluate: Callable[[Encoder], dict[str, float]]
    """Scores the encoder; called on the first rank only."""
    first_new_id: int | None = None
    """The first id of a grown vocabulary whose row has not been trained yet."""

    def fit(self, progress: Progress) -> None:
        """Train from `progress` to the end of the schedule.

        Raises:
            TrainingError: the gradient is no longer finite; the weights are those before it.
        """
        batch_size = self.loader.order.global_batch_size
        steps = self.config.schedule.steps
        batches = self.loader.read(first_sample=progress.samples, last_sample=steps * batch_size)
        step = reported = progress.step
        since = time.perf_counter()
        for batch in batches:
            result = self.train_step(batch.to(self.accelerator.device), step)
            step += 1
            self.reporter.advance(batch_size)
            if _is_due(step, self.config.report_every, steps):
                seconds = time.perf_counter() - since
                samples_per_s = (step - reported) * batch_size / seconds
                self._report(step, result, samples_per_s=samples_per_s)
                since, reported = time.perf_counter(), step
            pause = time.perf_counter()
            if _is_due(step, self.config.evaluate_every, steps):
                self._evaluate(step)
            if _is_due(step, self.config.checkpoint_every, steps):
                self._save(Progress(step=step, samples=step * batch_size))
            since += time.perf_counter() - pause  # the rate is that of training alone

    def train_step(self, batch: Batch, step: int) -> StepResult:
        """Update the model once on one global batch, of which `batch` is this rank's part."""
        self.model.train()
        # Dropout and the like follow from (seed, step, rank), so that resuming repeats them.
        torch.manual_seed(text_id(f"{self.config.seed}/{step}/{self.accelerator.process_index}"))
        rate = self.config.learning_rate * learning_rate_share(step, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = batch.split(self.config.micro_batches)
        output = self.contrast.step(
            self._encode,
            parts,
            [part.image_ids for part in parts],
            [part.caption_ids for part in parts],
        )
        with self._trained_at(step):
            gradient_norm = self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.max_gradient_norm
            )
            # Gradients are averaged over ranks, so every rank comes to the same decision here.
            if not torch.isfinite(gradient_norm):
                raise TrainingError(
                    f"the gradient at step {step} is {gradient_norm.item()} "
                    f"(loss {output.loss.item():.4g}); "
                    "lower optimizer.learning_rate or look at the batch's images: "
                    + ", ".join(batch.uids[:3])
                )
            logit_scale = self._encoder.logit_scales[MAIN].detach()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._encoder.clamp_logit_scale()
        accuracy = torch.stack([term.accuracy for term in output.terms.values()]).mean()
        of_loss = output.parts if len(output.parts) > 1 else {}
        return StepResult(
            loss=self.accelerator.reduce(output.loss, reduction="mean"),
            parts={
                name: self.accelerator.reduce(part, reduction="mean")
                for name, part in of_loss.items()
            },
            accuracy=self.accelerator.reduce(accuracy, reduction="mean"),
            candidates=max(term.candidates for term in output.terms.values()),
            gradient_norm=gradient_norm,
            logit_scale=logit_scale,
            learning_rate=rate,
        )

    def _trained_at(self, step: int) -> AbstractContextManager[None]:
        """Let the first steps of a grown model change its new rows only."""
        embedding, steps = self._encoder.token_embedding, self.config.schedule.new_rows_steps
        if self.first_new_id is not None and step < steps:
            return only_new_rows(self.model, embedding, first_new=self.first_new_id)
        if step == steps and steps > 0:
            # Else the old rows, which have not moved, would start at the new ones' step count.
            self.optimizer.state.pop(embedding.weight, None)
        return nullcontext()

    def _encode(
        self,
        part: Batch,
        *,
        images: bool = True,
        texts: bool = True,
        on_texts: Callable[[Mapping[str, Tensor]], Any] | None = None,
    ) -> Encoded:
        hidden = Hidden(part.hidden_words, part.hidden_patches)
        encoded: Encoded = self.model(
            part.images if images else None, part.texts if texts else {}, on_texts, hidden
        )
        return encoded

    @property
    def _unwrapped(self) -> PretrainingModel:
        model: PretrainingModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def _encoder(self) -> Encoder:
        return self._unwrapped.encoder

    def _report(self, step: int, result: StepResult, *, samples_per_s: float) -> None:
        self.reporter.record(
            step,
            {
                "loss": result.loss.item(),
                **{f"loss/{name}": part.item() for name, part in result.parts.items()},
                "accuracy": result.accuracy.item(),
                "candidates": result.candidates,
                "gradient_norm": result.gradient_norm.item(),
                "logit_scale": result.logit_scale.item(),
                "learning_rate": result.learning_rate,
                "samples_per_s": samples_per_s,
            },
        )

    def _evaluate(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self.reporter.record(step, self.evaluate(self._encoder))
        self.accelerator.wait_for_everyone()

    def _save(self, progress: Progress) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(self._unwrapped, self.optimizer, progress)
        self.accelerator.wait_for_everyone()


def _is_due(step: int, every: int, last: int) -> bool:
    """Say whether something that happens every so many steps, and at the end, happens now."""
    return every > 0 and (step % every == 0 or step == last)
