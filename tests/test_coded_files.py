"""A codec by its commands: trained, evaluated and registered, then pictures to files and back."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import make, with_databases
from processes import PROJECT, clean_environment, codecmill_here
from test_checkpoints import save
from test_codec import picture
from test_pipeline import command
from test_tracking import make_run, register, save_checkpoint

import pipelines.codec
from pipelines import tracking
from pipelines.data.images import open_image
from pipelines.durable_files import read_json
from pipelines.evaluation.contents import POINTS
from pipelines.evaluation.metrics import psnr
from pipelines.promotion import Decision
from pipelines.run_directory import Root, RunDirectory

MODEL = {
    "entropy": "hyperprior",
    "channels": 8,
    "latent_channels": 24,
    "downsamplings": 2,
    "entropy_channels": 8,
    "hyper_channels": 4,
}


@pytest.fixture(scope="module")
def trained(
    photos: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, empty_prefect_database: Path
) -> RunDirectory:
    """A codec that went through the whole DAG."""
    folder = tmp_path_factory.mktemp("codec")
    with_databases(Root(folder / "root"), empty_database, empty_prefect_database)
    data = {"images": str(photos), "patch_size": 32, "workers": 1, "validation_fraction": 0.2, "test_fraction": 0.2}
    training = {"steps": 12, "batch_size": 4, "crop_size": 16, "processes": 1, "threads": 1, "precision": "float32"}
    tiny = {"name": "codec", "root": str(folder / "root"), "data": data, "model": MODEL, "training": training}
    done = command(make(tiny), folder, "run")
    assert done.returncode == 0, done.stderr
    return Root(folder / "root").run("codec")


def codecmill(run: RunDirectory, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows", *map(str, words), "--root", str(run.root.path)],
        cwd=PROJECT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a.png", tmp_path / "b.tif"]
    picture(90, 61).save(files[0])
    picture(33, 47).convert("CMYK").save(files[1])
    return files


def test_a_run_of_a_codec_leaves_curves_and_a_version(trained: RunDirectory):
    (folder,) = trained.path.glob("evaluation/step_*")
    assert (folder / POINTS).is_file()
    assert "Rate and distortion" in (folder / "report.html").read_text()
    assert read_json(trained.promotion_file)["alias"] == "champion"
    lines = [json.loads(line) for line in trained.journal.read_text().splitlines()]
    for line in lines:
        parts = line["train/bpp_latents"] + line["train/bpp_hyper"]
        assert line["train/bpp"] == pytest.approx(parts)


def test_pictures_become_files_and_files_pictures(trained: RunDirectory, pictures: list[Path], tmp_path: Path):
    """By the champion, and back by the model that the file names."""
    coded, decoded = tmp_path / "coded", tmp_path / "decoded"
    written = codecmill(trained, "compress", *pictures, "-o", coded, "--quality", "70", "--json")
    assert written.returncode == 0, written.stderr
    assert [Path(each["path"]) for each in json.loads(written.stdout)] == [coded / "a.cmill", coded / "b.cmill"]
    assert sorted(file.name for file in coded.iterdir()) == ["a.cmill", "b.cmill"]
    read = codecmill(trained, "decompress", *coded.iterdir(), "-o", decoded)
    assert read.returncode == 0, read.stderr
    assert sorted(file.name for file in decoded.iterdir()) == ["a.png", "b.png"]
    original, result, other = (open_image(file) for file in (pictures[0], decoded / "a.png", decoded / "b.png"))
    assert psnr(original, result) > 25
    assert other.size == (33, 47)
    root = trained.root.path
    assert pipelines.codec.encode(original, 70, root=root) == (coded / "a.cmill").read_bytes()
    again = pipelines.codec.decode((coded / "a.cmill").read_bytes(), root=root)
    assert again.tobytes() == result.tobytes()
    grey = pipelines.codec.encode(picture(20, 20).convert("LA"), 70, model="codec", root=root)
    assert pipelines.codec.decode(grey, model="codec", root=root).size == (20, 20)


def test_a_coded_file_may_come_out_of_a_pipe(trained: RunDirectory, tmp_path: Path):
    root = trained.root.path
    content = pipelines.codec.encode(picture(20, 24), 70, root=root)
    pipe = tmp_path / "pipe.cmill"
    os.mkfifo(pipe)
    for sent, code in ((content, 0), (content[:-1], 2), (content[:30], 2), (b"", 2)):
        with ThreadPoolExecutor(1) as beside:
            beside.submit(pipe.write_bytes, sent)
            done = codecmill_here("decompress", str(pipe), "-o", "decoded", "--root", str(root), cwd=tmp_path)
        assert done.returncode == code, done.stderr
    assert open_image(tmp_path / "decoded" / "pipe.png").size == (20, 24)


def test_a_wanted_rate_is_met_and_one_out_of_reach_is_told(trained: RunDirectory, tmp_path: Path):
    file = tmp_path / "large.png"
    picture(300, 280).save(file)
    met = codecmill(trained, "compress", file, "-o", tmp_path / "o", "--target-bpp", "2", "--json")
    assert met.returncode == 0, met.stderr
    (row,) = json.loads(met.stdout)
    assert row["bits_per_pixel"] == (tmp_path / "o" / "large.cmill").stat().st_size * 8 / (300 * 280)
    assert row["bits_per_pixel"] == pytest.approx(2, rel=0.02)
    words = ("compress", str(file), "-o", "o", "--target-bpp", "0.001")
    missed = codecmill_here(*words, "--root", str(trained.root.path), cwd=tmp_path)
    assert missed.returncode == 0
    assert "0.001 bpp is out of this model's reach" in missed.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "a.png", "b/a.png", "-o", "o", "--quality", "50"], "would both become o/a.cmill: rename one."),
        (["compress", "a.png", "-o", "o", "--quality", "0"], "quality"),
        (["compress", "a.png", "-o", "o", "--quality", "50", "--model", "nobody"], "nobody"),
        (["compress", "none.png", "-o", "o", "--quality", "50"], "none.png cannot be read as an image"),
        (["compress", "a.png", "-o", "o"], "target-bpp"),
        (["compress", "a.png", "-o", "o", "--quality", "50", "--target-bpp", "1"], "target-bpp"),
        (["decompress", "a.png", "-o", "o"], "a.png is no .cmill file"),
        (["decompress", "foreign.cmill", "-o", "o"], "was written by a model with sha256 cdcdcdcdcdcdcdcd"),
    ],
)
def test_what_cannot_be_coded_is_named(trained: RunDirectory, tmp_path: Path, words: list[str], message: str):
    from pipelines.codec.container import CodedPicture

    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/a.png"):
        picture(20, 20).save(tmp_path / name)
    (tmp_path / "foreign.cmill").write_bytes(CodedPicture(8, 8, 1500, "cd" * 32, b"").to_bytes())
    failed = codecmill_here(*words, "--root", str(trained.root.path), cwd=tmp_path)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert len(failed.stderr.strip().splitlines()) <= 2
    assert not list(tmp_path.glob("o/*"))


def test_a_model_without_an_entropy_model_says_how_to_get_one(tmp_path: Path):
    root = Root(tmp_path / "root")
    save(root.run("plain"), 12)
    picture(20, 20).save(tmp_path / "a.png")
    words = ("compress", "a.png", "-o", "o", "--quality", "9", "--model", "plain")
    failed = codecmill_here(*words, "--root", str(root.path), cwd=tmp_path)
    assert failed.returncode == 2
    assert "codecmill run --model.entropy hyperprior" in failed.stderr
    assert not (tmp_path / "o").exists()


def test_an_autoencoder_that_is_champion_leaves_the_finished_codec_to_compress(
    trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its PSNR may be the better one; but it writes no files."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(trained.root.path, tmp_path / "root")
    root = Root(tmp_path / "root")
    plain, config = make_run(root, "plain")
    version = register(plain, save_checkpoint(plain, config, 5))
    tracking.promote(plain, version, Decision("champion", "The better one."))
    picture(20, 20).save(tmp_path / "a.png")
    done = codecmill_here("compress", "a.png", "-o", "o", "--quality", "9", "--root", str(root.path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The champion is an autoencoder" in done.stderr
    assert "taken is the newest finished codec, 'codec'" in done.stderr
    content = (tmp_path / "o" / "a.cmill").read_bytes()
    assert content == pipelines.codec.encode(picture(20, 20), 9, model="codec", root=root.path)
