"""Curves and BD-rates from real files, and what an evaluation makes of them."""

import csv
import io
import re
import tracemalloc
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import bjontegaard
import numpy as np
import pytest
from PIL import Image, ImageFile
from test_codec import HALF, codec_of, picture

from pipelines.codec.entropy_coder import Tables
from pipelines.codec.files import compress
from pipelines.codec.picture_codec import PictureCodec
from pipelines.config import EvaluationConfig, ModelConfig
from pipelines.evaluation import curve_images
from pipelines.evaluation.contents import POINTS
from pipelines.evaluation.curve_images import LARGEST_SIDE, bounded
from pipelines.evaluation.equal_rates import SIDE, at_equal_rates, worst_box
from pipelines.evaluation.evaluate import evaluate, score
from pipelines.evaluation.formats import FORMATS, JPEG, read_format
from pipelines.evaluation.metrics import psnr
from pipelines.evaluation.rate_distortion import OURS, QUALITIES, CurvePoint, RateDistortion, bd_rate, points_of
from pipelines.evaluation.results import percent, read_evaluation
from pipelines.evaluation.summary import summary
from pipelines.model.build import build_model
from pipelines.model.codec import TransformCodec
from pipelines.promotion import Scores, decide


def curve(rates: list[float], values: list[float]) -> list[CurvePoint]:
    return [CurvePoint(i, rate, value, None) for i, (rate, value) in enumerate(zip(rates, values, strict=True))]


def test_the_bd_rate_of_curves_a_constant_factor_apart_is_that_factor():
    anchor = curve([0.1, 0.2, 0.4, 0.8, 1.6], [28.0, 31, 34, 37, 40])
    better = [replace(point, bits_per_pixel=0.7 * point.bits_per_pixel) for point in anchor]
    assert bd_rate(better, anchor) == pytest.approx(-30, abs=1e-9)
    assert bd_rate(anchor, better) == pytest.approx(100 / 0.7 - 100, abs=1e-9)
    assert bd_rate(better[::-1], anchor) == pytest.approx(-30, abs=1e-9)
    assert bd_rate(better[2:], anchor) == pytest.approx(-30, abs=1e-9)


def test_a_setting_that_costs_more_for_no_more_changes_nothing():
    anchor = curve([0.1, 0.2, 0.4, 0.8, 1.6], [28.0, 31, 34, 37, 40])
    better = curve([0.07, 0.14, 0.2, 0.28, 0.28, 0.56, 1.12, 1.5], [28.0, 31, 31, 34, 33, 37, 40, 40])
    assert bd_rate(better, anchor) == pytest.approx(-30, abs=1e-9)
    assert bd_rate(anchor, better) == pytest.approx(100 / 0.7 - 100, abs=1e-9)
    assert bd_rate(curve([0.1, 0.2], [30.0, 30.0]), anchor) is None


def test_curves_that_do_not_meet_have_no_bd_rate():
    low, high = curve([0.1, 0.2], [20.0, 25]), curve([1.0, 2.0], [30.0, 35])
    assert bd_rate(low, high) is None
    assert bd_rate(low, low, "ms_ssim") is None
    assert percent(None) == "–" and percent(-12.34) == "−12.3 %"  # noqa: RUF001


@pytest.fixture(scope="module")
def measured() -> RateDistortion:
    codec = codec_of("hyperprior", spread=0.0)
    images = {"a": picture(200, 184), "b": picture(181, 190)}
    return RateDistortion(tuple(point for name, image in images.items() for point in points_of(codec, name, image)))


def test_points_are_those_of_real_files(measured: RateDistortion):
    codec, image = codec_of("hyperprior", spread=0.0), picture(200, 184)
    mine = [point for point in measured.points if (point.image, point.codec) == ("a", OURS)]
    assert [point.setting for point in mine] == list(QUALITIES)
    assert mine[2].bits_per_pixel == len(codec.encode(image, codec.step_of(QUALITIES[2]))) * 8 / (200 * 184)
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=45, optimize=True, progressive=True, subsampling="4:2:0")
    (jpeg,) = (p for p in measured.points if (p.image, p.codec, p.setting) == ("a", JPEG, 45))
    assert jpeg.bits_per_pixel == len(file.getvalue()) * 8 / (200 * 184)
    assert jpeg.psnr == psnr(image, Image.open(file).convert("RGB"))
    assert jpeg.ms_ssim is not None and 0 < jpeg.ms_ssim < 1


def test_pictures_too_small_for_ms_ssim_do_not_count_in_its_bits(measured: RateDistortion):
    codec, tiny = codec_of("hyperprior", spread=0.0), picture(24, 20)  # of which a file is mostly its head
    both = RateDistortion((*measured.points, *points_of(codec, "tiny", tiny)))
    for anchor in measured.anchors:
        assert both.bd_rate(anchor, "ms_ssim") == measured.bd_rate(anchor, "ms_ssim")
        assert both.bd_rate(anchor, "ms_ssim", image="tiny") is None
    assert both.bd_rate(JPEG, "ms_ssim") is not None
    assert both.bd_rate(JPEG) != measured.bd_rate(JPEG)
    assert both.curves_of("ms_ssim") == measured.curves


def test_bits_at_equal_ms_ssim_are_over_decibels(measured: RateDistortion):
    """As learned codecs are compared, -10 log10(1 - MS-SSIM), by the reference's own implementation."""
    for image in (None, "a", "b"):
        columns: list[np.ndarray] = []
        for codec in (JPEG, OURS):
            settings = dict.fromkeys(point.setting for point in measured.points if point.codec == codec)
            points = [
                [p for p in measured.points if (p.codec, p.setting) == (codec, setting) and image in (None, p.image)]
                for setting in settings
            ]
            rates = np.array([np.mean([p.bits_per_pixel for p in each]) for each in points])
            decibels = np.array([-10 * np.log10(1 - np.mean([p.ms_ssim or 0 for p in each])) for each in points])
            assert (np.diff(decibels) > 0).all()
            columns += [rates, decibels]
        expected = bjontegaard.bd_rate(*columns, method="pchip", require_matching_points=False, min_overlap=0)
        assert measured.bd_rate(JPEG, "ms_ssim", image) == pytest.approx(expected, rel=1e-9)


def test_every_format_s_settings_go_from_coarse_to_fine(measured: RateDistortion):
    assert list(measured.curves) == [OURS, *(each.name for each in FORMATS)]
    for points in measured.curves.values():
        assert [p.bits_per_pixel for p in points] == sorted(p.bits_per_pixel for p in points)
        assert [p.psnr for p in points] == sorted(p.psnr for p in points)


def test_pieces_are_cut_where_the_codec_errs_and_at_one_rate():
    codec = codec_of("factorized", spread=0.0)
    image = picture(400, 300)
    noise = np.random.default_rng(2).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image.paste(Image.fromarray(noise), (310, 220))
    pieces = at_equal_rates(codec, "x", image)
    assert [piece.codec for piece in pieces.decoded] == [OURS, *(each.name for each in FORMATS)]
    levels = np.asarray(pieces.original)
    assert levels.shape == (SIDE, SIDE, 3)
    assert any((levels[y : y + 40, x : x + 60] == noise).all() for y in range(SIDE - 39) for x in range(SIDE - 59))
    ours, jpeg = pieces.decoded[0].bits_per_pixel, pieces.decoded[1].bits_per_pixel
    assert jpeg == pytest.approx(ours, rel=0.15)


def test_an_evaluation_of_a_codec_has_its_curves_everywhere(tmp_path: Path):
    codec = codec_of("hyperprior", spread=0.0)
    named = [("a.png", picture(200, 184)), ("b.png", picture(181, 190)), ("c.png", picture(60, 50))]
    config = EvaluationConfig(curve_images=2)
    found = evaluate(codec.model, HALF, named, tmp_path / "e", config, {"run": "r", "step": 3}, codec)
    assert found.rate_distortion is not None
    assert found.rate_distortion.images == ["a.png", "b.png"]
    assert found.means["bd_rate"] == found.rate_distortion.bd_rate(JPEG)
    again = read_evaluation(tmp_path / "e")
    assert again is not None and again.points == found.points and again.means == found.means
    with (tmp_path / "e" / POINTS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found.points) == 2 * (len(QUALITIES) + sum(len(each.settings) for each in FORMATS))
    assert float(rows[0]["bits_per_pixel"]) == found.points[0].bits_per_pixel
    page = found.report.read_text()
    assert "Rate and distortion" in page and "At equal rates" in page
    assert page.count("<svg") == 3
    assert percent(found.means["bd_rate"]) in page
    shown = summary(found)
    assert f"| JPEG | {percent(found.means['bd_rate'])} |" in shown
    (chart,) = re.findall(r"data:image/svg\+xml;base64,([^)]+)\)", shown)
    lines = ElementTree.fromstring(b64decode(chart)).findall(".//{http://www.w3.org/2000/svg}polyline")  # noqa: S314
    assert len(lines) == 1 + len(FORMATS)
    assert score(codec.model, HALF, named, config, codec) == pytest.approx(found.means)


def test_a_codec_of_one_quality_has_one_point_and_says_so(tmp_path: Path):
    model = {"entropy": "factorized", "channels": 8, "latent_channels": 12, "downsamplings": 2}
    built = build_model(ModelConfig.model_validate(model | {"finest_step": 30, "coarsest_step": 30}))
    assert isinstance(built, TransformCodec)
    codec = PictureCodec(built.eval(), HALF, "ab" * 32, Tables(built.tables))
    about = {"run": "r", "step": 3}
    found = evaluate(built, HALF, [("a", picture(60, 50))], tmp_path / "e", EvaluationConfig(), about, codec)
    assert [point.setting for point in found.points if point.codec == OURS] == [QUALITIES[0]]
    assert "bd_rate" not in found.means
    picture(60, 50).save(tmp_path / "a.png")
    (written,) = compress([tmp_path / "a.png"], tmp_path / "o", codec, 70, None)
    assert written.remark == "the model has one quality, whichever is asked for"
    (other,) = compress([tmp_path / "a.png"], tmp_path / "p", codec_of("factorized"), 70, None)
    assert not other.remark


def test_a_panorama_that_not_every_format_can_hold_is_evaluated_without_curves(tmp_path: Path):
    codec = codec_of("factorized", spread=0.0)
    named = [("wide.png", picture(LARGEST_SIDE + 1, 8)), ("a.png", picture(60, 50)), ("b.png", picture(61, 50))]
    config = EvaluationConfig(curve_images=2)
    found = evaluate(codec.model, HALF, named, tmp_path / "e", config, {"run": "r", "step": 3}, codec)
    assert [row.name for row in found.images] == ["wide.png", "a.png", "b.png"]
    assert found.rate_distortion is not None
    assert found.rate_distortion.images == ["a.png", "b.png"]
    pieces = found.report.read_text().partition("At equal rates")[2].partition("</section>")[0]
    assert sorted(re.findall(r"<h3><bdi>(.*?)</bdi></h3>", pieces)) == ["a.png", "b.png"]
    assert score(codec.model, HALF, named, config, codec) == pytest.approx(found.means)
    alone = evaluate(codec.model, HALF, named[:1], tmp_path / "w", config, {"run": "r", "step": 3}, codec)
    assert alone.rate_distortion is None
    assert set(alone.means) == {"psnr"}


def test_images_of_one_name_have_each_their_own_points(tmp_path: Path):
    codec = codec_of("factorized", spread=0.0)
    pictures = [picture(60, 50), picture(90, 40), picture(61, 50), picture(40, 40)]
    named = list(zip(["a.jpg", "a.jpg (3)", "a.jpg", "a.jpg"], pictures, strict=True))
    config = EvaluationConfig(curve_images=4, pictures=0)
    found = evaluate(codec.model, HALF, named, tmp_path / "e", config, {"run": "r", "step": 3}, codec).rate_distortion
    assert found is not None
    assert found.images == ["a.jpg", "a.jpg (3)", "a.jpg (3) (3)", "a.jpg (4)"]
    alone = RateDistortion(tuple(points_of(codec, "x", pictures[3])))
    assert found.bd_rate(JPEG, image="a.jpg (4)") == alone.bd_rate(JPEG)


@pytest.mark.parametrize(
    ("sizes", "most", "images"),
    [
        ([(400, 400)] * 9, 24, 24),  # not bounded: written down as it was before there was a bound
        ([(400, 400)] * 30, 24, 24),
        ([(400, 400)] * 1000, 1000, 400),
        ([(6000, 4000)] * 9, 24, 2),
        ([(10_000, 10_000)] * 9, 24, 1),  # one at least
        ([(10_000, 10_000)] * 9, 1, 1),
        ([(10_000, 10_000)] * 9, 0, 0),
        ([(400, 400), (10_000, 10_000), (400, 400)], 24, 1),  # the first ones: none after one that is too large
        ([(LARGEST_SIDE + 1, 9000), (400, 400)], 24, 24),
    ],
)
def test_where_pixels_bound_the_curves_the_number_of_images_says_so(
    sizes: list[tuple[int, int]], most: int, images: int
):
    assert bounded(EvaluationConfig(curve_images=most), sizes).curve_images == images


def test_curves_are_of_the_first_images_until_there_are_enough_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curve_images, "MOST_PIXELS", 2 * 60 * 50)
    codec, config = codec_of("factorized", spread=0.0), EvaluationConfig(pictures=4)
    named = [("wide", picture(LARGEST_SIDE + 1, 1)), *((name, picture(60, 50)) for name in "abc"), ("d", picture(8, 8))]
    found = evaluate(codec.model, HALF, named, tmp_path / "e", config, {"run": "r", "step": 3}, codec)
    assert found.rate_distortion is not None and found.rate_distortion.images == ["a", "b"]
    assert bounded(config, [image.size for _, image in named]).curve_images == 2
    assert "means over 2 images at each setting, the first ones, of 64 megapixels together at most." in (
        found.report.read_text()
    )
    assert found.report.read_text().count("<strong>Original</strong>") == 2, "pieces are of as many pixels at most"


def test_the_largest_picture_fits_every_format():
    image = Image.new("RGB", (LARGEST_SIDE, 8))
    for each in FORMATS:
        assert read_format(each.write(image, each.settings[0])).size == image.size


def test_noise_that_pillow_s_buffer_does_not_hold_is_written_in_every_format():
    levels = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (300, 300, 3))
    image, former = Image.fromarray(levels), ImageFile.MAXBLOCK
    for each in FORMATS:
        for setting in (*each.settings, *each.reach):
            assert read_format(each.write(image, setting)).size == image.size
    assert former == ImageFile.MAXBLOCK


def worst_box_of_whole_sums(image: Image.Image, decoded: Image.Image) -> tuple[int, int, int, int]:
    error = np.square(np.asarray(image).astype(np.int64) - np.asarray(decoded)).sum(axis=2)
    height, width = (min(SIDE, length) for length in error.shape)
    sums = np.pad(error.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(place) for place in np.unravel_index(inside.argmax(), inside.shape))
    return left, top, left + width, top + height


@pytest.mark.parametrize("size", [(1, 1), (20, 300), (300, 20), (SIDE, SIDE), (250, 230), (401, 300)])
def test_where_the_codec_errs_most_is_found(size: tuple[int, int]):
    random = np.random.default_rng(size)
    one, other = (Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(2))
    assert worst_box(one, other) == worst_box_of_whole_sums(one, other)
    assert worst_box(one, one) == (0, 0, min(SIDE, size[0]), min(SIDE, size[1]))


def test_where_the_codec_errs_most_is_found_in_little_memory():
    images = [Image.new("RGB", (2000, 1000), (level, 0, 0)) for level in (0, 9)]
    tracemalloc.start()
    assert worst_box(*images) == (0, 0, SIDE, SIDE)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 * 2000 * 1000  # the pictures themselves are 6 bytes a pixel, and copied once


def test_fewer_bits_make_a_champion():
    def scores(version: int, rate: float) -> Scores:
        return Scores(version, {"psnr": 30.0, "bd_rate": rate}, "a" * 64)

    assert decide(scores(2, -30.0), scores(1, -20.0), "bd_rate", 5).alias == "champion"
    assert decide(scores(2, -24.0), scores(1, -20.0), "bd_rate", 5).alias == "candidate"
    assert decide(scores(2, -10.0), scores(1, -20.0), "bd_rate", 0).alias == "candidate"
