"""Which samples a step consumed, as a digest that the training writes down and an audit computes again."""

import hashlib
from collections.abc import Sequence


def key_number(position: int, key: str) -> int:
    """A sample's key at its place in the global order, as 48 bits: a float64 holds them exactly."""
    return int.from_bytes(hashlib.sha256(f"{position} {key}".encode()).digest()[:6], "big")


def digest(numbers: Sequence[int]) -> str:
    """16 hexadecimal digits for the `key_number`s of a step's samples, in the order of their positions."""
    return hashlib.sha256(b"".join(number.to_bytes(6, "big") for number in numbers)).hexdigest()[:16]
