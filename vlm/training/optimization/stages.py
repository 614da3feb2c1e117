"""The stages of a run: what each trains, and how fast."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vlm.errors import ConfigError
from vlm.models.encoder import Encoder
from vlm.models.growth import only_new_rows, own_rows_before
from vlm.training.config import TrainConfig
from vlm.training.optimization.config import Trained
from vlm.training.optimization.schedule import learning_rate_factor


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, counted from 0."""
    stage = config.stage_at(step)
    return stage.learning_rate * learning_rate_factor(step - stage.rises_at, stage.schedule)


class StageLocks:
    """Locks what a stage does not train.

    What is locked gets no gradient and no decay, and has no moments: where a stage trains something
    else than the one before it, the optimizer starts anew.

    Args:
        config: Has the stages.
        model: As it is wrapped for several ranks; what is locked now stays so.
        encoder: The encoder in it.
        optimizer: Of all that any stage trains.
        first_new: The first new row of the encoder's token embedding; None where no row is new.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        encoder: Encoder,
        optimizer: torch.optim.Optimizer,
        first_new: int | None,
    ) -> None:
        self._config, self._model, self._optimizer = config, model, optimizer
        self._trained = trained_by_stages(config, model, encoder, first_new)
        self._embedding, self._old_rows = encoder.token_embedding.weight, 0
        if "new_rows" in self._trained and first_new is not None:
            self._old_rows = own_rows_before(first_new, self._embedding)

    def enter(self, step: int) -> None:
        """Prepare for a step, counted from 0; call it before each, and after resuming.

        Every rank calls it at the same point.
        """
        stage = self._config.stage_at(step)
        if step == stage.first > 0 and self._config.stage_at(step - 1).trained != stage.trained:
            self._optimizer.state.clear()
        if train_only(self._trained[stage.trained], of=self._trained["all"]):
            _count_gradients_again(self._model)

    def updating(self, step: int) -> AbstractContextManager[None]:
        """Return what to clip gradients and update within."""
        if self._config.stage_at(step).trained == "new_rows":
            return only_new_rows(self._embedding, self._old_rows)
        return nullcontext()


def trained_by_stages(
    config: TrainConfig, model: nn.Module, encoder: Encoder, first_new: int | None
) -> dict[Trained, list[nn.Parameter]]:
    """Return what is trained of a model by each kind of stage that a run has, and by `all`.

    Call it outside a forward or backward pass: FSDP2 swaps in unsharded parameters during one.

    Raises:
        ConfigError: nothing is left to train in a stage.
    """
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    found: dict[Trained, list[nn.Parameter]] = {"all": list(trainable.values())}
    asked = {stage.trained for stage in config.whole_stages}
    if "text" in asked:
        found["text"] = _without(trainable, encoder.image_groups())
    if "image" in asked:
        found["image"] = _without(trainable, encoder.text_groups())
    if "new_rows" in asked and first_new is not None:
        embedding = encoder.token_embedding.weight
        found["new_rows"] = [p for p in trainable.values() if p is embedding]
    empty = [trained for trained, parameters in found.items() if not parameters]
    if empty:
        raise ConfigError(
            f"a stage trains {empty[0]}, but adapt locks all of that; expected something left "
            "to train"
        )
    return found


def train_only(wanted: Sequence[nn.Parameter], *, of: Sequence[nn.Parameter]) -> bool:
    """Lock all parameters but those that are wanted; return whether any has changed."""
    kept = {id(parameter) for parameter in wanted}
    wrong = [each for each in of if each.requires_grad != (id(each) in kept)]
    for parameter in wrong:
        parameter.requires_grad_(not parameter.requires_grad)
    return bool(wrong)


def _without(
    parameters: dict[int, nn.Parameter], groups: Iterable[Iterable[nn.Parameter]]
) -> list[nn.Parameter]:
    locked = {id(parameter) for group in groups for parameter in group}
    return [each for key, each in parameters.items() if key not in locked]


def _count_gradients_again(model: nn.Module) -> None:
    """Have DDP wait for the gradients that there will be: it counts them when it is made."""
    if isinstance(model, DistributedDataParallel):
        # In place: a step, an accelerator and others hold the wrapper.
        DistributedDataParallel.__init__(
            model,
            model.module,
            device_ids=model.device_ids,
            output_device=model.output_device,
            process_group=model.process_group,
            gradient_as_bucket_view=model.gradient_as_bucket_view,
            find_unused_parameters=model.find_unused_parameters,
            static_graph=model.static_graph,
        )
