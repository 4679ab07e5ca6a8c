"""Freed memory stays with the process, counted by pages that the kernel clears; garbage is left at its end."""

import resource
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // resource.getpagesize()

COUNT = """
import resource, sys
import torch
from pipelines.process_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def use():
    torch.ones(64 * 2**20, dtype=torch.uint8)
for _ in range(10):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0, 2 * PAGES), ("given back", 10 * PAGES, 40 * PAGES)])
def test_a_large_tensor_takes_the_pages_of_the_one_before(how: str, least: int, most: int):
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    assert least <= int(done.stdout) <= most


GARBAGE = """
import sys
from pipelines.process_memory import collect_rarely
class Cycle:
    def __del__(self):
        print("looked at")
if sys.argv[1] == "rarely":
    collect_rarely()
cycle = Cycle()
cycle.me = cycle
del cycle
"""


@pytest.mark.parametrize(("how", "printed"), [("rarely", ""), ("as usual", "looked at\n")])
def test_what_is_there_at_the_end_of_a_process_is_not_looked_through_for_garbage(how: str, printed: str):
    done = subprocess.run([sys.executable, "-c", GARBAGE, how], capture_output=True, text=True, check=True)
    assert done.stdout == printed
