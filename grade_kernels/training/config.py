"""`GRADEConfig`: every setting of the trainer, with the reason for its default."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments

from grade_kernels.ops.checks import ESTIMATORS
from grade_kernels.training.foreign_names import refusing_foreign_settings
from grade_kernels.training.importance import MODES, ImportanceSampling
from grade_kernels.training.model import is_reentrant
from grade_kernels.training.numbers import plain
from grade_kernels.training.positions import LONG_PROMPTS
from grade_kernels.training.prompt_tokens import check_template_arguments
from grade_kernels.training.rewards import TRANSFORMS
from grade_kernels.training.schedules import TAU_SCHEDULES

__all__ = ["GRADEConfig"]


@refusing_foreign_settings
@dataclass
class GRADEConfig(TrainingArguments):
    """Settings of `GRADETrainer`, on top of those of `transformers.TrainingArguments`.

    Completions are drawn from the model's own distribution, and `tau` is the temperature of the relaxation that the
    gradient runs through. Another `temperature` is for the engine of a `rollout_func`. `per_device_train_batch_size` counts
    completions, as in TRL, so it must be a multiple of `num_generations`.

    Raises:
        TypeError: a setting of a wrong type.
        ValueError: a setting out of range, settings that contradict each other, or one of TRL's that would be ignored
            here, with the reason.
    """

    # Adam with a reward's gradient needs no advantage normalisation and no clipping of ratios; a rate between that of
    # fine-tuning (5e-5) and of pre-training (6e-4) works for small models and for LoRA. Lower it for full fine-tuning
    # of large ones.
    learning_rate: float = field(default=2e-4, metadata={"help": "Initial learning rate."})
    # The scale of the gradient changes within tens of steps. Adam's usual second moment remembers a thousand steps; this
    # one remembers 50.
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of Adam."})
    # Runs of alignment are stopped by their KL, or by somebody who reads completions. A schedule that falls to 0 at the last
    # step would need to know that step in advance.
    lr_scheduler_type: SchedulerType | str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule."}
    )
    warmup_steps: float = field(
        default=10, metadata={"help": "Steps of warm-up; the first estimates of Adam's moments are poor."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    # Columns other than the prompt are arguments of reward functions.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether reward functions see the prompt alone."}
    )

    # At 0.5 the relaxation is closer to the hard sample than at 1: on the demo 85% of completions stay well formed at
    # the same reward, instead of 71%.
    tau: float = field(default=0.5, metadata={"help": "Temperature of the relaxation."})
    tau_final: float | None = field(
        default=None, metadata={"help": "Temperature at the end of training, for schedules other than constant."}
    )
    tau_schedule: str = field(
        default="constant", metadata={"help": "How tau moves: one of " + ", ".join(TAU_SCHEDULES)}
    )
    # The straight-through Gumbel estimator feeds the tokens that were really sampled, and sees the noise that chose.
    estimator: str = field(default="ste", metadata={"help": "Gradient estimator: one of " + ", ".join(ESTIMATORS)})
    # The value itself can be differentiated for every reward. Where a classifier is sure, the gradient of its probability is
    # small, and that of the logarithm is larger.
    reward_transform: str = field(
        default="probability", metadata={"help": "What is differentiated: one of " + ", ".join(TRANSFORMS)}
    )
    # Adds under 3% of variance at tau 0.5 and 1, and visits a few hundred tokens of a row instead of all.
    eps: float = field(
        default=2**-11, metadata={"help": "Stochastic support of the backward pass; 0 is dense and exact."}
    )
    # At tau 0.5 four hops come within 1e-5 of the exact direction, at tau 1 within 1%.
    feedback_hops: int | str = field(default=4, metadata={"help": 'Sweeps through time, or "exact".'})
    # 0.02 holds the demo at a reward of 0.86 and KL 1.5 nats per completion; 0.01 reaches 0.94 at 2.6.
    beta: float = field(default=0.01, metadata={"help": "Factor of the KL to the reference; 0 holds no reference."})
    # By its name in TRL's DPOConfig.
    ref_adapter_name: str | None = field(
        default=None,
        metadata={"help": "The adapter of the policy that is the KL's reference, in place of the policy as it came."},
    )
    # The default is TRL's, so that runs of both can be compared. The cost of a step grows in proportion.
    max_completion_length: int = field(default=512, metadata={"help": "Completions are cut off after so many tokens."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Prompts of more tokens are too long; None allows what leaves room for the completion."},
    )
    # A prompt that is cut or left out changes what is trained on, so somebody must have asked for it.
    long_prompts: str = field(
        default="error",
        metadata={
            "help": "What happens to prompts that are too long: error, truncate (tokens on the left are cut off) or skip."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template, such as enable_thinking (on the command line: JSON)."},
    )
    # A pathwise gradient needs no group of completions to compare: more prompts teach more than more completions.
    num_generations: int = field(default=1, metadata={"help": "Completions per prompt."})
    # What an engine draws is told by its names in TRL. Its correction has TRL's defaults, so that runs can be compared.
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature that the engine of a rollout_func draws completions at."}
    )
    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={
            "help": "Whether completions of a rollout_func are weighed by the policy's probability over the engine's."
        },
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask", metadata={"help": "Whose ratio, and what bounds do: one of " + ", ".join(MODES)}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of that ratio; None for none."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of that ratio; None for none."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A factor per reward function; text functions must have 0."}
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Whether completions without an end of sequence count nothing."}
    )
    # With dropout the replay would differentiate another model than the one that sampled.
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to switch dropout off in the policy."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keywords of from_pretrained, where the model is a name (on the command line: JSON)."},
    )
    # Code of a model's repository runs on this machine, so somebody must have said that it may.
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether models and tokenizers given by name may bring code of their own."}
    )
    shuffle_dataset: bool = field(
        default=True,
        metadata={"help": "Whether prompts come in random order; False is train_sampling_strategy=sequential."},
    )
    # A run that goes on from such a checkpoint begins anew with what is missing, and so differs from an uninterrupted run.
    allow_partial_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Whether to resume, from what is there, from a checkpoint that another trainer wrote or whose "
            "optimizer files were removed."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to show a table of prompts and completions at every logging step."}
    )
    log_unique_prompts: bool = field(
        default=False, metadata={"help": "Whether that table shows each prompt once, with its first completion."}
    )
    log_multimodal: bool = field(
        default=True, metadata={"help": "TRL's switch for images in that table; there are none, so it changes nothing."}
    )
    num_completions_to_print: int | None = field(
        default=8, metadata={"help": "Rows of that table; None shows the whole batch."}
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            setattr(self, setting.name, plain(getattr(self, setting.name)))
        self._check()
        super().__post_init__()
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) must be a multiple of "
                f"num_generations ({self.num_generations})"
            )
        if self.sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be 'random' or 'sequential', got {self.sampling_strategy!r}: prompts are "
                "tokenized when they are drawn, so their lengths are not known before"
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha must be None: the replay would read other embeddings than the tokens were drawn from"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}: there are no labels"
            )
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:
            # One process can not deal out batches of strings and of prompts of unequal length: each reads its own.
            accelerator.dispatch_batches = False
        # transformers 5.23 and later call it `activation_checkpointing_kwargs`, and keep this name as a mirror of it.
        checkpointing = self.gradient_checkpointing_kwargs
        if isinstance(checkpointing, dict) and is_reentrant(checkpointing):
            raise ValueError(
                'gradient checkpointing must not be reentrant, got arguments without "use_reentrant": False: the sweeps '
                "differentiate to the inputs alone"
            )

    @property
    def sampling_strategy(self) -> str:
        """`train_sampling_strategy`; the first releases of transformers 5 have `group_by_length` in its place."""
        early = "group_by_length" if getattr(self, "group_by_length", False) else "random"
        return getattr(self, "train_sampling_strategy", early)

    @property
    def importance(self) -> ImportanceSampling | None:
        """How completions of an engine are weighed; None where they are not."""
        return self._importance() if self.vllm_importance_sampling_correction else None

    def _importance(self) -> ImportanceSampling:
        return ImportanceSampling(
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_max,
            self.vllm_importance_sampling_clip_min,
        )

    def _check(self) -> None:
        for name, known in (
            ("tau_schedule", TAU_SCHEDULES),
            ("estimator", ESTIMATORS),
            ("reward_transform", TRANSFORMS),
            ("long_prompts", LONG_PROMPTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        for name in ("tau", "tau_final"):
            value = getattr(self, name)
            if value is not None and not (_number(name, value) > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.tau_schedule == "constant" and self.tau_final is not None:
            raise ValueError(f"tau_final = {self.tau_final} needs a tau_schedule other than constant")
        if self.tau_schedule != "constant" and self.tau_final is None:
            raise ValueError(f"tau_schedule = {self.tau_schedule!r} needs tau_final")
        if not 0.0 <= _number("eps", self.eps) < 1.0:
            raise ValueError(f"eps must lie in [0, 1), got {self.eps}")
        if not (_number("beta", self.beta) >= 0.0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if isinstance(self.feedback_hops, str) and self.feedback_hops != "exact":
            if not self.feedback_hops.isdigit():
                raise ValueError(f'feedback_hops must be an int or "exact", got {self.feedback_hops!r}')
            self.feedback_hops = int(self.feedback_hops)
        for name, least in (
            ("feedback_hops", 0), ("max_completion_length", 1), ("max_prompt_length", 1), ("num_generations", 1),
            ("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1), ("gradient_accumulation_steps", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value == "exact" or (value is None and name == "max_prompt_length"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not (_number("temperature", self.temperature) > 0.0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")
        if not isinstance(self.vllm_importance_sampling_correction, bool):
            raise TypeError(
                f"vllm_importance_sampling_correction must be a bool, got {self.vllm_importance_sampling_correction!r}"
            )
        self._importance()
        for name in ("model_init_kwargs", "chat_template_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} must be JSON, got {value!r}: {error}") from error
                setattr(self, name, value)
            if not isinstance(value, dict | None):
                raise TypeError(f"{name} must be a dict or None, got {value!r}")
        if self.chat_template_kwargs is not None:
            check_template_arguments("chat_template_kwargs", self.chat_template_kwargs)
        if self.ref_adapter_name is not None and not isinstance(self.ref_adapter_name, str):
            raise TypeError(f"ref_adapter_name must be an adapter's name or None, got {self.ref_adapter_name!r}")
        rows = self.num_completions_to_print
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int)):
            raise TypeError(f"num_completions_to_print must be an int or None, got {rows!r}")
        if rows is not None and rows < 1:
            raise ValueError(f"num_completions_to_print must be positive or None, got {rows}")
        if self.reward_weights is not None:
            if not isinstance(self.reward_weights, (list, tuple)):
                raise TypeError(f"reward_weights must be a list of numbers or None, got {self.reward_weights!r}")
            for i, weight in enumerate(self.reward_weights):
                if not math.isfinite(_number(f"reward_weights[{i}]", weight)):
                    raise ValueError(f"reward_weights[{i}] must be finite, got {weight}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)
