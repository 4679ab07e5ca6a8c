"""Shard creation as tasks: each encodes some of the images, on whatever task runner the config names."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from pipelines.config import DataConfig

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner
