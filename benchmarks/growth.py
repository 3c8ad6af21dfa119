"""How the loader's time and memory grow with the number of images, and the memory of its worker processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from ways import noise

from images.table import ImageTable

SIZES = (10_000, 50_000, 200_000, 1_000_000)
MB = 2**20


def memory(pid: int | str = "self") -> dict[str, float]:
    """MB of a process and its children: `private` memory, and `mapped` files.

    Pages that processes share are counted once (proportional set size).
    """
    children = Path(f"/proc/{pid}/task/{os.getpid() if pid == 'self' else pid}/children").read_text().split()
    total = {"private": 0.0, "mapped": 0.0}
    for process in (pid, *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total["private"] += (kb["Pss_Anon"] + kb["Pss_Shmem"]) * 1024 / MB
        total["mapped"] += kb["Pss_File"] * 1024 / MB
    return total


def repeated(n: int, folder: Path) -> ImageTable:
    """A thousand images, repeated to `n`, as a memory-mapped array on disk, like the cache of decoded images."""
    few = noise(1000, 0)
    path = folder / "images.npy"
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 32, 32, 3))
    for start in range(0, n, 1000):
        images[start : start + 1000] = few.images
    images.flush()
    rows = np.arange(n)
    images = np.asarray(np.load(path, mmap_mode="r"))
    return ImageTable("repeated", few.classes, images, rows % 10, rows < n - 10, rows, few.stats)


def measure(n: int, workers: int, epochs: int) -> dict:
    """Microseconds per image, and the peak memory of this process, in each of `epochs` epochs over `n` images."""
    import torch

    torch.set_num_threads(1)
    from data import get_dls

    before = memory()
    with tempfile.TemporaryDirectory() as folder:
        loader = get_dls(repeated(n, Path(folder)), workers=workers, device="cpu").train
        cost, most = [], []
        for _ in range(epochs):
            start, peak = perf_counter(), {"private": 0.0, "mapped": 0.0}
            spent = 0.0
            for i, _ in enumerate(loader):
                if i % 10 == 0:
                    looked = perf_counter()
                    peak = {name: max(peak[name], mb) for name, mb in memory().items()}
                    spent += perf_counter() - looked
            cost.append(1e6 * (perf_counter() - start - spent) / n)
            most.append({name: peak[name] - before[name] for name in peak})
    return {"images": n, "workers": workers, "µs per image": cost, "MB beyond the imports": most}


def in_a_process_of_its_own(*arguments: int) -> dict:
    """`measure` in a new process, where nothing else has been loaded before."""
    words = [sys.executable, "-W", "ignore", __file__, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, stdout=subprocess.PIPE, env=env, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def growth(sizes=SIZES) -> list[dict]:
    """The second epoch of our loader, without workers, over each number of images; the first is a warm-up."""
    rows = []
    for n in sizes:
        result = in_a_process_of_its_own(n, 0, 2)
        memory = {f"{name} MB": mb for name, mb in result["MB beyond the imports"][-1].items()}
        rows.append({"images": n, "µs per image": result["µs per image"][-1], **memory})
    return rows


def workers(n: int = 50_000, workers: int = 4, epochs: int = 6) -> list[dict]:
    """Memory of the whole process tree with worker processes, epoch by epoch."""
    result = in_a_process_of_its_own(n, workers, epochs)
    return [
        {"epoch": i + 1, "µs per image": cost, **{f"{name} MB": mb for name, mb in most.items()}}
        for i, (cost, most) in enumerate(zip(result["µs per image"], result["MB beyond the imports"], strict=True))
    ]


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
