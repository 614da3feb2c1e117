"""How much of a device's arithmetic a run uses: FLOP, counted once, and what devices can do."""

import re
import sys
from typing import Any

import torch
from tqdm import tqdm

from vlm.batches.batch import Batch
from vlm.models.pretraining import PretrainingModel
from vlm.training.config import TrainConfig
from vlm.training.planning.hollow import HollowTensors, hollow_copy
from vlm.training.planning.passes import count_flops

# By name of a device as torch gives it: TFLOP/s of dense products in half precision, and in
# float32 without TF32, from the makers' data sheets.
_PEAKS = {
    r"\bB200\b": (2250.0, 75.0),
    r"\bH100 PCIe\b": (756.0, 51.0),
    r"\bH100 NVL\b": (835.0, 60.0),
    r"\b(H100|H200|H800|GH200)\b": (989.0, 67.0),
    r"\bA(100|800)\b": (312.0, 19.5),
    r"\bA30\b": (165.0, 10.3),
    r"\bA10\b": (125.0, 31.2),
    r"\bL40S\b": (362.0, 91.6),
    r"\bL40\b": (181.0, 90.5),
    r"\bL4\b": (121.0, 30.3),
    r"\bRTX 4090\b": (165.2, 82.6),
    r"\bRTX 3090\b": (71.0, 35.6),
    r"\bV100\b": (125.0, 15.7),
    r"\bT4\b": (65.0, 8.1),
    r"\bMI300X\b": (1307.0, 163.4),
}


def peak_tflops(device: str, *, half: bool) -> float | None:
    """Return the TFLOP/s that a device of this name can do; None where that is not known.

    Args:
        device: Such as `NVIDIA H100 80GB HBM3`.
        half: Whether products are in bfloat16 or float16.
    """
    for name, (of_half, of_single) in _PEAKS.items():
        if re.search(name, device):
            return of_half if half else of_single
    return None


class FlopMeter:
    """Turns samples a second into FLOP a second and device.

    A sample's FLOP are those of its forward and backward pass, without what is computed again to
    save memory (MFU: Chowdhery et al. 2022, appendix B), the loss and a frozen teacher. They are
    counted once for each size of images and choice of what is trained, which stages may change.

    Args:
        config: Of the run.
        model: As it was built, before it was compiled, wrapped or sharded; it stays as it is.
        device: What computes.
        ranks: How many devices share the samples.
    """

    def __init__(
        self, config: TrainConfig, model: PretrainingModel, device: torch.device, ranks: int
    ) -> None:
        self._config, self._mode, self._ranks = config, HollowTensors(), ranks
        self._counted: dict[tuple[Any, ...], float | None] = {}
        self._model: PretrainingModel = hollow_copy(model, self._mode, without=(model.text_thread,))
        self._peak = None
        if device.type == "cuda":
            half = config.precision != "fp32"
            self._peak = peak_tflops(torch.cuda.get_device_name(device), half=half)

    def rates(
        self, batch: Batch, samples_per_s: float, model: PretrainingModel
    ) -> dict[str, float | None]:
        """Return TFLOP/s of each device, and their ratio to its peak; None for what is not known.

        Args:
            batch: This rank's, on the host.
            samples_per_s: Of all ranks.
            model: The one that was given, as it is now: what of it is trained.
        """
        trained = tuple(parameter.requires_grad for parameter in model.parameters())
        key = (batch.images.shape[1:], trained)
        if key not in self._counted:
            for parameter, is_trained in zip(self._model.parameters(), trained, strict=True):
                parameter.requires_grad_(is_trained)
            self._counted[key] = self._count(batch)
        of_sample = self._counted[key]
        tflops = of_sample and samples_per_s * of_sample / self._ranks / 1e12
        return {"tflop_per_s": tflops, "mfu": tflops and self._peak and tflops / self._peak}

    def _count(self, batch: Batch) -> float | None:
        try:
            return count_flops(self._config, self._model, batch, mode=self._mode) / len(batch.uids)
        except Exception as error:  # a model that needs contents; training does not depend on it
            reason = " ".join(str(error).split())
            tqdm.write(f"warning: its FLOP cannot be counted: {reason}", sys.stderr)
            return None
