"""Every baseline ranks as a loop over all items would, and SASRec computes, learns and keeps what it should."""

import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tiger_ray.errors import ArtifactError, SettingsError
from tiger_ray.model.sasrec import NO_ITEM, SasrecModel, pad_left
from tiger_ray.rankers import base as rankers_base
from tiger_ray.rankers import index as retrieval
from tiger_ray.rankers.base import Histories, Rules, without_newest
from tiger_ray.rankers.index import Exact, hnsw, ivf_flat, lifted
from tiger_ray.rankers.neighbours import Neighbours
from tiger_ray.rankers.popularity import Popularity
from tiger_ray.rankers.sasrec import Sasrec
from tiger_ray.settings.sasrec import SasrecSettings
from tiger_ray.settings.training import TrainingSettings
from tiger_ray.training.checkpoints import Progress, load_state, save_state
from tiger_ray.training.collate import sasrec_collate
from tiger_ray.training.examples import Batch, Examples
from tiger_ray.training.log import TrainingLog
from tiger_ray.training.loop import fit, make_optimizer
from tiger_ray.training.operations import sasrec_operations
from tiger_ray.training.validation import Validation

NUM_ITEMS = 37
CPU = torch.device("cpu")
ELIGIBLE_N = np.arange(NUM_ITEMS) % 5 != 2
ALL_N = np.ones(NUM_ITEMS, bool)
HISTORIES = [np.random.default_rng(user).integers(0, NUM_ITEMS, 1 + user % 9).tolist() for user in range(40)]


def joined(histories):
    """As the interface wants them: items one after the other, and items per history."""
    return np.concatenate(histories).astype(np.int32), np.array([len(history) for history in histories])


def recommended(ranker, histories, k):
    """(item, score) pairs of each user; the places after the last item are checked here."""
    found = ranker.recommend(Histories.of(histories), k)
    found_BK, score_BK = found.item_BK, found.score_BK
    assert found_BK.shape == score_BK.shape == (len(histories), k)
    assert (found_BK.dtype, score_BK.dtype) == (np.int64, np.float32)
    lists = []
    for found_K, score_K in zip(found_BK.tolist(), score_BK.tolist(), strict=True):
        length = found_K.index(-1) if -1 in found_K else k
        assert found_K[length:] == [-1] * (k - length)
        assert score_K[length:] == [-math.inf] * (k - length)
        lists.append(list(zip(found_K[:length], score_K[:length], strict=True)))
    return lists


def best(score_N, k, eligible_N, hidden=()):
    """By a loop: highest score first, lower item first where they are equal."""
    items = [item for item in range(len(score_N)) if eligible_N[item] and item not in hidden]
    items.sort(key=lambda item: (-score_N[item], item))
    return [(item, pytest.approx(float(score_N[item]), abs=1e-6)) for item in items[:k]]


class Products:
    """Ranks by the inner products of an index with vectors of users, whoever they are."""

    def __init__(self, index, user_BD, exclude_history=False):
        self.index, self.user_BD, self.exclude_history = index, user_BD, exclude_history

    def recommend(self, histories, k):
        search = lambda user_b, count: self.index.search(self.user_BD[user_b], count)
        return without_newest(search, histories, histories.lengths_B * self.exclude_history, k)


def whole_numbers(rows, width=3, seed=0):
    """Vectors whose products are exact, and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, width)).astype(np.float32)


# Popularity

EVENTS_N = np.random.default_rng(3).integers(0, 6, NUM_ITEMS)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_popularity_ranks_by_events_then_by_item_index_and_leaves_out_items_without_events(
    k, exclude_history
):
    ranker = Popularity(EVENTS_N, Rules(ELIGIBLE_N, exclude_history))
    with np.errstate(divide="ignore"):
        score_N = np.log(EVENTS_N / EVENTS_N.sum())
    assert (EVENTS_N == 0).any()
    for history, found in zip(HISTORIES, recommended(ranker, HISTORIES, k), strict=True):
        hidden = history if exclude_history else ()
        assert found == best(score_N, k, ELIGIBLE_N & (EVENTS_N > 0), hidden)


def test_without_any_event_nothing_is_popular():
    assert recommended(Popularity(np.zeros(NUM_ITEMS, int), Rules(ALL_N)), [[1], [2, 3]], 4) == [[], []]


def test_popularity_may_know_of_more_events_than_those_of_its_items():
    ranker = Popularity(np.array([0, 5, 3]), Rules(np.ones(3, bool)), num_events=16)
    assert recommended(ranker, [[]], 3) == [
        [(1, pytest.approx(math.log(5 / 16))), (2, pytest.approx(math.log(3 / 16)))]
    ]


# Neighbours


def embeddings():
    """Of norm 1 to 4, with cosines that are often equal; the first two items have none."""
    rng = np.random.default_rng(4)
    embedding_ND = rng.choice([-1.0, 1.0], (NUM_ITEMS, 4)) * 2.0 ** rng.integers(-1, 2, (NUM_ITEMS, 1))
    embedding_ND[0], embedding_ND[1] = np.nan, 0.0
    return embedding_ND.astype(np.float32)


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("exclude_history", [False, True])
def test_neighbours_are_nearest_to_the_newest_item_with_an_embedding_which_is_not_among_them(
    k, exclude_history
):
    embedding_ND = embeddings()
    histories = [*HISTORIES, [5, 0], [7, 9, 1, 0], [1], [0, 1], [8, 8]]
    found = recommended(Neighbours(embedding_ND, Rules(ELIGIBLE_N, exclude_history)), histories, k)
    for history, items in zip(histories, found, strict=True):
        with_embedding = [item for item in history if item > 1]
        if not with_embedding:
            assert items == []
            continue
        newest = with_embedding[-1]
        length_N = np.linalg.norm(embedding_ND, axis=1)
        with np.errstate(invalid="ignore"):
            cosine_N = embedding_ND @ embedding_ND[newest] / (length_N * length_N[newest])
        hidden = {newest, *(history if exclude_history else ())}
        assert items == best(cosine_N, k, ELIGIBLE_N & (np.arange(NUM_ITEMS) > 1), hidden)


# Retrieval


@pytest.mark.parametrize("tile", [(1, 1), (3, 5), (7, 37), (256, 16_384)])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_exact_retrieval_is_a_loop_over_all_items_whatever_is_in_memory_at_once(tile, k, monkeypatch):
    monkeypatch.setattr(retrieval, "USERS_AT_ONCE", tile[0])
    monkeypatch.setattr(retrieval, "ITEMS_AT_ONCE", tile[1])
    monkeypatch.setattr(rankers_base, "PLACES_AT_ONCE", 50 * tile[0])
    item_ND, user_BD = whole_numbers(NUM_ITEMS), whole_numbers(len(HISTORIES), seed=1)
    index = Exact(torch.from_numpy(item_ND), ELIGIBLE_N)
    score_BN = user_BD @ item_ND.T
    assert len(np.unique(score_BN[0])) < NUM_ITEMS / 2, "scores are often equal"
    for exclude_history in (False, True):
        found = recommended(Products(index, user_BD, exclude_history), HISTORIES, k)
        for history, score_N, items in zip(HISTORIES, score_BN, found, strict=True):
            hidden = history if exclude_history else ()
            assert items == best(score_N, k, ELIGIBLE_N, hidden)


def test_zero_and_minus_zero_are_equal_scores():
    item_ND = torch.tensor([[0.0], [-0.0], [0.0], [-1.0], [1.0]])
    found, score = Exact(item_ND, np.ones(5, bool)).search(np.ones((1, 1), np.float32), 5)
    assert found.tolist() == [[4, 0, 1, 2, 3]]
    assert score.tolist() == [[1.0, 0.0, 0.0, 0.0, -1.0]]


@pytest.mark.parametrize("num_eligible", [0, 1, 3])
def test_a_short_catalog_gives_short_lists(num_eligible):
    eligible_N = np.arange(NUM_ITEMS) < num_eligible
    ranker = Products(Exact(torch.from_numpy(whole_numbers(NUM_ITEMS)), eligible_N), whole_numbers(2))
    assert [len(found) for found in recommended(ranker, [[9], [9]], 5)] == [num_eligible] * 2


def test_a_user_whose_best_items_are_all_in_a_long_history_gets_the_next_ones():
    score_N = -np.arange(200, dtype=np.float32)[:, None]
    ranker = Products(Exact(torch.from_numpy(score_N), np.ones(200, bool)), np.ones((2, 1), np.float32), True)
    histories = [[*range(150), *range(50)], [3]]
    long, short = recommended(ranker, histories, 3)
    assert [item for item, _ in long] == [150, 151, 152]
    assert [item for item, _ in short] == [0, 1, 2]


@pytest.fixture(scope="module")
def clustered():
    """Item and user vectors around common centers, long ones and short ones, and which items are eligible."""
    pytest.importorskip("faiss", reason="the extra `studies` is not installed")
    rng = np.random.default_rng(0)
    center = rng.normal(size=(30, 16))
    item_ND = center[rng.integers(30, size=2000)] + 0.5 * rng.normal(size=(2000, 16))
    item_ND *= rng.lognormal(0.0, 0.5, size=(2000, 1))
    user_BD = center[rng.integers(30, size=100)] + 0.3 * rng.normal(size=(100, 16))
    return item_ND.astype(np.float32), user_BD.astype(np.float32), np.arange(2000) % 3 != 1


def recall(index, clustered):
    """Share of the exact top 10 that an index finds."""
    item_ND, user_BD, eligible_N = clustered
    found_BK, score_BK = index.search(user_BD, 10)
    exact_BK, exact_score_BK = Exact(torch.from_numpy(item_ND), eligible_N).search(user_BD, 10)
    there_BK = found_BK >= 0
    assert eligible_N[found_BK[there_BK]].all()
    product_BK = (user_BD[:, None] * item_ND[found_BK]).sum(2)
    assert score_BK[there_BK] == pytest.approx(product_BK[there_BK], rel=1e-4, abs=1e-4)
    assert (score_BK[:, 1:] <= score_BK[:, :-1]).all()
    hits = [len(set(found) & set(exact)) for found, exact in zip(found_BK, exact_BK, strict=True)]
    if sum(hits) == found_BK.size:
        assert score_BK == pytest.approx(exact_score_BK, rel=1e-4, abs=1e-4)
    return sum(hits) / found_BK.size


def test_hnsw_finds_nearly_all_of_the_best_eligible_items(clustered):
    assert recall(hnsw(clustered[0], clustered[2]), clustered) > 0.98


def test_ivf_finds_more_with_more_probes_and_everything_with_all(clustered):
    few, some, every = (
        recall(ivf_flat(clustered[0], clustered[2], num_lists=32, num_probes=n), clustered)
        for n in (2, 8, 32)
    )
    assert 0.3 < few < some < every == 1.0


def test_lifted_items_are_equally_long_and_the_nearer_the_larger_their_inner_product(clustered):
    item_ND, user_BD, _ = clustered
    lifted_NL = lifted(item_ND)
    assert lifted_NL[:, :-1].tolist() == item_ND.tolist()
    longest = np.linalg.norm(item_ND, axis=1).max()
    assert np.linalg.norm(lifted_NL, axis=1) == pytest.approx(longest, rel=1e-5)
    distance_BN = np.linalg.norm(np.pad(user_BD, ((0, 0), (0, 1)))[:, None] - lifted_NL, axis=2)
    squares_B = (user_BD**2).sum(1) + longest**2
    np.testing.assert_allclose(distance_BN**2, squares_B[:, None] - 2 * user_BD @ item_ND.T, rtol=1e-3)
    assert lifted(np.zeros((0, 3), np.float32)).shape == (0, 4)


@pytest.mark.parametrize("build", [hnsw, partial(ivf_flat, num_lists=4, num_probes=4)])
def test_an_approximate_index_leaves_out_histories_and_knows_short_catalogs(build, clustered):
    item_ND, user_BD = whole_numbers(NUM_ITEMS, seed=5), whole_numbers(len(HISTORIES), seed=1)
    ranker = Products(build(item_ND, ELIGIBLE_N), user_BD, exclude_history=True)
    for history, score_N, items in zip(
        HISTORIES, user_BD @ item_ND.T, recommended(ranker, HISTORIES, 40), strict=True
    ):
        assert items == best(score_N, 40, ELIGIBLE_N, history)


def test_an_approximate_index_has_no_item_twice_and_equal_scores_in_order_of_the_item(clustered):
    item_ND = np.ones((50, 2), np.float32)
    found_BK, _ = hnsw(item_ND, np.ones(50, bool)).search(item_ND[:1], 50)
    assert found_BK[0].tolist() == list(range(50))


def test_a_missing_faiss_is_a_settings_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for build in (hnsw, ivf_flat):
        with pytest.raises(SettingsError, match=r"needs faiss: pip install 'tiger-ray\[studies\]'"):
            build(whole_numbers(9), np.ones(9, bool))


# SASRec: what it computes


def sasrec(num_items=NUM_ITEMS, seed=0, **changed):
    """A small model whose weights are large enough to matter, in evaluation mode."""
    values = {"d_model": 8, "num_heads": 2, "d_ff": 12, "max_history": 5, "dropout": 0.0}
    torch.manual_seed(seed)
    model = SasrecModel(SasrecSettings(**(values | changed)), num_items)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return model.eval()


def written_out(model, history):
    """The vector of one history, one place and one head at a time."""
    of = model.settings
    width = of.d_model // of.num_heads
    history = history[-of.max_history :]
    hidden = [
        model.item.weight[item] * math.sqrt(of.d_model) + model.position.weight[len(history) - 1 - place]
        for place, item in enumerate(history)
    ]
    for layer in model.layers:
        normed = [layer.attention_norm(state) for state in hidden]
        read = []
        for place in range(len(history)):
            heads = []
            for head in range(of.num_heads):
                part = slice(head * width, (head + 1) * width)
                query = layer.query(normed[place])[part]
                scores = [query @ layer.key(state)[part] / math.sqrt(width) for state in normed[: place + 1]]
                weights = torch.stack(scores).softmax(0)
                values = [layer.value(state)[part] for state in normed[: place + 1]]
                heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
            read.append(layer.out(torch.cat(heads)))
        hidden = [state + new for state, new in zip(hidden, read, strict=True)]
        hidden = [
            state + layer.outer(layer.inner(layer.feed_forward_norm(state)).clamp(min=0)) for state in hidden
        ]
    normed = model.norm(hidden[-1])
    return model.output_map.weight @ normed if of.output_map else normed


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("changed", [{"num_layers": 1}, {"num_layers": 3}, {"output_map": True}])
def test_vectors_and_gradients_are_those_of_the_formulas_written_out(changed):
    model = sasrec(**changed)
    histories = HISTORIES[:6]
    history_BT = pad_left(*joined([history[-5:] for history in histories]))
    expected_BD = torch.stack([written_out(model, history) for history in histories])
    torch.testing.assert_close(model.users(history_BT), expected_BD, rtol=1e-4, atol=1e-5)

    target_B = torch.arange(6)
    expected = gradients(model, -(expected_BD @ model.item.weight.T).log_softmax(1)[range(6), target_B].sum())
    for name, gradient in gradients(model, model(history_BT, target_B).sum()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_user_has_the_same_vector_alone_in_a_batch_and_behind_more_padding():
    model = sasrec()
    user_BD = model.user_vectors(*joined(HISTORIES))
    for history, user_D in zip(HISTORIES, user_BD, strict=True):
        assert model.user_vectors(*joined([history]))[0] == pytest.approx(user_D, abs=1e-5)
        more = F.pad(torch.tensor([history[-3:]]), (5 - len(history[-3:]), 0), value=NO_ITEM)
        assert model.users(more)[0].tolist() == pytest.approx(
            model.user_vectors(*joined([history[-3:]]))[0], abs=1e-5
        )


def test_only_the_newest_items_count_and_their_order_does():
    model = sasrec()
    one, longer, other, turned = model.user_vectors(
        *joined([[1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [9, 2, 3, 4, 5], [2, 1, 3, 4, 5]])
    )
    assert longer == pytest.approx(one, abs=1e-6)
    assert np.abs(other - one).max() > 1e-3
    assert np.abs(turned - one).max() > 1e-3


def test_no_place_sees_a_later_one():
    model = sasrec()
    seen = []
    model.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(output[0]))
    for changed in range(5):
        history = torch.tensor([[1, 2, 3, 4, 5]])
        model.users(history)
        history[0, changed] = 20
        model.users(history)
        before, after = seen[-2:]
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [place < changed for place in range(5)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_softmax_loss_is_the_cross_entropy_over_all_items(label_smoothing):
    model = sasrec()
    history_BT, target_B = pad_left(*joined(HISTORIES[:4])), torch.tensor([3, 0, 36, 3])
    loss_BI = model(history_BT, target_B, label_smoothing).detach()
    assert loss_BI.shape == (4, 1)
    score_BN = model.users(history_BT).detach().numpy() @ model.item.weight.detach().numpy().T
    for score_N, target, loss in zip(score_BN.tolist(), target_B.tolist(), loss_BI[:, 0], strict=True):
        total = sum(math.exp(score) for score in score_N)
        losses = [math.log(total) - score for score in score_N]
        expected = (1 - label_smoothing) * losses[target] + label_smoothing * sum(losses) / NUM_ITEMS
        assert float(loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_binary_loss_wants_the_target_up_and_another_item_down(label_smoothing):
    model = sasrec(num_items=2, loss="binary")  # there is only one other item
    history_BT, target_B = torch.tensor([[0], [1], [0]]), torch.tensor([0, 0, 1])
    loss_BI = model(history_BT, target_B, label_smoothing).detach()
    assert loss_BI.shape == (3, 1)
    score_B2 = (model.users(history_BT) @ model.item.weight.T).tolist()
    for score_2, target, loss in zip(score_B2, target_B.tolist(), loss_BI[:, 0], strict=True):
        share = 1 - label_smoothing / 2
        up, down = (1 / (1 + math.exp(-score)) for score in (score_2[target], score_2[1 - target]))
        expected = -share * math.log(up * (1 - down)) - (1 - share) * math.log((1 - up) * down)
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_binary_loss_draws_every_other_item_alike_and_follows_the_seed(monkeypatch):
    model = sasrec(num_items=5, loss="binary")
    drawn = []
    item = model.item.forward
    monkeypatch.setattr(model.item, "forward", lambda index: drawn.append(index) or item(index))
    history_BT, target_B = torch.zeros(20_000, 1, dtype=torch.int64), torch.full((20_000,), 2)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(history_BT, target_B))
    counts = np.bincount(drawn[1][:, 1], minlength=5)
    assert counts[2] == 0
    assert np.delete(counts, 2) == pytest.approx(5000, abs=300)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    "changed", [{}, {"loss": "binary"}, {"loss": "binary", "output_map": True, "num_layers": 1}]
)
def test_operations_are_those_of_the_matrix_products_without_padding(changed):
    model = SasrecModel(SasrecSettings(**({"num_layers": 3, "num_heads": 2, "d_ff": 128} | changed)), 2000)
    history_BT = torch.randint(0, 2000, (8, 20))
    with FlopCounterMode(display=False) as counter:
        model(history_BT, torch.arange(8)).sum().backward()
    assert sasrec_operations(model, np.full(8, 20)) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_sasrec_ranks_by_inner_product_and_takes_any_index():
    model = sasrec()
    score_BN = model.user_vectors(*joined(HISTORIES)) @ model.item.weight.detach().numpy().T
    for index in (None, Exact(model.item.weight, ELIGIBLE_N)):
        ranker = Sasrec(model, CPU, rules=Rules(ELIGIBLE_N, exclude_history=True), index=index)
        found = recommended(ranker, HISTORIES, 10)
        for history, score_N, items in zip(HISTORIES, score_BN, found, strict=True):
            assert items == best(score_N, 10, ELIGIBLE_N, history)


# SASRec: what it keeps


def test_a_model_read_back_is_the_one_that_was_written():
    model = sasrec(loss="binary")
    again = SasrecModel.from_files(model.to_files())
    assert again.settings == model.settings
    assert not again.training
    assert np.array_equal(again.user_vectors(*joined(HISTORIES)), model.user_vectors(*joined(HISTORIES)))
    assert again.to_files() == model.to_files()


def with_config(files, change):
    config = json.loads(files["config.json"])
    change(config)
    return files | {"config.json": json.dumps(config).encode()}


def with_tensors(files, change):
    tensors = safetensors.torch.load(files["model.safetensors"])
    change(tensors)
    return files | {"model.safetensors": safetensors.torch.save(tensors)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: {}, r"has no file config.json; it holds no files"),
        (
            lambda files: {"config.json": files["config.json"]},
            r"has no file model.safetensors; it holds \['config",
        ),
        (lambda files: files | {"config.json": b"{"}, r"config.json of the model is damaged"),
        (
            lambda files: with_config(files, lambda config: config.update(model_type="t5")),
            r"not SASRec's: .*'t5'",
        ),
        (
            lambda files: with_config(files, lambda config: config["tiger_ray"]["model"].update(depth=3)),
            r"(?s)config.json of the model is damaged .*depth",
        ),
        (
            lambda files: with_config(files, lambda config: config["tiger_ray"].update(num_items=38)),
            r"tensor item.weight of model.safetensors has shape \(37, 8\), but its config.json asks for \(38, 8\)",
        ),
        (
            lambda files: files | {"model.safetensors": files["model.safetensors"][:-3]},
            r"model.safetensors is damaged",
        ),
        (
            lambda files: with_tensors(files, lambda tensors: tensors.pop("norm.bias")),
            r"tensor norm.bias of model.safetensors has shape none",
        ),
        (
            lambda files: with_tensors(files, lambda tensors: tensors.update(more=torch.ones(1))),
            r"tensor more of model.safetensors .* asks for no such tensor",
        ),
        (
            lambda files: with_tensors(files, lambda tensors: tensors["item.weight"].fill_(torch.nan)),
            r"tensor item.weight .* not finite",
        ),
    ],
)
def test_damaged_files_are_refused(damage, message):
    with pytest.raises(ArtifactError, match=message):
        SasrecModel.from_files(damage(sasrec().to_files()))


# SASRec: how it is trained


def cycles(num_items, num_users=60, length=7):
    """Users who always take the item after their last one."""
    return [[(user * 7 + place) % num_items for place in range(length)] for user in range(num_users)]


def train(model, settings, histories, progress=None, optimizer=None, **changed):
    progress = progress or Progress()
    items, lengths = joined(histories)
    examples = Examples.of(
        items, lengths, np.arange(len(lengths), dtype=np.uint64), max_history=5, seed=settings.num_steps
    )
    fit(
        model,
        optimizer or make_optimizer(model, settings),
        examples.batches(settings.global_batch_size, start=progress.step, batch_tokens=settings.batch_tokens),
        sasrec_collate(model),
        settings,
        progress,
        TrainingLog(settings.log_every_steps, settings.num_steps, CPU),
        seed=3,
        **changed,
    )
    return progress


FAST = TrainingSettings(
    optimizer="adamw",
    learning_rate=0.02,
    warmup_steps=5,
    num_steps=150,
    global_batch_size=64,
    precision="fp32",
    checkpoint_every_steps=75,
)


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_training_learns_that_the_next_item_is_the_previous_plus_one(loss):
    torch.manual_seed(0)
    settings = SasrecSettings(loss=loss, d_model=16, d_ff=16, num_layers=1, dropout=0.1, max_history=5)
    model = SasrecModel(settings, 20)
    histories = cycles(20)
    rules = Rules(np.ones(20, bool))
    before, target = [history[:-2] for history in histories], [history[-2] for history in histories]
    validation = Validation(
        Histories.of(before),
        np.array(target),
        partial(Sasrec, rules=rules),
    )
    untrained = validation.metrics(model, CPU)
    assert untrained["ndcg@10"] < 0.6
    assert model.training, "validation leaves the model as it was"
    progress = train(model, FAST, histories, validate=partial(validation.metrics, model, CPU))
    assert progress.chosen["ndcg@10"] > 0.95
    with torch.no_grad():
        for name, weight in progress.best.items():
            model.get_parameter(name).copy_(weight)
    found = recommended(Sasrec(model.eval(), CPU, rules=rules), before, 1)
    assert np.mean([items[0][0] == item for items, item in zip(found, target, strict=True)]) > 0.9


def weights_after(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_a_run_resumed_from_its_checkpoint_ends_bit_for_bit_where_an_uninterrupted_one_does(loss):
    settings = FAST.model_copy(update={"num_steps": 6, "checkpoint_every_steps": 3, "batch_tokens": 100})
    saved = []
    model = sasrec(dropout=0.3, loss=loss)
    optimizer = make_optimizer(model, settings)
    save = lambda progress: saved.append(save_state(model, optimizer, progress))
    train(model, settings, HISTORIES, optimizer=optimizer, save=save)

    resumed = sasrec(dropout=0.3, loss=loss, seed=9)
    other = make_optimizer(resumed, settings)
    progress = load_state(saved[0], resumed, other)
    assert progress.step == 3
    train(resumed, settings, HISTORIES, progress, other)
    for name, weight in weights_after(model).items():
        assert torch.equal(weight, weights_after(resumed)[name]), name


def test_accumulated_parts_give_the_gradient_of_the_whole():
    found = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            found.append([p.grad.clone() for group in self.param_groups for p in group["params"]])

    for batch_tokens in (None, 40):
        model = sasrec()
        settings = FAST.model_copy(
            update={"num_steps": 1, "max_grad_norm": 1e9, "batch_tokens": batch_tokens}
        )
        train(model, settings, HISTORIES, optimizer=Recorder(model.parameters(), lr=0.1))
    for whole, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


def test_work_counts_items_with_and_without_padding():
    model = sasrec()
    batch = Batch(*joined([[1], [1, 2], [1, 2, 3]]), np.zeros(3, np.uint64), np.array([2, 3, 4], np.int32))
    collated = sasrec_collate(model)(batch)
    history_BT, target_B = collated.inputs
    assert (collated.tokens, collated.padded) == (6, 9)
    assert history_BT.tolist() == [[NO_ITEM, NO_ITEM, 1], [NO_ITEM, 1, 2], [1, 2, 3]]
    assert target_B.tolist() == [2, 3, 4]
    assert collated.operations == sasrec_operations(model, np.array([1, 2, 3]))
