"""What a run's folder holds, and what may change when the run goes on."""

import yaml

from vlm.errors import ConfigError
from vlm.training.config import TrainConfig, config_as_yaml, flat_settings
from vlm.training.reporter import METRICS_NAME, read_records

BUNDLE_NAME, CONFIG_NAME, CHECKPOINTS_NAME = "bundle", "config.yaml", "checkpoints"
EMA_BUNDLE_NAME = "bundle-ema"
"""What a run leaves in its folder."""

_FREE_ON_RESUME = (
    "run_folder", "cpu_threads", "compile", "adapt.grad_checkpointing",
    "adapt.grad_checkpointing_every", "parallel_towers", "report_every", "data.workers",
    "data.keep_decoded", "evaluation", "data.allowed_share", "data.cache_gib", "data.verify",
    "data.sources", "data.mixture", "data.skip_batches", "checkpoint", "loss.plan.tile",
    "loss.plan.keep_logits", "loss.plan.keep_logits_mib", "loss.plan.overlap",
    "loss.plan.check_finite",
)  # fmt: skip
"""Settings, and sections of them, that may change: what a run has learnt and read stays exact."""


def check_run_folder(config: TrainConfig, resume: bool) -> None:
    """Refuse to overwrite a run, or to go on with one under settings that it did not have."""
    folder = config.run_folder
    kept = (folder / CONFIG_NAME).exists() and (
        (folder / CHECKPOINTS_NAME).exists()
        or (folder / BUNDLE_NAME).exists()
        or bool(read_records(folder / METRICS_NAME))
    )
    if not kept:  # a start that failed before it left anything does not take the folder
        return
    if not resume:
        raise ConfigError(
            f"{folder} holds a run already; go on with it by --resume, or choose another run_folder"
        )
    before, now = (
        flat_settings(yaml.safe_load(text))
        for text in ((folder / CONFIG_NAME).read_text(encoding="utf-8"), config_as_yaml(config))
    )
    changed = [
        f"{name} {now.get(name)} (was {before.get(name)})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(f"{name}.".startswith(f"{free}.") for free in _FREE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"cannot resume {folder} with changed settings: {', '.join(changed)}; expected those "
            f"of its {CONFIG_NAME}, or another run_folder"
        )
