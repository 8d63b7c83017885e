"""Semantic IDs are unique, never change, and do not depend on the order items arrive in."""

import itertools
import random
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.core.hashing import stable_hash
from tiger_ray.errors import ArtifactError, CollisionError, DataError, QualityError
from tiger_ray.ids.report import count_codes, id_report, require_quality, sample_report
from tiger_ray.ids.semantic_ids import SemanticIds, assign, codes_of, codewords_of, prefixes
from tiger_ray.settings.semantic_ids import SemanticIdsSettings

LEVEL_SIZES = (3, 2)
SIZES = (*LEVEL_SIZES, 50)


def registry_of(*segments, level_sizes=SIZES):
    return SemanticIds.from_segments(segments, level_sizes)


def assign_in_batches(batches, id_type=None):
    """The registry after one night per batch; a batch is a dict of item id -> codewords."""
    segments, registry = [], None
    for batch in batches:
        codewords_ML = np.array(list(batch.values()), np.int16).reshape(-1, len(LEVEL_SIZES))
        segments.append(assign(registry, pa.array(list(batch), id_type), codewords_ML, SIZES))
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
        segments.append(assign(registry, pa.array(list(night), id_type), codewords_ML, SIZES))
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
        for item in sorted(night, key=lambda item: (stable_hash(pa.array([item]))[0], item)):
            expected[item] = (*night[item], taken[night[item]])
            taken[night[item]] += 1
    registry = assign_in_batches(nights)
    assert ids_by_item(registry) == expected
    assert list(expected) == registry.item_id.to_pylist()


@given(st.integers(0, 10**6), st.lists(st.integers(1, 400), max_size=6))
def test_a_prefix_names_its_codewords(seed, sizes):
    level_sizes = (*sizes, 7)
    codewords_ML = np.random.default_rng(seed).integers(0, sizes, (50, len(sizes))).astype(np.int16)
    prefix_M = prefixes(codewords_ML, level_sizes)
    assert (codewords_of(prefix_M, level_sizes) == codewords_ML).all()
    assert len(np.unique(prefix_M)) == len(np.unique(codewords_ML, axis=0))


def test_ids_whose_hashes_are_equal_are_registered_by_id(monkeypatch):
    monkeypatch.setattr("tiger_ray.ids.semantic_ids.stable_hash", lambda ids: np.zeros(len(ids), np.uint64))
    segment = assign(None, pa.array(["b", "c", "a"]), np.zeros((3, 2), np.int16), SIZES)
    assert segment["item_id"].to_pylist() == ["a", "b", "c"]


def test_without_codewords_the_disambiguator_counts_all_items():
    segment = assign(None, pa.array(["a", "b", "c"]), np.zeros((3, 0), np.int16), (5,))
    assert segment["codes"].to_pylist() == [[0], [1], [2]]
    registry = registry_of(segment, level_sizes=(5,))
    more = assign(registry, pa.array(["d", "e"]), np.zeros((2, 0), np.int16), (5,))
    assert more["codes"].to_pylist() == [[3], [4]]
    with pytest.raises(
        CollisionError, match=r"6 items share .* can count 5; .* flat the disambiguator counts the whole"
    ):
        assign(registry, pa.array(["d", "e", "f"]), np.zeros((3, 0), np.int16), (5,))


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
    registry = registry_of(assign(None, item_id, np.zeros((len(item_id), 2), np.int16), SIZES))
    assert registry.item_id.type == item_id.type
    item_index = registry.lookup(item_id)
    assert sorted(item_index.tolist()) == list(range(len(item_id)))
    assert registry.item_ids(item_index).equals(item_id)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_item_ids_are_found_in_whichever_chunk_they_lie(sizes, data):
    names = [f"item {number}" for number in range(sum(sizes))]
    starts = np.cumsum([0, *sizes])
    chunks = [names[first:end] for first, end in itertools.pairwise(starts)]
    codes_NI = np.zeros((len(names), 2), np.int16)
    ids = SemanticIds(pa.chunked_array(chunks, pa.string()), codes_NI, (1, 5), pa.array([True] * len(names)))
    wanted = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=12) if names else st.just([]))
    assert ids.item_ids(np.array(wanted, np.int64)).to_pylist() == [names[place] for place in wanted]


def test_an_empty_night_adds_an_empty_segment_of_the_same_types():
    item_id = pa.array(["b", "a"])
    first = assign(None, item_id, np.zeros((2, 2), np.int16), SIZES)
    registry = registry_of(first)
    second = assign(registry, item_id, np.zeros((2, 2), np.int16), SIZES)
    assert second.num_rows == 0
    assert second.schema == first.schema
    assert len(registry_of(first, second)) == 2
    nothing = assign(None, item_id[:0], np.zeros((0, 2), np.int16), SIZES)
    assert len(registry_of(nothing)) == 0
    assert registry_of(nothing).lookup(item_id).tolist() == [-1, -1]
    assert registry_of(nothing).item_ids(np.array([], np.int32)).to_pylist() == []


def test_segments_survive_slicing_and_chunking():
    item_id = pa.chunked_array([["d", "b"], ["a", "c", "e"]])
    segment = assign(None, item_id, np.array([[0, 0], [1, 1], [2, 0], [1, 1], [0, 1]]), SIZES)
    pieces = [segment.slice(0, 2), segment.slice(2, 2), segment.slice(4)]
    assert ids_by_item(registry_of(*pieces)) == ids_by_item(registry_of(segment))
    assert ids_by_item(registry_of(pa.concat_tables(pieces))) == ids_by_item(registry_of(segment))
    in_order = segment["item_id"].to_pylist()
    assert registry_of(*pieces).item_ids(np.array([4, 0, 4])).to_pylist() == [in_order[i] for i in (4, 0, 4)]


def test_lookup_marks_unknown_and_null_ids():
    registry = assign_in_batches([{"a": (0, 0)}, {"b": (0, 0)}])
    found = registry.lookup(pa.array(["b", "zzz", None, "a"]))
    assert found.dtype == np.int32
    assert found.tolist() == [1, -1, -1, 0]
    assert registry.lookup(pa.array(["b"], pa.large_string())).tolist() == [1]
    assert registry.lookup(pa.chunked_array([["b"], ["a"]])).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"item_id is int64, but the registry .* started with string"):
        registry.lookup(pa.array([7], pa.int64()))


def test_eligibility_is_all_items_until_it_is_set():
    registry = assign_in_batches([{"a": (0, 0)}, {"b": (0, 0)}])
    assert registry.eligible_N.tolist() == [True, True]
    assert registry.with_eligible(np.array([False, True])).eligible_N.tolist() == [False, True]
    assert registry.id_length == 3
    with pytest.raises(ArtifactError, match=r"3 items does not fit a registry of 2"):
        registry.with_eligible(np.ones(3, bool))


# Input that must be refused


def test_a_full_prefix_is_refused_by_name_size_and_remedy():
    first = assign(None, pa.array(["a", "b"]), np.array([[2, 1], [2, 1]], np.int16), (3, 2, 3))
    registry = registry_of(first, level_sizes=(3, 2, 3))
    assert assign(registry, pa.array(["c"]), np.array([[2, 1]], np.int16), (3, 2, 3))[
        "codes"
    ].to_pylist() == [[2, 1, 2]]
    with pytest.raises(CollisionError) as error:
        assign(registry, pa.array(["c", "d", "e"]), np.array([[2, 1], [0, 0], [2, 1]], np.int16), (3, 2, 3))
    text = str(error.value)
    assert "4 items share the codewords [2, 1], but the disambiguator can count 3" in text
    assert "1 items under 1 such prefixes are left without" in text
    for setting in ("semantic_ids.disambiguator_size", "quantizer.level_sizes", "quantizer.version"):
        assert setting in text


def test_repeated_and_null_item_ids_are_refused_by_name():
    codewords_ML = np.zeros((3, 2), np.int16)
    with pytest.raises(DataError, match=r"holds items twice, first \['b'\]"):
        assign(None, pa.array(["b", "a", "b"]), codewords_ML, SIZES)
    with pytest.raises(DataError, match="1 items without an id"):
        assign(None, pa.array(["b", None, "a"]), codewords_ML, SIZES)


def test_ids_of_another_type_are_refused():
    registry = assign_in_batches([{"7": (0, 0)}])
    with pytest.raises(
        DataError, match=r"item_id is int64, but the registry .* string; .* quantizer.version"
    ):
        assign(registry, pa.array([7], pa.int64()), np.zeros((1, 2), np.int16), SIZES)
    with pytest.raises(DataError, match="must be string, large_string, int64, not double"):
        assign(None, pa.array([7.0]), np.zeros((1, 2), np.int16), SIZES)


def test_codewords_of_another_quantizer_are_refused():
    registry = assign_in_batches([{"a": (0, 0)}])
    for codewords_ML in (np.array([[3, 0]], np.int16), np.array([[0, 0, 0]], np.int16)):
        with pytest.raises(ArtifactError, match=r"do not come from the quantizer .* levels have \[3, 2\]"):
            assign(registry, pa.array(["b"]), codewords_ML, SIZES)


def test_damaged_registries_are_refused():
    segment = assign(None, pa.array(["a", "b"]), np.array([[0, 0], [0, 0]], np.int16), SIZES)
    later = assign(registry_of(segment), pa.array(["c"]), np.array([[0, 0]], np.int16), SIZES)
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


# The report


def report_of(codewords_NL, sizes):
    """The report of items with these codewords, through the registry."""
    level_sizes = (*sizes, 50)
    segment = assign(None, pa.array(range(len(codewords_NL)), pa.int64()), codewords_NL, level_sizes)
    return id_report(count_codes(codes_of(segment, level_sizes), level_sizes))


def test_id_report_of_a_hand_counted_table():
    codewords_NL = np.array([[0, 0], [0, 0], [0, 0], [0, 1], [1, 1], [1, 1]], np.int16)
    report = report_of(codewords_NL, (2, 4))
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
    report = report_of(np.zeros((0, 1), np.int16), (4,))
    assert report["disambiguated_share"] == report["largest_group"] == report["prefixes"] == 0
    assert report["levels"] == [{"size": 4, "used": 0, "usage": 0.0, "perplexity": 0.0}]


@given(st.lists(st.tuples(codewords, st.booleans()), max_size=60))
def test_reports_of_two_nights_add_up_to_the_report_of_all(items):
    nights = [
        {f"{n}": code for n, (code, late) in enumerate(items) if late == night} for night in (False, True)
    ]
    registry = assign_in_batches(nights, pa.string())
    first = len(nights[0])
    parts = [
        count_codes(codes_NI, SIZES) for codes_NI in (registry.codes_NI[:first], registry.codes_NI[first:])
    ]
    added = id_report([a + b for a, b in zip(*parts, strict=True)])
    groups = Counter(code for code, _ in items)
    assert added["items"] == len(items)
    assert added["prefixes"] == len(groups)
    assert added["largest_group"] == max(groups.values(), default=0)
    assert added["group_sizes"] == {str(k): v for k, v in sorted(Counter(groups.values()).items())}
    assert added == report_of(np.array([code for code, _ in items], np.int16).reshape(-1, 2), LEVEL_SIZES)


def test_the_sample_report_of_a_hand_counted_table():
    codewords_ML = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1], [2, 0]], np.int16)
    category_M = np.array([0, 0, 1, 1, 1, 2, -1])
    error_M = np.array([1, 1, 1, 1, 4, 4, 6], np.float32)
    seen_M = np.array([True, True, True, True, False, False, False])
    report = sample_report(codewords_ML, SIZES, category_M, error_M, 2.0, seen_M)
    assert (report["items"], report["unseen"]) == (7, 3)
    assert report["reconstruction_error"] == {"seen": 0.5, "unseen": pytest.approx(14 / 3 / 2)}
    assert report["coverage"] == [pytest.approx(2 / 3), 0.0]  # 2,0 is new at once; 1,1 at the second level
    assert report["purity"] == [4 / 6, 5 / 6]
    assert all(0 < chance <= 1 for chance in report["purity_by_chance"])


def test_categories_dealt_out_at_random_have_the_purity_of_chance():
    rng = np.random.default_rng(0)
    codewords_ML = rng.integers(0, 3, (3000, 1)).astype(np.int16)
    category_M = rng.integers(0, 4, 3000)
    seen_M = np.ones(3000, bool)
    report = sample_report(codewords_ML, (3, 9), category_M, np.zeros(3000, np.float32), 1.0, seen_M)
    assert report["purity"][0] == pytest.approx(report["purity_by_chance"][0], abs=0.02)
    assert report["purity"][0] == pytest.approx(0.25, abs=0.03)
    assert report["coverage"] == [None]
    assert report["reconstruction_error"]["unseen"] is None


def test_a_collapsed_codebook_stops_the_night_and_a_small_catalog_does_not():
    thresholds = SemanticIdsSettings()
    rng = np.random.default_rng(0)
    healthy_NL = rng.integers(0, 16, (4000, 2)).astype(np.int16)
    require_quality(report_of(rng.permutation(256)[:200, None].astype(np.int16), (256,)), thresholds)
    require_quality(report_of(np.unique(healthy_NL, axis=0), (16, 16)), thresholds)
    require_quality(report_of(np.zeros((40, 0), np.int16), ()), thresholds)  # flat: nothing to collapse
    collapsed_NL = np.unique(healthy_NL, axis=0)
    collapsed_NL[:, 1] %= 3
    with pytest.raises(QualityError) as error:
        require_quality(report_of(collapsed_NL, (16, 16)), thresholds)
    text = str(error.value)
    assert "level 1 uses 3 of 16 codewords (semantic_ids.min_usage 0.5)" in text
    assert "level 0" not in text
    assert "81.2% of 256 items share all codewords with an earlier one" in text
    skewed_NL = np.where(rng.random((4000, 1)) < 0.99, 0, rng.integers(0, 16, (4000, 1))).astype(np.int16)
    counts = count_codes(np.column_stack([skewed_NL, np.zeros(4000, np.int16)]), (16, 50))
    with pytest.raises(QualityError, match=r"level 0 has a perplexity of 1\.\d of 16"):
        require_quality(id_report(counts), SemanticIdsSettings(max_disambiguated_share=1.0))


def test_the_code_table_takes_two_bytes_per_code_and_eligibility_one_bit():
    registry = assign_in_batches([{f"{n}": (n % 3, n % 2) for n in range(100)}])
    assert registry.codes_NI.nbytes == 100 * 3 * 2
    assert registry.with_eligible(np.arange(100) % 2 == 0).eligible.nbytes <= 100 // 8 + 1
