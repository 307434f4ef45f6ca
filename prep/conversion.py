"""The encoding and assembling of one planned split, from the journal's point of view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

from prep.errors import KprepError, error_from_text
from prep.fetch_errors import StoppedError
from prep.journal import Answer
from prep.outcome import Outcome, Reason, Status
from prep.pending_rows import JournalRows
from prep.progress import Progress
from prep.signals import handling
from prep.worker_pool import Job
from prep.write_errors import WAY_OUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prep.journal import Journal, Row
    from prep.options import ShardOptions
    from prep.shard_builder import ShardBuilder
    from prep.source import Offer, Source

_COMMIT_ROWS = 256
_WAIT_SECONDS = 0.2  # for a result, before a signal is looked for


class Pool(Protocol):
    """Runs jobs somewhere else; prep.worker_pool.WorkerPool describes what it must do."""

    @property
    def wants_jobs(self) -> bool:
        """Whether a worker would otherwise soon be idle."""
        ...

    @property
    def unfinished(self) -> int:
        """Number of jobs submitted and not answered."""
        ...

    def submit(self, job: Job) -> None:
        """Queue a job."""
        ...

    def results(self, timeout_seconds: float) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Yield what has been answered by now."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Conversion:
    """Asks the sources in turn for pending rows, and books what the encoders make of them.

    A row is settled by the first source whose clip passes the output check; when all have answered
    without one, it fails for the reason that says most, and its detail names every answer.
    """

    def __init__(
        self,
        options: ShardOptions,
        journal: Journal,
        work: Path,
        sources: list[Source],
        builder: ShardBuilder,
        encoders: Pool,
    ) -> None:
        self.options = options
        self.journal = journal
        self.work = work
        self.sources = sources
        self.builder = builder
        self._encoders = encoders
        self._signal = 0
        self._in_flight: set[int] = set()
        self._lost: set[int] = set()  # rows whose staged clips went in this round
        self._ever_lost: set[int] = set()
        self._pending = journal.pending_by_shard()
        counts = journal.counts()
        total = sum(counts.values())
        self.progress = Progress(
            total, done=total - counts[Status.PENDING], failed=counts[Status.FAILED]
        )

    def run(self) -> int:
        """Encode what is pending and assemble what is complete; return the signal that ended it."""
        with handling(self.interrupt), self._encoders, self.builder:
            try:
                self._assemble_settled_shards()
                self._drain()
                # all clips may be there, but not the end of an archive of theirs, if we were killed
                unread = bool(self.journal.taken.archives())
                # more than one round only where a power cut took staged clips: that shows when
                # their shard is built, and they are pending again
                while not self._signal and (unread or self.journal.counts()[Status.PENDING]):
                    self._ask_all()
                    unread = False
            finally:
                self.journal.commit()
                self.progress.close()
        return self._signal

    def complete(self) -> bool:
        """Whether every planned shard stands, so that the split can be published."""
        return len(self.journal.shards()) == self.journal.planned_shards()

    def interrupt(self, number: int) -> None:
        """Take no new work; a second signal ends at once."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        for source in self.sources:
            source.stop()

    # -- rows ---------------------------------------------------------------------------------

    def _ask_all(self) -> None:
        """Ask every source once for what the ones before it did not have."""
        self.journal.begin_round()
        self._lost.clear()
        for source in self.sources:
            if not self._signal:
                self._ask(source)

    def _ask(self, source: Source) -> None:
        rows = JournalRows(self.journal, source.name, self._settle_offers, self._any_waits)
        try:
            for offer in source.offers(rows):
                self._take(source, offer)
                while not self._encoders.wants_jobs and not self._signal:
                    self._book()
                if self._signal:
                    break
        except StoppedError:
            if not self._signal:
                raise
        self.builder.get_ready()
        self._drain()
        if self._signal:
            return
        self._end_pass(source, rows)
        self._drain()

    def _end_pass(self, source: Source, rows: JournalRows) -> None:
        """Answer for what the source left out; after the last source nothing stays pending."""
        reason, detail = source.absence()
        for row in rows.rows():
            if row.row not in self._lost:
                self._answer(source, row, reason, detail)
        if source is self.sources[-1]:  # also rows whose sources of an earlier run are gone now
            for row in self.journal.pending():
                if row.row not in self._lost:
                    self._settle(row, _verdict(row.answers), None)
        self.journal.commit()

    def _take(self, source: Source, offer: Offer) -> None:
        row = offer.row
        if row.row in self._in_flight or row.row in self._lost:  # the first source asks first
            offer.release()
        elif offer.refusal is not None:
            self._answer(source, row, *offer.refusal)
            offer.release()
            if row.row % _COMMIT_ROWS == 0:  # rows without a file come in long runs
                self.journal.commit()
        else:
            self._in_flight.add(row.row)
            self._encoders.submit(Job((source, offer), encode_job(self.options, self.work, offer)))

    def _drain(self) -> None:
        while self._encoders.unfinished or self.builder.unfinished:
            self._book()

    def _settle_offers(self) -> None:
        """Wait until every offer taken so far is released."""
        while self._encoders.unfinished:
            self._book()

    def _any_waits(self) -> bool:
        """Whether a row waits for a clip in this round; when all are in work, what becomes of them.

        So it is the same for any number of workers.
        """
        if self._waiting() == len(self._in_flight):
            self._settle_offers()
        return self._waiting() > 0

    def _waiting(self) -> int:
        return sum(self._pending.values()) - len(self._lost)

    def _book(self) -> None:
        """Store what has been answered by now."""
        encoding = bool(self._encoders.unfinished)
        for job, result in self._encoders.results(_WAIT_SECONDS if encoding else 0.0):
            source, offer = job.tag
            outcome, facts = _outcome(result)
            self._in_flight.discard(offer.row.row)
            if outcome.status == Status.OK:
                whole = _with_others(outcome, source, offer.row)
                self._settle(offer.row, whole, facts, offer.archive)
            elif outcome.reason is not None:
                if outcome.reason == Reason.STORAGE:
                    source.check()
                self._answer(source, offer.row, outcome.reason, outcome.detail)
            self.journal.commit()
            offer.release()
        for lost in self.builder.book(0.0 if encoding else _WAIT_SECONDS):
            for row, shard in lost:
                self._lose(row, shard)
            self.journal.commit()

    def _lose(self, row: int, shard: int) -> None:
        """Have a row encoded again, in the next round, whose staged clip is gone."""
        if row in self._ever_lost:
            raise KprepError(
                f"{self.work / 'staged'} does not keep what is written there; give a --work "
                "folder on a sound disk"
            )
        self._ever_lost.add(row)
        self._lost.add(row)
        self.progress.retreat()
        self._pending[shard] += 1
        self.journal.lose(row)

    def _answer(self, source: Source, row: Row, reason: Reason, detail: str) -> None:
        """Book that a source has no clip for a row; the last source's answer settles it."""
        answer = Answer(source.name, reason, detail)
        # a file that was judged before an interruption may be judged again after it
        answers = row.answers if answer in row.answers else (*row.answers, answer)
        if source is not self.sources[-1] or source.several_files:
            self.journal.record_answers(row.row, answers)
        else:
            self._settle(row, _verdict(answers), None)

    def _settle(
        self, row: Row, outcome: Outcome, facts: dict[str, Any] | None, archive: str = ""
    ) -> None:
        self.journal.record(row.row, outcome, facts, archive)
        self.progress.advance(failed=outcome.status == Status.FAILED)
        if row.shard is not None:
            self._pending[row.shard] -= 1
            self._assemble_if_complete(row.shard)

    # -- shards -------------------------------------------------------------------------------

    def _assemble_settled_shards(self) -> None:
        """Assemble shards whose rows were all settled before this run began."""
        built = self.journal.shards()
        for number in range(self.journal.planned_shards()):
            if number not in built:
                self._assemble_if_complete(number)

    def _assemble_if_complete(self, number: int) -> None:
        finish = self.options.finish
        if not self._pending[number] and not self.journal.unfinished_rows(number, finish=finish):
            self.builder.build(number)


def encode_job(options: ShardOptions, work: Path, offer: Offer) -> dict[str, Any]:
    """Return the JSON of one encode; see prep.encode.encode."""
    return {
        "profile": options.profile.to_json(),
        "cpu_seconds": options.cpu_seconds,
        "wall_seconds": options.wall_seconds,
        "min_seconds": options.min_seconds,
        "work": str(work),
        "shard": offer.row.shard,
        "candidates": [
            {
                "path": str(candidate.path),
                "source": candidate.source,
                "start": candidate.start_seconds,
                "end": candidate.end_seconds,
                "was_there": candidate.was_there,
            }
            for candidate in offer.candidates
        ],
    }


def _verdict(answers: tuple[Answer, ...]) -> Outcome:
    """Return why a row failed: first what may pass, last that it is missing."""

    def weight(answer: Answer) -> tuple[bool, bool]:
        absent = answer.reason in (Reason.MISSING, Reason.MISSING_UPSTREAM)
        return not answer.reason.retryable, absent

    told = min(answers, key=weight)
    parts = [told.detail] if told.detail else []
    if len(answers) > 1:
        parts += [f"{answer.source}: {answer.reason}" for answer in answers]
    return Outcome(Status.FAILED, told.reason, "; ".join(parts))


def _with_others(outcome: Outcome, source: Source, row: Row) -> Outcome:
    """Return the outcome of a clip with what the sources before its own answered."""
    others = [
        f"{answer.source}: {answer.reason}"
        for answer in row.answers
        if answer.source != source.name
    ]
    detail = "; ".join(part for part in (outcome.detail, *others) if part)
    return Outcome(outcome.status, outcome.reason, detail)


def _outcome(result: dict[str, Any]) -> tuple[Outcome, dict[str, Any] | None]:
    check_fatal(result)
    if "crashed" in result:
        return Outcome(Status.FAILED, Reason.CRASHED, result["crashed"]), None
    if "stalled" in result:
        return Outcome(Status.FAILED, Reason.STALLED, result["stalled"]), None
    if result["status"] == "ok":
        facts = {name: value for name, value in result.items() if name not in ("status", "detail")}
        return Outcome(Status.OK, None, result["detail"]), facts
    return Outcome(Status.FAILED, Reason(result["reason"]), result["detail"]), None


def check_fatal(result: dict[str, Any]) -> None:
    """Raise KprepError for a result that no row is to blame for: a full disk, a fault of ours."""
    if "raised" in result:
        raise error_from_text(result["raised"])
    if "fatal" in result:
        raise KprepError(f"{result['fatal']}; {WAY_OUT}")
    if "error" in result:
        raise KprepError(f"a worker failed; this is a fault in kprep:\n{result['error']}")
