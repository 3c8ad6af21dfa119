"""Settings made before torch is imported, unless the environment makes them: memory allocation and idle threads."""

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse, unless the environment configures its allocator.

    By default it returns large blocks to the kernel, which then fills every page with zeros for the next batch. On the
    CPU that takes a fifth of a step; `results/speed` has the gain, and the memory it costs.
    """
    if os.environ.get("GLIBC_TUNABLES") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, TypeError, AttributeError):  # other systems have another allocator
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1):
            mallopt(option, value)


def let_idle_threads_sleep() -> None:
    """Let OpenMP's waiting threads give up their core soon, unless the environment says otherwise.

    By default they spin for long, which on a busy machine blocks the very threads they wait for. OpenMP reads this
    setting when torch is imported; `results/README.md` has what each choice costs.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # GOMP_SPINCOUNT is for GNU's OpenMP, which torch comes with: sleeping at once would slow down small steps.
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")
