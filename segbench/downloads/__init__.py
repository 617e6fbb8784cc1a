"""Weights: found on this machine or downloaded, their hash checked each time.

The parts, from the bottom: ``folders`` (the cache, names, locks), ``links`` (which links are followed), ``checks``
(hash, web pages, remembered hashes), ``progress`` (the bar), ``partial`` and ``transfer`` (HTTP, continued),
``sources``, ``url`` and ``hub`` (the three kinds of source), ``fetching`` (tries them in order).

The code that prints is `segbench.cli`, with an exception here: a download draws its bar on standard error, and logs, by
the logger ``segbench``, what a person should know although the file is found in the end.

Nothing here imports requests, huggingface_hub or rich before it needs them.
"""

from segbench.downloads.checks import pin_file
from segbench.downloads.fetching import Fetched, cached, describe, fetch
from segbench.downloads.folders import cache_folder, offline_by_environment
from segbench.downloads.transfer import LIMITS, Limits

__all__ = [
    "LIMITS",
    "Fetched",
    "Limits",
    "cache_folder",
    "cached",
    "describe",
    "fetch",
    "offline_by_environment",
    "pin_file",
]
