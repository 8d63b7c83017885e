"""`cluster.yaml`, checked as `ray up` would, without any cloud."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tiger_ray.cluster.connect import IDLE_MS, IDLE_VARIABLE
from tiger_ray.settings.loading import load_settings

REPOSITORY = Path(__file__).parents[2]
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The file with Ray's defaults, as the launcher uses it."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((REPOSITORY / "cluster.yaml").read_text()))
    return prepared


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    """Version of every package of constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def workers(config: dict[str, Any]) -> dict[str, Any]:
    types = dict(config["available_node_types"])
    del types[config["head_node_type"]]
    return types


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


def test_ray_refuses_the_file_with_an_unknown_key(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="min_worker"):
        validate_config({**config, "min_worker": 1})


def test_the_head_takes_no_work(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert (head["min_workers"], head["max_workers"]) == (0, 0)


def test_there_are_workers_with_and_without_gpus(config: dict[str, Any]) -> None:
    types = workers(config)
    assert sorted(kind["resources"]["GPU"] > 0 for kind in types.values()) == [False, True]
    assert all(0 <= kind["min_workers"] <= kind["max_workers"] for kind in types.values())
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


def test_the_gpu_workers_suffice_for_the_nightly_settings(config: dict[str, Any]) -> None:
    settings = load_settings(["--config", str(REPOSITORY / "jobs/nightly.yaml"), "--date", "2026-11-23"])
    sections = (settings.embeddings, settings.training, settings.decoding)
    wanted = max(section.num_workers for section in sections if section.use_gpu)
    gpus = sum(kind["resources"]["GPU"] * kind["max_workers"] for kind in workers(config).values())
    assert gpus >= wanted


def test_every_node_runs_the_tested_ray_and_python(
    config: dict[str, Any], constraints: dict[str, str]
) -> None:
    docker = config["docker"]
    images = [docker["image"], docker["head_image"]]
    images += [kind["docker"]["worker_image"] for kind in workers(config).values() if "docker" in kind]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    python = project["tool"]["ruff"]["target-version"]
    assert {image.removesuffix("-gpu") for image in images} == {
        f"rayproject/ray:{constraints['ray']}-{python}"
    }
    for kind in workers(config).values():
        image = kind.get("docker", {}).get("worker_image", docker["image"])
        assert image.endswith("-gpu") == (kind["resources"]["GPU"] > 0)
    assert "3.0.0.dev" not in yaml.safe_dump(config)


def test_every_dependency_is_installed_at_its_tested_version(
    config: dict[str, Any], constraints: dict[str, str]
) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    pinned = dict(re.findall(r'"([^"=\s]+)==([^"\s]+)"', " ".join(config["setup_commands"])))
    assert pinned.keys() == needed
    assert pinned == {name: constraints[name.split("[")[0]] for name in needed}


def test_ray_starts_with_token_authentication_and_a_private_dashboard(config: dict[str, Any]) -> None:
    for commands in START_COMMANDS:
        (start,) = [command for command in config[commands] if "ray start" in command]
        assert "export RAY_AUTH_MODE=token;" in start.partition("ray start")[0]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert any("> ~/.ray/auth_token" in command for command in config["setup_commands"])


def test_ray_keeps_idle_workers_as_long_as_a_local_cluster_does(config: dict[str, Any]) -> None:
    for commands in START_COMMANDS:
        (start,) = [command for command in config[commands] if "ray start" in command]
        assert f"export {IDLE_VARIABLE}={IDLE_MS};" in start.partition("ray start")[0]


def test_no_secret_is_in_the_file_or_copied_to_a_node(config: dict[str, Any]) -> None:
    assert config["file_mounts"] == {}
    assert not re.search(r"AKIA|secret_access_key|ssh_private_key", yaml.safe_dump(config))
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"]["Name"]
