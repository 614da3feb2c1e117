"""Training runs in real processes that are killed and go on, and what they leave."""

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.builders import TINY_MODEL, make_samples, tiny_tokenizer, write_split
from tests.support.processes import PROCESSES
from vlm.batches.config import DataConfig
from vlm.losses.plan import LossConfig
from vlm.training.config import (
    AveragingConfig,
    CheckpointConfig,
    EvaluationConfig,
    ScheduleConfig,
    TrainConfig,
)
from vlm.training.monitoring.reporter import METRICS_NAME, read_records

SAMPLES, BATCH = 24, 8


def tiny_inputs(folder: Path) -> Path:
    """Write a data folder of three batches an epoch, with a split to score, and a tokenizer."""
    write_split(folder / "data", make_samples(SAMPLES))
    write_split(folder / "data", make_samples(8), split="val")
    tiny_tokenizer().save(folder / "tokenizer")
    return folder


def tiny_config(
    inputs: Path, run_folder: Path, *, steps: int = 10, workers: int = 0
) -> TrainConfig:
    """Return a run with all that a checkpoint may keep: averages, micro-batches, evaluations, and
    writing in the background.
    """
    return TrainConfig(
        run_folder=run_folder,
        tokenizer=inputs / "tokenizer",
        model=TINY_MODEL,
        data=DataConfig(folder=inputs / "data", batch_size=BATCH, workers=workers, streams=1),
        loss=LossConfig(micro_batches=2),
        schedule=ScheduleConfig(steps=steps, warmup_steps=2),
        averaging=AveragingConfig(ema_decay=0.9),
        evaluation=EvaluationConfig(every_steps=4),
        checkpoint=CheckpointConfig(every_steps=2, in_background=True),
        report_every=1,
        cpu_threads=1,
    )


def fit(
    config: TrainConfig,
    *,
    ranks: int = 1,
    kill_at: int | None = None,
    kill_in_scores_of: int | None = None,
    uids: Path | None = None,
) -> None:
    """Go on with a run, or start it, on some ranks; all kill themselves in the step `kill_at`, or
    in the evaluation after some steps.

    `uids` is a file that gets a line for each step with the samples of each rank.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
    }  # fmt: skip
    processes, kills = [], (kill_at, kill_in_scores_of)
    for rank in range(ranks):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        environment = {key: str(value) for key, value in own.items()}
        process = PROCESSES.Process(target=_fit, args=(config, environment, kills, uids))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    expected = 0 if kills == (None, None) else -signal.SIGKILL
    errors = config.run_folder.with_suffix(".err")
    assert codes == [expected] * ranks, f"{codes}\n{errors.read_text()[-3000:]}"


def _fit(
    config: TrainConfig,
    environment: dict[str, str],
    kills: tuple[int | None, int | None],
    uids: Path | None,
) -> None:
    gc.freeze()  # what was imported before the fork is no garbage
    # Workers are forks of their trainer, as they are of one that a shell has started.
    multiprocessing.set_start_method("fork", force=True)
    errors = config.run_folder.with_suffix(".err")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(environment)
    from vlm.training.build import build_run

    run = build_run(config, resume="auto")
    train = run.step

    def step(parts: Sequence[Any]) -> Any:
        if uids is not None:
            seen = [uid for part in parts for uid in part.uids]
            of = run.accelerator
            where = [run.progress.step, of.process_index, of.num_processes]
            line = json.dumps([*where, seen]) + "\n"
            with uids.open("a", encoding="utf-8") as file:
                file.write(line)
        if run.progress.step == kills[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(parts)

    def evaluate(encoder: Any) -> dict[str, float]:
        if run.progress.step == kills[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        assert run.evaluate is not None
        return run.evaluate(encoder)

    replace(run, step=step, evaluate=evaluate).fit()
    sys.stderr.flush()


def left_by(config: TrainConfig) -> dict[str, Any]:
    """Return what must be the same however often a run was killed: its last checkpoint, its losses
    and scores, and its bundles.
    """
    folder = max((config.run_folder / "checkpoints").glob("step-*"))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    state = json.loads((folder / "state.json").read_text())
    records = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_records(config.run_folder / METRICS_NAME)
    ]
    hashes = {name: known["sha256"] for name, known in manifest["files"].items()}
    del hashes["state.json"], state["config"]  # which names the folder
    bundles = {
        path.parent.name: path.read_bytes()
        for path in sorted(config.run_folder.glob("bundle*/*.safetensors"))
    }
    return {"hashes": hashes, "state": state, "records": records, "bundles": bundles}


TIMES = ("samples_per_s", "data_wait_ratio", "tflop_per_s", "mfu", "memory_gib")
"""Names of what depends on the time of day and on the machine."""


def trained_on(uids: Path) -> dict[int, list[str]]:
    """Return the samples of each step, in the order of ranks; a step that was done again, after a
    kill and perhaps on other ranks, must have had the same.
    """
    parts: dict[tuple[int, int], dict[int, list[str]]] = {}
    for line in uids.read_text(encoding="utf-8").splitlines():
        step, rank, ranks, seen = json.loads(line)
        own = parts.setdefault((step, ranks), {}).setdefault(rank, seen)
        assert own == seen, (step, rank)
    steps: dict[int, list[str]] = {}
    for (step, ranks), of_rank in sorted(parts.items()):
        if len(of_rank) == ranks:  # else one was dead before another came to it
            seen = [uid for _, part in sorted(of_rank.items()) for uid in part]
            assert steps.setdefault(step, seen) == seen, step
    return steps
