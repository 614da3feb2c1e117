"""Chinese-CLIP's evaluation scripts, run in processes of their own as their users run them."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from tests.support.processes import PROCESSES


def chinese_clip_scores(
    folder: Path,
    features: Mapping[str, np.ndarray],
    right: Mapping[int, Sequence[int]],
    direction: str,
    *,
    last_first: bool = False,
) -> list[float]:
    """Return the mean recall and the recalls at 1, 5 and 10, all in [0, 100].

    Args:
        folder: An empty folder for the files between the scripts.
        features: The vectors of `text` and of `image`; a row's number is its id.
        right: The ids of the right images of every text that has any.
        direction: `text_to_image` or `image_to_text`.
        last_first: Whether the files have the features from the last to the first.
    """
    for kind, rows in features.items():
        lines = [{f"{kind}_id": n, "feature": row.tolist()} for n, row in enumerate(rows)]
        _write(folder / f"{kind}.jsonl", lines[::-1] if last_first else lines)
    _write(
        folder / "right.jsonl", ({"text_id": n, "image_ids": [*ids]} for n, ids in right.items())
    )
    reference, suffix = folder / "right.jsonl", ""
    if direction == "image_to_text":
        _run("-m", "cn_clip.eval.transform_ir_annotation_to_tr", "--input", reference)
        reference, suffix = folder / "right.tr.jsonl", "_tr"
    inputs = [f"--{kind}-feats={folder / kind}.jsonl" for kind in ("image", "text")]
    found, scores = folder / "found.jsonl", folder / "scores.json"
    script = f"cn_clip.eval.make_topk_predictions{suffix}"
    arguments = (script, *inputs, f"--output={found}")
    # A new process that has torch already, which takes seconds to import.
    process = PROCESSES.Process(target=_run_on_cpu, args=arguments, daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    _run("-m", f"cn_clip.eval.evaluation{suffix}", reference, found, scores)
    result = json.loads(scores.read_text(encoding="utf-8"))
    assert result["success"], result
    return [result["scoreJson"][key] for key in ("mean_recall", "r1", "r5", "r10")]


def _run_on_cpu(script: str, *arguments: str) -> None:
    """Run one of the scripts that multiply, which know GPUs only."""
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self: self
    sys.argv[1:] = arguments
    runpy.run_module(script, run_name="__main__", alter_sys=True)


def _write(path: Path, records: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _run(*arguments: str | Path) -> None:
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
