"""The commands that run flows: each finds out from disk what is to be done, and only then starts what it needs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli import listing, starting
from flows.cli.config_file import checked, combined
from flows.cli.options import Arguments
from flows.cli.starting import run_flow
from pipelines import status
from pipelines.config import RunConfig
from pipelines.config.dotted import flat
from pipelines.data.sources import check_sources
from pipelines.errors import BusyError, InputError
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import INEXACT, check_evaluation_images, check_inputs, go_on_with, merge
from pipelines.storage.address import is_url, store_url

if TYPE_CHECKING:
    from tasks.values import ShardSetReference


def run(arguments: Arguments) -> None:
    config = arguments.config()
    if config.training.nodes > 1 and ("{time}" in config.name or "{id}" in config.name):
        raise InputError(
            f"training.nodes is {config.training.nodes}, but '{config.name}' is another run on each host. Give all of "
            "them the same name: --name first"
        )
    _work(config.named(), arguments)


def resume(arguments: Arguments) -> None:
    _bring_from_store(arguments)
    config = _config_of_run(arguments)
    if arguments.allow_inexact:
        _change_inexactly(Root(arguments.root).existing_run(arguments.run), config)
    _work(config, arguments)


def _change_inexactly(run: RunDirectory, config: RunConfig) -> None:
    from pipelines import checkpoints

    with run.locked():
        old = run.read_config()
        new = merge(old, config, allow_inexact=True)
        before, after = (flat(each.model_dump(mode="json")) for each in (old, new))
        changed = [field for field in sorted(INEXACT) if before[field] != after[field]]
        if changed and new.training.steps in checkpoints.steps_on_disk(run):
            raise InputError(
                f"Run '{old.name}' is trained to its last step, {new.training.steps}: there is nothing left to be done "
                f"with another {' and '.join(changed)}. Leave that as it was, or train on with more --training.steps."
            )
        go_on_with(run, new)


def demo(arguments: Arguments) -> None:
    from flows.cli.demo import demo_values

    values = combined(demo_values(arguments.root), arguments.overrides)
    _work(checked(values, None, arguments.overrides).named(), arguments)


def shards(arguments: Arguments) -> None:
    config = arguments.config().named()
    shard_set = _made_shards(config)
    if shard_set is None:
        shard_set = run_flow(starting.create_shards, config, starting.REPEAT)
    elif not arguments.json:
        print("The shard set is made already; nothing was started.", file=sys.stderr)
    if arguments.json:
        listing.print_json(shard_set)
    else:
        print(f"Shard set {shard_set.fingerprint} in {shard_set.path}")


def _made_shards(config: RunConfig) -> "ShardSetReference | None":
    """The shard set where there is nothing to do. Images in a store are left to the flow: to look is to fetch them."""
    from flows.cli.display import shown_progress
    from pipelines.data.shards import find_shards
    from tasks.checkpoints import shard_set_at

    if is_url(config.data.images or "") or is_url(config.data.masks or ""):
        check_sources(config)
        return None
    with shown_progress():
        folder = find_shards(config)
    return shard_set_at(folder) if folder else None


def evaluate(arguments: Arguments) -> None:
    _bring_from_store(arguments)
    config = _config_of_run(arguments)
    check_evaluation_images(config)
    result = run_flow(starting.evaluation, config, starting.REPEAT)
    if arguments.json:
        listing.print_json(result)
    else:
        print(f"PSNR {result.metrics['psnr']:.2f} dB over {result.images} images. Report: {result.report}")


def _bring_from_store(arguments: Arguments) -> None:
    """Have here what a store knows of a run, before it is looked at what there is to do."""
    if store_url() is None:
        return
    from flows.cli.display import shown_progress
    from pipelines.storage.bringing import catch_up, is_in_store

    run = Root(arguments.root.absolute()).run(arguments.run)
    if Path(arguments.run).name == arguments.run and (run.config_file.is_file() or is_in_store(arguments.run)):
        with run.locked(), shown_progress():
            catch_up(run)


def _config_of_run(arguments: Arguments) -> RunConfig:
    """A run's config with the given flags over it."""
    run = Root(arguments.root).existing_run(arguments.run)
    old = run.read_config().model_dump(mode="json", by_alias=True)
    # The folder may have been moved since, or be named from another working directory.
    values = combined(combined(old, arguments.overrides), {"root": str(arguments.root), "name": arguments.run})
    return checked(values, run.config_file, arguments.overrides)


def _work(config: RunConfig, arguments: Arguments) -> None:
    """Do what of a run is missing, unless nothing is; then say where everything is."""
    run = Root(config.root.absolute()).run(config.name)
    if not _is_finished(run, config, arguments.command):
        # A run that `train` began without a test split ends with its training, whoever goes on with it.
        is_whole = config.has_a_test_split if arguments.command == "resume" else arguments.command != "train"
        _check_inputs(config, is_whole)
        flow = starting.pipeline if is_whole else starting.training
        again = None if is_whole else starting.repeat_by_name(config.name)
        if config.training.nodes == 1:
            run_flow(flow, config, again)
        else:
            lead_or_help(
                run,
                lambda: run_flow(flow, config, again),
                lambda: _is_finished(run, config, arguments.command),
                again,
            )
    elif not arguments.json:
        print(f"Everything of '{config.name}' is done already; nothing was started.", file=sys.stderr)
    found = status.run_status(run)
    if arguments.json:
        listing.print_json(found)
    else:
        listing.print_summary(found)


def lead_or_help(
    run: RunDirectory, lead: Callable[[], object], is_finished: Callable[[], bool], again: str | None = None
) -> None:
    """Where several hosts run the same command: be the one that does the work, or lend that one this host's ranks.

    Whoever helps takes over where the leader is gone.

    Args:
        again: as of `stops_explained`.

    Raises:
        InputError: `CODECMILL_RENDEZVOUS` does not say where the hosts meet. BusyError: a host that is none of these
            works on the run.
    """
    from flows.cli.display import shown_progress, tell
    from pipelines.training import hosts, rendezvous

    rendezvous.named()
    while not is_finished():
        leads = False
        try:
            with run.led():
                leads = True
                lead()
                return
        except BusyError:
            if leads and not hosts.is_led(run):
                raise  # a machine that is none of these hosts has it
        with starting.stops_explained(run, again), shown_progress():
            hosts.help_along(run, on_line=tell)


def _is_finished(run: RunDirectory, config: RunConfig, command: str) -> bool:
    """Whether disk has all that a config asks for.

    Raises:
        InputError: the run exists with settings that cannot change.
    """
    if not run.config_file.is_file():
        return False
    old = run.read_config()
    unchanged = merge(old, config).model_copy(update={"root": old.root}) == old
    wanted = {"shards", "training"} if command == "train" else {"shards", "training", "evaluation", "registration"}
    stages = {stage.name for stage in status.run_status(run).stages if stage.state == "done"}
    return unchanged and wanted <= stages


def _check_inputs(config: RunConfig, is_whole: bool) -> None:
    """Say what is not there before anything is started, not seconds or hours after.

    Args:
        is_whole: the model is to be evaluated as well.

    Raises:
        InputError: no images, none to evaluate, no weights to start from, or a metric that chooses no champion.
    """
    if is_whole:
        config.must_have_a_test_split()
    run = Root(config.root.absolute()).run(config.name)
    if not run.config_file.is_file():
        config.must_suit_a_new_run()
    shards = status.run_status(run).stages[0] if run.config_file.is_file() else None
    if shards is None or shards.state != "done":  # a run keeps the shard set that it began with
        check_sources(config)
    check_inputs(config)
