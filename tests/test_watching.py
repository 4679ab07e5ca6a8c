"""New images are added to the shard set, and learnt from, on from the champion, once there are enough of them."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make, picture
from object_store import Proxy, the_store
from processes import PROJECT, clean_environment, wait_for
from test_checkpoints import save
from trainings import beginnings, ranks_alive, steps_done

from flows.cli.prefect_server import start_server
from flows.cli.services import free_port
from pipelines import checkpoints, storage, tracking
from pipelines.config import RunConfig
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.durable_files import read_json, write_json
from pipelines.errors import InputError
from pipelines.promotion import Scores
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import start_or_continue
from pipelines.storage import StoreUnavailable, patience
from pipelines.tracking import Version
from pipelines.training.machine import resolve
from pipelines.watching import cut_off, new_images, runs_at_work
from tasks.watching import must_be_another_run

WATCH = """
import sys
from flows.watching import watch
from pipelines.config import RunConfig

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        summary = watch(RunConfig.model_validate_json(file.read()), enough=3)
    print(summary.model_dump_json() if summary else "null")
"""


LOOKS = """
import sys
from pathlib import Path
from flows.watching import watch
from pipelines.config import RunConfig

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        config = RunConfig.model_validate_json(file.read())
    for line in sys.stdin:
        root, enough = line.split()
        found = watch(config.model_copy(update={"root": Path(root)}), enough=int(enough))
        print("LOOKED", found.run if found else "", flush=True)
"""


class Watcher:
    """Looks again and again, in one process: most of what a look takes is the start of Prefect's server."""

    def __init__(self, config: RunConfig, tmp_path: Path):
        (file := tmp_path / "watched.json").write_text(config.model_dump_json())
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOKS, str(file)],
            cwd=PROJECT,
            env=clean_environment()
            | {"PREFECT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": tracking.tracking_uri(Root(config.root))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def look(self, root: Path, enough: int) -> RunDirectory | None:
        """The run that was trained, if one was, under a root."""
        assert self.process.stdin and self.process.stdout
        print(root, enough, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("LOOKED"):
                run = line.removeprefix("LOOKED").strip()
                return RunDirectory(Path(run)) if run else None
        raise AssertionError("the look failed")

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=120)  # whose end of input ends it, and Prefect's server with it


def tars(root: Root) -> dict[str, int]:
    """The shards of the newest set, with their inodes."""
    newest = max(root.shards.glob("[0-9a-f]*/manifest.json"), key=lambda file: file.stat().st_mtime_ns)
    return {tar.name: tar.stat().st_ino for tar in newest.parent.glob("*.tar")}


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("used_root")
def test_new_objects_at_a_prefix_are_fetched_alone_and_start_a_fine_tuning_once_there_are_enough(
    tiny: dict[str, Any], proxy: Proxy, tmp_path: Path
):
    def add(number: int) -> None:
        picture(number, 256, 192).save(tmp_path / "new.png")
        the_store().send(tmp_path / "new.png", f"growing/{number:02d}.png")

    for number in range(32):
        add(number)
    data = {"images": f"{storage.store_url()}/growing", "max_shard_mib": 1, "patch_size": 64}
    config = make(tiny, name="tuned-{id}", data=data, evaluation={"promotion_margin": 90})
    root = Root(Path(tiny["root"]))
    with Watcher(config, tmp_path) as watcher:
        first = watcher.look(root.path, 32)
        assert first is not None, "without a champion all images are new"
        before = tars(root)
        assert len(before) >= 6

        add(32)
        proxy.requests.clear()
        assert watcher.look(root.path, 2) is None, "one is too few"
        assert proxy.count("GET", "/growing/") == proxy.count("GET", "/growing/32.png") == 1
        after = tars(root)
        assert sum(inode not in before.values() for inode in after.values()) == 1
        assert len(after) == len(before)

        elsewhere = Root(tmp_path / "elsewhere")
        assert watcher.look(elsewhere.path, 2) is None, "what the champion knows, the store knows"

        add(33)
        tuned = watcher.look(root.path, 2)
        assert watcher.look(root.path, 2) is None, "the same training would fail to beat the champion the same way"
    assert tuned is not None
    assert tuned.read_config().training.start_from == "models:/codecmill@champion"
    report = read_json(tuned.start_weights / "load_report.json")
    assert report["loaded"] and not report["missing"]
    assert [read_json(run.promotion_file)["alias"] for run in (first, tuned)] == ["champion", "candidate"]
    last = checkpoints.latest(tuned)
    assert last is not None
    assert last.manifest.parent == read_json(first.promotion_file)["checkpoint_sha256"]
    assert the_store().find(f"runs/{tuned.path.name}/promotion.json") is not None


@pytest.fixture
def grown(tiny: dict[str, Any], photos: Path, tmp_path: Path) -> tuple[ShardSet, ShardSet, ShardSet]:
    """The shard sets of a folder of pictures, before and after each of two was added."""
    images = tmp_path / "growing"
    shutil.copytree(photos, images)

    def made(number: int) -> ShardSet:
        picture(50 + number, 96, 96).save(images / f"new {number}.png")
        return create_shards(make(tiny, data={"images": str(images)}))

    return made(0), made(1), made(2)


@pytest.fixture
def registered(tiny: dict[str, Any]) -> Callable[..., Version]:
    """Makes what the disk has of a registered run, and the version that it is."""
    root = Root(Path(tiny["root"]))

    def make_registered(name: str, shard_set: ShardSet, parent: Version | None) -> Version:
        run = root.run(name)
        run.write_config(make(tiny, name=name))
        sha256 = parent and parent.checkpoint_sha256
        made = save(run, 12, value=len(root.all_runs()), shard_set=shard_set.fingerprint, parent=sha256)
        write_json(run.promotion_file, {"version": 1})
        return Version(1, "", name, "", 12, shard_set.fingerprint, made.sha256, Scores(1, {}, ""), {})

    return make_registered


def fail(warning: str) -> None:
    raise AssertionError(warning)


def test_what_a_model_that_did_not_beat_the_champion_has_seen_starts_no_other_training(
    grown: tuple[ShardSet, ShardSet, ShardSet], registered: Callable[..., Version], tiny: dict[str, Any]
):
    before, between, after = grown
    root = Root(Path(tiny["root"]))
    assert new_images(before, root, None, fail) == 13
    champion = registered("first", before, None)
    assert new_images(between, root, champion, fail) == 1
    registered("from-nothing", between, None)
    assert new_images(between, root, champion, fail) == 1, "to what went on from the champion it is new still"
    tuned = registered("tuned", between, champion)
    assert new_images(between, root, champion, fail) == 0
    assert new_images(after, root, champion, fail) == 1
    assert new_images(after, root, None, fail) == 1, "with no champion, what began with none counts"
    assert new_images(after, root, tuned, fail) == 1
    root.run("tuned").promotion_file.unlink()
    assert new_images(between, root, champion, fail) == 1, "one that has not ended says nothing yet"


def test_a_look_sees_who_is_at_work_and_that_its_run_is_another_one(
    grown: tuple[ShardSet, ShardSet, ShardSet], registered: Callable[..., Version], tiny: dict[str, Any]
):
    root = Root(Path(tiny["root"]))
    registered("first", grown[0], None)
    assert runs_at_work(root) == ()
    with root.run("first").locked():
        assert runs_at_work(root) == ("first",)
    must_be_another_run(make(tiny, name="second"))
    must_be_another_run(make(tiny, name="first-{date}"))
    with pytest.raises(InputError, match=r"'first' is done.*name: first-\{date\}-\{time\}$"):
        must_be_another_run(make(tiny, name="first"))


def test_a_look_finds_the_training_of_an_earlier_one_that_was_cut_off(
    grown: tuple[ShardSet, ShardSet, ShardSet], registered: Callable[..., Version], tiny: dict[str, Any]
):
    root = Root(Path(tiny["root"]))
    champion = registered("first", grown[0], None)
    training = {"steps": 40, "start_from": "models:/codecmill@champion"}

    def interrupted(name: str, step: int, parent: Version | None) -> RunDirectory:
        run = root.run(name)
        run.write_config(resolve(make(tiny, name=name, training=training)))
        save(run, step, parent=parent and parent.checkpoint_sha256)
        return run

    look = make(tiny, name="tuned-{date}", training={"steps": 40, "checkpoint_interval": 7})
    interrupted("tuned", 20, champion)
    interrupted("tuned-by-nobody", 20, None)
    (begun := root.run("tuned-0")).write_config(make(tiny, name="tuned-0", training=training))
    assert cut_off(look, root, champion) is None, "by hand, from another champion, without a checkpoint"
    far, near = interrupted("tuned-2026-11-01", 20, champion), interrupted("tuned-2026-11-02", 10, champion)
    found = cut_off(look, root, champion)
    assert found and found.name == far.path.name
    assert found.training.start_from == "models:/codecmill@champion" and found.training.checkpoint_interval == 7
    assert start_or_continue(found).path == far.path
    write_json(far.promotion_file, {"version": 1})
    assert (found := cut_off(look, root, champion)) and found.name == near.path.name
    other = make(tiny, name="tuned-{date}", training={"steps": 40, "batch_size": 2})
    assert cut_off(other, root, champion) is None, "the schedule has other settings by now"
    assert cut_off(look, root, registered("second", grown[1], champion)) is None
    (checkpoints.folder_of(near, 10) / "checkpoint.json").write_text("{")
    assert cut_off(look, root, champion) is None
    assert not begun.checkpoints.exists()


def test_what_cannot_be_read_counts_as_new_and_is_named(
    grown: tuple[ShardSet, ShardSet, ShardSet], registered: Callable[..., Version], tiny: dict[str, Any]
):
    before, between, _ = grown
    root = Root(Path(tiny["root"]))
    champion = registered("first", before, None)
    registered("tuned", between, champion)
    (checkpoints.folder_of(root.run("tuned"), 12) / "checkpoint.json").write_text("{")
    warnings: list[str] = []
    elsewhere = replace(champion, fingerprint="0" * 64)
    assert new_images(between, root, elsewhere, warnings.append) == 14
    assert [warning.partition(".")[0] for warning in sorted(warnings)] == [
        "What run 'tuned' was trained on counts as new",
        "What was learnt from a shard set counts as new, for it is not there",
    ]


def test_a_store_that_is_away_for_a_moment_starts_no_training(
    grown: tuple[ShardSet, ShardSet, ShardSet],
    registered: Callable[..., Version],
    tiny: dict[str, Any],
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
):
    """The champion's set is another machine's: its list of images is in the store."""
    before, between, _ = grown
    champion = replace(registered("first", before, None), fingerprint="0" * 64)
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.2)
    proxy.break_("503", "HEAD", "shards/")
    with pytest.raises(StoreUnavailable):
        new_images(between, Root(Path(tiny["root"])), champion, fail)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_training_of_a_look_that_is_killed_is_gone_on_with_by_a_later_one_and_by_its_retry(
    tiny: dict[str, Any], tmp_path: Path
):
    config = make(tiny, name="tuned-{date}-{time}-{id}", training={"steps": 600, "checkpoint_interval": 50})
    file = tmp_path / "config.json"
    file.write_text(config.model_dump_json())
    root = Root(Path(tiny["root"]))
    with closing(start_server(root, free_port(), {})) as server:  # one of its own would outlive the look that is killed
        server.wait_ready()
        environment = clean_environment() | {"PREFECT_API_URL": f"{server.address}/api", "PYTHONPATH": str(PROJECT)}
        from_steps, looks = [0], list[str]()
        for step in (60, 130):
            begun = subprocess.Popen([sys.executable, "-c", WATCH, str(file)], cwd=PROJECT, env=environment)
            try:
                wait_for(lambda step=step: any(steps_done(run) >= step for run in root.all_runs()), 120)
                at_work = [read_json(file) for file in root.attendance.glob("*.json")]
            finally:
                begun.kill()
                begun.wait()
            (run,) = root.all_runs()
            wait_for(lambda run=run: not ranks_alive(run), 30)
            saved = checkpoints.latest(run)
            assert saved is not None
            from_steps.append(saved.step)
            looks += (entry["id"] for entry in at_work if entry["run"] is None)
        retry = ["prefect", "flow-run", "retry", looks[0], "--entrypoint", "flows.watching.watch"]
        for words in (["tasks.dead_runs", str(root.path)], retry):
            done = subprocess.run(
                [sys.executable, "-m", *words], cwd=PROJECT, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert root.all_runs() == [run]
        assert beginnings(run) == from_steps
        assert run.promotion_file.is_file()
