"""Semantic IDs are unique, never change, and do not depend on the order items arrive in."""

import random
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.errors import ArtifactError, CollisionError, DataError
from tiger_ray.semantic_ids import SemanticIds, assign, id_report

LEVEL_SIZES = (3, 2)
DISAMBIGUATOR_SIZE = 50
SIZES = (*LEVEL_SIZES, DISAMBIGUATOR_SIZE)


def registry_of(*segments, level_sizes=SIZES):
    return SemanticIds.from_segments(segments, level_sizes)


def assign_in_batches(batches, id_type=None):
    """The registry after one night per batch; a batch is a dict of item id -> codewords."""
    segments, registry = [], None
    for batch in batches:
        codewords_ML = np.array(list(batch.values()), np.int16).reshape(-1, len(LEVEL_SIZES))
        segments.append(assign(registry, pa.array(list(batch), id_type), codewords_ML, DISAMBIGUATOR_SIZE))
        registry = registry_of(*segments)
    return registry


def ids_by_item(registry):
    return dict(zip(registry.item_id.to_pylist(), map(tuple, registry.codes_NI.tolist()), strict=True))


codewords = st.tuples(*(st.integers(0, size - 1) for size in LEVEL_SIZES))
string_catalogs = st.dictionaries(st.text(max_size=5), codewords, min_size=1, max_size=40)
int_catalogs = st.dictionaries(st.integers(-(2**63), 2**63 - 1), codewords, min_size=1, max_size=40)


@given(st.one_of(string_catalogs, int_catalogs), st.data())
@settings(max_examples=40, deadline=None)
def test_growing_the_catalog_in_any_steps_never_changes_an_id_and_never_repeats_one(catalog, data):
    id_type = pa.int64() if isinstance(next(iter(catalog)), int) else pa.large_string()
    items = list(catalog.items())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=3)))
    segments, registry = [], None
    for end in [*cuts, len(items)]:
        night = dict(items[:end])  # the whole catalog of that night, old items too
        codewords_ML = np.array(list(night.values()), np.int16).reshape(-1, 2)
        segments.append(assign(registry, pa.array(list(night), id_type), codewords_ML, DISAMBIGUATOR_SIZE))
        before, registry = registry, registry_of(*segments)
        if before is not None:
            assert registry.codes_NI[: len(before)].tolist() == before.codes_NI.tolist()
            assert registry.item_id.to_pylist()[: len(before)] == before.item_id.to_pylist()
    assert len(np.unique(registry.codes_NI, axis=0)) == len(registry) == len(catalog)
    assert {item: code[:-1] for item, code in ids_by_item(registry).items()} == catalog


@given(string_catalogs, st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_input_rows_does_not_matter(catalog, rng):
    items = list(catalog.items())
    rng.shuffle(items)
    assert assign_in_batches([catalog]).item_id.equals(assign_in_batches([dict(items)]).item_id)
    assert ids_by_item(assign_in_batches([catalog])) == ids_by_item(assign_in_batches([dict(items)]))


def test_disambiguators_equal_a_plain_loop_over_items():
    rng = random.Random(0)
    nights = [
        {f"item-{rng.randrange(10**9)}": (rng.randrange(3), rng.randrange(2)) for _ in range(size)}
        for size in (60, 1, 40)
    ]
    taken, expected = Counter(), {}
    for night in nights:
        for item in sorted(night):
            expected[item] = (*night[item], taken[night[item]])
            taken[night[item]] += 1
    registry = assign_in_batches(nights)
    assert ids_by_item(registry) == expected
    assert list(expected) == registry.item_id.to_pylist()


def test_codewords_too_many_for_one_64_bit_key_are_told_apart():
    # With 4096 codewords in each of 8 levels a mixed-radix key has 96 bits: the first levels would fall off.
    distinct_ML = np.zeros((41, 8), np.int16)
    distinct_ML[:40, 0] = np.arange(40)
    distinct_ML[40] = 4095
    codewords_ML = np.repeat(distinct_ML, 2, axis=0)
    segment = assign(None, pa.array(range(82), pa.int64()), codewords_ML, 2)
    registry = registry_of(segment, level_sizes=(4096,) * 8 + (2,))
    assert registry.codes_NI[:, -1].tolist() == [0, 1] * 41


NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
WEIRD = ["", " ", "007", "7", "0", "00", NFC, NFD, "\u0000", "a\nb", "日本", "😀", "nan", "None", "x" * 5000]


@pytest.mark.parametrize(
    "item_id",
    [
        pa.array(WEIRD, pa.string()),
        pa.array(WEIRD, pa.large_string()),
        pa.array([-(2**63), 2**63 - 1, 2**53 + 1, 2**53, 0, -1], pa.int64()),
    ],
    ids=["string", "large_string", "int64"],
)
def test_item_ids_come_back_byte_for_byte_with_their_type(item_id):
    registry = registry_of(assign(None, item_id, np.zeros((len(item_id), 2), np.int16), DISAMBIGUATOR_SIZE))
    assert registry.item_id.type == item_id.type
    item_index = registry.lookup(item_id)
    assert sorted(item_index.tolist()) == list(range(len(item_id)))
    assert registry.item_ids(item_index).equals(item_id)


def test_an_empty_night_adds_an_empty_segment_of_the_same_types():
    item_id = pa.array(["b", "a"])
    first = assign(None, item_id, np.zeros((2, 2), np.int16), DISAMBIGUATOR_SIZE)
    registry = registry_of(first)
    second = assign(registry, item_id, np.zeros((2, 2), np.int16), DISAMBIGUATOR_SIZE)
    assert second.num_rows == 0
    assert second.schema == first.schema
    assert len(registry_of(first, second)) == 2
    nothing = assign(None, item_id[:0], np.zeros((0, 2), np.int16), DISAMBIGUATOR_SIZE)
    assert len(registry_of(nothing)) == 0
    assert registry_of(nothing).lookup(item_id).tolist() == [-1, -1]
    assert registry_of(nothing).item_ids(np.array([], np.int32)).to_pylist() == []


def test_segments_survive_slicing_and_chunking():
    item_id = pa.chunked_array([["d", "b"], ["a", "c", "e"]])
    segment = assign(None, item_id, np.array([[0, 0], [1, 1], [2, 0], [1, 1], [0, 1]]), DISAMBIGUATOR_SIZE)
    pieces = [segment.slice(0, 2), segment.slice(2, 2), segment.slice(4)]
    assert ids_by_item(registry_of(*pieces)) == ids_by_item(registry_of(segment))
    assert ids_by_item(registry_of(pa.concat_tables(pieces))) == ids_by_item(registry_of(segment))
    assert registry_of(*pieces).item_ids(np.array([4, 0, 4])).to_pylist() == ["e", "a", "e"]


def test_lookup_marks_unknown_and_null_ids():
    registry = assign_in_batches([{"a": (0, 0), "b": (0, 0)}])
    found = registry.lookup(pa.array(["b", "zzz", None, "a"]))
    assert found.dtype == np.int32
    assert found.tolist() == [1, -1, -1, 0]
    assert registry.lookup(pa.array(["b"], pa.large_string())).tolist() == [1]
    assert registry.lookup(pa.chunked_array([["b"], ["a"]])).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"item_id is int64, but the registry .* started with string"):
        registry.lookup(pa.array([7], pa.int64()))


def test_eligibility_is_all_items_until_it_is_set():
    registry = assign_in_batches([{"a": (0, 0), "b": (0, 0)}])
    assert registry.eligible_N.tolist() == [True, True]
    assert registry.with_eligible(np.array([False, True])).eligible_N.tolist() == [False, True]
    assert registry.id_length == 3
    with pytest.raises(ArtifactError, match=r"\(3,\) items does not fit a registry of 2"):
        registry.with_eligible(np.ones(3, bool))


# Input that must be refused


def test_a_full_prefix_is_refused_by_name_size_and_remedy():
    first = assign(None, pa.array(["a", "b"]), np.array([[2, 1], [2, 1]], np.int16), 3)
    registry = registry_of(first, level_sizes=(3, 2, 3))
    assert assign(registry, pa.array(["c"]), np.array([[2, 1]], np.int16), 3)["codes"].to_pylist() == [
        [2, 1, 2]
    ]
    with pytest.raises(CollisionError) as error:
        assign(registry, pa.array(["c", "d", "e"]), np.array([[2, 1], [0, 0], [2, 1]], np.int16), 3)
    text = str(error.value)
    assert "4 items share the codewords [2, 1], but the disambiguator can count 3" in text
    assert "1 items under 1 such prefixes are left without" in text
    for setting in ("semantic_ids.disambiguator_size", "quantizer.num_levels", "quantizer.codebook_size"):
        assert setting in text


def test_repeated_and_null_item_ids_are_refused_by_name():
    codewords_ML = np.zeros((3, 2), np.int16)
    with pytest.raises(DataError, match=r"0 null; 1 repeated, first \['b'\]"):
        assign(None, pa.array(["b", "a", "b"]), codewords_ML, 9)
    with pytest.raises(DataError, match=r"1 null; 0 repeated"):
        assign(None, pa.array(["b", None, "a"]), codewords_ML, 9)


def test_ids_of_another_type_are_refused():
    registry = assign_in_batches([{"7": (0, 0)}])
    with pytest.raises(
        DataError, match=r"item_id is int64, but the registry .* string; .* quantizer.version"
    ):
        assign(registry, pa.array([7], pa.int64()), np.zeros((1, 2), np.int16), 9)
    with pytest.raises(DataError, match="item_id is large_string, but the registry"):
        assign(registry, pa.array(["8"], pa.large_string()), np.zeros((1, 2), np.int16), 9)
    with pytest.raises(DataError, match="must be string, large_string, int64, not double"):
        assign(None, pa.array([7.0]), np.zeros((1, 2), np.int16), 9)


def test_codewords_of_another_quantizer_are_refused():
    registry = assign_in_batches([{"a": (0, 0)}])
    for codewords_ML in (np.array([[3, 0]], np.int16), np.array([[0, 0, 0]], np.int16)):
        with pytest.raises(ArtifactError, match=r"do not come from the quantizer .* levels have \[3, 2\]"):
            assign(registry, pa.array(["b"]), codewords_ML, DISAMBIGUATOR_SIZE)


def test_damaged_registries_are_refused():
    segment = assign(None, pa.array(["a", "b"]), np.array([[0, 0], [0, 0]], np.int16), DISAMBIGUATOR_SIZE)
    later = assign(registry_of(segment), pa.array(["c"]), np.array([[0, 0]], np.int16), DISAMBIGUATOR_SIZE)
    with pytest.raises(ArtifactError, match="no segment"):
        registry_of()
    with pytest.raises(ArtifactError, match="row 0 of the registry has item_index 2; a segment is missing"):
        registry_of(later)
    with pytest.raises(
        ArtifactError, match="row 2 of the registry has item_index 0; a segment is missing, doubled"
    ):
        registry_of(segment, segment)
    with pytest.raises(ArtifactError, match=r"1 codes of level 2 are outside 0\.\.0"):
        registry_of(segment, level_sizes=(3, 2, 1))
    with pytest.raises(ArtifactError, match="4 int16 per item"):
        registry_of(segment, level_sizes=(3, 2, 2, 50))

    codes = segment["codes"].combine_chunks()
    same_code = segment.set_column(2, "codes", pa.concat_arrays([codes[:1], codes[:1]]))
    with pytest.raises(ArtifactError, match=r"items a, b have the same Semantic ID \[0, 0, 0\]"):
        registry_of(same_code)
    with pytest.raises(ArtifactError, match=r"repeated item ids: 0 null; 1 repeated, first \['a'\]"):
        registry_of(segment.set_column(1, "item_id", pa.array(["a", "a"])))


# The report


def test_id_report_of_a_hand_counted_table():
    codewords_NL = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 1], [1, 1]], np.int16)
    report = id_report(codewords_NL, (2, 4))
    assert report["items"] == 6
    assert report["prefixes"] == 3
    assert report["disambiguated_share"] == 0.5
    assert report["largest_group"] == 3
    assert report["group_sizes"] == {"1": 1, "2": 1, "3": 1}
    first, second = report["levels"]
    assert (first["size"], first["used"], first["usage"]) == (2, 2, 1.0)
    assert first["perplexity"] == pytest.approx(2 ** (np.log2(6) - 4 / 6 * 2 - 2 / 6))
    assert (second["size"], second["used"], second["usage"]) == (4, 2, 0.5)
    assert second["perplexity"] == pytest.approx(2.0)


def test_id_report_of_no_items_is_all_zero():
    report = id_report(np.zeros((0, 1), np.int16), (4,))
    assert report["disambiguated_share"] == report["largest_group"] == report["prefixes"] == 0
    assert report["levels"] == [{"size": 4, "used": 0, "usage": 0.0, "perplexity": 0.0}]
