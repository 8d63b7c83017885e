"""`ray job submit` on two nodes that share nothing but an S3 server."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_tasks

from tests.nights import (
    DATE,
    REPOSITORY,
    SETTINGS,
    TIMEOUT_S,
    free_ports,
    private_mounts,
    published,
    ray_node,
    wait_for_nodes,
)
from tiger_ray.synthetic import world as synthetic

pytestmark = pytest.mark.cluster


UPLOAD_LIMIT = 100 * 2**20  # of the dashboard; a larger working directory is answered with HTTP 413


@dataclass(frozen=True)
class TwoNodes:
    dashboard: str
    head: Path
    worker: Path


@pytest.fixture
def two_nodes(s3_endpoint: str) -> Iterator[TwoNodes]:
    """A head and a second raylet with 1 CPU each.

    Neither sees the other's folder, nor the package in this checkout: code comes with the job or not at all.
    """
    if not private_mounts():
        pytest.skip("needs `unshare --mount`, without which both nodes would see one file system")
    port, dashboard_port, client = free_ports(3)
    address, dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
    # The entrypoint says `python`: it must be the one that runs this test, activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"RAY_ADDRESS": address, "PATH": path}
    with ExitStack() as stack:
        head, worker = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
            for _ in range(2)
        )
        code = (REPOSITORY / "tiger_ray", REPOSITORY / "jobs")
        words = ("--head", "--port", str(port), "--dashboard-port", str(dashboard_port), "--num-cpus", "1")
        client_port = ("--ray-client-server-port", str(client))
        stack.enter_context(
            ray_node(head, *words, *client_port, hidden=(*code, worker), environment=environment)
        )
        wait_for_nodes(dashboard, 1, [head])
        words = ("--address", address, "--num-cpus", "1")
        stack.enter_context(ray_node(worker, *words, hidden=(*code, head), environment=environment))
        wait_for_nodes(dashboard, 2, [head, worker])
        yield TwoNodes(dashboard, head, worker)


def package_bytes(node: Path) -> list[int]:
    """Unpacked sizes of the working directories that this node downloaded."""
    folders = [each for each in node.glob("session_*/runtime_resources/working_dir_files/*") if each.is_dir()]
    return [
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in {each.resolve() for each in folders}
    ]


@pytest.mark.timeout(600)
def test_a_submitted_night_runs_on_both_nodes_and_leaves_everything_on_s3(
    two_nodes: TwoNodes, s3_root: str, s3_client: Any, tmp_path: Path
) -> None:
    data = f"{s3_root}/data"
    synthetic.write(
        data,
        synthetic.World.build(120, 7),
        num_users=300,
        seed=7,
        min_events=6,
        max_events=20,
        num_files=2,
    )
    checkout = tmp_path / "checkout"
    caches = shutil.ignore_patterns(".venv", ".git", ".*_cache", ".hypothesis", "__pycache__", "demo")
    shutil.copytree(REPOSITORY, checkout, ignore=caches)
    for kept_at_home in (".venv", ".git", ".mypy_cache", "data", "tests"):
        (checkout / kept_at_home).mkdir(exist_ok=True)
        with (checkout / kept_at_home / "large.bin").open("wb") as file:
            file.truncate(2 * UPLOAD_LIMIT)
    (checkout / "night.yaml").write_text(SETTINGS.format(data=data))
    root = f"{s3_root}/root"

    submitted = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", two_nodes.dashboard),
            *("--submission-id", f"night-{DATE}", "--working-dir", str(checkout), "--"),
            *("python", "jobs/nightly.py", "--config", "night.yaml", "--date", DATE, "--storage.root", root),
            *("--training.num_workers=2", "--embeddings.num_workers=2", "--decoding.num_workers=2"),
        ],
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
    )
    assert submitted.returncode == 0, (submitted.stdout + submitted.stderr)[-6000:]

    client = JobSubmissionClient(two_nodes.dashboard)
    job = client.get_job_info(f"night-{DATE}")
    assert job.status == JobStatus.SUCCEEDED
    assert "recommended" in client.get_job_logs(f"night-{DATE}")

    actors = list_actors(address=two_nodes.dashboard, detail=True, limit=1000)
    trained_on = {each.node_id for each in actors if "RayTrainWorker" in each.class_name}
    assert len(trained_on) == 2, trained_on
    tasks = list_tasks(address=two_nodes.dashboard, detail=True, limit=10_000, raise_on_missing_output=False)
    mapped_on = {each.node_id for each in tasks if "Map" in each.name and each.node_id}
    assert mapped_on == trained_on

    manifests = published(root)
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    pages = s3_client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = {found["Key"] for page in pages for found in page["Contents"]}
    for artifact, manifest in manifests.items():
        assert {f"{prefix}/{artifact}/{entry.path}" for entry in manifest.files} <= keys
        left = [*two_nodes.head.rglob(manifest.run_id), *two_nodes.worker.rglob(manifest.run_id)]
        assert not left, "files of the storage root on the disk of a node"
    assert manifests["recommendations"].rows == 300
    for node in (two_nodes.head, two_nodes.worker):
        assert not [*node.rglob("_manifest.json"), *node.rglob("state.safetensors")]
        (size,) = package_bytes(node)
        assert size < UPLOAD_LIMIT / 20, f"the working directory has {size:,} bytes"
        print(f"working directory: {size:,} bytes")
