"""What a process does with memory that it has freed, and how often it looks for what can be freed."""

import atexit
import gc

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's names, of malloc.h."""
NEVER = 2**31 - 1

YOUNG_OBJECTS = 100_000
"""Of those that can hold each other: with so many new ones Python looks among them for garbage, by itself with 700."""


def keep_freed_memory() -> None:
    """Have the allocator keep freed blocks for those that follow, and give none back to the kernel.

    By itself glibc maps a large tensor anew each time, and the kernel clears each of its pages at the first touch:
    24,000 page faults a step of the default model, a fifth of its time, and an eighth of the time in which photographs
    become patches. The peak of memory stays what it is. Other C libraries have no such choice and are left alone.
    """
    import ctypes  # late: all commands come by here, and few need it

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def collect_rarely() -> None:
    """Have Python look for cyclic garbage less often, and not at all when the process ends.

    torch, MLflow and Prefect make some million objects while they are imported, all to stay. Looking through them again
    and again takes a sixth of that time, and at the end of the process, when all memory goes back anyway, 0.8 to 2 s.
    """
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
    atexit.register(gc.freeze)  # what is frozen is not looked at
