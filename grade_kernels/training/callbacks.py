"""What happens around the steps: a stop by a signal that loses nothing, and a table of completions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = [
    "NonFiniteGradientError",
    "StopOnNonFiniteGradient",
    "StopOnSignal",
    "TrainingInterrupted",
    "completions_table",
    "show_completions",
]


class TrainingInterrupted(SystemExit):
    """A signal stopped training after a whole step, and a checkpoint of that step is on disk.

    Uncaught, it ends the process with the status that the signal would have given.

    Attributes:
        step: the step that was finished and saved.
        signum: which signal.
    """

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(128 + signum)
        self.step, self.signum = step, signum

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name} stopped training after step {self.step}, which is saved"


class StopOnSignal(TrainerCallback):
    """During training, SIGTERM or SIGINT lets the current step finish, saves a checkpoint and stops.

    A second SIGINT raises KeyboardInterrupt at once. With several processes, all of them stop when one was told to.
    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        received: number of the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take the signals over."""
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training where a signal came."""
        if args.world_size > 1:
            told = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
            self.received = int(told.item())
        if self.received:
            control.should_save = True
            control.should_training_stop = True
        return control

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signum


class NonFiniteGradientError(ValueError):
    """A gradient is NaN or infinite although every reward was finite."""


class StopOnNonFiniteGradient(TrainerCallback):
    """Raises NonFiniteGradientError before the optimizer takes a gradient that would spoil every parameter.

    In float16 the loss scaler skips such steps by itself, and nothing is raised.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at every gradient."""
        if args.fp16:
            return
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise NonFiniteGradientError(
                    f"the gradient of {name} is not finite in step {state.global_step + 1}, although the rewards are: "
                    "look for a reward whose derivative is not (a square root or a logarithm at 0)"
                )


def completions_table(
    prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]], title: str
) -> Table:
    """A table with a row for each completion: prompt, completion, then numbers and whatever else the columns hold."""
    table = Table(title=title, show_lines=True)
    table.add_column("Prompt")
    table.add_column("Completion")
    for name in columns:
        table.add_column(name, justify="right")
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        cells = [values[i] for values in columns.values()]
        # As `Text`: in a plain string, rich would take brackets of a completion for markup.
        shown = [Text(f"{cell:.3f}" if isinstance(cell, float) else str(cell)) for cell in cells]
        table.add_row(Text(prompt), Text(completion), *shown)
    return table


def show_completions(table: Table, console: Console | None = None) -> None:
    """Write a table to the terminal."""
    (console or Console()).print(table)
