"""The schedule of steps, stages and images, and how it changes when options change on resume."""

from fractions import Fraction

import pytest

from mflow_kernels.data.batches import Position
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.options import StageOptions
from mflow_kernels.runs.progress import Progress
from mflow_kernels.training.schedule import Schedule

IMAGES = 10


def config(**options):
    return TrainConfig(**{"batch_size": 2, "epochs": 3, **options})


@pytest.mark.parametrize("options", [{}, {"max_steps": 7}, {"stages": [StageOptions(max_steps=1)]}])
def test_a_run_that_resumes_anywhere_follows_the_same_schedule(options):
    whole = Schedule(config(**options), IMAGES)
    for step in range(whole.total_steps + 1):
        rest = Schedule(config(**options), IMAGES, whole.progress(step))
        assert (rest.begins, rest.ends) == (whole.begins, whole.ends)
        assert rest.validation_interval == whole.validation_interval
        for later in range(step, whole.total_steps + 1):
            assert rest.progress(later) == whole.progress(later)


@pytest.mark.parametrize(
    ("before", "taken", "after", "ends"),
    [
        ({}, 0, {}, [15, 30]),
        ({}, 20, {"epochs": 5}, [15, 40]),  # the stage that has ended keeps its steps
        ({}, 15, {"epochs": 4}, [20, 40]),  # the next one has not begun
        ({}, 16, {"epochs": 4}, [15, 35]),
        ({"max_steps": 3}, 6, {"max_steps": 5}, [3, 8]),  # a finished run
        ({"max_steps": 3}, 6, {"max_steps": 3}, [3, 6]),
        ({}, 9, {"max_steps": 4}, [9, 13]),  # a budget below the steps taken ends the stage
        ({}, 9, {"epochs": 1}, [9, 14]),
    ],
)
def test_changed_budgets_move_the_ends_that_are_left(before, taken, after, ends):
    progress = Schedule(config(**before), IMAGES).progress(taken)
    schedule = Schedule(config(**after), IMAGES, progress)
    assert schedule.ends == ends
    assert [schedule.stage_of(step) for step in (ends[0] - 1, *ends)] == [0, 1, 1]


@pytest.mark.parametrize("release", [False, True])
def test_each_stage_has_its_own_learning_rate(release):
    """With a warm-up of one step, the first step of a stage has its highest rate."""
    stages = [StageOptions(learning_rate=0.003), StageOptions(learning_rate=0.0005)]
    options = config(learning_rate=0.02, warm_up=1, stages=stages, release=release)
    schedule = Schedule(options, IMAGES)
    rates = [[schedule.rate_of(stage)(step) for stage in range(3)] for step in schedule.begins]
    one, two = (0.003, 0.0005) if release else (0.0, 0.0)
    assert rates == [[0.02, 0.0, 0.0], [one, 0.003, 0.0], [two, two, 0.0005]]


def test_passes_are_counted_if_the_batch_size_changes():
    """Seven steps at 5 a pass are 1.4 passes. At 2 steps a pass, the other 1.6 take 4 steps."""
    before = Schedule(config(), IMAGES)
    progress = before.progress(7)
    assert progress == Progress(7, (0,), Fraction(7, 5), Position(1, 4))
    after = Schedule(config(batch_size=4), IMAGES, progress)
    assert after.ends == [11, 11 + 3 * 2]
    assert after.progress(8) == Progress(8, (0,), Fraction(19, 10), Position(2, 0))
    assert after.progress(11) == Progress(11, (0,), Fraction(34, 10), Position(3, 4))
    assert after.progress(12) == Progress(12, (0, 11), Fraction(1, 2), Position(4, 0))
