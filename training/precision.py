"""The floating-point precision of a learner, on any device: fp32, or mixed precision with bf16 or fp16."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from fastai.callback import fp16
from fastai.learner import Learner
from fastcore.foundation import L
from torch.amp import GradScaler, autocast

from errors import InputError
from trained.classifier import without_tf32

PRECISIONS = ("fp32", "bf16", "fp16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# CPU features for bf16 products, by their names in `torch.cpu.get_capabilities`; the last is ARM's
BF16 = ("amx_bf16", "avx512_bf16", "bf16")


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic; elsewhere torch emulates it, which is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; Volta and Turing emulate it
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name) for name in BF16)
    return torch.cpu._is_avx512_bf16_supported()  # older torch; a CPU with AMX has this, too


def obstacle(precision: str, device: torch.device) -> str | None:
    """Why `device` should not compute in `precision`, None if it can."""
    if precision == "fp16" and device.type != "cuda":
        return f"fp16 on {device.type} is far slower than fp32"
    if precision == "bf16" and not has_bf16(device):
        return f"this {device.type} has no bf16, and to emulate it is slower than fp32"
    return None


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision, or for "auto" the fastest that the device has. Raises InputError if the device lacks it."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: it must be auto, {', '.join(PRECISIONS)}")
    if why := obstacle(precision, device):
        raise InputError(f"--precision {precision}: {why}; pass auto, or fp32")
    return precision


class MixedPrecision(fp16.MixedPrecision):
    """fastai's `MixedPrecision` for every device, not CUDA only, and with fp32 as a choice, on a GPU without TF32.

    A second one, added by `learn.to_fp16()` for example, is removed with a warning; its precision is taken over if the
    device has it. A pickled learner computes in fp32.
    """

    order = fp16.MixedPrecision.order - 1  # before fastai's, to remove it in time
    name = "autocast"  # with a `mixed_precision`, fastai's TensorBoardCallback refuses to draw the network

    def __init__(self, precision: str):
        self.precision, self.kwargs, self.contexts, self.fused = precision, {}, ExitStack(), None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "precision": "fp32", "contexts": ExitStack()}

    def before_fit(self):
        device = next(self.model.parameters()).device
        if why := obstacle(self.precision, device):  # the learner has been moved to another device
            warnings.warn(f"{why}: now in fp32", stacklevel=2)
            self.precision = "fp32"
        for other in [cb for cb in self.learn.cbs if isinstance(cb, fp16.MixedPrecision) and cb is not self]:
            wanted = getattr(other, "precision", None) or other.amp_mode.value
            self.kwargs |= other.kwargs
            other.run = False  # the current event is still to reach it
            self.learn.remove_cb(other)
            self.learn.autocast = self
            if wanted != self.precision:
                why = obstacle(wanted, device)
                warnings.warn(f"{why}: still in {self.precision}" if why else f"now in {wanted}, not {self.precision}",
                              stacklevel=2)  # fmt: skip
                self.precision = self.precision if why else wanted
        settings = {**self.kwargs, "enabled": self.precision == "fp16"}  # the others have the range of fp32
        self.learn.scaler, self.scales = GradScaler(device.type, **settings), L()
        self.fused = getattr(self.opt, "opt", None) if settings["enabled"] else None
        if not getattr(self.fused, "_step_supports_amp_scaling", False):
            self.fused = None
        for p in (p for group in self.fused.param_groups for p in group["params"]) if self.fused else ():
            # If the first step overflows and is skipped, the fused optimiser would leave them uninitialised.
            self.fused.state[p].setdefault("momentum_buffer", torch.zeros_like(p))

    def before_batch(self):
        mixed, device = self.precision in DTYPES, next(self.model.parameters()).device.type
        self.contexts.enter_context(autocast(device, DTYPES[self.precision]) if mixed else without_tf32())

    def after_loss(self):
        if self.precision in DTYPES:
            self.contexts.close()  # the backward pass uses the types of the forward pass by itself

    def before_step(self):
        if self.fused is None:
            super().before_step()
            return
        # fastai would read from the device whether gradients overflowed; a fused optimiser checks there by itself.
        self.scaler.unscale_(self.fused)
        self.fused.found_inf = sum(self.scaler._found_inf_per_device(self.fused).values())

    def after_step(self):
        super().after_step()
        if self.fused is not None:
            self.fused.found_inf = None

    def after_batch(self):
        self.contexts.close()

    def after_fit(self):
        self.learn.scaler, self.scales, self.fused = None, None, None


@contextmanager
def full_precision(learn: Learner) -> Iterator[None]:
    """Within this, `learn` computes in fp32, as its exported files do."""
    mixed = learn.cbs.filter(lambda cb: isinstance(cb, fp16.MixedPrecision))
    with learn.removed_cbs(mixed), learn.added_cbs(MixedPrecision("fp32")):
        yield
