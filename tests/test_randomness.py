"""Keyed random numbers: numpy's own Philox of a documented key."""

import hashlib

import numpy as np
import pytest

from pipelines.data.randomness import key_digest, random_generator


@pytest.mark.parametrize("key", [(0, 1, "a", "crop"), (2**63, "ä", ""), (7,)])
def test_a_generator_is_numpys_philox_of_the_first_16_bytes_of_the_digest(key: tuple[int | str, ...]):
    text = "\0".join(f"{type(part).__name__}:{part}" for part in key)
    words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8")
    ours, numpys = random_generator(*key), np.random.Generator(np.random.Philox(key=words))
    assert ours.bit_generator.random_raw(9).tolist() == numpys.bit_generator.random_raw(9).tolist()
    assert ours.random(3, np.float32).tolist() == numpys.random(3, np.float32).tolist()
    assert ours.integers(10, size=5).tolist() == numpys.integers(10, size=5).tolist()


def test_keys_that_look_alike_are_different():
    alike = [("a", "b"), ("ab",), ("a", "", "b"), (1,), ("1",)]
    assert len({key_digest(*key) for key in alike}) == len(alike)
