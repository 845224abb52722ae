"""Models compared by their scores on the same cases: paired differences with their tests, and the BraTS ranking.

Every pair of models gets, for each region and metric, the mean difference with its bootstrap interval, a Wilcoxon
signed-rank test corrected by Holm's method over all tests of the comparison, and an effect size; all models together
get the rank scores of `segkit.metrics.statistics`. Where patients have several cases, only patients are independent:
intervals and exchanges draw whole patients, and the signed-rank test takes each patient's mean difference.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError
from segkit.evaluation.score_files import (
    ScoreSet,
    csv_table,
    interval_text,
    markdown_list,
    markdown_table,
    write_documents,
)
from segkit.metrics import statistics
from segkit.metrics.registry import METRICS
from segkit.metrics.statistics import RESAMPLES, Interval, mean_interval, number_patients

_RANKED = (("lesionwise_dice", "lesionwise_hd95_mm"), ("dice", "hd95_mm"), ("dice", "hd95_voxels"))
"""The metrics that BraTS ranks by, lesion-wise from 2023 on; the first pair that all models have is used."""

_DECIMALS = 12
"""Scores that differ by less are equal."""

_TOO_FEW = 5
"""A signed-rank test of so many patients has p of 2 / 2^5 or more, even if all differences have one sign."""

_REFERENCE = "reference_ml"
"""A metric of the reference alone: where it differs, so do the references."""

_MEANS = ("model", "baseline", "region", "metric", "cases", "model_mean", "baseline_mean", "difference")
_TESTS = ("better", "equal", "worse", "p", "p_holm", "effect", "method", "zeros")
_FIELDS = (*_MEANS, "ci95", *_TESTS, "ties")
_COLUMNS = (*_MEANS, "low", "high", *_TESTS)

_METHODS = f"""\
Difference is model less baseline, mean over cases, with its 95 % interval (expanded percentile bootstrap, {RESAMPLES}
resamples). Better, equal and worse count cases. p is of the two-sided Wilcoxon signed-rank test, Holm's correction goes
over all tests of this table, and effect is the matched-pairs rank-biserial correlation, from -1 to 1, positive where
the model is better. The rank score is that of BraTS (arXiv 1811.02629): the mean over cases of a case's mean rank over
regions and metrics. p of the ranking is one-sided: how often random exchanges of the two models' ranks, case by case
({statistics.EXCHANGES} or all there are), set their scores as far apart.
"""


@dataclass(frozen=True)
class PairedComparison:
    """One model against another, the baseline, in one region by one metric, over the cases that both have scores of.

    `difference` is the mean of model less baseline in the metric's unit, `interval` its 95 % interval (None for fewer
    than two patients). `better`, `equal` and `worse` count cases in the sense of the metric (less is better with HD95);
    `test.effect` is positive where the model is better. `p_holm` is corrected for all tests of the comparison.
    """

    model: str
    baseline: str
    region: str
    metric: str
    cases: int
    model_mean: float
    baseline_mean: float
    difference: float
    interval: Interval | None
    better: int
    equal: int
    worse: int
    test: statistics.SignedRank
    p_holm: float = math.nan

    def to_json(self, fields: Sequence[str] = _FIELDS) -> dict[str, Any]:
        """The entry of "pairs" in comparison.json, or a row of comparison.csv: what is undefined is None."""
        low, high = self.interval or (None, None)
        ends = {"ci95": self.interval and [low, high], "low": low, "high": high, "ties": self.test.has_ties}
        values = {**vars(self), **vars(self.test), **ends}
        undefined = {name for name, value in values.items() if isinstance(value, float) and math.isnan(value)}
        return {name: None if name in undefined else values[name] for name in fields}


@dataclass(frozen=True)
class Ranked:
    """A model in the ranking: its place, and its final rank score (1 is best) with the 95 % interval over patients."""

    model: str
    place: int
    score: float
    ci95: Interval | None


@dataclass(frozen=True)
class Exchange:
    """A permutation test of the difference of two rank scores; one-sided, in favour of `model`."""

    model: str
    baseline: str
    difference: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_scores`; `ranking` is in the order of places, `notes` are what a reader must know."""

    models: tuple[ScoreSet, ...]
    regions: tuple[str, ...]
    metrics: tuple[str, ...]
    cases: tuple[str, ...]
    patients: int
    pairs: tuple[PairedComparison, ...]
    ranking: tuple[Ranked, ...]
    exchanges: tuple[Exchange, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of `segkit compare --json`, strict JSON: what is undefined is null."""
        return {
            "models": [{"name": model.name, "scores": str(model.path)} for model in self.models],
            "protocol": self.models[0].protocol,
            "challenge": self.models[0].challenge,
            "regions": list(self.regions),
            "metrics": list(self.metrics),
            "cases": list(self.cases),
            "patients": self.patients,
            "ranking": [vars(own) | {"ci95": own.ci95 and list(own.ci95)} for own in self.ranking],
            "exchanges": [asdict(own) for own in self.exchanges],
            "pairs": [pair.to_json() for pair in self.pairs],
            "notes": list(self.notes),
        }

    def ranking_rows(self) -> tuple[list[str], list[list[str]]]:
        """Column titles, and a row for each model: place, rank score, interval, and p against each model behind it."""
        p_of = {(own.model, own.baseline): _p(own.p) for own in self.exchanges}
        others = [ranked.model for ranked in self.ranking][1:]
        rows = [
            [own.model, str(own.place), f"{own.score:.3f}", interval_text(own.ci95)]
            + [p_of.get((own.model, other), "") for other in others]
            for own in self.ranking
        ]
        return ["model", "place", "rank score", "95 % CI", *(f"p against {name}" for name in others)], rows

    def pair_rows(self) -> tuple[list[str], list[list[str]]]:
        """Column titles, and a row for each pair of models, region and metric."""
        rows = [
            [
                f"{pair.model} - {pair.baseline}",
                pair.region,
                METRICS[pair.metric].title,
                f"{pair.difference:+.4f}",
                interval_text(pair.interval, "+.4f"),
                f"{pair.better}/{pair.equal}/{pair.worse}",
                ("~" if pair.test.method == "asymptotic" else "") + _p(pair.test.p),
                _p(pair.p_holm),
                f"{pair.test.effect:+.2f}",
            ]
            for pair in self.pairs
        ]
        measures = ["difference", "95 % CI", "better/equal/worse", "p", "p (Holm)", "effect"]
        return ["model - baseline", "region", "metric", *measures], rows

    def write(self, folder: Path) -> None:
        """Write comparison.json, comparison.csv (a row for each pair, region and metric) and comparison.md.

        Raises:
            DataError: the folder cannot be written.
        """
        text = (
            f"Protocol {self.models[0].protocol}, {len(self.cases)} cases, {self.patients} patients.\n\n"
            f"## Ranking\n\n{markdown_table(*self.ranking_rows())}\n"
            f"## Differences\n\n{markdown_table(*self.pair_rows())}\n{_METHODS}{markdown_list(self.notes)}"
        )
        table = csv_table(_COLUMNS, (pair.to_json(_COLUMNS).values() for pair in self.pairs))
        documents = {"comparison.csv": table, "comparison.md": text}
        write_documents(folder, {"comparison.json": self.to_json(), **documents})


def _p(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def compare_scores(models: Sequence[ScoreSet], metrics: Sequence[str] | None = None, *, seed: int = 0) -> Comparison:
    """Compare two or more models, the first of each pair as the baseline, by the cases that all of them were given.

    `metrics` None takes Dice and HD95, over lesions where the protocol counts them; `seed` is that of the
    bootstrap and of the exchanges.

    Raises:
        RequestError: fewer than two models, or they cannot be compared: other protocols, challenges, references or
            regions, no case in common, or a metric that they lack or that has no better and worse.
    """
    if len(models) < 2:
        raise RequestError("one model cannot be compared", expected="the scores of two or more")
    _require_same_rules(models)
    cases, notes = _common_cases(models)
    _require_same_references(models, cases)
    regions, notes_on_regions = _common_regions(models)
    chosen = _chosen_metrics(models, metrics)
    patients = [next(model.patients[case] for model in models if case in model.cases) for case in cases]
    count = number_patients(patients, len(cases))[1]
    columns = [(region, metric) for region in regions for metric in chosen]
    values = np.array([[[model.value(case, *column) for column in columns] for case in cases] for model in models])
    pairs = [
        _compare_pair((models[second], models[first]), column, values[[second, first], :, index], patients, seed)
        for first, second in combinations(range(len(models)), 2)
        for index, column in enumerate(columns)
    ]
    corrected = statistics.holm([pair.test.p for pair in pairs])
    pairs = [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]
    ranks = statistics.cumulative_ranks(
        values,
        [METRICS[metric].higher_is_better is True for _, metric in columns],
        failed=[[case in model.failed for case in cases] for model in models],
    )
    ranking, exchanges = _rank(models, ranks, patients, seed)
    subject = (tuple(models), tuple(regions), tuple(chosen), tuple(cases), count)
    compared = Comparison(*subject, tuple(pairs), ranking, exchanges, ())
    return replace(compared, notes=(*notes, *notes_on_regions, *_notes_on_data(compared, values)))


def _compare_pair(
    models: tuple[ScoreSet, ScoreSet],
    column: tuple[str, str],
    values: NDArray[np.float64],
    owners: Sequence[str],
    seed: int,
) -> PairedComparison:
    """Model and baseline by their `values` (2, cases) of one region and metric; `owners` are the patients of cases."""
    paired = np.flatnonzero(np.isfinite(values).all(axis=0))
    model, baseline = values[:, paired]
    owners = [owners[case] for case in paired.tolist()]
    differences = np.round(model - baseline, _DECIMALS)
    gains = differences if METRICS[column[1]].higher_is_better else -differences
    patient, count = number_patients(owners, len(owners))
    means = np.bincount(patient, gains, count) / np.bincount(patient, minlength=count) if count else gains
    model_mean, baseline_mean, difference = (
        float(own.mean()) if len(own) else math.nan for own in (model, baseline, differences)
    )
    interval = mean_interval(differences, owners, seed=seed)
    better, equal, worse = (int(np.count_nonzero(found)) for found in (gains > 0, gains == 0, gains < 0))
    what = (models[0].name, models[1].name, *column, len(owners), model_mean, baseline_mean, difference)
    return PairedComparison(*what, interval, better, equal, worse, statistics.signed_rank(means))


def _rank(
    models: Sequence[ScoreSet], ranks: NDArray[np.float64], patients: Sequence[str], seed: int
) -> tuple[tuple[Ranked, ...], tuple[Exchange, ...]]:
    """The ranking, and the test of each model against every one that is ranked behind it."""
    scores = np.round(statistics.rank_scores(ranks), _DECIMALS)
    found = [
        Ranked(model.name, 1 + int((scores < score).sum()), float(score), mean_interval(own, patients, seed=seed))
        for model, score, own in zip(models, scores, ranks, strict=True)
    ]
    ranking = tuple(sorted(found, key=lambda ranked: ranked.place))
    p_values = statistics.exchange_p_values(ranks, patients, seed=seed)
    position = {model.name: index for index, model in enumerate(models)}
    exchanges = []
    for better, worse in combinations(ranking, 2):
        p = float(p_values[position[better.model], position[worse.model]])
        exchanges.append(Exchange(better.model, worse.model, better.score - worse.score, p))
    return ranking, tuple(exchanges)


def _require_same_rules(models: Sequence[ScoreSet]) -> None:
    for what, found in (
        ("protocols", {model.name: model.protocol for model in models}),
        ("challenges", {model.name: model.challenge or "none" for model in models}),
        ("label schemes", {model.name: model.label_scheme for model in models if model.label_scheme}),
        ("extents", {model.name: "whole images" if model.roi is None else "regions of interest" for model in models}),
    ):
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in found.items())
            raise RequestError(
                f"scores of different {what} cannot be compared ({listed})",
                remedy="Evaluate all models with the same options against the same references",
            )


def _common_cases(models: Sequence[ScoreSet]) -> tuple[list[str], list[str]]:
    """The cases that every model was given and at least one has scores of, and a note on the others."""
    given = [model.cases.keys() | model.failed for model in models]
    scored = {case for model in models for case in model.cases}
    common = set.intersection(*given) & scored
    if not common:
        examples = ", ".join(f"{model.name}: {next(iter(model.cases))}" for model in models)
        raise RequestError(
            f"the models have no case in common ({examples})", remedy="Evaluate them against the same references"
        )
    order = dict.fromkeys(case for model in models for case in (*model.cases, *sorted(model.failed)))
    left_out = _count(scored - common)
    notes = [f"left out: {left_out} that not all models were given; compared: {len(common)}"]
    return [case for case in order if case in common], notes if scored - common else []


def _require_same_references(models: Sequence[ScoreSet], cases: Sequence[str]) -> None:
    for case in cases:
        for region in models[0].regions:
            volumes = [model.value(case, region, _REFERENCE) for model in models]
            known = [volume for volume in volumes if not math.isnan(volume)]
            if known and not np.allclose(known, known[0], rtol=1e-6):
                listed = ", ".join(f"{volume:.3f}" for volume in known)
                raise RequestError(
                    f"{case}: the references of {region} have different volumes ({listed} ml)",
                    remedy="Evaluate all models against the same references",
                )


def _common_regions(models: Sequence[ScoreSet]) -> tuple[list[str], list[str]]:
    regions = [region for region in models[0].regions if all(region in model.regions for model in models)]
    if not regions:
        listed = "; ".join(f"{model.name}: {', '.join(model.regions)}" for model in models)
        raise RequestError(f"the models have no region in common ({listed})", remedy="Name the same --label-scheme")
    left_out = sorted({region for model in models for region in model.regions}.difference(regions))
    return regions, [f"regions that not all models have are left out: {', '.join(left_out)}"] if left_out else []


def _chosen_metrics(models: Sequence[ScoreSet], metrics: Sequence[str] | None) -> list[str]:
    present = [metric for metric in models[0].metrics if all(metric in model.metrics for model in models)]
    if metrics is None:
        default = next((ranked for ranked in _RANKED if set(ranked) <= set(present)), None)
        if default is None:
            raise RequestError("the models have no Dice and HD95 in common", remedy="Name others with --metrics")
        return list(default)
    comparable = [metric for metric in present if metric in METRICS and METRICS[metric].higher_is_better is not None]
    for metric in metrics:
        if metric not in comparable:
            reason = "has no better and worse" if metric in present else "is not in the scores of all models"
            raise RequestError(f"metric {metric!r} {reason}", expected=f"any of {', '.join(comparable)}")
    return list(dict.fromkeys(metrics))


def _notes_on_data(comparison: Comparison, values: NDArray[np.float64]) -> list[str]:
    cases, patients, pairs, notes = comparison.cases, comparison.patients, comparison.pairs, []
    for model, own in zip(comparison.models, values, strict=True):
        failed = [case for case in cases if case in model.failed]
        if failed:
            notes.append(
                f"{model.name} has no scores of {_count(failed)} ({', '.join(failed[:5])}): worst in the ranking, "
                "left out of differences and tests"
            )
        is_defined = np.isfinite(own).all(axis=1)
        undefined = [case for case, known in zip(cases, is_defined, strict=True) if not known and case not in failed]
        if undefined:
            notes.append(
                f"{model.name} has undefined or infinite scores in {_count(undefined)}: left out of differences and "
                "tests; in the ranking models tie where one is undefined, and infinite is worst"
            )
    if patients <= _TOO_FEW:
        notes.append(f"of {patients} patients no two-sided test can give p below {2 ** (1 - patients):.3g}")
    if patients < len(cases):
        notes.append(f"{len(cases)} cases are of {patients} patients, who are what is drawn, exchanged and tested")
    if any(pair.test.zeros for pair in pairs):
        notes.append("equal scores are left out of the signed-rank test, as Wilcoxon did")
    if any(pair.test.method == "asymptotic" for pair in pairs):
        notes.append("p-values marked ~ are asymptotic, as more than 50 scores differ; the others are exact")
    return notes


def _count(cases: Collection[str]) -> str:
    return f"{len(cases)} case" + ("s" if len(cases) != 1 else "")
