"""One training run: the loop over its steps, and what it reports, keeps and leaves."""

import math
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from vlm.batches.batch import Batch
from vlm.batches.loader import TrainingLoader
from vlm.batches.mixture import DataState
from vlm.bundle import Bundle
from vlm.data.sample import described
from vlm.distributed.groups import world_group
from vlm.distributed.sharding import ShardedModel, clip_gradients
from vlm.embedding.embedder import RuntimeEncoder
from vlm.errors import InterruptedRunError, VlmError
from vlm.models.encoder import MAIN, Encoder
from vlm.models.pretraining import PretrainingModel
from vlm.storage.places import shown
from vlm.text.caption_ids import text_id
from vlm.training.averaging import MovingAverage, mean_of_checkpoints
from vlm.training.bundles import leave_bundle
from vlm.training.checkpoint import Checkpoints
from vlm.training.config import TrainConfig
from vlm.training.distillation import Distillation
from vlm.training.due import due_after
from vlm.training.failures import going_on, named
from vlm.training.guard import Guard, SkippedSteps
from vlm.training.interruption import Interruption, Stoppable
from vlm.training.optimizer import RATE_RATIO, shrink_embedding_gradients
from vlm.training.precision import Precision
from vlm.training.reporter import Pace, Reporter
from vlm.training.resuming import BUNDLE_NAME, Origin, record_start, scores_missing
from vlm.training.scoring import ready_to_score
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
    """The `PretrainingModel`, within DDP where several ranks have all of its weights."""
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
    precision: Precision
    """The arithmetic of the towers."""
    sharded: ShardedModel | None
    """The model, where its weights are divided over ranks."""
    checkpoints: Checkpoints
    evaluate: Callable[[RuntimeEncoder], dict[str, float]] | None
    """Scores the encoder; the ranks share the work."""
    guard: Guard
    """Lets updates happen, or not."""
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
        group = plan.group_size or ranks
        samples = sum(each.size for each in self.loader.order.sources)
        candidates = data.batch_size // ranks * group
        batches = ", then ".join(f"{size:,}" for size in dict.fromkeys(config.batch_sizes))
        lines = {
            "model": f"{type(encoder).__name__}, {sum(sizes):,} parameters ({sum(trained):,} "
            f"trained), images of {self.start.preprocess_cfg['size']} pixels, "
            f"{encoder.embed_dim} dimensions",
            "data": f"{'; '.join(self._sources())}; captions in "
            f"{', '.join(config.captions.languages)}",
            "loss": f"{plan.kind} over {candidates:,} candidates (group size {group}, "
            f"micro-batches {config.loss.micro_batches})",
            **({} if self.distillation is None else {"teacher": self.distillation.describe()}),
            "ranks": f"{ranks} on {self.accelerator.device.type}, {config.precision}"
            + ("" if self.sharded is None else f", {self.sharded.sharding}"),
            "scored": self._scored(),
            "steps": f"{self.progress.step:,} to {steps:,} of {batches} samples "
            f"({config.samples / samples:.1f} epochs)",
        }
        goes_on = [f"from: {line}" for line in self.origin.described()]
        if goes_on and self.progress.step < steps:
            rates = self.progress.learning_rate, learning_rate_at(self.progress.step, config)
            goes_on.append("from: the learning rate {:.3g}, now {:.3g}".format(*rates))
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
            InterruptedRunError: a signal has ended the run; all that it has learnt is saved.
            TrainingError: too many updates in a row were skipped.
            VlmError: too many samples cannot be used, or a file not written.
        """
        config, is_main = self.config, self.accelerator.is_main_process
        self.accelerator.wait_for_everyone()  # all ranks have checked the folder before one writes
        if is_main:
            record_start(config, self.origin)
        with Interruption() as interruption:
            with Reporter(
                config.run_folder,
                samples=config.samples,
                progress=self.progress,
                active=is_main,
            ) as reporter:
                self.accelerator.print(self.describe(), file=sys.stderr)
                try:
                    try:
                        self._train(reporter, interruption)
                    finally:
                        self.checkpoints.finish()
                except InterruptedRunError:
                    self.accelerator.wait_for_everyone()  # for the rank that writes
                    raise
                except Exception as error:
                    raise named(
                        error, step=self.progress.step, saved=self.checkpoints.latest()
                    ) from error
            bundle = self._save_bundle(BUNDLE_NAME)
            for kind, average in self._averages().items():
                with average.in_place():
                    self._save_bundle(f"{BUNDLE_NAME}-{kind}")
            self.accelerator.end_training()
        return bundle

    def _save_bundle(self, name: str) -> Path:
        """Write the model as it is now; return the bundle's folder."""
        is_main, folder = self.accelerator.is_main_process, self.config.run_folder / name
        whole = self.sharded is None
        leave_bundle(folder, self.start, self.config, is_whole=whole, is_main=is_main)
        return folder

    @property
    def state(self) -> dict[str, Stateful]:
        """What a checkpoint keeps of the run, by name."""
        scaler = self.precision if self.precision.is_scaled else None
        sometimes = {"ema": self.average, "teacher": self.distillation, "scaler": scaler}
        return {name: part for name, part in sometimes.items() if part is not None} | {
            "model": self._unwrapped,
            "optimizer": OptimizerState(self._unwrapped, self.optimizer),
            "config": Settings(config=self.config),
            "guard": self.guard,
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

    def _train(self, reporter: Reporter, interruption: Interruption) -> None:
        """Take the steps that are left, and after each what is due.

        It is saved before it is scored, so that a signal during an evaluation loses nothing.
        """
        progress, last, pace = self.progress, self.config.schedule.steps, Pace()
        samples, steps = self._logs()
        saved = progress.step
        if self.evaluate is not None and scores_missing(self.config, saved, self.checkpoints.group):
            self._score(self.evaluate, reporter, interruption)
        with closing(self._batches(interruption)) as batches:
            for batch in pace.timed(batches):
                result = self.train_step(batch, progress.step, interruption)
                self._advance(reporter, pace)
                samples.note(progress.step, batch.skipped)
                due = due_after(progress.step, self.config)
                stop = steps.record(self.guard.verdicts(wait=due.any))
                if due.any or stop:
                    samples.record(progress)
                if due.report:
                    reporter.record(progress.step, self._averaged(result) | pace.rates())
                with pace.paused():
                    if due.save or stop:
                        must = stop or due.last
                        self.checkpoints.save(progress.step, self.state, required=must)
                        saved = progress.step
                    if stop or (due.save and self._agreed(interruption)):
                        raise self._interrupted(interruption)
                    if due.evaluate and self.evaluate is not None:
                        self._score(self.evaluate, reporter, interruption)
        if progress.step < last:  # asked to end while it waited for data
            steps.record(self.guard.verdicts(wait=True))
            samples.record(progress)
            if saved < progress.step:
                self.checkpoints.save(progress.step, self.state, required=True)
            raise self._interrupted(interruption)

    def _batches(self, interruption: Interruption) -> Generator[Batch]:
        """Give the batches that are left; one process alone stops to wait when it is asked to end.

        One of several goes on: the others may be in the middle of a step that needs it.
        """
        alone = self.accelerator.num_processes == 1
        left = self.config.schedule.steps - self.progress.step
        return self.loader.read(self.data, left, until=interruption.asked if alone else None)

    def _agreed(self, interruption: Interruption) -> bool:
        """Return whether any rank was asked to end; a collective operation."""
        return interruption.agreed(world_group(), self.accelerator.device)

    def _score(
        self,
        evaluate: Callable[[RuntimeEncoder], dict[str, float]],
        reporter: Reporter,
        interruption: Interruption,
    ) -> None:
        """Score the weights, and their averages; a signal cuts it short, and the next step ends."""
        encoder = Stoppable(self._encoder, interruption)
        try:
            with ready_to_score(self.sharded, self.precision):
                scores = evaluate(encoder)
            for kind, average in self._averages().items():
                with average.in_place(), ready_to_score(self.sharded, self.precision):
                    own = evaluate(encoder)
                scores |= {name.replace("/", f"_{kind}/", 1): each for name, each in own.items()}
        except VlmError:  # which every rank raises where one does
            if not self._agreed(interruption):
                raise
        else:
            reporter.record(self.progress.step, scores)

    def _averages(self) -> dict[str, MovingAverage]:
        """Return the averages of the weights by their kind."""
        averages = {} if self.average is None else {"ema": self.average}
        number = self.config.averaging.last_checkpoints
        if number and (found := self.checkpoints.newest(number, until=self.progress.step)):
            averages["mean"] = mean_of_checkpoints(self._unwrapped, found)
        return averages

    def train_step(
        self, batch: Batch, step: int, interruption: Interruption | None = None
    ) -> StepResult:
        """Update the model once on one global batch, of which `batch` is this rank's part.

        Args:
            batch: This rank's samples.
            step: Steps taken before it.
            interruption: Says whether this rank was asked to end, which all learn from the step.
        """
        self.stages.enter(step)
        self.model.train()
        # Dropout and the like follow from (seed, step, rank), so that resuming repeats them.
        torch.manual_seed(text_id(f"{self.config.seed}/{step}/{self.accelerator.process_index}"))
        rate = self.progress.learning_rate = learning_rate_at(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group[RATE_RATIO]
        self.guard.begin()
        parts = batch.split(self.config.loss.micro_batches)
        output = self.step([part.to(self.accelerator.device) for part in parts])
        # This message travels while the gradient is clipped.
        stop = interruption is not None and interruption.asked()
        shared = self.guard.share(output.loss, stop=stop)
        settings = self.config.optimizer
        shrink_embedding_gradients(self._encoder, settings.embedding_gradient_ratio)
        with self.stages.updating(step):
            parameters = list(self.model.parameters())
            self.precision.unscale(parameters)
            norm = clip_gradients(parameters, settings.max_gradient_norm)
            logit_scale = self._encoder.logit_scales[MAIN].detach()
            skipped = self.guard.update(
                self.optimizer,
                step=step,
                uids=batch.uids,
                shared=shared,
                gradient_norm=norm,
                may_overflow=self.precision.may_overflow,
            )
        self.precision.update(skipped)
        self.optimizer.zero_grad()
        self._encoder.clamp_logit_scale()
        if self.average is not None:
            self.average.update(step + 1, skipped)
        terms = output.terms.values()
        return StepResult(
            loss=output.loss,
            parts=output.parts if len(output.parts) > 1 else {},
            correct=torch.cat([term.correct for term in terms]),
            candidates=max(term.candidates for term in terms),
            gradient_norm=norm,
            logit_scale=logit_scale,
            learning_rate=rate,
        )

    def _advance(self, reporter: Reporter, pace: Pace) -> None:
        """Count a step that was taken, also one whose update was skipped."""
        batch_size = int(self.loader.order.advance(self.data).counts.sum())
        self.progress.step += 1
        self.progress.samples += batch_size
        reporter.advance(batch_size)
        pace.advance(batch_size)

    def _logs(self) -> tuple[SkippedLog, SkippedSteps]:
        config, progress = self.config, self.progress
        writes = self.accelerator.is_main_process
        return (
            SkippedLog(
                config.run_folder,
                progress=progress,
                allowed_share=config.data.allowed_share,
                writes=writes,
            ),
            SkippedSteps(config.run_folder, progress=progress, writes=writes),
        )

    def _interrupted(self, interruption: Interruption) -> InterruptedRunError:
        """Return an error that says what an interrupted run leaves, and how it goes on."""
        self.checkpoints.finish()  # or the newest is not there yet
        asked, saved = interruption.signal, self.checkpoints.latest()
        return InterruptedRunError(
            f"interrupted by {asked.name if asked else 'a signal to another rank'} after step "
            f"{self.progress.step} of {self.config.schedule.steps}; {going_on(saved)}",
            exit_code=130 if asked == signal.SIGINT else 0,
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
        measured |= {
            "candidates": result.candidates,
            "gradient_norm": result.gradient_norm.item(),
            "logit_scale": result.logit_scale.item(),
            "learning_rate": result.learning_rate,
            "skipped_steps": self.guard.skipped,
        }
        # What is not finite has no number in JSON; `skipped_steps.jsonl` has it.
        return {name: value for name, value in measured.items() if math.isfinite(value)}
