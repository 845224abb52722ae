"""How often the intervals of `segkit evaluate` hold the truth, with as many cases as people have.

The cases of a scores.json stand for all patients there are, so that their mean and median are the truth. Again and
again a few are drawn from them, and it is counted how often the interval of the few holds it: 95 % would be right.

    python benchmarks/interval_coverage.py scores/scores.json --region Anterior --metric dice
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from segkit.evaluation.score_files import read_scores
from segkit.metrics.statistics import mean_interval, median_interval

CASES = (5, 10, 15, 25, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--region", required=True)
    parser.add_argument("--metric", default="dice")
    parser.add_argument("--repeats", type=int, default=1000)
    arguments = parser.parse_args()
    scores = read_scores(arguments.scores)
    found = np.array([scores.value(case, arguments.region, arguments.metric) for case in scores.cases])
    everyone = found[np.isfinite(found)]
    truth = {"mean": everyone.mean(), "median": np.median(everyone)}
    generator = np.random.default_rng(0)
    print(f"{arguments.region} {arguments.metric}, {len(everyone)} cases, {arguments.repeats} draws of each size")
    print("| cases | mean in its interval | median in its interval | width of the mean's interval |")
    print("| ---: | ---: | ---: | ---: |")
    for cases in CASES:
        held, widths = dict.fromkeys(truth, 0), []
        for repeat in range(arguments.repeats):
            drawn = generator.choice(everyone, cases)
            found = {"mean": mean_interval(drawn, seed=repeat), "median": median_interval(drawn, seed=repeat)}
            for name, (low, high) in found.items():
                held[name] += low <= truth[name] <= high
            widths.append(np.ptp(found["mean"]))
        mean, median = (count / arguments.repeats for count in held.values())
        print(f"| {cases} | {mean:.1%} | {median:.1%} | {np.mean(widths):.3f} |")


if __name__ == "__main__":
    main()
