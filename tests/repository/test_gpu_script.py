"""`jobs/benchmarks/gpu.py` runs where its docstring says: on a machine with a GPU, without Ray and boto3."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "boto3", "botocore"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
sys.path.insert(0, "jobs/benchmarks")
"""


def run(code):
    return subprocess.run([sys.executable, "-c", BLOCKED + code], cwd=REPO, capture_output=True, text=True)


def test_the_script_and_its_rivals_are_imported_without_ray_and_boto3():
    done = run("import gpu, rivals")
    assert done.returncode == 0, done.stderr


def test_the_block_holds():
    done = run("import ray.data")
    assert done.returncode == 1
    assert "ray is blocked" in done.stderr
