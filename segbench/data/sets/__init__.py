"""The data sets, one file each: where they lie on disk, and what their numbers mean."""
