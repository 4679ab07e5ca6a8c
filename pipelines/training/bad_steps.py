"""Steps whose loss or gradient is no number: which samples they had, and when there are too many of them to go on."""

import math

from pipelines.config import RunConfig
from pipelines.data.order import SampleOrder
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError
from pipelines.training.agreement import Agreement

MOST_BAD_IN_A_ROW = 10
"""Steps without a finite loss after which skipping them leads nowhere."""

MOST_OVERFLOWS_IN_A_ROW = 40
"""Halved so often, fp16's scale is far below 1: it is not the scale."""

MOST_NAMED = 8
"""Samples that a message names."""


class BadSteps:
    """Counts them, alike on every rank.

    Args:
        talks: whether this rank prints what is worth knowing.

    Attributes:
        in_a_row: steps passed over without a good one between them.
    """

    def __init__(self, config: RunConfig, shard_set: ShardSet, talks: bool):
        self.in_a_row = 0
        self._overflows_in_a_row = 0
        self._config = config
        self._shard_set = shard_set
        self._talks = talks

    def note_norm(self, norm: float, scaled: bool, step: int) -> None:
        """Look at a step's gradient norm: fp16's scaler meets infinite ones by design, but not without end.

        Raises:
            CodecmillError: there were too many in a row.
        """
        self._overflows_in_a_row = 0 if math.isfinite(norm) else self._overflows_in_a_row + 1
        if scaled and self._overflows_in_a_row == MOST_OVERFLOWS_IN_A_ROW:
            raise CodecmillError(
                f"The fp16 gradients of {MOST_OVERFLOWS_IN_A_ROW} steps in a row, up to step {step}, are not "
                "finite, however small their scale. Use training.precision bf16 or float32 in a new run."
            )

    def stop(self, agreed: Agreement, step: int) -> CodecmillError:
        """What ends the run at its first bad step."""
        return self._stopped_by(agreed, step, self._keys(agreed, step), "The run was stopped before it")

    def pass_over(self, agreed: Agreement, step: int) -> list[str]:
        """Count a step that changes no weight; returns the keys of its samples.

        Raises:
            CodecmillError: there were too many in a row.
        """
        keys = self._keys(agreed, step)
        self.in_a_row += 1
        if self.in_a_row == MOST_BAD_IN_A_ROW:
            text = f"It is the {MOST_BAD_IN_A_ROW}th such step in a row, so the run was stopped before it"
            raise self._stopped_by(agreed, step, keys, text)
        return keys

    def tell(self, agreed: Agreement, step: int, keys: list[str], then: str) -> None:
        """Say what becomes of a step that was passed over."""
        if self._talks:
            print(self._about(agreed, step, keys, f"It changes no weight ({then})"), flush=True)

    def _keys(self, agreed: Agreement, step: int) -> list[str]:
        """The samples whose losses are no numbers; of a gradient that is none, all samples of the batch."""
        size = self._config.training.batch_size
        order = SampleOrder(self._shard_set.counts("train"), self._config.seed, self._config.data.shuffle_window)
        places = [order.locate((step - 1) * size + place) for place in agreed.nonfinite or range(size)]
        return [self._shard_set.read("train", place.shard, place.index).key for place in places]

    def _stopped_by(self, agreed: Agreement, step: int, keys: list[str], outcome: str) -> CodecmillError:
        """The journal has no line of a step that was not taken, so the log names all samples."""
        if self._talks:
            print(f"Step {step} is not finite for the samples {', '.join(keys)}", flush=True)
        return CodecmillError(self._about(agreed, step, keys, outcome))

    def _about(self, agreed: Agreement, step: int, keys: list[str], outcome: str) -> str:
        shown = ", ".join(keys[:MOST_NAMED]) + (f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else "")
        what = "loss" if agreed.nonfinite else "gradient"
        return (
            f"The {what} of step {step} is not finite, for the samples {shown}. {outcome}. "
            "Lower training.learning_rate, or use a wider training.precision, in a new run."
        )
