"""Who becomes champion."""

import math

import pytest

from pipelines.errors import CodecmillError
from pipelines.promotion import Scores, decide

TEST_SET = "a" * 64


def scores(version: int, psnr: float, test_set: str = TEST_SET) -> Scores:
    return Scores(version, {"psnr": psnr, "ms_ssim": 0.9}, test_set)


@pytest.mark.parametrize(
    ("candidate", "champion", "margin", "alias"),
    [
        (30.0, 29.0, 0.0, "champion"),
        (30.0, 30.0, 0.0, "candidate"),
        (29.0, 30.0, 0.0, "candidate"),
        (30.5, 30.0, 0.5, "champion"),
        (30.4, 30.0, 0.5, "candidate"),
        (math.inf, 30.0, 0.5, "champion"),
        (math.inf, math.inf, 0.0, "candidate"),
        (math.nan, 30.0, 0.0, "candidate"),
        (30.0, math.nan, 0.0, "champion"),
    ],
)
def test_the_better_by_the_margin_is_champion(candidate: float, champion: float, margin: float, alias: str) -> None:
    assert decide(scores(2, candidate), scores(1, champion), "psnr", margin).alias == alias


def test_the_first_is_champion_and_the_reason_says_so() -> None:
    decision = decide(scores(1, 29.12346), None, "psnr", 0.5)
    assert decision.alias == "champion"
    assert decision.reason == "Version 1 is the first champion, with psnr 29.1235 dB."


def test_a_version_that_is_not_a_number_is_never_champion() -> None:
    assert decide(scores(1, math.nan), None, "psnr", 0.0).alias == "candidate"


def test_the_champion_evaluated_again_stays_champion() -> None:
    assert decide(scores(3, 28.0, "b" * 64), scores(3, 30.0), "psnr", 1.0).alias == "champion"


def test_the_reason_names_both_versions_figures_and_the_margin() -> None:
    assert decide(scores(2, 30.25), scores(1, 30.0), "psnr", 0.5).reason == (
        "Version 2 with psnr 30.2500 dB does not beat champion version 1 with 30.0000 dB by a margin of 0.5 dB."
    )
    assert decide(scores(2, 31.0), scores(1, 30.0), "psnr", 0.5).reason == (
        "Version 2 with psnr 31.0000 dB beats champion version 1 with 30.0000 dB, asked for a margin of 0.5 dB."
    )
    assert "with ms_ssim 0.9000 does not" in decide(scores(2, 30.0), scores(1, 31.0), "ms_ssim", 0.0).reason


def test_different_test_sets_are_not_compared() -> None:
    with pytest.raises(CodecmillError, match=r"Version 2 and champion 1 .* different test sets \(bbb.* and aaa.*first"):
        decide(scores(2, 30.0, "b" * 64), scores(1, 29.0), "psnr", 0.0)


def test_a_missing_metric_is_named() -> None:
    with pytest.raises(CodecmillError, match=r"Version 2 was not evaluated with psnr; its metrics: ms_ssim\."):
        decide(Scores(2, {"ms_ssim": 0.9}, TEST_SET), scores(1, 29.0), "psnr", 0.0)


def test_a_curve_that_does_not_meet_jpeg_s_is_no_failure() -> None:
    decision = decide(scores(1, 29.0), None, "bd_rate", 0.0)
    assert decision.alias == "candidate"
    assert decision.reason == "Version 1 has no usable bd_rate: its curve and JPEG's have no quality in common."


def test_a_bd_rate_over_the_index_itself_is_measured_anew_and_never_compared() -> None:
    """MS-SSIM's own scale was that of these until 2026-11-27."""
    former = Scores(1, {"psnr": 30.0, "bd_rate": -9.0, "bd_rate_ms_ssim": -60.0}, TEST_SET, 24)
    today, none = (Scores(1, {"psnr": 30.0, **own}, TEST_SET, 24) for own in ({"bd_rate_ms_ssim_db": -20.0}, {}))
    asked = [each.are_of(TEST_SET, "bd_rate_ms_ssim", 24) for each in (former, today, none)]
    assert (asked, former.are_of(TEST_SET, "bd_rate", 24)) == ([False, True, True], True)
    better = Scores(2, {"psnr": 30.0, "bd_rate_ms_ssim_db": -30.0}, TEST_SET, 24)
    decision = decide(better, today, "bd_rate_ms_ssim", 5)
    assert decision.alias == "champion" and "-30.0000 % beats champion version 1 with -20.0000 %" in decision.reason
    assert decide(better, today, "bd_rate_ms_ssim", 11).alias == "candidate"


def test_a_test_split_too_small_for_ms_ssim_is_no_failure() -> None:
    """It shows where all training is done."""
    for metric, others in (("ms_ssim", {}), ("bd_rate_ms_ssim", {"bd_rate": -9.0})):
        decision = decide(Scores(1, {"psnr": 30.0, **others}, "a" * 64, 24), None, metric, 0)
        assert decision.alias == "candidate"
        assert decision.reason.endswith("no image of the test split has 176 pixels on its shorter side.")
