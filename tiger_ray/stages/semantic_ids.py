"""Embeddings -> Semantic IDs of the whole catalog, in an append-only registry.

Every night quantizes only the new items, with the same frozen quantizer. An item keeps its Semantic ID for ever,
even while the catalog lacks the item.

Artifact `semantic_ids`: `segment-*-shard-*.parquet` (item_index, item_id, codes), one set per append, never
rewritten; `counts-*.json`, items per code; `eligible.parquet`, one boolean per item_index, true if
tonight may recommend the item; `report-*.json`. The chain of appends has a head that moves by compare-and-swap, so
two nights that append at the same time append one after the other.

No process holds the whole catalog, except as counts and one bit per item. Catalog, embeddings and segments are
sharded by the same hash, so each shard needs only its own part of the registry. The shuffle that brings items of
equal codewords together moves only 12 bytes per new item.

M new items, N items before them, L levels, I = L + 1 codes of an item, D embedding width.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from tiger_ray.artifacts.faults import crash_point
from tiger_ray.artifacts.files import shard_number
from tiger_ray.artifacts.lineage import require_same_id_type, segments_of
from tiger_ray.artifacts.manifest import FileEntry, Manifest
from tiger_ray.artifacts.metadata import CatalogMetadata, QuantizerMetadata, RegistryMetadata
from tiger_ray.artifacts.run import Run
from tiger_ray.artifacts.schemas import matrix_of
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cluster.shards import map_numbers, plain_errors, write_partitions
from tiger_ray.errors import PublishError
from tiger_ray.ids import report as ids_report
from tiger_ray.ids import semantic_ids
from tiger_ray.ids.report import describe
from tiger_ray.published.semantic_ids import item_ids_of, newest_of
from tiger_ray.settings.settings import Settings
from tiger_ray.stages.stage import Computed, Context, Stage

log = logging.getLogger(__name__)

ROWS_PER_PARTITION = 1_000_000
"""New items of one partition of the shuffle: 12 MB."""


MAX_LOST_RACES = 10
"""Appends of other nights after which this night gives up."""


def _source(context: Context) -> dict[str, Any]:
    storage, settings = context.storage, context.settings
    digests = {name: manifest.digest for name, manifest in context.inputs.items()}
    space = _space(context.inputs["quantizer"], settings)
    head = storage.head("semantic_ids", space)
    answered = [storage.published("semantic_ids", settings.date), head]
    # Reuse the fingerprint of a link built from exactly these inputs, even if the chain has grown since.
    same = [link for link in answered if link is not None and link.inputs == digests]
    if settings.storage.replace:  # tonight replaces a damaged manifest, so do not build on that manifest
        same = [link for link in same if RegistryMetadata.fits(link)]
    if same:
        before = RegistryMetadata.of(same[0]).appended_to
    else:
        before = None if head is None else head.digest
    return {"registry": before, "space": space}


def _compute(run: Run, context: Context) -> Computed:
    source = context.source
    night = _Night(
        run, context.settings, context.storage, source["space"], source["registry"], **context.inputs
    )
    return night.compute()


@dataclass(frozen=True)
class _Night:
    """The stage `semantic_ids` of one night."""

    run: Run
    settings: Settings
    storage: Storage
    space: str
    before: str | None
    """Digest of the head when the night began."""
    catalog: Manifest
    embeddings: Manifest
    quantizer: Manifest

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return _level_sizes(self.quantizer, self.settings)

    @property
    def num_shards(self) -> int:
        return int(self.catalog.setting("catalog", "num_shards"))

    def compute(self) -> Computed:
        """Append the new items; if another night appends first, find out again which items are new."""
        for _ in range(MAX_LOST_RACES):
            head = self.storage.head("semantic_ids", self.space)
            if head is not None:
                require_same_id_type(self.catalog, head)
            link = self._append(head)
            if link is head or self.storage.move_head(self.space, head, link):
                crash_point("semantic_ids.appended")
                return self._files_and_facts(link)
        raise PublishError(
            f"other nights appended to registry {self.space} {MAX_LOST_RACES} times while this one tried; "
            "nothing was changed. Run the night again"
        )

    def _append(self, head: Manifest | None) -> Manifest:
        """Write tonight's new items and return the link behind the head; without new items return the head."""
        number = 0 if head is None else 1 + max(entry.fact("segment") for entry in segments_of(head))
        encode = _EncodeNewItems(self, head, number, self.run.finished())
        with plain_errors():
            encoded = ray.get(map_numbers(len(self.embeddings.files), encode))
        crash_point("semantic_ids.encoded")
        new_items = sum(entry.rows for entry in encoded)
        if head is not None and not new_items:
            return head
        items = 0 if head is None else RegistryMetadata.of(head).items
        firsts = items + np.cumsum([0, *(entry.rows for entry in encoded)])[:-1]
        shards = [
            _NewShard(entry, shard_number(source), int(first))
            for entry, source, first in zip(encoded, self.embeddings.files, firsts, strict=True)
        ]
        segment = self._disambiguate(head, number, items, shards)
        count = ray.remote(_report_on_worker)
        with plain_errors():
            counts, report = ray.get(count.remote(self, head, segment))
        for line in describe(report):
            log.info("semantic_ids: %s", line)
        ids_report.require_quality(report, self.settings.semantic_ids)
        files = [
            *(segments_of(head) if head is not None else []),
            *segment,
            # The number is needed: a run that loses a race writes these files again, and no file is overwritten.
            self.run.write_file(f"counts-{number:05d}.json", json.dumps(counts).encode()),
            self.run.write_file(f"report-{number:05d}.json", json.dumps(report, indent=2).encode()),
        ]
        return self.run.as_manifest(
            files,
            inputs=self._digests(),
            metadata={
                "items": items + new_items,
                "new_items": new_items,
                "disambiguated_share": report["disambiguated_share"],
                "level_sizes": list(self.level_sizes),
                "space": self.space,
                "item_id_type": CatalogMetadata.of(self.catalog).id_type,
                "appended_to": self.before,
            },
        )

    def _disambiguate(
        self, head: Manifest | None, number: int, items: int, shards: list[_NewShard]
    ) -> list[FileEntry]:
        """Bring items of equal codewords together, number the items, and write the next segment."""
        prefixes = map_numbers(len(shards), _NewPrefixes(self.run, shards))
        rows = sum(shard.entry.rows for shard in shards)
        if head is not None:
            touched = ray.remote(_touched_prefixes).remote(self.run, shards)
            prefixes += map_numbers(len(segments_of(head)), _OldPrefixes(self, head, touched))
        starts = [shard.first for shard in shards]
        dataset = ray.data.from_arrow_refs(prefixes)
        numbered = dataset.repartition(-(-rows // ROWS_PER_PARTITION) or 1, keys=["prefix"]).map_batches(
            _number_groups,
            fn_args=(items, starts, self.level_sizes),
            batch_size=None,
            batch_format="pyarrow",
        )
        # Add one sentinel row (item_index -1) per shard, so that shards without collisions still get a file.
        filled = np.array([place for place, shard in enumerate(shards) if shard.entry.rows])
        nothing = np.full(len(filled), -1)
        everyone = ray.data.from_arrow(_numbers(filled, nothing, nothing))
        return write_partitions(
            numbered.union(everyone),
            _WriteSegment(self, shards, number),
            num_shards=len(shards),
        )

    def _files_and_facts(self, link: Manifest) -> Computed:
        """All files and facts that the night publishes, after its items are in the chain."""
        bits = map_numbers(len(self.catalog.files), _Eligible(self, link))
        write = ray.remote(_write_eligible)
        with plain_errors():
            entry, eligible = ray.get(write.remote(self.run, segments_of(link), bits))
        ours = link.run_id == self.run.run_id
        known = RegistryMetadata.of(link)
        new_items, share = known.new_items if ours else 0, known.disambiguated_share
        return [*link.files, entry], {
            **link.metadata,
            "summary": f"{known.items:,} items, {new_items:,} new, {share:.1%} need the disambiguator",
            "new_items": new_items,
            "eligible": eligible,
            "appended_to": self.before,
        }

    def _digests(self) -> dict[str, str]:
        inputs = {"catalog": self.catalog, "embeddings": self.embeddings, "quantizer": self.quantizer}
        return {name: manifest.digest for name, manifest in inputs.items()}


@dataclass(frozen=True)
class _NewShard:
    """New items of one shard: item_id and prefix, in the order in which they are registered."""

    entry: FileEntry
    number: int
    first: int
    """item_index of its first item."""

    def prefixes(self, run: Run) -> npt.NDArray[np.int64]:
        return run.read_table(self.entry, columns=["prefix"]).column("prefix").to_numpy()


@dataclass(frozen=True)
class _EncodeNewItems:
    """Writes ids and prefixes of the items of one shard that the registry lacks."""

    night: _Night
    head: Manifest | None
    segment: int
    finished: dict[str, FileEntry]

    def __call__(self, number: int) -> FileEntry:
        # Import torch here: the import takes seconds, and most workers of this module need no torch.
        from tiger_ray.published.quantizer import load_quantizer

        night, storage = self.night, self.night.storage
        shard = night.embeddings.files[number]
        name = f"new-{self.segment:05d}-{shard.name}"
        if name in self.finished:
            return self.finished[name]
        item_id = storage.read_table(night.embeddings, shard, columns=["item_id"]).column("item_id")
        is_new = pa.chunked_array([pa.repeat(True, len(item_id))])
        if self.head is not None:
            old = _overlapping(self.head, shard_number(shard), night.num_shards)
            is_new = pc.invert(
                pc.is_in(item_id, value_set=item_ids_of(storage, self.head, old, item_id.type))
            )
        if not pc.any(is_new).as_py():  # frequent: do not read the embeddings, which are large
            nothing = {"item_id": pa.array([], item_id.type), "prefix": pa.array([], pa.int64())}
            return night.run.write_table(name, pa.table(nothing))
        table = storage.read_table(night.embeddings, shard, columns=["item_id", "embedding"]).filter(is_new)
        table = table.take(pa.array(semantic_ids.registration_order(table.column("item_id"))))
        item_id = table.column("item_id").combine_chunks()
        quantizer = load_quantizer(storage, night.quantizer)
        codewords_ML = quantizer.encode(matrix_of(table.column("embedding")), item_id)
        prefix_M = semantic_ids.prefixes(codewords_ML, night.level_sizes)
        return night.run.write_table(name, pa.table({"item_id": item_id, "prefix": prefix_M}))


@dataclass(frozen=True)
class _NewPrefixes:
    """Prefix and item_index of the new items of one shard."""

    run: Run
    shards: list[_NewShard]

    def __call__(self, number: int) -> pa.Table:
        shard = self.shards[number]
        prefix_M = shard.prefixes(self.run)
        item_index_M = np.arange(shard.first, shard.first + len(prefix_M), dtype=np.int32)
        return pa.table({"prefix": prefix_M, "item_index": item_index_M})


def _touched_prefixes(run: Run, shards: list[_NewShard]) -> npt.NDArray[np.int64]:
    """Sorted prefixes of all new items; only old items with such a prefix can collide tonight."""
    return np.unique(np.concatenate([np.unique(shard.prefixes(run)) for shard in shards]))


@dataclass(frozen=True)
class _OldPrefixes:
    """Prefix and item_index of the items of one file of the registry that new items may collide with."""

    night: _Night
    head: Manifest
    touched: ray.ObjectRef

    def __call__(self, number: int) -> pa.Table:
        entry, level_sizes = segments_of(self.head)[number], self.night.level_sizes
        segment = self.night.storage.read_table(self.head, entry, columns=["item_index", "codes"])
        codes_NI = semantic_ids.codes_of(segment, level_sizes)
        prefix_N = semantic_ids.prefixes(codes_NI[:, :-1], level_sizes)
        kept = np.flatnonzero(np.isin(prefix_N, ray.get(self.touched)))
        return pa.table({"prefix": prefix_N[kept], "item_index": segment["item_index"].to_numpy()[kept]})


def _number_groups(block: pa.Table, items: int, starts: list[int], level_sizes: tuple[int, ...]) -> pa.Table:
    """shard, item_index and disambiguator of the new items that are not the first of their prefix."""
    prefix = block.column("prefix").to_numpy()
    item_index = block.column("item_index").to_numpy()
    disambiguator = semantic_ids.disambiguators(prefix, item_index)
    new = item_index >= items
    semantic_ids.require_room(prefix[new], disambiguator[new], level_sizes)
    later = new & (disambiguator > 0)
    shard = np.searchsorted(starts, item_index[later], side="right") - 1
    return _numbers(shard, item_index[later], disambiguator[later])


def _numbers(shard: Any, item_index: Any, disambiguator: Any) -> pa.Table:
    return pa.table(
        {
            "shard": shard.astype(np.int32),
            "item_index": item_index.astype(np.int32),
            "disambiguator": disambiguator.astype(np.int16),
        }
    )


@dataclass(frozen=True)
class _WriteSegment:
    """Writes the new items of one shard with their Semantic IDs."""

    night: _Night
    shards: list[_NewShard]
    segment: int

    def __call__(self, numbers: pa.Table, place: int) -> FileEntry:
        night, shard = self.night, self.shards[place]
        table = night.run.read_table(shard.entry)
        disambiguator_M = np.zeros(table.num_rows, np.int16)
        numbers = numbers.filter(pc.field("item_index") >= 0)
        row = numbers.column("item_index").to_numpy() - shard.first
        disambiguator_M[row] = numbers.column("disambiguator").to_numpy()
        codewords_ML = semantic_ids.codewords_of(table.column("prefix").to_numpy(), night.level_sizes)
        segment = semantic_ids.segment_of(shard.first, table.column("item_id"), codewords_ML, disambiguator_M)
        return night.run.write_table(
            f"segment-{self.segment:05d}-shard-{shard.number:05d}.parquet",
            segment,
            facts={"segment": self.segment, "shard": shard.number, "shards": night.num_shards},
        )


@dataclass(frozen=True)
class _Eligible:
    """Finds the registered items that are available in one shard of tonight's catalog: one bit per item of each file of
    the registry that may hold items of the shard."""

    night: _Night
    link: Manifest

    def __call__(self, number: int) -> dict[str, npt.NDArray[np.uint8]]:
        night, shard = self.night, self.night.catalog.files[number]
        items = night.storage.read_table(night.catalog, shard, columns=["item_id", "available"])
        available = items.filter(pc.field("available")).column("item_id")
        entries = _overlapping(self.link, shard_number(shard), night.num_shards)
        # Search all files at once: each search hashes the whole shard, and every night adds a file.
        item_id = item_ids_of(night.storage, self.link, entries, available.type)
        found = pc.is_in(item_id, value_set=available).to_numpy()
        ends = np.cumsum([entry.rows for entry in entries])[:-1]
        return {
            entry.name: np.packbits(part) for entry, part in zip(entries, np.split(found, ends), strict=True)
        }


def _write_eligible(run: Run, segments: list[FileEntry], refs: list[ray.ObjectRef]) -> tuple[FileEntry, int]:
    bits = {entry.name: np.zeros(-(-entry.rows // 8), np.uint8) for entry in segments}
    for ref in refs:
        for name, packed in ray.get(ref).items():
            bits[name] |= packed
    eligible = np.concatenate(
        [np.unpackbits(bits[entry.name], count=entry.rows).astype(bool) for entry in segments]
    )
    return run.write_table("eligible.parquet", pa.table({"eligible": eligible})), int(eligible.sum())


def _report_on_worker(
    night: _Night, head: Manifest | None, segment: list[FileEntry]
) -> tuple[list[list[int]], dict[str, Any]]:
    """Items per code of the whole registry, and the ID report."""
    run, storage, level_sizes = night.run, night.storage, night.level_sizes
    counts = [np.zeros(size, np.int64) for size in level_sizes]
    if head is not None:
        counts = [np.array(level) for level in json.loads(storage.read_file(head, newest_of(head, "counts")))]
    for entry in segment:
        codes_MI = semantic_ids.codes_of(run.read_table(entry, columns=["codes"]), level_sizes)
        counts = [
            before + added
            for before, added in zip(counts, ids_report.count_codes(codes_MI, level_sizes), strict=True)
        ]
    sample = _sample_report(night, head, segment)
    report = {**ids_report.id_report(counts), "sample": sample}
    return [level.tolist() for level in counts], report


def _sample_report(night: _Night, head: Manifest | None, segment: list[FileEntry]) -> dict[str, Any]:
    """The ID report on the items of the first shards; a shard is a range of a hash, so a random part of the catalog.

    Shards are read whole, because the items of a shard are sorted by id.
    """
    from tiger_ray.published.quantizer import load_quantizer

    storage, size = night.storage, night.settings.semantic_ids.report_sample_size
    quantizer = load_quantizer(storage, night.quantizer)
    parts = list[tuple[Any, ...]]()
    for shard in night.embeddings.files:
        if sum(len(part[0]) for part in parts) >= size:
            break
        embedded = storage.read_table(night.embeddings, shard, columns=["item_id", "embedding"])
        item_id = embedded.column("item_id")
        codes, learned = _codes_by_id(night, head, segment, shard_number(shard), item_id)
        items = storage.read_table(night.catalog, shard.name, columns=["item_id", "category"])
        place = pc.index_in(item_id, value_set=items.column("item_id"))
        category = items.column("category").take(place)
        embedding_MD = matrix_of(embedded.column("embedding"))
        codewords_ML = np.ascontiguousarray(codes[:, :-1])
        error_M = np.square(quantizer.reconstruct(codewords_ML) - embedding_MD).sum(axis=1)
        variance_M = np.square(embedding_MD - quantizer.mean_D.numpy()).sum(axis=1)
        seen_M = learned & quantizer.was_learned_from(embedding_MD)
        parts.append((codewords_ML, category, error_M, variance_M, seen_M))
    codewords_ML, error_M, variance_M, seen_M = (
        np.concatenate([part[column] for part in parts]) for column in (0, 2, 3, 4)
    )
    category = pa.chunked_array([chunk for part in parts for chunk in part[1].chunks], pa.string())
    numbers = pc.fill_null(category.dictionary_encode().combine_chunks().indices, -1).to_numpy()
    return ids_report.sample_report(
        codewords_ML, night.level_sizes, numbers.astype(np.int64), error_M, float(variance_M.mean()), seen_M
    )


def _codes_by_id(
    night: _Night, head: Manifest | None, segment: list[FileEntry], shard: int, item_id: pa.ChunkedArray
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """Semantic IDs of items of one shard, (M, I), and whether the first append registered the item, (M,)."""
    link = night.run.as_manifest([*(segments_of(head) if head is not None else []), *segment])
    codes_MI = np.full((len(item_id), len(night.level_sizes)), -1, np.int16)
    first_M = np.zeros(len(item_id), bool)
    for entry in _overlapping(link, shard, night.num_shards):
        table = night.storage.read_table(link, entry, columns=["item_id", "codes"])
        place = pc.fill_null(pc.index_in(item_id, value_set=table.column("item_id")), -1).to_numpy()
        found = place >= 0
        codes_MI[found] = semantic_ids.codes_of(table, night.level_sizes)[place[found]]
        first_M[found] = entry.fact("segment") == 0
    assert (codes_MI >= 0).all(), "an item of the catalog is not in the registry"
    return codes_MI, first_M


def _space(quantizer: Manifest, settings: Settings) -> str:
    return f"{quantizer.digest[:32]}-{'x'.join(map(str, _level_sizes(quantizer, settings)))}"


def _level_sizes(quantizer: Manifest, settings: Settings) -> tuple[int, ...]:
    return (*QuantizerMetadata.of(quantizer).level_sizes, settings.semantic_ids.disambiguator_size)


def _overlapping(link: Manifest, shard: int, num_shards: int) -> list[FileEntry]:
    return [entry for entry in segments_of(link) if _overlap(shard, num_shards, entry)]


def _overlap(shard: int, num_shards: int, entry: FileEntry) -> bool:
    """True if a shard and a file of the registry, which may have another number of shards, can hold the same item."""
    first, shards = entry.fact("shard"), entry.fact("shards")
    return shard * shards < (first + 1) * num_shards and first * num_shards < (shard + 1) * shards


STAGE = Stage(
    name="semantic_ids",
    does="vectors and codebooks -> Semantic IDs, appended to the registry",
    inputs=("catalog", "embeddings", "quantizer"),
    sections=("semantic_ids",),
    source=_source,
    compute=_compute,
    format_version=2,
)
"""Publishes `semantic_ids`: the registry of this ID space, with tonight's new items appended.

Raises:
    CollisionError: more items share codewords than `semantic_ids.disambiguator_size`.
    QualityError: the IDs cannot tell items apart, by the thresholds of section `semantic_ids`.
"""
