"""The base class of all quantizers: standardized input, batched encoding, and the two files of a quantizer.

N items, B items in batch, L levels, C codewords per level, D embedding width.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor, nn

from tiger_ray.core.hashing import row_hash
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.ids.quantizers.points import Points
from tiger_ray.settings.quantizer import QuantizerSettings

FORMAT_VERSION = 2


WEIGHTS_FILE = "quantizer.safetensors"


DESCRIPTION_FILE = "quantizer.json"


Ids: TypeAlias = pa.Array | pa.ChunkedArray
"""Item ids: string, large_string or int64."""


Log: TypeAlias = Callable[[str], None]
"""Is called with one line of progress at a time."""


BATCH_ROWS = 1024
"""Rows of each matrix product in `encode`. The shape is constant, so that batching changes no codeword."""


class Quantizer(nn.Module, ABC):
    """A frozen map from embeddings to codewords.

    A subclass adds its tensors as parameters or buffers, its constructor's arguments to `arguments()`, its
    learning as `fit`, and the maps `_codewords` and `_points` between standardized embeddings and codewords.

    Args:
        dim: embedding width D.
        level_sizes: codewords of each level (L,).

    >>> from tiger_ray.ids import quantizers
    >>> embedding_ND = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    >>> quantizer = quantizers.fit(QuantizerSettings(level_sizes=(4, 4)), [embedding_ND], seed=0)
    >>> quantizer.reconstruct(quantizer.encode(embedding_ND)).shape
    (200, 8)
    """

    kind: ClassVar[str]
    mean_D: Tensor
    scale_D: Tensor
    fit_keys: tuple[float, float] = (0.0, 0.0)
    """First hash and end of the hashes of embeddings in the sample of `fit`; see `was_learned_from`."""
    version: int = 1
    """`quantizer.version` of the fit: equal codebooks of two versions are two ID spaces."""

    def __init__(self, dim: int, level_sizes: Sequence[int]) -> None:
        super().__init__()
        self.dim = dim
        self.level_sizes = tuple(level_sizes)
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale_D", torch.ones(dim))

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments, ready for JSON."""
        return {"dim": self.dim, "level_sizes": list(self.level_sizes)}

    @classmethod
    @abstractmethod
    def fit(cls, settings: QuantizerSettings, points: Points, *, seed: int, log: Log) -> Self:
        """A quantizer learned from the points of all workers, equal on all workers.

        Args:
            settings: section `quantizer`.
            points: this worker's share of the standardized embeddings.
            seed: of all random choices.
            log: called with one line of progress at a time.
        """

    @abstractmethod
    def _codewords(self, point_BD: Tensor) -> Tensor:
        """Codewords (B, L) int64 of standardized embeddings (B, D)."""

    def _points(self, codewords_BL: Tensor) -> Tensor:
        """Standardized embeddings (B, D) of codewords: the mean, for kinds without a reconstruction."""
        return self.mean_D.new_zeros(len(codewords_BL), self.dim)

    def was_learned_from(self, embedding_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """True for an embedding of the sample of `fit`, (N,) bool; meaningful for items of the fitted catalog."""
        key_N, (first, end) = row_hash(embedding_ND), self.fit_keys
        return (key_N >= first) & (key_N < end)

    def standardize(self, embedding_BD: Tensor) -> Tensor:
        """Embeddings (B, D) with mean 0 and deviation 1 in every dimension; a constant dimension becomes 0."""
        return torch.where(self.scale_D > 0, (embedding_BD - self.mean_D) / self.scale_D, 0.0)

    @torch.inference_mode()
    def encode(
        self, embedding_ND: npt.NDArray[np.float32], item_id: Ids | None = None
    ) -> npt.NDArray[np.int16]:
        """Codewords of every item; they do not depend on the other items of the call.

        Args:
            embedding_ND: (N, D) float32.
            item_id: (N,) ids, for messages about bad rows and for the hashes of kind `random`.

        Returns:
            (N, L) int16.

        Raises:
            ArtifactError: the quantizer was fitted on embeddings of another width.
            DataError: an embedding holds NaN or infinity.
        """
        if embedding_ND.ndim != 2 or embedding_ND.shape[1] != self.dim:
            raise ArtifactError(
                f"the quantizer was fitted on embeddings of width {self.dim}, but these have shape "
                f"{embedding_ND.shape}; use the encoder it was fitted with (section embeddings), or fit a "
                "new quantizer by raising quantizer.version"
            )
        embedding_ND = finite_float32(embedding_ND, item_id)
        codewords_NL = np.empty((len(embedding_ND), len(self.level_sizes)), np.int16)
        for start in range(0, len(embedding_ND), BATCH_ROWS):
            rows_BD = embedding_ND[start : start + BATCH_ROWS]
            padded_BD = np.zeros((BATCH_ROWS, self.dim), np.float32)
            padded_BD[: len(rows_BD)] = rows_BD
            point_BD = self.standardize(torch.from_numpy(padded_BD).to(self.mean_D.device))
            codewords_BL = self._codewords(point_BD)[: len(rows_BD)]
            codewords_NL[start : start + BATCH_ROWS] = codewords_BL.to("cpu", torch.int16).numpy()
        return codewords_NL

    @torch.inference_mode()
    def reconstruct(self, codewords_NL: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Embeddings of codewords.

        Args:
            codewords_NL: (N, L) integer.

        Returns:
            (N, D) float32.
        """
        embedding_ND = np.empty((len(codewords_NL), self.dim), np.float32)
        for start in range(0, len(codewords_NL), BATCH_ROWS):
            codewords_BL = torch.from_numpy(codewords_NL[start : start + BATCH_ROWS].astype(np.int64))
            point_BD = self._points(codewords_BL.to(self.mean_D.device))
            embedding_BD = point_BD * self.scale_D + self.mean_D
            embedding_ND[start : start + BATCH_ROWS] = embedding_BD.cpu().numpy()
        return embedding_ND

    def to_files(self) -> dict[str, bytes]:
        """The quantizer as file name -> content: safetensors and a JSON description."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        description = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "arguments": self.arguments(),
            "fit_keys": self.fit_keys,
            "version": self.version,
        }
        return {
            WEIGHTS_FILE: safetensors.torch.save(tensors),
            DESCRIPTION_FILE: json.dumps(description, indent=2, sort_keys=True).encode(),
        }


def read_files(files: Mapping[str, bytes], kinds: Mapping[str, type[Quantizer]]) -> Quantizer:
    """The quantizer that `Quantizer.to_files` wrote.

    Args:
        files: file name -> content.
        kinds: value of `quantizer.kind` -> class.

    Raises:
        ArtifactError: a file is missing or damaged, or weights and description disagree; the message says where.
    """
    for name in (WEIGHTS_FILE, DESCRIPTION_FILE):
        if name not in files:
            raise ArtifactError(f"the quantizer has no file {name}; it has {sorted(files)}")
    try:
        description = json.loads(files[DESCRIPTION_FILE])
        found_version = description["format_version"]
        if found_version != FORMAT_VERSION:
            raise ArtifactError(
                f"{DESCRIPTION_FILE} has format_version {found_version!r}; this software reads {FORMAT_VERSION}. "
                "Fit a new quantizer by raising quantizer.version, or go back to the software that wrote it"
            )
        kind, arguments, version = (description[key] for key in ("kind", "arguments", "version"))
        first_key, end_key = map(float, description["fit_keys"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{DESCRIPTION_FILE} is damaged: {error!r}") from None
    if kind not in kinds:
        raise ArtifactError(
            f"{DESCRIPTION_FILE} names the kind {kind!r}; this software knows {sorted(kinds)}"
        )
    try:
        quantizer = kinds[kind](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{DESCRIPTION_FILE} does not describe a quantizer of kind {kind!r}: {error}"
        ) from None
    try:
        tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    except Exception as error:
        raise ArtifactError(f"{WEIGHTS_FILE} is damaged: {error}") from None

    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in quantizer.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ArtifactError(
                f"{WEIGHTS_FILE} does not fit {DESCRIPTION_FILE}: tensor {name} is "
                f"{found.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise ArtifactError(f"{WEIGHTS_FILE}: tensor {name} holds NaN or infinity")
    quantizer.load_state_dict(tensors)
    quantizer.fit_keys, quantizer.version = (first_key, end_key), int(version)
    return quantizer.requires_grad_(False).eval()


def finite_float32(embedding_ND: npt.NDArray[Any], item_id: Ids | None = None) -> npt.NDArray[np.float32]:
    """The embeddings as float32.

    Raises:
        DataError: an embedding holds NaN or infinity; the message names the first items.
    """
    embedding_ND = np.asarray(embedding_ND, np.float32)
    bad_N = ~np.isfinite(embedding_ND).all(axis=1)
    if bad_N.any():
        first = np.flatnonzero(bad_N)[:10].tolist()
        names = [str(row if item_id is None else item_id[row]) for row in first]
        raise DataError(
            f"{bad_N.sum()} of {len(bad_N)} embeddings hold NaN or infinity; first "
            f"{'rows' if item_id is None else 'items'}: {', '.join(names)}. Look at their text, or at the "
            "column named by catalog.vector"
        )
    return embedding_ND
