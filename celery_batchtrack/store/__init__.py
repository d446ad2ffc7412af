"""The tracking database: the only part that imports SQLAlchemy."""

from __future__ import annotations

from .borrowed import Borrowed, Lend
from .breaker import Pausing
from .browsing import Browsing
from .charts import Charting
from .checkup import CheckingUp
from .children import ChildWrites, SlotTaken
from .dispatching import Dispatching
from .engine import reading_at_most
from .figures import Figuring
from .nesting import WITH_PARENT, Nesting
from .outcomes import Outcomes, OutcomeTotal
from .owners import Owning
from .pruning import Pruning
from .quarantine import Quarantining
from .queries import Queries
from .rounds import Rounds
from .splitting import Splitting
from .verify import Verifying
from .views import Viewing
from .workers import WorkerWrites


class Store(
    Rounds, Nesting, Owning, ChildWrites, Splitting, Quarantining, Pausing, WorkerWrites, Dispatching, Queries,
    Browsing, Charting, Figuring, Pruning, Verifying, Outcomes, Viewing, CheckingUp,
):  # fmt: skip
    """Everything the tracking database is asked, by topic."""

    def within(self, lend: Lend) -> BorrowedStore:
        """The same, on connections that are lent and in whose transactions it writes."""
        return BorrowedStore(self, lend)


class BorrowedStore(Borrowed, Store):
    """A `Store` in somebody else's transaction."""


__all__ = ["WITH_PARENT", "BorrowedStore", "OutcomeTotal", "SlotTaken", "Store", "reading_at_most"]
