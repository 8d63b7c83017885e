"""`tiger-ray show`: what is printed is what was published, for text ids and for numbers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.night_fixtures import BOT, STRANGER
from tests.worlds import MONDAY, TUESDAY, publish, tiny_settings
from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.cli.main import main
from tiger_ray.core.hashing import shard_of, stable_hash
from tiger_ray.ids.semantic_ids import segment_of

IDS = {"string": (pa.string(), "item-{}", "user {}"), "int64": (pa.int64(), 10**12, 7 * 10**11)}
CODES = np.array([[1, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 1], [1, 1, 1], [3, 3, 3]], np.int16)
"""Codewords of items 0 to 5; items 0 and 4 share all three."""
HISTORIES = [[0, 5, 1], [], [2] * 25]
LISTS = [[(1, -0.5), (0, -1.0)], [(3, -2.0)], [(4, -0.25), (1, -3.0)]]
SHARDS = 3


class Planted:
    """A night with six items and three users, written by hand; item 5 is not available."""

    def __init__(self, root: str, kind: str, form: str) -> None:
        self.storage, self.id_type = Storage(root), IDS[kind][0]
        item, user = IDS[kind][1:]
        if kind == "string":
            self.items = [item.format(n) for n in range(6)]
            self.users = [user.format(n) for n in range(3)]
        else:
            self.items = [item + n for n in range(6)]
            self.users = [user + n for n in range(3)]
        self.settings = tiny_settings(root, "/nowhere", recommendations={"form": form, "top_k": 2}).resolved()
        self.form = form
        self._publish_items()
        self._publish_users()

    def _publish(self, artifact, files, metadata, inputs=None):
        return publish(
            self.storage, artifact, files, metadata, settings=self.settings, inputs=inputs, date=MONDAY
        )

    def _publish_items(self):
        item_id = pa.array(self.items, self.id_type)
        shard = shard_of(stable_hash(item_id), self.settings["catalog"]["num_shards"])
        rows = pa.table(
            {
                "item_id": item_id,
                "title": [f"Title {n}" for n in range(6)],
                "text": [""] * 6,
                "category": pa.nulls(6, pa.string()),
                "available": [n != 5 for n in range(6)],
            }
        ).cast(schemas.catalog(self.id_type))
        files = {f"shard-{n:05d}.parquet": rows.filter(shard == n) for n in np.unique(shard)}
        self._publish("catalog", files, {"id_type": str(self.id_type)})
        segment = segment_of(0, item_id, CODES, np.array([0, 0, 0, 0, 1, 0]))
        eligible = pa.table({"eligible": [n != 5 for n in range(6)]})
        self._publish(
            "semantic_ids",
            {"segment-00000.parquet": segment, "eligible.parquet": eligible},
            {"level_sizes": [4, 4, 4, 8], "item_id_type": str(self.id_type), "items": 6, "space": "s"},
        )

    def _publish_users(self):
        user_id = pa.array(self.users, self.id_type)
        key = stable_hash(user_id)
        shard = shard_of(key, SHARDS)
        users = pa.table(
            {"user_id": user_id, "user_hash": key, "history": pa.array(HISTORIES, pa.list_(pa.int32()))}
        )
        files = {f"shard-{n:05d}.parquet": users.filter(shard == n) for n in np.unique(shard)}
        metadata = {"users": 3, "user_id_type": str(self.id_type)}
        sequences = self._publish("sequences", files, metadata)
        rows = {n: self._rows(np.flatnonzero(shard == n)) for n in np.unique(shard)}
        files = {f"shard-{n:05d}.parquet": table for n, table in rows.items()}
        metadata = {"users": 3, "form": self.form, "top_k": 2, "eligible_items": 5}
        self._publish("recommendations", files, metadata, {"sequences": sequences.digest})

    def _rows(self, users):
        versions = {"date": MONDAY, "model_version": "m", "semantic_ids_version": "s"}
        source = ["generated", "fallback", "generated"]
        found = []
        for user in users:
            slots = [
                {
                    "item_id": self.items[item],
                    "score": score,
                    "semantic_id": [*CODES[item].tolist(), int(item == 4)],
                    "source": source[user],
                }
                for item, score in LISTS[user]
            ]
            if self.form == "long":
                own = {"user_id": self.users[user]}
                found += [{**own, "rank": n + 1, **slot, **versions} for n, slot in enumerate(slots)]
            else:
                lists = {f"{name}s": [slot[name] for slot in slots] for name in slots[0]}
                found.append({"user_id": self.users[user], **lists, **versions})
        schema = schemas.recommendations_long if self.form == "long" else schemas.recommendations
        return pa.Table.from_pylist(found, schema(self.id_type, self.id_type))

    def show(self, *words):
        return main(["show", *map(str, words), "--storage.root", self.storage.root])


@pytest.fixture(
    params=[("string", "wide"), ("int64", "long"), ("int64", "wide"), ("string", "long")], ids="-".join
)
def planted(request, tmp_path):
    return Planted(str(tmp_path / "root"), *request.param)


def cells(text: str) -> list[list[str]]:
    """Words of each line, without the padding."""
    return [line.split() for line in text.splitlines()]


def test_a_user_has_history_titles_scores_sources_and_semantic_ids(planted, capsys):
    assert planted.show("user", planted.users[0]) == 0
    shown = cells(capsys.readouterr().out)
    first, _, last = (str(planted.items[n]).split() for n in (0, 5, 1))
    assert ["1", *first, "Title", "0"] in shown
    assert ["2", *str(planted.items[5]).split(), "Title", "5", "not", "recommendable"] in shown
    assert ["1", *last, "Title", "1", "-0.5000", "generated", "1-1-2-0"] in shown
    assert ["2", *first, "Title", "0", "-1.0000", "generated", "1-1-1-0"] in shown


def test_what_was_left_out_is_said_with_the_reason(planted, capsys):
    planted.show("user", planted.users[0])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert notes == [
        "- 1 items of the history may not be recommended tonight: catalog.available is false, or tonight's catalog lacks "
        "the item"
    ]
    planted.show("user", planted.users[1])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert [note.split(":")[0] for note in notes] == [
        "- the history is empty",
        "- the model knows nothing of this user, so the list holds the most popular items",
        "- 1 of 2 items were found",
    ]
    planted.show("user", planted.users[2])
    shown = capsys.readouterr().out
    assert "history, oldest first (25 events, the last 20 shown)" in shown
    assert "- the model read the last 8 of 25 events (model.max_history)" in shown


def test_an_unknown_user_and_an_unknown_item_exit_3(planted, capsys):
    assert planted.show("user", "12345") == 3
    assert "no user '12345' is among the 3 users of 2026-11-23" in capsys.readouterr().err
    assert planted.show("item", "12345") == 3
    assert "no item '12345' is among the 6 items that were ever registered" in capsys.readouterr().err


def test_an_id_that_is_no_number_is_refused_where_ids_are_numbers(tmp_path, capsys):
    planted = Planted(str(tmp_path / "root"), "int64", "wide")
    assert planted.show("user", "mary") == 3
    assert "user 'mary' is not a number, but the user ids of this data are int64" in capsys.readouterr().err


def test_an_item_has_its_semantic_id_neighbours_by_prefix_and_how_often_it_is_recommended(planted, capsys):
    assert planted.show("item", planted.items[0]) == 0
    shown = cells(capsys.readouterr().out)
    assert ["Semantic", "ID", "1-1-1-0"] in shown
    assert ["recommendable", "yes"] in shown
    assert ["recommended", "to", "1", "of", "3", "users,", "first", "to", "0"] in shown
    neighbours = [line for line in shown if line and line[-2:-1] == ["Title"] and line[0].isdigit()]
    assert [(line[0], line[1], line[-1]) for line in neighbours] == [
        ("3", "1", "4"),
        ("2", "2", "1"),
        ("1", "3", "2"),
    ]
    planted.show("item", planted.items[1])
    assert "to 2 of 3 users, first to 1" in capsys.readouterr().out
    planted.show("item", planted.items[5])
    shown = capsys.readouterr().out
    assert "no: catalog.available is false" in shown
    assert "to 0 of 3 users, first to 0" in shown


def test_one_file_of_users_is_enough(planted, capsys):
    sequences = planted.storage.resolve("sequences", MONDAY)
    key = pa.array([planted.users[0]], planted.id_type)
    own = f"shard-{int(shard_of(stable_hash(key), SHARDS)[0]):05d}.parquet"
    for artifact in ("sequences", "recommendations"):
        for entry in planted.storage.resolve(artifact, MONDAY).files:
            if entry.name != own:
                (Path(planted.storage.root) / artifact / entry.path).unlink()
    assert sequences.file(own)
    assert planted.show("user", planted.users[0]) == 0
    assert "generated" in capsys.readouterr().out


def test_the_latest_night_is_shown_unless_a_date_is_given(planted, capsys):
    publish(planted.storage, "model", {"m.bin": b"x"}, {}, date=TUESDAY)
    planted.show("user", planted.users[0])
    assert f"night {MONDAY}" in capsys.readouterr().out
    assert planted.show("user", planted.users[0], "--date", TUESDAY) == 3
    assert f"no sequences is published for {TUESDAY}" in capsys.readouterr().err


def test_a_night_without_records_is_shown_from_its_manifests(planted, capsys):
    assert planted.show("run", MONDAY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "catalog",
        "semantic_ids",
        "sequences",
        "recommendations",
    ]
    assert all("no record" in line for line in lines[2:])
    assert planted.show("run", "2026-01-01") == 3
    assert "nothing is published for 2026-01-01" in capsys.readouterr().err


@pytest.mark.ray
def test_a_real_night_is_shown_as_it_was_published(night, capsys):
    root = ["--storage.root", night.storage.root]
    row = next(row for row in night.rows().to_pylist() if row["user_id"] == BOT)
    assert main(["show", "user", BOT, *root]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"{'-'.join(map(str, code))}\n") for code in row["semantic_ids"]]
    assert places == sorted(places)
    assert main(["show", "user", STRANGER, *root]) == 0
    assert "the history is empty" in capsys.readouterr().out
    item = row["item_ids"][0]
    users = sum(item in each["item_ids"] for each in night.rows().to_pylist())
    assert main(["show", "item", item, *root]) == 0
    assert f"to {users:,} of {night.rows().num_rows:,} users" in capsys.readouterr().out


@pytest.mark.ray
def test_a_real_night_has_status_seconds_and_metrics_of_every_stage(night, capsys):
    assert main(["show", "run", night.settings.date, "--storage.root", night.storage.root]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    for line, (artifact, result) in zip(lines, night.results.items(), strict=False):
        assert line.split()[:2] == [artifact, result.status]
        assert f"{result.manifest.rows:,}" in line.split()
    ndcg = night["evaluation"].metadata["model"]["ndcg@10"]
    assert any(line.startswith("TIGER") and f"{ndcg:.4f}" in line for line in lines)
