"""Actors on the nodes of a Ray cluster: as many as they have room for, replaced where they are lost."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from segkit.batch.ray_executor import CaseActor, Lost, Orders, Reply, Share
from segkit.batch.worker import CaseWorker
from segkit.errors import ClusterError, DataError, RequestError, SegkitError

_LOOK_SECONDS = 5.0
"""How often nodes that have joined are looked for."""
_PATIENCE_SECONDS = 30.0
"""After which it is told that all nodes are busy with other work."""
_STARTS, _LOSSES = 3, 10
"""Workers in a row that may be lost on a node while they open the model, or in the midst of tasks."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    id: str
    name: str
    room: int


@dataclass(eq=False)
class RayWorker:
    """One actor; `task` is what it does at present."""

    place: Node
    actor: Any
    is_open: bool = False
    task: Any = None

    @property
    def node(self) -> str:
        """The name of its machine."""
        return self.place.name


class RayCrew:
    """The actors of one run over a folder; `limit` bounds their number."""

    def __init__(self, work: CaseWorker[Any], orders: Orders, share: Share, limit: int) -> None:
        self.share, self.limit = share, limit
        self._work = work
        self._orders = ray.put(orders)
        self._workers: set[RayWorker] = set()
        self._pending: dict[Any, RayWorker] = {}
        self._refused: dict[str, str] = {}
        self._losses: Counter[str] = Counter()
        self._has_begun = False
        self._until = time.monotonic() + _PATIENCE_SECONDS
        self._hire()

    def idle(self) -> list[RayWorker]:
        """Actors that have opened the model and have no task."""
        return [worker for worker in self._workers if self._takes_tasks(worker) and worker.task is None]

    def nodes(self) -> set[str]:
        """Names of the nodes with an actor that has opened the model."""
        return {worker.node for worker in self._workers if self._takes_tasks(worker)}

    def give(self, worker: RayWorker, task: Any) -> None:
        """Let an actor begin a task."""
        worker.task = task
        self._has_begun = True
        self._pending[worker.actor.run.remote(task)] = worker

    def wait(self) -> list[tuple[RayWorker, Any]]:
        """Results and losses since the last time; none where nodes have come or actors have opened.

        Raises:
            RequestError: no node can take part; each is named with the reason.
            ClusterError: no node is left.
        """
        if not self._workers:
            self._hire()
        if not self._workers:
            raise self._nobody()
        references = list(self._pending)
        ready, _ = ray.wait(references, num_returns=1, timeout=_LOOK_SECONDS)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        outcomes = [outcome for reference in ready if (outcome := self._outcome(reference)) is not None]
        if time.monotonic() > self._look_again or any(isinstance(outcome, Lost) for _, outcome in outcomes):
            self._hire()
        if not self._has_begun and time.monotonic() > self._until:
            self._until = float("inf")
            _log.warning("still waiting for %s on a node: other work may take them", self.share)
        return outcomes

    def close(self) -> None:
        """End every actor, whatever it does."""
        for worker in list(self._workers):
            self._dismiss(worker)

    def _takes_tasks(self, worker: RayWorker) -> bool:
        return worker.is_open and worker.place.id not in self._refused

    def _outcome(self, reference: Any) -> tuple[RayWorker, Any] | None:
        """What an answer means; None where it was not about a task."""
        worker = self._pending.pop(reference, None)
        if worker is None:
            return None  # dismissed since
        node = worker.place
        try:
            answer = ray.get(reference)
        except RayError as error:
            reason = f"{node.name}: {_why_lost(error)}"
            self._dismiss(worker)
            self._losses[node.id] += 1
            if self._losses[node.id] >= (_LOSSES if worker.is_open else _STARTS):
                self._refuse(node, reason)
            return (worker, Lost(reason)) if worker.is_open else None
        self._losses[node.id] = 0
        if worker.is_open:
            return worker, self._result(worker, answer)
        worker.is_open = answer is None
        if answer is not None:
            self._refuse(node, f"{node.name} {answer}")
        return None

    def _result(self, worker: RayWorker, reply: Reply) -> Any:
        task, worker.task = worker.task, None
        if reply.unseen is not None:
            reason = f"{worker.node} has no file {reply.unseen}"
            if reply.unseen.exists():  # here it is, so it is the node that lacks it
                self._refuse(worker.place, f"{reason}, expected on every node under the same path")
            return Lost(reason)
        if worker.place.id in self._refused:
            self._dismiss(worker)
        try:
            reply.write()
        except DataError as error:
            return self._work.start(task).failed(error)
        return reply.result

    def _refuse(self, node: Node, reason: str) -> None:
        """Give a node nothing more to do; what its actors are doing is waited for."""
        if node.id not in self._refused:
            self._refused[node.id] = reason
            _log.warning("goes on without a node: %s", reason)
        for worker in [worker for worker in self._workers if worker.place.id == node.id and worker.task is None]:
            self._dismiss(worker)

    def _dismiss(self, worker: RayWorker) -> None:
        self._workers.discard(worker)
        self._pending = {reference: other for reference, other in self._pending.items() if other is not worker}
        ray.kill(worker.actor)

    def _hire(self) -> None:
        """Start actors wherever there is room, evenly; let go those that wait on nodes that are gone."""
        self._look_again = time.monotonic() + _LOOK_SECONDS
        nodes = {node.id: node for node in nodes_with_room(self.share) if node.id not in self._refused}
        for worker in [one for one in self._workers if one.place.id not in nodes and one.is_open and one.task is None]:
            self._dismiss(worker)
        taken = Counter(worker.place.id for worker in self._workers)
        while len(self._workers) < self.limit:
            free = [node for node in nodes.values() if taken[node.id] < node.room]
            if not free:
                return
            node = max(free, key=lambda one: one.room - taken[one.id])
            taken[node.id] += 1
            self._start(node)

    def _start(self, node: Node) -> None:
        options = {
            "num_cpus": self.share.threads,
            "num_gpus": self.share.gpus,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        }
        if self.share.memory_mb is not None:
            options["memory"] = int(self.share.memory_mb * 1024**2)
        worker = RayWorker(node, ray.remote(CaseActor).options(**options).remote())
        self._workers.add(worker)
        self._pending[worker.actor.open.remote(self._orders)] = worker

    def _nobody(self) -> SegkitError:
        reasons = "; ".join(self._refused.values())
        if self._has_begun:
            found = "no node of the cluster is left" + (f": {reasons}" if reasons else "")
            return ClusterError(found, remedy="The same command goes on where this one stopped")
        if reasons:
            return RequestError(f"no node of the cluster can do this: {reasons}")
        found = ", ".join(
            f"{_name_of(node)} has {node['Resources'].get('CPU', 0):g} CPUs, {node['Resources'].get('GPU', 0):g} GPUs"
            for node in _alive()
        )
        return RequestError(
            f"no node of the cluster has room for a worker: {found or 'there is none'}",
            expected=f"{self.share} on one node",
            remedy="Pass a smaller --threads",
        )


def nodes_with_room(share: Share) -> list[Node]:
    """The nodes of the cluster that are alive and may hold at least one worker."""
    found = [(node, share.room(node["Resources"])) for node in _alive()]
    return [Node(node["NodeID"], _name_of(node), room) for node, room in found if room > 0]


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _name_of(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})"


def _why_lost(error: RayError) -> str:
    """In a few words why an actor gave no answer; Ray's own explanation is a page."""
    text = " ".join(str(error).split())
    _log.debug("%s", text)
    if "No module named 'segkit'" in text:
        return "segkit is not installed there"
    if "running low on memory" in text:
        return "the worker was ended because the memory of the node was used up"
    if "its node has died" in text:
        return "the node is gone"
    return "the worker process died" if isinstance(error, RayActorError) else text[-300:]
