"""Points of curves: panels of a training, thinning, bins of a reliability table."""

from __future__ import annotations

from segkit.report.charts import calibration_points, thinned, training_curves


def test_a_long_curve_keeps_its_spikes_and_its_ends():
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[54_322] = (54_322.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= 601
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {points[54_321], points[54_322]} <= set(kept)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


def test_curves_are_sorted_into_panels():
    rows = [
        {"step": 10, "epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": 3.0},
        {"step": 20, "loss": float("nan"), "lr": 0.05, "score": 0.5, "dice": {"WT": 0.8, "ET": None}},
    ]
    assert training_curves(rows) == {
        "loss": {"loss": [(10, 1.0)]},
        "validation": {"score": [(20, 0.5)], "WT": [(20, 0.8)]},
        "learning rate": {"lr": [(10, 0.1), (20, 0.05)]},
    }


def test_bins_without_voxels_are_no_points():
    assert calibration_points({"confidence": [0.25, None, 0.75], "frequency": [0.2, None, 0.9]}) == [
        (0.25, 0.2),
        (0.75, 0.9),
    ]
    assert calibration_points({"confidence": None, "frequency": [0.5]}) == []
