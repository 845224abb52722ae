"""Errors that know the remedy: what was found, where, what was expected, what to do next."""

import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike


def printable(text: str) -> str:
    """A text with control characters, and others that a terminal does not show, escaped as in JSON; newlines stay.

    File names may hold terminal commands, signs that reverse the direction of writing, and lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    code = letter.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{code[place : place + 4]}" for place in range(0, len(code), 4))


def on_one_line(text: object) -> str:
    """A `printable` text on one line: a name must not look like the next line of the output."""
    return printable(str(text)).replace("\n", "\\n")


def some(names: Iterable[str], most: int = 5) -> str:
    """The first `most` names, separated by commas, with dots where there are more."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


@dataclass(frozen=True)
class Problem:
    """One finding about an input, collected with others so that a user can correct all of them at once.

    `is_fatal`: the case (or the request) cannot be used; else it is a warning. `left_out` are images that belong to no
    case, and references if none of them belongs to an image: results without them are incomplete.
    """

    where: str
    found: str
    remedy: str = ""
    is_fatal: bool = True
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        sentence = f"{on_one_line(self.where)}: {printable(self.found)}"
        return sentence + (f" -> {printable(self.remedy)}" if self.remedy else "")

    @property
    def is_error(self) -> bool:
        """Whether it gives exit code 1."""
        return self.is_fatal or bool(self.left_out)

    def to_json(self) -> dict[str, object]:
        """The entry of "problems" in documents; `left_out` where there is any."""
        document = {"where": self.where, "found": self.found, "remedy": self.remedy, "is_fatal": self.is_fatal}
        return document | ({"left_out": list(self.left_out)} if self.left_out else {})


def warning(where: object, found: str, remedy: str = "", left_out: tuple[str, ...] = ()) -> Problem:
    """A finding that does not prevent the use of what it is about."""
    return Problem(str(where), found, remedy, is_fatal=False, left_out=left_out)


class SegkitError(Exception):
    """Base of every error that segkit raises on purpose; the command line prints its sentence without a traceback."""

    exit_code = 1
    is_reported = False
    """Whether another process of the same training has already printed it."""

    def __init__(
        self,
        found: str,
        *,
        where: str | PathLike[str] | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.found = found
        self.where = None if where is None else str(where)
        self.expected = expected
        self.remedy = remedy
        sentence = f"{on_one_line(self.where)}: {found}" if self.where else found
        if expected:
            sentence += f"; expected {expected}"
        if remedy:
            sentence += f". {remedy}"
        super().__init__(printable(sentence))


class DataError(SegkitError):
    """A file or a case cannot be used. Other cases are still processed."""


class CheckpointError(SegkitError):
    """A weight file, model card or resume state is missing, damaged, unsafe or does not fit."""


class TrainingError(SegkitError):
    """A training that has started cannot continue; its last checkpoint is kept."""


class ClusterError(SegkitError):
    """Machines of a cluster were lost. Finished cases are kept."""


class RequestError(SegkitError):
    """The request is invalid; nothing was run."""

    exit_code = 2


def as_request(error: SegkitError) -> RequestError:
    """The same sentence as a RequestError, for errors found before any case was processed."""
    return RequestError(error.found, where=error.where, expected=error.expected, remedy=error.remedy)


class ConfigError(RequestError):
    """A configuration with problems, all of which are reported at once."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__(f"the configuration has {count}:\n{lines}")


_MEMORY_SIGNS = (
    *("out of memory", "allocate memory", "not enough memory", "bad allocation", "bad_alloc"),
    *("failed to allocate", "can't alloc", "could not create a primitive"),  # OpenVINO, oneDNN
    *("failed to map segment", "resource temporarily unavailable"),  # no room for a library or a thread
    *("cudnn_status_alloc_failed", "cublas_status_alloc_failed", "device_allocation_failed"),  # of NVIDIA's libraries
    *("unable to find an engine", "valid cudnn algorithm"),  # what torch says when none has room
)


def is_memory_error(error: BaseException) -> bool:
    """Whether an error of any library means that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _MEMORY_SIGNS)


def free_memory_of(error: BaseException) -> None:
    """Free what a failed computation holds before it is tried again with less.

    The traceback keeps the variables of all frames that the error passed, thus the tensors of the failed pass.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()
