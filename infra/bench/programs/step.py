"""The bare training step: forward, backward and Adam on a batch that is in memory, without loader, ranks or journal."""

from collections.abc import Callable

import torch
from torch import nn

from infra.bench.process_tree import Stretch
from infra.bench.programs.serving import Measure, Parameters, figures, serve
from infra.bench.programs.small_run import on_cpu
from pipelines.config import RunConfig
from pipelines.data.images import HALF
from pipelines.model.build import build_model
from pipelines.process_memory import keep_freed_memory
from pipelines.training import optimization
from pipelines.training.machine import resolve
from pipelines.training.step import TrainingStep

WARM_UP = 5
"""Steps before the first round: kernels are chosen, memory is taken, and what is compiled is compiled."""


def prepare(parameters: Parameters) -> Measure:
    """Parameters: `training`, as in a config; `plain`, for the loop that one would write by hand; `steps` a round."""
    config = RunConfig.model_validate(on_cpu({"name": "bench", "training": parameters["training"]}))
    do_step = _plain_step(config) if parameters["plain"] else default_step(resolve(config))
    for _ in range(WARM_UP):
        do_step()

    def measure(number: int) -> dict[str, float]:
        with Stretch() as stretch:
            for _ in range(parameters["steps"]):
                do_step()
        return figures(stretch, parameters["steps"] * config.training.batch_size)

    return measure


def _batch(config: RunConfig, device: str = "cpu") -> torch.Tensor:
    side = config.training.crop_size
    return torch.randint(0, 256, (config.training.batch_size, 3, side, side), dtype=torch.uint8, device=device)


def default_step(config: RunConfig, device: str = "cpu") -> Callable[[], None]:
    """What the trainer does with the settings that `auto` stands for here; clipping is one of them."""
    keep_freed_memory()
    training = config.training
    if isinstance(training.threads, int):
        torch.set_num_threads(training.threads)
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    model = build_model(config.model).to(memory_format=layout).to(device)  # pyright: ignore[reportCallIssue]
    module = TrainingStep(model, HALF, config.loss, training, device)
    if training.compile is True:
        module.compile(dynamic=False)
    optimizer = optimization.build(model, training)
    images = _batch(config, device)
    shape = model.noise_shape(training.batch_size, training.crop_size, training.crop_size)
    noise = torch.rand(shape, device=device) - 0.5 if shape else None

    def step() -> None:
        module(images, None, noise).loss.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain_step(config: RunConfig) -> Callable[[], None]:
    """Float32, eager, contiguous, torch's own defaults."""
    model = build_model(config.model)
    optimizer = torch.optim.Adam(model.parameters(), config.training.learning_rate)
    images = _batch(config)

    def step() -> None:
        target = images.float() / 255
        picture = HALF.denormalize(model(HALF.normalize(target), None).image)
        loss = nn.functional.mse_loss(picture, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clip)
        optimizer.step()

    return step


if __name__ == "__main__":
    serve(prepare)
