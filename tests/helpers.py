"""Shared by the tests of the model: names, gradients, also of the official loop; memory."""

import re
from pathlib import Path

from checkpoint import rename_official

PARTS = ("img_enc", "txt_enc", "sim_enc")  # of tests/reference.py and of an official checkpoint

# Biases in front of a BatchNorm (their mean is subtracted again) or of a softmax: no gradient but
# rounding.
WITHOUT_GRADIENT = (".w.bias", "gate_fc.bias", "common.bias", "region_pooling.global_.bias")


def parts_of(module):
    """Of tests/reference.py its three parts."""
    return [getattr(module, part) for part in PARTS] if hasattr(module, PARTS[0]) else None


def state_of(module):
    """Parameters and buffers by name; those of tests/reference.py under our names."""
    parts = parts_of(module)
    return rename_official(*(p.state_dict() for p in parts)) if parts else dict(module.state_dict())


def grads_of(module):
    """Gradients by name; those of tests/reference.py under our names."""
    if parts := parts_of(module):
        return rename_official(*map(grads_of, parts))
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def resident(what="VmRSS"):
    """Megabytes (10⁶ bytes) of this process."""
    text = Path("/proc/self/status").read_text()
    return 1.024e-3 * int(re.search(rf"{what}:\s+(\d+) kB", text)[1])
