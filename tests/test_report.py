"""The report: it parses, needs nothing from elsewhere, survives hostile names, and says the right figures."""

import base64
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import picture

from pipelines.data.images import open_image
from pipelines.evaluation.cards import CARDS
from pipelines.evaluation.chart import MOST_STROKES, histogram
from pipelines.evaluation.pictures import write_pictures
from pipelines.evaluation.report import MOST_ROWS, html
from pipelines.evaluation.results import Broken, Evaluation, ImageRow, code, printable

HOSTILE = '"><script>alert(1)</script><img src=https://example.org/x.png onerror=alert(2)>.png'
VOID = {"meta", "link", "img", "input", "br"}
SHAPES = {"line", "rect"}


class Page(HTMLParser):
    """Every tag of a page; fails on one that is left open or closed twice."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evaluated(folder: Path, count: int, first_name: str = "a photo.png", **about: Any) -> tuple[Evaluation, str]:
    """An evaluation of `count` pictures of 20 x 12 pixels, at 20, 21, 22, ... dB, and its report."""
    rows, previews = [], {}
    for i in range(count):
        key = f"{i + 1:05d}-x"
        previews[key] = write_pictures(folder / "pictures" / key, picture(i, 20, 12), picture(i + 1, 20, 12))
        rows.append(ImageRow(first_name if i == 0 else f"photo {i}.png", 20, 12, 20.0 + i, 0.8 + i / 1000, key))
    about = {"run": "a run", "step": 1200, "images": "test split", **about}
    evaluation = Evaluation(
        folder, about, 751_836, 3.5, tuple(rows), (Broken("cut.png", f"{first_name} after it ends early."),)
    )
    return evaluation, html(evaluation, previews)


def test_it_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    evaluation, source = evaluated(tmp_path, 5)
    page = Page(source)
    sources = [
        value for _, tag in page.tags for name, value in tag.items() if name in ("src", "srcset", "data", "poster")
    ]
    assert sources
    assert all(value and value.startswith("data:image/webp;base64,") for value in sources)
    assert [tag["href"] for tag in page.all("link")] == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", re.sub(r"base64,[^\"]*", "", source))
    for tag in page.all("a"):
        target = str(tag["href"])
        assert target.startswith("#") or (evaluation.folder / target).exists() or target == "metrics.csv"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(tag["href"])[1:] for tag in page.all("a") if str(tag["href"]).startswith("#")} <= set(map(str, ids))
    with pytest.raises(AssertionError):
        Page(source.replace("</section>", "", 1))


def test_it_is_accessible(tmp_path: Path) -> None:
    page = Page(evaluated(tmp_path, 3)[1])
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all("alt" in image for image in page.all("img"))
    assert page.all("img")[0]["alt"] == "Original of a photo.png"
    assert all(tag["aria-label"] for tag in page.all("input"))
    assert all(tag["scope"] == "col" for tag in page.all("th"))
    assert [name for name, _ in page.tags if name == "title"]
    assert next(name for name, _ in page.tags if name in ("h1", "h2")) == "h1"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_its_colours_have_contrast(tmp_path: Path, theme: str) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, on every ground that it stands on."""
    blocks = re.findall(r":root \{([^}]*)\}", evaluated(tmp_path, 1)[1])
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", blocks[theme == "dark"]))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text in ("ink", "soft", "accent"):
        for ground in ("page", "card"):
            low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize("name", [HOSTILE, "a\nb\x00\udcff\u202egnp.png", "x" * 255, "&lt;b&gt;", "</svg></script>"])
def test_hostile_names_are_text(tmp_path: Path, name: str) -> None:
    plain = Page(evaluated(tmp_path / "plain", 2, "a.png")[1])
    evaluation, source = evaluated(
        tmp_path / "hostile", 2, name, run=name, images=name, **{"a\u202e <b>": {name: [name]}}
    )
    source.encode("utf-8")
    page = Page(source)
    extra = Page(evaluated(tmp_path / "extra", 2, "a.png", **{"a b": {"x": ["x"]}})[1])
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in extra.tags]
    assert len(plain.tags) < len(page.tags)
    assert printable(evaluation.images[0].name) in page.text
    assert "\u202e" not in source
    assert "\x00" not in source


def test_only_its_own_script_may_run(tmp_path: Path) -> None:
    source = evaluated(tmp_path, 1, HOSTILE)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    policy = next(str(tag["content"]) for tag in Page(source).all("meta") if tag.get("http-equiv"))
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert not re.search(r"<[^>]*\son[a-z]+=", re.sub(r'"[^"]*"', '""', source))


def test_it_says_the_figures(tmp_path: Path) -> None:
    about = {
        "checkpoint_sha256": "ab" * 32,
        "normalization": {"mean": [0.5, 0.25, 0.125], "std": [0.1, 0.2, 0.3]},
        "training_seconds": 3725.2,
        "test_set_sha256": None,
        "seed": 7,
    }
    page = Page(evaluated(tmp_path, 4, **about)[1])
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for expected in (
        "Mean PSNR 21.50 dB",
        "median 21.50",
        "Mean MS-SSIM 0.8015",
        "Images 4 1 unreadable",
        "Parameters 752 k 751,836",
        "Training steps 1,200 1 h 2 min",
        "ab" * 32,
        "mean 0.5, 0.25, 0.125",
        "Seed 7",
        "cut.png : a photo.png after it ends early.",
        "20.00 dB · MS-SSIM 0.8000 · 20 \u00d7 12",
    ):
        assert expected in text
    assert "Test set" not in text


def test_many_images_are_shown_worst_first_then_best(tmp_path: Path) -> None:
    page = Page(evaluated(tmp_path, 60)[1])
    cards = [str(tag["id"]) for tag in page.all("article")]
    worst = [f"{i:05d}-x" for i in range(1, CARDS + 1)]
    best = [f"{i:05d}-x" for i in range(60, 60 - CARDS, -1)]
    assert cards == worst + best
    assert len(page.all("tr")) == 61


def test_a_page_of_very_many_images_has_an_end(tmp_path: Path) -> None:
    few, _ = evaluated(tmp_path, 1)
    rows = [replace(few.images[0], name=f"{n}.png", psnr=n / 100, pictures=None) for n in range(5000)]
    source = html(replace(few, images=tuple(rows), broken=few.broken * 3000), {})
    page, text = Page(source), " ".join(Page(source).text)
    assert len(page.all("tr")) == 1 + MOST_ROWS
    assert "The 500 worst, then the 500 best. All as a file:" in text
    assert "0.png" in page.text
    assert "4999.png" in page.text
    assert "499.png" in page.text
    assert "500.png" not in page.text
    assert "and 2,000 more" in text
    strokes = [tag for tag in page.all("line") if tag.get("class") == "stroke"]
    assert 1000 < len(strokes) <= MOST_STROKES


def test_sixty_noisy_images_stay_under_five_megabytes(tmp_path: Path) -> None:
    evaluation, _ = evaluated(tmp_path, 60)
    noisy = picture(1, 900, 700).effect_spread(60)
    previews = write_pictures(tmp_path / "noisy", noisy, noisy.rotate(180))
    source = html(evaluation, {str(row.pictures): previews for row in evaluation.images})
    assert 1_000_000 < len(source.encode()) < 5_000_000


def test_embedded_pictures_can_be_decoded(tmp_path: Path) -> None:
    for tag in Page(evaluated(tmp_path, 2)[1]).all("img"):
        image = open_image(base64.b64decode(str(tag["src"]).partition(",")[2]))
        assert image.size == (20, 12)


@pytest.mark.parametrize(
    "values", [[30.0], [100.0, 100.0], [20.0, 20.01], [5.0, 100.0], [20 + i / 7 for i in range(400)], [-3.2, 0.0, 8.1]]
)
def test_the_histogram_counts_every_image_once(values: list[float]) -> None:
    drawing = ElementTree.fromstring(histogram([("<a> & b", value) for value in values]))  # noqa: S314  # our own
    bars = [rect.findtext("title", "") for rect in drawing.findall("rect")]
    assert sum(int(re.findall(r": (\d+) image", title)[0]) for title in bars) == len(values)
    assert len(bars) <= 41
    for title in bars:
        low, high, count = map(float, re.findall(r"-?\d+\.?\d*", title))
        assert sum(low - 1e-6 <= value < high - 1e-6 for value in values) == count
    strokes = [line for line in drawing.findall("line") if line.get("class") == "stroke"]
    assert len(strokes) == len(values)
    _, _, width, height = map(float, str(drawing.get("viewBox")).split())
    for element in drawing:
        x, y = element.get("x") or element.get("x1"), element.get("y") or element.get("y1")
        assert 0 <= float(str(x)) <= width
        assert 0 <= float(str(y)) <= height


def test_names_are_shown_on_one_line() -> None:
    assert printable("a\nb\tc") == "a\\nb\\tc"
    for name in ("写真\u3000一.png", "Screenshot at 9.41\u202fAM.png", "a\u200cb\u200d.png"):
        assert printable(name) == name
    assert printable("\udcff\u202e\x00é 日本") == "\\udcff\\u202e\\x00é 日本"


def test_markdown_code_cannot_be_left() -> None:
    assert code("plain") == "`plain`"
    assert code("a`b``c|d\n# e") == "``` a`b``c\\|d\\n# e ```"
