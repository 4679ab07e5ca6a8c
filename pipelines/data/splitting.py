"""Which source goes to which split and shard: by its content's hash alone, so that the others stay where they are."""

from collections.abc import Mapping, Sequence

from pipelines.data.shard_format import Split
from pipelines.errors import InputError

NAME_BITS = 24
"""Of a shard's place in the range of hashes, as its name tells them: six hexadecimal digits."""


def assign_splits(hashes: Sequence[str], validation_fraction: float, test_fraction: float) -> dict[str, Split]:
    """The split of each source, by hash.

    A hash, seen as a number on [0, 1), is for the test below `test_fraction`, for validation up to the sum of both
    fractions, and for training above. Where a split with a fraction would be empty it gets the nearest hashes, and so
    does training.

    Raises:
        InputError: there are too few sources to fill the splits.
    """
    ordered = sorted(hashes)
    needed = 1 + (validation_fraction > 0) + (test_fraction > 0)
    if len(ordered) < needed:
        raise InputError(
            f"{len(ordered)} different usable images are too few: training, validation and test need {needed}, one "
            "each. Add images; or begin a run of another --name with data.validation_fraction 0, or one that is only "
            "trained (codecmill train) with data.test_fraction 0."
        )
    places = [int(name[:16], 16) / 2**64 for name in ordered]
    test = sum(place < test_fraction for place in places)
    test = min(max(test, test_fraction > 0), len(ordered) - 1 - (validation_fraction > 0))
    both = sum(place < test_fraction + validation_fraction for place in places)
    both = min(max(both, test + (validation_fraction > 0)), len(ordered) - 1)
    return {
        name: "test" if number < test else "validation" if number < both else "train"
        for number, name in enumerate(ordered)
    }


def group(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Sources of a split, as shards: name (six hexadecimal digits) to sources in the order of their hashes.

    The range of hashes is halved where what lies in it is larger than `limit`, again and again; a shard is named by
    the lower end of its range. So a source more or less touches the shard around it and renames none.

    Args:
        sizes: source hash to estimated size.
        limit: in the unit of `sizes`; a single source may be larger.
    """
    groups: dict[str, list[str]] = {}

    def divide(members: list[str], lower: int, bits: int) -> None:
        if len(members) > 1 and bits < NAME_BITS and sum(sizes[name] for name in members) > limit:
            middle = lower + (1 << (NAME_BITS - bits - 1))
            divide([name for name in members if int(name[:6], 16) < middle], lower, bits + 1)
            divide([name for name in members if int(name[:6], 16) >= middle], middle, bits + 1)
        elif members:
            groups[f"{lower:06x}"] = members

    divide(sorted(sizes), 0, 0)
    return groups
