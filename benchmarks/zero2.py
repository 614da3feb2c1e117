"""Try DeepSpeed's ZeRO-2 on two CPU processes, next to torch's AdamW, for what `vlm train` needs.

Needs DeepSpeed in a folder of its own (`--peer`). One JSON object goes to stdout, a Markdown table
to stderr; `docs/training.md` says what follows.
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loader import version_in
from setting import describe_setting, leave

RANKS, STEPS, WIDTH = 2, 5, 16
LEARNING_RATE = 1e-2


def two_layers() -> Any:
    """Return the same small model on every rank."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1))


def samples(step: int) -> Any:
    """Return the samples of all ranks for a step."""
    import torch

    return torch.randn(4 * RANKS, WIDTH, generator=torch.Generator().manual_seed(step))


def engine_of(model: Any) -> Any:
    """Return DeepSpeed's engine over a model."""
    import deepspeed
    import torch

    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def backward(engine: Any, step: int) -> None:
    """Make the passes over this rank's samples."""
    own = samples(step).chunk(RANKS)[int(os.environ["RANK"])]
    engine.backward(engine(own).square().mean())


def take_step(engine: Any, step: int) -> None:
    """Make the passes and the update."""
    backward(engine, step)
    engine.step()


def trained_as_by_torch() -> str:
    """Compare the weights after some steps with those of one process."""
    import torch

    engine, alone = engine_of(two_layers()), two_layers()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        take_step(engine, step)
        alone(samples(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(engine.module.parameters(), alone.parameters(), strict=True)
    return f"largest difference {max(float((a - b).abs().max()) for a, b in pairs):.1e}"


def parameter_without_dimensions() -> str:
    """Give it a temperature."""
    import torch

    model = two_layers()
    model.register_parameter("temperature", torch.nn.Parameter(torch.tensor(1.0)))
    return error_of(lambda: engine_of(model))


def locked_weight() -> str:
    """Lock a weight after two steps, and take another."""
    engine = engine_of(two_layers())
    for step in range(2):
        take_step(engine, step)
    weight = engine.module[0].weight
    weight.requires_grad_(False)
    before = weight.detach().clone()
    take_step(engine, 2)
    return f"moves by up to {float((weight - before).abs().max()):.4f}"


def value_set_in_place() -> str:
    """Set a bias to 3 between two steps."""
    engine = engine_of(two_layers())
    take_step(engine, 0)
    bias = engine.module[1].bias
    bias.data.fill_(3.0)
    take_step(engine, 1)
    return f"is {float(bias):.3f} after a step at a rate of {LEARNING_RATE}"


def gradient_before_the_update() -> str:
    """Look for gradients, which a guard and a norm by tower need."""
    engine = engine_of(two_layers())
    backward(engine, 0)
    found = [parameter.grad is not None for parameter in engine.module.parameters()]
    return f"{sum(found)} of {len(found)} parameters have one"


def passes_without_sync() -> str:
    """Ask for a backward pass whose gradients stay on their rank."""
    engine = engine_of(two_layers())

    def passes() -> None:
        with engine.no_sync():
            backward(engine, 0)

    return error_of(passes)


def update_within_backward() -> str:
    """Call accelerate's `backward`, and nothing that updates."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=2, gradient_clipping=0.0)
    plugin.deepspeed_config |= {
        "train_batch_size": 4 * RANKS,
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
    }
    accelerator = Accelerator(deepspeed_plugin=plugin)  # with `cpu=True` it would take DDP
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    own = samples(0).chunk(RANKS)[accelerator.process_index]
    accelerator.backward(model(own).square().mean())
    pairs = zip(model.parameters(), before, strict=True)
    return f"weights move by up to {max(float((a - b).abs().max()) for a, b in pairs):.4f}"


def error_of(action: Callable[[], object]) -> str:
    """Return what an action raises."""
    try:
        action()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return "nothing is raised"


TRIALS: dict[str, Callable[[], str]] = {
    f"weights after {STEPS} steps, next to one process": trained_as_by_torch,
    "a parameter without dimensions": parameter_without_dimensions,
    "a weight that is locked after two steps": locked_weight,
    "a bias set to 3 between two steps": value_set_in_place,
    "gradients before the update": gradient_before_the_update,
    "a backward pass within `no_sync`": passes_without_sync,
    "accelerate's `backward`, before any `step`": update_within_backward,
}


def run_trial(rank: int, name: str, port: int, found: Any) -> None:
    """Be one of two ranks, and try one thing."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    os.dup2(2, 1)  # it logs to stdout
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    said = error_of_trial(TRIALS[name])
    if rank == 0:
        found[name] = said


def error_of_trial(trial: Callable[[], str]) -> str:
    """Return what a trial has found, or what stopped it."""
    said: list[str] = []
    stopped = error_of(lambda: said.append(trial()))
    return said[0] if said else f"stopped by {stopped}"


def main() -> None:
    """Try everything, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="packages of DeepSpeed")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    sys.path.insert(0, str(options.peer.resolve()))
    import torch.multiprocessing as mp

    result = describe_setting("benchmarks/zero2.py", threads=1)
    result["versions"]["deepspeed"] = version_in(options.peer, "deepspeed")
    with mp.Manager() as manager:
        found = manager.dict()
        for name in TRIALS:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            mp.spawn(run_trial, (name, port, found), nprocs=RANKS)
        trials = dict(found)
    from vlm.markdown import markdown_table

    rows = [[name, trials[name]] for name in TRIALS]
    leave(
        result | {"trials": trials}, markdown_table(["what was tried", "found"], rows), options.out
    )


if __name__ == "__main__":
    main()
