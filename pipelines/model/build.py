"""Which model a config means."""

from pipelines.config import ModelConfig
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.codec import TransformCodec
from pipelines.model.codec_start import start_from_cosines

Model = Autoencoder | TransformCodec


def build_model(config: ModelConfig, seed: int = 0) -> Model:
    """The model with its initial weights: the same config and seed give the same ones everywhere."""
    if config.entropy == "none":
        return Autoencoder(config, seed)
    model = TransformCodec(config)
    start_from_cosines(model, seed)
    return model
