"""Real gloo ranks: sums that agree, and the proof that replicas are identical."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make
from processes import descendants, listening_on, wait_for
from safetensors.torch import load_file
from trainings import begin, ranks_alive, start, steps_done, train

from pipelines import checkpoint_format, checkpoints
from pipelines.model.build import build_model
from pipelines.run_directory import RunDirectory
from pipelines.training.distributed import digest
from pipelines.training.journal import read
from pipelines.training.machine import take_own_cores

PROLOGUE = """
import os, sys
import torch
from pipelines.training.distributed import check_replicas, process_group
torch.set_num_threads(1)
def say(text):
    with open(f"{os.path.dirname(__file__)}/said_by_{ranks.rank}", "a") as file:
        file.write(f"{ranks.rank} {text}\\n")
with process_group("cpu") as ranks:
"""


def run_ranks(tmp_path: Path, world_size: int, body: str) -> list[str]:
    """Run `body` on real ranks; returns what each says, in the order of the ranks."""
    script = tmp_path / "ranks.py"
    lines = [f"    {line}\n" for line in body.strip().splitlines()]
    script.write_text(PROLOGUE + "".join(lines) + "os._exit(0)  # as the worker ends, and for its reason\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*command, str(script)],
        cwd=Path(__file__).parent.parent,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [line for file in sorted(tmp_path.glob("said_by_*")) for line in file.read_text().splitlines()]


def test_what_is_gathered_is_exact_and_the_same_on_every_rank(tmp_path: Path):
    body = """
places = list(range(ranks.rank, 7, 3))
columns = [[(place + 1) / 3 for place in places], [2.0**47 + 1] * len(places)]
say(ranks.gather(places, torch.tensor(columns, dtype=torch.float64), 7))
"""
    said = run_ranks(tmp_path, 3, body)
    expected = [[(place + 1) / 3 for place in range(7)], [2.0**47 + 1] * 7]
    assert said == [f"{rank} {expected}" for rank in range(3)]


def test_what_the_first_says_and_what_each_says_is_known_to_all(tmp_path: Path):
    body = """
say(ranks.told_by_first([2.0**47 + 1, -1 / 3, float("inf")] if ranks.is_first else [0.0, 7.0, float("nan")]))
say(ranks.told_by_each([ranks.rank / 3, -0.0]))
"""
    said = run_ranks(tmp_path, 3, body)
    first, each = [2.0**47 + 1, -1 / 3, float("inf")], [[0.0, 1 / 3, 2 / 3], [-0.0] * 3]
    assert said == [f"{rank} {what}" for rank in range(3) for what in (first, each)]


def test_equal_replicas_pass_and_one_different_bit_is_named(tmp_path: Path):
    said = run_ranks(
        tmp_path,
        2,
        """
generator = torch.Generator().manual_seed(0)
tensors = {"encoder.weight": torch.randn(7, 5, generator=generator), "decoder.bias": torch.zeros(3)}
check_replicas(tensors, 1)
if ranks.rank == 1:
    tensors["decoder.bias"].view(torch.int32)[2] ^= 1
try:
    check_replicas(tensors, 2)
except Exception as error:
    say(error)
""",
    )
    text = "The ranks no longer hold the same model after step 2: 'decoder.bias' differs."
    assert [line[: len(text) + 2] for line in said] == [f"0 {text}", f"1 {text}"]


def test_ranks_that_hold_nothing_alike_have_nothing_to_differ_in(tmp_path: Path):
    """As where weights are shared out and no step was taken."""
    assert run_ranks(tmp_path, 2, "check_replicas({}, 1)\nsay('alike')") == ["0 alike", "1 alike"]


def trained(directory: RunDirectory, spoil: str) -> str:
    """What a rank does that trains a run, once something was done to its `state`."""
    return f"""
from contextlib import nullcontext
from pathlib import Path
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.run_directory import RunDirectory
from pipelines.training.preparation import prepare
from pipelines.training.journal import Journal
directory = RunDirectory(Path({str(directory.path)!r}))
shard_set = ShardSet.open(Path(read_json(directory.shard_set_file)["path"]))
state = prepare(directory, directory.read_config(), shard_set, ranks)
{spoil}try:
    with Journal(directory.journal) if ranks.is_first else nullcontext() as journal:
        state.run(lambda: False, journal)
except Exception as error:
    say(f"{{type(error).__name__}}: {{error}}")
"""


def test_a_training_stops_at_one_different_weight_before_it_is_saved(tmp_path: Path, tiny: dict[str, Any]):
    # A check and a checkpoint are due at the same step: the check must come first.
    directory = begin(make(tiny, training={"processes": 2, "replica_check_interval": 3, "checkpoint_interval": 3}))
    spoil = """
if ranks.rank == 1:  # so much that the steps do not round it away
    state.model.decoder.head.weight.detach()[0, 0, 0, 0] += 0.25
"""
    said = run_ranks(tmp_path, 2, trained(directory, spoil))
    text = "CodecmillError: The ranks no longer hold the same model after step 3: 'model.decoder.head.weight' differs"
    assert [line[: len(text) + 2] for line in said] == [f"0 {text}", f"1 {text}"]
    assert [line["step"] for line in read(directory.journal)] == [1, 2]
    assert checkpoints.steps_on_disk(directory) == []


def test_a_training_stops_at_one_different_moment_before_it_is_saved(tmp_path: Path, tiny: dict[str, Any]):
    """What a rank's weights do not show yet: the first rank's moments are what a checkpoint holds."""
    directory = begin(make(tiny, training={"processes": 2, "replica_check_interval": 3, "checkpoint_interval": 3}))
    spoil = """
def spoil(optimizer, *_):
    if state.step + 1 == 3 and ranks.rank == 1:
        optimizer.state[state.model.decoder.head.weight]["exp_avg"][0, 0, 0, 0] += 0.25
state.optimizer.register_step_post_hook(spoil)
"""
    said = run_ranks(tmp_path, 2, trained(directory, spoil))
    text = "CodecmillError: The ranks no longer hold the same model after step 3: 'exp_avg/"
    assert [line[: len(text) + 2] for line in said] == [f"0 {text}", f"1 {text}"]
    assert checkpoints.steps_on_disk(directory) == []


QUANTISERS: dict[str, dict[str, Any]] = {
    "vq": {"quantizer": "vq", "codes": 8, "code_channels": 2},
    "vq by the loss": {"quantizer": "vq", "codes": 8, "code_channels": 2, "codebook_decay": None},
    "gumbel": {"quantizer": "gumbel", "codes": 8, "code_channels": 2},
    "lfq": {"quantizer": "lfq"},
    "fsq": {"quantizer": "fsq", "levels": 5},
    "soft_to_hard": {"quantizer": "soft_to_hard", "levels": 5, "final_sigma": 8.0},
    "binarizer": {"quantizer": "binarizer"},
    "universal": {"quantizer": "universal"},
}


# Trains runs one after the other on the same ranks: to start those takes longest.
ONE_AFTER_THE_OTHER = """
from contextlib import nullcontext
from pathlib import Path
from pipelines.data.shard_set import ShardSet
from pipelines.run_directory import RunDirectory
from pipelines.training.agreement import Stop
from pipelines.training.journal import Journal
from pipelines.training.preparation import prepare
for folder in FOLDERS:
    print(folder, file=sys.stderr, flush=True)
    directory = RunDirectory(Path(folder))
    shard_set = ShardSet.open(directory.shard_set())
    state = prepare(directory, directory.read_config(), shard_set, ranks)
    with Journal(directory.journal) if ranks.is_first else nullcontext() as journal:
        state.run(lambda: Stop.NO, journal)
"""


def of_quantiser(tiny: dict[str, Any], name: str, processes: int) -> RunDirectory:
    training = {"processes": processes, "steps": 6, "replica_check_interval": 1, "precision": "float64"}
    return begin(make(tiny, name=f"{name.replace(' ', '-')}-on-{processes}", model=QUANTISERS[name], training=training))


def check_learned_alike(one: RunDirectory, two: RunDirectory) -> None:
    """Both learned, and the same; what is no parameter stayed as it was."""
    weights = []
    for directory in (one, two):
        assert [line["step"] for line in read(directory.journal)] == list(range(1, 7))
        weights.append(load_file(checkpoints.folder_of(directory, 6) / checkpoint_format.WEIGHTS))
    config = one.read_config()
    start = build_model(config.model, config.seed).double().state_dict()
    stays = (".statistics", ".total") if config.model.codebook_decay is None else (".statistics",)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-9, atol=1e-9, msg=f"{one.path.name}: {key}")
        assert torch.equal(value, start[key]) == key.endswith(stays), f"{one.path.name}: {key}"


def test_a_codebook_trains_on_two_ranks_as_on_one(tiny: dict[str, Any]):
    """Plainly data-parallel; that both ranks hold the same bits is proved after each step, or the training fails."""
    one, two = (of_quantiser(tiny, "vq", processes) for processes in (1, 2))
    for directory in (one, two):
        train(directory)
    check_learned_alike(one, two)


@pytest.mark.full
def test_every_other_quantiser_trains_on_two_ranks_as_on_one(tiny: dict[str, Any], tmp_path: Path):
    others = [name for name in QUANTISERS if name != "vq"]
    trained = {}
    for processes in (1, 2):
        (folder := tmp_path / str(processes)).mkdir()
        trained[processes] = [of_quantiser(tiny, name, processes) for name in others]
        paths = [str(directory.path) for directory in trained[processes]]
        run_ranks(folder, processes, ONE_AFTER_THE_OTHER.replace("FOLDERS", repr(paths)))
    for one, two in zip(trained[1], trained[2], strict=True):
        check_learned_alike(one, two)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_single_bit_changes_the_digest(dtype: torch.dtype):
    tensor = torch.randint(0, 2, (5, 3)).to(dtype)
    before = digest(tensor)
    as_bytes = tensor.view(torch.uint8).reshape(-1)
    bits = 1 if dtype == torch.bool else 8
    for place in range(as_bytes.numel()):
        for bit in range(bits):
            as_bytes[place] ^= 1 << bit
            assert digest(tensor) != before
            as_bytes[place] ^= 1 << bit
    assert digest(tensor) == before


def test_swapped_elements_change_the_digest():
    assert digest(torch.tensor([1.0, 2.0, 3.0])) != digest(torch.tensor([1.0, 3.0, 2.0]))


def test_minus_zero_and_another_nan_are_other_bits():
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)
    assert digest(quiet) != digest(other)


def test_the_memory_layout_does_not_matter():
    tensor = torch.randn(2, 3, 4, 5)
    assert digest(tensor) == digest(tensor.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (0, 1), (0, 3)])
def test_ranks_share_out_the_cores_that_they_can_share(rank: int, ranks: int):
    cores = sorted(os.sched_getaffinity(0))
    if ranks > 1 and len(cores) % ranks == 0:
        expected = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]
    else:
        expected = cores
    with ThreadPoolExecutor(1) as alone:  # what a thread may run on is its own: no other's changes
        found = alone.submit(lambda: (take_own_cores(rank, ranks), sorted(os.sched_getaffinity(0)))[1]).result()
    assert found == expected
    assert sorted(os.sched_getaffinity(0)) == cores


def test_agent_and_ranks_listen_on_this_machine_alone(tiny: dict[str, Any]):
    """torchrun's own rendezvous listens everywhere and unpickles what anybody writes there."""
    directory = begin(make(tiny, training={"processes": 2, "steps": 100_000}))
    process = start(directory)
    try:
        wait_for(lambda: steps_done(directory) >= 2)
        found = listening_on(descendants(process.pid))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not ranks_alive(directory))
    assert len(found) >= 3
    assert set(found) == {"0100007F"}, "127.0.0.1"
