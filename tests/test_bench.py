"""The benchmark's own arithmetic: which rounds count, what fell, what is drawn. No timing is measured here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from processes import PROJECT, USERS_OWN, wait_for

from infra.bench import contender, expectations, photographs, plot, process_tree, results, rounds, run
from pipelines.errors import CodecmillError, InputError


def measurement(seconds: float, others: float = 0.0, **more: object) -> contender.Measurement:
    return contender.Measurement(
        seconds=seconds, cpu_seconds=seconds, count=10, memory_mib=1, others=others, capacity=2 * seconds, more=more
    )


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    found = rounds.Rounds(
        [rounds.Round({"a": measurement(a), "b": measurement(b)}) for a, b in ((1, 2), (10, 30), (1, 4))]
    )
    assert found.ratios("a", "b", results.per_second) == [2, 3, 4]
    assert results.Spread.of(found.ratios("a", "b", results.per_second)) == results.Spread(3, 2, 4)


def test_disturbed_rounds_are_said_to_be_so():
    quiet, loud = rounds.Round({"a": measurement(1, others=0.1)}), rounds.Round({"a": measurement(1, others=0.8)})
    assert (quiet.disturbance, loud.disturbance) == (0.05, 0.4)
    assert "1 more" in rounds.Rounds([quiet], [loud.disturbance]).remark
    assert "**1 of those that count were disturbed" in rounds.Rounds([quiet, loud]).remark
    assert "took up to 2.5 times its shortest" in rounds.Rounds([quiet], [], [0.02, 0.05, 0.03]).remark


def test_a_figure_that_fell_is_named_with_what_was_expected():
    expected = {
        "fast": expectations.Expectation(value=8, tolerance=0.1, better="more"),
        "small": expectations.Expectation(value=0.4, tolerance=0.25, better="less"),
        "gone": expectations.Expectation(value=1, tolerance=0, better="more"),
    }
    assert expectations.fallen({"fast": 7.2, "small": 0.5, "gone": 1}, expected) == []
    assert expectations.fallen({"fast": 7.1, "small": 0.51}, expected) == [
        "fast fell: it is 7.1, was expected to be 8, and should be at least 7.2.",
        "small fell: it is 0.51, was expected to be 0.4, and should be at most 0.5.",
        "gone is expected to be 1, but was not measured.",
    ]


def test_the_expectations_of_the_repository_can_be_read(tmp_path: Path):
    assert expectations.read_expectations()
    wrong = tmp_path / "expected.toml"
    wrong.write_text('[fast]\nvalue = 8\ntolerance = 0.1\nbetter = "higher"\n')
    with pytest.raises(InputError, match=r"fast\.better"):
        expectations.read_expectations(wrong)


def test_expectations_that_cannot_be_read_are_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (wrong := tmp_path / "expected.toml").write_text("[fast\n")
    monkeypatch.setattr(expectations.read_expectations, "__defaults__", (wrong,))
    monkeypatch.setattr(sys, "argv", ["bench", "--scale", "quick", "--root", str(tmp_path / "root")])
    assert run.main() == 2
    assert capsys.readouterr().err.startswith(f"codecmill bench: {wrong} is no TOML: ")
    assert not (tmp_path / "root").exists()


def test_sheets_are_the_same_each_time_and_hold_what_is_asked_for(tmp_path: Path):
    original = tmp_path / "photograph.png"
    Image.radial_gradient("L").resize((300, 280)).convert("RGB").save(original)
    first = photographs.sheets(tmp_path / "a", [original], 25)
    again = photographs.sheets(tmp_path / "b", [original], 25)
    assert len(first) == 2
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    with Image.open(first[0]) as sheet:
        assert sheet.size == (6 * 256, 4 * 256)
    grey = tmp_path / "grey.png"
    Image.new("L", (300, 300)).save(grey)
    with pytest.raises(InputError, match="--photographs"):
        photographs.sheets(tmp_path / "c", [grey], 1)


def test_a_chart_is_xml_with_a_dot_a_point_inside_its_frame():
    drawn = plot.chart("A & B", {"one <": [(40, 3.0), (4000, 90.0)], "two": [(400, 7.0)]}, "patches", "speed")
    root = ElementTree.fromstring(drawn)  # noqa: S314  # our own
    dots = [element for element in root.iter() if element.tag.endswith("circle")]
    assert len(dots) == 3
    for dot in dots:
        assert plot.LEFT <= float(dot.attrib["cx"]) <= plot.WIDTH - plot.RIGHT
        assert plot.TOP <= float(dot.attrib["cy"]) <= plot.HEIGHT - plot.BOTTOM


def test_a_stretch_counts_the_processes_below_this_one():
    with process_tree.Stretch() as stretch:
        busy = "import time\nwhile time.process_time() < 0.2: pass"
        subprocess.run([sys.executable, "-c", busy], check=True)
    assert stretch.cpu_seconds >= 0.15
    assert stretch.seconds > 0


def test_a_contender_that_dies_is_told_with_its_last_words(tmp_path: Path):
    program = contender.Program("lost", "create_codecmill", Path(sys.executable), {"nothing": json.dumps(0)})
    log = tmp_path / "lost.log"
    with contender.Contender(program, log) as lost, pytest.raises(CodecmillError, match="KeyError: 'files'") as told:
        lost.wait_ready()
    assert "The contender 'lost' ended with 1" in str(told.value)
    assert str(log) in str(told.value)


def running(word: str) -> list[Path]:
    """The processes below this one that have a word on their command line."""
    below = [Path(f"/proc/{process}") for process in process_tree.processes_below(os.getpid())]
    return [process for process in below if word in (process / "cmdline").read_text()]


def test_contenders_know_nothing_of_the_users_servers_and_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What they train would be registered among the user's models."""
    for name in USERS_OWN:
        monkeypatch.setenv(name, "theirs")
    program = contender.Program("asked", "create_codecmill", Path(sys.executable), {})
    with contender.Contender(program, tmp_path / "asked.log"):
        wait_for(lambda: len(running("create_codecmill")) == 1)  # one that has just begun has no words for a moment
        (asked,) = running("create_codecmill")
        given = (asked / "environ").read_text()
    assert f"PYTHONPATH={PROJECT}\0" in given
    assert "theirs" not in given


def test_photographs_without_debians_programs_are_one_sentence(tmp_path: Path):
    command = [sys.executable, "-m", "infra.photos.run", "--root", str(tmp_path / "root")]
    (tmp_path / "dpkg-deb").symlink_to("/bin/true")
    done = subprocess.run(
        command, cwd=PROJECT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2, done.stderr
    said = r"codecmill photos: There is no apt-get here, and the photographs .* packages\. Fetch them on a Debian .*\n"
    assert re.fullmatch(said, done.stderr), done.stderr
