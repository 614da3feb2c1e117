"""The tensors of a weights file, read without running anything that it holds."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.errors import CheckpointError

Tensors = dict[str, Tensor]
"""Tensors by name."""

FOLDER_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where folders keep weights, the first found first: files that cannot hold code before others."""

_UNDER = ("state_dict", "module", "model")  # where training programs put the weights
_WRAPPERS = ("_forward_module.", "module.", "_orig_mod.")  # what they put before every name
_REFUSED = re.compile(r"GLOBAL (\S+)|Unsupported (?:class|global) (\S+)")


def find_weights(folder: Path) -> Path:
    """Return the file of a folder that holds its weights, or the index of several."""
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join(FOLDER_WEIGHTS)}")


def read_tensors(path: Path) -> Tensors:
    """Read all tensors of a file: safetensors, torch's archive, or an index of several files.

    Training programs put weights under `state_dict`, `module` or `model`, and wrap every name
    in a `module.` or `_forward_module.`; both are taken away. Other parts of such files, like an
    optimizer's state, are left.

    Raises:
        CheckpointError: the file is missing, damaged, holds no tensors, or wants to run code.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] != b"{":  # a file of safetensors begins with the length of its JSON header
        return _read_torch(path)
    try:
        return _unwrapped(load_file(path), path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error


def in_float32(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return floating-point tensors as float32; whole numbers stay."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return record


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Return how many different numbers a pattern's group has among names."""
    return len({found[1] for found in map(re.compile(pattern).match, names) if found})


def _read_shards(index: Path) -> Tensors:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files")
    tensors: Tensors = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}; expected files of its own folder")
        tensors |= read_tensors(index.with_name(name))
    lost = sorted(files.keys() - tensors.keys())
    if lost:
        raise CheckpointError(f"{index} names {lost[0]}, which its files do not hold")
    return tensors


def _read_torch(path: Path) -> Tensors:
    archive = zipfile.is_zipfile(path)
    if archive:
        with zipfile.ZipFile(path) as file:
            is_program = any(name.endswith("/constants.pkl") for name in file.namelist())
        if is_program:
            raise CheckpointError(
                f"{path} is a TorchScript archive, which is a program; expected its state_dict, "
                "saved by someone who trusts it"
            )
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual pickles, which are read or not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        wanted = _REFUSED.search(str(error))
        if "Unsupported operand" in str(error):
            raise CheckpointError(
                f"{path} is not a weights file; expected safetensors or what torch.save wrote"
            ) from error
        what = f"the code {wanted[1] or wanted[2]}" if wanted else "more than tensors"
        raise CheckpointError(
            f"{path} is refused: its pickle wants to run {what}; expected tensors only"
        ) from error
    except (EOFError, KeyError) as error:  # whose text is empty, or a byte's number
        raise CheckpointError(
            f"cannot read the weights {path}: it is neither safetensors nor a file of torch's"
        ) from error
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the weights {path}: {error}") from error
    return _unwrapped(content, path)


def _unwrapped(content: object, path: Path) -> Tensors:
    for key in _UNDER:
        inner = content.get(key) if isinstance(content, dict) else None
        if isinstance(inner, dict):
            content = inner
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected tensors by name")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name")
    while prefix := next((w for w in _WRAPPERS if all(n.startswith(w) for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
