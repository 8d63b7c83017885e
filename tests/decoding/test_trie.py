import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiger_ray.decoding import trie as trie_module
from tiger_ray.decoding.trie import Trie
from tiger_ray.errors import DataError

LEVEL_SIZES = (3, 3, 2)
relaxed = settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@st.composite
def catalogs(draw):
    """Distinct Semantic IDs in any order, and at least one item that is eligible."""
    every = [(a, b, c) for a in range(3) for b in range(3) for c in range(2)]
    codes = draw(st.lists(st.sampled_from(every), min_size=1, unique=True))
    eligible = draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes)).filter(any))
    return np.array(codes, np.int16), np.array(eligible)


def walk(trie: Trie) -> dict[tuple[int, ...], int]:
    """Item by Semantic ID, found by walking from the root, in the order of the leaves."""
    nodes = {(): 0}
    for edges in trie.edges:
        log_prob_1WC = torch.zeros(1, len(nodes), 300)
        open_1WM = edges.candidates(torch.tensor([list(nodes.values())]), log_prob_1WC) == 0
        parents = list(nodes.items())
        nodes = {}
        for _, beam, nth in open_1WM.nonzero().tolist():
            prefix, node = parents[beam]
            child, code = edges.follow(torch.tensor([[node]]), torch.tensor([[nth]]))
            nodes[(*prefix, int(code))] = int(child)
    return {prefix: int(trie.item_index[leaf]) for prefix, leaf in nodes.items()}


@pytest.fixture(params=[trie_module.MAX_TABLE_BYTES, 0], ids=["tables", "lists"], autouse=True)
def _table_bytes(request, monkeypatch):
    """Every test with tables where there may be some, and with none."""
    monkeypatch.setattr(trie_module, "MAX_TABLE_BYTES", request.param)


@relaxed
@given(catalogs())
def test_the_leaves_are_the_eligible_items_in_order_of_semantic_id(catalog):
    codes_NI, eligible_N = catalog
    expected = sorted((tuple(codes_NI[item].tolist()), item) for item in np.flatnonzero(eligible_N))
    assert list(walk(Trie.build(codes_NI, eligible_N)).items()) == expected


@relaxed
@given(catalogs(), st.lists(st.lists(st.integers(0, 17), max_size=30), min_size=1, max_size=4))
def test_closed_nodes_are_those_with_every_leaf_excluded(catalog, excluded):
    codes_NI, eligible_N = catalog
    trie = Trie.build(codes_NI, eligible_N)
    excluded = [[item for item in items if item < len(codes_NI)] for items in excluded]
    user_E = torch.tensor([user for user, items in enumerate(excluded) for _ in items], dtype=torch.int64)
    item_E = [item for items in excluded for item in items]
    barred = trie.find_barred(torch.from_numpy(codes_NI[item_E].astype(np.int64)), user_E)
    for depth in range(1, 4):
        prefixes = sorted({tuple(codes_NI[item, :depth].tolist()) for item in np.flatnonzero(eligible_N)})
        expected = {
            (user, prefix)
            for user, items in enumerate(excluded)
            for prefix in prefixes
            if not any(
                eligible_N[item] and tuple(codes_NI[item, :depth].tolist()) == prefix and item not in items
                for item in range(len(codes_NI))
            )
        }
        found = []
        for user, node, nth in zip(*(column.tolist() for column in barred[depth - 1]), strict=True):
            child, _ = trie.edges[depth - 1].follow(torch.tensor([[node]]), torch.tensor([[nth]]))
            found.append((user, prefixes[int(child)]))
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_ten_million_items_would_take_at_most_twelve_bytes_each():
    """The upper levels cost less and less per item; the lower ones cost what they cost here."""
    rng = np.random.default_rng(0)
    prefix_M3 = np.unique(rng.integers(0, (16, 16, 256), (60_000, 3)).astype(np.int16), axis=0)
    codes_NI = np.column_stack([prefix_M3, np.zeros(len(prefix_M3), np.int16)])
    trie = Trie.build(rng.permutation(codes_NI), np.ones(len(codes_NI), bool))
    arrays = [
        trie.item_index,
        *(part for edges in trie.edges for part in (edges.first_child, edges.barred, edges.code)),
    ]
    assert sum(array.nbytes for array in arrays if array is not None) <= 12 * len(codes_NI)


def test_a_table_is_made_where_nodes_have_many_children_and_a_list_where_few():
    rng = np.random.default_rng(0)
    codes_NI = np.unique(rng.integers(0, 256, (5000, 3)).astype(np.int16), axis=0)
    upper, middle, lower = Trie.build(codes_NI, np.ones(len(codes_NI), bool)).edges
    assert (upper.barred is not None) == (trie_module.MAX_TABLE_BYTES > 0)
    assert (upper.num_candidates, upper.num_children) == (256, 256)
    assert middle.code.dtype == lower.code.dtype == torch.uint8
    assert middle.num_candidates < 64


@pytest.mark.parametrize("in_order", [True, False])
def test_codes_too_many_for_one_integer_are_put_in_order_too(in_order):
    codes_NI = np.array([[32_000] * 5, [0] * 5, [32_000, 1, 2, 3, 4], [1, 0, 0, 0, 0]], np.int16)
    if in_order:
        codes_NI = codes_NI[np.lexsort(codes_NI.T[::-1])]
    expected = sorted((tuple(codes.tolist()), item) for item, codes in enumerate(codes_NI))
    path = [(0, ())]
    trie = Trie.build(codes_NI, np.ones(4, bool))
    for edges in trie.edges:
        path = [
            (int(child), (*prefix, int(code)))
            for node, prefix in path
            for nth in range(int(edges.first_child[node + 1] - edges.first_child[node]))
            for child, code in [edges.follow(torch.tensor([[node]]), torch.tensor([[nth]]))]
        ]
    assert [(prefix, int(trie.item_index[leaf])) for leaf, prefix in path] == expected


def test_no_eligible_item_is_an_error_that_names_the_setting():
    with pytest.raises(DataError, match=r"none of the 4 items may be recommended.*catalog\.available"):
        Trie.build(np.zeros((4, 3), np.int16), np.zeros(4, bool))


def test_two_eligible_items_with_one_semantic_id_are_an_error_that_names_them():
    codes_NI = np.array([[1, 1, 1], [0, 2, 1], [1, 1, 1]], np.int16)
    with pytest.raises(DataError, match=r"items 0 and 2 share the Semantic ID \(1, 1, 1\)"):
        Trie.build(codes_NI, np.ones(3, bool))
    assert walk(Trie.build(codes_NI, np.array([False, True, True]))) == {(0, 2, 1): 1, (1, 1, 1): 2}
