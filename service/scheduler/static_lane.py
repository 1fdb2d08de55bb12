"""One model of the static family under iteration-level scheduling: the unit of work is one step of one row.

A tick: forget who has gone, admit rows into free slots (`init`), `step` once for the rows whose turn it is, `score` those that
need a measure now, answer the jobs that are complete, then some final stages. Rows join and leave at every tick, so a
request for one step is not held up by a neighbour's thirty-two.

Rows R of one model. ELBOs in nats; times in seconds of the injected clock.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.artifact import Arrays
from service.engine.base import Engine, Given, Slots
from service.errors import BackendFailure, DeadlineExceeded
from service.noise import Purpose
from service.scheduler.best_so_far import BestSoFar
from service.scheduler.cost import CostModel
from service.scheduler.door import Door, steps_of
from service.scheduler.final_stages import NO_SLOT, FinalStages
from service.scheduler.job import JobResult, Reply, StopReason, Timing
from service.scheduler.load import Load
from service.scheduler.noise_ahead import KEPT_SAMPLES, Noise, NoiseAhead
from service.scheduler.order import FairOrder
from service.scheduler.pace import Pace
from service.scheduler.queue import Ticket, WaitingLine
from service.scheduler.reserve import Reserve
from service.scheduler.results import Finished, blank
from service.scheduler.rows import CODE, REASONS, RowTable
from service.telemetry import named

_LOG = logging.getLogger("elbow.scheduler")
TOLERANCE_SAMPLES = 8
"""The gain of a late step, measured with fewer samples, drowns in noise (architecture.md, section 2)."""
_GATHERED_TICKS = 8
"""Under load, rows are admitted and leave together, once in so many ticks (some 30 ms, where a reply takes a second)."""


@dataclass
class Counts:
    """What a lane has done so far, and what it holds now."""

    ticks: int = 0
    steps: int = 0
    rows_done: int = 0
    jobs_done: int = 0
    jobs_failed: int = 0
    jobs_abandoned: int = 0
    degraded: int = 0
    rows_waiting: int = 0
    rows_in_flight: int = 0
    batch_rows: int = 0


@dataclass
class StaticLane:
    """One loaded model. `prepare` may be called from any thread, all else on the engine thread (or before it knows the lane)."""

    key: str
    engine: Engine
    clock: Callable[[], float]
    slots: int
    tick_s: float
    reply_s: float
    max_wait_s: float = math.inf
    inbox: deque[Ticket] = field(default_factory=deque)
    someone_left: bool = False
    draining: bool = False
    retiring: bool = False
    passed_over: int = 0
    last_served: int = 0
    weight_in: int = 0
    weight_out: int = 0
    hand_over: Callable[[], None] = lambda: None
    """Called right before a long run of the engine, which needs no interpreter: the moment to wake those who wait for answers."""

    def __post_init__(self) -> None:
        card = self.engine.card
        self.counts, self.cost = Counts(), CostModel()
        self.slots = self.engine.allocate(self.slots)
        self._rows = RowTable(self.slots, len(card.levels), card.max_steps)
        keyed = self.engine.draws_noise
        self._noise, self._ahead = Noise(card, keyed), NoiseAhead(card, self._rows, keyed)
        self._stages = FinalStages(
            engine=self.engine, rows=self._rows, cost=self.cost, noise=self._noise, clock=self.clock, tick_s=self.tick_s
        )
        self._line, self._order, self._best = WaitingLine(), FairOrder(self._rows), BestSoFar(self.engine, self._rows)
        self._ones = np.broadcast_to(np.float32(1), (self.slots, *card.x.shape))
        self._answered: list[Ticket] = []
        self._carry = [tensor.name for tensor in card.carry]
        self._init_has_noise = any(tensor.name.startswith("noise") for tensor in card.programs["init"].inputs)
        self._gathering, self._parked = False, self._rows.active
        self.reserve, self.load = Reserve(self.reply_s), Load(self.max_wait_s)
        self._pace = Pace(self.cost, self.slots, self.tick_s)
        self._door = Door(card, self._rows, self.cost, self._pace, self._stages, self.load, self.reserve)

    # At the door, from any thread.

    def prepare(self, ticket: Ticket, now: float) -> None:
        """As `Door.prepare`."""
        self._door.prepare(ticket, now)

    def replied(self, reply: Reply) -> None:
        """A reply is about to leave: what it took is learned from. Called where replies are made."""
        self.reserve.observe(reply.at - reply.answered)
        if reply.ended_by is not None:
            self.reserve.judge(reply.ended_by - reply.at, reply.at, reply.stepped)

    @property
    def weight_waiting(self) -> int:
        """What waits, by the weights given at the door. Two counters, each written by one side only, need no lock."""
        return self.weight_in - self.weight_out

    # What the engine thread asks of a lane.

    def has_work(self) -> bool:
        return bool(self.inbox or self._line or self._stages or self._answered or self.someone_left or self._rows.in_flight)

    def in_use(self) -> bool:
        return self.has_work()

    @property
    def will_step(self) -> bool:
        """Whether the next tick has rows to step, and so a moment to hand answers over."""
        return len(self._rows.active) > 0

    def urgency(self) -> float:
        self._receive()
        active = self._rows.active
        in_flight = float(self._rows.deadline[active].min()) if len(active) else math.inf
        return min(in_flight, self._line.earliest_deadline())

    def answered(self) -> list[Ticket]:
        done, self._answered = self._answered, []
        return done

    def tick(self, budget_s: float) -> None:
        started = self.clock()
        self.counts.ticks += 1
        self._in_engine_s, self._someone_ended = 0.0, False
        self._receive()
        if self.someone_left:
            self._forget_abandoned()
        self._refuse_late(started)
        self._gathering = self._gathers()
        self._admit(budget_s)
        self._yield_to_waiting()
        self._refine(budget_s)
        if self._stages:
            self._end_overdue()
            self._finish(self._stages.tick(max(budget_s / 2, budget_s - (self.clock() - started)), self._fail_batch))
        else:
            self._pace.observe(self.clock() - started - self._in_engine_s)
        self.counts.rows_in_flight = self._rows.in_flight

    def fail_all(self, error: Exception) -> None:
        self._receive()
        self._end(self._held(), error)

    def request_ids(self) -> list[str]:
        return named(ticket.request_id for ticket in self._held())

    def _held(self) -> list[Ticket]:
        """What is in line, in slots or in final stages, and has no answer yet."""
        held = {id(t): t for t in (*self._line, *self._stages.tickets(), *(t for t in self._rows.tickets if t is not None))}
        return [ticket for ticket in held.values() if ticket.outcome is None]

    # Entering.

    def _receive(self) -> None:
        while self.inbox:
            ticket = self.inbox.popleft()
            try:
                self._take_in(ticket)
            except Exception as exc:  # it is in no line yet, where `fail_all` would find it
                self._fail_batch([ticket], exc)

    def _take_in(self, ticket: Ticket) -> None:
        if ticket.rows == 0:
            self._answer(ticket, blank(ticket.job, self.engine.card))
        elif ticket.job.prior or ticket.job.z is not None:
            ticket.started = self.clock()
            if not self._stages.needed(ticket):
                self._answer(ticket, blank(ticket.job, self.engine.card))
            else:
                self._stages.add(ticket, [(row, NO_SLOT) for row in range(ticket.rows)])
        else:
            self._line.add(ticket)
            self.counts.rows_waiting += ticket.rows

    def _admit(self, budget_s: float) -> None:
        free = len(self._rows.free)
        if not self._line or not free or (self._gathering and self._line.earliest_deadline() == math.inf):
            return
        most = self.cost.largest("init", budget_s / 2, free)
        # an eighth of the slots stays for jobs to come: of this tick's places as many as would be taken from that
        taken = self._line.take(most, max(0, min(self.slots // 8, most - 1) - (free - most)))
        if not taken:
            return
        now = self.clock()
        tickets: list[Ticket] = []
        records: list[tuple[Any, ...]] = []
        for ticket, first, end in taken:
            if first == 0:
                ticket.started = now
            if end == ticket.rows:
                self._put_down(ticket)
            self._order.enter(ticket, end - first)
            self.counts.rows_waiting -= end - first
            tickets.extend([ticket] * (end - first))
            records.extend(self._record(ticket, row) for row in range(first, end))
        slots = self._rows.enter(tickets, records)
        try:
            self._ahead.enter(slots)
            self._load(slots, taken)
        except Exception as exc:
            self._fail_batch([ticket for ticket, _, _ in taken], exc)
            return
        every = slots[self._rows.every[slots]]
        if len(every):
            self._measure(every)

    def _record(self, ticket: Ticket, row: int) -> tuple[Any, ...]:
        job, budget, ask = ticket.job, ticket.job.budget, ticket.job.ask
        measurable = job.x is not None
        events = job.on_step is not None and measurable
        tolerance = budget.tolerance if measurable else None
        every = (ask.trace and measurable) or events or tolerance is not None
        steps = steps_of(job, self.engine.card)
        reason = StopReason.STEPS if self.engine.card.iterative or job.x is None else StopReason.CONVERGED
        return (
            row,
            job.seeds[row],
            0 if job.first_step is None else job.first_step[row],
            0,
            steps,
            max(ask.samples, TOLERANCE_SAMPLES) if tolerance is not None else ask.samples,
            ticket.deadline,
            -math.inf if tolerance is None else tolerance,
            self._order.tag(ticket),
            min(job.rows, self.slots),
            budget.elastic,
            every,
            measurable and (ask.measure or every) and not self._stages.measures(ticket),
            events,
            self._stages.needed(ticket),
            -1,
            CODE[reason],
        )

    def _load(self, slots: Slots, taken: list[tuple[Ticket, int, int]]) -> None:
        """Writes x and mask, runs `init`, and puts what jobs brought along over the carry it made."""
        card, place = self.engine.card, 0
        given: list[tuple[Slots, Arrays]] = []
        xs, masks, with_x = [], [], []
        for ticket, first, end in taken:
            job, mine = ticket.job, slots[place : place + end - first]
            place += end - first
            if job.x is not None:
                xs.append(job.x[first:end])
                masks.append(self._ones[: end - first] if job.mask is None else job.mask[first:end])
                with_x.append(mine)
            if job.carry is not None:
                arrays = {name: value[first:end] for name, value in job.carry.items()}
                if job.x is None:  # no `init` overwrites what the slot's last row left there
                    arrays = {t.name: arrays.get(t.name, np.zeros((len(mine), *map(int, t.shape[1:])), t.dtype)) for t in card.carry}
                given.append((mine, arrays))
        if xs:
            started = with_x[0] if len(with_x) == 1 else np.concatenate(with_x)
            together = len(xs) > 1
            self.engine.load_rows(
                started, {"x": np.concatenate(xs) if together else xs[0], "mask": np.concatenate(masks) if together else masks[0]}
            )
            noise: Given = {}
            if self._init_has_noise:
                noise = self._noise.draw("init", self._rows.seed[started], Purpose.INIT, (0, card.samples))
            self._timed("init", len(started), started, noise)
        for mine, arrays in given:
            self.engine.load_rows(mine, arrays)

    # Refining.

    def _refine(self, budget_s: float) -> None:
        rows = self._rows
        if len(self._parked) and not self._gathering:
            parked, self._parked = self._parked, self._parked[:0]
            self._conclude(parked)
        if not len(rows.active):
            return
        self._stop_late()
        chosen = self._choose(budget_s)
        self.counts.batch_rows = len(chosen)
        stepping = chosen[rows.target[chosen] > rows.done[chosen]]
        if len(stepping) and not self._step(stepping):
            chosen = self._alive(chosen)
        if self._gathering:
            chosen = self._park(chosen)
        self._conclude(chosen)

    def _conclude(self, chosen: Slots) -> None:
        """Measures those of the rows that need a value now; those that are done leave refinement."""
        rows = self._rows
        ended = rows.target[chosen] <= rows.done[chosen]
        due = rows.measured[chosen] != rows.done[chosen]
        due &= rows.every[chosen] | (ended & rows.measure[chosen])
        if np.any(due):
            self._measure(chosen[due])
            chosen = self._alive(chosen)
        over = chosen[rows.target[chosen] <= rows.done[chosen]]
        if len(over):
            self._leave_refinement(over)

    def _gathers(self) -> bool:
        """Whether newcomers, and rows that only need to be measured, wait for others to share the cost of a batch: under load, where
        what a lone row costs besides its steps (init, score, noise) would be taken from everybody's steps. Deadlines never wait.
        """
        busy = self.load.full_s > self.load.comfortable_s and not self.draining and len(self._rows.active) > 0
        return busy and self.counts.ticks % _GATHERED_TICKS != 0

    def _park(self, chosen: Slots) -> Slots:
        """Takes rows that are done, and can wait, out of the ticks to come; returns the others."""
        rows = self._rows
        waiting = (rows.target[chosen] <= rows.done[chosen]) & (rows.deadline[chosen] == math.inf) & ~rows.every[chosen]
        if not np.any(waiting):
            return chosen
        parked = chosen[waiting]
        rows.deactivate(parked)
        self._parked = np.concatenate([self._parked, parked])
        return chosen[~waiting]

    def _alive(self, slots: Slots) -> Slots:
        """Those of the slots that still hold a row: jobs may have ended since they were chosen."""
        if not self._someone_ended:
            return slots
        return slots[[self._rows.tickets[slot] is not None for slot in slots.tolist()]]

    def _step(self, slots: Slots) -> bool:
        """One step for the rows in `slots`; False if the engine failed (and the rows are gone)."""
        rows = self._rows
        try:
            noise = self._ahead.refining(slots)
            self.hand_over()
            norm = self._timed("step", len(slots), slots, noise)["grad_norm"]
        except Exception as exc:
            self._fail_slots(slots, exc)
            return False
        finite = np.isfinite(norm)
        if finite.all():
            rows.done[slots] += 1
        else:
            rows.done[slots[finite]] += 1
            rows.stop(slots[~finite], StopReason.NONFINITE)
        self.counts.steps += len(slots)
        return True

    def _choose(self, budget_s: float) -> Slots:
        """The rows of this tick: all of them, or as many as their steps and measures fit into `budget_s`."""
        rows, active = self._rows, self._rows.active
        self._order.turn()
        places = self._pace.places(budget_s)
        chosen = self._order.first(places) if len(active) > places else active
        measured = rows.every[chosen] | (rows.measure[chosen] & (rows.done[chosen] + 1 >= rows.target[chosen]))
        score_s = self.cost.seconds("score", int(rows.samples[chosen[measured]].sum()))
        if score_s > budget_s and len(chosen) > 1:  # measures with many samples
            chosen = self._order.first(max(1, int(len(chosen) * budget_s / score_s)))
        if len(chosen) < len(active):
            self._order.charge(chosen)
        return chosen

    def _stop_late(self) -> None:
        """Stops rows for which one more step, its measure and the reply would miss the deadline."""
        rows, active = self._rows, self._rows.active
        deadlines = rows.deadline[active]
        if deadlines.min() == math.inf:
            return
        places = self._pace.places(self.tick_s)
        together = min(places, len(active))
        step = math.ceil(len(active) / places) * (self.cost.seconds("step", together) + self._pace.overhead_s)
        score = self.cost.seconds("score", int(together * rows.samples[active].mean()))
        now, unfinished, elastic = self.clock(), rows.target[active] > rows.done[active], rows.elastic[active]
        late = unfinished & elastic & (now + step + score + self.reserve.tail > deadlines)
        if np.any(late):
            rows.stop(active[late], StopReason.DEADLINE)
        missed = unfinished & ~elastic & (now + score > deadlines)
        if np.any(missed):
            self._end(self._tickets(active[missed]), DeadlineExceeded("not all steps could be done before the deadline"))

    def _yield_to_waiting(self) -> None:
        """Elastic rows that had a step give up others: their share under load, all when the server stops, and as many rows as wait
        when no slot is free, those with the most steps first.
        """
        rows, share = self._rows, self.load.share()
        full = bool(self._line) and not rows.free
        if not (full or self.draining or share < 1.0) or not len(rows.active):
            return
        active = rows.active
        able = active[rows.elastic[active] & (rows.done[active] > 0) & (rows.done[active] < rows.target[active])]
        if not self.draining:
            over = rows.done[able] >= share * rows.target[able]
            waiting = self.counts.rows_waiting - int(np.count_nonzero(over)) if full else 0
            others = able[~over]
            able = np.concatenate([able[over], others[np.argsort(-rows.done[others], kind="stable")[: max(0, waiting)]]])
        if len(able):
            self.counts.degraded += len(able)
            rows.stop(able, StopReason.DEGRADED)

    # Measuring.

    def _measure(self, slots: Slots, purpose: Purpose = Purpose.MEASURE) -> None:
        """Scores the current λ of these rows, one batch per number of samples; rows of a batch that fails are gone afterwards."""
        rows = self._rows
        samples = rows.samples[slots]
        counts = [int(samples[0])] if (samples == samples[0]).all() else np.unique(samples).tolist()
        for count in counts:
            batch = slots if len(counts) == 1 else slots[samples == count]
            try:
                if purpose is Purpose.MEASURE and count <= KEPT_SAMPLES:
                    noise = self._ahead.measuring(batch, count)
                else:
                    noise = self._noise.draw("score", rows.seed[batch], purpose, (0, count))
                scores = self._timed("score", len(batch) * count, batch, noise)
            except Exception as exc:
                self._fail_slots(batch, exc)
                continue
            likelihood, kl = scores["log_likelihood"].mean(axis=1, dtype=np.float64), scores["kl"]
            if purpose is Purpose.VERIFY:
                rows.log_likelihood[batch], rows.kl[batch] = likelihood, kl
                continue
            elbo = rows.record(batch, likelihood, kl)
            if not np.isfinite(elbo).all():
                rows.stop(batch[~np.isfinite(elbo)], StopReason.NONFINITE)
            told = np.flatnonzero(rows.events[batch])
            if len(told):
                self._best.tell(batch[told], elbo[told], kl[told], self._fail_batch)

    # Leaving.

    def _leave_refinement(self, slots: Slots) -> None:
        rows = self._rows
        rows.deactivate(slots)
        told = slots[rows.events[slots]]
        if len(told):
            self._return_best(told)
            slots = self._alive(slots)
        staying = rows.outputs[slots]
        for slot in slots[staying].tolist():
            ticket = rows.ticket(slot)
            self._stages.add(ticket, [(int(rows.row[slot]), slot)])
        if not staying.all():
            self._retire(slots[~staying])

    def _return_best(self, slots: Slots) -> None:
        """Puts the best carry back and scores it by a third stream: the value that made it the best is biased upwards."""
        try:
            self._best.restore(slots)
        except Exception as exc:
            self._fail_slots(slots, exc)
            return
        self._measure(slots, Purpose.VERIFY)

    def _finish(self, through: list[tuple[Ticket, int, int]]) -> None:
        slots = [slot for _, _, slot in through if slot != NO_SLOT]
        if slots:
            self._retire(np.array(slots, np.intp))
        for ticket, _, slot in through:
            if slot == NO_SLOT:
                ticket.left -= 1
                self.counts.rows_done += 1
                if ticket.left == 0:
                    self._complete(ticket)

    def _retire(self, slots: Slots) -> None:
        """Writes the results of rows that are done, frees their slots, answers the jobs that are complete."""
        rows = self._rows
        try:
            carry = self.engine.read_rows(slots, self._carry)
        except Exception as exc:
            self._fail_slots(slots, exc)
            return
        indices = slots.tolist()
        step = rows.first[slots] + rows.done[slots]
        if self._best:
            for i, slot in enumerate(indices):
                best = self._best.take_step(slot)
                if best is not None:
                    step[i] = best
        finished = Finished(
            log_likelihood=rows.log_likelihood[slots],
            kl=rows.kl[slots],
            steps_used=rows.done[slots],
            step=step,
            stop_reason=[REASONS[code] for code in rows.reason[slots].tolist()],
            carry=carry,
            traces=rows.trace[slots, : int(rows.done[slots].max()) + 1],
            traced=rows.every[slots],
        )
        complete = self._deliver(finished, indices)
        rows.release(indices)
        self.counts.rows_done += len(indices)
        for ticket in complete:
            self._complete(ticket)

    def _deliver(self, finished: Finished, slots: list[int]) -> list[Ticket]:
        """Writes finished rows into their jobs' results; returns the jobs that lack nothing now."""
        complete: list[Ticket] = []
        several: dict[int, tuple[Ticket, list[int]]] = {}
        for i, slot in enumerate(slots):
            ticket = self._rows.ticket(slot)
            ticket.left -= 1
            self._order.leave(ticket, 1)
            if ticket.left == 0:
                complete.append(ticket)
            if ticket.result is None and ticket.rows == 1:
                ticket.result = finished.alone(i, ticket.job.ask.trace)
            else:
                several.setdefault(id(ticket), (ticket, []))[1].append(i)
        for ticket, which in several.values():
            if ticket.result is None:
                ticket.result = blank(ticket.job, self.engine.card)
            finished.write(ticket.result, self._rows.row[[slots[i] for i in which]], which)
        return complete

    def _complete(self, ticket: Ticket) -> None:
        now, budget, result = self.clock(), ticket.job.budget, ticket.result
        assert result is not None
        if budget.deadline is not None and not budget.elastic and now > budget.deadline:
            self._end([ticket], DeadlineExceeded("the reply was ready only after the deadline"))
            return
        result.timing = Timing(
            queue_ms=1e3 * (ticket.started - ticket.arrived),
            compute_ms=1e3 * (now - ticket.started),
            predicted_ms=1e3 * ticket.predicted_s,
            batch_rows=self.counts.batch_rows,
            answered=now,
        )
        self._answer(ticket, result)

    def _answer(self, ticket: Ticket, outcome: JobResult | BaseException) -> None:
        ticket.answer(outcome)
        self._put_down(ticket)
        self.load.give_back(ticket.work)
        self._answered.append(ticket)
        self.counts.jobs_done += isinstance(outcome, JobResult)

    def _put_down(self, ticket: Ticket) -> None:
        """The ticket no longer weighs on the line."""
        self.weight_out += ticket.weight
        ticket.weight = 0

    # Failing.

    def _refuse_late(self, now: float) -> None:
        """Jobs in line that can no longer be answered in time."""
        if self._line.earliest_deadline() == math.inf:
            return
        start = self.cost.seconds("init", 1) + self.cost.seconds("score", 1)
        late = [ticket for ticket in self._line if ticket.outcome is None and now + start > ticket.deadline]
        if late:
            self._end(late, DeadlineExceeded("the deadline passed while the request waited for its turn"))

    def _end_overdue(self) -> None:
        """Jobs in their final stages that could only be answered too late."""
        now = self.clock()
        late = [
            t
            for t in self._stages.tickets()
            if t.job.budget.deadline is not None and not t.job.budget.elastic and now > t.job.budget.deadline
        ]
        if late:
            self._end(late, DeadlineExceeded("the final stages could not be done before the deadline"))

    def _forget_abandoned(self) -> None:
        self.someone_left = False
        self._receive()  # whoever left before this line is in line by now
        gone = [ticket for ticket in self._held() if ticket.abandoned]
        if gone:
            self.counts.jobs_abandoned += len(gone)
            self._end(gone, JobAbandoned("the waiter has gone"))

    def _fail_slots(self, slots: Slots, error: Exception) -> None:
        self._fail_batch(self._tickets(slots), error)

    def _fail_batch(self, tickets: Collection[Ticket], error: Exception) -> None:
        """Every job with a row in a batch that raised gets the failure, and the log says why, once; the lane lives on."""
        failure = BackendFailure(f"the engine failed on a batch of {self.key}: {error}")
        failure.__cause__ = error
        alive = list({id(ticket): ticket for ticket in tickets if ticket.outcome is None}.values())
        request_ids = named(ticket.request_id for ticket in alive)
        _LOG.error("a batch failed", exc_info=error, extra={"model": self.key, "jobs": len(alive), "request_ids": request_ids})
        self.counts.jobs_failed += len(alive)
        self._end(alive, failure)

    def _tickets(self, slots: Slots) -> list[Ticket]:
        found = {id(t): t for slot in slots.tolist() if (t := self._rows.tickets[slot]) is not None}
        return list(found.values())

    def _end(self, tickets: list[Ticket], error: Exception) -> None:
        """Answers jobs early and takes everything of theirs out of line, slots and final stages."""
        self._someone_ended = True
        for ticket in tickets:
            self._order.leave(ticket, ticket.in_flight)
            if ticket.next_row < ticket.rows and not (ticket.job.prior or ticket.job.z is not None):
                self.counts.rows_waiting -= ticket.rows - ticket.next_row
            self._answer(ticket, error)
        over = [slot for slot, ticket in enumerate(self._rows.tickets) if ticket is not None and ticket.outcome is not None]
        if over:
            self._rows.deactivate(np.array(over, np.intp))
            self._rows.release(over)
            self._best.forget(over)
            self._parked = self._parked[~np.isin(self._parked, over)]
        self._line.forget_answered()
        self._stages.forget_answered()

    def _timed(self, program: str, size: int, slots: Slots, noise: Given) -> Arrays:
        started = self.clock()
        outputs = dict(self.engine.run_rows(program, slots, noise))  # waits for a device: its time is what is measured
        seconds = self.clock() - started
        self._in_engine_s += seconds
        self.cost.observe(program, size, seconds)
        return outputs


class JobAbandoned(Exception):
    """Outcome of a job whose waiter has gone: nobody receives it."""
