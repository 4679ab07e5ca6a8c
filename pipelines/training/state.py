"""What a training holds from one step to the next, whole on every rank: clipped, compared, saved and restored.

`sharded_state` is the same where each rank has a share of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines import checkpoints
from pipelines.config import TrainingConfig
from pipelines.run_directory import RunDirectory
from pipelines.training import optimization
from pipelines.training.distributed import Ranks
from pipelines.training.step import TrainingStep
from pipelines.weights import restore_weights


class State(Protocol):
    """Weights, the optimiser's moments, and the scaler of fp16. All ranks call each of these together."""

    def clip(self, limit: float) -> float:
        """Shorten the gradient to a norm of at most `limit` (0: leave it); returns the norm that it had."""
        ...

    def replicas(self) -> Mapping[str, Tensor]:
        """What every rank is to hold alike, by name."""
        ...

    def save(
        self,
        directory: RunDirectory,
        about: Mapping[str, Any],
        scalars: Mapping[str, Any],
        check_writer: Callable[[], None],
    ) -> checkpoints.Checkpoint | None:
        """Save all of it; the first rank gets the checkpoint, others None.

        Args:
            about: the manifest's fields; those of the first rank are saved.
            scalars: what else is to stand in the training's state, as JSON.
            check_writer: of the first rank, fails where it is not to write any more.
        """
        ...

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Take all of it from a checkpoint, whoever saved that.

        Raises:
            CodecmillError: it is of another model, or damaged.
        """
        ...


def build(
    module: TrainingStep,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ranks: Ranks,
    training: TrainingConfig,
) -> State:
    """What goes with the training's gradients."""
    if training.parallel == "fsdp":
        from pipelines.training.sharded_state import SharedState  # half a second that others need not wait

        return SharedState(module, optimizer, scaler, ranks)
    return WholeState(module, optimizer, scaler, ranks)


class WholeState:
    """Every rank holds everything."""

    def __init__(
        self, module: TrainingStep, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, ranks: Ranks
    ):
        self._module = module
        self._optimizer = optimizer
        self._scaler = scaler
        self._ranks = ranks

    def clip(self, limit: float) -> float:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, limit or math.inf).item()

    def replicas(self) -> Mapping[str, Tensor]:
        return self._module.state_dict()

    def save(
        self,
        directory: RunDirectory,
        about: Mapping[str, Any],
        scalars: Mapping[str, Any],
        check_writer: Callable[[], None],
    ) -> checkpoints.Checkpoint | None:
        if not self._ranks.is_first:
            return None
        check_writer()
        model = self._module.model
        tensors, own = optimization.state(model, self._optimizer, self._scaler)
        return checkpoints.save(directory, about, model.state_dict(), tensors, own | dict(scalars))

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        restore_weights(self._module.model, checkpoint)
        optimization.restore(checkpoint, self._module.model, self._optimizer, self._scaler)
