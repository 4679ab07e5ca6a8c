"""Measures what the DAG costs beside the work of its stages."""

import shutil

from infra.bench.results import Column, Group
from infra.bench.workplace import Workplace
from infra.chaos.small_runs import make_pictures

STAGES, DAG, SERVED = "stages alone", "codecmill run", "codecmill run, Prefect's server running"
SECONDS = Column("s", lambda each: each.seconds)
AGAIN = Column("again, when all is done, s", lambda each: each.more.get("done_seconds"))

TEXT = """A small complete run: the stages called one after another in one process, and `codecmill run` as it is typed,
with its imports and its embedded Prefect server, or with a server that runs already, under a root where runs were
made before."""


def measure_dag(place: Workplace) -> Group:
    pictures = place.work / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    make_pictures(pictures)
    programs = [
        place.of_ours(STAGES, "run_stages", images=str(pictures)),
        place.of_ours(DAG, "run_dag", images=str(pictures), served=False),
        place.of_ours(SERVED, "run_dag", images=str(pictures), served=True),
    ]
    rounds = place.measured("DAG", programs, place.scale.dags)
    group = Group("The DAG", TEXT)
    columns = [SECONDS, AGAIN, Column("CPU s", lambda each: each.cpu_seconds)]
    for stage in ("shards", "training", "evaluation", "registration"):
        columns.append(Column(f"{stage}, s", lambda each, stage=stage: each.more.get("stages", {}).get(stage)))
    group.add(rounds, columns)
    for figure, way in (("dag_overhead_seconds", DAG), ("dag_overhead_seconds_served", SERVED)):
        pairs = zip(rounds.of(way), rounds.of(STAGES), strict=True)
        group.figure(figure, [whole.seconds - stages.seconds for whole, stages in pairs])
    group.figure("done_dag_seconds", [each.more["done_seconds"] for each in rounds.of(DAG)])
    return group
