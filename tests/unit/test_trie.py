import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiger_ray.errors import DataError
from tiger_ray.trie import Trie

LEVEL_SIZES = (3, 3, 2)


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
    for start, code in zip(trie.child_start, trie.child_code, strict=True):
        nodes = {
            (*prefix, int(code[child])): child
            for prefix, node in nodes.items()
            for child in range(start[node], start[node + 1])
        }
    return {prefix: int(trie.item_index[leaf]) for prefix, leaf in nodes.items()}


@given(catalogs())
def test_the_leaves_are_the_eligible_items_in_order_of_semantic_id(catalog):
    codes_NI, eligible_N = catalog
    expected = sorted((tuple(codes_NI[item].tolist()), item) for item in np.flatnonzero(eligible_N))
    assert list(walk(Trie.build(codes_NI, eligible_N)).items()) == expected


@given(catalogs(), st.lists(st.lists(st.integers(0, 17), max_size=30), min_size=1, max_size=4))
def test_closed_nodes_are_those_with_every_leaf_excluded(catalog, excluded):
    codes_NI, eligible_N = catalog
    trie = Trie.build(codes_NI, eligible_N)
    excluded = [[item for item in items if item < len(codes_NI)] for items in excluded]
    closed = trie.closed_nodes(
        np.array([item for items in excluded for item in items], np.int32),
        np.array([len(items) for items in excluded]),
    )
    for depth in range(1, 4):
        prefixes = sorted({tuple(codes_NI[item, :depth].tolist()) for item in np.flatnonzero(eligible_N)})
        expected = [
            user * len(prefixes) + node
            for user, items in enumerate(excluded)
            for node, prefix in enumerate(prefixes)
            if not any(
                eligible_N[item] and tuple(codes_NI[item, :depth].tolist()) == prefix and item not in items
                for item in range(len(codes_NI))
            )
        ]
        assert closed[depth - 1].tolist() == expected


def test_arrays_are_as_narrow_as_documented():
    rng = np.random.default_rng(0)
    codes_NI = np.unique(rng.integers(0, 256, (5000, 3)).astype(np.int16), axis=0)
    trie = Trie.build(rng.permutation(codes_NI), np.ones(len(codes_NI), bool))
    assert {str(start.dtype) for start in trie.child_start} == {"torch.int32"}
    assert {str(code.dtype) for code in trie.child_code} == {"torch.int16"}
    assert str(trie.item_index.dtype) == "torch.int32"
    assert trie.max_children[0] == 256


def test_no_eligible_item_is_an_error_that_names_the_setting():
    with pytest.raises(DataError, match=r"none of the 4 items may be recommended.*catalog\.available"):
        Trie.build(np.zeros((4, 3), np.int16), np.zeros(4, bool))


def test_two_eligible_items_with_one_semantic_id_are_an_error_that_names_them():
    codes_NI = np.array([[1, 1, 1], [0, 2, 1], [1, 1, 1]], np.int16)
    with pytest.raises(DataError, match=r"items 0 and 2 share the Semantic ID \(1, 1, 1\)"):
        Trie.build(codes_NI, np.ones(3, bool))
    assert walk(Trie.build(codes_NI, np.array([False, True, True]))) == {(0, 2, 1): 1, (1, 1, 1): 2}
