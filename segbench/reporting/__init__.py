"""Reports of runs: numbers, charts and pictures."""
