"""How many steps a run has, whatever the sizes of those that are done."""

from typing import Any

import pytest

from common.training.planning.plan import Progress, count_iterations
from common.training.settings import TrainSettings


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"save_checkpoint_path": "/nowhere", "dataset_path": "d", "epochs": 1.0, **changes})


@pytest.mark.parametrize(
    "samples, epochs, batch, iterations",
    [
        (160, 1.0, 16, 10),
        (161, 1.0, 16, 11),
        (1, 0.001, 16, 1),
        (160, 0.5, 16, 5),
        (160, 3.0, 16, 30),
        (100, 1.1, 10, 11),  # in floats 100 x 1.1 is a little over 110
        (30, 0.1, 1, 3),
    ],
)
def test_epochs_are_rounded_up_to_whole_steps(samples: int, epochs: float, batch: int, iterations: int) -> None:
    train_settings = settings(epochs=epochs, global_batch_size=batch, micro_batch_size=1)
    assert count_iterations(train_settings, samples, Progress()) == iterations


def test_the_rest_of_the_epochs_is_counted_in_samples_since_a_step_may_have_been_of_another_size() -> None:
    train_settings = settings(epochs=2.0, global_batch_size=16, micro_batch_size=1)
    assert count_iterations(train_settings, 160, Progress(10, 80)) == 10 + 15  # ten steps of 8, then 240 samples by 16
    assert (
        count_iterations(train_settings, 160, Progress(20, 320))
        == count_iterations(train_settings, 160, Progress(20, 999))
        == 20
    )


def test_train_iters_is_the_number_of_steps_whatever_the_data() -> None:
    assert count_iterations(settings(epochs=None, train_iters=7), 1, Progress(3, 48)) == 7
