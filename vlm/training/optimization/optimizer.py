"""Optimizers, and the rate and decay of every parameter."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from timm.optim.lion import Lion
from torch import nn
from typing_extensions import override

from vlm.errors import ConfigError
from vlm.models.encoder import Encoder
from vlm.models.pretraining import PretrainingModel
from vlm.training.optimization.config import OptimizerConfig, TowerRateConfig

RATE_RATIO = "learning_rate_ratio"
"""Key of a parameter group: the ratio of its learning rate to that of the run."""

_COLOURS = 3  # channels of an image
# In the names of parameters whose rows are looked up or learnt one by one: also a pool's `query`,
# but not the `query.weight` of attention.
_TABLE = re.compile(r"embed|position|query$")

_WIDENED = 1 << 26  # numbers whose moments are float32 at a time


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of every parameter that takes part in training.

    `model` is a `PretrainingModel`, or any other module where no tower has settings of its own and
    the optimizer is not Muon.

    Raises:
        ConfigError: Muon where no block has a matrix, or a tower does not name its stages.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, betas = config.learning_rate, config.betas
    groups = partial(_groups, towers=_tower_settings(model, config), others=config.weight_decay)
    stored = Bfloat16States if config.state_dtype == "bfloat16" else _as_it_is
    adamw = partial(torch.optim.AdamW, lr=rate, betas=betas, eps=config.eps, fused=True)
    if config.name == "lion":
        return stored(Lion(groups(trained), lr=rate, betas=betas))
    if config.name == "adamw":
        return stored(adamw(groups(trained)))
    matrices = _hidden_matrices(model)
    muon = Muon(groups(parameter for parameter in trained if parameter in matrices), lr=rate)
    others = adamw(groups(each for each in trained if each not in matrices))
    return Together(stored(muon), stored(others))


class Muon(torch.optim.Muon):
    """torch's Muon, which also takes the filters of convolutions: each is a row of a matrix.

    Updates are as large as AdamW's, whatever the shape (Liu et al. 2025, section 2.2), so that one
    rate and one decay serve both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float) -> None:
        # It refuses what is no matrix, but only where it is made.
        super().__init__([torch.zeros(1, 1)], lr=lr, adjust_lr_fn="match_rms_adamw")
        self.param_groups.clear()
        for group in groups:
            self.add_param_group(group)
        self._copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.register_step_post_hook(self._write_back)

    @override
    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[torch.Tensor],
        grads: list[torch.Tensor],
        muon_momentum_bufs: list[torch.Tensor],
    ) -> bool:
        result = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            for place, tensor in enumerate(tensors):
                if tensor.ndim > 2:
                    tensors[place] = tensor.flatten(1)
                    # With channels last the matrix is a copy; gradients are only read.
                    if tensors is not grads and not tensor.is_contiguous():
                        self._copied.append((tensor, tensors[place]))
        return result

    @torch.no_grad()
    def _write_back(self, *_: Any) -> None:
        for filters, matrix in self._copied:
            filters.copy_(matrix.view_as(filters))
        self._copied.clear()


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters, as one with the groups and the state of all."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # with other groups and another state, for `load_state_dict`
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state

    @override
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Let each of the optimizers take its step."""
        for part in self.parts:
            part.step()


class Bfloat16States(torch.optim.Optimizer):
    """An optimizer whose moments are bfloat16 between its steps, rounded to nearest.

    It computes in float32, on the moments of a few parameters at a time. torch's AdamW could do
    without that only where it is fused and on CUDA, and torch's Muon and timm's Lion nowhere.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        """Let the optimizer take its step."""
        self.optimizer.state = self.state
        for group in self.param_groups:
            for parameters in _in_parts(group["params"]):
                self.optimizer.param_groups = [group | {"params": parameters}]
                self._cast(parameters, torch.float32)
                self.optimizer.step()
                self._cast(parameters, torch.bfloat16)

    def _cast(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
        for parameter in parameters:
            slots = self.state.get(parameter, {})
            for key in slots.keys() - {"step"}:  # a count, which bfloat16 holds up to 256
                slots[key] = slots[key].to(dtype)


def reads_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a step reads `found_inf` on the device and then changes nothing.

    torch's fused optimizers do; before a step of any other, the host has to look.
    """
    plain = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper, or ours
    return bool(getattr(plain, "_step_supports_amp_scaling", False))


def _as_it_is(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def _in_parts(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Give parameters in lists of about as many numbers as may be widened at a time."""
    part: list[nn.Parameter] = []
    numbers = 0
    for parameter in parameters:
        part.append(parameter)
        numbers += parameter.numel()
        if numbers >= _WIDENED:
            yield part
            part, numbers = [], 0
    if part:
        yield part


def _groups(
    parameters: Iterable[nn.Parameter],
    *,
    towers: Mapping[nn.Parameter, tuple[float, float]],
    others: float,
) -> list[dict[str, Any]]:
    """Divide parameters by rate and decay; gains, biases and the temperature do not decay.

    Those of towers have their own; all others, such as the temperature and the parts that only
    training has, have the model's rate and the decay `others`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        ratio, decay = towers.get(parameter, (1.0, others))
        groups[ratio, decay if parameter.ndim >= 2 else 0.0].append(parameter)
    return [
        {"params": members, RATE_RATIO: ratio, "weight_decay": decay}
        for (ratio, decay), members in groups.items()
    ]


def _tower_settings(
    model: nn.Module, config: OptimizerConfig
) -> dict[nn.Parameter, tuple[float, float]]:
    """Return the ratio of the rate and the decay of parameters whose tower has its own.

    SigLIP trains a pretrained tower at a tenth of the rate without decay (Zhai et al. 2023, figure
    4). With `layer_decay` the rate of a stage that lies d stages before the last is multiplied by
    its d-th power (BEiT: Bao et al. 2022).
    """
    settings: dict[nn.Parameter, tuple[float, float]] = {}
    for side, tower in (("image", config.image), ("text", config.text)):
        if tower == TowerRateConfig():
            continue  # and is not asked for its stages, which not every tower has
        encoder = cast(PretrainingModel, model).encoder
        stages = encoder.image_groups() if side == "image" else encoder.text_groups()
        decay = config.weight_decay if tower.weight_decay is None else tower.weight_decay
        for depth, stage in enumerate(reversed(stages)):
            ratio = tower.learning_rate_ratio * tower.layer_decay**depth
            for parameter in stage:
                before = settings.get(parameter, (ratio, decay))
                settings[parameter] = (min(before[0], ratio), min(before[1], decay))
    return settings


def _hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices and convolutions of the towers, for which Muon is made.

    Embeddings, a tower's first stage, are AdamW's (Jordan et al. 2024), and so are filters that
    read pixels or see one channel each. A projection is no output layer: it leads to another hidden
    space, that of both towers.
    """
    encoder = cast(PretrainingModel, model).encoder
    tables = {parameter for name, parameter in encoder.named_parameters() if _TABLE.search(name)}
    image, text = encoder.image_groups(), encoder.text_groups()
    embeddings = {*image[0], *text[0], *tables}
    hidden = {
        each for stage in image + text for each in stage
        if (each.ndim == 2 and each not in embeddings)
        or (each.ndim == 4 and each.shape[1] > _COLOURS)
    }  # fmt: skip
    if not any(parameter.requires_grad for parameter in hidden):
        raise ConfigError(
            "optimizer.name is muon, and the towers have no matrix that is trained; "
            "expected adamw or lion"
        )
    return hidden


@torch.no_grad()
def shrink_embedding_gradients(encoder: Encoder, ratio: float) -> None:
    """Multiply the gradients of each tower's first stage by a ratio, after the backward pass.

    So nothing of the forward pass differs by a bit, and the ratio may change at any step.
    """
    if ratio == 1:  # and no tower is asked for its stages, which not every tower has
        return
    for parameter in {*encoder.image_groups()[0], *encoder.text_groups()[0]}:
        if parameter.grad is not None:
            parameter.grad.mul_(ratio)
