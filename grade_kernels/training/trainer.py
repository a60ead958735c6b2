"""`GRADETrainer`: align a causal language model by backpropagating a reward through its own samples."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, enable_full_determinism, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput

from grade_kernels.noise import GumbelNoise
from grade_kernels.training import checkpoints, metrics, model_card, reference_record, setup
from grade_kernels.training.aligner import Aligner, GradeLoss, check_vocabulary
from grade_kernels.training.allowed_tokens import AllowedTokens
from grade_kernels.training.callbacks import (
    StopOnNonFiniteGradient,
    StopOnSignal,
    TrainingInterrupted,
    show_completions,
)
from grade_kernels.training.completions import Completions
from grade_kernels.training.config import GRADEConfig
from grade_kernels.training.decoding import completion_texts
from grade_kernels.training.foreign_names import refuse_arguments
from grade_kernels.training.library_arguments import check_library_arguments, checked_metrics
from grade_kernels.training.model import LanguageModel, read_language_model
from grade_kernels.training.noise_plan import NoisePlan
from grade_kernels.training.prompt_tokens import TEMPLATE_COLUMNS, Prompt, PromptTokenizer, prompt_text, tokenizer_of
from grade_kernels.training.prompts import (
    RESERVED,
    PromptBatch,
    PromptCollator,
    RepeatedPrompts,
    column_names,
    room_for,
)
from grade_kernels.training.records import Ending, Prompts, Relaxation
from grade_kernels.training.reference import FrozenCopy, OtherModel, Reference, fingerprint, reference_for_training
from grade_kernels.training.rewards import NonFiniteRewardError, Objective, check_gradient
from grade_kernels.training.rollout_func import RolloutFunc, RolloutRequest, read_answer
from grade_kernels.training.schedules import tau_at
from grade_kernels.training.text_rewards import TextRewards

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch.utils.data import DataLoader
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["GRADETrainer"]

logger = logging.getLogger(__name__)


class GRADETrainer(Trainer):
    """A `transformers.Trainer` whose loss is the reward of sampled completions, differentiated through the samples.

    Example:
        A tiny random model learns to say "good". A model and a classifier of your own may be given by name.

        ```python
        import torch
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

        from grade_kernels.training import GRADEConfig, GRADETrainer

        words = ["<pad>", "<eos>", "the", "film", "was", "good", "bad"]
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


        class Good:  # how often a text says "good": any differentiable function of rows of a table
            embedding = torch.eye(len(words))

            def __call__(self, inputs_embeds, attention_mask, **columns):
                return (inputs_embeds[..., words.index("good")] * attention_mask).sum(dim=1)


        trainer = GRADETrainer(
            model=GPT2LMHeadModel(GPT2Config(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=16)),
            reward_funcs=Good(),
            args=GRADEConfig(output_dir="out", max_steps=20, max_completion_length=6, learning_rate=1e-2, logging_steps=1),
            train_dataset=Dataset.from_dict({"prompt": ["the film", "the film was"] * 8}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>"),
        )
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        assert rewards[-1] > rewards[0]
        ```

    Args:
        model: a causal language model, plain or PEFT's, or the name of one. Tokens that its `generation_config` suppresses
            are never sampled. Of its settings of sampling a warning says that they are not followed; others are refused.
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
        rollout_func: an engine that draws the completions, `rollout_func(prompts, trainer)` with TRL's keys (see
            `grade_kernels.training.rollout_func`), for `ste`, `st` and `reinmax`. Default: the trainer's own rollout.
        others: arguments that transformers' or TRL's trainers have and this one can not: refused, with the reason.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: settings that contradict each other, vocabularies that differ, a reward without gradient, a model
            that can not be replayed exactly, a `generation_config` that can not be followed, or an argument of another
            trainer that would be ignored. All of them before the first step.
    """

    # The library's, with the types that they have here
    args: GRADEConfig
    processing_class: Any
    model_init: Any
    _tag_names: ClassVar[tuple[str, ...]] = ("grade-kernels", "grade")

    # What completions are judged by
    objectives: list[Objective]
    text_rewards: TextRewards
    reward_names: list[str]
    reference: Reference | None
    ref_model: nn.Module | None  # the reference where it is a model of its own
    _reference_digest: str | None  # what such a reference is known again by

    # What prompts and completions are made of
    _tokenizer: Any  # of the processor, where `processing_class` is one
    _collator: PromptCollator
    _allowed: AllowedTokens
    _end_ids: tuple[int, ...]
    _pad_id: int
    _fitting_parts: dict[str, Any]  # what is evaluated by name and was checked already

    # What the constructor was given, for policies that `model_init` makes later
    _peft_config: PeftConfig | None
    _ref_model_given: nn.Module | Reference | None

    # What draws completions, where the trainer does not
    rollout_func: RolloutFunc | None
    _rollout_request: RolloutRequest | None

    # State of a run
    _aligner: Aligner | None
    _training_plan: NoisePlan | None
    _evaluation_plan: NoisePlan | None
    _signals: StopOnSignal
    _staging: Path | None = None  # where a checkpoint is being written

    # What will be logged
    _metrics: metrics.Averages  # of training, since the last log
    _evaluation: metrics.Evaluation
    _seconds: float  # of this optimizer step so far
    _shown: metrics.Shown | None  # the last batch, for the table

    def __init__(
        self,
        model: str | nn.Module | None = None,
        reward_funcs: setup.RewardFunctions | None = None,
        args: GRADEConfig | None = None,
        train_dataset: setup.PromptData | None = None,
        eval_dataset: setup.PromptData | dict[str, setup.PromptData] | None = None,
        processing_class: setup.ProcessingClass | None = None,
        reward_processing_classes: setup.ProcessingClass | Sequence[setup.ProcessingClass | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        *,
        ref_model: str | nn.Module | Reference | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        rollout_func: RolloutFunc | None = None,
        **others: object,
    ) -> None:
        refuse_arguments(type(self).__name__, others)
        args = setup.read_arguments(args, model)
        setup.check_datasets(args, train_dataset, eval_dataset)
        setup.check_rollouts(args, rollout_func)
        self.rollout_func, self._rollout_request = rollout_func, None
        check_library_arguments(
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            model_init=model_init,
        )
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
        policy = setup.load_policy(model, args, peft_config, quantization_config)
        parts = read_language_model(policy)
        processing_class = setup.find_tokenizer(processing_class, parts, args)
        self._tokenizer = tokenizer_of(processing_class)
        self._allowed, self._end_ids, self._pad_id = setup.read_vocabulary(parts, self._tokenizer, args)
        self.objectives, self.text_rewards, self.reward_names = setup.read_rewards(reward_funcs, args, policy)
        if train_dataset is not None and not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ValueError(
                "model must have a parameter that requires a gradient, but all are frozen (load PEFT's with "
                "is_trainable=True)"
            )
        self._check_policy(policy, args)
        setup.check_tokenizers(reward_funcs, reward_processing_classes, self._tokenizer, args.trust_remote_code)
        self._ref_model_given = setup.load_reference(ref_model, args, policy)
        self._set_reference(policy, args)

        self._collator = PromptCollator(
            PromptTokenizer(processing_class, self._end_ids, args.chat_template_kwargs, parts.model.config),
            self._pad_id,
            room_for(parts.model.config, self.objectives, args, self.ref_model),
            vocab_size=parts.vocab_size,
            tables=self._tables(),
            drops_columns=args.remove_unused_columns,
            progress=not args.disable_tqdm,
        )
        for dataset in setup.each_dataset(train_dataset, eval_dataset).values():
            # An engine may add columns of its own, so that no column can be said to be missing.
            columns = None if rollout_func is not None else column_names(dataset)
            self.text_rewards.check_columns(() if args.remove_unused_columns else columns)
        train_dataset = self._collator.fitting("train_dataset", train_dataset)
        eval_dataset = self._collator.fitting("eval_dataset", eval_dataset)
        self._fitting_parts = {}
        self._aligner = self._training_plan = self._evaluation_plan = None
        self._signals = StopOnSignal()
        self._metrics, self._evaluation = metrics.Averages(), metrics.Evaluation()
        self._seconds, self._shown = 0.0, None
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._collator,  # type: ignore[arg-type]  # a TypedDict is no dict to mypy
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=checked_metrics(compute_metrics, by_batch=args.batch_eval_metrics),
            callbacks=[*(callbacks or []), StopOnNonFiniteGradient(), self._signals],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        # Set only now: the library's constructor would have called it a second time.
        self.model_init = model_init
        # The loss is the mean over a batch. The library takes the losses of models that know the number of items for sums,
        # and would log and scale those of accumulated steps as such.
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
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one batch of prompts; also gathers its metrics.

        Raises:
            NonFiniteRewardError: a reward is NaN or infinite; the message names the prompts.
        """
        args, prompts = self.args, Prompts(inputs["input_ids"], inputs["attention_mask"])
        relaxation = Relaxation(self.tau, args.estimator, args.feedback_hops, args.eps)
        when = f"at step {self.state.global_step + 1}, before the optimizer step"
        with _naming_prompts(inputs["prompts"], when), self.accelerator.autocast():
            aligner, noise = self._aligner_of(model), self._training_noise(len(prompts))
            batch, completions = self._drawn(aligner, inputs, prompts, noise, training=True)  # type: ignore[arg-type]
            importance = None if completions is None else args.importance
            out = aligner.loss(prompts, noise, relaxation, batch["columns"], completions, importance)
        self._note_training(batch, out)
        return (out.loss, {"completion_ids": out.completion_ids}) if return_outputs else out.loss

    @property
    def rollout_request(self) -> RolloutRequest:
        """What a rollout function is asked for; only while it is asked."""
        if self._rollout_request is None:
            raise RuntimeError("rollout_request is there only while the trainer calls its rollout_func")
        return self._rollout_request

    def _drawn(
        self, aligner: Aligner, batch: PromptBatch, prompts: Prompts, noise: GumbelNoise, *, training: bool
    ) -> tuple[PromptBatch, Completions | None]:
        """The completions that the rollout function draws, and the batch with its columns; None without such a function."""
        if self.rollout_func is None:
            return batch, None
        self._rollout_request = request = RolloutRequest.of(
            prompts, noise, aligner.ending, temperature=self.args.temperature, allowed=self._allowed,
            step=self.state.global_step, training=training, model=aligner.policy.model,
        )  # fmt: skip
        try:
            answer = self.rollout_func(copy.deepcopy(batch["prompts"]), self)
        finally:
            self._rollout_request = None
        needs = training and self.args.importance is not None
        read = read_answer(
            answer, request, aligner.policy.vocab_size, needs_logprobs=needs, taken=[*RESERVED, *batch["columns"]]
        )
        if self.args.remove_unused_columns:
            return batch, read.completions
        return {**batch, "columns": batch["columns"] | read.columns}, read.completions

    @property
    def tau(self) -> float:
        """The relaxation's temperature at this step."""
        args = self.args
        final = args.tau if args.tau_final is None else args.tau_final
        return tau_at(args.tau_schedule, args.tau, final, self.state.global_step / max(self.state.max_steps, 1))

    @property
    def _ending(self) -> Ending:
        return Ending(self._end_ids, self._pad_id, self.args.max_completion_length)

    def _aligner_of(self, model: nn.Module) -> Aligner:
        """The aligner of a model, which reads and checks it anew only where something has changed since the last call."""
        args, old = self.args, self._aligner
        if (
            old is None
            or old.policy.whole is not model
            or old.policy.allowed is not self._allowed
            or (old.ending, old.skip_truncated) != (self._ending, args.mask_truncated_completions)
            or (old.criterion.reference, old.criterion.beta) != (self.reference, args.beta)
            or any(used is not own for used, own in zip_longest(old.criterion.objectives, self.objectives))
        ):
            self._aligner = Aligner(
                self._policy(model), self.objectives, self._ending,
                self.reference, args.beta, skip_truncated=args.mask_truncated_completions,
            )  # fmt: skip
        assert self._aligner is not None
        return self._aligner

    def _training_noise(self, batch: int) -> GumbelNoise:
        """Noise of the next batch of this step, `batch` completions."""
        args = self.args
        # The library may have made the batch smaller than it was asked to be (`auto_find_batch_size`).
        plan = NoisePlan(args.seed, self._train_batch_size, args.world_size)
        if self._training_plan != plan:
            self._training_plan = plan
        return self._training_plan.of(self.state.global_step, args.process_index, batch)

    def _evaluation_noise(self, batch: int) -> GumbelNoise:
        """Noise of an evaluation batch: always the same, so that two evaluations differ by the policy alone."""
        args = self.args
        if self._evaluation_plan is None:
            self._evaluation_plan = NoisePlan(~args.seed, args.eval_batch_size, args.world_size)
        return self._evaluation_plan.of(0, args.process_index, batch)

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
        batch: PromptBatch = self._prepare_inputs(inputs)  # type: ignore[assignment]
        prompts = Prompts(batch["input_ids"], batch["attention_mask"])
        with _naming_prompts(batch["prompts"], "in evaluation"), torch.no_grad(), self.accelerator.autocast():
            aligner, noise = self._aligner_of(model), self._evaluation_noise(len(prompts))
            batch, completions = self._drawn(aligner, batch, prompts, noise, training=False)
            out = aligner.evaluate(prompts, noise, batch["columns"], completions)
        rows = self._rows(batch, out, self._evaluation.averages, {})
        for name, value in rows.items():
            self._evaluation.rows[name].append(self.accelerator.gather_for_metrics(value).cpu())
        if prediction_loss_only:
            return out.loss, None, None
        missing = self.args.max_completion_length - out.completion_ids.shape[1]
        predictions = F.pad(out.completion_ids, (0, missing), value=self._pad_id)
        return out.loss, predictions, prompts.ids.masked_fill(prompts.mask == 0, -100)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The library's, with the completions' metrics added."""
        self._evaluation, self._evaluation_plan = metrics.Evaluation(), None
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        found = {f"{prefix}_{name}": value for name, value in self._evaluation.metrics().items()}
        theirs = output.metrics or {}
        if taken := sorted(theirs.keys() & found.keys()):
            raise ValueError(f"compute_metrics must not return metrics that the trainer has itself, got {taken}")
        return output._replace(metrics={**theirs, **found})

    # -------------------------------------------------------------------------------------------------------- metrics

    def _rows(
        self,
        batch: PromptBatch,
        out: GradeLoss,
        averages: metrics.Averages,
        columns: dict[str, Sequence[object]],
    ) -> metrics.Rows:
        """What is known of each completion of this process; see `metrics.text_rows` for the last two arguments."""
        rows = metrics.completion_rows(batch, out, self._ending, self.objectives, with_kl=self.reference is not None)
        if self.text_rewards:
            rows |= metrics.text_rows(
                self.text_rewards, batch, out, self._texts(out), state=self.state, averages=averages, columns=columns
            )
        return rows

    def _note_training(self, inputs: PromptBatch, out: GradeLoss) -> None:
        columns: dict[str, Sequence[object]] = {}
        rows = self._rows(inputs, out, self._metrics, columns)
        gathered = {name: self.accelerator.gather(value) for name, value in rows.items()}
        for name, value in metrics.summary(gathered).items():
            self._metrics.add(name, value)
        self._metrics.add("tau", self.tau)
        self.state.num_input_tokens_seen += int(gathered["tokens"].sum().item())
        if self.args.log_completions:
            self._shown = metrics.Shown(inputs["prompts"], out, rows, columns)

    def _track_num_input_tokens(self, inputs: object) -> None:
        """Nothing: completions are counted with their prompts, once they are there."""

    def _texts(self, out: GradeLoss) -> list[str]:
        return completion_texts(self._tokenizer, out.completion_ids, out.completion_mask)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The library's, timed; `step_time` is that of an optimizer step, with all batches that it accumulates."""
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self._seconds += time.perf_counter() - start
        if self.accelerator.sync_gradients:
            self._metrics.add("step_time", self._seconds)
            self._seconds = 0.0
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last time to what the library logs of training, and show the completions."""
        if "loss" in logs:
            logs = {**logs, **self._metrics.means()}
            logs["num_tokens"] = self.state.num_input_tokens_seen
            self._metrics.clear()
        super().log(logs, start_time)
        if "loss" in logs and self._shown is not None:
            if self.is_world_process_zero():
                table = metrics.shown_table(
                    self._shown, self._texts(self._shown.out), f"Step {self.state.global_step}",
                    unique=self.args.log_unique_prompts, most=self.args.num_completions_to_print,
                )  # fmt: skip
                show_completions(table)
            self._shown = None

    # ----------------------------------------------------------------------------------------------------- data loading

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = ["prompt", *TEMPLATE_COLUMNS]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The library's; of several data sets by name each is checked under its name, and all before the first is used."""
        if not isinstance(eval_dataset, dict):
            return super().evaluate(eval_dataset, *args, **kwargs)
        self._fitting_parts = self._collator.fitting("eval_dataset", eval_dataset)
        try:
            return super().evaluate(self._fitting_parts, *args, **kwargs)
        finally:
            self._fitting_parts = {}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The library's, of a data set of its own checked as those of the constructor were."""
        fitting = any(eval_dataset is part for part in self._fitting_parts.values())
        if eval_dataset is not None and not isinstance(eval_dataset, str) and not fitting:
            eval_dataset = self._collator.fitting("eval_dataset", eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: object) -> DataLoader[Any]:
        """The library's, of a data set checked as those of the constructor were."""
        return super().get_test_dataloader(self._collator.fitting("test_dataset", test_dataset))

    def _get_train_sampler(self, train_dataset: object = None) -> RepeatedPrompts | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = self.args.shuffle_dataset and self.args.sampling_strategy != "sequential"
        return RepeatedPrompts(len(dataset), self.args.num_generations, seed, shuffle)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The library's, and no batches once all steps are done.

        Of a run that is resumed at its end, the library takes one step before it asks whether any is left. This can go when
        it asks before.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    # ------------------------------------------------------------------------------------------ checkpoints and signals

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
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
        resume = checkpoints.sound(
            resume_from_checkpoint,
            Path(str(self.args.output_dir)),
            allow_partial=self.args.allow_partial_checkpoint,
        )
        self._training_plan = None
        try:
            output = super().train(resume, *args, **kwargs)
        finally:
            self._signals.restore()
        if self._signals.received and self.state.global_step < self.state.max_steps:
            raise TrainingInterrupted(self.state.global_step, self._signals.received)
        return output

    def call_model_init(self, trial: object = None) -> nn.Module:
        """The library's, with what the constructor does to a policy; the reference is then this one as it comes."""
        self._aligner = None  # which would keep the last policy in memory
        policy = setup.load_policy(super().call_model_init(trial), self.args, self._peft_config)
        self._check_policy(policy, self.args)
        self._set_reference(policy, self.args)
        return policy

    def _hp_search_setup(self, trial: object) -> None:
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
        if checkpoint is not None and not checkpoints.is_sealed(Path(checkpoint)):
            # The library goes on with the logging_steps, eval_steps and save_steps of the run that wrote the checkpoint,
            # which was another trainer's.
            self.state.compute_steps(self.args, self.state.max_steps)
        absent = [] if checkpoint is None else checkpoints.absent(Path(checkpoint))
        if absent:
            logger.warning(
                "%s has no %s: the optimizer begins anew, the learning rate goes on at step %d of its schedule",
                checkpoint, " and no ".join(absent), self.state.global_step,
            )  # fmt: skip
            checkpoints.advance(self.lr_scheduler, self.state.global_step)

    def _get_output_dir(self, trial: object) -> str:
        run = super()._get_output_dir(trial)
        return run if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, seal it, then rename it: it is complete or it is not there."""
        run, main = Path(super()._get_output_dir(trial)), self.args.should_save
        place = run / f"checkpoint-{self.state.global_step}"
        try:
            with checkpoints.staging(run, writes=main) as self._staging:
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                staged = self._staging / place.name
                if self.state.best_model_checkpoint == str(staged):
                    self.state.best_model_checkpoint = str(place)
                    if main:
                        self.state.save_to_json(str(staged / "trainer_state.json"))
                # Each process may hold a shard of the values, so all of them put these together.
                values = self.reference.state() if isinstance(self.reference, FrozenCopy) else None
                self.accelerator.wait_for_everyone()
                if main:
                    reference_record.write(staged, self.reference, self._reference_digest, values)
                    checkpoints.seal(staged)
                    checkpoints.settle(staged, place)
        finally:
            self._staging = None
        if main:
            checkpoints.rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
            self.create_model_card()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint once it has its name.

        The library uploads at the end of `_save_checkpoint`, in the background. The folder would be renamed meanwhile.
        """
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
        **kwargs: object,
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
            base_model=getattr(
                self._policy(self.accelerator.unwrap_model(self.model)).model.config, "_name_or_path", ""
            )
            or None,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *more],
            settings={name: getattr(self.args, name) for name in model_card.SETTINGS},
            rewards=self.reward_names,
        )

    # --------------------------------------------------------------------------------------------------------- checking

    def _policy(self, model: nn.Module) -> LanguageModel:
        return read_language_model(model).allowing(self._allowed)

    def _check_policy(self, policy: nn.Module, args: GRADEConfig) -> None:
        """Prepare a policy that is to be trained, or ValueError; rewards must have been read."""
        setup.prepare_policy(policy, args)
        parts = self._policy(policy)
        for objective in self.objectives:
            check_vocabulary(objective, parts, self._pad_id)

    def _set_reference(self, policy: nn.Module, args: GRADEConfig) -> None:
        """Take what the KL compares with: what was given, or this policy as it is now."""
        self.reference = reference_for_training(policy, self._ref_model_given, args.ref_adapter_name, args.beta)
        self.ref_model = self._reference_digest = None
        if self.reference is not None:
            self.reference.check(policy, self._policy(policy))
        if isinstance(self.reference, OtherModel):
            self._reference_digest = fingerprint(self.reference.model)
            self.ref_model = self.reference.model.to(args.device)

    def _tables(self) -> dict[str, int]:
        """How many tokens every reward has, and the reference where it is a model of its own."""
        tables = {objective.name: len(objective.table) for objective in self.objectives}
        if self.ref_model is not None:
            tables["ref_model"] = len(read_language_model(self.ref_model, name="ref_model").table)
        return tables

    def _check_reward_gradients(self, dataset: Any) -> None:
        """Try every differentiable reward on two prompts, so that what is wrong with it shows before the first step."""
        examples = [example for example, _ in zip(iter(dataset), range(2), strict=False)]
        if not examples:
            return
        policy: Any = self.model
        batch: PromptBatch = self._prepare_input(self._collator(examples))  # type: ignore[assignment]
        prompts = Prompts(batch["input_ids"], batch["attention_mask"])
        self._aligner_of(policy).check_prompts(prompts)
        for objective in self.objectives:
            with torch.enable_grad(), self.accelerator.autocast():
                check_gradient(objective, prompts, self.args.max_completion_length, batch["columns"])


@contextmanager
def _naming_prompts(prompts: Sequence[Prompt], when: str) -> Iterator[None]:
    """Adds to the error of a reward that is not finite when it happened, and the prompts."""
    try:
        yield
    except NonFiniteRewardError as error:
        named = [prompt_text(prompts[row]) for row in error.rows]
        raise NonFiniteRewardError(f"{error} {when}; prompts: {named}", error.rows) from error
