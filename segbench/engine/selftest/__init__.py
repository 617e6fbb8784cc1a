"""Does segbench compute what it should on this machine? Everything else was tested on CPUs; this runs on the user's."""

from segbench.engine.selftest.outcome import DIFFERS, NOT_AVAILABLE, OK, Outcome
from segbench.engine.selftest.run import CheckResult, Report, run_selftest

__all__ = ["DIFFERS", "NOT_AVAILABLE", "OK", "CheckResult", "Outcome", "Report", "run_selftest"]
