"""What a precision of the settings means on the device at hand."""

from __future__ import annotations

import logging
import platform
from functools import cache
from typing import Literal

import torch

log = logging.getLogger(__name__)


Precision = Literal["fp32", "bf16"]


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """dtype of matrix products: the given precision, or fp32 on a device without bf16 instructions.

    Without these instructions, bf16 takes 5 times as long as fp32 on an Intel Xeon with AVX-512, and 30 to 80
    times as long on an AMD EPYC without AVX-512.
    """
    if precision == "fp32":
        return torch.float32
    return torch.bfloat16 if _multiplies_bf16(device.type) else torch.float32


@cache
def _multiplies_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        known = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        known = onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        if platform.machine() == "x86_64":  # oneDNN says yes to every AVX-512 CPU, because it emulates bf16
            known = known and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if not known:
        log.warning("this %s has no bf16 instructions; fp32 is used where bf16 was asked for", device_type)
    return known
