"""What attacks beside the protocol's own evaluation: comparisons, sweeps, targets, smallest ε, reproductions."""
