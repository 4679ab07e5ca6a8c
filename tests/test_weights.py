"""Loading weights: strict and lenient, from a checkpoint, a safetensors file and the classic torch file."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import save
from test_codec import codec_of_kind

from pipelines.config import ModelConfig
from pipelines.errors import CodecmillError, InputError
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.build import build_model
from pipelines.run_directory import Root
from pipelines.stored_tensors import of_file
from pipelines.weights import apply_weights, export_classic, load_weights, read_weights

SMALL = ModelConfig(channels=8, latent_channels=4, downsamplings=2, residual_blocks=1)
DEEPER = SMALL.model_copy(update={"residual_blocks": 2})
WIDER = SMALL.model_copy(update={"latent_channels": 6})


def classic_file(model: Autoencoder, path: Path) -> Path:
    """The file as a plain torch script would write it."""
    torch.save(
        {
            "epoch": 3,
            "encoder_state_dict": model.encoder.state_dict(),
            "decoder_state_dict": model.decoder.state_dict(),
        },
        path,
    )
    return path


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_classic_file_loads_strict_into_its_model(tmp_path: Path):
    trained, fresh = Autoencoder(SMALL, seed=1), Autoencoder(SMALL, seed=2)
    assert not same_weights(trained, fresh)
    report = load_weights(fresh, classic_file(trained, tmp_path / "latest_checkpoint.tar"))
    assert same_weights(trained, fresh)
    assert set(report.loaded) == set(fresh.state_dict())
    assert report.differences() == ""


@pytest.mark.parametrize("kind", ["nested", "checkerboard", "factorized"])
def test_an_exported_codec_is_read_back_strict_and_whole(tmp_path: Path, kind: str):
    trained = codec_of_kind(kind).model
    checkpoint = save(Root(tmp_path).run("codec"), 7, weights=trained.state_dict())
    export_classic(checkpoint, tmp_path / "model.pt")
    fresh = build_model(trained.config, seed=2)
    assert not same_weights(trained, fresh)
    report = load_weights(fresh, tmp_path / "model.pt")
    assert same_weights(trained, fresh)
    assert set(report.loaded) == set(trained.state_dict())


def test_what_else_a_classic_file_holds_of_a_training_is_ignored(tmp_path: Path):
    trained, fresh = Autoencoder(SMALL, seed=1), Autoencoder(SMALL, seed=2)
    states = torch.load(classic_file(trained, tmp_path / "model.pt"), weights_only=True)
    optimizer = torch.optim.Adam(trained.parameters()).state_dict()
    torch.save(states | {"optimizer_state_dict": optimizer, "quantizer_state_dict": None}, tmp_path / "model.pt")
    load_weights(fresh, tmp_path / "model.pt")
    assert same_weights(trained, fresh)


@pytest.mark.parametrize(("place", "reason"), [("folder", "Is a directory"), ("file/model.pt", "a file is in its way")])
def test_a_file_that_cannot_be_exported_is_named_and_nothing_is_left(tmp_path: Path, place: str, reason: str):
    checkpoint = save(Root(tmp_path).run("small"), 7)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=rf"{place} cannot be written: {reason}\. Name another place with -o\."):
        export_classic(checkpoint, tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_strict_lists_what_is_missing_unexpected_and_mismatched(tmp_path: Path):
    file = classic_file(Autoencoder(DEEPER), tmp_path / "latest_checkpoint.tar")
    model = Autoencoder(WIDER, seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CodecmillError) as error:
        load_weights(model, file)
    text = str(error.value)
    assert "unexpected: decoder.stages.0.blocks.1.first.bias" in text
    assert "mismatched: decoder.head.weight [8, 4, 3, 3] for [8, 6, 3, 3]" in text
    assert "--training.strict false" in text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_lenient_takes_what_fits_by_name_and_shape_and_leaves_the_rest(tmp_path: Path):
    trained = Autoencoder(SMALL, seed=1)
    deeper = Autoencoder(DEEPER.model_copy(update={"latent_channels": 6}), seed=2)
    before = {name: tensor.clone() for name, tensor in deeper.state_dict().items()}
    report = load_weights(deeper, classic_file(trained, tmp_path / "latest_checkpoint.tar"), strict=False)
    after, source = deeper.state_dict(), trained.state_dict()
    assert all(torch.equal(after[name], source[name]) for name in report.loaded)
    untouched = [*report.missing, *(line.split(" ")[0] for line in report.mismatched)]
    assert all(torch.equal(after[name], before[name]) for name in untouched)
    assert set(report.loaded) | set(untouched) == set(after)
    assert "encoder.stages.0.blocks.1.first.weight" in report.missing
    assert "decoder.head.weight [8, 4, 3, 3] for [8, 6, 3, 3]" in report.mismatched


@pytest.mark.parametrize(("dtype", "called"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_of_weights_in_half_precision_all_is_taken_but_what_counts(
    tmp_path: Path, dtype: torch.dtype, called: str
) -> None:
    """A codec's tables are integers of up to 2^24, which half of the digits make other tables of."""
    trained, file = codec_of_kind("factorized").model, tmp_path / "half.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in trained.state_dict().items()}, file)
    fresh = build_model(trained.config)
    with pytest.raises(CodecmillError, match=rf"do not match the model \(mismatched: tables {called} for int32\)"):
        load_weights(fresh, file)
    for weights in (read_weights(file), of_file(file)):
        report = apply_weights(fresh, weights, strict=False, source="half")
        assert report.mismatched == (f"tables {called} for int32",)
        assert set(report.loaded) == set(trained.state_dict()) - {"tables"}
    for name, tensor in fresh.state_dict().items():
        expected = trained.state_dict()[name]
        assert torch.equal(tensor, expected if name == "tables" else expected.to(dtype).float())


def test_a_lenient_load_that_takes_nothing_is_an_error(tmp_path: Path):
    save_file({"foreign.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CodecmillError, match=r"Nothing in .*foreign.safetensors fits the model"):
        load_weights(Autoencoder(SMALL), tmp_path / "foreign.safetensors", strict=False)


def test_lenient_load_of_a_deeper_model_keeps_the_function(tmp_path: Path):
    trained, deeper = Autoencoder(SMALL, seed=1).eval(), Autoencoder(DEEPER, seed=2).eval()
    load_weights(deeper, classic_file(trained, tmp_path / "latest_checkpoint.tar"), strict=False)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trained(x).image, deeper(x).image)  # a new residual block starts as the identity


class Malicious:
    """Unpickles to a command that leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_would_run_a_command_is_refused_and_nothing_runs(tmp_path: Path):
    mark = tmp_path / "executed"
    torch.save({"encoder_state_dict": {}, "decoder_state_dict": {}, "x": Malicious(mark)}, tmp_path / "evil.tar")
    with pytest.raises(CodecmillError, match="cannot be read as plain tensors, and nothing else is ever loaded"):
        load_weights(Autoencoder(SMALL), tmp_path / "evil.tar", strict=False)
    assert not mark.exists()


def test_tensors_that_repeat_a_few_numbers_for_ever_are_refused(tmp_path: Path):
    file, states = tmp_path / "small.pt", {"encoder_state_dict": {}, "decoder_state_dict": {}}
    torch.save(states | {"encoder_state_dict": {"w": torch.zeros(1).expand(2**34)}}, file)
    with pytest.raises(
        CodecmillError, match=r"small\.pt has \d,\d+ bytes, but its tensors claim to have 68,719,476,736"
    ):
        load_weights(Autoencoder(SMALL), file)
    tied = torch.ones(2**10)
    torch.save(states | {"encoder_state_dict": {"a": tied, "b": tied, "c": tied.view(2, -1)}}, file)
    assert {name: tensor.numel() for name, tensor in read_weights(file).items()} == dict.fromkeys(
        ("encoder.a", "encoder.b", "encoder.c"), 2**10
    )


@pytest.mark.parametrize("how", ["compressed", "overlapping"])
def test_a_torch_file_that_holds_more_than_its_size_is_not_read(tmp_path: Path, how: str):
    """torch itself would read it, however much memory it takes."""
    plain, file = tmp_path / "plain.pt", tmp_path / "large.pt"
    torch.save({"encoder_state_dict": {"w": torch.zeros(2**16)}, "decoder_state_dict": {}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w") as target:
        for part in source.infolist():
            kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
            target.writestr(part.filename, source.read(part), kind)
        if how == "overlapping":
            target.filelist += [part for part in target.filelist if part.file_size > 2**16] * 2
    assert torch.load(file, weights_only=True)["encoder_state_dict"]["w"].numel() == 2**16
    with pytest.raises(
        CodecmillError, match=r"large\.pt cannot be read as plain tensors.*: its parts have [\d,]+ bytes, and"
    ):
        load_weights(Autoencoder(SMALL), file)


def test_a_name_that_no_file_can_hold_is_refused(tmp_path: Path):
    torch.save({"encoder_state_dict": {"\ud800": torch.zeros(1)}, "decoder_state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(CodecmillError, match=r"x\.pt holds something that is no plain tensor .*: encoder\.\\ud800\."):
        load_weights(Autoencoder(SMALL), tmp_path / "x.pt", strict=False)


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**47, 2**47, 0]])
@pytest.mark.parametrize("read", [read_weights, of_file])
def test_a_tensor_of_a_shape_that_none_has_is_refused(tmp_path: Path, shape: list[int], read: Callable[[Path], object]):
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CodecmillError, match=r"x\.safetensors holds something that is no plain tensor of numbers: w\."):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04", b"\x80\x02."])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_bytes_that_are_no_checkpoint_are_one_clear_error(tmp_path: Path, content: bytes, name: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CodecmillError, match=name):
        load_weights(Autoencoder(SMALL), tmp_path / name)


@pytest.mark.parametrize(
    "content", [{}, {"encoder_state_dict": {}}, {"encoder_state_dict": 1, "decoder_state_dict": 2}, [1, 2]]
)
def test_a_torch_file_of_another_make_is_told_apart(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CodecmillError, match="no dictionary with encoder_state_dict and decoder_state_dict"):
        load_weights(Autoencoder(SMALL), tmp_path / "other.pt")


def test_a_missing_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"There are no weights at .*nowhere\.pt"):
        load_weights(Autoencoder(SMALL), tmp_path / "nowhere.pt")
