"""Choosing and checking the device to compute on, and its determinism."""

import os

import torch

from errors import InputError

CUBLAS_WORKSPACE = ":4096:8"  # without it, the order of sums in cuBLAS can change from run to run


def get_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is the best there is. Raises InputError if it does not exist.

    Each of several processes on a machine gets a GPU of its own, or all use the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if name == "auto":
            name = "cuda" if gpus else "cpu"
        if name not in ("cpu", "cuda"):
            raise InputError(f"--device {name}: several processes take auto, cpu, or cuda, which is a GPU for each")
        if name == "cuda" and local_rank >= gpus:
            lacking = f"process {local_rank + 1} of this machine has no GPU, as there are {gpus}"
            raise InputError(
                f"--device cuda: {lacking}; start as many processes as there are GPUs, or pass --device cpu"
            )
        if name == "cuda":
            torch.cuda.set_device(local_rank)

    if name == "auto":  # as fastai's `default_device`, which would take longer to import than torch
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails for "meta" as well
    except (RuntimeError, AssertionError) as e:  # an unknown name, or one that this torch or machine lacks
        names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        names += ["mps"] if torch.backends.mps.is_available() else []
        if name in names or f"{name}:0" in names:  # one that is full or too old, for example
            raise InputError(f"--device {name}: {str(e).splitlines()[0]}; pass another device, or cpu") from e
        raise InputError(f"--device {name}: no such device here; this machine has {', '.join(names)}") from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # else pinned memory, which names no device, would use the first GPU, too
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def check_device(name: str, deterministic: bool, sync_bn: bool, compiled: bool) -> torch.device:
    """The device of that name, with torch's determinism set. Raises InputError for an option it does not support."""
    device = get_device(name)
    set_deterministic(deterministic, device)
    if sync_bn and device.type != "cuda":
        raise InputError("--sync-bn: torch has batch norm over several processes for GPUs alone; leave it out")
    if compiled:
        check_compiler(device)
    return device


def set_deterministic(on: bool, device: torch.device) -> None:
    """Make torch use deterministic algorithms only, if `on`. On a CPU, training always does.

    Raises InputError for a device on which torch lacks them.
    """
    if on and device.type == "mps":
        raise InputError("--deterministic: torch has no deterministic max-pooling on mps; leave it out")
    on = on and device.type == "cuda"
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)  # cuBLAS reads it once, at its first product
    if on != torch.are_deterministic_algorithms_enabled():  # the next line takes more than a second for imports
        torch.use_deterministic_algorithms(on)


def check_compiler(device: torch.device) -> None:
    """Raise InputError if torch.compile does not work on `device`, for want of a compiler for example."""
    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise InputError(f"--compile: torch.compile does not work here; leave it out ({str(e).splitlines()[0]})") from e
