"""The published quantizer, read without Ray."""

from __future__ import annotations

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.ids import quantizers
from tiger_ray.ids.quantizers import base

QUANTIZER_FILES = ("quantizer.safetensors", "quantizer.json")


def load_quantizer(storage: Storage, manifest: Manifest) -> base.Quantizer:
    """The published quantizer, checked."""
    return quantizers.load({name: storage.read_file(manifest, name) for name in QUANTIZER_FILES})
