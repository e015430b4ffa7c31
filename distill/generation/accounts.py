"""What generation costs while it goes on, and what it came to: the accounts of the trace stage.

What the trace lines say (tokens, seconds, cost, attempts, outcomes) is summed up from them in the end, so a kill loses
nothing of it. What they do not say (time, throughput, errors, failures) is kept in traces/accounts.json, written
every few seconds: a kill loses those seconds of it.
"""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.generation.totals import Totals
from distill.records import EndpointState, Reply

if TYPE_CHECKING:
    from distill.runfolder import RunFolder


class Spent(NamedTuple):
    """Over all starts, for the budget."""

    cost: float
    tokens: int  # prompts and replies together
    hours: float


class Accounts:
    """Context manager around the stage's loop; shows the progress and keeps traces/accounts.json.

        with Accounts(run, wanted, done) as accounts:
            for replies in teacher.generate(asks):
                ...                              # made durable
                accounts.add(replies)
                accounts.tick(teacher.states())
        return {..., "generation": accounts.facts(totals)}

    `wanted` and `done` count samples of this process's part of the plan. `before`: sums over the `done` ones, where
    the caller has read their lines; without it the sums of accounts.json are taken, which a kill may have left a few
    seconds behind (and, after a change of the recipe, are of other samples: their cost is spent all the same).
    """

    def __init__(
        self, run: "RunFolder", wanted: int, done: int, *, before: Totals | None = None, name: str = "accounts.json"
    ) -> None:
        raise NotImplementedError

    def __enter__(self) -> "Accounts":
        raise NotImplementedError

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError

    def add(self, replies: Iterable[Reply]) -> None:
        """Count replies that are on the disk, those that `failed` too."""
        raise NotImplementedError

    def expect(self, wanted: int) -> None:
        """The plan has grown or shrunk (adaptive sampling)."""
        raise NotImplementedError

    def graded(self, right: int, wrong: int) -> None:
        """So many more traces were verified; `wrong` with those that could not be."""
        raise NotImplementedError

    def tick(self, states: Mapping[str, EndpointState]) -> None:
        """Show how things stand and, every few seconds, write it down. Call it at least every 0.2 s."""
        raise NotImplementedError

    @property
    def spent(self) -> Spent:
        """Cheap; may be asked at every tick."""
        raise NotImplementedError

    def facts(self, totals: Totals | None = None) -> dict[str, Any]:
        """For the manifest, under the stage's "generation". `totals`: sums over the lines of all current traces,
        which the caller makes while it writes the table: `totals.trace(row)` for each."""
        raise NotImplementedError
