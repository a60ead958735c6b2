"""`GRADETrainer`: align a causal language model by backpropagating a reward through its own samples."""

from __future__ import annotations

import copy
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
)
from transformers.trainer_utils import EvalLoopOutput

from grade_kernels.noise import GumbelNoise
from grade_kernels.training import checkpoints, model_card
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
from grade_kernels.training.loss import (
    GradeLoss,
    check_prompts,
    check_reward_device,
    check_vocabulary,
    objectives_loss,
    reference_of,
    token_ids,
)
from grade_kernels.training.policy import (
    LanguageModel,
    check_adapter_reference,
    check_checkpointing,
    check_training_mode,
    gather_root,
    read_language_model,
    some_states,
    unwrap,
)
from grade_kernels.training.prompts import (
    PromptCollator,
    RepeatedPrompts,
    check_prompt_dataset,
    is_conversation,
    prompt_text,
)
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
            which is logged and not optimised; in conversations a completion is a list of one message. At least one must
            be differentiable. Columns are the data set's, as lists.
        args: settings. Default: `GRADEConfig` with an output directory named after the model.
        train_dataset: with a column `prompt`, strings or lists of messages.
        eval_dataset: the same, or a dict of such.
        processing_class: the policy's tokenizer. Default: the one saved with the model. Ids that none of its tokens has
            are never sampled.
        reward_processing_classes: a reward's tokenizer, or one per reward (None where there is none), to check that it
            gives every token the same id.
        callbacks: in addition to the library's.
        optimizers: optimizer and scheduler. Default: as `args` says.
        peft_config: wraps the model in a fresh adapter; the reference is then the model without it.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: settings that contradict each other, vocabularies that differ, a reward without gradient, or a model
            that can not be replayed exactly. All of them before the first step.
    """

    args: GRADEConfig
    processing_class: Any
    _tag_names = ("grade-kernels", "grade")
    _staging: Path | None = None  # where a checkpoint is being written

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any,
        args: GRADEConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
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
            check_prompt_dataset(name, dataset)
        if args.num_generations > 1 and isinstance(train_dataset, torch.utils.data.IterableDataset):
            raise ValueError("num_generations > 1 needs a train_dataset with a length, got an iterable one")
        policy = _load_policy(model, args, peft_config)
        parts = read_language_model(policy)
        limit = getattr(parts.model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and 0 < limit <= args.max_completion_length:
            raise ValueError(
                f"max_completion_length = {args.max_completion_length} leaves no room for a prompt in the model's {limit} "
                "positions"
            )
        if processing_class is None:
            name = parts.model.config._name_or_path
            if not name:
                raise ValueError("processing_class must be the policy's tokenizer: the model has no name to find it by")
            processing_class = load_by_name("the tokenizer of model", AutoTokenizer, name)
        if not callable(processing_class):
            raise TypeError(f"processing_class must be a tokenizer, got {type(processing_class).__name__}")
        without_token = ids_without_token(processing_class, parts.vocab_size)
        config = getattr(parts.model, "generation_config", None)
        self._allowed = read_generation_config(config, parts.vocab_size, without_token)
        self._end_ids = _end_of_sequence(parts, processing_class, without_token)
        self._allowed.check_ends(self._end_ids)
        pad = getattr(processing_class, "pad_token_id", None)
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
        check_checkpointing(policy)
        if args.disable_dropout:
            _switch_off_dropout(policy)
            check_training_mode(policy)
        for objective in self.objectives:
            check_vocabulary(objective, parts.allowing(self._allowed), self._pad_id)
        _check_tokenizers(reward_funcs, reward_processing_classes, processing_class)
        self.ref_model = None
        if args.beta > 0.0 and hasattr(policy, "disable_adapter"):
            check_adapter_reference(policy)
        elif args.beta > 0.0:
            self.ref_model = copy.deepcopy(policy).eval().requires_grad_(False)

        self._collator = PromptCollator(processing_class, self._pad_id)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._eval_rows: dict[str, list[torch.Tensor]] = defaultdict(list)
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
            callbacks=[*(callbacks or []), StopOnNonFiniteGradient(), self._signals],
            optimizers=optimizers,
        )
        # The loss is the mean over a batch; without this, accumulated steps would be logged and scaled as sums.
        self.model_accepts_loss_kwargs = False
        device = self.accelerator.device
        self._allowed = self._allowed.to(device)
        for objective in self.objectives:
            if isinstance(objective.reward, nn.Module):
                objective.reward.to(device).eval()
        if self.ref_model is not None:
            self.ref_model.to(device)
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
                feedback_hops=args.feedback_hops, eps=args.eps, ref_model=self.ref_model, beta=args.beta,
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
        fill shorter ones up with -100, which no tokenizer decodes.
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
            if args.beta > 0.0:
                with reference_of(model, self.ref_model) as reference:
                    referred = refer(reference, Layout.of(ids, mask, sample))
                assert sample.hidden is not None
                kl = completion_kl(policy, referred, sample.hidden, sample)
            logprobs = completion_logprobs(policy, sample)
        rows = self._rows(inputs, sample.ids, sample.mask, logprobs, values, rewards, kl)
        for name, value in rows.items():
            self._eval_rows[name].append(self.accelerator.gather_for_metrics(value).cpu())
        loss = (args.beta * kl.float() - rows["reward"]).mean()
        missing = args.max_completion_length - sample.ids.shape[1]
        return loss, None if prediction_loss_only else F.pad(sample.ids, (0, missing), value=self._pad_id), None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The library's, with the completions' metrics added."""
        self._eval_rows.clear()
        self._eval_batches = 0
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        rows = {name: torch.cat(values) for name, values in self._eval_rows.items()}
        metrics = {f"{prefix}_{name}": value for name, value in self._summary(rows).items()}
        return output._replace(metrics={**(output.metrics or {}), **metrics})

    # -------------------------------------------------------------------------------------------------------- metrics

    def _rows(
        self, inputs: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor, logprobs: torch.Tensor,
        values: torch.Tensor, rewards: torch.Tensor, kl: torch.Tensor,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """What is known of each completion of this process, `[B]` each."""
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
        if self.args.beta > 0.0:
            rows["kl"] = kl
        rows |= {f"rewards/{o.name}": value for o, value in zip(self.objectives, values, strict=True)}
        if self.text_rewards:
            texts = self._texts(ids, mask)
            completions = [
                [{"role": "assistant", "content": text}] if is_conversation(prompt) else text
                for prompt, text in zip(inputs["prompts"], texts, strict=True)
            ]
            for name, function in self.text_rewards.items():
                scores = function(
                    prompts=inputs["prompts"],
                    completions=completions,
                    completion_ids=[row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)],
                    **inputs["columns"],
                )
                count = len(scores) if hasattr(scores, "__len__") else type(scores).__name__
                if count != len(texts):
                    raise ValueError(f"{name} must return one number per completion ({len(texts)}), got {count}")
                rows[f"rewards/{name}"] = torch.tensor([torch.nan if s is None else float(s) for s in scores]).to(
                    ids.device
                )
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
        rows = self._rows(
            inputs, out.completion_ids, out.completion_mask, out.logprobs, out.values, out.rewards, out.kl
        )
        gathered = {name: self.accelerator.gather(value) for name, value in rows.items()}
        for name, value in self._summary(gathered).items():
            self._metrics[name].append(value)
        self._metrics["tau"].append(self.tau)
        self.state.num_input_tokens_seen += int(gathered["tokens"].sum().item())
        if self.args.log_completions:
            self._table = {"prompts": inputs["prompts"], "sample": out, "rows": rows}

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: completions are counted with their prompts, once they are there."""

    def _texts(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        return completion_texts(self.processing_class, ids, mask)

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

    def _show_table(self, prompts: list[Any], sample: GradeLoss, rows: dict[str, torch.Tensor]) -> None:
        count = len(prompts) if self.args.num_completions_to_print is None else self.args.num_completions_to_print
        texts = self._texts(sample.completion_ids, sample.completion_mask)
        numbers: dict[str, Sequence[float]] = {
            name: value[:count].tolist()
            for name, value in rows.items()
            if name in ("reward", "kl") or "rewards/" in name
        }
        title = f"Step {self.state.global_step}"
        show_completions(completions_table([prompt_text(p) for p in prompts[:count]], texts[:count], numbers, title))

    # ----------------------------------------------------------------------------------------------------- data loading

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns: Any = ["prompt"]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shuffle = self.args.sampling_strategy != "sequential"
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
                a warning names it and the one before is used.
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

    def _sound_checkpoint(self, choice: str | bool | None) -> str | None:
        if not choice:
            return None
        if choice is not True:
            if wrong := checkpoints.damage(Path(choice)):
                raise ValueError(f"{choice} can not be resumed from: {wrong}")
            return str(choice)
        found = checkpoints.complete_checkpoints(Path(str(self.args.output_dir)))
        for path in found:
            wrong = checkpoints.damage(path)
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
            self.accelerator.wait_for_everyone()
            if main:
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

    def _policy(self) -> LanguageModel:
        return read_language_model(self.accelerator.unwrap_model(self.model))

    def _check_reward_gradients(self, dataset: Any) -> None:
        """Try every differentiable reward on two prompts, so that what is wrong with it shows before the first step."""
        examples = [example for example, _ in zip(iter(dataset), range(2), strict=False)]
        if not examples:
            return
        inputs: Any = self._prepare_input(self._collator(examples))
        ids, mask, time = inputs["input_ids"], inputs["attention_mask"], self.args.max_completion_length
        check_prompts(self._policy(), ids, mask, time)
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


def _load_policy(model: Any, args: GRADEConfig, peft_config: Any) -> nn.Module:
    keywords: Any = args.model_init_kwargs
    if isinstance(model, str):
        given = dict(keywords or {})
        if "torch_dtype" not in given:  # its name before transformers 5, which dtype would override
            # Weights of training are float32 unless asked otherwise, whatever precision they were saved in.
            given.setdefault("dtype", torch.float32)
        model = load_by_name("model", AutoModelForCausalLM, model, **given)
    elif keywords is not None:
        raise ValueError(f"model_init_kwargs is for a model that is given by name, got a {type(model).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a name or a causal language model, got {type(model).__name__}")
    if peft_config is not None:
        if hasattr(model, "peft_config"):
            raise ValueError("peft_config must be None for a model that has an adapter already")
        from peft import PeftConfig, get_peft_model

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a PeftConfig, got {type(peft_config).__name__}")
        before = some_states(model) if args.beta > 0.0 else None
        model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        if args.beta > 0.0:
            check_adapter_reference(model, before)
    return model


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


def _check_apart(name: str, reward: nn.Module, policy: nn.Module) -> None:
    """A classifier, which is frozen, has none of the policy's parameters; ValueError with one that it has."""
    own = {id(parameter) for parameter in reward.parameters()}
    shared = [key for key, parameter in policy.named_parameters() if id(parameter) in own]
    if shared:
        raise ValueError(
            f"{name} shares {len(shared)} parameters with model, such as {shared[0]!r}: a classifier is a constant, so it "
            "must be given copies"
        )


def _read_rewards(
    reward_funcs: Any, args: GRADEConfig, policy: nn.Module
) -> tuple[list[Objective], dict[str, Callable[..., Sequence[float]]], list[str]]:
    """Objectives to differentiate, functions of text to log, and the names of all."""
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not functions:
        raise ValueError("reward_funcs must hold at least one reward, got none")
    weights = args.reward_weights
    if weights is not None and len(weights) != len(functions):
        raise ValueError(f"reward_weights must hold one number per reward ({len(functions)}), got {len(weights)}")
    objectives: list[Objective] = []
    texts: dict[str, Callable[..., Sequence[float]]] = {}
    names: list[str] = []
    for i, function in enumerate(functions):
        if isinstance(function, str):
            function = load_by_name("reward", AutoModelForSequenceClassification, function)
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
    return objectives, texts, names


def _check_tokenizers(reward_funcs: Any, given: Any, tokenizer: Any) -> None:
    """Every token has the same id for the policy and for the rewards, as far as tokenizers tell."""
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if given is None:
        given = [None] * len(functions)
    others = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(others) != len(functions):
        raise ValueError(f"reward_processing_classes must be one per reward ({len(functions)}), got {len(others)}")
    for i, (function, other) in enumerate(zip(functions, others, strict=True)):
        if other is None and isinstance(function, str):
            other = load_by_name("the tokenizer of reward", AutoTokenizer, function)
        if other is None or not hasattr(other, "get_vocab") or not hasattr(tokenizer, "get_vocab"):
            continue
        ours, theirs = tokenizer.get_vocab(), other.get_vocab()
        if ours != theirs:
            differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
            raise ValueError(
                f"reward_funcs[{i}] must share the policy's vocabulary, but {len(differing)} of {len(ours)} tokens "
                f"have other ids or are missing, such as {differing[:3]}"
            )
