"""A bar is drawn for training where Ray Data draws bars, and nowhere else."""

import time
from collections.abc import Iterator

import pytest
import ray

from tiger_ray.cluster.progress import BarSink, progress_bar

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def bars() -> Iterator[ray.data.DataContext]:
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    yield context
    context.enable_progress_bars = before


def test_the_bar_shows_the_step_and_the_loss_that_a_worker_reports(
    bars: ray.data.DataContext, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars.enable_progress_bars = True
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws as on a terminal

    def work(bar: BarSink) -> None:
        bar(30, {"training/loss": 2.5})

    with progress_bar("model", 60) as bar:
        ray.get(ray.remote(work).remote(bar))
        assert bar is not None
        until = time.monotonic() + 30
        while (seen := ray.get(bar.board.read.remote())) == (0, "") and time.monotonic() < until:
            time.sleep(0.1)
        assert seen == (30, "loss 2.5000")
        time.sleep(1.5)
    shown = capfd.readouterr()
    assert "model" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(("enabled", "num_steps"), [(False, 60), (True, None)])
def test_no_bar_is_drawn_into_a_log_file_or_without_a_number_of_steps(
    bars: ray.data.DataContext, enabled: bool, num_steps: int | None
) -> None:
    bars.enable_progress_bars = enabled
    with progress_bar("model", num_steps) as bar:
        assert bar is None
