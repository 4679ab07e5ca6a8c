"""Random draws: image and mask stay aligned, and depend on seed, epoch and sample alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_png_reading import encoded

from pipelines.config import DataConfig
from pipelines.data.png_reading import StoredPicture
from pipelines.data.transforms import Draw, draw

Y, X = np.mgrid[0:64, 0:64].astype(np.uint8)
PLACES = Image.fromarray(np.dstack([X, Y, np.zeros_like(X)]))
"""Every pixel says where it was."""


def data(**choices: object) -> DataConfig:
    return DataConfig.model_validate({"images": "x", "patch_size": 64, **choices})


@given(
    left=st.integers(0, 30), top=st.integers(0, 30), side=st.integers(1, 34), mirror=st.booleans(), flip=st.booleans()
)
def test_a_draw_without_magnification_is_slicing(left: int, top: int, side: int, mirror: bool, flip: bool):
    expected = np.asarray(PLACES)[top : top + side, left : left + side]
    expected = expected[:, ::-1] if mirror else expected
    expected = expected[::-1] if flip else expected
    drawn = Draw(left, top, side, side, mirror, flip)
    assert np.array_equal(np.asarray(drawn.apply(PLACES)), expected)
    assert np.array_equal(np.asarray(drawn.apply_to_mask(PLACES.getchannel(0))), expected[..., 0])


@given(
    left=st.integers(-9, 40),
    top=st.integers(-9, 40),
    cut=st.integers(1, 40),
    side=st.integers(1, 40),
    mirror=st.booleans(),
    flip=st.booleans(),
    filters=st.sampled_from([2, 4]),
)
def test_a_stored_picture_gives_the_same_levels(
    left: int, top: int, cut: int, side: int, mirror: bool, flip: bool, filters: int
):
    """Half inside and half outside of the picture too: what is outside is black."""
    levels = np.asarray(PLACES)
    for drawn in (Draw(left, top, cut, side, mirror, flip), Draw(left, top, side, side, mirror, flip)):
        image, mask = np.empty((side, side, 3), np.uint8), np.empty((side, side, 1), np.uint8)
        drawn.put(StoredPicture(encoded(levels, filters)), image)
        drawn.put(StoredPicture(encoded(levels[..., :1], filters)), mask)
        assert np.array_equal(image, np.asarray(drawn.apply(PLACES)))
        assert np.array_equal(mask[..., 0], np.asarray(drawn.apply_to_mask(PLACES.getchannel(0))))


@given(key=st.text(min_size=1, max_size=8), epoch=st.integers(0, 1000))
def test_image_and_mask_show_the_same_place_at_any_scale(key: str, epoch: int):
    choices = data(min_scale=0.5, max_scale=4.0, flip_vertical=True)
    drawn = draw(choices, 16, PLACES.size, 0, epoch, key)
    image, mask = drawn.apply(PLACES), drawn.apply_to_mask(PLACES.getchannel(0))
    assert image.size == mask.size == (16, 16)
    # Nearest may be half a source pixel off, and so may the bicubic filter at the border.
    assert np.abs(np.asarray(image)[..., 0].astype(int) - np.asarray(mask)).max() <= drawn.cut / 16 + 1
    assert set(np.unique(np.asarray(mask))) <= set(range(64))


@given(epoch=st.integers(0, 10_000))
def test_what_is_drawn_lies_inside_the_patch(epoch: int):
    drawn = draw(data(min_scale=0.25, max_scale=4.0), 16, (64, 64), 5, epoch, "key")
    assert 4 <= drawn.cut <= 64
    assert 0 <= drawn.left <= 64 - drawn.cut
    assert 0 <= drawn.top <= 64 - drawn.cut


def test_seed_epoch_and_sample_decide_and_nothing_else():
    choices = data(max_scale=2.0)

    def drawn(seed: int, epoch: int, key: str) -> Draw:
        return draw(choices, 16, (64, 64), seed, epoch, key)

    assert drawn(1, 2, "a") == drawn(1, 2, "a")
    assert len({drawn(1, 2, "a"), drawn(2, 2, "a"), drawn(1, 3, "a"), drawn(1, 2, "b")}) == 4


def test_every_place_and_both_mirrorings_come_up_evenly():
    draws = [draw(data(), 60, (64, 64), 0, epoch, "key") for epoch in range(5000)]
    for counts in (np.bincount([one.left for one in draws]), np.bincount([one.top for one in draws])):
        assert len(counts) == 5
        assert counts.min() > 1000 - 5 * 1000**0.5
    assert sum(one.mirror for one in draws) == pytest.approx(2500, abs=5 * 1250**0.5)
    assert not any(one.flip for one in draws)


def test_a_patch_of_the_crops_size_is_taken_whole():
    choices = data(flip_horizontal=False)
    assert draw(choices, 64, (64, 64), 0, 0, "key") == Draw(0, 0, 64, 64)
