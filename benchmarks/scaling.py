"""The speed to expect of several GPUs, computed from the step of one GPU, the loader and the network between them.

    python benchmarks/scaling.py --save results/scaling.json

The step's 30.9 ms are cifar10-fast's, 72 s for 24 epochs of 97 steps on a V100; `--step-ms` sets that of another GPU.
The time to load an image of 224 pixels on one core is measured here.
`python results/make.py` makes the tables of docs/scaling.md from the file.
"""

import json
import os
import platform
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from errors import parse
from files import write_json
from reporting.tables import markdown_table

PARAMETERS = 6_573_130
GRADIENTS = 4 * PARAMETERS / 1e6  # MB, fp32
BS = 512  # images in a step, of all GPUs together
IMAGES = 50_000  # in an epoch
CORES = 16  # for each GPU
LINKS = {"NVLink": 300.0, "100 Gb/s": 12.5, "10 Gb/s": 1.25}  # GB/s that a GPU sends while it receives as much
PER_MACHINE = 8
LATENCY = 0.02  # ms, of one message
SIZES = (32, 224)


def all_reduce_ms(gpus: int, gb_per_second: float) -> float:
    """Each GPU of a ring sends 2 (n - 1) / n of the gradients. Source: Patarasuk and Yuan (2009), section 3."""
    return 2 * (gpus - 1) / gpus * GRADIENTS / gb_per_second + 2 * (gpus - 1) * LATENCY


def step(gpus: int, link: str, step_ms: float, floor_ms: float, loader_us: float) -> dict[str, float]:
    """Milliseconds of a step of `BS` images: compute, loading at the same time, and the all-reduce after that."""
    share = BS / gpus
    times = {
        "compute": floor_ms + (step_ms - floor_ms) * share / BS,
        "load": share * loader_us / 1000 / CORES,
        "all-reduce": all_reduce_ms(gpus, LINKS[link]),
    }
    return times | {"step": max(times["compute"], times["load"]) + times["all-reduce"]}


def rows(figures: dict, size: int) -> list[tuple[str, ...]]:
    """The table for images of `size` pixels: 1 to 8 GPUs in one machine, then several machines on either network."""
    floor, loader_us = figures["floor_ms"], figures["loader_us"][str(size)]
    step_ms = floor + (figures["step_ms"] - floor) * (size / 32) ** 2
    one = step(1, "NVLink", step_ms, floor, loader_us)["step"]
    table = []
    many = [(gpus, link) for link in ("100 Gb/s", "10 Gb/s") for gpus in (16, 32)]
    for gpus, link in [(gpus, "NVLink") for gpus in (1, 2, 4, 8)] + many:
        t = step(gpus, link, step_ms, floor, loader_us)
        where = "one machine" if gpus <= PER_MACHINE else f"{gpus // PER_MACHINE} machines, {link}"
        epoch, faster = t["step"] * IMAGES / BS / 1000, one / t["step"]
        times = (f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}" for ms in t.values())
        table.append((str(gpus), where, *times, f"{epoch:.3g} s", f"{faster:.1f} x", f"{faster / gpus:.0%}"))
    return table


def photo_us(images: int = 200) -> float:
    """Decode a JPEG of 500x375 pixels and crop 224x224 of it at random, as for ImageNet: microseconds on one core."""
    import albumentations as A
    import cv2

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)  # smooth, as photographs are
    picture = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 8, (375, 500, 3))
    jpeg = cv2.imencode(".jpg", picture.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    crop = A.Compose([A.RandomResizedCrop((224, 224)), A.HorizontalFlip()])
    cv2.setNumThreads(0)
    started = perf_counter()
    for _ in range(images):
        crop(image=cv2.imdecode(jpeg, cv2.IMREAD_COLOR))
    return (perf_counter() - started) / images * 1e6


def table(figures: dict, size: int) -> str:
    """`rows` in Markdown."""
    times = ("compute, ms", "load, ms", "all-reduce, ms", "step, ms")
    return markdown_table(("GPUs", "where", *times, "epoch", "faster", "of the ideal"), rows(figures, size))


def main(
    loaders: str = "results/speed/2-cores-loaders.json",  # Figures of speed.py, for the cost of a 32x32 image
    step_ms: float = 30.9,  # A training step of 512 images of 32x32 on one GPU, in ms
    floor_ms: float = 1.4,  # What a step takes however few images it has, in ms
    save: str = None,  # Write the figures to this JSON file
):
    """Compute what more GPUs should give, from what is measured here and from a GPU's step."""
    costs = {row["way"]: row["µs per image"] for row in json.loads(Path(loaders).read_text())["loaders"]}
    figures = {
        "device": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "step_ms": step_ms,
        "floor_ms": floor_ms,
        "loader_us": {"32": round(costs["ours, uint8, 1 worker"], 1), "224": round(photo_us())},
    }
    print(json.dumps(figures, indent=2))
    for size in SIZES:
        print(f"\n{size}x{size} pixels\n{table(figures, size)}")
    if save:
        write_json(Path(save), figures)


if __name__ == "__main__":
    parse(main)
