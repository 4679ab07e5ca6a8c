"""The audit: it passes whatever interruptions there were, and finds each read that was not what it should be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from object_store import Proxy, the_store
from processes import PROJECT, clean_environment
from test_distributed import run_ranks
from trainings import begin, beginnings, train, train_and_kill

from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.provenance.audit import audit
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import start_or_continue
from pipelines.storage.bringing import bring
from pipelines.storage.sending import Sending


def audited(directory: RunDirectory, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows", "audit", directory.path.name, "--root", str(directory.root.path), *flags]
    return subprocess.run(command, cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=60)


@pytest.fixture
def trained(tiny: dict[str, Any]) -> RunDirectory:
    directory = begin(make(tiny))
    train(directory)
    return directory


def test_a_run_that_was_killed_and_changed_its_ranks_passes(tiny: dict[str, Any]):
    training = {"steps": 90, "checkpoint_interval": 7, "processes": 2}
    directory = begin(make(tiny, training=training))
    assert train_and_kill(directory, 40) < 90
    start_or_continue(make(tiny, training=training | {"processes": 3}))
    train(directory)
    first, second = beginnings(directory)
    assert (first, second % 7) == (0, 0)
    assert second >= 35, "both numbers of ranks have trained some steps"
    found = audit(directory)
    patches = read_json(next(directory.root.shards.glob("*/manifest.json")))["samples"]["train"]
    assert (found.steps, found.samples, found.faults) == (90, patches, ())
    assert divmod(90 * 4, patches) == (found.epochs, found.rest)
    assert found.attempts == 2
    said = audited(directory)
    assert said.returncode == 0, said.stderr
    assert "each of its 90 steps, in 2 starts, read the samples that the order gives it" in said.stdout


# One sample of one step is read from the place beside its own.
DOCTORED = """
from pathlib import Path
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import read_json
from pipelines.run_directory import RunDirectory
from pipelines.training.journal import Journal
from pipelines.training.preparation import prepare
directory = RunDirectory(Path(FOLDER))
shard_set = ShardSet.open(Path(read_json(directory.shard_set_file)["path"]))
read, reads = ShardSet.read, []
def doctored(self, split, shard, index, raw):
    reads.append(split)
    if split == "train" and reads.count("train") == 4 * 4 + 2:
        index = index - 1 if index else 1
    return read(self, split, shard, index)
ShardSet.read = doctored
state = prepare(directory, directory.read_config(), shard_set, ranks)
with Journal(directory.journal) as journal:
    state.run(lambda: False, journal)
"""


def test_one_doctored_read_is_found(tiny: dict[str, Any], tmp_path: Path):
    directory = begin(make(tiny))
    run_ranks(tmp_path, 1, DOCTORED.replace("FOLDER", repr(str(directory.path))))
    assert audit(directory).faults == (
        f"Step 5 did not read the samples that it should have, says {directory.journal}.",
    )
    said = audited(directory, "--json")
    assert said.returncode == 1
    assert len(json.loads(said.stdout)["faults"]) == 1
    assert "The audit of 'tiny' found 1 faults." in said.stderr


def test_what_was_altered_afterwards_is_found(trained: RunDirectory):
    assert audit(trained).faults == ()
    journal = trained.journal.read_bytes()
    lines = journal.splitlines(keepends=True)
    trained.journal.write_bytes(b"".join(lines[:3] + lines[4:]))
    assert audit(trained).faults == (f"{trained.journal} has no step 4.",)
    trained.journal.write_bytes(journal + lines[6])
    assert audit(trained).faults == (f"{trained.journal} has step 7 twice.",)
    trained.journal.write_bytes(journal)
    tar = next(trained.root.shards.glob("*/train-000000.tar"))
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert [fault for fault in audit(trained).faults if str(tar) in fault]


def test_a_run_whose_shards_lie_in_a_store_is_audited_where_only_some_of_them_are(
    trained: RunDirectory, tmp_path: Path, proxy: Proxy
):
    Sending(trained, the_store()).send()
    there = Root(tmp_path / "elsewhere").run("tiny")
    with there.locked():
        bring(there, the_store())
    assert not list(there.shard_set().glob("*.tar"))
    assert audit(there).faults == ()
    for file in there.shard_set().glob("train-*.index"):
        file.unlink()
    assert audit(there).faults == (), "fetched in part"
    row = ShardSet.open(there.shard_set()).rows("train")[0]
    for name, _, _ in row.files():
        shutil.copyfile(trained.shard_set() / name, there.shard_set() / name)
    (tar := there.shard_set() / row.tar).write_bytes(bytes(row.bytes))
    assert [fault for fault in audit(there).faults if str(tar) in fault], "what is here is verified"
