"""Actors on the nodes of a Ray cluster: as many as fit, replaced when lost."""

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
"""Interval of the search for new nodes."""
_PATIENCE_SECONDS = 30.0
"""Time until a warning that all nodes are busy."""
_STARTS, _LOSSES = 3, 10
"""Consecutive actors that may be lost on a node while they load the model, or while they process plans."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Node:
    id: str
    name: str
    room: int
    """Actors that fit."""


@dataclass(eq=False)
class _Actor:
    place: _Node
    handle: Any
    is_open: bool = False
    """Whether the model is loaded."""
    plan: Any = None
    """The current plan."""

    @property
    def node(self) -> str:
        """The name of its machine."""
        return self.place.name

    @property
    def is_idle(self) -> bool:
        """Whether it is ready for a plan."""
        return self.is_open and self.plan is None


class RayCrew:
    """The actors of one run, at most `limit`."""

    def __init__(self, worker: CaseWorker[Any], orders: Orders, share: Share, limit: int) -> None:
        self.share, self.limit = share, limit
        self._worker = worker
        self._orders = ray.put(orders)
        self._actors: set[_Actor] = set()
        self._pending: dict[Any, _Actor] = {}
        self._refused: dict[str, str] = {}
        """Id of a node that gets no more plans -> reason."""
        self._losses: Counter[str] = Counter()
        self._has_started = False
        self._patience_ends = time.monotonic() + _PATIENCE_SECONDS
        self._start_actors()

    def idle(self) -> list[_Actor]:
        """Actors ready for a plan."""
        return [actor for actor in self._actors if actor.is_idle and actor.place.id not in self._refused]

    def nodes(self) -> set[str]:
        """Names of the nodes with an actor that takes plans, now or after its current one."""
        return {actor.node for actor in self._actors if actor.is_open and actor.place.id not in self._refused}

    def give(self, actor: _Actor, plan: Any) -> None:
        """Start a plan on an idle actor."""
        actor.plan = plan
        self._has_started = True
        self._pending[actor.handle.run.remote(plan)] = actor

    def wait(self) -> list[tuple[_Actor, Any]]:
        """Wait for events: actors with the result of their plan or `Lost`; may be empty.

        Raises:
            RequestError: no node can be used; each is named with the reason.
            ClusterError: no node is left.
        """
        if not self._actors:
            self._start_actors()
        if not self._actors:
            raise self._why_no_actor()
        references = list(self._pending)
        ready, _ = ray.wait(references, num_returns=1, timeout=_LOOK_SECONDS)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        outcomes = [outcome for reference in ready if (outcome := self._outcome(reference)) is not None]
        if time.monotonic() > self._look_again or any(isinstance(outcome, Lost) for _, outcome in outcomes):
            self._start_actors()
        if not self._has_started and time.monotonic() > self._patience_ends:
            self._patience_ends = float("inf")
            _log.warning("still waiting for %s on a node: other work may take them", self.share)
        return outcomes

    def close(self) -> None:
        """End all actors."""
        for actor in list(self._actors):
            self._dismiss(actor)

    def _outcome(self, reference: Any) -> tuple[_Actor, Any] | None:
        """The outcome of a plan; None for other answers."""
        actor = self._pending.pop(reference, None)
        if actor is None:
            return None  # dismissed since
        node = actor.place
        try:
            answer = ray.get(reference)
        except RayError as error:
            reason = f"{node.name}: {_why_lost(error)}"
            self._dismiss(actor)
            self._losses[node.id] += 1
            if self._losses[node.id] >= (_LOSSES if actor.is_open else _STARTS):
                self._refuse(node, reason)
            return (actor, Lost(reason)) if actor.is_open else None
        self._losses[node.id] = 0
        if actor.is_open:
            return actor, self._result(actor, answer)
        actor.is_open = answer is None
        if answer is not None:
            self._refuse(node, f"{node.name} {answer}")
        return None

    def _result(self, actor: _Actor, reply: Reply) -> Any:
        plan, actor.plan = actor.plan, None
        if reply.unseen is not None:
            reason = f"{actor.node} has no file {reply.unseen}"
            if reply.unseen.exists():  # only the node lacks it
                self._refuse(actor.place, f"{reason}, expected on every node under the same path")
            return Lost(reason)
        if actor.place.id in self._refused:
            self._dismiss(actor)
        try:
            reply.write()
        except DataError as error:
            return self._worker.start(plan).failed(error)
        return reply.result

    def _refuse(self, node: _Node, reason: str) -> None:
        """Give a node no more plans; current ones are finished."""
        if node.id not in self._refused:
            self._refused[node.id] = reason
            _log.warning("a node is not used any more: %s", reason)
        for actor in [actor for actor in self._actors if actor.place.id == node.id and actor.plan is None]:
            self._dismiss(actor)

    def _dismiss(self, actor: _Actor) -> None:
        self._actors.discard(actor)
        self._pending = {reference: other for reference, other in self._pending.items() if other is not actor}
        ray.kill(actor.handle)

    def _start_actors(self) -> None:
        """Start actors evenly where they fit; end idle ones on lost nodes."""
        self._look_again = time.monotonic() + _LOOK_SECONDS
        found = [_Node(one["NodeID"], _name_of(one), self.share.room(one["Resources"])) for one in _alive()]
        nodes = {node.id: node for node in found if node.room > 0 and node.id not in self._refused}
        for actor in [one for one in self._actors if one.place.id not in nodes and one.is_idle]:
            self._dismiss(actor)
        taken = Counter(actor.place.id for actor in self._actors)
        while len(self._actors) < self.limit:
            free = [node for node in nodes.values() if taken[node.id] < node.room]
            if not free:
                return
            node = max(free, key=lambda one: one.room - taken[one.id])
            taken[node.id] += 1
            self._start(node)

    def _start(self, node: _Node) -> None:
        options = {
            "num_cpus": self.share.threads,
            "num_gpus": self.share.gpus,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        }
        if self.share.memory_gb is not None:
            options["memory"] = int(self.share.memory_gb * 1024**3)
        actor = _Actor(node, ray.remote(CaseActor).options(**options).remote())
        self._actors.add(actor)
        self._pending[actor.handle.open.remote(self._orders)] = actor

    def _why_no_actor(self) -> SegkitError:
        reasons = "; ".join(self._refused.values())
        if self._has_started:
            found = "no node of the cluster is left" + (f": {reasons}" if reasons else "")
            return ClusterError(found, remedy="Run the same command again: finished cases are skipped")
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


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _name_of(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, node {node['NodeID'][:8]})"


def _why_lost(error: RayError) -> str:
    """A short reason why an actor was lost; Ray's own explanation is a page."""
    text = " ".join(str(error).split())
    _log.debug("%s", text)
    if "No module named 'segkit'" in text:
        return "segkit is not installed there"
    if "running low on memory" in text:
        return "the worker was ended because the memory of the node was used up"
    if "its node has died" in text:
        return "the node is gone"
    return "the worker process died" if isinstance(error, RayActorError) else text[-300:]
