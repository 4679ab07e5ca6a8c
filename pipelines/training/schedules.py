"""What changes in the quantiser while a model is trained: how hard it is, and from when on the encoder stays."""

from pipelines.config import RunConfig
from pipelines.model.build import Model
from pipelines.model.codec import TransformCodec
from pipelines.model.straight_through import SoftToHardQuantizer, UniformNoise, UniversalQuantizer


def set_quantizer(model: Model, config: RunConfig, step: int) -> None:
    """Bring the quantiser to where it is to be in a step, a pure function of the step's number, from 0."""
    for module in model.modules():
        if isinstance(module, SoftToHardQuantizer):
            module.sigma.fill_(sigma(config, step))
        if isinstance(module, UniformNoise | UniversalQuantizer | TransformCodec):
            module.hard.fill_(encoder_stays(config, step))


def sigma(config: RunConfig, step: int) -> float:
    """The hardness of the soft assignment, from `model.sigma` to `model.final_sigma` on a geometric course."""
    first, last = config.model.sigma, config.model.final_sigma or config.model.sigma
    return first * (last / first) ** (step / max(1, config.training.steps - 1))


def encoder_stays(config: RunConfig, step: int) -> bool:
    """Whether what decides on the symbols is not trained any more (Guo 2021, arXiv:2104.05168)."""
    return step >= config.training.hard_from * config.training.steps


def keep_encoder(model: Model) -> None:
    """Take the gradients of what decides on the symbols away, so that the optimiser leaves it as it is."""
    for name, parameter in model.named_parameters():
        if name.startswith(model.encoding):
            parameter.grad = None
