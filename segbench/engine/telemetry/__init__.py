"""What a run tells while it computes: progress, time left, energy."""
