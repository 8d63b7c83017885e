"""The checks over whole files judge as the stages do, and say of how many rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiger_ray.data.inputs import list_inputs
from tiger_ray.data.survey import survey_catalog, survey_events
from tiger_ray.errors import DataError
from tiger_ray.settings.catalog import CatalogSettings
from tiger_ray.settings.events import EventsSettings

ITEMS = pa.table({"item_id": ["a", "b", "c", "d", "e"], "title": ["One", "Two", None, "Four", "Five"]})
FIRST = 1_700_000_000
EVENTS = pa.table(
    {
        "user_id": ["u", "u", "v", "v", None, "w"],
        "item_id": ["a", "a", "b", "gone", "a", "c"],
        "timestamp": pa.array([FIRST, FIRST, FIRST + 1, FIRST + 2, FIRST, FIRST + 3], pa.timestamp("s")),
        "kind": ["buy", "buy", "buy", "buy", "buy", "view"],
    }
)


def written(folder: Path, table: pa.Table) -> str:
    """The table in two files, the first one with a row group for each two rows."""
    folder.mkdir(parents=True)
    pq.write_table(table[:4], folder / "0.parquet", row_group_size=2)
    pq.write_table(table[4:], folder / "1.parquet")
    return str(folder)


def catalog(uri: str, **changed: object) -> CatalogSettings:
    return CatalogSettings(uri=uri, **changed)


def events(uri: str, **changed: object) -> EventsSettings:
    return EventsSettings(uri=uri, **{"max_null_share": 1.0, "max_unknown_share": 1.0, **changed})


def test_a_catalog_is_counted_over_all_files_and_row_groups(tmp_path):
    uri = written(tmp_path / "c", ITEMS)
    found = survey_catalog(list_inputs(uri), catalog(uri))
    assert found.text == "all 5 ids, none null or twice; all 5 items: 5 available, 1 without text"
    assert found.item_ids.to_pylist() == ["a", "b", "c", "d", "e"]


def test_a_long_catalog_is_judged_by_its_first_rows_and_gives_no_ids(tmp_path):
    uri = written(tmp_path / "c", ITEMS)
    found = survey_catalog(list_inputs(uri), catalog(uri), max_ids=3, max_texts=2)
    assert found.text.startswith("the first 3 of 5 ids")
    assert "the first 2 of 5 items: 2 available, 0 without text" in found.text
    assert found.item_ids is None


def test_an_id_that_comes_twice_in_two_files_is_named(tmp_path):
    uri = written(tmp_path / "c", pa.concat_tables([ITEMS, ITEMS[1:2], ITEMS[1:2]]))
    with pytest.raises(
        DataError, match=r"2 rows of .* repeat an item id of another row, among them b; item ids must"
    ):
        survey_catalog(list_inputs(uri), catalog(uri))


def test_a_null_id_too_little_text_and_nothing_available_are_refused(tmp_path):
    nulls = ITEMS.set_column(0, "item_id", pa.array(["a", None, "c", "d", "e"]))
    uri = written(tmp_path / "null", nulls)
    with pytest.raises(DataError, match=r"1 of 5 rows of .* have a null 'item_id'"):
        survey_catalog(list_inputs(uri), catalog(uri))
    uri = written(tmp_path / "text", ITEMS)
    with pytest.raises(DataError, match=r"1 of 5 items of .* have no text in title; at most 10% may"):
        survey_catalog(list_inputs(uri), catalog(uri, max_empty_text_share=0.1))
    uri = written(tmp_path / "gone", ITEMS.append_column("there", pa.array([False] * 5)))
    with pytest.raises(DataError, match=r"none of the 5 items of .* is available \(there is never true\)"):
        survey_catalog(list_inputs(uri), catalog(uri, available="there"))


def test_events_are_counted_with_nulls_unknown_items_unwanted_kinds_and_repeats(tmp_path):
    uri = written(tmp_path / "e", EVENTS)
    ids = pa.chunked_array([ITEMS["item_id"].combine_chunks().cast(pa.large_string())])
    chosen = events(uri, event_type="kind", event_types=["buy"])
    assert survey_events(list_inputs(uri), chosen, ids).text == (
        "all 6 rows: 5 events of wanted kinds, 1 with a null, 1 of unknown items, 1 twice in one batch (they count once)"
    )
    assert "unknown items not counted (long catalog)" in survey_events(list_inputs(uri), chosen, None).text
    first = survey_events(list_inputs(uri), chosen, ids, max_events=3).text
    assert first.startswith(
        "the first 3 of 6 rows: 3 events of wanted kinds, 0 with a null, 0 of unknown items"
    )


def test_events_beyond_a_limit_are_refused_as_the_stage_does(tmp_path):
    uri = written(tmp_path / "e", EVENTS)
    ids = pa.chunked_array([ITEMS["item_id"].combine_chunks().cast(pa.large_string())])
    with pytest.raises(
        DataError, match=r"1 of 6 events of .* have a null in 'user_id', 'item_id' or 'timestamp'"
    ):
        survey_events(list_inputs(uri), events(uri, max_null_share=0.1), ids)
    with pytest.raises(
        DataError, match=r"1 of 5 events of .* name items that are not in the catalog, for example gone"
    ):
        survey_events(list_inputs(uri), events(uri, max_unknown_share=0.1), ids)


def test_dictionary_columns_are_read_as_their_values(tmp_path):
    coded = ITEMS.set_column(0, "item_id", ITEMS["item_id"].dictionary_encode())
    uri = written(tmp_path / "c", coded)
    assert survey_catalog(list_inputs(uri), catalog(uri)).item_ids.to_pylist() == ["a", "b", "c", "d", "e"]


def test_a_damaged_page_names_the_file(tmp_path):
    uri = written(tmp_path / "c", ITEMS)
    file = tmp_path / "c" / "1.parquet"
    data = bytearray(file.read_bytes())
    data[4:40] = bytes(36)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"row group 0 of .*1\.parquet cannot be read"):
        survey_catalog(list_inputs(uri), catalog(uri))
