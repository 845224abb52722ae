"""How often the intervals of `segkit evaluate` hold the truth, with as many cases as people have.

The cases of a scores.json stand for all patients there are, so that their mean and median are the truth. Again and
again a few are drawn from them, and it is counted how often the interval of the few holds it: 95 % would be right.

    python docs/interval_coverage.py scores/scores.json --region Anterior --metric dice
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from segkit.metrics.bootstrap import bootstrap_intervals
from segkit.report.score_files import read_scores

CASES = (5, 10, 15, 25, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--region", required=True)
    parser.add_argument("--metric", default="dice")
    parser.add_argument("--repeats", type=int, default=1000)
    arguments = parser.parse_args()
    scores = read_scores(arguments.scores, "scores")
    found = np.array([scores.value(case, arguments.region, arguments.metric) for case in scores.cases])
    everyone = found[np.isfinite(found)]
    truth = {"mean": everyone.mean(), "median": np.median(everyone)}
    generator = np.random.default_rng(0)
    print(f"{arguments.region} {arguments.metric}, {len(everyone)} cases, {arguments.repeats} draws of each size")
    print("| cases | mean in its interval | median in its interval | width of the mean's interval |")
    print("| ---: | ---: | ---: | ---: |")
    for cases in CASES:
        drawn = [
            bootstrap_intervals(generator.choice(everyone, cases), seed=repeat) for repeat in range(arguments.repeats)
        ]
        held = {
            name: np.mean([getattr(own, name)[0] <= value <= getattr(own, name)[1] for own in drawn])
            for name, value in truth.items()
        }
        width = np.mean([own.mean[1] - own.mean[0] for own in drawn])
        print(f"| {cases} | {held['mean']:.1%} | {held['median']:.1%} | {width:.3f} |")


if __name__ == "__main__":
    main()
