"""What is set before torch is imported, unless the environment does it: freed memory is kept, idle threads sleep."""

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc hand out again what has been freed, unless the environment says how it is to be done.

    By itself it gives large blocks back to the kernel, which fills every page with zeros before the next batch has it.
    On the CPU that is a fifth of a step's time; `results/speed` has what this gains, and what memory it takes.
    """
    if os.environ.get("GLIBC_TUNABLES") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, TypeError, AttributeError):  # other systems have another allocator
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1):
            mallopt(option, value)


def let_idle_threads_sleep() -> None:
    """Have threads that wait for others give up their core soon, unless the environment says otherwise.

    OpenMP's threads spin for long, which on a busy machine keeps those from working that they wait for. It reads this
    when torch is imported; `results/README.md` has what each way costs.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        # The count is GNU's, which torch comes with: to sleep at once slows small steps.
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")
