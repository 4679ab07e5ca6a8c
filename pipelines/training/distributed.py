"""Ranks: how they find each other, what they agree on, and the proof that they hold the same bits."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pipelines.errors import CodecmillError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than any compile or save that one rank may wait for; a rank that dies is noticed at once, by its socket."""

DIGITS = 12
"""Of a sha256, in one number."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, places: list[int], columns: Tensor, count: int) -> list[list[float]]:
        """Every rank's columns, each at its place among `count`, exactly and the same on every rank.

        Args:
            places: of this rank's columns; no other rank has them.
            columns: (rows, n), taken as float64.
        """
        # All others add zero to a column, which is exact: no order of summing changes anything.
        table = torch.zeros(len(columns), count, dtype=torch.float64)
        table[:, places] = columns.double().cpu()
        table = table.to(self.device)
        dist.all_reduce(table)
        return table.tolist()

    def told_by_first(self, numbers: list[float]) -> list[float]:
        """What the first rank says, which all know once it has said it; others give as many numbers, of any value."""
        told = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(told, src=0)
        return told.tolist()

    def told_by_each(self, numbers: list[float]) -> list[list[float]]:
        """What every rank says, a list for each of the numbers, in the order of the ranks."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        told = own.new_empty(self.world_size * len(numbers))
        dist.all_gather_single(told, own)
        return told.view(self.world_size, len(numbers)).T.tolist()


def as_numbers(sha256: str) -> list[float]:
    """A digest in hexadecimal as numbers of 48 bits, and a last one of 16, which float64 holds exactly."""
    return [float(int(sha256[at : at + DIGITS], 16)) for at in range(0, 64, DIGITS)]


def as_digest(numbers: Iterable[float]) -> str:
    """`as_numbers` undone."""
    widths = (min(DIGITS, 64 - at) for at in range(0, 64, DIGITS))
    return "".join(f"{int(number):0{width}x}" for number, width in zip(numbers, widths, strict=True))


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started: gloo on the CPU, NCCL on GPUs."""
    local_rank = int(os.environ["LOCAL_RANK"])
    agents_store, rank, world_size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store: Store = agents_store
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # The agent keeps its store over a restart: without a name of its own, one would find the addresses of the dead.
        store = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agents_store)
    others: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": COLLECTIVE_TIMEOUT}
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        target = torch.device("cuda", local_rank)
        dist.init_process_group("nccl", device_id=target, **others)
    else:
        target = torch.device("cpu")
        dist.init_process_group("gloo", **others)
    yield Ranks(rank, world_size, target)
    # Only at a good end: after a failure NCCL would wait here for the others, who wait for this rank. All leave
    # together, when the first has saved: a host whose ranks are done takes no others for lost.
    dist.barrier()
    dist.destroy_process_group()


def digest(tensor: Tensor) -> Tensor:
    """A 64-bit digest of a tensor's bits, computed where the tensor is.

    The bits, read as integers b_i, are summed as b_i * m_i modulo 2^64 with odd multipliers m_i that depend on the
    place: a difference in a single element always changes it, since an odd number has an inverse modulo 2^64.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    size = flat.element_size()
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).to(torch.int64)
    places = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64)
    multipliers = (places * -7046029254386353131) | 1  # the golden ratio in 64 bits: neighbours get unlike multipliers
    return (bits * multipliers).sum()


def check_replicas(tensors: Mapping[str, Tensor], step: int) -> None:
    """Prove that every rank holds the same bits.

    Raises:
        CodecmillError: on every rank, naming the first tensor that differs and the ranks' digests.
    """
    if not tensors:  # as of shared weights before the first step
        return
    own = torch.stack([digest(tensor) for tensor in tensors.values()])
    lowest, highest = own.clone(), own.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    differing = (lowest != highest).nonzero().flatten().tolist()
    if differing:
        names = list(tensors)
        raise CodecmillError(
            f"The ranks no longer hold the same model after step {step}: '{names[differing[0]]}' differs"
            + (f", and {len(differing) - 1} more tensors do" if len(differing) > 1 else "")
            + ". Every checkpoint was checked before it was saved: resume from the newest."
        )
