"""The fault matrix as data: every combination of fault, moment and victim is either tried or left out for a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

FAULTS = ("kill -9", "SIGTERM", "SIGSTOP", "exception", "exit 7", "full disk", "truncated file", "flipped bit")
MOMENTS = ("in step", "in save", "in load")
VICTIMS = ("rank 0", "rank 1", "launcher", "child", "guard")
"""child: what the launcher starts, torchrun or DeepSpeed's runner; guard: the parent of rank 1."""

SIGNALS = {"kill -9": "SIGKILL", "SIGTERM": "SIGTERM", "SIGSTOP": "SIGSTOP"}
DAMAGES = ("truncated file", "flipped bit")


@dataclass(frozen=True, slots=True)
class Rule:
    """Combinations that make no sense, and why."""

    reason: str
    faults: tuple[str, ...]
    moments: tuple[str, ...] = MOMENTS
    victims: tuple[str, ...] = VICTIMS

    def applies(self, case: Case) -> bool:
        return case.fault in self.faults and case.moment in self.moments and case.victim in self.victims


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the matrix."""

    fault: str
    moment: str
    victim: str
    variant: str = ""

    @property
    def name(self) -> str:
        kind = f"{self.fault} ({self.variant})" if self.variant else self.fault
        return f"{kind} {self.moment}, {self.victim}"

    @property
    def rank(self) -> int:
        """The rank that comes to the moment: the victim, or a rank to which it belongs."""
        return {"rank 1": 1, "guard": 1}.get(self.victim, 0)


LEFT_OUT = (
    Rule(
        "it executes no step, save or load of ours; all it can do there is to die, and kill -9 tries that",
        ("exception", "exit 7"),
        victims=("launcher", "child", "guard"),
    ),
    Rule(
        "the disk is one for all: tried once, as rank 0's, and full for every process meanwhile",
        ("full disk",),
        victims=("rank 1", "launcher", "child", "guard"),
    ),
    Rule(
        "it does not know what its rank is doing: the same at every moment, tried in step",
        ("kill -9", "SIGTERM", "SIGSTOP"),
        moments=("in save", "in load"),
        victims=("guard",),
    ),
    Rule("it owns no part of a checkpoint", DAMAGES, victims=("launcher", "child", "guard")),
    Rule(
        "what is torn while it is written is what kill -9 and full disk leave; checksums are taken when it is sealed, "
        "and nothing can tell an earlier flip from data",
        DAMAGES,
        moments=("in save",),
    ),
)

_HALVES = ("writing", "sealing")
VARIANTS = {
    **{("exception", "in step", victim): ("raised", "not finite") for victim in VICTIMS},
    **{("kill -9", "in save", victim): _HALVES for victim in ("rank 0", "rank 1")},
    ("full disk", "in save", "rank 0"): _HALVES,
}
"""Where one cell stands for two faults, or for the two halves of a save: the rank's, and its background thread's."""


@dataclass(slots=True)
class Result:
    """What became of a case."""

    case: str
    problems: list[str] = field(default_factory=list)
    """Empty: survived."""
    code: int | None = None
    """Exit code of the start that was struck."""
    message: str = ""
    """The line by which the cause was told."""
    seconds: float = 0.0


def left_out(case: Case) -> str:
    """Why the case is not tried; empty if it is."""
    return next((rule.reason for rule in LEFT_OUT if rule.applies(case)), "")


def every_combination() -> Iterator[Case]:
    for fault in FAULTS:
        for moment in MOMENTS:
            for victim in VICTIMS:
                for variant in VARIANTS.get((fault, moment, victim), ("",)):
                    yield Case(fault, moment, victim, variant)


def tried() -> list[Case]:
    return [case for case in every_combination() if not left_out(case)]


def causes(case: Case) -> list[str]:
    """Regular expressions, all of which what was said must match: who, where, what."""
    if case.fault in DAMAGES:
        return [r"checkpoint \S+update-\d+ is damaged", r"falling back to checkpoint|no checkpoint is whole"]
    if case.fault == "full disk":
        return [r"No space left|must stay free", r"Free some space"]
    if case.victim == "launcher":
        return (
            [r"interrupted after"]
            if case.fault == "SIGTERM"
            else [r"launcher has given no sign|launcher that was killed"]
        )
    if case.fault == "SIGTERM":  # torchrun passes it on
        return [r"interrupted by a signal to rank " + (r"\d" if case.victim == "child" else str(case.rank))]
    if case.victim == "child":
        return [r"what starts the ranks ended by signal 9"]
    if case.victim == "guard":
        return [rf"rank {case.rank} on localhost", r"its guard left no word|no sign of its host"]
    if case.variant == "not finite":  # found in the sum over the ranks, by all of them
        return [r"rank \d on localhost", r"the gradient is not finite"]
    what = {
        "kill -9": r"killed by SIGKILL",
        "SIGSTOP": r"it was stopped by a signal",
        "exit 7": r"exited with 7|exit code 7",
        "exception": r"InjectedError: injected by the test",
    }[case.fault]
    return [rf"rank {case.rank} on localhost", what]
