"""Plan, run, merge: evaluation with units of work that survive anything."""
