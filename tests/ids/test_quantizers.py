"""Quantizers find what was planted, encode an item the same in any batch, and refuse what they cannot use."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiger_ray.errors import ArtifactError, DataError
from tiger_ray.ids import quantizers
from tiger_ray.ids.quantizers.points import ExactSum, Points
from tiger_ray.ids.quantizers.residual_kmeans import _lloyd_step, kmeans
from tiger_ray.ids.quantizers.rqvae import ResidualVae
from tiger_ray.settings.quantizer import QuantizerSettings


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
    return QuantizerSettings(
        **{"kind": "residual_kmeans", "level_sizes": (20, 20), "validation_share": 0.0} | changes
    )


def rqvae_settings(**changes):
    small = {"kind": "rqvae", "level_sizes": (8, 8), "latent_dim": 8, "hidden_dims": (32,)}
    return QuantizerSettings(**small | {"num_epochs": 40, "batch_size": 128} | changes)


def fit(settings, embedding_ND, **arguments):
    """Fitted on one worker that has it all, in two blocks."""
    blocks = np.array_split(embedding_ND, 2)
    return quantizers.fit(settings, blocks, **{"seed": 0} | arguments)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other make tiny products 100 times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["residual_kmeans", "rqvae", "lsh"])
def fitted(request):
    """A small quantizer of each kind that reads embeddings, and what it was fitted on."""
    settings = {
        "residual_kmeans": kmeans_settings(),
        "rqvae": rqvae_settings(num_epochs=3),
        "lsh": QuantizerSettings(kind="lsh", level_sizes=(8, 8)),
    }[request.param]
    embedding_ND = blob()
    return fit(settings, embedding_ND), embedding_ND


# Known answers and oracles


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_finds_planted_groups_exactly(seed):
    embedding_ND, group_N = planted(seed=seed)
    quantizer = fit(kmeans_settings(level_sizes=(20,)), embedding_ND, seed=seed)
    codewords_NL = quantizer.encode(embedding_ND)
    assert len(np.unique(np.column_stack([codewords_NL, group_N]), axis=0)) == len(np.unique(group_N)) == 20
    assert len(np.unique(codewords_NL)) == 20
    group_mean_GD = np.stack([embedding_ND[group_N == group].mean(axis=0) for group in range(20)])
    np.testing.assert_allclose(quantizer.reconstruct(codewords_NL), group_mean_GD[group_N], atol=1e-4)


def test_each_level_of_residual_kmeans_is_as_tight_as_sklearn_on_the_same_residuals():
    from sklearn.cluster import KMeans

    embedding_ND = blob()
    quantizer = fit(kmeans_settings(level_sizes=(20, 20, 20)), embedding_ND, seed=0)
    codewords_NL = quantizer.encode(embedding_ND)
    residual_ND = quantizer.standardize(torch.tensor(embedding_ND)).numpy()
    for level, codebook_CD in enumerate(quantizer.codebooks):
        sklearn = KMeans(20, n_init=1, max_iter=30, random_state=0).fit(residual_ND)
        residual_ND = residual_ND - codebook_CD.numpy()[codewords_NL[:, level]]
        assert np.square(residual_ND).sum() < 1.02 * sklearn.inertia_


def test_encode_takes_the_nearest_codeword_of_what_is_left_level_by_level():
    embedding_ND = blob()
    quantizer = fit(kmeans_settings(level_sizes=(20, 20, 20)), embedding_ND, seed=0)
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
    codewords_NL = quantizer.encode(embedding_ND)
    return [len(np.unique(codewords_NL[:, level])) / size for level, size in enumerate(quantizer.level_sizes)]


def test_rqvae_uses_every_codeword_and_reconstructs_planted_groups():
    embedding_ND, _ = planted(num_groups=24, noise=0.05)
    quantizer = fit(rqvae_settings(num_epochs=60, learning_rate=1e-2), embedding_ND, seed=0)
    assert usage(quantizer, embedding_ND) == [1.0, 1.0]
    error = np.square(quantizer.reconstruct(quantizer.encode(embedding_ND)) - embedding_ND).mean()
    assert error < 0.25 * embedding_ND.var(axis=0).mean()


def test_rqvae_starts_with_every_codeword_in_use():
    embedding_ND, _ = planted(num_groups=200, members=5, noise=0.05)
    untrained = rqvae_settings(level_sizes=(64, 64), num_epochs=1, learning_rate=1e-9)
    assert usage(fit(untrained, embedding_ND, seed=0), embedding_ND) == [1.0, 1.0]


def test_rqvae_brings_lost_codewords_back(monkeypatch):
    def lose_all_but_one(model, point_MD, generator):
        for codebook_CE in model.codebooks:
            codebook_CE[1:] = 1e3

    monkeypatch.setattr(ResidualVae, "start_codebooks", torch.no_grad()(lose_all_but_one))
    embedding_ND, _ = planted(num_groups=200, members=5, noise=0.05)
    settings = rqvae_settings(level_sizes=(32, 32), num_epochs=60, batch_size=128, learning_rate=1e-2)
    assert min(usage(fit(settings, embedding_ND), embedding_ND)) > 0.9


def test_rqvae_stops_when_held_out_items_no_longer_gain():
    lines = []
    settings = rqvae_settings(num_epochs=100_000, learning_rate=3e-2, batch_size=480)
    embedding_ND, _ = planted(num_groups=24, members=20)
    quantizer = fit(settings, embedding_ND, log=lines.append)
    assert 10 < len(lines) < 200
    errors = [float(line.split("held-out items ")[1].split(",")[0]) for line in lines]
    held_out_ND = embedding_ND[~quantizer.was_learned_from(embedding_ND)]
    assert 0 < len(held_out_ND) < 60
    point_MD = quantizer.standardize(torch.from_numpy(held_out_ND))
    assert quantizer.reconstruction_error(point_MD) == pytest.approx(min(errors), abs=1e-3)


def test_the_unit_of_a_dimension_does_not_matter():
    embedding_ND = blob()
    unit_D = 2.0 ** np.arange(-8, 8, dtype=np.float32)
    plain = Points([embedding_ND], kmeans_settings(), "cpu")
    rescaled = Points([embedding_ND * unit_D], kmeans_settings(), "cpu")
    np.testing.assert_allclose(next(iter(plain)), next(iter(rescaled)), atol=1e-5)


def test_a_constant_dimension_is_ignored_even_when_a_later_item_differs_there():
    embedding_ND = blob()
    embedding_ND[:, 3] = 0.1
    quantizer = fit(kmeans_settings(), embedding_ND, seed=0)
    codewords_NL = quantizer.encode(embedding_ND)
    embedding_ND[:, 3] = 1e6
    assert (quantizer.encode(embedding_ND) == codewords_NL).all()
    np.testing.assert_allclose(quantizer.reconstruct(codewords_NL)[:, 3], 0.1, rtol=1e-5)


def test_empty_clusters_move_to_the_farthest_points_not_twice_to_the_same():
    point_ND = torch.tensor([[0.0], [1.0], [-10.0], [-10.0], [8.0]])
    codebook_CD = torch.tensor([[0.0], [100.0], [200.0]])
    blocks = [point_ND[:2], point_ND[2:]]
    mean_CD = _lloyd_step(blocks, codebook_CD, ExactSum(10.0, 5))
    assert mean_CD.flatten().tolist() == pytest.approx([-2.2, -10.0, 8.0])


def test_kmeans_with_fewer_points_than_centers_still_covers_every_point():
    point_ND = torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    codebook_CD = kmeans(lambda: [point_ND], point_ND, 6, num_iterations=10, generator=generator)
    assert codebook_CD.isfinite().all()
    assert torch.cdist(point_ND, codebook_CD).min(dim=1).values.tolist() == [0.0, 0.0, 0.0]


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_exact_sums_do_not_depend_on_the_order(seed, count):
    rng = np.random.default_rng(seed)
    number_ND = torch.from_numpy(rng.normal(size=(count, 3)) * 10.0 ** rng.integers(-6, 6, (count, 1)))
    sums = ExactSum(number_ND.abs().max().item(), count)
    total_D = sums.total(iter([number_ND]))
    shuffled_ND = number_ND[rng.permutation(count)]
    assert torch.equal(sums.total(iter(torch.split(shuffled_ND, 1 + seed % 7))), total_D)
    exact_D = [math.fsum(column) for column in number_ND.T.tolist()]
    np.testing.assert_allclose(total_D, exact_D, atol=1e-15 * 4096 * number_ND.abs().max().item())


def test_the_codebooks_do_not_depend_on_blocks_or_the_order_of_items():
    embedding_ND = blob(items=3000)
    files = fit(kmeans_settings(), embedding_ND).to_files()
    order_N = np.random.default_rng(1).permutation(3000)
    pieces = np.split(embedding_ND[order_N], [1, 700, 700, 2900])
    assert quantizers.fit(kmeans_settings(), pieces, seed=0).to_files() == files


# The controls


def test_lsh_codewords_say_on_which_side_of_each_hyperplane_an_item_lies():
    embedding_ND = blob() + 5  # off the origin, as text embeddings are
    settings = QuantizerSettings(kind="lsh", level_sizes=(4, 8), validation_share=0.0)
    quantizer = fit(settings, embedding_ND)
    codewords_NL = quantizer.encode(embedding_ND)
    planes_HD = quantizer.hyperplanes_HD.double().numpy()
    deviation_D = embedding_ND.std(axis=0, dtype=np.float64)
    point_ND = (embedding_ND - embedding_ND.mean(axis=0, dtype=np.float64)) / deviation_D
    side_NH = point_ND @ planes_HD.T > 0
    assert (codewords_NL[:, 0] == side_NH[:, :2] @ [1, 2]).all()
    assert (codewords_NL[:, 1] == side_NH[:, 2:] @ [1, 2, 4]).all()
    assert usage(quantizer, embedding_ND) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"level_sizes \(4, 6\) must be powers of two"):
        QuantizerSettings(kind="lsh", level_sizes=(4, 6))


def test_random_codewords_follow_from_the_id_alone_and_are_uniform():
    settings = QuantizerSettings(kind="random", level_sizes=(16, 5))
    embedding_ND = blob(items=4000)
    quantizer = fit(settings, embedding_ND)
    item_id = pa.array([f"item-{n}" for n in range(4000)])
    codewords_NL = quantizer.encode(embedding_ND, item_id)
    assert (quantizer.encode(embedding_ND[::-1], item_id) == codewords_NL).all()
    assert (quantizer.encode(embedding_ND[7:], item_id[7:]) == codewords_NL[7:]).all()
    for level, size in enumerate((16, 5)):
        count_C = np.bincount(codewords_NL[:, level], minlength=size)
        assert np.square(count_C - 4000 / size).sum() / (4000 / size) < 60  # chi square
    joint = np.unique(codewords_NL[:, 0].astype(int) * 5 + codewords_NL[:, 1], return_counts=True)[1]
    assert len(joint) == 80
    assert joint.max() < 90
    other = fit(settings, embedding_ND, seed=1).encode(embedding_ND, item_id)
    assert (other == codewords_NL).mean() < 0.2


def test_flat_has_no_codewords():
    quantizer = fit(QuantizerSettings(kind="flat"), blob())
    assert quantizer.encode(blob()).shape == (1500, 0)
    assert quantizers.load(quantizer.to_files()).level_sizes == ()


def test_levels_may_have_sizes_of_their_own():
    for settings in (kmeans_settings(level_sizes=(16, 8, 4)), rqvae_settings(level_sizes=(16, 8, 4))):
        quantizer = fit(settings, blob())
        assert quantizer.encode(blob()).max(axis=0).tolist() == [15, 7, 3]


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
    first = fit(settings, embedding_ND, seed=1).to_files()
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert fit(settings, embedding_ND, seed=1).to_files() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert fit(settings, embedding_ND, seed=2).to_files() != first


def test_a_large_catalog_is_learned_from_a_sample_and_encoded_whole():
    embedding_ND = blob(items=3000)
    settings = kmeans_settings(level_sizes=(20,), sample_size=600, validation_share=0.1)
    quantizer = fit(settings, embedding_ND)
    learned_N = quantizer.was_learned_from(embedding_ND)
    assert 500 < learned_N.sum() < 700
    everything = kmeans_settings(level_sizes=(20,), sample_size=None)
    alone = fit(everything, embedding_ND[learned_N])
    assert (quantizer.encode(embedding_ND) == alone.encode(embedding_ND)).all()
    assert quantizer.encode(embedding_ND).shape == (3000, 1)


def test_held_out_items_are_not_learned_from():
    embedding_ND = blob(items=3000)
    settings = kmeans_settings(validation_share=0.2)
    quantizer = fit(settings, embedding_ND)
    learned_N = quantizer.was_learned_from(embedding_ND)
    assert 0.76 < learned_N.mean() < 0.84
    assert fit(settings, embedding_ND[learned_N]).to_files() == quantizer.to_files()
    loaded = quantizers.load(quantizer.to_files())
    assert (loaded.was_learned_from(embedding_ND) == learned_N).all()


def test_another_version_is_another_quantizer_even_with_equal_codebooks():
    first = fit(kmeans_settings(), blob()).to_files()
    second = fit(kmeans_settings(version=2), blob()).to_files()
    assert first["quantizer.safetensors"] == second["quantizer.safetensors"]
    assert first["quantizer.json"] != second["quantizer.json"]


# Input and artifacts that must be refused


def test_embeddings_with_nan_or_infinity_are_refused_by_item(fitted):
    embedding_ND, _ = planted()
    embedding_ND[5, 0], embedding_ND[7, 1] = np.nan, -np.inf
    embedding_ND[310, 1] = np.nan
    with pytest.raises(DataError, match=r"hold NaN or infinity; first rows: 5, 7, 310\. .*catalog\.vector"):
        fit(kmeans_settings(), embedding_ND, seed=0)
    quantizer, good_ND = fitted
    bad_ND = good_ND[:3] * np.array([[1], [np.inf], [1]], np.float32)
    with pytest.raises(DataError, match=r"1 of 3 .* first items: b\."):
        quantizer.encode(bad_ND, pa.array(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"1 of 3 .* first rows: 1\."):
        quantizer.encode(bad_ND)


def test_embeddings_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match=r"all 50 embeddings are equal.* catalog\.text"):
        fit(kmeans_settings(), np.ones((50, 4), np.float32), seed=0)
    nineteen_ND = np.repeat(np.arange(19, dtype=np.float32)[:, None], 9, axis=0) * np.array(
        [[1, -1]], np.float32
    )
    with pytest.raises(
        DataError,
        match=r"171 items have 19 distinct .* the 20 codewords .* quantizer\.level_sizes to 19 or less",
    ):
        fit(kmeans_settings(), nineteen_ND, seed=0)
    huge_ND = blob()
    huge_ND[4, 2] = 3e38
    with pytest.raises(DataError, match=r"dimension 2 .* too large for float32 \(up to 3e\+38\)"):
        fit(kmeans_settings(), huge_ND, seed=0)
    with pytest.raises(DataError, match="0 items have 0 distinct"):
        fit(kmeans_settings(), nineteen_ND[:0], seed=0)


def test_exactly_as_many_different_items_as_codewords_fit():
    embedding_ND = np.repeat(blob(items=20), 7, axis=0)
    quantizer = fit(kmeans_settings(), embedding_ND)
    codewords_NL = quantizer.encode(embedding_ND)
    assert len(np.unique(codewords_NL, axis=0)) == 20
    np.testing.assert_allclose(quantizer.reconstruct(codewords_NL), embedding_ND, atol=1e-4)


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
        (described(format_version=1), r"format_version 1; this software reads 2"),
        (
            described(kind="magic"),
            r"the kind 'magic'; this software knows \['flat', 'lsh', 'random', 'residual_kmeans', 'rqvae'\]",
        ),
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
