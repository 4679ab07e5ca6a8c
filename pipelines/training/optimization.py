"""Adam, its learning rate as a pure function of the step, and its state as named tensors."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipelines.checkpoint_format import SHARDING, STATE_TENSORS, ScalerState
from pipelines.checkpoint_tensors import stored_state
from pipelines.checkpoints import Checkpoint, read_training_state
from pipelines.config import TrainingConfig
from pipelines.errors import CodecmillError
from pipelines.stored_tensors import StoredTensor
from pipelines.training.codebooks import learned_parameters
from pipelines.weights import Copy, copy_all

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's state of a parameter: a scalar, and two tensors of its shape."""


def build(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) in one fused kernel."""
    alike: dict[type, list[nn.Parameter]] = {}  # a kernel takes whole tensors or shares of them, not both
    for _, parameter in learned_parameters(model):
        alike.setdefault(type(parameter), []).append(parameter)
    groups = [{"params": parameters} for parameters in alike.values()]
    return torch.optim.Adam(groups, training.learning_rate, betas=(0.9, training.adam_beta2), fused=True)


def learning_rate(training: TrainingConfig, steps_done: int) -> float:
    """The step size after `steps_done` steps: linear warm-up, then constant or half a cosine down to zero.

    (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.)
    """
    if steps_done < training.warmup_steps:
        return training.learning_rate * (steps_done + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    span = max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * (steps_done - training.warmup_steps) / span))


def state(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's moments by parameter name ('exp_avg/encoder.0.weight'), and the rest as JSON."""
    tensors = {
        f"{moment}/{name}": value
        for name, parameter in learned_parameters(model)
        for moment, value in optimizer.state[parameter].items()
    }
    return tensors, {"optimizer": "adam", "scaler": scaler.state_dict()}


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    copy: Copy = copy_all,
) -> None:
    """Put back what `state` returned, bit for bit.

    Args:
        copy: fills a moment, or this rank's share of it.

    A parameter of which nothing is stored has none yet: no step has moved it, as `hard_from: 0` keeps an encoder.

    Raises:
        CodecmillError: a moment of a parameter is missing or has another shape.
    """
    if scaler.is_enabled():
        _restore_scaler(scaler, checkpoint)
    optimizer.state.clear()
    tensors = stored_state(checkpoint)
    for name, parameter in learned_parameters(model):
        moments = {moment: tensors.get(f"{moment}/{name}") for moment in MOMENTS}
        if not any(moment is not None for moment in moments.values()):
            continue
        if [None if m is None else m.shape for m in moments.values()] != [(), parameter.shape, parameter.shape]:
            file = checkpoint.path / (SHARDING if checkpoint.manifest.is_sharded else STATE_TENSORS)
            raise CodecmillError(f"{file} does not hold Adam's moments of '{name}'.")
        step, *means = (cast("StoredTensor", moment) for moment in moments.values())
        # Of the parameter's own memory layout: a fused kernel walks both by the same index.
        own = [torch.empty_like(parameter, requires_grad=False) for _ in means]
        for moment, mean in zip(own, means, strict=True):
            copy(moment, mean)
        count = step[...].to(parameter.device, torch.float32, copy=True)
        optimizer.state[parameter] = dict(zip(MOMENTS, (count, *own), strict=True))


def _restore_scaler(scaler: torch.amp.GradScaler, checkpoint: Checkpoint) -> None:
    found = read_training_state(checkpoint).scaler
    if isinstance(found, ScalerState):  # else it was trained in another precision, and fp16 begins here
        scaler.load_state_dict(found.model_dump(by_alias=True))
