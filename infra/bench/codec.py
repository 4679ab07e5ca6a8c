"""Measures the codec: whole pictures to files and back, in real bytes, on one thread."""

import yaml

from infra.bench.contender import PROJECT
from infra.bench.loading import Stored
from infra.bench.photographs import A_SHEET
from infra.bench.results import MEMORY, Column, Group
from infra.bench.workplace import Workplace

RECIPE = PROJECT / "infra" / "configs" / "ten-minutes.yaml"
STEPS = 40
"""Of training: the model has the size of a trained one, and codes what its start from the data lets it."""

MEGAPIXELS = Column("megapixels/s", lambda each: each.per_second / 1e6)
CPU = Column("CPU s/megapixel", lambda each: each.cpu_milliseconds * 1e3)
BITS = Column("bits/pixel", lambda each: each.more["bits_per_pixel"])

TEXT = """Pictures of 1536x1024 pixels to `.cmill` files at quality 50 and back to exactly the pixels that any machine
gets, by the model of `infra/configs/ten-minutes.yaml` after {steps} steps; one thread."""


def measure_codec(place: Workplace, stored: Stored) -> Group:
    recipe = yaml.safe_load(RECIPE.read_text())
    training = {"steps": STEPS, "batch_size": 8, "crop_size": 128, "checkpoint_interval": STEPS}
    common = {
        "shard_set": str(stored.small_set),
        "data": {"normalization": "half"},
        "model": recipe["model"],
        "training": training,
        "files": place.sheets(A_SHEET * (place.scale.trainings + 1)),
    }
    programs = [place.of_ours(part, "code_pictures", part=part, **common) for part in ("encode", "decode")]
    rounds = place.measured("codec", programs, place.scale.trainings)
    group = Group("The codec", TEXT.format(steps=STEPS))
    group.add(rounds, [MEGAPIXELS, CPU, BITS, MEMORY])
    for part in ("encode", "decode"):
        group.figure(f"{part}_megapixels_per_second", [each.per_second / 1e6 for each in rounds.of(part)])
    return group
