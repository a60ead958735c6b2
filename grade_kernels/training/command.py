"""`grade-kernels train`: `GRADETrainer` from the command line or a YAML file."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser

from grade_kernels.training.callbacks import TrainingInterrupted
from grade_kernels.training.checkpoints import complete_checkpoints
from grade_kernels.training.config import GRADEConfig
from grade_kernels.training.foreign_names import reason_for_argument, reason_for_setting
from grade_kernels.training.rewards import OUTPUTS, SequenceClassificationReward
from grade_kernels.training.setup import load_by_name
from grade_kernels.training.trainer import GRADETrainer

__all__ = ["RunArguments", "parse", "read_dataset", "run"]

_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


# What arguments of a trainer are called on the command line.
_CALLED = {
    "train_dataset": "the command line has dataset and dataset_split",
    "reward_funcs": "the command line has reward",
    "reward_processing_classes": "the tokenizers saved with the rewards are taken",
    "processing_class": "the tokenizer saved with the model is taken",
    "tokenizer": "the tokenizer saved with the model is taken",
    "peft_config": "the command line has lora_r, lora_alpha and lora_target_modules",
    "quantization_config": "the command line has it in model_init_kwargs",
}


@dataclass
class RunArguments:
    """What to train on; everything else is `GRADEConfig`'s."""

    model: str = field(metadata={"help": "Policy: a directory or a name on the hub."})
    dataset: str = field(metadata={"help": "Prompts: a csv, json, jsonl or parquet file, or a name on the hub."})
    reward: list[str] = field(metadata={"help": "Sequence classifiers: directories or names on the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the hub."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on, or a part such as train[:90%%]; a file is all `train`."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out prompts, as for --dataset."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of held-out prompts."})
    prompt_column: str = field(default="prompt", metadata={"help": "The column that holds the prompts."})
    reward_label: str | None = field(
        default=None, metadata={"help": "The label that is rewarded, by name or index; default: the second of two."}
    )
    ref_model: str | None = field(
        default=None,
        metadata={"help": "Reference of the KL: a directory or a name on the hub; default: the policy as it comes."},
    )
    reward_output: str = field(
        default="probability", metadata={"help": "What a classifier returns: one of " + ", ".join(OUTPUTS)}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains the whole model."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the LoRA adapter."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that get an adapter."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the latest sound checkpoint of the output directory, if any."}
    )


def run(argv: Sequence[str]) -> int:
    """Train, evaluate where there are held-out prompts, and save model and tokenizer; returns the exit status."""
    try:
        arguments, config = parse(argv)
        trainer = _build_trainer(arguments, config)
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"grade-kernels train: {error}\n")
        return 1
    found = arguments.resume and complete_checkpoints(Path(str(config.output_dir)))
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or bool(found))
    except TrainingInterrupted as stop:
        sys.stderr.write(f"\n{stop}. The same command with --resume continues.\n")
        return 128 + stop.signum
    except ValueError as error:  # a reward or a gradient that is not finite, a prompt too long, no sound checkpoint
        sys.stderr.write(f"\ngrade-kernels train: {error}\n")
        return 1
    trainer.save_model()
    trainer.create_model_card(dataset_name=None if Path(arguments.dataset).exists() else arguments.dataset)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            Console().print({name: round(value, 4) for name, value in metrics.items() if isinstance(value, float)})
    return 0


def _build_trainer(arguments: RunArguments, config: GRADEConfig) -> GRADETrainer:
    evaluation = None
    if arguments.eval_dataset or arguments.eval_split:
        source = arguments.eval_dataset or arguments.dataset
        evaluation = read_dataset(source, arguments, arguments.eval_split or arguments.dataset_split)
    return GRADETrainer(
        model=arguments.model,
        reward_funcs=[_reward(name, arguments, config) for name in arguments.reward],
        args=config,
        train_dataset=read_dataset(arguments.dataset, arguments, arguments.dataset_split),
        eval_dataset=evaluation,
        reward_processing_classes=[
            load_by_name("the tokenizer of reward", AutoTokenizer, name, trust_remote_code=config.trust_remote_code)
            for name in arguments.reward
        ],
        peft_config=_adapter(arguments),
        ref_model=arguments.ref_model,
    )


def parse(argv: Sequence[str]) -> tuple[RunArguments, GRADEConfig]:
    """Settings of the command line, over those of the file that `--config` names, over the defaults.

    Raises:
        SystemExit: help was asked for, or something is missing or unknown.
        ValueError: a setting in the file that does not exist, or one that is out of range.
    """
    before = argparse.ArgumentParser(add_help=False)
    before.add_argument("--config")
    file, rest = before.parse_known_args(argv)
    classes: Any = [RunArguments, GRADEConfig]
    parser = HfArgumentParser(classes, prog="grade-kernels train")
    parser.add_argument("--config", help="A YAML file of settings by these names; the command line overrides it.")
    settings = {} if file.config is None else _read_yaml(Path(file.config))
    known = {action.dest for action in parser._actions}
    unknown = sorted(settings.keys() - known)
    if unknown:
        reasons = [f"{name}: {reason}" for name in unknown if (reason := _reason_for(name))]
        because = f" ({'; '.join(reasons)})" if reasons else ""
        raise ValueError(f"{file.config} has settings that do not exist: {unknown}{because}")
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name not in known and (reason := _reason_for(name)):
            raise ValueError(f"there is no setting {name}: {reason}")
    for action in parser._actions:  # one setting has two of them, such as --disable_dropout and --no_disable_dropout
        if action.dest == "feedback_hops":
            action.type = str  # an int or "exact"; the config reads either
        if action.dest in settings:
            action.default = _as_typed(settings[action.dest], action)
            action.required = False
    arguments, config, *_ = parser.parse_args_into_dataclasses(rest, return_remaining_strings=False)
    return arguments, config


def _reason_for(name: str) -> str | None:
    """Why the command line has no such setting; None for a name that is nobody's."""
    if name in _CALLED or name in inspect.signature(GRADETrainer.__init__).parameters:
        called = _CALLED.get(name, "the command line has nothing in its place")
        return f"it is an argument of trainers in Python; {called}"
    return reason_for_setting(name) or reason_for_argument(name)


def read_dataset(source: str, arguments: RunArguments, split: str) -> Dataset:
    """Prompts of a local file or of the hub, with the prompt column called `prompt`.

    Raises:
        ValueError: a file or a name that does not exist, a format that is not read, a split or a column that is not
            there.
    """
    path = Path(source)
    if not path.exists() and path.suffix in _FORMATS:
        raise ValueError(f"dataset {source!r} does not exist")
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise ValueError(f"dataset must be one of {sorted(_FORMATS)} files, got {path.name}")
        # All of a file is its split `train`.
        where: dict[str, Any] = {"path": _FORMATS[path.suffix], "data_files": str(path)}
    else:
        where = {"path": source, "name": arguments.dataset_config}
    try:
        dataset = load_dataset(**where, split=split)
    except (OSError, ValueError, StopIteration, DatasetsError) as error:  # an empty file has no next row
        reason = str(error.__cause__ or error) or "it holds nothing"
        raise ValueError(f"dataset {source!r} (split {split!r}) can not be loaded: {reason}") from error
    if arguments.prompt_column not in dataset.column_names:
        raise ValueError(f"prompt_column {arguments.prompt_column!r} is not among the columns {dataset.column_names}")
    return dataset if arguments.prompt_column == "prompt" else dataset.rename_column(arguments.prompt_column, "prompt")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings by name, got {type(settings).__name__}")
    return settings


def _as_typed(value: object, action: argparse.Action) -> Any:
    """A setting of the file as the command line would have it, whose checks then apply to it."""
    if value is False and "no" in (action.choices or ()):
        return "no"  # YAML reads an unquoted no as false
    if action.nargs == "+" and value is not None and not isinstance(value, list):
        return [value]
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _reward(name: str, arguments: RunArguments, config: GRADEConfig) -> SequenceClassificationReward:
    label = arguments.reward_label
    chosen: int | str | None = int(label) if isinstance(label, str) and label.isdigit() else label
    model = load_by_name("reward", AutoModelForSequenceClassification, name, trust_remote_code=config.trust_remote_code)
    return SequenceClassificationReward(model, label=chosen, output=arguments.reward_output)


def _adapter(arguments: RunArguments) -> Any:
    if arguments.lora_r == 0:
        return None
    from peft import LoraConfig

    modules = arguments.lora_target_modules
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        # PEFT takes "all-linear" as a string, and would look for a module of that name in a list.
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )
