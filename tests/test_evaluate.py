"""An evaluation from pictures to a finished folder: figures, files, odd sizes and names, and nothing half-written."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from pipelines.config import EvaluationConfig, ModelConfig, RunConfig
from pipelines.data.images import ImageError, Normalization, open_image, to_image, to_levels, to_tensor, to_unit
from pipelines.errors import CodecmillError, InputError
from pipelines.evaluation.evaluate import evaluate, read_evaluation, reconstruct, score
from pipelines.evaluation.metrics import ms_ssim, psnr
from pipelines.evaluation.stage import images_of
from pipelines.evaluation.summary import summary
from pipelines.model.autoencoder import Autoencoder
from pipelines.progress import Progress, listen
from pipelines.run_directory import Root

if TYPE_CHECKING:
    from pipelines.data.shard_set import ShardSet

NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
ABOUT = {"run": "tiny", "step": 12, "checkpoint_sha256": "ab" * 32}


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    return Autoencoder(ModelConfig(channels=8, latent_channels=4, downsamplings=2), seed=1)


def test_figures_and_files_agree(tmp_path: Path, model: Autoencoder) -> None:
    images = [(f"{n}.png", picture(n, 180 + n, 190 - n)) for n in range(3)]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "evaluation.json",
        "metrics.csv",
        "pictures",
        "report.html",
    ]
    for (name, original), row in zip(images, result.images, strict=True):
        folder = result.folder / "pictures" / str(row.pictures)
        written = open_image(folder / "reconstruction.png")
        pixels = to_unit(to_tensor(original)[None], torch.float32)
        x = NORMALIZATION.normalize(torch.nn.functional.pad(pixels, (0, 3, 0, 3), mode="replicate"))
        with torch.inference_mode():
            y = model.eval()(x[..., : -(-original.height // 4) * 4, : -(-original.width // 4) * 4]).image
        expected = to_image(to_levels(NORMALIZATION.denormalize(y)[0, :, : original.height, : original.width]))
        assert np.array_equal(np.asarray(written), np.asarray(expected))
        assert (row.name, row.width, row.height) == (name, *original.size)
        assert row.psnr == psnr(original, written)
        assert row.ms_ssim == ms_ssim(original, written)
    assert result.means["psnr"] == pytest.approx(np.mean([row.psnr for row in result.images]))
    assert result.worst.psnr == min(row.psnr for row in result.images)
    assert result.best.psnr == max(row.psnr for row in result.images)
    value = json.loads((result.folder / "evaluation.json").read_bytes())
    assert (value["step"], value["psnr"], value["ms_ssim"]) == (12, result.means["psnr"], result.means["ms_ssim"])
    assert value["about"]["checkpoint_sha256"] == "ab" * 32
    with (result.folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], float(row["psnr_db"])) for row in rows] == [
        (row.name, pytest.approx(row.psnr, abs=1e-4)) for row in result.images
    ]
    assert read_evaluation(result.folder) == result
    assert score(model, NORMALIZATION, images, EvaluationConfig()) == result.means
    assert f"{result.means['psnr']:.2f} dB" in result.markdown()


def test_of_a_codebook_its_codes_are_counted_and_not_what_carries_gradients(tmp_path: Path, model: Autoencoder) -> None:
    for decay in (0.99, None):
        sizes = {"channels": 8, "latent_channels": 4, "downsamplings": 2, "codes": 32, "codebook_decay": decay}
        codebook = Autoencoder(ModelConfig.model_validate({**sizes, "quantizer": "vq"}), seed=1)
        counts = [
            evaluate(each, NORMALIZATION, [("a", picture(1, 20, 20))], tmp_path / "step", EvaluationConfig(), ABOUT)
            for each in (codebook, model)
        ]
        assert counts[0].parameters - counts[1].parameters == 32 * 4


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (33, 17), (1, 90)])
def test_odd_sizes_keep_theirs(tmp_path: Path, model: Autoencoder, size: tuple[int, int]) -> None:
    images = [("odd.png", picture(1, *size))]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(tile_size=64), ABOUT)
    (row,) = result.images
    assert open_image(result.folder / "pictures" / str(row.pictures) / "reconstruction.png").size == size
    assert row.ms_ssim is None
    assert list(result.means) == ["psnr"]
    assert json.loads((result.folder / "evaluation.json").read_bytes())["ms_ssim"] is None


def test_a_large_picture_in_tiles_is_the_same(model: Autoencoder) -> None:
    # A fresh model looks at its own block of pixels only; the noise opens its convolutions' eyes.
    wide = Autoencoder(model.config, seed=2).requires_grad_(False)
    for parameter in wide.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    image = picture(1, 333, 150)
    whole = reconstruct(wide, NORMALIZATION, image, 512)
    tiled = reconstruct(wide, NORMALIZATION, image, 200)
    difference = np.abs(np.asarray(whole).astype(int) - np.asarray(tiled))
    # A latent whose rounding hangs by a thread may fall the other way, so a few pixels may differ.
    assert (difference > 0).mean() < 0.001


def test_a_model_in_float64_is_evaluated_in_float64(model: Autoencoder) -> None:
    double = Autoencoder(model.config, seed=1).double()
    image = picture(1, 32, 32)
    difference = np.asarray(reconstruct(model, NORMALIZATION, image, 64)).astype(int) - np.asarray(
        reconstruct(double, NORMALIZATION, image, 64)
    )
    assert np.abs(difference).max() <= 1


def test_odd_names_survive(tmp_path: Path, model: Autoencoder) -> None:
    names = ["../../up.png", "a\nb.png", "\udcff.png", "x" * 255, "same.png", "same.png", "=1+1", "<script>.png", ""]
    images = [(name, picture(n, 16, 16)) for n, name in enumerate(names)]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "in" / "step", EvaluationConfig(), ABOUT)
    assert [row.name for row in result.images] == names
    assert read_evaluation(result.folder) == result
    assert len({row.pictures for row in result.images}) == len(names)
    for row in result.images:
        assert len(list((result.folder / "pictures" / str(row.pictures)).iterdir())) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with (result.folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)][:4] == [
            "../../up.png",
            "a\\nb.png",
            "\\udcff.png",
            "x" * 255,
        ]


def test_broken_images_are_reported_and_not_fatal(tmp_path: Path, model: Autoencoder) -> None:
    broken = ("cut.png", ImageError("/photos/cut.png cannot be read as an image: it is empty."))
    images = [broken, ("good.png", picture(1, 16, 16))]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    assert [row.name for row in result.images] == ["good.png"]
    assert [row.reason for row in result.broken] == ["/photos/cut.png cannot be read as an image: it is empty."]
    assert "/photos/cut.png cannot be read as an image: it is empty." in result.report.read_text("utf-8")
    with pytest.raises(InputError, match=r"There is no image to evaluate. /photos/cut.png cannot be read"):
        evaluate(model, NORMALIZATION, [broken], tmp_path / "none", EvaluationConfig(), ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize(("most", "kept"), [(0, ""), (1, "0"), (3, "015"), (4, "0145"), (9, "012345")])
def test_pictures_are_of_the_worst_and_the_best(tmp_path: Path, model: Autoencoder, most: int, kept: str) -> None:
    # The flatter, the better: in this order of size of the pattern, shuffled.
    flat = [Image.blend(picture(1, 24, 24), Image.new("RGB", (24, 24), (99, 99, 99)), n / 6) for n in range(6)]
    images = [(str(n), flat[n]) for n in (3, 5, 0, 2, 4, 1)]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(pictures=most), ABOUT)
    assert [row.name for row in result.ranked] == list("012345")
    assert "".join(row.name for row in result.ranked if row.pictures) == kept
    folders = {path.name for path in (result.folder / "pictures").glob("*")}
    assert folders == {row.pictures for row in result.images if row.pictures}


def test_a_half_written_evaluation_is_never_seen(tmp_path: Path, model: Autoencoder) -> None:
    folder = tmp_path / "step"
    former = evaluate(model, NORMALIZATION, [("a.png", picture(1, 16, 16))], folder, EvaluationConfig(), ABOUT)
    (tmp_path / ".tmp-step-1").mkdir()

    def interrupted() -> Iterator[tuple[str, Image.Image]]:
        yield "b.png", picture(2, 16, 16)
        assert read_evaluation(folder) == former
        assert all(path == folder or path.name.startswith(".tmp-") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, NORMALIZATION, interrupted(), folder, EvaluationConfig(), ABOUT)
    assert read_evaluation(folder) == former
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    again = evaluate(model, NORMALIZATION, [("b.png", picture(2, 16, 16))], folder, EvaluationConfig(), ABOUT)
    assert read_evaluation(folder) == again != former
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("damage", ["evaluation.json", "report.html", "metrics.csv"])
def test_an_incomplete_folder_is_no_evaluation(tmp_path: Path, model: Autoencoder, damage: str) -> None:
    images = [("a.png", picture(1, 16, 16))]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    (result.folder / damage).unlink()
    assert read_evaluation(result.folder) is None
    (result.folder / "evaluation.json").write_text('{"format_version": 1}')
    assert read_evaluation(result.folder) is None


@pytest.mark.parametrize(
    ("name", "value"), [("psnr", 1e308), ("psnr", -1e308), ("ms_ssim", -2.0), ("width", 0), ("height", -1)]
)
def test_figures_that_cannot_be_are_no_evaluation(tmp_path: Path, model: Autoencoder, name: str, value: float) -> None:
    images = [("a.png", picture(1, 16, 16))]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    written = json.loads((result.folder / "evaluation.json").read_bytes())
    written["images"][0][name] = value
    (result.folder / "evaluation.json").write_text(json.dumps(written))
    assert read_evaluation(result.folder) is None


def test_the_page_needs_no_picture_that_is_gone_or_too_wide(
    tmp_path: Path, model: Autoencoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a picture of 134 megapixels the file of all three side by side is more than is decoded."""
    images = [(f"{n}.png", picture(n, 40, 30)) for n in range(2)]
    result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    folders = [result.folder / "pictures" / str(row.pictures) for row in result.ranked]
    for folder in folders:
        (folder / "side_by_side.png").write_bytes(b"")
    assert summary(result).count("data:image/webp;base64,") == 2
    (folders[0] / "error.png").write_bytes(b"no picture")
    shown = summary(result)
    assert shown.count("data:image/webp;base64,") == 1
    assert f"{result.worst.psnr:.2f} dB" in shown
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"The pictures of {result.worst.name} are not shown: ")


def test_what_is_named_and_cannot_be_opened_is_told(tmp_path: Path) -> None:
    picture(1, 16, 16).save(tmp_path / "there.png")
    (tmp_path / "list.txt").write_text("there.png\nmissing.png\n")
    run = Root(tmp_path / "root").run("some")
    run.write_config(RunConfig(name="some", root=tmp_path / "root"))
    choice = EvaluationConfig(images=str(tmp_path / "list.txt"))
    images = images_of(run, cast("ShardSet", None), choice)
    assert images.count == 2
    (_, there), (name, missing) = images
    assert isinstance(there, Image.Image)
    assert name == "missing.png"
    assert str(missing) == "No such file or directory"


def test_a_diverged_model_is_an_error(tmp_path: Path, model: Autoencoder) -> None:
    diverged = Autoencoder(model.config)
    with torch.no_grad():
        diverged.decoder.head.bias.fill_(torch.nan)  # type: ignore[union-attr]
    images = [("a.png", picture(1, 16, 16))]
    with pytest.raises(CodecmillError, match="The model's output is not finite: its training has diverged"):
        evaluate(diverged, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_gpu_without_room_for_a_tile_is_a_sentence(model: Autoencoder) -> None:
    def full(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB of which ...")

    hook = model.decoder.register_forward_pre_hook(full)
    message = r"80 x 70 pixels in tiles of evaluation.tile_size 64 \(CUDA out of .* 2.00 GiB\): use a smaller --evaluat"
    try:
        with pytest.raises(CodecmillError, match=message):
            reconstruct(model, NORMALIZATION, picture(1, 80, 70), tile_size=64)
    finally:
        hook.remove()


def test_it_tells_how_far_it_is_and_leaves_the_model_as_it_was(tmp_path: Path, model: Autoencoder) -> None:
    heard: list[Progress] = []
    stop = listen(heard.append)
    model.train()
    images = [("a\n.png", picture(1, 16, 16)), ("b.png", picture(2, 16, 16))]
    try:
        result = evaluate(model, NORMALIZATION, images, tmp_path / "step", EvaluationConfig(), ABOUT)
    finally:
        stop()
    assert model.training
    assert [(told.stage, told.done, told.total, told.message) for told in heard] == [
        ("evaluation", 1, 2, "a\\n.png"),
        ("evaluation", 2, 2, "b.png"),
    ]
    assert heard[1].values == {"psnr": result.images[1].psnr}
