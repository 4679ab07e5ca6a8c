"""infra/SCALE.md: its tables are those that the program prints, and the simulation is right where one can count."""

import re
from pathlib import Path

from infra.scale.run import tables
from infra.scale.simulation import Cluster, balance, fetched

PAGE = Path(__file__).parents[1] / "infra/SCALE.md"


def test_the_page_has_the_tables_that_the_program_prints():
    found = re.search(r"<!-- python -m infra.scale.run -->\n(.*)\n<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found and found[1] == tables(), "run: python -m infra.scale.run"


def test_ranks_take_turns_and_each_host_meets_each_shard():
    of = Cluster(hosts=2, ranks_a_host=2, samples=(50,) * 12, window=4)
    found = balance(of, windows=3)
    assert found.apart == 0, "200 samples of a window are 50 a rank"
    assert found.least_touched == 1.0


def test_a_host_that_has_one_rank_of_many_misses_shards():
    of = Cluster(hosts=50, ranks_a_host=1, samples=(50,) * 4, window=4)
    assert balance(of, windows=1).least_touched < 1.0, "four samples seldom lie in four different shards"


def test_a_cache_for_all_fetches_once_and_one_for_less_than_a_window_always():
    of = Cluster(hosts=1, ranks_a_host=1, samples=(10,) * 20, window=5)
    assert fetched(of, room=20, epochs=3) == [1.0, 0.0, 0.0]
    assert fetched(of, room=1, epochs=3)[0] == 1.0
    first, second = fetched(of, room=10, epochs=2)
    assert first == 1.0 and 0.0 < second <= 1.0
