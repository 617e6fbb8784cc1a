"""Getting data sets: what may be downloaded, what must be fetched by hand, and how archives are unpacked safely."""

from segbench.data.preparation.preparing import prepare

__all__ = ["prepare"]
