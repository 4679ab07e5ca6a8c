"""Which model a config means."""

import torch

from pipelines.config import ModelConfig
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.codec import TransformCodec
from pipelines.model.codec_start import start_from_cosines

Model = Autoencoder | TransformCodec


def count_parameters(config: ModelConfig) -> int:
    """How many parameters a model has, without any memory for them."""
    with torch.device("meta"):
        model = Autoencoder(config) if config.entropy == "none" else TransformCodec(config)
    return sum(parameter.numel() for parameter in model.parameters())


def most_parameters(config: ModelConfig) -> int:
    """A bound of how many parameters a model has, from its widths, depths and codes alone."""
    widest = max(config.channels, config.latent_channels, config.entropy_channels, config.hyper_channels)
    codes = 4 * config.codes * config.code_channels
    return codes + 100 * (config.downsamplings + 1) * (config.residual_blocks + 1) * widest**2


def build_model(config: ModelConfig, seed: int = 0) -> Model:
    """The model with its initial weights: the same config and seed give the same ones (see `Autoencoder`)."""
    if config.entropy == "none":
        return Autoencoder(config, seed)
    model = TransformCodec(config)
    start_from_cosines(model, seed)
    return model
