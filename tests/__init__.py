"""What a user has set must not reach the tests, nor the libraries that read it when they are imported."""

import os

for _name in [*os.environ]:
    if _name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SEGBENCH_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]
