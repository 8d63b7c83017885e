"""The stages on Amazon Beauty; needs the variable TIGER_DATA, the folder that holds beauty/."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tiger_ray.data.histories import histories_of, prepare_events
from tiger_ray.data.text import clean_rows
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.settings.events import EventsSettings
from tiger_ray.settings.sequences import SequencesSettings

DATA = os.environ.get("TIGER_DATA")
pytestmark = pytest.mark.skipif(
    DATA is None, reason="TIGER_DATA is not set; it names the folder of the Amazon data"
)


def beauty(name: str) -> pa.Table:
    return pq.read_table(Path(DATA or "") / "beauty" / name)


def test_every_beauty_item_has_clean_text():
    settings = CatalogSettings(uri="unused", text=("title", "brand", "categories"), category="categories")
    items = clean_rows(beauty("items.parquet"), settings, pa.string(), None)

    assert items.num_rows == 12_101
    assert pc.all(pc.greater(pc.utf8_length(items.column("text")), 0)).as_py()
    assert not pc.any(pc.match_substring_regex(items.column("text"), r"&(amp|quot|#\d+);")).as_py()
    assert items.column("category").null_count == 0


def test_beauty_histories_are_the_published_sequences():
    events = beauty("interactions.parquet")
    item_id = pc.unique(events.column("item_id"))
    items = pa.table({"item_id": item_id, "tie": np.arange(len(item_id))})
    settings = EventsSettings(uri="unused", timestamp_unit="position"), SequencesSettings(num_shards=1)
    shuffled = events.take(np.random.default_rng(0).permutation(events.num_rows))

    histories, _ = histories_of(prepare_events(shuffled, *settings, items).drop_columns(["shard"]), 1000)

    assert histories.num_rows == 22_363
    ordered = events.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    expected = pc.index_in(ordered.column("item_id"), value_set=item_id).cast(pa.int32())
    assert histories.column("history").combine_chunks().flatten().equals(expected.combine_chunks())


def test_beauty_in_days_with_ties_by_position_gives_the_published_sequences():
    events = beauty("interactions.parquet")
    undated = pc.unique(events.filter(pc.is_null(events.column("unix_time"))).column("user_id"))
    dated = events.filter(pc.invert(pc.is_in(events.column("user_id"), value_set=undated)))
    assert len(undated) == 162
    item_id = pc.unique(events.column("item_id"))
    items = pa.table({"item_id": item_id, "tie": np.arange(len(item_id))})
    by_day = EventsSettings(
        uri="unused", timestamp="unix_time", timestamp_unit="s", ties="column", tie="timestamp"
    )
    shuffled = events.take(np.random.default_rng(0).permutation(events.num_rows))

    rows = prepare_events(shuffled, by_day, SequencesSettings(num_shards=1), items)
    histories, _ = histories_of(rows.drop_columns(["shard"]), 1000)

    whole = histories.filter(pc.invert(pc.is_in(histories.column("user_id"), value_set=undated)))
    ordered = dated.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    expected = pc.index_in(ordered.column("item_id"), value_set=item_id).cast(pa.int32())
    assert whole.num_rows == 22_363 - 162
    assert whole.column("user_id").combine_chunks().equals(pc.unique(ordered.column("user_id")))
    assert whole.column("history").combine_chunks().flatten().equals(expected.combine_chunks())
