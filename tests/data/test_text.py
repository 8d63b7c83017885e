"""Whatever a catalog column looks like, an item gets one clean text, and its id stays as it was."""

import html
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.artifacts import schemas
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.data.catalog import require_readable
from tiger_ray.data.text import clean_rows, item_text, plain_text
from tiger_ray.errors import DataError
from tiger_ray.settings.catalog import CatalogSettings


def catalog_settings(**changed):
    return CatalogSettings(uri="/catalog", **changed)


def plain(values, type=None):
    return plain_text(pa.chunked_array([pa.array(values, type)])).to_pylist()


def text(columns, **changed):
    return item_text(pa.table(columns), catalog_settings(**changed)).to_pylist()


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("&quot;Neo&quot; &#39;n&#x27; Trinity &lt;3", "\"Neo\" 'n' Trinity <3"),
        ("caf&eacute; AT&T", "café AT&T"),  # a lone ampersand stays
        ("Salt &amp;amp; Pepper", "Salt & Pepper"),  # escaped once too often
        ("  two\t words\r\n", "two words"),
        ("a&nbsp;&nbsp;b\u00a0", "a b"),  # what HTML calls a space is one
        ("", None),
        (" \t\n", None),
        ("&nbsp;", None),
        (None, None),
        ("naïve 日本語 🎈", "naïve 日本語 🎈"),
    ],
)
def test_text_is_unescaped_and_its_whitespace_collapsed(raw, clean):
    assert plain([raw], pa.string()) == [clean]


def test_unescaping_one_row_leaves_its_neighbours_alone():
    assert plain(["plain", "a &amp; b", None, "c &lt; d", ""]) == ["plain", "a & b", None, "c < d", None]


@pytest.mark.parametrize("make", [pa.list_, pa.large_list], ids=["list", "large_list"])
def test_lists_are_joined_from_the_general_to_the_special(make):
    rows = [["Books", "Sci &amp; Fi"], [], None, [""], ["  one "]]
    assert plain(rows, make(pa.string())) == ["Books > Sci & Fi", None, None, None, "one"]


def test_a_null_within_a_list_does_not_take_the_others_with_it():
    assert plain([["a", None, "b"], [None], ["c", " "]]) == ["a > b", None, "c"]


def test_numbers_become_text():
    assert plain([[1, 2], None], pa.list_(pa.int64())) == ["1 > 2", None]
    assert plain([7, None, -1], pa.int32()) == ["7", None, "-1"]


def test_a_dictionary_column_reads_as_its_values():
    column = pa.array(["x &amp; y", "z", None, "x &amp; y"]).dictionary_encode()
    assert plain_text(pa.chunked_array([column])).to_pylist() == ["x & y", "z", None, "x & y"]


@given(
    st.lists(st.none() | st.lists(st.sampled_from(["a", "b b", " c", "&amp;"]), max_size=3), max_size=12),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_slice_of_a_list_column_reads_as_the_same_rows_of_the_whole(rows, data):
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    column = pa.chunked_array([pa.array(rows, pa.list_(pa.string()))])
    assert plain_text(column[start:stop]).to_pylist() == plain_text(column).to_pylist()[start:stop]


pieces = st.sampled_from([*"a;lt&\t\n\u00a0", "&amp;", "&lt;", "&#39;", "&nbsp;"])


@given(st.lists(st.none() | st.lists(pieces, max_size=6).map("".join), max_size=10))
@settings(max_examples=60, deadline=None)
def test_plain_text_equals_unescaping_twice_and_splitting(values):
    def oracle(value):
        return " ".join(html.unescape(html.unescape(value)).split()) or None if value is not None else None

    assert plain(values, pa.string()) == [oracle(value) for value in values]


def test_text_without_a_template_labels_each_column_and_leaves_missing_ones_out():
    columns = {
        "title": ["Dune", "Emma", None],
        "brand": ["Ace", None, None],
        "category": [["a", "b"], [], None],
    }
    assert text(columns, text=("title", "brand", "category")) == [
        "title: Dune; brand: Ace; category: a > b",
        "title: Emma",
        "",
    ]


def test_a_template_is_filled_per_row_and_empty_where_all_its_columns_are():
    columns = {"title": ["Dune", "Emma", None], "brand": ["Ace", None, None]}
    filled = text(columns, text=("title", "brand"), template="{title}, by {brand} ({{new}})")
    assert filled == ["Dune, by Ace ({new})", "Emma, by  ({new})", ""]


def test_a_template_may_only_use_columns_of_the_text():
    with pytest.raises(
        ValueError, match=r"catalog\.template uses \{brand\}, which catalog\.text does not name"
    ):
        catalog_settings(template="{brand}")
    with pytest.raises(
        ValueError, match=r"catalog\.template '\{title' is not a format string: .*expected '\}'"
    ):
        catalog_settings(template="{title")
    for template in ("{title:>10}", "{title!r}"):
        with pytest.raises(ValueError, match=r"catalog\.template gives \{title\} a format"):
            catalog_settings(template=template)


@pytest.mark.parametrize(
    ("column", "type", "setting"),
    [
        ("title", pa.list_(pa.list_(pa.string())), {}),
        ("title", pa.struct([("en", pa.string())]), {}),
        ("title", pa.binary(), {}),
        ("kind", pa.list_(pa.struct([("en", pa.string())])), {"category": "kind"}),
        ("there", pa.string(), {"available": "there"}),
    ],
)
def test_a_column_that_cannot_be_read_is_refused_by_its_type(column, type, setting):
    fields = {"title": pa.string(), "kind": pa.string(), "there": pa.bool_(), column: type}
    schema = pa.schema(list(fields.items()))
    with pytest.raises(DataError, match=rf"column '{column}' of /catalog is {re.escape(str(type))}; "):
        require_readable(schema, catalog_settings(**setting))


def test_long_text_is_cut_by_characters_not_bytes():
    assert text({"title": ["é" * 50]}, max_text_chars=20) == ["title: " + "é" * 13]


def clean(columns, id_type=None, vector_type=None, **changed):
    table = pa.table(columns)
    return clean_rows(
        table, catalog_settings(**changed), id_type or table.schema.field("item_id").type, vector_type
    )


def test_columns_of_text_numbers_and_lists_of_them_are_read():
    columns = {
        "item_id": pa.array([7, 8]),
        "title": pa.array(["Dune", "Emma"]).dictionary_encode(),
        "brand": pa.array([["Ace", "Tor"], None], pa.large_list(pa.large_string())),
        "price": pa.array([1.5, None]),
        "kind": pa.array([["Books", "Novels"], []], pa.list_(pa.string())),
        "there": pa.array([1, 0], pa.int8()),
    }
    chosen = {"text": ("title", "brand", "price"), "category": "kind", "available": "there"}
    require_readable(pa.table(columns).schema, catalog_settings(**chosen))
    rows = clean(columns, **chosen)
    assert rows.column("text").to_pylist() == ["title: Dune; brand: Ace > Tor; price: 1.5", "title: Emma"]
    assert rows.column("category").to_pylist() == ["Novels", None]
    assert rows.column("available").to_pylist() == [True, False]


def test_cleaned_rows_have_the_schema_of_the_artifact_and_a_shard():
    table = clean({"item_id": ["b", "a"], "title": ["One", None]}, num_shards=3)
    assert table.drop_columns(["shard"]).schema == schemas.catalog(pa.string())
    assert table.column("title").to_pylist() == ["One", None]
    assert table.column("text").to_pylist() == ["title: One", ""]
    assert table.column("available").to_pylist() == [True, True]
    assert table.column("category").to_pylist() == [None, None]
    assert table.column("shard").to_pylist() == shard_of(stable_hash(pa.array(["b", "a"])), 3).tolist()


def test_the_category_is_the_deepest_entry_and_an_item_of_unknown_availability_is_not_available():
    table = clean(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["t"] * 4,
            "path": [["Books", "Sci &amp; Fi"], [], None, ["Toys"]],
            "in_stock": [True, False, None, True],
        },
        category="path",
        available="in_stock",
    )
    assert table.column("category").to_pylist() == ["Sci & Fi", None, None, "Toys"]
    assert table.column("available").to_pylist() == [True, False, False, True]


def test_the_deepest_category_of_a_slice_is_that_of_the_whole():
    whole = pa.table(
        {"item_id": list("abcd"), "title": ["t"] * 4, "path": [["x", "y"], None, ["z"], ["p", "q", "r"]]}
    )
    chosen = catalog_settings(category="path")
    assert clean_rows(whole[1:], chosen, pa.string(), None).column("category").to_pylist() == [None, "z", "r"]


def test_vectors_pass_as_float32():
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6.0)), 3)
    table = clean(
        {"item_id": ["a", "b"], "title": ["t", "u"], "v": vector},
        vector="v",
        vector_type=pa.list_(pa.float32(), 3),
    )
    assert table.column("vector").type == pa.list_(pa.float32(), 3)
    assert table.column("vector").to_pylist() == [[0, 1, 2], [3, 4, 5]]


def test_a_null_id_is_refused():
    with pytest.raises(DataError, match=r"1 of 2 rows .* have a null 'item_id'; every item needs an id"):
        clean({"item_id": ["a", None], "title": ["t", "u"]})


weird_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # Arrow strings hold no surrogates


@given(
    st.lists(weird_text | st.sampled_from(["", " a ", "\u0000", "a\u0301", "\u00e1", "&amp;", "\U0010ffff"]))
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("id_type", [pa.string(), pa.large_string()], ids=str)
def test_text_ids_keep_type_and_bytes(id_type, ids):
    table = clean({"item_id": pa.array(ids, id_type), "title": pa.array(["t"] * len(ids), pa.string())})
    assert table.column("item_id").type == id_type
    assert table.column("item_id").to_pylist() == ids


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-(2**63), 2**63 - 1, 2**53 + 1, 0])))
@settings(max_examples=60, deadline=None)
def test_int64_ids_keep_type_and_value(ids):
    table = clean({"item_id": pa.array(ids, pa.int64()), "title": pa.array(["t"] * len(ids), pa.string())})
    assert table.column("item_id").type == pa.int64()
    assert table.column("item_id").to_pylist() == ids


def test_an_id_behind_a_dictionary_is_read_as_its_value():
    ids = pa.array(["b", "a", "b"]).dictionary_encode()
    table = clean({"item_id": ids, "title": ["t", "u", "v"]}, id_type=pa.string())
    assert table.column("item_id").to_pylist() == ["b", "a", "b"]


def test_the_shard_of_an_item_depends_on_its_id_alone():
    ids = [f"item-{n}" for n in range(50)]
    one = clean({"item_id": ids, "title": ["t"] * 50})
    other = clean({"item_id": ids[::-1], "title": ["u"] * 50})
    assert one.column("shard").to_pylist() == other.column("shard").to_pylist()[::-1]


def test_the_hash_of_an_id_is_the_same_in_every_release():
    """Shards, user buckets and samples of published artifacts hang on these numbers."""
    assert stable_hash(pa.array(["", "a", "日本"])).tolist() == STRING_HASHES
    assert stable_hash(pa.array([0, 1, -(2**63)])).tolist() == INT_HASHES
    assert stable_hash(pa.array(["a"], pa.large_string())).tolist() == STRING_HASHES[1:2]


STRING_HASHES = [1760245841805064774, 13950350942979735504, 17040212410883982529]
INT_HASHES = [0, 6238072747940578789, 2720858781877447050]
