"""Whatever bytes lie in codecmill's own files, also under digests that are made to fit: its own errors come out."""

import hashlib
import json
import math
import pickle
import re
import resource
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_command_line import refused
from trainings import begin, train

from flows.cli.config_file import as_yaml, effective_config
from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.data import suspects
from pipelines.data.earlier_sets import EarlierSets
from pipelines.data.hashing import HashCache
from pipelines.data.loading import training_batches
from pipelines.data.shard_format import SPLITS, Manifest
from pipelines.data.shard_index import SPAN, read_index, write_index
from pipelines.data.shard_set import ShardSet
from pipelines.data.shard_verification import verify_shard
from pipelines.durable_files import json_bytes, read_json
from pipelines.errors import CodecmillError
from pipelines.evaluation.contents import REPORT, RESULT, TABLE, check_contents, contents_of, made_at, read_contents
from pipelines.evaluation.results import Broken, Evaluation, ImageRow, read_evaluation
from pipelines.evaluation.stage import evaluate_run, load
from pipelines.evaluation.summary import summary
from pipelines.file_digests import file_sha256
from pipelines.model.autoencoder import Autoencoder
from pipelines.provenance.audit import audit
from pipelines.provenance.explaining import explain
from pipelines.provenance.locating import find
from pipelines.provenance.verifying import verify
from pipelines.run_directory import RunDirectory
from pipelines.sealed_json import SEAL, read_sealed, write_sealed
from pipelines.status import run_status
from pipelines.tracking.lines import read_lines
from pipelines.tracking.marks import read_marks
from pipelines.training import journal, optimization
from pipelines.weights import load_weights, restore_weights

quick = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

NUMBERS = st.integers() | st.sampled_from([2**31, 2**53, 2**63, 2**64, 2**200, -1]) | st.floats()
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "\0", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def bytes_from(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        middle = draw(
            st.binary(max_size=8) | st.just(content[start:end] * 2) | st.just(b"[" * 100_000) | st.just(b"9" * 5000)
        )
        content = content[:start] + middle + content[end:]
    return content


@st.composite
def value_from(draw: st.DrawFn, value: Any) -> Any:
    """A value of JSON with one part, anywhere in it, replaced, taken away or added."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(value_from(value[key]))}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(value_from(value[place])), *value[place + 1 :]]
    if isinstance(value, dict) and value and draw(st.booleans()):
        gone = draw(st.sampled_from(sorted(value)))
        return {key: inner for key, inner in value.items() if key != gone} | draw(
            st.just({}) | st.dictionaries(st.text(max_size=5), VALUES, max_size=1)
        )
    return draw(VALUES)


@st.composite
def json_from(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON bytes that are JSON still, or not."""
    if draw(st.booleans()):
        return draw(bytes_from(content))
    return json.dumps(draw(value_from(json.loads(content)))).encode("utf-8", "surrogatepass")


@contextmanager
def allowed() -> Iterator[None]:
    """Only the errors that users are to meet, and each names something."""
    try:
        yield
    except CodecmillError as error:
        assert len(str(error)) > 20


@contextmanager
def kept(*files: Path) -> Iterator[None]:
    """Put back what is changed inside, and take away the marks that readers have left at it."""
    before = {file: file.read_bytes() for file in files}
    try:
        yield
    finally:
        for file, content in before.items():
            file.write_bytes(content)
            suspects.clear(file.parent)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> RunDirectory:
    """A trained run, small enough to be read hundreds of times."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(photos, root / "images")
    data = {"images": str(root / "images"), "patch_size": 16, "workers": 1, "max_patches_per_image": 2}
    training = {"steps": 2, "batch_size": 2, "crop_size": 16, "precision": "fp16", "device": "cpu"}
    model = {"channels": 4, "latent_channels": 2, "downsamplings": 1}
    config = {"name": "r", "root": str(root), "data": data, "model": model, "training": training}
    directory = begin(make(config))
    train(directory)
    return directory


def newest(run: RunDirectory) -> Path:
    return checkpoints.folder_of(run, max(checkpoints.steps_on_disk(run)))


def resign(file: Path, *, row: dict[str, Any] | None = None) -> None:
    """Make the shard set's manifest say that a file is what it now is."""
    manifest = file.parent / "manifest.json"
    value = read_json(manifest)
    of = next(each for each in value["shards"] if file.name.startswith(each["name"] + "."))
    prefix = {".tar": "", ".index": "index_", ".jsonl": "sources_"}[file.suffix]
    of |= {f"{prefix}sha256": file_sha256(file), f"{prefix}bytes": file.stat().st_size} | (row or {})
    manifest.write_bytes(json_bytes(value))


def read_shard_set(run: RunDirectory) -> None:
    """All that is ever read of a shard set; each part in its turn, as one may fail and the next not."""
    folder = run.shard_set()
    with allowed():
        earlier = EarlierSets(folder.parent, Manifest.read(folder).settings_digest, verify=False)
        for (sha256, split), _ in list(earlier._places.items())[:3]:
            earlier.samples(sha256, split)
    with allowed():
        shard_set = ShardSet.open(folder)
        for row in shard_set.manifest.shards:
            assert all(isinstance(how, str) for _, how in verify_shard(folder, row))
        for split in SPLITS:
            with allowed():
                assert all(isinstance(row.path, str) for row in shard_set.sources(split))
            with allowed():
                assert all(isinstance(sample.key, str) for sample in shard_set.samples(split))
        with training_batches(shard_set, run.read_config(), 1, 0, 1) as batches:
            next(batches)
    with allowed():
        found = find(run.path.name, run.root, run.path, every=False)
        explain(found)
        verify(found, with_sources=True)


def shard_file(run: RunDirectory, pattern: str) -> Path:
    return next(run.shard_set().glob(pattern))


@quick
@given(data=st.data())
def test_a_shard_sets_manifest(run: RunDirectory, data: st.DataObject):
    file = shard_file(run, "manifest.json")
    with kept(file):
        file.write_bytes(data.draw(json_from(file.read_bytes())))
        read_shard_set(run)


@quick
@given(data=st.data())
def test_a_list_of_sources_under_its_own_digest(run: RunDirectory, data: st.DataObject):
    file = shard_file(run, "train-*.sources.jsonl")
    with kept(file, file.parent / "manifest.json"):
        first, *rest = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(data.draw(json_from(first)) + b"\n" + b"".join(rest))
        resign(file)
        read_shard_set(run)


@quick
@given(data=st.data())
def test_an_index_under_its_own_digest(run: RunDirectory, data: st.DataObject):
    file = shard_file(run, "train-*.index")
    with kept(file, file.parent / "manifest.json"):
        spans = np.load(file)
        if data.draw(st.booleans()):
            place, name = data.draw(st.integers(0, len(spans) - 1)), data.draw(st.sampled_from(SPAN.names or ()))
            spans[name][place] = data.draw(st.integers(0, 2**64 - 1) | st.sampled_from([2**63, 2**60, 0, 512]))
            np.lib.format.write_array(stream := file.open("wb"), spans)
            stream.close()
        else:
            file.write_bytes(data.draw(bytes_from(file.read_bytes())))
        resign(file)
        read_shard_set(run)


@pytest.mark.parametrize("sizes", [(2**63, 2**63), (2**64 - 1, 513, 2**64 - 512), (600, 500)])
def test_an_index_whose_samples_are_larger_than_the_tar_is_refused(sizes: tuple[int, ...], tmp_path: Path):
    """Also where 64 bits would make 0 or 1,000 of their sum."""
    spans = np.zeros(len(sizes), dtype=SPAN)
    spans["size"] = sizes
    spans["offset"] = np.cumsum(spans["size"]) - spans["size"]
    write_index(tmp_path / "train.index", spans)
    with pytest.raises(CodecmillError, match=f"it has {sum(sizes)} bytes of samples, the tar 1000. Delete the file"):
        read_index(tmp_path / "train.index", len(sizes), 1000)


def test_an_index_that_claims_much_takes_little(run: RunDirectory):
    file = shard_file(run, "train-*.index")
    with kept(file, file.parent / "manifest.json"):
        for dtype, shape in (("<u8", (2**40,)), ("|O", (3,)), ([("offset", "|O")], (1,)), ("<u8", (-1,)), ("<u8", ())):
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            with file.open("wb") as stream:
                np.lib.format.write_array_header_1_0(stream, header)
            resign(file)
            shard_set = ShardSet.open(file.parent)
            with pytest.raises(CodecmillError, match=rf"{file.name} is no index of its tar: "):
                shard_set.read("train", 0, 0)


@quick
@given(data=st.data())
def test_a_tar_under_its_own_digests(run: RunDirectory, data: st.DataObject):
    """Every checksum fits, so what was changed reaches the decoders."""
    tar = shard_file(run, "train-*.tar")
    index = tar.with_suffix(".index")
    with kept(tar, index, tar.parent / "manifest.json"):
        content = bytearray(tar.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        tar.write_bytes(content)
        spans = np.load(index)
        for span in spans:
            span["crc32"] = zlib.crc32(content[span["offset"] : span["offset"] + span["size"]])
        with index.open("wb") as stream:
            np.lib.format.write_array(stream, spans)
        resign(tar)
        resign(index)
        read_shard_set(run)


OUT = "escaped"
"""Begins the name of every file that a hostile tar would leave outside."""


def pointing_outside(number: int, key: str, contents: dict[str, bytes], outside: Path) -> list[tuple[str, str, bytes]]:
    """A sample's members as (name, target of a symbolic link, content), which leave the folder in one of four ways."""
    link = [[], [], [(f"{OUT}_link", str(outside), b"")], [(f"{OUT}_link", "../../..", b"")]][number % 4]
    start = ["../../../", f"{outside}/", f"{OUT}_link/", f"{OUT}_link/"][number % 4]
    files = [(f"{start}{OUT}_{key}.{suffix}", "", content) for suffix, content in contents.items()]
    return [*link, *files]


def rewrite_hostile(tar: Path, samples: int, outside: Path) -> None:
    """Give the members of a tar names that point outside, and links; its index and the manifest are made to fit."""
    content = tar.read_bytes()
    spans = np.array(read_index(tar.with_suffix(".index"), samples, len(content)))
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as writer:
        for number, span in enumerate(spans):
            sample = content[span["offset"] : span["offset"] + span["size"]]
            parts = {part: int(span[f"{part}_size"]) for part in ("json", "mask", "image") if span[f"{part}_size"]}
            starts = {part: int(span[f"{part}_offset"]) for part in parts}
            contents = {part: sample[starts[part] : starts[part] + size] for part, size in parts.items()}
            span["offset"] = writer.offset
            for name, target, data in pointing_outside(number, f"{number:04d}", contents, outside):
                member = tarfile.TarInfo(name)
                member.size, member.linkname = len(data), target
                member.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
                writer.addfile(member, BytesIO(data))
                if not target:
                    padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    span[f"{name.rpartition('.')[2]}_offset"] = writer.offset - padded - int(span["offset"])
            span["size"] = writer.offset - int(span["offset"])
    content = tar.read_bytes()
    for span in spans:
        span["crc32"] = zlib.crc32(content[span["offset"] : span["offset"] + span["size"]])
    write_index(tar.with_suffix(".index"), spans)
    resign(tar)
    resign(tar.with_suffix(".index"))


def escaped(base: Path) -> list[Path]:
    """What hostile tars have left anywhere."""
    return list(base.rglob(f"{OUT}*"))


@pytest.fixture
def deep_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory and that for temporary files, so far down that `../../..` stays in the test's folder."""
    deep = tmp_path / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    return deep


@pytest.mark.full
def test_members_of_a_tar_that_point_outside_are_read_by_the_index_and_written_nowhere(
    run: RunDirectory, tmp_path: Path, deep_inside: Path
):
    """All that is ever done with a shard set whose every digest fits: training, evaluation, audit, verification."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root = deep_inside / "e" / "f" / "g" / "root"
    shutil.copytree(run.root.path / "images", deep_inside / "images")
    config: dict[str, Any] = run.read_config().model_dump(mode="json")
    config |= {"name": "hostile", "root": str(root)}
    config["data"] |= {"images": str(deep_inside / "images"), "max_patches_per_image": 6}
    directory = begin(RunConfig.model_validate(config))
    folder = directory.shard_set()
    shard_set = ShardSet.open(folder)
    pixels = {split: [sample.image for sample in shard_set.samples(split)] for split in SPLITS}
    members: list[tarfile.TarInfo] = []
    for row in shard_set.manifest.shards:
        rewrite_hostile(folder / row.tar, row.samples, outside)
        with tarfile.open(folder / row.tar) as tar:
            members += tar.getmembers()
    for start in ("../../../", f"{outside}/", f"{OUT}_link/"):
        assert any(member.isreg() and member.name.startswith(start) for member in members)
    assert {member.linkname for member in members if member.issym()} == {str(outside), "../../.."}
    listed = sorted(folder.iterdir())

    shard_set = ShardSet.open(folder)
    assert shard_set.verify() == []
    assert {split: [sample.image for sample in shard_set.samples(split)] for split in SPLITS} == pixels
    last = train(directory)
    evaluate_run(directory, last, shard_set, directory.read_config().evaluation)
    assert (audit(directory).steps, audit(directory).faults) == (last.step, ())
    verify(find(directory.path.name, directory.root, directory.path, every=False), with_sources=True)
    read_shard_set(directory)
    assert escaped(tmp_path) == []
    assert list(outside.iterdir()) == []
    assert sorted(folder.iterdir()) == listed


@pytest.mark.parametrize("legacy", [False, True], ids=["a tar", "a tar as early versions of torch wrote them"])
def test_weights_in_a_tar_that_points_outside_are_refused_and_written_nowhere(
    run: RunDirectory, tmp_path: Path, deep_inside: Path, legacy: bool
):
    outside = tmp_path / "outside"
    outside.mkdir()
    file = deep_inside / "classic.pt"
    with tarfile.open(file, "w") as tar:
        for number in range(4):
            for name, target, data in pointing_outside(number, str(number), {"png": b"x"}, outside):
                member = tarfile.TarInfo(name)
                member.size, member.linkname = len(data), target
                member.type = tarfile.SYMTYPE if target else tarfile.REGTYPE
                tar.addfile(member, BytesIO(data))
        if legacy:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                member = tarfile.TarInfo(name)
                content = pickle.dumps(_Bomb(outside / f"{OUT}_{name}"))
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    with pytest.raises(CodecmillError, match=r"classic\.pt cannot be read as plain tensors, and nothing else is ever"):
        load_weights(Autoencoder(run.read_config().model), file)
    assert escaped(tmp_path) == []
    assert list(outside.iterdir()) == []


@quick
@given(data=st.data())
def test_the_cache_of_hashes(run: RunDirectory, data: st.DataObject):
    file = run.path / "hash-cache.json"
    image = next((run.root.path / "images").iterdir())
    write_sealed(file, {str(image): [1, 2, 3, 4, "0" * 64]})
    file.write_bytes(data.draw(bytes_from(file.read_bytes())))
    digest, _ = HashCache(file).sha256(str(image))
    assert digest == file_sha256(image), "a cache that was changed is not believed"


def read_checkpoint(run: RunDirectory) -> None:
    config = run.read_config()
    with allowed():
        checkpoint = checkpoints.open_checkpoint(newest(run))
        checkpoint.manifest.run_config()
        model = Autoencoder(config.model)
        with allowed():
            restore_weights(model, checkpoint)
        scaler = torch.amp.GradScaler("cpu", enabled=True)
        optimization.restore(checkpoint, model, optimization.build(model, config.training), scaler)
    with allowed():
        checkpoints.best(run)
    with allowed():
        explain(find(run.path.name, run.root, run.path, every=False))
        verify(find(run.path.name, run.root, run.path, every=True))
    run_status(run)


@quick
@given(data=st.data())
def test_a_checkpoints_manifest_under_its_own_seal(run: RunDirectory, data: st.DataObject):
    file = newest(run) / "checkpoint.json"
    with kept(file):
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(bytes_from(file.read_bytes())))
        else:
            value = data.draw(value_from(read_sealed(file)[0]))
            try:
                write_sealed(file, value if isinstance(value, dict) else {"value": value})
            except (ValueError, UnicodeEncodeError):  # NaN, or half a character, which JSON has not
                file.write_text(json.dumps(value))
        read_checkpoint(run)


def reseal(folder: Path, name: str) -> None:
    value, _ = read_sealed(folder / "checkpoint.json")
    value["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    write_sealed(folder / "checkpoint.json", value)


@quick
@given(data=st.data(), name=st.sampled_from(["model.safetensors", "training_state.safetensors", "training_state.json"]))
def test_a_checkpoints_files_under_their_own_digests(run: RunDirectory, data: st.DataObject, name: str):
    folder = newest(run)
    with kept(folder / name, folder / "checkpoint.json"):
        content = (folder / name).read_bytes()
        change = json_from if name.endswith(".json") else bytes_from
        (folder / name).write_bytes(data.draw(change(content)))
        reseal(folder, name)
        read_checkpoint(run)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.zeros(1)},
        {"exp_avg/x/y": torch.zeros(0)},
        {"exp_avg": torch.full((3,), math.nan)},
        {"decoder.head.weight": torch.zeros(1, dtype=torch.int64)},
    ],
)
def test_tensors_that_are_others_are_refused(run: RunDirectory, tensors: dict[str, torch.Tensor]):
    folder = newest(run)
    for name in ("model.safetensors", "training_state.safetensors"):
        with kept(folder / name, folder / "checkpoint.json"):
            (folder / name).write_bytes(save(tensors))
            reseal(folder, name)
            read_checkpoint(run)


def test_a_model_that_is_larger_than_its_files_is_never_built(run: RunDirectory):
    folder = newest(run)
    with kept(folder / "checkpoint.json"):
        value, _ = read_sealed(folder / "checkpoint.json")
        value["model"] |= {"channels": 2048, "residual_blocks": 64, "downsamplings": 6}
        write_sealed(folder / "checkpoint.json", value)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CodecmillError, match=r"says that its model has [\d,]{11,} parameters, and its files have"):
            load(checkpoints.open_checkpoint(folder))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, "kB; with all its parameters it would be 200 GB"


class _Bomb:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["classic.pt", "classic.tar", "model.safetensors"])
def test_a_pickle_that_would_run_a_command_runs_none(run: RunDirectory, tmp_path: Path, name: str):
    touched, file = tmp_path / "touched", tmp_path / name
    states = {"encoder_state_dict": _Bomb(touched), "decoder_state_dict": {}}
    for content in (pickle.dumps(states), None):
        if content is None:
            torch.save(states, file)
        else:
            file.write_bytes(content)
        with pytest.raises(CodecmillError, match=rf"{name}.* (cannot be read as plain tensors|is no intact)"):
            load_weights(Autoencoder(run.read_config().model), file)
        config = run.read_config().model_dump(mode="json")
        config["name"] = f"from-{name}-{content is None}"
        config["training"]["start_from"] = str(file)
        other = begin(RunConfig.model_validate(config))
        with pytest.raises(CodecmillError, match=name):
            train(other)
    assert not touched.exists()


READ_BY_STATUS = ["config.json", "shard_set.json", "metrics.jsonl", "mlflow_run.json", "promotion.json"]


@quick
@given(data=st.data(), name=st.sampled_from(READ_BY_STATUS))
def test_what_lies_in_a_runs_folder(run: RunDirectory, data: st.DataObject, name: str):
    file = run.path / name
    marks = {"run_id": "1", "experiment_id": "1", "tracking_uri": "sqlite:///x", "checkpoints": {"step_00000002": "a"}}
    promotion = {"alias": "champion", "version": 1, "checkpoint_sha256": "0" * 64}
    for other, value in {"mlflow_run.json": marks, "promotion.json": promotion}.items():
        (run.path / other).write_bytes(json_bytes(value))
    change = json_from if file.suffix == ".json" else bytes_from
    try:
        with kept(file):
            file.write_bytes(data.draw(change(file.read_bytes())))
            run_status(run)
            read_marks(run)
            assert all(isinstance(line["step"], int) for line in journal.read(run.journal))
            for line in read_lines(run.journal):
                assert 0 < line.step < 2**31 and 0 <= line.milliseconds < 2**53
                assert all(math.isfinite(value) for value in line.figures.values())
            with allowed(), journal.Journal(run.journal, 0) as opened:
                opened.append(1, {})
            with allowed():
                run.read_config()
            with allowed():
                ShardSet.open(run.shard_set())
    finally:
        for other in ("mlflow_run.json", "promotion.json"):
            (run.path / other).unlink()


@quick
@given(data=st.data())
def test_an_evaluation(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "hostile-evaluation"
    folder.mkdir(exist_ok=True)
    images = tuple(ImageRow(name, 40, 30, psnr, None, name) for name, psnr in (("a", 20.0), ("b", 30.0)))
    whole = Evaluation(folder, {"run": "r", "step": 2}, 10, 0.5, images, (Broken("c", "cut"),))
    for name in (REPORT, TABLE):
        (folder / name).touch()
    (folder / RESULT).unlink(missing_ok=True)
    holds = contents_of(folder).model_dump() | {"made": 1.8e9}
    (folder / RESULT).write_bytes(data.draw(json_from(json_bytes(whole.as_json() | holds))))
    with allowed():
        check_contents(folder, read_contents(folder))
    assert made_at(folder) >= 0
    found = read_evaluation(folder)
    if found:
        assert 0 <= found.step < 2**31 and "PSNR" in summary(found)


LINES = [
    "",
    "- 1",
    "name: x",
    "training:",
    "  steps: 5",
    "a: &a [*a]",
    "? x",
    "!!python/object:os.system",
    "!!binary x",
]
LINES += ["seed: 1e999", "seed: 2026-13-45", "\t", "'", "<<: *b", "name: \ud800", "training: {steps: [[[[]]]]}"]
LINES += ['data: {images: "\\0"}', "x: " + "[" * 3000, "&a x: *a", "seed: 0x" + "f" * 400]
YAML = st.sampled_from(LINES)


@quick
@given(lines=st.lists(YAML | st.text(max_size=20), max_size=6), raw=st.none() | st.binary(max_size=40))
def test_a_config_file(tmp_path_factory: pytest.TempPathFactory, lines: list[str], raw: bytes | None):
    file = tmp_path_factory.getbasetemp() / "hostile.yaml"
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") if raw is None else raw)
    with allowed():
        effective_config(file, {})


@settings(quick, max_examples=300)
@given(data=st.data())
def test_a_config_that_was_valid(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """A whole config of ours, changed somewhere; what is still accepted can be printed and read again."""
    file = tmp_path_factory.getbasetemp() / "once-valid.yaml"
    normalization = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 2]}
    given = {"name": "x-{date}", "data": {"images": "a/*.png", "normalization": normalization}}
    whole = as_yaml(RunConfig.model_validate(given)).encode()
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(bytes_from(whole)))
    else:
        file.write_text(yaml.safe_dump(data.draw(value_from(yaml.safe_load(whole)))))
    with allowed():
        config = effective_config(file, {})
        file.write_text(as_yaml(config))
        assert effective_config(file, {}) == config


@pytest.mark.parametrize(
    "content",
    [
        "name: !!python/object/apply:os.system ['touch executed']",
        "!!python/object/apply:subprocess.run [[touch, executed]]",
        "data: !!python/object/new:os.system ['touch executed']",
        "training: {steps: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [executed]]}",
    ],
)
def test_a_config_that_would_run_a_command_runs_none(tmp_path: Path, content: str):
    (tmp_path / "c.yaml").write_text(content)
    said = refused("run", "--config", "c.yaml", cwd=tmp_path)
    problem = r"could not determine a constructor for the tag 'tag:yaml\.org,2002:python/object/\S+"
    assert re.fullmatch(rf"codecmill: The config c\.yaml is no valid YAML: line 1: {problem}\n", said)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_config_of_a_billion_laughs_is_read_in_an_instant(tmp_path: Path):
    file = tmp_path / "laughs.yaml"
    lines = ["a0: &a0 [ha, ha]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    file.write_text("\n".join([*lines, "name: *a11"]))
    with pytest.raises(CodecmillError, match="name"):
        effective_config(file, {})


def test_the_seal_is_what_these_tests_mean_it_to_be(tmp_path: Path):
    """A changed value is read only where the seal was made anew, which is what an attacker would do."""
    file = tmp_path / "sealed.json"
    write_sealed(file, {"a": 1})
    content = file.read_bytes()
    assert (
        hashlib.sha256(content.replace(json.loads(content)[SEAL].encode(), b"0" * 64)).hexdigest().encode() in content
    )
    file.write_bytes(content.replace(b'"a": 1', b'"a": 2'))
    with pytest.raises(CodecmillError, match="its seal is not the sha256"):
        read_sealed(file)
