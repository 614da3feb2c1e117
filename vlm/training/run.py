"""One training run: the loop over its steps, and what it reports, keeps and leaves."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from vlm.batches.batch import Batch, SkippedSample
from vlm.batches.loader import TrainingLoader
from vlm.batches.mixture import DataState
from vlm.bundle import Bundle, save_bundle
from vlm.data.sample import described
from vlm.models.encoder import MAIN, Encoder
from vlm.models.lora import without_lora
from vlm.models.pretraining import PretrainingModel
from vlm.storage.places import shown
from vlm.text.caption_ids import text_id
from vlm.training.averaging import MovingAverage, mean_of_checkpoints
from vlm.training.checkpoint import Checkpoints
from vlm.training.config import TrainConfig
from vlm.training.distillation import Distillation
from vlm.training.guard import check_finite, step_when_finite
from vlm.training.optimizer import RATE_RATIO
from vlm.training.reporter import Reporter
from vlm.training.resuming import BUNDLE_NAME, Origin, record_start
from vlm.training.skipped import SkippedLog
from vlm.training.stages import StageLocks, learning_rate_at
from vlm.training.state import OptimizerState, Progress, Settings, SourceFingerprints
from vlm.training.step import StepOutput, StepResult


@dataclass(frozen=True, kw_only=True)
class Run:
    """The built parts of a run; every rank calls the same methods at the same points."""

    config: TrainConfig
    accelerator: Accelerator
    start: Bundle
    """What the run started from; its model is the one that is trained."""
    model: nn.Module
    """The `PretrainingModel` as the accelerator prepared it, which also prepared the optimizer."""
    optimizer: torch.optim.Optimizer
    stages: StageLocks
    """Locks what a stage does not train."""
    distillation: Distillation | None
    """The losses towards a frozen teacher, if there is one."""
    step: Callable[[Sequence[Batch]], StepOutput]
    """The forward and backward passes of a step over its micro-batches."""
    loader: TrainingLoader
    data: DataState
    """How far the data has been read."""
    checkpoints: Checkpoints
    evaluate: Callable[[Encoder], dict[str, float]] | None
    """Scores the encoder; the ranks share the work."""
    average: MovingAverage | None = None
    """Of the model's weights."""
    progress: Progress = field(default_factory=Progress)
    """How far the run has come."""
    origin: Origin = field(default_factory=Origin)
    """The checkpoint that it goes on from, and what has changed since."""

    def describe(self) -> str:
        """Return what the run trains, on what, and for how long, a line each."""
        config, encoder = self.config, self._encoder
        data, plan, steps = config.data, config.loss.plan, config.schedule.steps
        sizes = [p.numel() for p in self._unwrapped.parameters()]
        trained = [p.numel() for p in self._unwrapped.parameters() if p.requires_grad]
        ranks = self.accelerator.num_processes
        group, samples = (
            plan.group_size or ranks,
            sum(each.size for each in self.loader.order.sources),
        )
        candidates = data.batch_size // ranks * group
        lines = {
            "model": f"{type(encoder).__name__}, {sum(sizes):,} parameters ({sum(trained):,} "
            f"trained), images of {self.start.preprocess_cfg['size']} pixels, "
            f"{encoder.embed_dim} dimensions",
            "data": f"{'; '.join(self._sources())}; captions in "
            f"{', '.join(config.captions.languages)}",
            "loss": f"{plan.kind} over {candidates:,} candidates (group size {group}, "
            f"micro-batches {config.loss.micro_batches})",
            **({} if self.distillation is None else {"teacher": self.distillation.describe()}),
            "ranks": f"{ranks} on {self.accelerator.device.type}, {config.precision}",
            "scored": self._scored(),
            "steps": f"{self.progress.step:,} to {steps:,} of {data.batch_size:,} samples "
            f"({steps * data.batch_size / samples:.1f} epochs)",
        }
        goes_on = [f"from: {line}" for line in self.origin.described()]
        return "\n".join([*goes_on, *(f"{name}: {line}" for name, line in lines.items())])

    def _scored(self) -> str:
        """Say what is scored, or why nothing is."""
        plan = self.config.evaluation
        if self.evaluate is not None:
            folder = shown(str(plan.folder or self.config.data.folder))
            return f"the split {plan.split!r} of {folder}, every {plan.every_steps:,} steps"
        if plan.every_steps:
            return f"nothing, as the data has no split {plan.split!r}; evaluation.folder names one"
        return "nothing, as evaluation.every_steps is 0"

    def _sources(self) -> list[str]:
        """Say how much each source has, and its share where there are several."""
        examples, order = self.loader.examples, self.loader.order
        found = [f"{source.name}: {described(source.sizes)}" for source in examples.sources]
        if len(found) == 1:
            return found
        shares = order.mixture.shares(self.data.batch)
        return [f"{each} ({share:.1%})" for each, share in zip(found, shares, strict=True)]

    def fit(self) -> Path:
        """Train to the end of the schedule; return the folder of the bundle that this leaves.

        Raises:
            TrainingError: the gradient is no longer finite; the weights are those before it.
            VlmError: too many samples cannot be used, or a file not written.
        """
        config, is_main = self.config, self.accelerator.is_main_process
        self.accelerator.wait_for_everyone()  # all ranks have checked the folder before one writes
        if is_main:
            record_start(config, self.origin)
        with Reporter(
            config.run_folder,
            samples=config.schedule.steps * config.data.batch_size,
            progress=self.progress,
            active=is_main,
        ) as reporter:
            self.accelerator.print(self.describe(), file=sys.stderr)
            try:
                self._train(reporter)
            finally:
                self.checkpoints.finish()
        bundle = self._save_bundle(BUNDLE_NAME)
        for kind, average in self._averages().items():
            with average.in_place():
                self._save_bundle(f"{BUNDLE_NAME}-{kind}")
        self.accelerator.end_training()
        return bundle

    def _save_bundle(self, name: str) -> Path:
        """Write the model as it is now; return the bundle's folder."""
        config, bundle = self.config, self.config.run_folder / name
        if self.accelerator.is_main_process:
            save_bundle(
                bundle,
                model=without_lora(self.start.model),
                model_cfg=self.start.model_cfg,
                preprocess_cfg=self.start.preprocess_cfg,
                tokenizer=self.start.tokenizer,
                languages=tuple(dict.fromkeys((*self.start.languages, *config.captions.languages))),
                truncate_dims=config.objectives.matryoshka,
            )
        return bundle

    @property
    def state(self) -> dict[str, Stateful]:
        """What a checkpoint keeps of the run, by name."""
        sometimes = {"ema": self.average, "teacher": self.distillation}
        return {name: part for name, part in sometimes.items() if part is not None} | {
            "model": self._unwrapped,
            "optimizer": OptimizerState(self._unwrapped, self.optimizer),
            "config": Settings(config=self.config),
            "progress": self.progress,
            "data": self.data,
            "sources": SourceFingerprints(
                {
                    order.name: source.fingerprint
                    for order, source in zip(
                        self.loader.order.sources, self.loader.examples.sources, strict=True
                    )
                }
            ),
        }

    def _train(self, reporter: Reporter) -> None:
        config, progress, batch_size = self.config, self.progress, self.config.data.batch_size
        last = config.schedule.steps
        batches = self.loader.read(self.data, last - progress.step)
        log = SkippedLog(
            config.run_folder,
            progress=progress,
            allowed_share=config.data.allowed_share,
            writes=self.accelerator.is_main_process,
        )
        unchecked: list[StepResult] = []
        skipped: list[tuple[int, SkippedSample]] = []
        reported, since, waited = progress.step, time.perf_counter(), 0.0
        while progress.step < last:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            skipped += [(progress.step + 1, each) for each in batch.skipped]
            result = self.train_step(batch, progress.step)
            unchecked.append(result)
            progress.step += 1
            progress.samples += batch_size
            self.loader.order.advance(self.data)
            reporter.advance(batch_size)
            step = progress.step
            # Each happens every n steps and at the end; 0 is never.
            reports, evaluates, saves = (
                every > 0 and (step % every == 0 or step == last)
                for every in (
                    config.report_every, config.evaluation.every_steps,
                    config.checkpoint.every_steps,
                )
            )  # fmt: skip
            if reports or evaluates or saves or step == last:
                check_finite(unchecked)  # waits for the device, so that the rate below is true
                unchecked.clear()
                log.record(progress, gather_object(skipped))
                skipped = []
            if reports:
                elapsed = time.perf_counter() - since
                rates = {
                    "samples_per_s": (step - reported) * batch_size / elapsed,
                    "data_wait_ratio": waited / elapsed,
                }
                reporter.record(step, self._averaged(result) | rates)
                reported, since, waited = step, time.perf_counter(), 0.0
            pause = time.perf_counter()
            if evaluates and self.evaluate is not None:
                reporter.record(step, self._scores(self.evaluate))
            if saves:
                self.checkpoints.save(step, self.state, required=step == last)
            since += time.perf_counter() - pause  # the rate is that of training alone

    def _scores(self, evaluate: Callable[[Encoder], dict[str, float]]) -> dict[str, float]:
        """Return the scores of the weights, and those of their averages next to them."""
        scores = evaluate(self._encoder)
        for kind, average in self._averages().items():
            with average.in_place():
                averaged = evaluate(self._encoder)
            scores |= {name.replace("/", f"_{kind}/", 1): each for name, each in averaged.items()}
        return scores

    def _averages(self) -> dict[str, MovingAverage]:
        """Return the averages of the weights by their kind."""
        averages = {} if self.average is None else {"ema": self.average}
        number = self.config.averaging.last_checkpoints
        if number and (found := self.checkpoints.newest(number, until=self.progress.step)):
            averages["mean"] = mean_of_checkpoints(self._unwrapped, found)
        return averages

    def train_step(self, batch: Batch, step: int) -> StepResult:
        """Update the model once on one global batch, of which `batch` is this rank's part."""
        self.stages.enter(step)
        self.model.train()
        # Dropout and the like follow from (seed, step, rank), so that resuming repeats them.
        torch.manual_seed(text_id(f"{self.config.seed}/{step}/{self.accelerator.process_index}"))
        rate = learning_rate_at(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group[RATE_RATIO]
        parts = batch.split(self.config.loss.micro_batches)
        output = self.step([part.to(self.accelerator.device) for part in parts])
        with self.stages.updating(step):
            norm: Tensor = self.accelerator.clip_grad_norm_(
                self.model.parameters(), self.config.optimizer.max_gradient_norm
            )
            logit_scale = self._encoder.logit_scales[MAIN].detach()
            step_when_finite(self.optimizer, norm)
        self.optimizer.zero_grad()
        self._encoder.clamp_logit_scale()
        if self.average is not None:
            self.average.update(step + 1)
        terms = output.terms.values()
        return StepResult(
            step=step,
            uids=batch.uids[:3],
            loss=output.loss,
            parts=output.parts if len(output.parts) > 1 else {},
            correct=torch.cat([term.correct for term in terms]),
            candidates=max(term.candidates for term in terms),
            gradient_norm=norm,
            logit_scale=logit_scale,
            learning_rate=rate,
        )

    @property
    def _unwrapped(self) -> PretrainingModel:
        model: PretrainingModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def _encoder(self) -> Encoder:
        return self._unwrapped.encoder

    def _averaged(self, result: StepResult) -> dict[str, float]:
        """Average what ranks measured apart, in one message, and read all of it."""
        own = {"loss": result.loss}
        own |= {f"loss/{name}": part for name, part in result.parts.items()}
        own["accuracy"] = result.correct.sum().to(result.loss.dtype)
        own["compared"] = torch.full_like(result.loss, len(result.correct))
        means = self.accelerator.reduce(torch.stack(list(own.values())), reduction="mean")
        measured = dict(zip(own, means.tolist(), strict=True))
        # Of all ranks together: one may have no caption in a language, and others many.
        measured["accuracy"] /= max(measured.pop("compared"), 1e-9)
        return measured | {
            "candidates": result.candidates,
            "gradient_norm": result.gradient_norm.item(),
            "logit_scale": result.logit_scale.item(),
            "learning_rate": result.learning_rate,
        }
