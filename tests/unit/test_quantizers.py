"""Quantizers find what was planted, encode an item the same in any batch, and refuse what they cannot use."""

import json

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import torch
from sklearn.cluster import KMeans

from tiger_ray import quantizers
from tiger_ray.config import QuantizerSettings
from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.quantizers.residual_kmeans import _means, kmeans
from tiger_ray.quantizers.rqvae import ResidualVae
from tiger_ray.semantic_ids import id_report


def planted(num_groups=20, members=30, dim=12, noise=0.02, seed=0):
    """Groups far apart: (N, D) float32 in random order, and the group of each."""
    rng = np.random.default_rng(seed)
    center_GD = rng.normal(size=(num_groups, dim))
    group_N = rng.permutation(np.repeat(np.arange(num_groups), members))
    embedding_ND = center_GD[group_N] + noise * rng.normal(size=(len(group_N), dim))
    return embedding_ND.astype(np.float32), group_N


def blob(items=1500, dim=16, seed=0):
    """Correlated Gaussian embeddings without any groups."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(items, dim)) @ rng.normal(size=(dim, dim))).astype(np.float32)


def kmeans_settings(**changes):
    return QuantizerSettings(**{"kind": "residual_kmeans", "num_levels": 2, "codebook_size": 20} | changes)


def rqvae_settings(**changes):
    small = {"kind": "rqvae", "num_levels": 2, "codebook_size": 8, "latent_dim": 8, "hidden_dims": (32,)}
    return QuantizerSettings(**small | {"num_epochs": 40, "batch_size": 128} | changes)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other make tiny products 100 times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["residual_kmeans", "rqvae"])
def fitted(request):
    """A small quantizer of each kind, and what it was fitted on."""
    settings = kmeans_settings() if request.param == "residual_kmeans" else rqvae_settings(num_epochs=3)
    embedding_ND = blob()
    return quantizers.fit(settings, embedding_ND, seed=0), embedding_ND


# Known answers and oracles


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_finds_planted_groups_exactly(seed):
    embedding_ND, group_N = planted(seed=seed)
    quantizer = quantizers.fit(kmeans_settings(num_levels=1), embedding_ND, seed=seed)
    codewords_NL = quantizer.encode(embedding_ND)
    assert len(np.unique(np.column_stack([codewords_NL, group_N]), axis=0)) == len(np.unique(group_N)) == 20
    assert len(np.unique(codewords_NL)) == 20
    group_mean_GD = np.stack([embedding_ND[group_N == group].mean(axis=0) for group in range(20)])
    np.testing.assert_allclose(quantizer.reconstruct(codewords_NL), group_mean_GD[group_N], atol=1e-4)


def test_each_level_of_residual_kmeans_is_as_tight_as_sklearn_on_the_same_residuals():
    embedding_ND = blob()
    quantizer = quantizers.fit(kmeans_settings(num_levels=3), embedding_ND, seed=0)
    codewords_NL = quantizer.encode(embedding_ND)
    residual_ND = quantizer.standardize(torch.tensor(embedding_ND)).numpy()
    for level, codebook_CD in enumerate(quantizer.codebooks):
        sklearn = KMeans(20, n_init=1, max_iter=30, random_state=0).fit(residual_ND)
        residual_ND = residual_ND - codebook_CD.numpy()[codewords_NL[:, level]]
        assert np.square(residual_ND).sum() < 1.02 * sklearn.inertia_


def test_encode_takes_the_nearest_codeword_of_what_is_left_level_by_level():
    embedding_ND = blob()
    quantizer = quantizers.fit(kmeans_settings(num_levels=3), embedding_ND, seed=0)
    mean_D, deviation_D = (
        embedding_ND.mean(axis=0, dtype=np.float64),
        embedding_ND.std(axis=0, dtype=np.float64),
    )
    residual_ND = (embedding_ND - mean_D) / deviation_D
    for level, codebook in enumerate(quantizer.codebooks):
        codebook_CD = codebook.double().numpy()
        distance_NC = np.square(residual_ND[:, None] - codebook_CD).sum(axis=2)
        expected_N = distance_NC.argmin(axis=1)
        assert (quantizer.encode(embedding_ND)[:, level] == expected_N).all()
        residual_ND = residual_ND - codebook_CD[expected_N]
    reconstructed_ND = quantizer.reconstruct(quantizer.encode(embedding_ND))
    np.testing.assert_allclose(reconstructed_ND, embedding_ND - residual_ND * deviation_D, atol=1e-4)


def usage(quantizer, embedding_ND):
    report = id_report(quantizer.encode(embedding_ND), quantizer.level_sizes)
    return [level["usage"] for level in report["levels"]]


def test_rqvae_uses_every_codeword_and_reconstructs_planted_groups():
    embedding_ND, _ = planted(num_groups=24, noise=0.05)
    quantizer = quantizers.fit(rqvae_settings(num_epochs=60, learning_rate=1e-2), embedding_ND, seed=0)
    assert usage(quantizer, embedding_ND) == [1.0, 1.0]
    error = np.square(quantizer.reconstruct(quantizer.encode(embedding_ND)) - embedding_ND).mean()
    assert error < 0.25 * embedding_ND.var(axis=0).mean()


def test_rqvae_starts_with_every_codeword_in_use():
    embedding_ND, _ = planted(num_groups=200, members=5, noise=0.05)
    untrained = rqvae_settings(codebook_size=64, num_epochs=1, learning_rate=1e-9)
    assert usage(quantizers.fit(untrained, embedding_ND, seed=0), embedding_ND) == [1.0, 1.0]


def test_rqvae_brings_lost_codewords_back(monkeypatch):
    def lose_all_but_one(model, point_ND, generator):
        for codebook_CE in model.codebooks:
            codebook_CE[1:] = 1e3

    monkeypatch.setattr(ResidualVae, "_start_codebooks", torch.no_grad()(lose_all_but_one))
    embedding_ND, _ = planted(num_groups=200, members=5, noise=0.05)
    settings = rqvae_settings(codebook_size=32, num_epochs=60, batch_size=128, learning_rate=1e-2)
    assert min(usage(quantizers.fit(settings, embedding_ND, seed=0), embedding_ND)) > 0.9


def test_the_unit_of_a_dimension_does_not_matter():
    embedding_ND = blob()
    unit_D = 2.0 ** np.arange(-8, 8, dtype=np.float32)
    quantizer = quantizers.fit(kmeans_settings(), embedding_ND, seed=0)
    rescaled = quantizers.fit(kmeans_settings(), embedding_ND * unit_D, seed=0)
    assert (quantizer.encode(embedding_ND) == rescaled.encode(embedding_ND * unit_D)).all()


def test_a_constant_dimension_is_ignored_even_when_a_later_item_differs_there():
    embedding_ND = blob()
    embedding_ND[:, 3] = 0.1
    quantizer = quantizers.fit(kmeans_settings(), embedding_ND, seed=0)
    codewords_NL = quantizer.encode(embedding_ND)
    embedding_ND[:, 3] = 1e6
    assert (quantizer.encode(embedding_ND) == codewords_NL).all()
    np.testing.assert_allclose(quantizer.reconstruct(codewords_NL)[:, 3], 0.1, rtol=1e-5)


def test_empty_clusters_move_to_the_farthest_points_not_twice_to_the_same():
    point_ND = torch.tensor([[0.0], [1.0], [-10.0], [-10.0], [8.0]])
    codeword_N = torch.zeros(5, dtype=torch.int64)
    mean_CD = _means(point_ND, codeword_N, 3)
    assert mean_CD.flatten().tolist() == pytest.approx([-2.2, 8.0, -10.0])


def test_kmeans_with_fewer_points_than_centers_still_covers_every_point():
    point_ND = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 1.0]])
    codebook_CD = kmeans(point_ND, 6, num_iterations=10, generator=torch.Generator().manual_seed(0))
    assert codebook_CD.isfinite().all()
    assert torch.cdist(point_ND, codebook_CD).min(dim=1).values.tolist() == [0.0, 0.0, 0.0]


# Frozen, reproducible, portable


def test_the_batch_an_item_comes_in_does_not_change_its_codewords(fitted):
    quantizer, embedding_ND = fitted
    codewords_NL = quantizer.encode(embedding_ND)
    assert codewords_NL.dtype == np.int16
    assert codewords_NL.shape == (len(embedding_ND), 2)
    rng = np.random.default_rng(0)
    order_N = rng.permutation(len(embedding_ND))
    for cuts in ([1, 2, 1025], np.sort(rng.integers(0, len(embedding_ND), 5))):
        pieces = [quantizer.encode(piece) for piece in np.split(embedding_ND[order_N], cuts)]
        assert (np.concatenate(pieces) == codewords_NL[order_N]).all()
    assert quantizer.encode(embedding_ND[:0]).shape == (0, 2)


def test_a_quantizer_read_back_is_the_same(fitted):
    quantizer, embedding_ND = fitted
    files = quantizer.to_files()
    loaded = quantizers.load(files)
    assert (loaded.kind, loaded.dim, loaded.level_sizes) == (quantizer.kind, 16, quantizer.level_sizes)
    codewords_NL = loaded.encode(embedding_ND)
    assert (codewords_NL == quantizer.encode(embedding_ND)).all()
    assert (loaded.reconstruct(codewords_NL) == quantizer.reconstruct(codewords_NL)).all()
    assert loaded.to_files() == files


@pytest.mark.parametrize("settings", [kmeans_settings(), rqvae_settings(num_epochs=15)], ids=lambda s: s.kind)
def test_the_seed_decides_everything_random(settings):
    embedding_ND, _ = planted()
    torch.manual_seed(5)
    first = quantizers.fit(settings, embedding_ND, seed=1).to_files()
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert quantizers.fit(settings, embedding_ND, seed=1).to_files() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert quantizers.fit(settings, embedding_ND, seed=2).to_files() != first


def test_a_large_catalog_is_learned_from_a_sample_and_encoded_whole():
    embedding_ND, _ = planted()
    settings = kmeans_settings(num_levels=1, sample_size=100, codebook_size=8)
    quantizer = quantizers.fit(settings, embedding_ND, seed=0)
    rows = np.sort(np.random.default_rng(0).choice(len(embedding_ND), 100, replace=False))
    assert quantizer.to_files() == quantizers.fit(settings, embedding_ND[rows], seed=0).to_files()
    assert quantizer.encode(embedding_ND).shape == (600, 1)


# Input and artifacts that must be refused


def test_embeddings_with_nan_or_infinity_are_refused_by_item(fitted):
    embedding_ND, _ = planted()
    embedding_ND[5, 0], embedding_ND[7, 1] = np.nan, -np.inf
    item_id = pa.array([f"item-{row}" for row in range(len(embedding_ND))])
    with pytest.raises(
        DataError, match=r"2 of 600 embeddings hold NaN or infinity; first items: item-5, item-7\."
    ):
        quantizers.fit(kmeans_settings(), embedding_ND, item_id=item_id, seed=0)
    embedding_ND[10:50] = np.nan
    with pytest.raises(DataError, match=r"42 of 600 .*; first rows: 5, 7, 10, 11, 12, 13, 14, 15, 16, 17\."):
        quantizers.fit(kmeans_settings(), embedding_ND, seed=0)
    quantizer, good_ND = fitted
    with pytest.raises(DataError, match=r"1 of 3 .* first items: b\."):
        quantizer.encode(good_ND[:3] * np.array([[1], [np.inf], [1]]), item_id=["a", "b", "c"])


def test_embeddings_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match=r"all 50 embeddings are equal.* catalog\.text"):
        quantizers.fit(kmeans_settings(), np.ones((50, 4), np.float32), seed=0)
    nineteen_ND = np.repeat(np.arange(19, dtype=np.float32)[:, None], 9, axis=0) * np.array(
        [[1, -1]], np.float32
    )
    with pytest.raises(
        DataError,
        match=r"171 items have 19 distinct .* 20 codewords .* quantizer\.codebook_size to 19 or less",
    ):
        quantizers.fit(kmeans_settings(), nineteen_ND, seed=0)
    huge_ND = blob()
    huge_ND[4, 2] = 3e38
    with pytest.raises(DataError, match=r"dimension 2 .* too large for float32 \(up to 3e\+38\)"):
        quantizers.fit(kmeans_settings(), huge_ND, seed=0)
    with pytest.raises(DataError, match="0 items have 0 distinct"):
        quantizers.fit(kmeans_settings(), nineteen_ND[:0], seed=0)


def test_exactly_as_many_different_items_as_codewords_fit_and_the_idle_level_is_warned_about():
    embedding_ND = np.repeat(blob(items=20), 7, axis=0)
    lines = []
    quantizer = quantizers.fit(kmeans_settings(), embedding_ND, seed=0, log=lines.append)
    codewords_NL = quantizer.encode(embedding_ND)
    assert len(np.unique(codewords_NL, axis=0)) == 20
    np.testing.assert_allclose(quantizer.reconstruct(codewords_NL), embedding_ND, atol=1e-4)
    assert "level 0: 20 of 20 codewords are used" in lines
    assert any(line.startswith("warning: level 1 has collapsed to") for line in lines)


def test_embeddings_of_another_width_are_refused(fitted):
    quantizer, _ = fitted
    with pytest.raises(
        ArtifactError, match=r"fitted on embeddings of width 16, but these have shape \(2, 12\)"
    ):
        quantizer.encode(np.zeros((2, 12), np.float32))


def test_damaged_artifacts_are_refused_by_what_differs(fitted):
    files = fitted[0].to_files()
    description = json.loads(files["quantizer.json"])
    tensors = safetensors.numpy.load(files["quantizer.safetensors"])

    def described(**changes):
        return files | {"quantizer.json": json.dumps(description | changes).encode()}

    def weighing(**changes):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        return files | {"quantizer.safetensors": safetensors.numpy.save(changed)}

    broken_D = np.full(16, np.nan, np.float32)
    wider = description["arguments"] | {"dim": 17}
    for damaged, text in [
        ({"quantizer.json": files["quantizer.json"]}, r"no file quantizer\.safetensors"),
        (files | {"quantizer.json": b"{"}, r"quantizer\.json is damaged"),
        (files | {"quantizer.json": b"{}"}, r"quantizer\.json is damaged: KeyError\('format_version'\)"),
        (files | {"quantizer.safetensors": b"PK"}, r"quantizer\.safetensors is damaged"),
        (described(format_version=2), r"format_version 2; this software reads 1"),
        (described(kind="magic"), r"the kind 'magic'; this software knows \['residual_kmeans', 'rqvae'\]"),
        (described(arguments={"color": 1}), r"does not describe a quantizer of kind"),
        (described(arguments=wider), r"tensor \S+ is .*16.*, expected .*17"),
        (weighing(mean_D=None), r"tensor mean_D is missing"),
        (weighing(extra=broken_D), r"tensor extra is .* expected none"),
        (weighing(mean_D=broken_D), r"tensor mean_D holds NaN"),
        (
            weighing(mean_D=tensors["mean_D"].astype(np.float64)),
            r"tensor mean_D is .*float64.* expected .*float32",
        ),
    ]:
        with pytest.raises(ArtifactError, match=text):
            quantizers.load(damaged)
