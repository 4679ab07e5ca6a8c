"""What a training of a given size needs, from rates that were measured here and assumptions that are stated."""

import math
from dataclasses import dataclass

TERA, GIGA, MEGA = 1e12, 1e9, 1e6
DAY, HOUR = 86_400.0, 3600.0


@dataclass(frozen=True)
class Measured:
    """On one core of an AMD EPYC (AVX-512 bf16), 2026-11-25: see README, "How fast it is"; and on one GPU."""

    decode_seconds_a_megapixel: float = 3.3e-3
    cut_seconds_a_patch: float = 1.43e-3
    """Of 256 pixels a side: encoded, hashed, written twice."""
    load_seconds_a_crop: float = 0.37e-3
    """Of 128 pixels a side, to uint8."""
    bytes_a_patch: float = 106e3
    flops_a_gpu: float = 22e12
    """Of infra/configs/gpu.yaml on an H200, in bf16, compiled: 16 crops of 256 a step, the pixels of 64 of 128."""


@dataclass(frozen=True)
class Assumed:
    """What could not be measured here, with where it comes from.

    Attributes:
        parameters, flop_an_image: those of infra/configs/gpu.yaml; a step of 0.1 TFLOP at a crop of 256, a quarter at
            128.
        read_rate: of a host from an object store, in bytes a second: 25 Gbit/s.
        between_hosts: bytes a second of a host to its neighbour: 200 Gbit/s.
        gpu_failures: unexpected interruptions a GPU and hour: 419 in 54 days on 16,384 (The Llama 3 herd of models,
            arXiv:2407.21783).
        dollars_a_gpu_hour, dollars_a_thousand_gets, dollars_a_byte_month: list prices of large clouds, about;
            of a GPU that of an A100, for an H200 costs more.
    """

    images: int = 10_000_000
    megapixels: float = 2.0
    bytes_an_image: float = 0.6e6
    patches_an_image: int = 8
    hosts: int = 8
    gpus_a_host: int = 8
    cores_a_host: int = 64
    samples_a_shard: int = 8_000
    batch_a_gpu: int = 64
    epochs: int = 30
    parameters: float = 21.5e6
    flop_an_image: float = 0.025e12
    read_rate: float = 25e9 / 8
    between_hosts: float = 200e9 / 8
    save_rate: float = 1e9
    gpu_failures: float = 419 / (54 * 24 * 16_384)
    dollars_a_gpu_hour: float = 2.0
    dollars_a_thousand_gets: float = 0.0004
    dollars_a_byte_month: float = 0.023e-9

    @property
    def gpus(self) -> int:
        return self.hosts * self.gpus_a_host


def needs(assumed: Assumed, measured: Measured) -> dict[str, str]:
    """Figures by what they are, in the order in which they are told."""
    patches = assumed.images * assumed.patches_an_image
    stored = patches * measured.bytes_a_patch
    cut = assumed.images * assumed.megapixels * measured.decode_seconds_a_megapixel
    cut += patches * measured.cut_seconds_a_patch
    cores = assumed.hosts * assumed.cores_a_host
    rate = measured.flops_a_gpu / assumed.flop_an_image
    epoch = patches / (rate * assumed.gpus)
    step = assumed.batch_a_gpu / rate
    loading = rate * assumed.gpus_a_host * measured.load_seconds_a_crop
    gradients = 2 * 4 * assumed.parameters * (assumed.gpus - 1) / assumed.gpus
    checkpoint = 3 * 4 * assumed.parameters
    between_failures = 1 / (assumed.gpu_failures * assumed.gpus)
    saving = checkpoint / assumed.save_rate
    interval = math.sqrt(2 * saving * between_failures * HOUR)  # Young, "A first order approximation", CACM 1974
    shards = patches / assumed.samples_a_shard
    gets = 2 * shards * assumed.hosts * assumed.epochs
    hours = epoch * assumed.epochs / HOUR * assumed.gpus
    reading = stored / epoch
    return {
        "patches": f"{patches / 1e6:.0f} million, {stored / TERA:.1f} TB in {shards:,.0f} shards",
        "cutting them": f"{cut / HOUR:.0f} core hours: {cut / cores / 60:.0f} min on {cores} cores",
        "reading the images for it": f"{assumed.images * assumed.bytes_an_image / TERA:.1f} TB: "
        f"{assumed.images * assumed.bytes_an_image / (assumed.hosts * assumed.read_rate) / 60:.0f} min",
        "a GPU": f"{rate:,.0f} images/s; {assumed.batch_a_gpu} of them a step of {1000 * step:.0f} ms",
        "an epoch": f"{epoch / 60:.1f} min; {assumed.epochs} of them {epoch * assumed.epochs / HOUR:.1f} h",
        "cores that load, a host": f"{loading:.0f} of {assumed.cores_a_host}",
        "gradients": f"{gradients / GIGA:.2f} GB a step through each host's link: "
        f"{1000 * gradients / assumed.between_hosts:.0f} ms, behind {1000 * step * 2 / 3:.0f} ms of backward pass",
        "a checkpoint": f"{checkpoint / GIGA:.2f} GB, {saving:.1f} s to the disk",
        "a failure": f"every {between_failures / 24:.0f} days of the {assumed.gpus} GPUs",
        "best interval of checkpoints": f"{interval / 60:.0f} min, {interval / step:,.0f} steps",
        "GETs": f"{gets / MEGA:.1f} million, {gets / 1000 * assumed.dollars_a_thousand_gets:.0f} dollars",
        "GPU hours": f"{hours:,.0f}, {hours * assumed.dollars_a_gpu_hour:,.0f} dollars",
        "storage": f"{stored * assumed.dollars_a_byte_month:,.0f} dollars a month",
        "shards that a host reads, no cache": f"{reading / GIGA:.1f} GB/s, of {assumed.read_rate / GIGA:.1f} "
        "that it can",
    }
