"""What a run's folder holds, and what may change when the run goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from textwrap import shorten
from typing import Any

import torch
import yaml

import vlm
from vlm.distributed.groups import RankGroup, exchange
from vlm.errors import CheckpointError, ConfigError
from vlm.files import write_file
from vlm.training.config import TrainConfig, config_as_plain, config_as_yaml, flat_settings
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.progress import due_after
from vlm.training.saving.checkpoint import Checkpoint, Resume

BUNDLE_NAME, CONFIG_NAME, CHECKPOINTS_NAME = "bundle", "config.yaml", "checkpoints"
HISTORY_NAME = "config_history.yaml"
"""What a run leaves in its folder."""

NO_EFFECT = "changes no result"
FROM_NOW = "holds from the next step on"

MAY_CHANGE = {
    "run_folder": NO_EFFECT,
    "cpu_threads": NO_EFFECT,
    "parallel_towers": NO_EFFECT,
    "report_every": NO_EFFECT,
    "trackers": NO_EFFECT,
    "deterministic": FROM_NOW,
    "profile": NO_EFFECT,
    "precision": FROM_NOW,
    "compile": FROM_NOW,  # of other roundings
    "data.folder": "its content is compared with what the run has read",
    "data.split": "its content is compared with what the run has read",
    "data.sources": "a source that stays goes on at its place, a new one begins at its start",
    "data.mixture": "each source goes on at its place",
    "data.skip_batches": "batches that are behind stay trained on",
    "data.batch_size": "the data goes on at its place; steps go on counting, with the same rates",
    "data.workers": NO_EFFECT,
    "data.stall_s": NO_EFFECT,
    "data.verify": NO_EFFECT,
    "data.cache_gib": NO_EFFECT,
    "data.keep_decoded": NO_EFFECT,
    "data.allowed_share": NO_EFFECT,
    "captions": FROM_NOW,
    "augmentation": FROM_NOW,
    "loss": FROM_NOW,
    "loss.plan.tile": NO_EFFECT,
    "loss.plan.keep_logits": NO_EFFECT,
    "loss.plan.keep_logits_mib": NO_EFFECT,
    "loss.plan.overlap": NO_EFFECT,
    "loss.plan.check_finite": NO_EFFECT,
    "objectives": FROM_NOW,
    "adapt": FROM_NOW,
    "adapt.grad_checkpointing": NO_EFFECT,
    "adapt.grad_checkpointing_every": NO_EFFECT,
    "optimizer": FROM_NOW,
    "optimizer.state_dtype": "the moments are converted",
    "schedule": "the rates are those of the new schedule, as if it had always been this one",
    "stages": "the rates are those of the new stages, as if they had always been these",
    "averaging": "an average that joins starts from the weights of the checkpoint",
    "guard": FROM_NOW,
    "evaluation": NO_EFFECT,
    "checkpoint": NO_EFFECT,
}
"""Settings, and sections of them, that may differ from a checkpoint's, and what follows from it:
weights, moments and the place in the data always stay. The longest name that fits counts."""

MAY_NOT_CHANGE = {
    "seed": "the order of samples and everything random follow from it",
    "start_from": "the tokenizer and the shape of the model are from there",
    "tokenizer": "the rows of the text tower are its pieces",
    "preprocess": "the model has seen images of that transform",
    "model": "the weights are those of that model",
    "data.streams": "they fix the order of samples",
    "adapt.lora_rank": "the adapters have that shape",
    "adapt.lora_alpha": "the adapters were trained with that scale",
    "adapt.lora_towers": "the adapters are there",
    "optimizer.name": "the moments are those of that optimizer",
}
"""Settings that are those of the checkpoint, and why."""


@dataclass(frozen=True)
class Origin:
    """Where a run goes on from; nowhere, for one that starts."""

    checkpoint: Checkpoint | None = None
    world_size: int = 1
    """The number of ranks now."""
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Settings that differ from the checkpoint's: what they were and are."""

    def described(self) -> list[str]:
        """Return what is gone on from and what has changed, a line each."""
        if self.checkpoint is None:
            return []
        lines = [f"{self.checkpoint.folder}"]
        if self.checkpoint.world_size != self.world_size:
            lines.append(
                f"ranks {self.world_size} (was {self.checkpoint.world_size}): the same batches, "
                "and losses to rounding"
            )
        for name, (before, now) in self.changes.items():
            shown = [shorten(str(value), width=80, placeholder=" ...") for value in (now, before)]
            lines.append(f"{name} {shown[0]} (was {shown[1]}): {_longest(MAY_CHANGE, name)[1]}")
        return lines


def check_run_folder(config: TrainConfig, resume: Resume) -> None:
    """Refuse to overwrite a run, or to go on in one from a checkpoint of another."""
    folder = config.run_folder
    kept = (folder / CONFIG_NAME).exists() and (
        (folder / CHECKPOINTS_NAME).exists()
        or (folder / BUNDLE_NAME).exists()
        or bool(read_records(folder / METRICS_NAME))
    )
    if not kept or resume == "auto":  # a start that failed before it left anything is no run
        return
    if resume == "never":
        raise ConfigError(
            f"{folder} holds a run already; go on with it by --resume, or choose another run_folder"
        )
    if resume.resolve().parent != (folder / CHECKPOINTS_NAME).resolve():
        raise ConfigError(
            f"{folder} holds a run already, and {resume} is of another one; expected a checkpoint "
            f"in {folder / CHECKPOINTS_NAME}, or another run_folder"
        )


def compared(config: TrainConfig, checkpoint: Checkpoint | None, *, world_size: int) -> Origin:
    """Return where a run goes on from and what has changed since.

    Raises:
        ConfigError: a setting has changed that must not.
    """
    if checkpoint is None:
        return Origin(world_size=world_size)
    if "config" not in checkpoint.numbers:
        raise CheckpointError(f"{checkpoint.folder} has no settings; expected a run's checkpoint")
    now = flat_settings(config_as_plain(config))
    # A setting that the checkpoint does not know was at its default.
    before = flat_settings(config_as_plain(TrainConfig())) | flat_settings(
        checkpoint.numbers["config"]
    )
    changes = {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    refused = [
        f"{name} {now} (was {before}): {reason}"
        for name, (before, now) in changes.items()
        if (reason := _refusal(name, changes, config, checkpoint.step))
    ]
    if refused:
        raise ConfigError(
            f"cannot go on from {checkpoint.folder} with {'; '.join(refused)}; expected what it "
            "was, or another run_folder to start anew in"
        )
    return Origin(checkpoint, world_size, changes)


def record_start(config: TrainConfig, origin: Origin) -> None:
    """Write the settings into the run's folder, and add what has changed to their history."""
    write_file(config.run_folder / CONFIG_NAME, config_as_yaml(config).encode())
    path = config.run_folder / HISTORY_NAME
    checkpoint = origin.checkpoint
    entry = {
        "step": checkpoint.step if checkpoint else 0,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": str(checkpoint.folder) if checkpoint else None,
        "world_size": origin.world_size,
        "vlm": vlm.__version__,
        "torch": str(torch.__version__),
        "changes": {
            name: {"from": before, "to": now} for name, (before, now) in origin.changes.items()
        },
    }
    known = path.read_text(encoding="utf-8") if checkpoint and path.exists() else ""
    added = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
    write_file(path, (known + added).encode())


def scores_missing(config: TrainConfig, step: int, group: RankGroup) -> bool:
    """Say whether a run was cut off after it saved a step and before it kept the scores of it.

    All ranks have the same answer, by what rank 0 reads.
    """
    if not step or not due_after(step, config).evaluate:
        return False
    records = read_records(config.run_folder / METRICS_NAME) if group.rank == 0 else []
    kept = any(record["step"] == step and "loss" not in record for record in records)
    return exchange(not kept, group)[0]


def _refusal(
    name: str, changes: Mapping[str, tuple[Any, Any]], config: TrainConfig, step: int
) -> str:
    """Say why a setting must not have changed; nothing if it may."""
    if name == "schedule.steps" and config.schedule.steps < step:
        return f"the run has taken {step} steps"
    if name == "stages" and len({_trained_last(step, stages) for stages in changes[name]}) > 1:
        return "the moments are those of what was trained until now"
    labels = [
        label
        for label in (config.data.mixture.batch_by, *changes.get("data.mixture.batch_by", ()))
        if label not in ("", "source")
    ]
    if labels and name in ("data.mixture.batch_by", "data.batch_size"):
        return f"the order of samples follows from it where batches are of one {labels[0]}"
    (denied, reason), (allowed, _) = _longest(MAY_NOT_CHANGE, name), _longest(MAY_CHANGE, name)
    if not (denied or allowed):
        return "it is not known what would stay exact"
    return reason if len(denied) > len(allowed) else ""


def _trained_last(step: int, stages: Sequence[Mapping[str, Any]]) -> str:
    """Return what step number `step` trained, counted from 1; an empty text for 0."""
    for stage in stages if step else ():
        if stage["steps"] is None or step <= stage["steps"]:
            return str(stage["trained"])
        step -= stage["steps"]
    return "all" if step else ""


def _longest(answers: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the longest of the names that are a setting or a section that it is in."""
    fitting = [each for each in answers if f"{name}.".startswith(f"{each}.")]
    longest = max(fitting, key=len, default="")
    return longest, answers.get(longest, "")
