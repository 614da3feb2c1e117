"""One training run: the loop over its steps, and what it reports, keeps and leaves."""

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
from vlm.distributed.groups import world_group
from vlm.distributed.sharding import ShardedModel, clip_gradients
from vlm.embedding.embedder import RuntimeEncoder
from vlm.errors import InterruptedRunError, VlmError
from vlm.models.encoder import MAIN, Encoder
from vlm.models.pretraining import PretrainingModel
from vlm.text.caption_ids import text_id
from vlm.training.bundles import leave_bundle
from vlm.training.config import TrainConfig
from vlm.training.distillation import Distillation
from vlm.training.monitoring.environment import record_environment
from vlm.training.monitoring.flops import FlopMeter
from vlm.training.monitoring.measures import measure, tower_norms
from vlm.training.monitoring.profiling import Profiler
from vlm.training.monitoring.reporter import METRICS_NAME, Pace, Reporter
from vlm.training.monitoring.scoring import describe_evaluation, ready_to_score
from vlm.training.monitoring.trackers import Trackers
from vlm.training.optimization.averaging import MovingAverage, mean_of_checkpoints
from vlm.training.optimization.optimizer import RATE_RATIO, shrink_embedding_gradients
from vlm.training.optimization.stages import StageLocks, learning_rate_at
from vlm.training.precision import Precision
from vlm.training.progress import Progress, due_after
from vlm.training.reading import describe_sources
from vlm.training.safety.failures import going_on, named
from vlm.training.safety.guard import Guard, SkippedSteps
from vlm.training.safety.interruption import Interruption, Stoppable
from vlm.training.safety.skipped import SkippedLog
from vlm.training.saving.checkpoint import Checkpoints
from vlm.training.saving.resuming import BUNDLE_NAME, Origin, record_start, scores_missing
from vlm.training.saving.state import OptimizerState, Settings, SourceFingerprints
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
    flops: FlopMeter
    """Says how much of the devices is used."""
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
            "data": f"{describe_sources(self.loader, self.data.batch)}; captions in "
            f"{', '.join(config.captions.languages)}",
            "loss": f"{plan.kind} over {candidates:,} candidates (group size {group}, "
            f"micro-batches {config.loss.micro_batches})",
            **({} if self.distillation is None else {"teacher": self.distillation.describe()}),
            "ranks": f"{ranks} on {self.accelerator.device.type}, {config.precision}"
            + ("" if self.sharded is None else f", {self.sharded.sharding}"),
            "scored": describe_evaluation(config, is_scored=self.evaluate is not None),
            "watched": ", ".join(
                [f"{METRICS_NAME} every {config.report_every:,} steps", *config.trackers]
            ),
            "steps": f"{self.progress.step:,} to {steps:,} of {batches} samples "
            f"({config.samples / samples:.1f} epochs)",
        }
        goes_on = [f"from: {line}" for line in self.origin.described()]
        if goes_on and self.progress.step < steps:
            rates = self.progress.learning_rate, learning_rate_at(self.progress.step, config)
            goes_on.append("from: the learning rate {:.3g}, now {:.3g}".format(*rates))
        return "\n".join([*goes_on, *(f"{name}: {line}" for name, line in lines.items())])

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
            record_environment(
                config.run_folder,
                step=self.progress.step,
                processes=self.accelerator.num_processes,
            )
        with Interruption() as interruption:
            with (
                Reporter(
                    config.run_folder,
                    samples=self.progress.samples + config.samples_after(self.progress.step),
                    progress=self.progress,
                    active=is_main,
                    trackers=Trackers(config, self.progress) if is_main else None,
                ) as reporter,
                Profiler(
                    config.run_folder, config.profile, rank=self.accelerator.process_index
                ) as profiler,
            ):
                self.accelerator.print(self.describe(), file=sys.stderr)
                try:
                    try:
                        self._train(reporter, interruption, profiler)
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
            "optimizer": OptimizerState(
                self._unwrapped, self.optimizer, getattr(torch, self.config.optimizer.state_dtype)
            ),
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

    def _train(self, reporter: Reporter, interruption: Interruption, profiler: Profiler) -> None:
        """Take the steps that are left, and after each what is due.

        It is saved before it is scored, so that a signal during an evaluation loses nothing.
        """
        progress, last, pace = self.progress, self.config.schedule.steps, Pace()
        samples, steps = self._logs()
        saved = progress.step
        if scores_missing(self.config, saved, self.checkpoints.group) and not self._score(
            reporter, interruption
        ):
            raise self._interrupted(interruption, saved=saved)
        with closing(self._batches(interruption)) as batches:
            for batch in pace.timed(batches):
                profiler.begin(progress.step + 1)
                result = self.train_step(batch, progress.step, interruption)
                self._advance(reporter, pace)
                samples.note(progress.step, batch.skipped)
                due = due_after(progress.step, self.config)
                stop = steps.record(self.guard.verdicts(wait=due.any))
                if due.any or stop:
                    samples.record(progress)
                if due.report:
                    measured = self._measured(result, batch, pace)
                    reporter.record(progress.step, measured | {"skipped_samples": samples.total})
                with pace.paused():
                    if due.save or stop:
                        must = stop or due.last
                        reporter.flush_to_disk()
                        self.checkpoints.save(progress.step, self.state, required=must)
                        saved = progress.step
                    if stop or (due.save and self._agreed(interruption)):
                        raise self._interrupted(interruption, saved=saved)
                    if due.evaluate and not self._score(reporter, interruption):
                        raise self._interrupted(interruption, saved=saved)
        if progress.step < last:  # asked to end while it waited for data
            steps.record(self.guard.verdicts(wait=True))
            samples.record(progress)
            raise self._interrupted(interruption, saved=saved)

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

    def _score(self, reporter: Reporter, interruption: Interruption) -> bool:
        """Score the weights, and their averages; return False where a signal has cut it short."""
        if self.evaluate is None:
            return True
        encoder = Stoppable(self._encoder, interruption)
        try:
            with ready_to_score(self.sharded, self.precision):
                scores = self.evaluate(encoder)
            for kind, average in self._averages().items():
                with average.in_place(), ready_to_score(self.sharded, self.precision):
                    own = self.evaluate(encoder)
                scores |= {name.replace("/", f"_{kind}/", 1): each for name, each in own.items()}
        except VlmError:  # which every rank raises where one does
            if not self._agreed(interruption):
                raise
            return False
        reporter.record(self.progress.step, scores)
        return True

    def _measured(self, result: StepResult, batch: Batch, pace: Pace) -> dict[str, float | None]:
        """Return what a step and those since the last report have shown; a collective operation."""
        measured = measure(result, batch, pace.rates(), self.accelerator)
        with pace.paused():  # they are counted the first time
            flops = self.flops.rates(batch, measured["samples_per_s"], self._unwrapped)
        counts = {"skipped_steps": self.guard.skipped}
        return measured | flops | counts | self.precision.measured()

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
            norms = {}
            if due_after(step + 1, self.config).report:
                norms = tower_norms(self._encoder, norm, settings.max_gradient_norm)
            logit_scale = self._encoder.logit_scales[MAIN].detach()
            skipped = self.guard.update(
                self.optimizer,
                step=step,
                uids=batch.uids,
                shared=shared,
                gradient_norm=norm,
                may_overflow=self.precision.may_overflow,
            )
        self.precision.update(~norm.isfinite())
        self.optimizer.zero_grad()
        self._encoder.clamp_logit_scale()
        if self.average is not None:
            self.average.update(step + 1, skipped)
        return StepResult(
            loss=output.loss,
            parts=output.parts if len(output.parts) > 1 else {},
            terms=output.terms,
            gradient_norm=norm,
            tower_norms=norms,
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

    def _interrupted(self, interruption: Interruption, *, saved: int) -> InterruptedRunError:
        """Save what the step `saved` lacks; return an error that says how the run goes on."""
        if saved < self.progress.step:
            self.checkpoints.save(self.progress.step, self.state, required=True)
        self.checkpoints.finish()  # or the newest is not there yet
        asked, rest = interruption.signal, going_on(self.checkpoints.latest())
        return InterruptedRunError(
            f"interrupted by {asked.name if asked else 'a signal to another rank'} after step "
            f"{self.progress.step} of {self.config.schedule.steps}; {rest}",
            exit_code=130 if asked == signal.SIGINT else 0,
        )

    @property
    def _unwrapped(self) -> PretrainingModel:
        model: PretrainingModel = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def _encoder(self) -> Encoder:
        return self._unwrapped.encoder
