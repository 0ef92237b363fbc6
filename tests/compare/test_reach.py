"""FLOPs at which an arm is as good as the baseline at its end."""

import pytest

from tokenlab.compare.reach import factors, reached


def curve(*points, split="validation", metric="loss"):
    return [{"train_flops": cost, "split": split, metric: value} for cost, value in points]


def test_the_point_lies_on_the_line_between_two_evaluations():
    points = curve((10, 4.0), (20, 3.0), (30, 2.0))
    assert reached(points, "validation", "loss", 2.5, higher=False) == 25.0
    assert reached(points, "validation", "loss", 4.5, higher=False) == 10.0  # from the first evaluation on
    assert reached(points, "validation", "loss", 1.9, higher=False) is None
    assert reached(points, "train", "loss", 2.5, higher=False) is None


def test_higher_may_be_better():
    points = curve((10, 0.2), (20, 0.6), metric="accuracy")
    assert reached(points, "validation", "accuracy", 0.4, higher=True) == 15.0


def test_a_run_that_falls_back_counts_from_where_it_first_was_there():
    points = curve((10, 4.0), (20, 2.0), (30, 3.0), (40, 1.0))
    assert reached(points, "validation", "loss", 3.0, higher=False) == 15.0


def test_eta_is_paired_by_seed():
    base = [{"seed": 0, "curve": curve((100, 3.0), (200, 2.0))}, {"seed": 1, "curve": curve((200, 2.5))}]
    arm = [
        {"seed": 0, "curve": curve((50, 3.0), (100, 2.0))},
        {"seed": 1, "curve": curve((50, 3.0), (150, 2.6))},
        {"seed": 2, "curve": curve((50, 1.0))},
    ]
    assert factors(arm, base, "validation", "loss", higher=False) == [pytest.approx(2.0), None]
    assert factors(base, base, "validation", "loss", higher=False) == [1.0, 1.0]
