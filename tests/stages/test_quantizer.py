"""Workers that fit one quantizer together: each sees a share, and all end with the same codebooks."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tiger_ray.errors import DataError
from tiger_ray.ids import quantizers
from tiger_ray.settings.quantizer import QuantizerSettings

pytestmark = pytest.mark.ray


KMEANS = QuantizerSettings(kind="residual_kmeans", level_sizes=(24, 16, 8), latent_dim=6, num_iterations=20)
RQVAE = QuantizerSettings(
    kind="rqvae",
    level_sizes=(16, 16),
    hidden_dims=(32,),
    latent_dim=8,
    batch_size=256,
    num_epochs=40,
    learning_rate=5e-3,
)
CASES = {"residual_kmeans": KMEANS, "rqvae": RQVAE}


def embeddings() -> np.ndarray:
    """Groups of groups: (3000, 12) float32."""
    rng = np.random.default_rng(3)
    coarse, fine = rng.normal(size=(20, 12)) * 3, rng.normal(size=(60, 12))
    noise = rng.normal(size=(3000, 12)) * 0.3
    return (coarse[rng.integers(0, 20, 3000)] + fine[rng.integers(0, 60, 3000)] + noise).astype(np.float32)


def fit_as_worker(rank: int, num_workers: int, folder: str) -> None:
    """What each process runs; its share is cut unevenly, so that workers do not run in step by luck."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=num_workers)
    cuts = [0, 700, 1900, 3000]
    share = embeddings()[cuts[rank] : cuts[rank + 1] if rank + 1 < num_workers else 3000]
    for name, settings in CASES.items():
        lines: list[str] = []
        files = quantizers.fit(settings, np.array_split(share, 3), seed=0, log=lines.append).to_files()
        for file, data in files.items():
            Path(folder, f"{name}-{rank}-{file}").write_bytes(data)
        Path(folder, f"{name}-{rank}.log").write_text("\n".join(lines))
    dist.destroy_process_group()


def read(folder: Path, name: str, rank: int) -> dict[str, bytes]:
    files = ("quantizer.safetensors", "quantizer.json")
    return {file: (folder / f"{name}-{rank}-{file}").read_bytes() for file in files}


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what three processes wrote that fitted each case together."""
    folder = tmp_path_factory.mktemp("workers")
    start_processes(fit_as_worker, (3, str(folder)), 3, start_method="forkserver")
    return folder


def fit_with_nothing(rank: int, folder: str) -> None:
    """Two processes, and the second one has no item."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    share = embeddings()[: 3000 if rank == 0 else 0]
    with pytest.raises(
        DataError, match=r"of 2 workers 1 have no item to learn from .* quantizer\.num_workers"
    ):
        quantizers.fit(RQVAE, [share], seed=0)
    Path(folder, f"refused-{rank}").touch()
    dist.destroy_process_group()


def test_a_worker_without_items_is_an_error_on_all(tmp_path: Path) -> None:
    start_processes(fit_with_nothing, (str(tmp_path),), 2, start_method="forkserver")
    assert {path.name for path in tmp_path.glob("refused-*")} == {"refused-0", "refused-1"}


@pytest.mark.parametrize("name", CASES)
def test_all_workers_end_with_the_same_quantizer(three_workers: Path, name: str) -> None:
    assert read(three_workers, name, 0) == read(three_workers, name, 1) == read(three_workers, name, 2)


def test_three_workers_learn_the_codebooks_of_one_by_kmeans(three_workers: Path) -> None:
    alone = quantizers.fit(KMEANS, [embeddings()], seed=0)
    together = quantizers.load(read(three_workers, "residual_kmeans", 0))
    assert together.to_files()["quantizer.json"] == alone.to_files()["quantizer.json"]
    for tensor, expected in zip(together.state_dict().values(), alone.state_dict().values(), strict=True):
        np.testing.assert_allclose(tensor, expected, atol=1e-6)
    assert (together.encode(embeddings()) == alone.encode(embeddings())).mean() >= 0.999


def test_three_workers_lower_the_loss_of_rqvae_as_one_does(three_workers: Path) -> None:
    lines: list[str] = []
    quantizers.fit(RQVAE, [embeddings()], seed=0, log=lines.append)
    alone, together = (
        [float(line.split("loss ")[1].split(",")[0]) for line in some]
        for some in (lines, (three_workers / "rqvae-0.log").read_text().splitlines())
    )
    assert len(alone) == len(together) == 4
    np.testing.assert_allclose(together, alone, rtol=0.1)
    assert together[-1] < 0.8 * together[0]


class Lazy(Sequence[np.ndarray]):
    """Blocks made when asked for, that count how many of them exist at once."""

    def __init__(self, blocks: list[np.ndarray]) -> None:
        self._blocks, self.alive, self.most, self.reads = blocks, 0, 0, 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: Any) -> Any:
        if number >= len(self):
            raise IndexError
        block = self._blocks[number].copy()
        self.alive += 1
        self.reads += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(block, self._gone)
        return block

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("name", CASES)
def test_a_share_may_be_larger_than_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiger_ray.ids.quantizers.points.WINDOW_ROWS", 300)
    blocks = Lazy(np.array_split(embeddings(), 15))
    nothing_kept = CASES[name].model_copy(update={"memory_mb_per_worker": 0})
    streamed = quantizers.fit(nothing_kept, blocks, seed=0)
    assert blocks.reads > 3 * 15, "none is kept, so each pass reads all of them again"
    assert blocks.most <= 3, "of 15"
    assert len(np.unique(streamed.encode(embeddings()), axis=0)) > 100
