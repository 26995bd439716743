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


def test_stages_that_have_ended_keep_their_steps():
    before = Schedule(config(), IMAGES)
    assert before.ends == [15, 30]
    after = Schedule(config(epochs=5), IMAGES, before.progress(20))
    assert after.ends == [15, 40]
    assert [after.stage_of(step) for step in (14, 15, 39)] == [0, 1, 1]


def test_a_stage_is_lengthened_until_the_next_one_has_begun():
    before = Schedule(config(), IMAGES)
    assert Schedule(config(epochs=4), IMAGES, before.progress(15)).ends == [20, 40]
    assert Schedule(config(epochs=4), IMAGES, before.progress(16)).ends == [15, 35]


def test_a_finished_run_is_lengthened():
    before = Schedule(config(max_steps=3), IMAGES)
    after = Schedule(config(max_steps=5), IMAGES, before.progress(6))
    assert after.ends == [3, 8]
    assert Schedule(config(max_steps=3), IMAGES, before.progress(6)).total_steps == 6


def test_a_budget_below_the_steps_taken_ends_the_stage():
    before = Schedule(config(), IMAGES)
    after = Schedule(config(max_steps=4), IMAGES, before.progress(9))
    assert after.ends == [9, 13]
    assert after.stage_of(9) == 1
    assert Schedule(config(epochs=1), IMAGES, before.progress(9)).ends == [9, 14]


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
