"""Codebooks in training: what a batch says of the codes comes as gradients, and no optimiser is to see those."""

from collections.abc import Iterator

from torch import nn

from pipelines.model.straight_through import VectorQuantizer


def codebook_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What `absorb` reads and writes."""
    for layer in _layers(model):
        yield from layer.parameters()


def learned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimiser moves, by name."""
    others = {id(layer.statistics) for layer in _layers(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in others:
            yield name, parameter


def absorb(model: nn.Module, scale: float) -> None:
    """Take a step's statistics into the codebooks, the same bits on every rank.

    Args:
        scale: that the loss was multiplied by. Where it led to infinities, the step counts for nothing.
    """
    for layer in _layers(model):
        gradient = layer.statistics.grad
        if gradient is not None and gradient.isfinite().all():
            layer.absorb(gradient / scale)


def _layers(model: nn.Module) -> Iterator[VectorQuantizer]:
    return (module for module in model.modules() if isinstance(module, VectorQuantizer))
