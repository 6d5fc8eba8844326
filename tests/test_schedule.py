import pytest

from lmc_lightning.schedule import Schedule


def test_default_is_the_start_and_every_epoch() -> None:
    schedule = Schedule.from_arguments()
    assert all(schedule.is_due("epoch", count) for count in range(4))
    assert not schedule.is_due("step", 0)


@pytest.mark.parametrize(
    ("arguments", "axis", "due"),
    [
        ({"every_n_epochs": 3}, "epoch", [0, 3, 6]),
        ({"epochs": [5, 1]}, "epoch", [1, 5]),
        ({"every_n_train_steps": 4}, "step", [0, 4]),
        ({"steps": (0, 7, 900)}, "step", [0, 7]),
    ],
)
def test_points_up_to_seven(arguments: dict[str, object], axis: str, due: list[int]) -> None:
    schedule = Schedule.from_arguments(**arguments)  # type: ignore[arg-type]
    assert schedule.axis == axis
    assert [count for count in range(8) if schedule.is_due(schedule.axis, count)] == due


def test_two_schedules_raise() -> None:
    with pytest.raises(ValueError, match="got epochs and steps"):
        Schedule.from_arguments(epochs=[1], steps=[2])


@pytest.mark.parametrize("arguments", [{"every_n_epochs": 0}, {"every_n_train_steps": True}, {"every_n_epochs": 2.0}])
def test_intervals_below_one_raise(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="integer of at least 1"):
        Schedule.from_arguments(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("points", [[], [-1], [1.5], [True]])
def test_impossible_points_raise(points: list[object]) -> None:
    with pytest.raises(ValueError, match="integers of at least 0"):
        Schedule.from_arguments(epochs=points)  # type: ignore[arg-type]
