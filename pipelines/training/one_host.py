"""The rendezvous of a training on one host, which no other host can reach: torchrun's backend 'codecmill-one-host'.

`torchrun --standalone` listens on every interface, asks nobody for a password, and reads what is written there with
pickle. Here is nobody to meet: a store is all that agent and ranks need, on the loopback interface.
"""

from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from pipelines.training.rendezvous import LOOPBACK, Rendezvous, store_at

BACKEND = "codecmill-one-host"


class OneHost(StaticTCPRendezvous):
    """The first and only one of its round, at a store of its own."""

    def __init__(self, run_id: str):
        store = store_at(Rendezvous(LOOPBACK, port=0))
        super().__init__(store.host, store.port, rank=0, world_size=1, run_id=run_id, timeout=60)
        self._store = store

    def get_backend(self) -> str:
        return BACKEND


def register() -> None:
    """Make it known to torchrun."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> OneHost:
    return OneHost(parameters.run_id)
