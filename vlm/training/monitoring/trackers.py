"""Experiment trackers of other projects, by name: what a run reports goes to them as well."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from tqdm import tqdm

from vlm.errors import ConfigError, TrainingError
from vlm.files import write_file
from vlm.training.config import TrainConfig, config_as_yaml, flat_settings
from vlm.training.progress import Progress

IDS_NAME = "trackers.json"
"""Of a run's folder: by tracker, the identity of the run there."""

_PROJECT = "vlm"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before a run begins.

    Raises:
        ConfigError: one is not installed.
    """
    there = set(map(str, get_available_trackers()))
    missing = [name for name in names if name not in there]
    if missing:
        raise ConfigError(
            f"trackers has {missing[0]}, which is not installed; expected `pip install "
            f"{missing[0]}`, or another tracker"
        )


class Trackers:
    """The trackers of a run, as accelerate runs them; one that fails is given up, loudly.

    A resumed run goes on in the same run of W&B, trackio and MLflow, which keep what was reported
    after the checkpoint; TensorBoard drops it.

    Raises:
        TrainingError: a tracker cannot be started.
    """

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._path = config.run_folder / IDS_NAME
        ids = _read_ids(self._path) if progress.step else {}
        self._open: dict[str, GeneralTracker] = {}
        for name in config.trackers:
            tracker = LOGGER_TYPE_TO_CLASS[name](**_settings(name, config, progress, ids.get(name)))
            try:
                with redirect_stdout(sys.stderr):  # where some say what they do
                    tracker.start()
                    if name == "mlflow" and name not in ids:  # it refuses to change what it has
                        tracker.store_init_configuration(flat_settings(_plain(config)))
            except Exception as error:  # of a foreign package: no more is known of it
                raise TrainingError(
                    f"the tracker {name} cannot be started: {_line(error)}"
                ) from error
            self._open[name] = tracker
        ids |= {
            name: _id_of(name, each) for name, each in self._open.items() if name != "tensorboard"
        }
        if ids:
            write_file(self._path, (json.dumps(ids, indent=1) + "\n").encode())

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Send the values that a run had after `step` steps; unknown ones are left out."""
        known = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._open.items()):
            sent = {_mlflow_name(key): value for key, value in known.items()}
            try:
                tracker.log(sent if name == "mlflow" else known, step=step)
            except Exception as error:  # a server that is away must not end weeks of training
                del self._open[name]
                _warn(
                    f"the tracker {name} failed at step {step} and gets no more records, which "
                    f"metrics.jsonl has: {_line(error)}"
                )

    def close(self) -> None:
        """Let the trackers finish."""
        for name, tracker in self._open.items():
            try:
                with redirect_stdout(sys.stderr):
                    tracker.finish()
            except Exception as error:
                print(
                    f"warning: the tracker {name} failed at its end: {_line(error)}",
                    file=sys.stderr,
                )


def _mlflow_name(name: str) -> str:
    """Return a name without what MLflow refuses, and no folder that is also a file of its store."""
    return name.replace("@", "_at_").replace("/", ".")


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _settings(
    name: str, config: TrainConfig, progress: Progress, known: str | None
) -> dict[str, Any]:
    """Return what accelerate's class of a tracker takes."""
    folder = config.run_folder
    if name == "tensorboard":
        # As logging_dir/run_name; a resumed run hides what it reports again.
        return {
            "run_name": "tensorboard", "logging_dir": folder, "purge_step": progress.step + 1,
        }  # fmt: skip
    if name == "mlflow":
        return {"experiment_name": _PROJECT, "run_name": folder.name, "run_id": known}
    settings = {
        "name": folder.name,
        "config": _plain(config),
        "resume": "must" if known else "never",
    }
    if name == "trackio":
        return {"run_name": _PROJECT} | settings | ({"name": known} if known else {})
    return {"run_name": _PROJECT, "id": known, "dir": folder} | settings


def _id_of(name: str, tracker: GeneralTracker) -> str:
    """Return by what a tracker finds its run again."""
    run: Any = tracker.tracker
    if name == "mlflow":
        return str(run.info.run_id)
    return str(run.id if name == "wandb" else run.name)


def _plain(config: TrainConfig) -> Any:
    return yaml.safe_load(config_as_yaml(config))


def _read_ids(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # a new run there is better than none
