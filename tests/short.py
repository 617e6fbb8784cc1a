"""`python -m tests.short ...` is `segbench ...` with 3 iterations of the check at a huge ε in place of 100.

The check takes three quarters of a short evaluation, and its verdict is the subject of few tests: those ask for the
fixture `whole_check`. All other evaluations of the tests, in this process and in others, are made with the short one.
"""

from __future__ import annotations

from segbench.engine.compute import worker

WHOLE, ITERATIONS = worker.CHECK_ITERATIONS, 3
worker.CHECK_ITERATIONS = ITERATIONS

if __name__ == "__main__":
    from segbench.cli import main

    main()
