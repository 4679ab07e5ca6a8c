"""How much is measured: the full benchmark, the quick one, and a tiny one to try the benchmark itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Amounts, all of them counts.

    Attributes:
        patches: that are loaded, and that the largest point of the curves has.
        cut: patches that each contender cuts in a round of the creation.
        copies: how often each patch is stored for the peers, so that a round ends before their epoch does.
        loaded: patches in a round of the loading.
        stepped: steps in a round of the bare steps.
        trained: steps of a training that count.
        settled: steps before those, where whole trainings are compared with the bare step, which is warm; after 16, all
            patches of a small set have come once, and the first hundred of a process were seen to take 5 % longer.
        rounds: that count.
        trainings, dags: rounds of whole trainings and of whole small runs, which take longer.
        repeats: rounds of a group that may be done again where others disturb.
        scaled: patches that codecmill cuts with one process and with two, to see how it scales.
        thorough: measure the compiled step and virtual ranks on one process, too.
        curves: patches of the points of the scaling curves.
    """

    name: str
    patches: int
    cut: int
    copies: int
    loaded: int
    stepped: int
    trained: int
    settled: int
    rounds: int
    trainings: int
    dags: int
    repeats: int
    scaled: int
    thorough: bool
    curves: tuple[int, ...]


FULL = Scale(
    "full",
    patches=4000,
    cut=720,
    copies=2,
    loaded=4800,
    stepped=20,
    trained=60,
    settled=100,
    rounds=5,
    trainings=3,
    dags=2,
    repeats=5,
    scaled=16000,
    thorough=True,
    curves=(40, 400, 4000),
)
QUICK = Scale(
    "quick",
    patches=400,
    cut=400,
    copies=5,
    loaded=1280,
    stepped=8,
    trained=24,
    settled=16,
    rounds=3,
    trainings=1,
    dags=1,
    repeats=1,
    scaled=960,
    thorough=False,
    curves=(),
)
TINY = Scale(
    "tiny",
    patches=48,
    cut=48,
    copies=20,
    loaded=320,
    stepped=2,
    trained=16,
    settled=16,
    rounds=1,
    trainings=1,
    dags=1,
    repeats=0,
    scaled=48,
    thorough=True,
    curves=(24, 48),
)
SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
