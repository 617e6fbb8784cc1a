"""All that a run keeps on disk, and its one lock. Torch-free."""
