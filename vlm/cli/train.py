"""Train a dual encoder as a configuration file and flags say, and leave a bundle."""

from typing import Any

from jsonargparse import ArgumentParser

from vlm.training.config import TrainConfig


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm train`."""
    parser.add_argument(
        "--config", action="config", help="YAML file, such as configs/train/emoji.yaml"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in run_folder"
    )
    parser.add_class_arguments(TrainConfig, as_group=False)


def run(options: Any) -> None:
    """Train; print the bundle's folder."""
    from vlm.training.build import build_run

    fields = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
    print(build_run(TrainConfig(**fields), resume=options.resume).fit())
