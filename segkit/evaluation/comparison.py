"""Models compared by their scores on the same cases: paired differences with their tests, and the BraTS ranking.

Every pair of models gets, for each region and metric, the mean difference with its bootstrap interval, a Wilcoxon
signed-rank test corrected by Holm's method over all tests of the comparison, and an effect size; all models together
get the rank scores of `segkit.metrics.significance`. Where patients have several cases, only patients are independent:
intervals and exchanges draw whole patients, and the signed-rank test takes each patient's mean difference.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from segkit.errors import RequestError
from segkit.evaluation.score_files import ScoreSet
from segkit.metrics.bootstrap import Interval, mean_interval, number_patients
from segkit.metrics.registry import METRICS
from segkit.metrics.significance import (
    SignedRank,
    cumulative_ranks,
    exchange_p_values,
    holm,
    rank_scores,
    signed_rank,
)

_RANKED = (("lesionwise_dice", "lesionwise_hd95_mm"), ("dice", "hd95_mm"), ("dice", "hd95_voxels"))
"""The metrics that BraTS ranks by: over lesions from 2023 on, before over the whole volume; the first that all models
have counts."""

_DECIMALS = 12
"""Scores that differ by less are equal."""

_TOO_FEW = 5
"""Even where all differences have one sign, a signed-rank test of so many patients has p of 2 / 2^5 or more."""

_REFERENCE = "reference_ml"
"""A metric of the reference alone: where it differs, so do the references."""


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
    test: SignedRank
    p_holm: float = math.nan


@dataclass(frozen=True)
class Ranked:
    """A model in the ranking: its place, and its final rank score (1 is best) with the 95 % interval over patients."""

    model: str
    place: int
    score: float
    interval: Interval | None


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


def compare_scores(models: Sequence[ScoreSet], metrics: Sequence[str] | None = None, *, seed: int = 0) -> Comparison:
    """Compare two or more models by the cases that all of them were given.

    Args:
        models: At least two; the first of each pair is the baseline.
        metrics: The metrics to compare by; None takes Dice and HD95, over lesions where the protocol counts them.
        seed: Seed of the bootstrap and of the exchanges.

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
    corrected = holm([pair.test.p for pair in pairs])
    pairs = [replace(pair, p_holm=p) for pair, p in zip(pairs, corrected, strict=True)]
    ranks = cumulative_ranks(
        values,
        [METRICS[metric].higher_is_better is True for _, metric in columns],
        failed=[[case in model.failed for case in cases] for model in models],
    )
    ranking = _ranking(models, ranks, patients, seed)
    return Comparison(
        models=tuple(models),
        regions=tuple(regions),
        metrics=tuple(chosen),
        cases=tuple(cases),
        patients=count,
        pairs=tuple(pairs),
        ranking=ranking,
        exchanges=_exchanges(models, ranks, ranking, patients, seed),
        notes=(*notes, *notes_on_regions, *_notes_on_data(models, values, cases, count, pairs)),
    )


def _compare_pair(
    models: tuple[ScoreSet, ScoreSet],
    column: tuple[str, str],
    values: NDArray[np.float64],
    patients: Sequence[str],
    seed: int,
) -> PairedComparison:
    """Model and baseline by their `values` (2, cases) of one region and metric."""
    paired = np.flatnonzero(np.isfinite(values).all(axis=0))
    model, baseline = values[:, paired]
    owners = [patients[case] for case in paired.tolist()]
    differences = np.round(model - baseline, _DECIMALS)
    gains = differences if METRICS[column[1]].higher_is_better else -differences
    patient, count = number_patients(owners, len(owners))
    means = np.bincount(patient, gains, count) / np.bincount(patient, minlength=count) if count else gains
    return PairedComparison(
        model=models[0].name,
        baseline=models[1].name,
        region=column[0],
        metric=column[1],
        cases=len(owners),
        model_mean=_mean(model),
        baseline_mean=_mean(baseline),
        difference=_mean(differences),
        interval=mean_interval(differences, owners, seed=seed),
        better=int(np.count_nonzero(gains > 0)),
        equal=int(np.count_nonzero(gains == 0)),
        worse=int(np.count_nonzero(gains < 0)),
        test=signed_rank(means),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _ranking(
    models: Sequence[ScoreSet], ranks: NDArray[np.float64], patients: Sequence[str], seed: int
) -> tuple[Ranked, ...]:
    scores = np.round(rank_scores(ranks), _DECIMALS)
    found = [
        Ranked(model.name, 1 + int((scores < score).sum()), float(score), mean_interval(own, patients, seed=seed))
        for model, score, own in zip(models, scores, ranks, strict=True)
    ]
    return tuple(sorted(found, key=lambda ranked: ranked.place))


def _exchanges(
    models: Sequence[ScoreSet],
    ranks: NDArray[np.float64],
    ranking: Sequence[Ranked],
    patients: Sequence[str],
    seed: int,
) -> tuple[Exchange, ...]:
    """Each model against every one that is ranked behind it."""
    p_values = exchange_p_values(ranks, patients, seed=seed)
    position = {model.name: index for index, model in enumerate(models)}
    found = []
    for better, worse in combinations(ranking, 2):
        p = float(p_values[position[better.model], position[worse.model]])
        found.append(Exchange(better.model, worse.model, better.score - worse.score, p))
    return tuple(found)


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
                f"scores of different {what} do not compare ({listed})",
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
    left_out = scored - common
    notes = [f"left out: {_cases(left_out)} that not all models were given; compared: {len(common)}"]
    return [case for case in order if case in common], notes if left_out else []


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
    every = {region for model in models for region in model.regions}
    if not regions:
        listed = "; ".join(f"{model.name}: {', '.join(model.regions)}" for model in models)
        raise RequestError(f"the models have no region in common ({listed})", remedy="Name the same --label-scheme")
    left_out = sorted(every.difference(regions))
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


def _notes_on_data(
    models: Sequence[ScoreSet],
    values: NDArray[np.float64],
    cases: Sequence[str],
    patients: int,
    pairs: Sequence[PairedComparison],
) -> list[str]:
    notes = []
    for model, own in zip(models, values, strict=True):
        failed = [case for case in cases if case in model.failed]
        if failed:
            notes.append(
                f"{model.name} has no scores of {_cases(failed)} ({', '.join(failed[:5])}): worst in the ranking, "
                "left out of differences and tests"
            )
        is_defined = np.isfinite(own).all(axis=1)
        undefined = [case for case, known in zip(cases, is_defined, strict=True) if not known and case not in failed]
        if undefined:
            notes.append(
                f"{model.name} has undefined or infinite scores in {_cases(undefined)}: left out of differences and "
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


def _cases(cases: Collection[str]) -> str:
    return f"{len(cases)} case" + ("s" if len(cases) != 1 else "")
