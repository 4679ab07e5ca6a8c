"""Random numbers that depend on nothing but their key: no global generator, no state to save."""

import hashlib

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def key_digest(*key: int | str) -> bytes:
    """32 bytes that stand for a key; 1 and "1" are different keys, and so are ("a", "b") and ("ab",)."""
    return hashlib.sha256("\0".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()


def random_generator(*key: int | str) -> np.random.Generator:
    """A counter-based generator (Philox; Salmon et al., SC 2011) for one purpose: (seed, step, sample, "noise").

    The same key gives the same numbers in any process, on any rank, in any order of calls.
    """
    words = np.frombuffer(key_digest(*key)[:16], dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(_Key(words)))  # pyright: ignore[reportArgumentType]


class _Key(ISeedSequence):
    """What `Philox(key=words)` has for a key. That also asks the system for entropy, which takes four times as long."""

    def __init__(self, words: np.ndarray):
        self._words = words

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        return self._words
