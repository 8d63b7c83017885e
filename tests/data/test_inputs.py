"""What is known of an input from its footers alone, and what is refused."""

import re
import threading

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from tiger_ray.artifacts import s3
from tiger_ray.artifacts.store import InputFile
from tiger_ray.cluster.reading import _damage, name_bad_file
from tiger_ray.data import inputs
from tiger_ray.data.inputs import id_type, list_inputs, read_input_schema
from tiger_ray.errors import DataError, StorageError


def test_footers_alone_tell_rows_missing_columns_and_mixed_types(tmp_path):
    pq.write_table(pa.table({"item_id": ["a"], "title": ["t"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"item_id": ["b", "c"], "title": ["t", "u"]}), tmp_path / "b.parquet")
    uri = str(tmp_path)
    schema, rows = read_input_schema(list_inputs(uri), uri, {"catalog.item_id": "item_id"})
    assert (schema.names, rows) == (["item_id", "title"], 3)
    with pytest.raises(
        DataError,
        match=r"a\.parquet \(1 rows\) has no column 'titel', which catalog\.text\[0\] names; did you mean 'title'",
    ):
        read_input_schema(list_inputs(uri), uri, {"catalog.text[0]": "titel"})
    message = r"has no column 'x', which catalog\.text\[0\] names\. It has: item_id, title$"
    with pytest.raises(DataError, match=message):
        read_input_schema(list_inputs(uri), uri, {"catalog.text[0]": "x"})
    pq.write_table(pa.table({"item_id": [1], "title": ["t"]}), tmp_path / "c.parquet")
    with pytest.raises(
        DataError, match=r"'item_id' is int64 in .*c\.parquet \(1 rows\), but string in .*a\.parquet"
    ):
        read_input_schema(list_inputs(uri), uri, {"catalog.item_id": "item_id"})


def test_footers_of_many_files_are_read_at_once(tmp_path, monkeypatch):
    """Each waits here until four are being read, which one after the other would never come to pass."""
    for number in range(8):
        pq.write_table(pa.table({"item_id": [number]}), tmp_path / f"{number}.parquet")
    four, read = threading.Barrier(4), pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda source: (four.wait(timeout=20), read(source))[1])
    uri = str(tmp_path)
    assert read_input_schema(list_inputs(uri), uri, {"catalog.item_id": "item_id"})[1] == 8


def test_of_two_bad_files_the_first_is_named(tmp_path):
    for number in range(100):
        (tmp_path / f"{number:02}.parquet").write_bytes(b"no Parquet")
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "00.parquet")
    uri = str(tmp_path)
    with pytest.raises(DataError, match=r"01\.parquet is not a readable Parquet file \(10 bytes\)"):
        read_input_schema(list_inputs(uri), uri, {"catalog.item_id": "item_id"})


def test_a_dictionary_is_its_values_however_wide_its_indices_are(tmp_path):
    for name, width in (("a", pa.int8()), ("b", pa.int16())):
        ids = pa.DictionaryArray.from_arrays(pa.array([0, 1], width), pa.array(["x", "y"]))
        pq.write_table(pa.table({"item_id": ids}), tmp_path / f"{name}.parquet")
    uri = str(tmp_path)
    schema, rows = read_input_schema(list_inputs(uri), uri, {"catalog.item_id": "item_id"})
    assert (id_type(schema, "item_id", uri), rows) == (pa.string(), 4)


@pytest.mark.parametrize("wrong", [pa.float64(), pa.binary(), pa.timestamp("s"), pa.int32()], ids=str)
def test_an_id_of_any_other_type_is_refused(wrong):
    with pytest.raises(
        DataError,
        match=rf"'item_id' of /catalog is {re.escape(str(wrong))}.* must be string, large_string or int64",
    ):
        id_type(pa.schema([("item_id", wrong)]), "item_id", "/catalog")


def test_an_error_that_is_not_the_inputs_is_raised_as_itself(tmp_path):
    pq.write_table(pa.table({"item_id": ["a"]}), tmp_path / "a.parquet")
    uri = str(tmp_path)
    files = list_inputs(uri)
    for error in (ZeroDivisionError("ours"), pa.ArrowInvalid("ours")):
        with pytest.raises(type(error), match="ours"), name_bad_file(files, uri, ["item_id"]):
            raise error
    with (
        pytest.raises(StorageError, match=r"reading .* failed, though every file can be read now: AWS Error"),
        name_bad_file(files, uri, ["item_id"]),
    ):
        raise OSError("AWS Error SLOW_DOWN")
    (tmp_path / "b.parquet").write_bytes(b"another")
    with (
        pytest.raises(DataError, match=r"changed while it was read: .*b\.parquet"),
        name_bad_file(files, uri, ["item_id"]),
    ):
        raise ZeroDivisionError("ours")
    with pytest.raises(DataError, match=r"changed while it was read"), name_bad_file(files, uri, ["item_id"]):
        pass


def test_a_store_that_throttles_while_damage_is_looked_for_is_asked_again(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    pq.write_table(pa.table({"item_id": ["a"]}), tmp_path / "bucket" / "a.parquet")
    store = s3.S3Store("bucket", "", 1.0)
    store._filesystem = pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())
    monkeypatch.setattr(inputs, "input_store", lambda uri: (store, "bucket", ""))
    answers = iter([OSError("AWS Error SLOW_DOWN during GetObject operation (HTTP status 503)")])
    read = pq.ParquetFile.iter_batches

    def throttled(*args, **more):
        for error in answers:
            raise error
        return read(*args, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", throttled)
    assert _damage(InputFile("bucket/a.parquet", 1, "1"), "s3://bucket", ["item_id"]) is None
    assert next(answers, None) is None
