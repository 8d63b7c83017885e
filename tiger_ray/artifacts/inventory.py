"""What lies below a root: artifacts with their dates, runs and bytes, and which files are damaged."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import InputFile
from tiger_ray.errors import ArtifactError

_OWN_FOLDERS = ("_runs", "_claims")
_PUBLISHED = re.compile(r"date=(\d{4}-\d{2}-\d{2})/_manifest\.json")
_READ_AT_ONCE = 8


@dataclass(frozen=True)
class Holding:
    """One artifact below a root.

    >>> held = Holding("catalog", ("2026-11-23",), runs=1, files=1, bytes=9, sizes={"_runs/5e3f/shard-00000.parquet": 9})
    >>> held.dates[-1]
    '2026-11-23'
    """

    artifact: str
    dates: tuple[str, ...]
    """Nights for which the artifact is published, in order."""
    runs: int
    """Runs that have files, published or not."""
    files: int
    bytes: int
    """Of all files, also those of unfinished runs."""
    sizes: dict[str, int]
    """Path relative to ROOT/<artifact> -> bytes, of all files."""


def holdings(storage: Storage) -> list[Holding]:
    """Every artifact below the root, by name, from one listing."""
    found: dict[str, list[InputFile]] = defaultdict(list)
    for file in storage.persist(lambda: storage.store.find("")):
        artifact, _, below = file.path.partition("/")
        if below:
            found[artifact].append(InputFile(below, file.bytes, file.version))
    ours = {
        artifact: files
        for artifact, files in found.items()
        if any(file.path.partition("/")[0] in _OWN_FOLDERS for file in files)
    }
    return [_holding(artifact, files) for artifact, files in sorted(ours.items())]


def _holding(artifact: str, files: Iterable[InputFile]) -> Holding:
    sizes = {file.path: file.bytes for file in files}
    dates = sorted(match[1] for path in sizes if (match := _PUBLISHED.fullmatch(path)))
    runs = {path.split("/")[1] for path in sizes if path.startswith("_runs/")}
    return Holding(artifact, tuple(dates), len(runs), len(sizes), sum(sizes.values()), sizes)


@dataclass(frozen=True)
class Verified:
    """What was compared with the manifests, and what differs from them."""

    files: int
    bytes: int
    damage: tuple[str, ...]
    """One sentence for each damaged file or manifest, with its address."""


def verify(storage: Storage, held: Iterable[Holding], *, digests: bool = False) -> Verified:
    """Compare the files of every published manifest with the manifest: present, of the size, of the digest.

    Args:
        storage: where the artifacts live.
        held: artifacts of `holdings` to compare.
        digests: read every file and compare its SHA-256 too.
    """
    damage, files, total = [], 0, 0
    with ThreadPoolExecutor(_READ_AT_ONCE) as threads:
        for holding in held:
            entries: dict[str, tuple[Manifest, FileEntry]] = {}
            for date in holding.dates:
                try:
                    manifest = storage.resolve(holding.artifact, date)
                except ArtifactError as error:
                    damage.append(str(error))
                    continue
                entries |= {entry.path: (manifest, entry) for entry in manifest.files}
            damage += _wrong_sizes(storage, holding, entries)
            if digests:
                whole = [
                    pair for pair in entries.values() if holding.sizes.get(pair[1].path) == pair[1].bytes
                ]
                damage += [
                    text for text in threads.map(lambda pair: _other_digest(storage, *pair), whole) if text
                ]
            files += len(entries)
            total += sum(entry.bytes for _, entry in entries.values())
    return Verified(files, total, tuple(damage))


def _wrong_sizes(
    storage: Storage, holding: Holding, entries: dict[str, tuple[Manifest, FileEntry]]
) -> Iterator[str]:
    for path, (manifest, entry) in entries.items():
        there = holding.sizes.get(path)
        if there != entry.bytes:
            what = "is missing" if there is None else f"has {there:,} bytes"
            yield (
                f"{storage.uri(f'{holding.artifact}/{path}')} {what}; the manifest of {manifest.date} says "
                f"{entry.bytes:,} bytes"
            )


def _other_digest(storage: Storage, manifest: Manifest, entry: FileEntry) -> str | None:
    try:
        storage.read_file(manifest, entry)
    except ArtifactError as error:
        return str(error)
    return None
