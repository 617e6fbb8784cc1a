"""The training loop: clean, adversarial, or PIR-AT (Croce, Singh, Hein, ECCV 2024; SEA.md, section 8).

A step is a function of the recipe, the step's number and the weights before it: order, views and random numbers are
drawn anew from (seed, epoch, place) or (seed, step, rank). So a killed run that continues does what it would have done
anyway: on one machine's CPU bit for bit, if as many threads compute. One that is divided among processes sees the same
images, and the same gradient but for stochastic depth, dropout, and on CPUs batch statistics.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any, NamedTuple

import torch
from torch import nn

from segbench.data.protocols import IGNORE_INDEX
from segbench.errors import DataError, ModelError, RunError
from segbench.models.architectures import build_described
from segbench.models.sliding import in_windows
from segbench.signals import stop_signals
from segbench.training import checkpoint, finishing, metrics, optimisation
from segbench.training.checkpoint import Position
from segbench.training.classifier import Classifier
from segbench.training.data import Batch, TrainingData, batches, data_key, steps_an_epoch
from segbench.training.distributed import Processes
from segbench.training.finishing import Trained
from segbench.training.initialisation import RUNS, Start, initialise
from segbench.training.monitor import LossWatch, clean_scores, diverged, robust_scores
from segbench.training.recipe import CLASSIFICATION, Recipe
from segbench.training.step import StepGradient, seed_step

STOPPING = "Stopping after this step. Another Ctrl-C stops at once."


class Progress(NamedTuple):
    """State of a run after a step: what a progress bar shows.

    Attributes:
        step: steps done, of all epochs.
        steps: in all.
        loss: of the step.
        row: the latest measurements (`segbench.training.metrics.COLUMNS`), if this step ended an epoch.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    row: dict[str, Any] | None = None


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of a recipe with random weights, drawn from its seed.

    Raises:
        ModelError: the architecture does not take the recipe's arguments, or has no auxiliary head to weigh.
    """
    torch.manual_seed(recipe.seed)
    architecture = {"name": recipe.architecture, "arguments": dict(recipe.architecture_arguments)}
    model = build_described(architecture, num_classes=num_classes)
    if recipe.task == CLASSIFICATION:
        model = Classifier(model, num_classes)
    auxiliary_head = getattr(model, "auxiliary_head", None)
    if recipe.auxiliary_weight and auxiliary_head is None:
        kind = "A classifier" if recipe.task == CLASSIFICATION else recipe.architecture
        raise ModelError(f"{kind} has no auxiliary head: --set auxiliary_weight=0")
    if not recipe.auxiliary_weight and auxiliary_head is not None:
        auxiliary_head.requires_grad_(False)
    return model


def train(
    recipe: Recipe,
    data: TrainingData,
    out: Path,
    *,
    processes: Processes | None = None,
    checkpoint_minutes: float = 10.0,
    runs: Path = RUNS,
    offline: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trained | None:
    """Trains one model; writes weights, card, metrics and curves into ``out``.

    Args:
        recipe: what is trained and how.
        data: `segbench.training.data.open_data` of the recipe.
        out: folder; a checkpoint in it is continued.
        processes: this process among those of ``torchrun``; by default one on the CPU.
        checkpoint_minutes: between two checkpoints; one is also written at the end, and on Ctrl-C or SIGTERM.
        runs: folder of the classifiers trained here, for ``init``.
        offline: never use the network.
        progress: called after each step.

    Returns:
        What was written; None in a process that does not lead, and writes nothing.

    Raises:
        UsageError: the recipe would end in a card that is not valid, or lacks a backbone.
        ModelError: the architecture does not take the recipe's arguments, or the backbone is of another one.
        DataError: damaged images, or several sizes in a batch.
        RunError: ``out`` cannot be used, holds a damaged checkpoint or one of another recipe; or training diverged.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the checkpoint has been written.
    """
    processes = processes or Processes(torch.device("cpu"))
    model = build_model(recipe, data.train.num_classes)
    draft = finishing.draft(recipe, data, model, processes.device)
    epoch_steps = steps_an_epoch(recipe, data.train, processes)
    start = None
    if not (out / checkpoint.NAME).exists():  # else its weights take the place of these
        start = initialise(model, recipe, runs=runs, offline=offline)
    with checkpoint.own_folder(out, processes):
        run = _Run(recipe, data, out, processes, model, epoch_steps, checkpoint_minutes, progress)
        run.restore(start)
        trained = finishing.found(draft, out) if run.finished and processes.leads else None
        with stop_signals((SIGINT, SIGTERM), STOPPING) as stopped:
            while not run.finished:
                run.epoch(stopped)
            if processes.total(float(stopped.is_set()))[0]:  # while the last epoch was measured
                raise KeyboardInterrupt
        if processes.leads and trained is None:
            trained = finishing.finish(draft, run.final_model().eval(), data, out, run.position, processes.device)
        processes.wait()
    return trained


class _Run:
    """Model, optimiser and position of a run, and an epoch of it."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        out: Path,
        processes: Processes,
        model: nn.Module,
        epoch_steps: int,
        checkpoint_minutes: float,
        progress: Callable[[Progress], None],
    ) -> None:
        self.recipe, self.data, self.out, self.processes = recipe, data, out, processes
        self.epoch_steps, self.checkpoint_minutes, self.progress = epoch_steps, checkpoint_minutes, progress
        if processes.device.type == "cuda" and processes.world > 1:
            from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]

            # torch's own function would drop the activations that timm puts into its norms
            model = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self.model: nn.Module = model.to(processes.device)
        self.optimizer = optimisation.make_optimizer(model, recipe)
        self.schedule = optimisation.make_schedule(self.optimizer, recipe, epoch_steps)
        self.average = optimisation.make_average(model, recipe)
        self.gradient = StepGradient(model, recipe, processes)
        self.position = Position()
        self.images = data_key(data.train)
        self.watch = LossWatch(math.log(data.train.num_classes) * (1 + recipe.auxiliary_weight))
        self.loss = self.learning_rate = 0.0  # of the last step
        self.saved = self.clock = time.monotonic()

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds besides the position."""
        found: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return found | ({"average": self.average} if self.average else {})

    def restore(self, start: Start | None) -> None:
        """Goes on where the checkpoint of the folder stands, if there is one."""
        found = checkpoint.load(self.out / checkpoint.NAME, self.recipe, self.images, self.parts())
        self.position = found or Position(backbone=start._asdict() if start else None)
        self.watch.smoothed, self.watch.lowest = self.position.smoothed, self.position.lowest
        done, squared = self.processes.total(step := self._steps_done(), step * step)
        if self.processes.world * squared != done * done:
            raise RunError(
                f"The processes do not find the same checkpoint in {self.out}: --out must be a folder that all "
                "machines share. Copy it to all of them, or give another one."
            )

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch == self.recipe.epochs

    def epoch(self, stopped: threading.Event) -> None:
        """What is left of the epoch under way, its measurements, and a checkpoint if it is time for one."""
        position, recipe = self.position, self.recipe
        self.model.train()
        self.clock = time.monotonic()
        for batch in batches(self.data.train, recipe, position.epoch, self.processes, position.step):
            self._step(batch, stopped)
            if position.step < self.epoch_steps:
                self.progress(self._progress())
                self.save_if_due()
        if not (self.gradient.valid_pixels or position.loss_sum):
            raise DataError(
                f"Every pixel of the training images is ignored (label {IGNORE_INDEX}), so nothing can be learned. "
                f"Look at the masks: segbench data check {recipe.dataset}"
            )
        self._stop_clock()
        position.rows.append(self._measured())
        position.epoch, position.step, position.loss_sum = position.epoch + 1, 0, 0.0
        if self.processes.leads:
            metrics.write(self.out, position.rows)
            metrics.board(self.out, position.rows)
        self.save() if position.epoch == recipe.epochs else self.save_if_due()
        self.progress(self._progress(position.rows[-1]))

    def _step(self, batch: Batch, stopped: threading.Event) -> None:
        """One optimiser step."""
        position = self.position
        seed_step(self.recipe, self._steps_done(), self.processes.rank)
        try:
            loss = self.gradient.add(batch, stop=stopped.is_set())
        except RunError as error:
            if stopped.is_set():  # a compiler, say, that the same signal has killed; the checkpoint before stays
                raise KeyboardInterrupt from error
            raise
        if loss is None:  # one process was asked to stop, and now all know
            self.save()
            self.processes.wait()  # for the one that writes
            raise KeyboardInterrupt
        self.watch.check(loss, f"epoch {position.epoch + 1}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.learning_rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)
        position.step += 1
        position.loss_sum += loss
        position.smoothed, position.lowest = self.watch.smoothed, self.watch.lowest
        self.loss = loss

    def save_if_due(self) -> None:
        """A checkpoint, if the last one is old enough."""
        if time.monotonic() - self.saved > 60 * self.checkpoint_minutes:
            self.save()

    def save(self) -> None:
        """A checkpoint. The process that leads writes it.

        Raises:
            RunError: a weight is not finite; the checkpoint before stays.
        """
        self._stop_clock()
        if self.processes.leads:
            epoch = min(self.position.epoch + 1, self.recipe.epochs)
            if not optimisation.all_finite(self.model.state_dict().values()):
                raise RunError(diverged("A weight is no longer a number", f"epoch {epoch}"))
            checkpoint.save(self.out / checkpoint.NAME, self.recipe, self.images, self.position, self.parts())
        self.saved = self.clock = time.monotonic()

    def final_model(self) -> nn.Module:
        """The weights that the run ends with: averaged, if the recipe says so."""
        return self.average.module if self.average else self.model

    def _steps_done(self) -> int:
        return self.position.epoch * self.epoch_steps + self.position.step

    def _stop_clock(self) -> None:
        """Seconds of training so far, without measuring and saving."""
        self.position.seconds += time.monotonic() - self.clock
        self.clock = time.monotonic()

    def _progress(self, row: dict[str, Any] | None = None) -> Progress:
        position = self.position
        done, total = self._steps_done(), self.recipe.epochs * self.epoch_steps
        if row is not None:
            return Progress(position.epoch - 1, done, total, row["loss"], row)
        return Progress(position.epoch, done, total, self.loss)

    def _measured(self) -> dict[str, Any]:
        """The row of the epoch that has just ended; scores on the held-out images where they are due."""
        recipe, position, data = self.recipe, self.position, self.data
        epoch = position.epoch + 1
        seconds = position.seconds - (position.rows[-1]["seconds"] if position.rows else 0.0)
        row: dict[str, Any] = dict.fromkeys(metrics.COLUMNS)
        row |= {
            "epoch": epoch,
            "step": epoch * self.epoch_steps,
            "loss": position.loss_sum / self.epoch_steps,
            "learning_rate": self.learning_rate,
            "seconds": round(position.seconds, 3),
            "images_per_second": round(self.epoch_steps * recipe.batch_size / max(seconds, 1e-9), 2),
        }
        due = recipe.monitor_every and (epoch % recipe.monitor_every == 0 or epoch == recipe.epochs)
        if due and len(data.held_out) and self.processes.leads:
            model = in_windows(self.final_model().eval(), data.held_out)
            clean = clean_scores(model, data.held_out, self.processes.device)
            robust = robust_scores(model, data.held_out, recipe, self.processes.device)
            row |= {"clean_aacc": clean.aacc, "clean_miou": clean.miou}
            row |= {"robust_aacc": robust.aacc, "robust_miou": robust.miou}
            self.clock = time.monotonic()
        return row
