"""The scheduler and its engines in a process of their own, so that what a request costs besides its steps takes nothing from the steps.

    HTTP process: parse, count, print ── RemoteScheduler ═══ socket pair ═══ EngineProcess ── Scheduler ── engines

Routes, streams and the repository see a scheduler like any other (service/deps.py); docs/decisions/engine-process.md says why it is two
processes and what crosses between them.
"""
