"""``selftest``."""

from __future__ import annotations

import click

from segbench.cli.app import fail, note, print_json, print_table


@click.command()
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--quick", is_flag=True, help="Without other precisions, compilation and speed.")
@click.option("--json", is_flag=True, help="Print as JSON, for a bug report.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def selftest(device: str, quick: bool, json: bool, quiet: bool) -> None:
    """Check that segbench computes what it should on this machine, in at most two minutes.

    Golden vectors, the batch against the plain loop, exact float32, memory that runs out, other precisions, speed.
    Ends with 1 if anything differs.
    """
    from segbench.engine.selftest.run import run_selftest

    report = run_selftest(device, quick=quick, progress=not quiet)
    if json:
        print_json(report.as_dict())
    else:
        rows = [[each.status, each.name, each.detail, f"{each.seconds:.1f}"] for each in report.checks]
        print_table(["", "check", "found", ">seconds"], rows)
    if report.differing:
        fail(
            f"On {report.device}: {', '.join(report.differing)}. Do not trust results from this machine. Please "
            "report this with the output of: segbench selftest --json",
            1,
        )
    note(f"{report.device}: all checks available on this device passed.")
