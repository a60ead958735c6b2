"""What happens around the steps: a stop by SIGTERM that loses nothing, and a table of completions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["StopOnSignal", "TrainingInterrupted", "completions_table", "show_completions"]


class TrainingInterrupted(SystemExit):
    """SIGTERM stopped training after a whole step, and a checkpoint of that step is on disk.

    Uncaught, it ends the process with the status that the signal would have given.

    Attributes:
        step: the step that was finished and saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.step = step

    def __str__(self) -> str:
        return f"SIGTERM stopped training after step {self.step}, which is saved"


class StopOnSignal(TrainerCallback):
    """During training, SIGTERM lets the current step finish, saves a checkpoint and stops.

    With several processes, all of them stop when one was told to. Outside the main thread, where Python allows no
    handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: Any = None
        self._installed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over SIGTERM."""
        self.received = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
            self._installed = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training where the signal came."""
        if args.world_size > 1:
            told = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            self.received = bool(told.item())
        if self.received:
            control.should_save = True
            control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Give SIGTERM back to whom it belonged."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True


def completions_table(
    prompts: Sequence[str], completions: Sequence[str], columns: dict[str, Sequence[float]], title: str
) -> Table:
    """A table with a row for each completion: prompt, completion, then the numbers."""
    table = Table(title=title, show_lines=True)
    table.add_column("Prompt")
    table.add_column("Completion")
    for name in columns:
        table.add_column(name, justify="right")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        numbers = [f"{values[i]:.3f}" for values in columns.values()]
        # As text, so that brackets in a completion are no markup.
        table.add_row(Text(prompt), Text(completion), *numbers)
    return table


def show_completions(table: Table, console: Console | None = None) -> None:
    """Write a table to the terminal."""
    (console or Console()).print(table)
