"""Measure quality and scale of Semantic IDs: codebooks on Amazon Beauty, assignment on planted millions of items.

    python jobs/benchmarks/semantic_ids.py --beauty "$TIGER_DATA/beauty" --json semantic_ids.json
    python jobs/benchmarks/semantic_ids.py --sizes 1000000,10000000 --json semantic_ids_scale.json

Both parts may run at once. Beauty: MiniLM embeddings and the settings of `jobs/amazon.yaml`. Planted: int64
ids, 128 dimensions, three levels of 256 true codewords, uniform; about 5 KB of disk per ten items.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from results import Claims

from tiger_ray.settings.loading import load_settings
from tiger_ray.settings.settings import Settings

DIM = 128
ROWS_PER_SHARD = 125_000
NEW_ITEMS = 10_000
PLANTED_QUANTIZER: dict[str, Any] = {"kind": "residual_kmeans", "num_iterations": 10, "sample_size": 100_000}
CONFIG = Path(__file__).parents[1] / "amazon.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file to write the claims to")
    parser.add_argument("--beauty", help="folder with items.parquet; left out, that part is not run")
    parser.add_argument("--embeddings", help=".npy file that keeps the embeddings of Beauty between runs")
    parser.add_argument("--sizes", default="", help="planted catalogs, for example 1000000,10000000")
    parser.add_argument("--repeats", type=int, default=3, help="assignments per size")
    parser.add_argument("--root", help="working folder; left out, a temporary one")
    words = parser.parse_args()
    claims = Claims()
    if words.beauty:
        measure_beauty(claims, Path(words.beauty), words.embeddings)
    if words.sizes:
        with tempfile.TemporaryDirectory() as folder:
            measure_scale(
                claims, [int(size) for size in words.sizes.split(",")], words.repeats, words.root or folder
            )
    claims.write(words.json)


# Beauty


def measure_beauty(claims: Claims, folder: Path, kept: str | None) -> None:
    """Quality of the codebooks; no Ray."""
    from tiger_ray.ids import quantizers

    os.environ["TIGER_DATA"] = str(folder.parent)
    base = load_settings(["--config", str(CONFIG), "--date", "2026-01-01"])
    claims.settings["beauty"] = {
        **{name: getattr(base, name).model_dump(mode="json") for name in ("embeddings", "quantizer")},
        "seed": 0,
    }
    embedding_ND, category_N = beauty(base, folder, kept)
    fitted = {}
    for kind in ("rqvae", "residual_kmeans", "lsh", "random"):
        start = time.monotonic()
        settings = base.quantizer.model_copy(update={"kind": kind})
        fitted[kind] = quantizers.fit(settings, [embedding_ND], seed=0)
        seconds = time.monotonic() - start
        report = report_of(fitted[kind], embedding_ND, category_N)
        print(f"\n{kind}", flush=True)
        claims.add(f"fit_seconds_{kind}", seconds, "s, with two torch threads")
        levels = report["levels"]
        if kind in ("rqvae", "residual_kmeans"):
            prefix = "" if kind == "rqvae" else "residual_kmeans_"
            claims.add(f"{prefix}usage_min", min(level["used"] for level in levels), "codewords", "256")
            claims.add(
                f"{prefix}perplexity_min", min(level["perplexity"] for level in levels), "codewords", ">= 200"
            )
        target = {"rqvae": "<= 0.03", "residual_kmeans": "as low as it gets, 0.14 before"}.get(kind, "")
        claims.add(f"collision_share_{kind}", report["disambiguated_share"], "of items", target)
        error = report["sample"]["reconstruction_error"]
        claims.add(f"reconstruction_error_{kind}", error["seen"], "of variance")
        claims.add(f"reconstruction_error_unseen_{kind}", error["unseen"], "of variance")
        for level, (purity, chance) in enumerate(
            zip(report["sample"]["purity"], report["sample"]["purity_by_chance"], strict=True)
        ):
            claims.add(f"purity_{kind}_{level}", purity, f"of items; by chance {chance:.3f}")
        for level, covered in enumerate(report["sample"]["coverage"]):
            claims.add(f"coverage_unseen_{kind}_{level}", covered, "of unseen items")
    measure_variants(claims, base.quantizer, fitted["rqvae"], embedding_ND, category_N)
    print()
    settings = base.quantizer.model_copy(update={"kind": "residual_kmeans"})
    claims.add(
        "distortion_ratio_faiss",
        faiss_ratios(fitted["residual_kmeans"], settings, embedding_ND),
        "",
        "<= 1.01",
    )
    same = fit_in_two_processes(settings, embedding_ND).encode(embedding_ND) == fitted[
        "residual_kmeans"
    ].encode(embedding_ND)
    claims.add("two_workers_same_codes", float(same.all(axis=1).mean()), "of items", ">= 0.999")
    short = base.quantizer.model_copy(update={"num_epochs": 50})
    alone_curve, together_curve = list[str](), list[str]()
    quantizers.fit(short, [embedding_ND], seed=0, log=alone_curve.append)
    fit_in_two_processes(short, embedding_ND, together_curve)
    curves = np.array([[loss_of(line) for line in curve] for curve in (alone_curve, together_curve)])
    claims.add("two_workers_rqvae_loss_ratio", (curves[1] / curves[0]).tolist(), "", "1, within noise")


def measure_variants(
    claims: Claims, settings: Any, rqvae: Any, embedding_ND: np.ndarray, category_N: np.ndarray
) -> None:
    """Measure what each choice behind the two learned quantizers gains."""
    import torch

    from tiger_ray.ids import quantizers

    print("\nresidual_kmeans by principal components; rqvae by commitment weight", flush=True)
    for width in (embedding_ND.shape[1], 48, 24, 16):
        changed = settings.model_copy(update={"kind": "residual_kmeans", "latent_dim": width})
        report = report_of(quantizers.fit(changed, [embedding_ND], seed=0), embedding_ND, category_N)
        name = f"residual_kmeans_{width}_dims"
        claims.add(f"collision_share_{name}", report["disambiguated_share"], "of items")
        claims.add(
            f"perplexity_min_{name}", min(level["perplexity"] for level in report["levels"]), "codewords"
        )
        for who, error in report["sample"]["reconstruction_error"].items():
            claims.add(f"reconstruction_error_{who}_{name}", error, "of variance")
    paper = settings.model_copy(update={"commitment_weight": 0.25})
    report = report_of(quantizers.fit(paper, [embedding_ND], seed=0), embedding_ND, category_N)
    claims.add("collision_share_rqvae_commitment_0.25", report["disambiguated_share"], "of items")
    with torch.inference_mode():
        point_ND = rqvae.standardize(torch.from_numpy(embedding_ND[rqvae.was_learned_from(embedding_ND)]))
        error = (rqvae.decoder(rqvae.encoder(point_ND)) - point_ND).square().sum() / point_ND.square().sum()
    claims.add("reconstruction_error_rqvae_unquantized", error.item(), "of variance, standardized")


def beauty(settings: Settings, folder: Path, kept: str | None) -> tuple[np.ndarray, np.ndarray]:
    """MiniLM embeddings of all items, (N, D) float32, and the number of the category of each item, (N,)."""
    from tiger_ray.data import text
    from tiger_ray.ids.encoders import make_encoder

    items = pq.read_table(folder / "items.parquet")
    categories = [path[-1] if path else None for path in items.column("categories").to_pylist()]
    number_N = np.unique([str(category) for category in categories], return_inverse=True)[1]
    number_N[[category is None for category in categories]] = -1
    if kept and Path(kept).exists():
        return np.load(kept).astype(np.float32), number_N
    texts = text.item_text(items, settings.catalog).to_pylist()
    embedding_ND = make_encoder(settings.embeddings).encode(texts)
    if kept:
        np.save(kept, embedding_ND)
    return embedding_ND, number_N


def report_of(quantizer: Any, embedding_ND: np.ndarray, category_N: np.ndarray) -> dict[str, Any]:
    """The ID report of all items, as a night writes the report."""
    from tiger_ray.ids import report as ids_report
    from tiger_ray.ids import semantic_ids

    item_id = pa.array(np.arange(len(embedding_ND)))
    codewords_NL = quantizer.encode(embedding_ND, item_id)
    level_sizes = (*quantizer.level_sizes, 256)
    segment = semantic_ids.assign(None, item_id, codewords_NL, level_sizes)
    counts = ids_report.count_codes(semantic_ids.codes_of(segment, level_sizes), level_sizes)
    error_N = np.square(quantizer.reconstruct(codewords_NL) - embedding_ND).sum(axis=1)
    variance = float(np.square(embedding_ND - quantizer.mean_D.numpy()).sum(axis=1).mean())
    seen_N = quantizer.was_learned_from(embedding_ND)
    sample = ids_report.sample_report(codewords_NL, level_sizes, category_N, error_N, variance, seen_N)
    return {**ids_report.id_report(counts), "sample": sample}


def faiss_ratios(quantizer: Any, settings: Any, embedding_ND: np.ndarray) -> list[float]:
    """Per level: distortion of our codebook over that of FAISS k-means, on the same residuals and steps."""
    import faiss
    import torch

    from tiger_ray.ids.quantizers.residual_kmeans import residual

    learned_ND = torch.from_numpy(embedding_ND[quantizer.was_learned_from(embedding_ND)])
    latent_NE = quantizer.standardize(learned_ND) @ quantizer.axes_DE
    ratios = []
    for level, codebook_CE in enumerate(quantizer.codebooks):
        before_NE = residual(latent_NE, quantizer.codebooks[:level])
        ours = residual(before_NE, [codebook_CE]).square().sum(dim=1).mean().item()
        theirs = faiss.Kmeans(
            before_NE.shape[1],
            len(codebook_CE),
            niter=settings.num_iterations,
            seed=1,
            max_points_per_centroid=1 << 30,
        )
        theirs.train(before_NE.numpy())
        distance_N1, _ = theirs.index.search(before_NE.numpy(), 1)
        ratios.append(ours / float(distance_N1.mean()))
    return ratios


def fit_in_two_processes(settings: Any, embedding_ND: np.ndarray, lines: list[str] | None = None) -> Any:
    """The quantizer that two processes fit, each with half of the items."""
    import torch.multiprocessing

    from tiger_ray.ids import quantizers

    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/embedding.npy", embedding_ND)
        torch.multiprocessing.spawn(_fit_half, (settings, folder), nprocs=2)
        if lines is not None:
            lines += Path(folder, "log").read_text().splitlines()
        names = ("quantizer.safetensors", "quantizer.json")
        return quantizers.load({name: Path(folder, name).read_bytes() for name in names})


def _fit_half(rank: int, settings: Any, folder: str) -> None:
    import torch.distributed as dist

    from tiger_ray.ids import quantizers

    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    half_ND = np.load(f"{folder}/embedding.npy")[rank::2].copy()
    lines: list[str] = []
    files = quantizers.fit(settings, [half_ND], seed=0, log=lines.append).to_files()
    if rank == 0:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        Path(folder, "log").write_text("\n".join(lines))
    dist.destroy_process_group()


def loss_of(line: str) -> float:
    """The training loss in a line of progress."""
    return float(line.split("loss ")[1].split(",")[0])


# Planted millions


def measure_scale(claims: Claims, sizes: list[int], repeats: int, root: str) -> None:
    """Time and memory of encoding, collisions and registry; memory is the largest private memory of any process."""
    import ray

    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.cluster.connect import connect
    from tiger_ray.published import semantic_ids as published_ids
    from tiger_ray.settings.ray import RaySettings

    connect(RaySettings())
    claims.settings["planted"] = {
        **{"sizes": sizes, "repeats": repeats, "dim": DIM, "rows_per_shard": ROWS_PER_SHARD},
        "quantizer": PLANTED_QUANTIZER,
    }
    seconds, peaks = dict[int, list[float]](), dict[int, list[float]]()
    for items in sizes:
        night = partial(planted_night, Storage(f"{root}/{items}"), max(1, items // ROWS_PER_SHARD))
        # The first assignment warms up the workers, so that the start of processes and imports are not measured.
        for repeat in range(repeats + 1):
            with watch_memory() as watch:
                # Another size of the disambiguator starts a new ID space, so every item is assigned again.
                result = night(f"2026-01-{1 + repeat:02d}", items, 300 + repeat)
            if repeat:
                seconds.setdefault(items, []).append(result.seconds)
                peaks.setdefault(items, []).append(watch.peak_mib)
        metadata = result.manifest.metadata
        print(f"{items:,} items: {result.manifest.metadata['summary']}", flush=True)
        claims.add(f"assign_seconds_{items}", seconds[items], "s")
        claims.add(f"peak_memory_{items}", peaks[items], "MiB of the largest process")
        assert metadata["items"] == items
    largest, smallest = max(sizes), min(sizes)
    if largest > smallest:
        ratios = [a / b for a, b in zip(seconds[largest], seconds[smallest], strict=True)]
        memory = [a / b for a, b in zip(peaks[largest], peaks[smallest], strict=True)]
        names = {1_000_000: "1m", 10_000_000: "10m"}
        suffix = f"{names.get(largest, largest)}_{names.get(smallest, smallest)}"
        claims.add(f"time_ratio_{suffix}", ratios, "", "<= 11")
        claims.add(f"peak_memory_ratio_{suffix}", memory, "", "1: flat")

    storage = Storage(f"{root}/{largest}")
    before = private_mib(os.getpid())
    ids = published_ids.load_semantic_ids(storage, result.manifest)
    loaded = (private_mib(os.getpid()) - before) * 2**20 / len(ids)
    claims.add("code_table_bytes_per_item", ids.codes_NI.nbytes / len(ids), "bytes", "8: four codes of 2")
    claims.add(
        "registry_private_bytes_per_item", loaded, "bytes, with one bit of eligibility, ids memory-mapped"
    )
    appended = planted_night(
        storage, max(1, largest // ROWS_PER_SHARD), "2026-02-01", largest + NEW_ITEMS, 300 + repeats
    )
    assert appended.manifest.metadata["new_items"] == NEW_ITEMS
    claims.add(
        "append_seconds_10k_to_10m" if largest == 10**7 else f"append_seconds_10k_to_{largest}",
        appended.seconds,
        "s",
    )
    ray.shutdown()


def planted_night(storage: Any, num_shards: int, date: str, items: int, disambiguator_size: int) -> Any:
    """Publish the inputs of a night if they are missing, and assign the Semantic IDs of the night."""
    from tiger_ray.stages import quantizer, semantic_ids
    from tiger_ray.stages.stage import run_stage

    settings = Settings(
        date=date,
        storage={"root": storage.root},
        catalog={"uri": "/planted", "num_shards": num_shards},
        events={"uri": "/planted"},
        quantizer=PLANTED_QUANTIZER,
        semantic_ids={"disambiguator_size": disambiguator_size},
    )
    inputs = {
        artifact: publish_planted(storage, artifact, settings, items, write)
        for artifact, write in (("catalog", write_catalog), ("embeddings", write_embeddings))
    }
    fitted = run_stage(quantizer.STAGE, settings, storage, embeddings=inputs["embeddings"])
    return run_stage(semantic_ids.STAGE, settings, storage, **inputs, quantizer=fitted.manifest)


def publish_planted(
    storage: Any, artifact: str, settings: Settings, items: int, write: Callable[..., Any]
) -> Any:
    """Publish the planted artifact of `items` items; on the first date a task per shard writes the files."""
    import ray

    from tiger_ray.cluster.shards import map_numbers

    fingerprint = f"planted-{items}"
    complete = storage.completed(artifact, fingerprint)
    if complete is not None:
        return storage.publish_again(complete, settings.date)
    run = storage.begin(artifact, fingerprint)
    entries = ray.get(
        map_numbers(settings.catalog.num_shards, partial(write, run, settings.catalog.num_shards, items))
    )
    catalog = {"items": items, "empty_text": 0, "available": items, "id_type": "int64"}
    own = catalog if artifact == "catalog" else {"encoder": "planted", "dim": DIM}
    facts = {"summary": f"{items:,} planted", **own}
    return storage.publish(
        run, date=settings.date, files=entries, settings=settings.resolved(), inputs={}, metadata=facts
    )


def shard_ids(num_shards: int, items: int, shard: int) -> np.ndarray:
    """Ids of the items of one shard, (M,) int64, in order."""
    from tiger_ray.core.hashing import shard_of, stable_hash

    parts = []
    for start in range(0, items, 1_000_000):
        ids = np.arange(start, min(start + 1_000_000, items))
        parts.append(ids[shard_of(stable_hash(pa.array(ids)), num_shards) == shard])
    return np.concatenate(parts)


def write_catalog(run: Any, num_shards: int, items: int, shard: int) -> Any:
    """Write one shard of the planted catalog."""
    from tiger_ray.artifacts.files import shard_name

    ids = shard_ids(num_shards, items, shard)
    category = pa.nulls(len(ids), pa.string())
    table = pa.table({"item_id": ids, "category": category, "available": np.ones(len(ids), bool)})
    return run.write_table(shard_name(shard), table)


def write_embeddings(run: Any, num_shards: int, items: int, shard: int) -> Any:
    """Write one shard of the planted embeddings: three levels of 256 codewords, and noise in all dimensions."""
    from tiger_ray.artifacts.files import shard_name
    from tiger_ray.core.hashing import splitmix64, stable_hash

    ids = shard_ids(num_shards, items, shard)
    key = stable_hash(pa.array(ids))
    rng = np.random.default_rng(0)
    # Few true dimensions, as in text embeddings: otherwise no codebook of this size could separate the items.
    codebook_LCD = (rng.normal(size=(3, 256, 12)) @ rng.normal(size=(12, DIM))).astype(np.float32)
    embedding = np.random.default_rng(shard).normal(scale=0.02, size=(len(ids), DIM)).astype(np.float32)
    for level in range(3):
        embedding += codebook_LCD[level][(splitmix64(key, level) % np.uint64(256)).astype(np.int64)]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), DIM)
    return run.write_table(shard_name(shard), pa.table({"item_id": ids, "embedding": vectors}))


class Watch:
    """The largest private memory of this process and all processes of Ray."""

    peak_mib = 0.0


@contextmanager
def watch_memory() -> Iterator[Watch]:
    """Read the memory of all processes five times per second."""
    watch, done = Watch(), threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
            ours = [pid for pid in pids if pid == os.getpid() or _command(pid).startswith(b"ray::")]
            watch.peak_mib = max([watch.peak_mib, *map(private_mib, ours)])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def private_mib(pid: int) -> float:
    """Memory that only this process has written, without the object store and mapped files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


if __name__ == "__main__":
    main()
