"""The time of a training step on the CPU: in fp32 and bf16, and by the policies for idle threads and freed memory."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from steps import BARE, BY_HAND, MUON, OURS, steps
from torch.utils.flop_counter import FlopCounterMode

from model import CustomResNet
from training.precision import has_bf16

ROOT = Path(__file__).parents[1]
BS = 512
IMAGES = {16: 20 * BS, 64: 3 * BS}  # an epoch of some ten seconds
# By default libgomp's threads spin 300,000 times, and with a passive policy not at all
POLICIES = {
    "OpenMP's own": {},
    "ours, GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
ALLOCATORS = {"glibc's own": {}, "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}}
SET_HERE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
STEPS = """
import json, sys
from resource import RUSAGE_SELF, getrusage
sys.path[:0] = sys.argv[1:3]
from processors import step_times
times = step_times(int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), float(sys.argv[6]))
print(json.dumps([times, getrusage(RUSAGE_SELF).ru_maxrss / 1024]))
"""


def bare_step(width: int, precision: str, bs: int):
    """A hand-written training step on one batch of noise."""
    torch.manual_seed(0)
    model = CustomResNet(10, width, logit_scale=0.125).to(memory_format=torch.channels_last)
    opt = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    x = torch.randn(bs, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (bs,))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()

    return step


def step_times(width: int, precision: str, bs: int, seconds: float) -> list[float]:
    """The time of each bare step, in seconds, over about `seconds` seconds, without the first, which is slower."""
    step, times, start = bare_step(width, precision, bs), [], perf_counter()
    while perf_counter() - start < seconds or len(times) < 3:
        begin = perf_counter()
        step()
        times.append(perf_counter() - begin)
    return times[1:]


def matrix_rate(dtype: torch.dtype, n: int = 4096) -> float:
    """GFLOP/s of the product of two n x n matrices, the best of three."""
    a, times = torch.randn(n, n, dtype=dtype), []
    for _ in range(4):
        start = perf_counter()
        a @ a
        times.append(perf_counter() - start)
    return 2 * n**3 / min(times[1:]) / 1e9


def flops_an_image(width: int) -> float:
    """Floating-point operations per image of a training step."""
    step = bare_step(width, "fp32", 8)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 8


def precision(rounds: int = 4) -> list[dict]:
    """Images/s of the fastest of `rounds` epochs, and the bare step's rate relative to that of matrix products."""
    cpu, rows = torch.device("cpu"), []
    rates = {"fp32": matrix_rate(torch.float32)}
    if has_bf16(cpu):
        rates["bf16"] = matrix_rate(torch.bfloat16)
    for width, images in IMAGES.items():
        for name in rates:
            times = {row["way"]: row["fastest"] for row in steps(cpu, width, images, rounds, precision=name)}
            speed = {way: images // BS * BS / seconds for way, seconds in times.items()}
            reached = speed[BARE] * flops_an_image(width) / 1e9
            rows.append({
                "width": width, "precision": name, **{way: speed[way] for way in (BARE, BY_HAND, OURS)},
                "our time / by hand": times[OURS] / times[BY_HAND], "Muon / SGD": times[MUON] / times[OURS],
                "GFLOP/s": reached, "of matrix products": reached / rates[name],
            })  # fmt: skip
    return rows


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Within this, as many other processes as `processes` says keep a core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def timed_apart(policy: dict[str, str], width: int, precision: str, bs: int, seconds: float) -> tuple[float, float]:
    """The median of `step_times`, and the peak memory in MiB, of a new process with that policy and no other."""
    environment = {k: v for k, v in os.environ.items() if k not in SET_HERE}
    words = [sys.executable, "-W", "ignore", "-c", STEPS, ROOT, ROOT / "benchmarks", width, precision, bs, seconds]
    process = subprocess.run([*map(str, words)], env=environment | policy, check=True, stdout=subprocess.PIPE)
    times, peak = json.loads(process.stdout)
    return median(times), peak


def waiting() -> list[dict]:
    """Median milliseconds of a bare step under each policy, alone and beside one busy process."""
    cases = [(16, "fp32", 64, 2), (16, "fp32", BS, 4), (64, "fp32", BS, 8)]
    if has_bf16(torch.device("cpu")):
        cases = [case for width, _, *rest in cases for case in ((width, "fp32", *rest), (width, "bf16", *rest))]
    rows = []
    for others in (0, 1):
        for width, name, bs, seconds in cases:
            row = {
                "width": width,
                "precision": name,
                "batch": bs,
                "beside it": "a busy process" if others else "nothing",
            }
            for policy, variables in POLICIES.items():
                with busy(others):
                    row[policy] = 1e3 * timed_apart(variables, width, name, bs, seconds * (1 + others))[0]
            rows.append(row)
            print(row, flush=True)
    return rows


def memory(rounds: int = 2) -> list[dict]:
    """Images/s of a bare step, and the process's MiB, with glibc's default allocator, and when it keeps freed memory.

    The best of `rounds`, in which the two take turns.
    """
    rows = []
    for width in IMAGES:
        for name in ("fp32", "bf16") if has_bf16(torch.device("cpu")) else ("fp32",):
            row, best = {"width": width, "precision": name}, dict.fromkeys(ALLOCATORS, (float("inf"), 0))
            for _ in range(rounds):
                for way, variables in ALLOCATORS.items():
                    best[way] = min(best[way], timed_apart(variables, width, name, BS, 10))
            row |= {f"{way}, images/s": BS / seconds for way, (seconds, _) in best.items()}
            own, kept = best.values()
            row |= {"times as fast": own[0] / kept[0], "MiB": own[1], "MiB, kept": kept[1]}
            rows.append(row)
    return rows
