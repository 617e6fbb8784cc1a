"""``env``: what a bug report needs."""

from __future__ import annotations

import os
import platform

import click

import segbench
from segbench.cli.app import print_json, print_table


@click.command()
@click.option("--json", is_flag=True, help="Print as JSON.")
def env(json: bool) -> None:
    """Show versions, devices and where the content folders are."""
    import torch

    from segbench import content
    from segbench.engine.rundir.manifest import versions

    facts = {
        **versions(),
        "segbench": segbench.__version__,
        "platform": platform.platform(),
        "cpu cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "CUDA devices": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "model zoo": str(content.folder("model_zoo")),
        "entries": str(content.folder("entries")),
    }
    if json:
        print_json(facts)
    else:
        print_table(["", "value"], [[key, value] for key, value in facts.items()])
