"""The demo's alignment: `GRADETrainer` on the demo's models, with a progress bar and a record of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import (
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from grade_kernels.demo.config import AlignConfig
from grade_kernels.demo.models import RewardModel
from grade_kernels.demo.tokenizer import with_start
from grade_kernels.training import GRADEConfig, GRADETrainer
from grade_kernels.training.checkpoints import complete_checkpoints, damage

__all__ = ["Record", "align", "build_trainer"]


@dataclass(frozen=True)
class Record:
    """What one step of alignment looked like. `kl` is in nats per completion, `tokens` the mean completion length."""

    step: int
    reward: float
    kl: float
    grad_norm: float
    tokens: float


def build_trainer(
    policy: GPT2LMHeadModel,
    reward_model: RewardModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    config: AlignConfig,
    *,
    seed: int,
    directory: Path,
) -> GRADETrainer:
    """A trainer that raises the reward of `policy`, in place; the reference of its KL is the policy as it is now.

    Args:
        policy: what is aligned.
        reward_model: the judge.
        tokenizer: of both.
        prompts: beginnings of reviews.
        config: settings.
        seed: of the order of prompts and of the noise.
        directory: of the checkpoints.
    """
    settings = GRADEConfig(
        output_dir=str(directory),
        seed=seed,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=256,
        max_completion_length=config.max_new_tokens,
        tau=config.tau,
        beta=config.beta,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,  # models this small are no work for a GPU, and the result is the same on every machine
    )
    trainer = GRADETrainer(
        policy, reward_model, settings, [{"prompt": with_start(prompt)} for prompt in prompts],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def align(trainer: GRADETrainer, *, console: Console, on_step: Callable[[Record], None] | None = None) -> list[Record]:
    """Train, from the latest sound checkpoint where there is one.

    Returns:
        A record of every step since the very first.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came; the step it came in was finished and saved.
        ValueError: a checkpoint is already past the steps that are asked for.
    """
    directory, steps = Path(str(trainer.args.output_dir)), trainer.args.max_steps
    start = _sound_step(directory, console)
    if start > steps:
        raise ValueError(
            f"{directory} holds {start} steps of alignment, more than the {steps} asked for; ask for more steps, or "
            "start over with --fresh"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        watch = _Watch(progress, start, steps, on_step)
        trainer.add_callback(watch)
        try:
            trainer.train(resume_from_checkpoint=start > 0)
        finally:
            trainer.remove_callback(watch)
    return [_record(entry) for entry in trainer.state.log_history if "reward" in entry]


def _sound_step(directory: Path, console: Console) -> int:
    """The step of the latest checkpoint that can be used; 0 where there is none."""
    for path in complete_checkpoints(directory):
        wrong = damage(path)
        if wrong is None:
            return int(path.name.rpartition("-")[2])
        console.print(f"[yellow]{path} can not be used: {wrong}[/yellow]")
    return 0


def _record(entry: dict[str, Any]) -> Record:
    return Record(
        entry["step"], entry["reward"], entry["kl"], float(entry["grad_norm"]), entry["completions/mean_length"]
    )


class _Watch(TrainerCallback):
    """Moves the progress bar and hands out the record of each step."""

    def __init__(self, progress: Progress, start: int, steps: int, on_step: Callable[[Record], None] | None) -> None:
        self._progress, self._on_step = progress, on_step
        self._bar = progress.add_task("Aligning", total=steps, completed=start)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """After every step."""
        entry = state.log_history[-1]
        if "reward" not in entry:
            return
        record = _record(entry)
        self._progress.update(
            self._bar,
            completed=record.step,
            description=f"Aligning: reward {record.reward:.3f}, KL {record.kl:5.2f}, "
            f"gradient norm {record.grad_norm:6.3f}",
        )
        if self._on_step is not None:
            self._on_step(record)
