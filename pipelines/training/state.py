"""What a training holds from one step to the next, whole on every rank: clipped, compared, saved and restored.

`sharded_state` is the same where each rank has a share of it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import checkpoints
from pipelines.config import TrainingConfig
from pipelines.run_directory import RunDirectory
from pipelines.training import optimization
from pipelines.training.distributed import Ranks
from pipelines.training.step import TrainingStep
from pipelines.weights import restore_weights

MOST_JOINED = 2**22
"""Elements of moments that are compared together: digests take eight times their memory for a moment."""


@dataclass(frozen=True)
class Saving:
    """What a checkpoint needs to know beside the state.

    Attributes:
        about: the manifest's fields; those of the first rank are saved.
        scalars: what else is to stand in the training's state, as JSON.
        check_writer: of the first rank, fails where it is not to write any more.
    """

    directory: RunDirectory
    about: Mapping[str, Any]
    scalars: dict[str, Any]
    check_writer: Callable[[], None]


@dataclass(frozen=True)
class State(ABC):
    """Weights, the optimiser's moments, and the scaler of fp16. All ranks call each of these together."""

    module: TrainingStep
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ranks: Ranks

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that the optimiser moves."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def of_optimizer(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Its moments by name, and the rest as JSON."""
        return optimization.state(self.module.model, self.optimizer, self.scaler)

    @abstractmethod
    def clip(self, limit: float) -> float:
        """Shorten the gradient to a norm of at most `limit` (0: leave it); returns the norm that it had."""

    @abstractmethod
    def replicas(self) -> Mapping[str, Tensor]:
        """What every rank is to hold alike, by name."""

    @abstractmethod
    def save(self, saving: Saving) -> checkpoints.Checkpoint | None:
        """Save all of it; the first rank gets the checkpoint, others None."""

    @abstractmethod
    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Take all of it from a checkpoint, whoever saved that.

        Raises:
            CodecmillError: it is of another model, or damaged.
        """


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


class WholeState(State):
    """Every rank holds everything."""

    def clip(self, limit: float) -> float:
        return nn.utils.clip_grad_norm_(self.parameters, limit or math.inf).item()

    def replicas(self) -> Mapping[str, Tensor]:
        moments, _ = self.of_optimizer()
        return self.module.state_dict() | _joined(moments)

    def save(self, saving: Saving) -> checkpoints.Checkpoint | None:
        if not self.ranks.is_first:
            return None
        saving.check_writer()
        moments, own = self.of_optimizer()
        weights = self.module.model.state_dict()
        return checkpoints.save(saving.directory, saving.about, weights, moments, own | saving.scalars)

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        restore_weights(self.module.model, checkpoint)
        optimization.restore(checkpoint, self.module.model, self.optimizer, self.scaler)


def _joined(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moments of one kind one behind the other, `MOST_JOINED` elements together, under the name of the first.

    To compare a tensor takes several kernels however small it is, and these are three times as many as the weights.
    """
    open_groups: dict[tuple[str, torch.dtype], tuple[str, int]] = {}
    groups: dict[str, list[Tensor]] = {}
    for name, tensor in moments.items():
        kind = name.partition("/")[0], tensor.dtype
        first, size = open_groups.get(kind, (name, 0))
        if size + tensor.numel() > MOST_JOINED:
            first, size = name, 0
        open_groups[kind] = first, size + tensor.numel()
        groups.setdefault(first, []).append(tensor.reshape(-1))
    return {first: torch.cat(tensors) for first, tensors in groups.items()}
