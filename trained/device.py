"""The device to compute on: chosen, checked, and how repeatable it is to be."""

import os

import torch

from errors import InputError

CUBLAS_WORKSPACE = ":4096:8"  # else cuBLAS may sum in a changing order


def get_device(name: str) -> torch.device:
    """The torch device of that name, checked for being there; "auto" is the best one there is.

    Each of several processes on a machine has a GPU of its own, or all train on the CPU.
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

    if name == "auto":  # as fastai's `default_device`, whose import takes longer than torch's
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" can make it, but not say what is in it
    except (RuntimeError, AssertionError):  # an unknown name, and a known one that this torch or machine lacks
        names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        names += ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(f"--device {name}: no such device here; this machine has {', '.join(names)}") from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # else what names no device, as pinned memory, takes a part of the first GPU
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def check_device(name: str, deterministic: bool, sync_bn: bool, compiled: bool) -> torch.device:
    """The device of that name, and what torch is to do there set. Raises InputError for what it cannot do there."""
    device = get_device(name)
    set_deterministic(deterministic, device)
    if sync_bn and device.type != "cuda":
        raise InputError("--sync-bn: torch has batch norm over several processes for GPUs alone; leave it out")
    if compiled:
        check_compiler(device)
    return device


def set_deterministic(on: bool, device: torch.device) -> None:
    """Have torch use nothing that can give two results. On a CPU a training has no such thing.

    Raises InputError for a device on which torch cannot.
    """
    if on and device.type == "mps":
        raise InputError("--deterministic: torch has no deterministic max-pooling on mps; leave it out")
    on = on and device.type == "cuda"
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)  # before the first product: read once
    if on != torch.are_deterministic_algorithms_enabled():  # the next line imports for more than a second
        torch.use_deterministic_algorithms(on)


def check_compiler(device: torch.device) -> None:
    """Raise InputError where torch.compile has no compiler for `device`."""
    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise InputError(f"--compile: torch.compile does not work here; leave it out ({str(e).splitlines()[0]})") from e
