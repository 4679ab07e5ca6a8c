"""What `auto` means on this machine: resolved once, at a run's first start, and kept in its config.json."""

import ctypes
import os
import shutil
import sysconfig
from pathlib import Path

from pipelines.config import RunConfig, TrainingConfig
from pipelines.errors import InputError
from pipelines.processor_cores import usable_cores

# A command resolves a new run before its first stage. torch, whose import takes seconds, is asked only where it may see
# a GPU; the ranks load it for themselves.

COMPILE_PAYS_FROM_STEPS = 1000
"""On a GPU: compiling costs tens of seconds, and below this many steps an eager run is done sooner.

On a CPU the compiled step of the default model was measured to take about as long as the eager one, 0.9 to 1.1 times,
in float32 and bf16, with either memory layout (`make bench` shows it), so there `auto` stays eager. Large codecs gain a
fifth, and say so in their configs.
"""

PROCESSORS = Path("/proc/cpuinfo")


def resolve(config: RunConfig) -> RunConfig:
    """The same config with every `auto` of its training replaced by what this machine has.

    Raises:
        InputError: `training.device` is cuda and there is no GPU, or more ranks than GPUs are asked for.
    """
    training = config.training
    gpus = usable_gpus()
    device = training.device if training.device != "auto" else ("cuda" if gpus else "cpu")
    processes = training.processes
    if processes == "auto":
        processes = _most_ranks(gpus, training) if device == "cuda" and gpus else 1
    threads = training.threads
    if threads == "auto":
        threads = 1 if processes * training.nodes > 1 or training.virtual_ranks else usable_cores()
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if bf16_pays(device) else "float32"
    compiled = training.compile
    if compiled == "auto":
        compiled = device == "cuda" and training.steps >= COMPILE_PAYS_FROM_STEPS and has_compiler()
    resolved = training.model_copy(
        update={
            "device": device,
            "processes": processes,
            "threads": threads,
            "precision": precision,
            "compile": compiled,
        }
    )
    check(resolved)
    return config.model_copy(update={"training": resolved})


def compute_exactly() -> None:
    """Have torch compute the same bits each time, for this process."""
    import torch

    torch.use_deterministic_algorithms(True)
    # Moments of weights that no longer matter fade into numbers that this hardware is 100 times slower with. Threads
    # that are started later inherit it.
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    # Every tensor that is about to be written would first be filled with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def take_own_cores(rank: int, ranks: int) -> None:
    """Keep this process, of several on this host that wait for each other at each step, to its share of the cores.

    Else a thread that loads for one rank runs on another's core while its own waits. Where cores are fewer than ranks,
    or do not divide, the scheduler knows better.
    """
    cores = sorted(os.sched_getaffinity(0))
    if ranks > 1 and len(cores) % ranks == 0:
        share = len(cores) // ranks
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])


def check(training: TrainingConfig) -> None:
    """Refuse what this machine has not, also where a run is continued on another one.

    Raises:
        InputError: no GPU, or fewer than ranks, or nothing to compile with.
    """
    found = lack(training)
    if found:
        raise InputError(" ".join(found))


def lack(training: TrainingConfig) -> tuple[str, str] | None:
    """What this machine has not, and what a run may do about it, a sentence each; None where it has all."""
    gpus = usable_gpus()
    if training.device == "cuda" and not gpus:
        return "training.device is cuda, but torch sees no GPU here.", "Use --training.device cpu."
    if training.device == "cuda" and training.processes != "auto" and training.processes > gpus:
        return (
            f"training.processes is {training.processes}, but there are {gpus} GPUs: one rank has one.",
            "Use fewer --training.processes.",
        )
    if training.compile is True and (missing := missing_to_compile()):
        return (
            f"training.compile is true, but there is no {missing}.",
            "Install it, or use --training.compile false; a run that was begun with it resumes so with "
            "--allow-inexact, to other bits.",
        )
    return None


def _most_ranks(gpus: int, training: TrainingConfig) -> int:
    """One a GPU, as far as there are images for each, and virtual ranks are shared out evenly, on any of the hosts."""
    if training.virtual_ranks is None:
        return max(1, min(gpus, training.batch_size // training.nodes))
    virtual, hosts = training.virtual_ranks, range(1, training.nodes + 1)
    fitting = (count for count in range(1, gpus + 1) if all(virtual % (count * host) == 0 for host in hosts))
    return max(fitting, default=1)


def usable_gpus() -> int:
    """How many torch sees. It is not asked where there is no driver through which it could see one."""
    if not _has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _has_gpu_driver() -> bool:
    """Whether NVIDIA's library is installed, which comes with its driver, or AMD's kernel module loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def bf16_pays(device: str) -> bool:
    """Whether hardware multiplies bfloat16 numbers faster than float32 ones.

    AMX does, and so do AMD's AVX-512 instructions. Intel's do not, where there is no AMX or a virtual machine hides it:
    there a product of matrices reached 175 GFLOP/s on two cores, and 317 in float32, and a training step took 1.5 times
    as long.
    """
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        words = set(PROCESSORS.read_text().split())
    except OSError:
        return False  # no Linux, so no processor of those that do
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def has_compiler() -> bool:
    """Whether torch.compile finds all that it builds its code with."""
    return missing_to_compile() is None


def missing_to_compile() -> str | None:
    """What torch.compile needs and does not find here; None where it finds all.

    On a GPU too: what launches the kernels is built here, by Inductor and Triton alike, against Python's headers.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "C++ compiler (g++ or clang++) on the PATH"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"{header}, which Python's headers bring (Debian's python3-dev)"
