"""Publishing under rivals, lost answers and kills: schedules are generated, one store request at a time.

`Schedule` runs every job in a thread of its own, but lets only one request happen at once: hypothesis
chooses which job goes next and what befalls its request. After each request the invariants are checked
as any reader would see them.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import botocore.exceptions
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tiger_ray.artifacts.manifest import Manifest
from tiger_ray.artifacts.storage import Storage
from tiger_ray.artifacts.store import InputFile, NoAnswer, Outrun, Stored
from tiger_ray.core.hashing import fingerprint
from tiger_ray.errors import CommitUnknownError, PublishError, StorageError

DATES = ("2026-11-22", "2026-11-23")
NIGHTS = {name: fingerprint({"night": name}) for name in "ABC"}
CONTENT: dict[str, Any] = {"settings": {}, "inputs": {}, "metadata": {"n": 1}}

quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking a schedule of threads takes minutes
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True, scope="module")
def no_waiting() -> Iterator[None]:
    """Retries follow at once."""

    class NoJitter:
        def uniform(self, low: float, high: float) -> float:
            return 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiger_ray.artifacts.store._jitter", NoJitter())
        yield


class Killed(BaseException):
    """The process is gone: nothing in it may catch this."""


class Memory:
    """A store in memory that remembers every version of every object and refuses to delete."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.history: dict[str, list[bytes]] = {}

    def get(self, key: str) -> Stored | None:
        data = self.objects.get(key)
        return None if data is None else Stored(data, hashlib.md5(data).hexdigest())

    def read(self, key: str, parse: Callable[[Any], Any]) -> Any:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return parse(pa.BufferReader(self.objects[key]))

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.objects[key] = bytes(data)
        self.history.setdefault(key, []).append(bytes(data))

    def put_if(self, key: str, data: bytes, etag: str | None) -> None:
        there = self.get(key)
        if (there.etag if there else None) != etag:
            raise Outrun(key)
        self.put(key, data)

    def find(self, prefix: str) -> list[InputFile]:
        keys = [key for key in self.objects if key == prefix or key.startswith(f"{prefix}/")]
        return [InputFile(key, len(self.objects[key]), "") for key in keys]

    def delete(self, key: str) -> None:
        raise AssertionError(f"{key} was to be deleted")


FAULTS = ("none", "none", "none", "unsent", "lost answer", "kill before", "kill after")


class Faulty:
    """The same store as one job sees it: before each request it asks what shall befall it."""

    def __init__(self, memory: Memory, next_fault: Callable[[], str]) -> None:
        self._memory, self._next_fault = memory, next_fault
        self._one_at_a_time, self._killed = threading.Lock(), False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._memory, name)

        def request(*arguments: Any) -> Any:
            with self._one_at_a_time:
                fault = "kill before" if self._killed else self._next_fault()
                self._killed = fault.startswith("kill")
                if fault == "kill before":
                    raise Killed
                if fault == "unsent":
                    raise NoAnswer("503 SlowDown")
                result = operation(*arguments)
                if fault == "kill after":
                    raise Killed
                if fault == "lost answer":
                    raise NoAnswer("read timeout")
                return result

        return request


@dataclass
class Job:
    """A night as a process runs it: continue what is there, write what is missing, publish."""

    night: str
    date: str = DATES[1]
    replace: bool = False
    outcome: Manifest | BaseException | None = field(default=None, compare=False)

    def run(self, store: Any, deadline_s: float = 60.0) -> Manifest:
        storage = Storage("/nowhere", commit_deadline_s=deadline_s)
        storage.store = store
        complete = storage.completed("catalog", NIGHTS[self.night])
        if complete is not None:
            return storage.publish_again(complete, self.date, replace=self.replace)
        run = storage.begin("catalog", NIGHTS[self.night])
        done = run.finished()
        for shard in ("shard-0", "shard-1"):
            if shard not in done:
                done[shard] = run.write_file(shard, f"{self.night} {shard}".encode(), rows=1)
        return storage.publish(run, date=self.date, files=done.values(), replace=self.replace, **CONTENT)


def reader(memory: Memory) -> Storage:
    storage = Storage("/nowhere", commit_deadline_s=0.0)
    storage.store = memory  # type: ignore[assignment]
    return storage


def check_as_a_reader(memory: Memory) -> dict[str, Manifest]:
    """What is published now; every file of it must be whole, and of one night only."""
    storage, published = reader(memory), {}
    for date in DATES:
        manifest = storage.published("catalog", date)
        if manifest is not None:
            night = next(name for name, value in NIGHTS.items() if value == manifest.fingerprint)
            shards = [storage.read_file(manifest, entry) for entry in manifest.files]
            assert shards == [f"{night} shard-0".encode(), f"{night} shard-1".encode()]
            published[date] = manifest
    return published


class Schedule:
    """Lets several jobs run one store request at a time, in an order that hypothesis draws."""

    def __init__(self, memory: Memory, draw: Callable[[Any], Any], faults: tuple[str, ...]) -> None:
        self.memory, self.draw, self.faults = memory, draw, faults
        self.requests = 0

    def run(self, jobs: list[Job]) -> None:
        main = threading.Semaphore(0)
        turns = [threading.Semaphore(0) for _ in jobs]
        fates = ["none"] * len(jobs)
        alive = set(range(len(jobs)))

        def process(n: int) -> None:
            def next_fault() -> str:
                main.release()
                turns[n].acquire()
                return fates[n]

            turns[n].acquire()
            try:
                jobs[n].outcome = jobs[n].run(Faulty(self.memory, next_fault))
            except (Killed, PublishError) as error:
                jobs[n].outcome = error
            except BaseException as error:
                jobs[n].outcome = error
                raise
            finally:
                alive.discard(n)
                main.release()

        with ThreadPoolExecutor(len(jobs)) as threads:
            futures = [threads.submit(process, n) for n in range(len(jobs))]
            before: dict[str, Manifest] = {}
            try:
                while alive:
                    n = self.draw(st.sampled_from(sorted(alive)))
                    fates[n] = self.draw(st.sampled_from(self.faults))
                    turns[n].release()
                    main.acquire()
                    before = self.check(jobs, before)
            finally:
                # A failed check must not leave threads waiting for their turn.
                for n in range(len(jobs)):
                    fates[n] = "kill before"
                    for _ in range(1000 if n in alive else 0):
                        turns[n].release()
            for future in futures:
                future.result()

    def check(self, jobs: list[Job], before: dict[str, Manifest]) -> dict[str, Manifest]:
        now = check_as_a_reader(self.memory)
        assert before.keys() <= now.keys(), "a publication vanished"
        for date, manifest in before.items():
            assert now[date] == manifest or any(job.replace for job in jobs), "replaced, though nobody asked"
        latest = [json.loads(data)["date"] for data in self.memory.history.get("catalog/latest.json", [])]
        assert latest == sorted(latest), "latest moved back"
        for key, versions in self.memory.history.items():
            if "/_runs/" in key or "/_claims/" in key:
                assert len(set(versions)) == 1, f"{key} was overwritten"
        return now


jobs_for_one_date = st.lists(st.builds(Job, night=st.sampled_from("AB")), min_size=2, max_size=3)
jobs_of_all_kinds = st.lists(
    st.builds(Job, night=st.sampled_from("ABC"), date=st.sampled_from(DATES), replace=st.booleans()),
    min_size=2,
    max_size=3,
)


def only_winner(memory: Memory, jobs: list[Job]) -> Manifest:
    """What the one date shows, once and for all; its jobs know it, and the others were told."""
    (winner,) = check_as_a_reader(memory).values()
    for job in jobs:
        if NIGHTS[job.night] == winner.fingerprint:
            assert job.outcome == winner
        else:
            assert isinstance(job.outcome, PublishError)
    assert len(memory.history[f"catalog/date={DATES[1]}/_manifest.json"]) == 1
    return winner


@given(jobs=jobs_for_one_date, data=st.data())
@quick
def test_of_rivals_for_one_date_exactly_one_night_publishes_and_the_others_are_told(
    jobs: list[Job], data: st.DataObject
) -> None:
    memory = Memory()
    Schedule(memory, data.draw, ("none",)).run(jobs)
    winner = only_winner(memory, jobs)
    told = [job for job in jobs if isinstance(job.outcome, PublishError)]
    published = [job for job in jobs if job.outcome == winner]
    assert published
    assert {NIGHTS[job.night] for job in published} == {winner.fingerprint}
    assert len(told) + len(published) == len(jobs)


@given(jobs=jobs_for_one_date, data=st.data())
@quick
def test_after_lost_answers_and_kills_a_rerun_ends_published_with_the_same_content(
    jobs: list[Job], data: st.DataObject
) -> None:
    memory = Memory()
    Schedule(memory, data.draw, FAULTS).run(jobs)
    for job in jobs:
        if isinstance(job.outcome, Killed):
            try:
                job.outcome = job.run(memory)
            except PublishError as error:
                job.outcome = error
    winner = only_winner(memory, jobs)
    undisturbed = next(job for job in jobs if NIGHTS[job.night] == winner.fingerprint).run(Memory())
    assert winner.digest == undisturbed.digest
    assert reader(memory).resolve("catalog") == winner


@given(jobs=jobs_of_all_kinds, data=st.data())
@quick
def test_replacing_and_backfilling_under_faults_never_shows_a_mix_and_never_loses_a_file(
    jobs: list[Job], data: st.DataObject
) -> None:
    memory = Memory()
    Schedule(memory, data.draw, FAULTS).run(jobs)  # the invariants are checked after every request
    for job in jobs:
        job.outcome = job.run(memory) if job.replace else None
        assert not job.replace or check_as_a_reader(memory)[job.date] == job.outcome
    if check_as_a_reader(memory):
        reader(memory).resolve("catalog")
    for versions in memory.history.items():
        if versions[0].endswith("/_manifest.json") and "date=" in versions[0]:
            for version in versions[1]:
                for entry in Manifest.model_validate_json(version).files:
                    assert f"catalog/{entry.path}" in memory.objects


def number_of_requests() -> int:
    count = 0

    def none() -> str:
        nonlocal count
        count += 1
        return "none"

    Job("A").run(Faulty(Memory(), none))
    return count


@pytest.mark.parametrize("fault", ["kill before", "kill after", "lost answer", "unsent"])
def test_a_fault_at_any_single_request_of_a_night_changes_nothing_in_the_end(fault: str) -> None:
    undisturbed = Job("A").run(Memory())
    assert number_of_requests() >= 12
    for position in range(number_of_requests()):
        memory = Memory()
        fates = iter(["none"] * position + [fault])
        try:
            Job("A").run(Faulty(memory, lambda fates=fates: next(fates, "none")))
            assert "kill" not in fault
        except Killed:
            Job("A").run(memory)
        manifest = check_as_a_reader(memory)[DATES[1]]
        assert manifest.digest == undisturbed.digest
        assert reader(memory).resolve("catalog") == manifest


@pytest.mark.parametrize("applied", [True, False])
def test_an_answer_that_never_comes_is_unknown_and_the_next_run_finds_out(applied: bool) -> None:
    memory, commits = Memory(), [0]

    class NoAnswerToCommits(Memory):
        def __init__(self) -> None:
            self.objects, self.history = memory.objects, memory.history

        def get(self, key: str) -> Stored | None:
            if commits[0]:
                raise NoAnswer("503 SlowDown")
            return super().get(key)

        def put_if(self, key: str, data: bytes, etag: str | None) -> None:
            if "date=" not in key:
                return super().put_if(key, data, etag)
            commits[0] += 1
            if applied:
                memory.put_if(key, data, etag)
            raise NoAnswer("409 ConditionalRequestConflict")

    with pytest.raises(
        CommitUnknownError, match=r"may or may not be published\. Nothing was deleted; run the same"
    ):
        Job("A").run(NoAnswerToCommits(), deadline_s=0.0)
    assert commits == [1]
    assert (DATES[1] in check_as_a_reader(memory)) == applied
    assert Job("A").run(memory) == check_as_a_reader(memory)[DATES[1]]


def test_only_the_commit_itself_can_end_unknown() -> None:
    last_three = ["commit", "read latest.json", "move latest.json"]
    unknown = []
    for position in range(number_of_requests()):
        fates = iter(["none"] * position + ["unsent"])
        with pytest.raises(StorageError) as caught:
            Job("A").run(Faulty(Memory(), lambda fates=fates: next(fates, "none")), deadline_s=0.0)
        unknown.append(isinstance(caught.value, CommitUnknownError))
    assert unknown == [False] * (len(unknown) - len(last_three)) + [True, False, False]


def test_a_replacement_by_another_job_in_the_meantime_is_not_overwritten() -> None:
    memory = Memory()
    Job("A").run(memory)
    requests = [0]

    def rival_comes_before_the_commit() -> str:
        requests[0] += 1
        if requests[0] == number_of_requests() - 2:  # the commit; reading and moving latest.json follow
            Job("C", replace=True).run(memory)
        return "none"

    with pytest.raises(PublishError, match="Another job published it while this one was running"):
        Job("B", replace=True).run(Faulty(memory, rival_comes_before_the_commit))
    assert check_as_a_reader(memory)[DATES[1]].fingerprint == NIGHTS["C"]


def test_latest_does_not_move_back_though_a_newer_date_comes_in_between() -> None:
    memory, requests = Memory(), [0]

    def newer_date_comes_before_the_last_request() -> str:
        requests[0] += 1
        if requests[0] == number_of_requests():
            Job("B", date=DATES[1]).run(memory)
        return "none"

    Job("A", date=DATES[0]).run(Faulty(memory, newer_date_comes_before_the_last_request))
    assert reader(memory).resolve("catalog").date == DATES[1]
    assert check_as_a_reader(memory).keys() == set(DATES)


def test_a_rollback_that_a_new_night_overtakes_changes_nothing() -> None:
    memory, requests = Memory(), [0]
    for name, date in (("A", DATES[0]), ("B", DATES[1])):
        Job(name, date=date).run(memory)
    third = "2026-11-24"

    def new_night_comes_before_the_last_read() -> str:
        requests[0] += 1
        if requests[0] == 4:  # the manifest, the listing and `latest.json` were read
            Job("C", date=third).run(memory)
        return "none"

    with pytest.raises(PublishError, match=f"was moved by another job meanwhile and names {third} now"):
        reader(Faulty(memory, new_night_comes_before_the_last_read)).point_latest("catalog", DATES[0])
    assert reader(memory).resolve("catalog").date == third


@pytest.mark.parametrize("fault", ["unsent", "lost answer"])
def test_a_rollback_whose_write_gets_no_answer_is_done_once(fault: str) -> None:
    memory, requests = Memory(), [0]
    for name, date in (("A", DATES[0]), ("B", DATES[1])):
        Job(name, date=date).run(memory)
    moves = len(memory.history["catalog/latest.json"])

    def the_write_fails() -> str:
        requests[0] += 1
        return fault if requests[0] == 5 else "none"

    patient = reader(Faulty(memory, the_write_fails))
    patient.commit_deadline_s = 60.0
    assert patient.point_latest("catalog", DATES[0]) == DATES[1]
    assert requests[0] > 5
    assert reader(memory).resolve("catalog").date == DATES[0]
    assert len(memory.history["catalog/latest.json"]) == moves + 1


# The same on real stores: threads as they fall


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_no_update_by_compare_and_swap_is_lost(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if kind == "folder" else request.getfixturevalue("s3_root")
    Storage(root).store.put_if("counter", b"0", None)

    def count(_: int) -> None:
        store = Storage(root).store
        for _ in range(5):
            while True:
                there = store.get("counter")
                assert there is not None
                try:
                    store.put_if("counter", str(int(there.data) + 1).encode(), there.etag)
                    break
                except Outrun:
                    continue

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(count, range(4)))
    there = Storage(root).store.get("counter")
    assert there is not None
    assert there.data == b"20"


def race(make_storage: Callable[[], Storage], nights: list[str]) -> list[Manifest | PublishError]:
    start = threading.Barrier(len(nights))

    def contend(night: str) -> Manifest | PublishError:
        storage = make_storage()
        run = storage.begin("catalog", NIGHTS[night])
        entry = run.write_file("shard-0", night.encode())
        start.wait(30)
        try:
            return storage.publish(run, date=DATES[1], files=[entry], **CONTENT)
        except PublishError as error:
            return error

    with ThreadPoolExecutor(len(nights)) as threads:
        return list(threads.map(contend, nights))


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_eight_contenders_leave_exactly_one_winner(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    roots = [str(tmp_path / str(n)) for n in range(3)]
    if kind == "s3":
        roots = [request.getfixturevalue("s3_root")]
    for root in roots:
        nights = list("AABBBCCC")
        outcomes = race(lambda root=root: Storage(root), nights)
        there = Storage(root).resolve("catalog")
        for night, outcome in zip(nights, outcomes, strict=True):
            if NIGHTS[night] == there.fingerprint:
                assert outcome == there
            else:
                assert isinstance(outcome, PublishError)
        assert Storage(root).read_file(there, "shard-0") in (b"A", b"B", b"C")


def test_a_reader_beside_replacing_jobs_sees_whole_publications_only(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))

    def publish(night: str) -> None:
        run = storage.begin("catalog", NIGHTS[night])
        files = [run.write_file(f"shard-{n}", f"{night}{n}".encode()) for n in range(2)]
        storage.publish(run, date=DATES[1], files=files, replace=True, **CONTENT)

    publish("A")
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            manifest = storage.resolve("catalog")
            night = storage.read_file(manifest, "shard-0")[:1]
            assert storage.read_file(manifest, "shard-1") == night + b"1"
            seen.add(night)

    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read)
        for night in "BCABCABC":
            publish(night)
        done.set()
        reading.result()
    assert len(seen) > 1


@pytest.mark.parametrize("operation", ["after", "before"])
def test_a_client_that_loses_the_answer_of_its_own_commit_finds_out_that_it_won(
    s3_root: str, operation: str
) -> None:
    storage = Storage(s3_root)
    run = storage.begin("catalog", NIGHTS["A"])
    entry = run.write_file("shard-0", b"A")
    events = storage.store._client.meta.events  # type: ignore[attr-defined]
    commits = []

    def lose(**event: Any) -> None:
        if operation == "before" and "/date" not in event["request"].url:
            return
        commits.append(1)
        if len(commits) == 1:
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="http://test")

    # `after-call` comes when the store has answered, `before-send` when it has heard nothing yet.
    name = "after-call.s3.PutObject" if operation == "after" else "before-send.s3.PutObject"
    original = storage._commit

    def commit(*arguments: Any) -> Manifest:
        events.register_first(name, lose)
        try:
            return original(*arguments)
        finally:
            events.unregister(name, lose)

    storage._commit = commit  # type: ignore[method-assign]
    manifest = storage.publish(run, date=DATES[1], files=[entry], **CONTENT)
    assert commits == ([1] if operation == "after" else [1, 1])
    assert storage.resolve("catalog") == manifest
    assert manifest.run_id == run.run_id
