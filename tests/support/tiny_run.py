"""A training run of seconds on tiny data, and what it reported."""

from pathlib import Path
from typing import Any

from tests.builders import TINY_MODEL
from vlm.batches.config import DataConfig
from vlm.training.config import CheckpointConfig, EvaluationConfig, ScheduleConfig, TrainConfig
from vlm.training.monitoring.reporter import METRICS_NAME, read_records

STEPS, BATCH = 7, 4


def config(inputs: Path, run_folder: Path, **changes: Any) -> TrainConfig:
    """Return the settings of a run on the fixture `inputs` into a folder."""
    settings: dict[str, Any] = {
        "run_folder": run_folder,
        "tokenizer": inputs / "tokenizer",
        "model": TINY_MODEL,
        "data": DataConfig(folder=inputs / "data", batch_size=BATCH, workers=0),
        "schedule": ScheduleConfig(steps=STEPS, warmup_steps=2),
        "evaluation": EvaluationConfig(every_steps=3),
        "checkpoint": CheckpointConfig(every_steps=5, keep=9),
        "report_every": 2,
    }
    return TrainConfig(**(settings | changes))


def losses(run_folder: Path, key: str = "loss") -> dict[int, float]:
    """Return what a run has written of one value, by step."""
    records = read_records(run_folder / METRICS_NAME)
    return {record["step"]: record[key] for record in records if record.get(key) is not None}
