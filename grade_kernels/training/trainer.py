"""`GRADETrainer`: align a causal language model by backpropagating a reward through its own samples."""

from __future__ import annotations

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    enable_full_determinism,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from grade_kernels.noise import GumbelNoise
from grade_kernels.training import checkpoints, model_card, reference_record
from grade_kernels.training.allowed_tokens import ids_without_token, read_generation_config
from grade_kernels.training.callbacks import (
    StopOnNonFiniteGradient,
    StopOnSignal,
    TrainingInterrupted,
    completions_table,
    show_completions,
)
from grade_kernels.training.config import GRADEConfig
from grade_kernels.training.decoding import completion_texts
from grade_kernels.training.foreign_names import refuse_arguments
from grade_kernels.training.loss import (
    GradeLoss,
    check_prompts,
    check_reward_device,
    check_vocabulary,
    objectives_loss,
    token_ids,
)
from grade_kernels.training.policy import (
    LanguageModel,
    check_checkpointing,
    check_training_mode,
    gather_root,
    read_language_model,
    unwrap,
)
from grade_kernels.training.prompt_tokens import (
    TEMPLATE_COLUMNS,
    PromptTokenizer,
    is_conversation,
    prompt_text,
    tokenizer_of,
)
from grade_kernels.training.prompts import PromptCollator, RepeatedPrompts, check_prompt_dataset, room_for
from grade_kernels.training.reference import FrozenCopy, OtherModel, Reference, fingerprint, reference_for_training
from grade_kernels.training.replay import Layout, completion_kl, completion_logprobs, refer, score_completions
from grade_kernels.training.rewards import (
    NonFiniteRewardError,
    Objective,
    SequenceClassificationReward,
    reward_table,
    weighted_sum,
)
from grade_kernels.training.rollout import rollout
from grade_kernels.training.schedules import tau_at
from grade_kernels.training.text_rewards import TextRewards

__all__ = ["GRADETrainer", "load_by_name"]

logger = logging.getLogger(__name__)

_MASK64 = 2**64 - 1


class GRADETrainer(Trainer):
    """A `transformers.Trainer` whose loss is the reward of sampled completions, differentiated through the samples.

    Args:
        model: a causal language model, plain or PEFT's, or the name of one. Tokens that its `generation_config` suppresses
            are never sampled; what training does not follow of that is warned of.
        reward_funcs: one or several of: a sequence classifier of transformers or the name of one (see
            `SequenceClassificationReward` for its label and output), any differentiable
            `reward(inputs_embeds, attention_mask, **columns) -> [B]` with its table as `reward.embedding` (a module is
            put in eval mode), or a function of text `f(prompts, completions, completion_ids, **columns) -> [B numbers]`,
            which is logged and not optimised; in conversations a completion is a list of one message. Those that are
            `async def` are awaited, all of a batch at once. At least one must be differentiable. Columns are the data
            set's, as lists. A function of text that names `trainer_state`, `log_metric(name, value)` or
            `log_extra(column, values)` among its parameters gets them too, as in TRL.
        args: settings. Default: `GRADEConfig` with an output directory named after the model.
        train_dataset: with a column `prompt`, strings or lists of messages. Columns `tools`, `documents` and
            `chat_template_kwargs` reach the chat template; those and all others are columns of the rewards. Its prompts
            are checked here where it has a length (see `PromptCollator.fitting`).
        eval_dataset: the same, or a dict of such.
        processing_class: the policy's tokenizer, or a processor, whose tokenizer is used and which is saved with the
            model as it is. Default: the tokenizer saved with the model. Ids that none of its tokens has are never
            sampled.
        reward_processing_classes: a reward's tokenizer, or one per reward (None where there is none), to check that it
            gives every token the same id.
        callbacks: in addition to the library's.
        optimizers: optimizer and scheduler. Default: as `args` says.
        peft_config: wraps the model in a fresh adapter.
        ref_model: the reference of the KL: a model, the name of one, or a `Reference`. Default, where `beta` is above 0:
            the policy as training begins. Of a policy with an adapter that is a frozen copy of what is trained, or the
            model without the adapter where that is the same. `GRADEConfig(ref_adapter_name=...)` names another adapter.
        quantization_config: how to quantise a model that is given by name; for training it needs an adapter.
        model_init: in place of `model`: a function of no argument, or of a trial, that builds the policy. It is called
            here and again by every `train()`, so that `hyperparameter_search` starts each trial anew.
        compute_metrics: a function of an `EvalPrediction` that returns metrics by name. `predictions` are the completions'
            ids `[N, max_completion_length]`, padded with the padding token; `label_ids` are their prompts' ids `[N, P]`,
            padded with -100, since nothing is labelled. Rows are in the order of the data set.
        optimizer_cls_and_kwargs: the optimizer's class and its keywords, in place of `args.optim`.
        others: arguments that transformers' or TRL's trainers have and this one can not: refused, with the reason.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: settings that contradict each other, vocabularies that differ, a reward without gradient, a model
            that can not be replayed exactly, or an argument of another trainer that would be ignored. All of them before
            the first step.
    """

    args: GRADEConfig
    processing_class: Any
    model_init: Any
    reference: Reference | None
    ref_model: nn.Module | None
    _tag_names = ("grade-kernels", "grade")
    _staging: Path | None = None  # where a checkpoint is being written

    def __init__(
        self,
        model: str | nn.Module | None = None,
        reward_funcs: Any = None,
        args: GRADEConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        ref_model: str | nn.Module | Reference | None = None,
        quantization_config: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        refuse_arguments(type(self).__name__, others)
        if args is None:
            name = (
                model
                if isinstance(model, str)
                else getattr(getattr(model, "config", None), "_name_or_path", "") or "model"
            )
            args = GRADEConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-GRADE")
        if not isinstance(args, GRADEConfig):
            raise TypeError(f"args must be a GRADEConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            logger.warning("Only one of %d devices is used; start one process for each with torchrun", args.n_gpu)
            args._n_gpu = 1
        if args.torch_compile:
            logger.warning("torch_compile has no effect: replay reads hidden states from inside the model")
        for name, dataset in (("train_dataset", train_dataset), *_named_datasets(eval_dataset)):
            check_prompt_dataset(name, dataset, args.remove_unused_columns)
        if args.num_generations > 1 and isinstance(train_dataset, torch.utils.data.IterableDataset):
            raise ValueError("num_generations > 1 needs a train_dataset with a length, got an iterable one")
        if model_init is not None:
            if model is not None:
                raise ValueError("give model or model_init, not both")
            if any(part is not None for part in optimizers):
                raise RuntimeError("optimizers must be (None, None) with model_init, whose model comes anew")
            enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            self.model_init = model_init
            model = super().call_model_init()
        if model is None:
            raise ValueError("model must be given, or model_init")
        if reward_funcs is None:
            raise ValueError("reward_funcs must be given")
        self._peft_config, self._ref_model_given = peft_config, None
        policy = _load_policy(model, args, peft_config, quantization_config)
        parts = read_language_model(policy)
        if processing_class is None:
            name = parts.model.config._name_or_path
            if not name:
                raise ValueError("processing_class must be the policy's tokenizer: the model has no name to find it by")
            processing_class = load_by_name(
                "the tokenizer of model", AutoTokenizer, name, trust_remote_code=args.trust_remote_code
            )
        self._tokenizer = tokenizer_of(processing_class)
        without_token = ids_without_token(self._tokenizer, parts.vocab_size)
        config = getattr(parts.model, "generation_config", None)
        self._allowed = read_generation_config(config, parts.vocab_size, without_token)
        self._end_ids = _end_of_sequence(parts, self._tokenizer, without_token)
        self._allowed.check_ends(self._end_ids)
        pad = getattr(self._tokenizer, "pad_token_id", None)
        self._pad_id = int(pad) if pad is not None else (self._end_ids or (0,))[0]
        if args.mask_truncated_completions and not self._end_ids:
            raise ValueError(
                "mask_truncated_completions needs an end of sequence, but neither tokenizer nor model has one"
            )
        token_ids("pad_token_id", self._pad_id, parts.vocab_size)
        self.objectives, self.text_rewards, self.reward_names = _read_rewards(reward_funcs, args, policy)
        if train_dataset is not None and not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ValueError(
                "model must have a parameter that requires a gradient, but all are frozen (load PEFT's with "
                "is_trainable=True)"
            )
        self._check_policy(policy, args)
        _check_tokenizers(reward_funcs, reward_processing_classes, self._tokenizer, args.trust_remote_code)
        self._ref_model_given = _load_reference(ref_model, args, policy)
        self._set_reference(policy, args)
        room = room_for(parts.model.config, self.objectives, args, self.ref_model)

        tokens = PromptTokenizer(processing_class, self._end_ids, args.chat_template_kwargs, parts.model.config)
        self._collator = PromptCollator(
            tokens,
            self._pad_id,
            room,
            vocab_size=parts.vocab_size,
            drops_columns=args.remove_unused_columns,
            progress=not args.disable_tqdm,
        )
        train_dataset = self._collator.fitting("train_dataset", train_dataset)
        eval_dataset = self._collator.fitting("eval_dataset", eval_dataset)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._eval_rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._eval_metrics: dict[str, list[float]] = defaultdict(list)
        self._eval_batches = self._micro_step = 0
        self._micro_of = -1
        self._seconds = 0.0
        self._table: dict[str, Any] | None = None
        self._signals = StopOnSignal()
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), StopOnNonFiniteGradient(), self._signals],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.model_init = model_init  # the library would have called it a second time
        # The loss is the mean over a batch; without this, accumulated steps would be logged and scaled as sums.
        self.model_accepts_loss_kwargs = False
        device = self.accelerator.device
        self._allowed = self._allowed.to(device)
        for objective in self.objectives:
            if isinstance(objective.reward, nn.Module):
                objective.reward.to(device).eval()
        if train_dataset is not None:
            self._check_reward_gradients(train_dataset)

    # ------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch of prompts; also gathers its metrics.

        Raises:
            NonFiniteRewardError: a reward is NaN or infinite; the message names the prompts.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        args, batch = self.args, len(ids)
        when = f"at step {self.state.global_step + 1}, before the optimizer step"
        with _naming_prompts(inputs["prompts"], when), self.accelerator.autocast():
            out = objectives_loss(
                model, self.objectives, ids, mask, max_new_tokens=args.max_completion_length,
                noise=self._training_noise(batch), tau=self.tau, estimator=args.estimator,
                feedback_hops=args.feedback_hops, eps=args.eps, ref_model=self.reference, beta=args.beta,
                eos_token_id=self._end_ids or None, pad_token_id=self._pad_id, columns=inputs["columns"],
                suppress_tokens=self._allowed.suppressed, begin_suppress_tokens=self._allowed.begin_suppressed,
                skip_truncated=args.mask_truncated_completions,
            )  # fmt: skip
        self._note_training(inputs, out)
        return (out.loss, {"completion_ids": out.completion_ids}) if return_outputs else out.loss

    @property
    def tau(self) -> float:
        """The relaxation's temperature at this step."""
        args = self.args
        final = args.tau if args.tau_final is None else args.tau_final
        return tau_at(args.tau_schedule, args.tau, final, self.state.global_step / max(self.state.max_steps, 1))

    def _training_noise(self, batch: int) -> GumbelNoise:
        """Noise of this batch: a seed for the step, and each completion's place among all of the step's.

        So it is the same however the step's batch is spread over processes and accumulation, and after a resume.
        """
        step = self.state.global_step
        self._micro_step = self._micro_step + 1 if self._micro_of == step else 0
        self._micro_of = step
        # By the full size: the last batch of an epoch may be a smaller one, beside full ones in the same step.
        place = (self._micro_step * self.args.world_size + self.args.process_index) * self._train_batch_size
        return GumbelNoise(_mix(self.args.seed, step), self._sequences(place, batch))

    def _evaluation_noise(self, batch: int) -> GumbelNoise:
        """Noise of an evaluation batch: always the same, so that two evaluations differ by the policy alone."""
        place = (self._eval_batches * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        self._eval_batches += 1
        return GumbelNoise(_mix(~self.args.seed, 0), self._sequences(place, batch))

    def _sequences(self, place: int, batch: int) -> torch.Tensor:
        return torch.arange(place, place + batch, device=self.accelerator.device)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Complete a batch of held-out prompts and judge it.

        The prediction is the completions' ids, `[B, max_completion_length]` for every batch, since the library would
        fill shorter ones up with -100, which no tokenizer decodes. The labels are the prompts' ids, -100 where padded.
        """
        inputs = self._prepare_inputs(inputs)
        ids, mask, args = inputs["input_ids"], inputs["attention_mask"], self.args
        with torch.no_grad(), self.accelerator.autocast():
            gather_root(unwrap(model))
            policy = read_language_model(model).allowing(self._allowed)
            sample = rollout(
                policy, ids, mask, max_new_tokens=args.max_completion_length, noise=self._evaluation_noise(len(ids)),
                eos_token_ids=self._end_ids, pad_token_id=self._pad_id, keep_hidden=True,
            )  # fmt: skip
            with _naming_prompts(inputs["prompts"], "in evaluation"):
                values = score_completions(self.objectives, ids, mask, sample, inputs["columns"])
            rewards = weighted_sum(self.objectives, values)
            kl = values.new_zeros(len(ids))
            if self.reference is not None:
                self.reference.check(model, policy, int(mask.sum(dim=1).max()) + args.max_completion_length)
                with self.reference.parts(model) as reference:
                    referred = refer(reference, Layout.of(ids, mask, sample))
                assert sample.hidden is not None
                kl = completion_kl(policy, referred, sample.hidden, sample)
            logprobs = completion_logprobs(policy, sample)
        rows = self._rows(inputs, sample.ids, sample.mask, logprobs, values, rewards, kl, self._eval_metrics, {})
        for name, value in rows.items():
            self._eval_rows[name].append(self.accelerator.gather_for_metrics(value).cpu())
        loss = (args.beta * kl.float() - rows["reward"]).mean()
        if prediction_loss_only:
            return loss, None, None
        missing = args.max_completion_length - sample.ids.shape[1]
        return loss, F.pad(sample.ids, (0, missing), value=self._pad_id), ids.masked_fill(mask == 0, -100)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The library's, with the completions' metrics added."""
        self._eval_rows.clear()
        self._eval_metrics.clear()
        self._eval_batches = 0
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        rows = {name: torch.cat(values) for name, values in self._eval_rows.items()}
        noted = {name: sum(values) / len(values) for name, values in self._eval_metrics.items()}
        metrics = {f"{prefix}_{name}": value for name, value in (noted | self._summary(rows)).items()}
        theirs = output.metrics or {}
        if taken := sorted(theirs.keys() & metrics.keys()):
            raise ValueError(f"compute_metrics must not return metrics that the trainer has itself, got {taken}")
        return output._replace(metrics={**theirs, **metrics})

    # -------------------------------------------------------------------------------------------------------- metrics

    def _rows(
        self, inputs: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor, logprobs: torch.Tensor,
        values: torch.Tensor, rewards: torch.Tensor, kl: torch.Tensor, metrics: dict[str, list[float]],
        shown: dict[str, Sequence[Any]],
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """What is known of each completion of this process, `[B]` each.

        What functions of text log by themselves goes into `metrics` and, as columns of the table, into `shown`.
        """
        lengths = mask.sum(dim=1)
        last = ids.gather(1, (lengths - 1)[:, None])[:, 0]
        ended = torch.isin(last, torch.tensor(self._end_ids, dtype=torch.int64, device=ids.device))
        rows = {
            "reward": rewards,
            "entropy": -logprobs.sum(dim=1) / lengths,
            "completions/length": lengths,
            "completions/clipped_ratio": ~ended,
            "tokens": lengths + inputs["attention_mask"].sum(dim=1),
        }
        if self.reference is not None:
            rows["kl"] = kl
        rows |= {f"rewards/{o.name}": value for o, value in zip(self.objectives, values, strict=True)}
        if self.text_rewards:
            texts = self._texts(ids, mask)
            completions = [
                [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
                for prompt, text in zip(inputs["prompts"], texts, strict=True)
            ]
            scores = self.text_rewards(
                inputs["prompts"], completions, [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)],
                inputs["columns"],
                {
                    "trainer_state": self.state,
                    "log_metric": lambda name, value: metrics[name].append(float(value)),
                    "log_extra": lambda column, values: shown.update({column: list(values)}),
                },
            )  # fmt: skip
            rows |= {f"rewards/{name}": torch.tensor(numbers).to(ids.device) for name, numbers in scores.items()}
        return {name: value.detach().float() for name, value in rows.items()}

    @staticmethod
    def _summary(rows: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics by TRL's names; `kl` is in nats per completion, `entropy` is estimated from the sampled tokens."""
        metrics = {}
        for name, value in rows.items():
            if name.startswith("rewards/"):
                metrics[f"{name}/mean"] = value.nanmean().item()
                known = value[~value.isnan()]
                metrics[f"{name}/std"] = known.std(correction=0).item() if len(known) else float("nan")
            elif name == "completions/length":
                metrics["completions/mean_length"] = value.mean().item()
                metrics["completions/min_length"] = value.min().item()
                metrics["completions/max_length"] = value.max().item()
            elif name != "tokens":
                metrics[name] = value.mean().item()
        if "reward" in rows:
            metrics["reward_std"] = rows["reward"].std(correction=0).item()
        return metrics

    def _note_training(self, inputs: dict[str, Any], out: GradeLoss) -> None:
        shown: dict[str, Sequence[Any]] = {}
        rows = self._rows(
            inputs, out.completion_ids, out.completion_mask, out.logprobs, out.values, out.rewards, out.kl, self._metrics,
            shown,
        )  # fmt: skip
        gathered = {name: self.accelerator.gather(value) for name, value in rows.items()}
        for name, value in self._summary(gathered).items():
            self._metrics[name].append(value)
        self._metrics["tau"].append(self.tau)
        self.state.num_input_tokens_seen += int(gathered["tokens"].sum().item())
        if self.args.log_completions:
            self._table = {"prompts": inputs["prompts"], "sample": out, "rows": rows, "shown": shown}

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: completions are counted with their prompts, once they are there."""

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        return completion_texts(self._tokenizer, ids, mask)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The library's, timed; `step_time` is that of an optimizer step, with all batches that it accumulates."""
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._seconds += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self._metrics["step_time"].append(self._seconds)
            self._seconds = 0.0
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last time to what the library logs of training, and show the completions."""
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            logs["num_tokens"] = self.state.num_input_tokens_seen
            self._metrics.clear()
        super().log(logs, start_time)
        if "loss" in logs and self._table is not None:
            if self.is_world_process_zero():
                self._show_table(**self._table)
            self._table = None

    def _show_table(
        self, prompts: list[Any], sample: GradeLoss, rows: dict[str, torch.Tensor], shown: dict[str, Sequence[Any]]
    ) -> None:
        texts, named = self._texts(sample.completion_ids, sample.completion_mask), [prompt_text(p) for p in prompts]
        kept = [i for i in range(len(named)) if not self.args.log_unique_prompts or named[i] not in named[:i]]
        kept = kept[: self.args.num_completions_to_print]
        columns: dict[str, Sequence[Any]] = {
            name: [value[i].item() for i in kept]
            for name, value in rows.items()
            if name in ("reward", "kl") or "rewards/" in name
        }
        columns |= {name: [values[i] for i in kept] for name, values in shown.items()}
        title = f"Step {self.state.global_step}"
        show_completions(completions_table([named[i] for i in kept], [texts[i] for i in kept], columns, title))

    # ----------------------------------------------------------------------------------------------------- data loading

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = ["prompt", *TEMPLATE_COLUMNS]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The library's, of a data set of its own checked as those of the constructor were."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._collator.fitting("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The library's, of a data set checked as those of the constructor were."""
        return super().get_test_dataloader(self._collator.fitting("test_dataset", test_dataset))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = self.args.shuffle_dataset and self.args.sampling_strategy != "sequential"
        return RepeatedPrompts(len(dataset), self.args.num_generations, seed, shuffle)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The library's, but none where all steps are done: it would take one more of a run resumed at its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    # ------------------------------------------------------------------------------------------ checkpoints and signals

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The library's, with checkpoints that are checked before they are used.

        Args:
            resume_from_checkpoint: a directory, or True for the latest in the output directory; if that one is damaged,
                a warning names it and the one before is used. With `args.allow_partial_checkpoint` it may be one that
                another trainer wrote, or whose optimizer files were removed.
            args: further arguments of the library's.
            kwargs: further keywords of the library's.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT came; the step it came in was finished and saved.
            KeyboardInterrupt: SIGINT came a second time.
            ValueError: no checkpoint to resume from that is sound.
        """
        resume = self._sound_checkpoint(resume_from_checkpoint)
        self._micro_of = -1
        try:
            output = super().train(resume, *args, **kwargs)
        finally:
            self._signals.restore()
        if self._signals.received and self.state.global_step < self.state.max_steps:
            raise TrainingInterrupted(self.state.global_step, self._signals.received)
        return output

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """The library's, with what the constructor does to a policy; the reference is then this one as it comes."""
        policy = _load_policy(super().call_model_init(trial), self.args, self._peft_config)
        self._check_policy(policy, self.args)
        self._set_reference(policy, self.args)
        return policy

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.hp_search_backend is not None and trial is not None:
            self.args._check()  # a trial sets attributes, past the constructor
            self._set_reference(self.model, self.args)  # beta may be another

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        given = self._ref_model_given is not None or self.args.ref_adapter_name is not None
        policy: Any = self.model if model is None else model
        self.reference = reference_record.restore(Path(resume_from_checkpoint), policy, self.reference, given)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        absent = [] if checkpoint is None else checkpoints.absent(Path(checkpoint))
        if absent:
            logger.warning(
                "%s has no %s: the optimizer begins anew, the learning rate goes on at step %d of its schedule",
                checkpoint, " and no ".join(absent), self.state.global_step,
            )  # fmt: skip
            checkpoints.advance(self.lr_scheduler, self.state.global_step)

    def _sound_checkpoint(self, choice: str | bool | None) -> str | None:
        if not choice:
            return None
        partial = self.args.allow_partial_checkpoint
        if choice is not True:
            if wrong := checkpoints.damage(Path(choice), partial):
                raise ValueError(f"{choice} can not be resumed from: {wrong}")
            return str(choice)
        found = checkpoints.complete_checkpoints(Path(str(self.args.output_dir)))
        for path in found:
            wrong = checkpoints.damage(path, partial)
            if wrong is None:
                return str(path)
            logger.warning("%s can not be resumed from: %s; trying the one before", path, wrong)
        names = ", ".join(path.name for path in found) or "none at all"
        raise ValueError(f"No sound checkpoint in {self.args.output_dir} (found {names})")

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return run if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, seal it, then rename it: it is complete or it is not there."""
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run / ".incomplete"
        main = self.args.should_save
        if main:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            staged = self._staging / name
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(run / name)
                if main:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
            # Processes that hold shards put them together.
            values = self.reference.state() if isinstance(self.reference, FrozenCopy) else None
            self.accelerator.wait_for_everyone()
            if main:
                reference_record.write(staged, self.reference, self._reference_digest, values)
                checkpoints.seal(staged)
                checkpoints.settle(staged, run / name)
        finally:
            if main:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if main:
            self._rotate(run)
            self.create_model_card()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint, which goes on in the background, only when it has its name and stays."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _rotate(self, run: Path) -> None:
        """Drop the oldest checkpoints beyond `save_total_limit`, never the best one."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint
        kept = 0
        found = checkpoints.complete_checkpoints(run)
        # By age: the directory may hold later steps of an earlier run.
        for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            if best is not None and Path(best) == path:
                continue
            kept += 1
            if kept > max(limit - (best is not None), 1):
                shutil.rmtree(path, ignore_errors=True)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a model card `README.md` into the output directory.

        Args:
            model_name: default: the output directory's.
            dataset_name: of the prompts.
            tags: in addition to the package's.
            kwargs: ignored; the library's trainer gives more.
        """
        if not self.is_world_process_zero():
            return
        more = [tags] if isinstance(tags, str) else list(tags or [])
        model_card.write(
            Path(str(self.args.output_dir)),
            model_name=model_name or Path(str(self.args.output_dir)).name,
            base_model=getattr(self._policy().model.config, "_name_or_path", "") or None,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *more],
            settings={name: getattr(self.args, name) for name in model_card.SETTINGS},
            rewards=self.reward_names,
        )

    # --------------------------------------------------------------------------------------------------------- checking

    def _check_policy(self, policy: nn.Module, args: GRADEConfig) -> None:
        """Prepare a policy that is to be trained, or ValueError; rewards must have been read."""
        check_checkpointing(policy)
        if args.disable_dropout:
            _switch_off_dropout(policy)
            check_training_mode(policy)
        parts = read_language_model(policy).allowing(self._allowed)
        for objective in self.objectives:
            check_vocabulary(objective, parts, self._pad_id)

    def _set_reference(self, policy: nn.Module, args: GRADEConfig) -> None:
        """Take what the KL compares with: what was given, or this policy as it is now."""
        self.reference = reference_for_training(policy, self._ref_model_given, args.ref_adapter_name, args.beta)
        self.ref_model = None
        self._reference_digest = None
        if self.reference is not None:
            parts = read_language_model(policy).allowing(self._allowed)
            self.reference.check(policy, parts)
        if isinstance(self.reference, OtherModel):
            self._reference_digest = fingerprint(self.reference.model)
            self.ref_model = self.reference.model.to(args.device)

    def _policy(self) -> LanguageModel:
        return read_language_model(self.accelerator.unwrap_model(self.model)).allowing(self._allowed)

    def _check_reward_gradients(self, dataset: Any) -> None:
        """Try every differentiable reward on two prompts, so that what is wrong with it shows before the first step."""
        examples = [example for example, _ in zip(iter(dataset), range(2), strict=False)]
        if not examples:
            return
        inputs: Any = self._prepare_input(self._collator(examples))
        policy: Any = self.model
        ids, mask, time = inputs["input_ids"], inputs["attention_mask"], self.args.max_completion_length
        check_prompts(self._policy(), ids, mask, time)
        if self.reference is not None:
            self.reference.check(policy, self._policy(), int(mask.sum(dim=1).max()) + time)
        # Completions of some token as long as they may become: a reward may have fewer positions than the policy.
        ids, mask = torch.cat([ids, ids[:, -1:].expand(-1, time)], dim=1), F.pad(mask, (0, time), value=1)
        for objective in self.objectives:
            check_reward_device(objective, ids.device)
            with torch.enable_grad(), self.accelerator.autocast():
                embeds = objective.embeds(ids).requires_grad_()
                try:
                    value, _ = objective(embeds.clone(), mask, inputs["columns"])
                except NonFiniteRewardError:
                    continue  # the step that meets it names its prompts
                except (IndexError, RuntimeError) as error:
                    raise ValueError(
                        f"{objective.name} fails on prompts with completions, {ids.shape[1]} tokens: {error}"
                    ) from error
                gradient = None
                if value.requires_grad:
                    (gradient,) = torch.autograd.grad(value.sum(), embeds, allow_unused=True)
            if gradient is None:
                raise ValueError(f"{objective.name} has no gradient: it must be differentiable in inputs_embeds")


# ------------------------------------------------------------------------------------------- reading the constructor's


@contextmanager
def _naming_prompts(prompts: Sequence[Any], when: str) -> Iterator[None]:
    """Adds to the error of a reward that is not finite when it happened, and the prompts."""
    try:
        yield
    except NonFiniteRewardError as error:
        named = [prompt_text(prompts[row]) for row in error.rows]
        raise NonFiniteRewardError(f"{error} {when}; prompts: {named}", error.rows) from error


def _mix(seed: int, step: int) -> int:
    """A 64-bit seed for a step of a run (splitmix64 of both)."""
    z = (seed * 0xD1342543DE82EF95 + (step + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def _named_datasets(dataset: Any) -> list[tuple[str, Any]]:
    if isinstance(dataset, dict):
        return [(f"eval_dataset[{name!r}]", part) for name, part in dataset.items()]
    return [("eval_dataset", dataset)]


def load_by_name(what: str, loader: Any, name: str, **keywords: Any) -> Any:
    """`loader.from_pretrained(name, **keywords)`, with an error that says what was wanted and where it was looked for."""
    try:
        return loader.from_pretrained(name, **keywords)
    except (OSError, ValueError) as error:
        where = "in that directory" if Path(name).is_dir() else "as a directory here or as a name on the hub"
        raise ValueError(f"{what} {name!r} was not found {where}: {error}") from error


def _load_causal(what: str, name: str, args: GRADEConfig, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """A causal language model by name, with `args.model_init_kwargs`, in the given precision unless they say another."""
    given: dict[str, Any] = {**dict(args.model_init_kwargs or {}), **more}  # type: ignore[arg-type]
    if "torch_dtype" not in given:  # its name before transformers 5, which dtype would override
        given.setdefault("dtype", dtype)
    given.setdefault("trust_remote_code", args.trust_remote_code)
    model: nn.Module = load_by_name(what, AutoModelForCausalLM, name, **given)
    return model


def _load_policy(model: Any, args: GRADEConfig, peft_config: Any, quantization_config: Any = None) -> nn.Module:
    keywords: Any = args.model_init_kwargs
    if isinstance(model, str):
        if quantization_config is not None and "quantization_config" in (keywords or {}):
            raise ValueError("quantization_config must be given once: as an argument, or in model_init_kwargs")
        more = {} if quantization_config is None else {"quantization_config": quantization_config}
        # Weights of training are float32 unless asked otherwise, whatever precision they were saved in.
        model = _load_causal("model", model, args, **more)
    elif keywords is not None:
        raise ValueError(f"model_init_kwargs is for a model that is given by name, got a {type(model).__name__}")
    elif quantization_config is not None:
        raise ValueError(f"quantization_config is for a model that is given by name, got a {type(model).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name or a causal language model, got {type(model).__name__}")
    if peft_config is not None:
        if hasattr(model, "peft_config"):
            raise ValueError("peft_config must be None for a model that has an adapter already")
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a PeftConfig, got {type(peft_config).__name__}")
        model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
    return model


def _load_reference(ref_model: Any, args: GRADEConfig, policy: nn.Module) -> nn.Module | Reference | None:
    if ref_model is None or isinstance(ref_model, Reference):
        return ref_model
    if isinstance(ref_model, str):
        return _load_causal("ref_model", ref_model, args, read_language_model(policy).table.dtype)
    if not isinstance(ref_model, nn.Module):
        raise TypeError(
            f"ref_model must be a name, a causal language model or a Reference, got {type(ref_model).__name__}"
        )
    _check_apart(
        "ref_model", ref_model, policy, "the reference is a constant, so it must be a copy (by default it is one)"
    )
    return ref_model


def _end_of_sequence(parts: LanguageModel, tokenizer: Any, without_token: Sequence[int]) -> tuple[int, ...]:
    """Every token that ends a completion, by tokenizer and generation config."""
    own = getattr(tokenizer, "eos_token_id", None)
    more = getattr(getattr(parts.model, "generation_config", None), "eos_token_id", None)
    # A small model of one's own may have kept the end of sequence that is its configuration's default.
    has_token = set(range(parts.vocab_size)).difference(without_token)
    known = [token for token in ([more] if isinstance(more, int) else more or []) if token in has_token]
    return token_ids("eos_token_id", list(dict.fromkeys([*([] if own is None else [own]), *known])), parts.vocab_size)


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates that a module passes on, and the noise of an expert's router
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def _check_apart(
    name: str,
    frozen: nn.Module,
    policy: nn.Module,
    why: str = "a classifier is a constant, so it must be given copies",
) -> None:
    """A model that is frozen has none of the policy's parameters; ValueError with one that it has."""
    own = {id(parameter) for parameter in frozen.parameters()}
    shared = [key for key, parameter in policy.named_parameters() if id(parameter) in own]
    if shared:
        raise ValueError(f"{name} shares {len(shared)} parameters with model, such as {shared[0]!r}: {why}")


def _read_rewards(
    reward_funcs: Any, args: GRADEConfig, policy: nn.Module
) -> tuple[list[Objective], TextRewards, list[str]]:
    """Objectives to differentiate, functions of text to log, and the names of all."""
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not functions:
        raise ValueError("reward_funcs must hold at least one reward, got none")
    weights = args.reward_weights
    if weights is not None and len(weights) != len(functions):
        raise ValueError(f"reward_weights must hold one number per reward ({len(functions)}), got {len(weights)}")
    objectives: list[Objective] = []
    texts: dict[str, Callable[..., Any]] = {}
    names: list[str] = []
    for i, function in enumerate(functions):
        if isinstance(function, str):
            function = load_by_name(
                "reward", AutoModelForSequenceClassification, function, trust_remote_code=args.trust_remote_code
            )
        if isinstance(function, PreTrainedModel) or hasattr(function, "get_base_model"):  # PEFT's wrapper of one
            _check_apart(f"reward_funcs[{i}]", function, policy)
            try:
                function = SequenceClassificationReward(function)
            except (TypeError, ValueError) as error:  # which speaks of its own arguments
                raise type(error)(f"reward_funcs[{i}] as SequenceClassificationReward(model): {error}") from error
        elif isinstance(function, SequenceClassificationReward):
            _check_apart(f"reward_funcs[{i}]", function, policy)
        elif not callable(function):
            raise TypeError(f"reward_funcs[{i}] must be a model, a name or callable, got {type(function).__name__}")
        name = getattr(function, "__name__", type(function).__name__)
        name = name if name not in names else f"{name}_{i}"
        names.append(name)
        weight = None if weights is None else weights[i]
        if getattr(function, "embedding", None) is None:
            if weight:
                raise ValueError(f"reward_weights[{i}] must be 0: {name} is a function of text, which is only logged")
            texts[name] = function
            continue
        reward_table(function, name)
        if args.reward_transform != "probability" and getattr(function, "output", "probability") != "probability":
            raise ValueError(
                f"reward_transform = {args.reward_transform!r} needs a reward that is a probability, but {name} "
                f"returns {function.output!r}"
            )
        objectives.append(Objective(function, 1.0 if weight is None else float(weight), args.reward_transform, name))
    if not objectives:
        raise ValueError(
            f"reward_funcs must hold a differentiable reward (a classifier, or a callable with `embedding`), got only "
            f"functions of text: {names}"
        )
    return objectives, TextRewards(texts), names


def _check_tokenizers(reward_funcs: Any, given: Any, tokenizer: Any, trust_remote_code: bool) -> None:
    """Every token has the same id for the policy and for the rewards, as far as tokenizers tell."""
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if given is None:
        given = [None] * len(functions)
    others = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(others) != len(functions):
        raise ValueError(f"reward_processing_classes must be one per reward ({len(functions)}), got {len(others)}")
    for i, (function, other) in enumerate(zip(functions, others, strict=True)):
        if other is None and isinstance(function, str):
            other = load_by_name(
                "the tokenizer of reward", AutoTokenizer, function, trust_remote_code=trust_remote_code
            )
        if other is not None:
            other = tokenizer_of(other, f"reward_processing_classes[{i}]")
        if other is None or not hasattr(other, "get_vocab") or not hasattr(tokenizer, "get_vocab"):
            continue
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        if ours != theirs:
            differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
            raise ValueError(
                f"reward_funcs[{i}] must share the policy's vocabulary, but {len(differing)} of {len(ours)} tokens "
                f"have other ids or are missing, such as {differing[:3]}"
            )
