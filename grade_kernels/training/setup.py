"""Reading the arguments of `GRADETrainer`: what was given by name is loaded, and what does not fit together is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from grade_kernels.training.allowed_tokens import AllowedTokens, ids_without_token
from grade_kernels.training.config import GRADEConfig
from grade_kernels.training.generation_config import read_generation_config
from grade_kernels.training.model import LanguageModel, check_checkpointing, check_training_mode, read_language_model
from grade_kernels.training.prompt_tokens import Example, tokenizer_of
from grade_kernels.training.prompts import check_prompt_dataset
from grade_kernels.training.records import Ending
from grade_kernels.training.reference import Reference
from grade_kernels.training.rewards import Objective, SequenceClassificationReward, reward_table
from grade_kernels.training.rollout_func import RolloutFunc, check_rollout_func
from grade_kernels.training.text_rewards import TextRewards

if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = [
    "ProcessingClass",
    "PromptData",
    "RewardFunctions",
    "Vocabulary",
    "check_datasets",
    "check_rollouts",
    "check_tokenizers",
    "each_dataset",
    "find_tokenizer",
    "load_by_name",
    "load_policy",
    "load_reference",
    "prepare_policy",
    "read_arguments",
    "read_rewards",
    "read_vocabulary",
]

logger = logging.getLogger(__name__)

PromptData: TypeAlias = "Dataset[Any] | datasets.Dataset | datasets.IterableDataset | Sequence[Example]"
"""Examples with a prompt each."""
ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
RewardFunction: TypeAlias = str | nn.Module | Callable[..., Any]
RewardFunctions: TypeAlias = RewardFunction | Sequence[RewardFunction]


def read_arguments(args: GRADEConfig | None, model: str | nn.Module | None) -> GRADEConfig:
    """The settings, by default those of an output directory that is named after the model."""
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        args = GRADEConfig(output_dir=f"{(name or 'model').rstrip('/').split('/')[-1]}-GRADE")
    if not isinstance(args, GRADEConfig):
        raise TypeError(f"args must be a GRADEConfig, got {type(args).__name__}")
    if args.n_gpu > 1:
        logger.warning("Only one of %d devices is used; start one process for each with torchrun", args.n_gpu)
        args._n_gpu = 1
    if args.torch_compile:
        logger.warning("torch_compile has no effect: replay reads hidden states from inside the model")
    return args


def check_datasets(
    args: GRADEConfig, train_dataset: PromptData | None, eval_dataset: PromptData | dict[str, PromptData] | None
) -> None:
    """Data sets of prompts, or TypeError or ValueError."""
    for name, dataset in each_dataset(train_dataset, eval_dataset).items():
        check_prompt_dataset(name, dataset, args.remove_unused_columns)
    if args.num_generations > 1 and isinstance(train_dataset, IterableDataset):
        raise ValueError("num_generations > 1 needs a train_dataset with a length, got an iterable one")


def each_dataset(train_dataset: object, eval_dataset: object) -> dict[str, Any]:
    """Every data set by what errors call it, None among them."""
    parts = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        parts = {f"eval_dataset[{name!r}]": part for name, part in eval_dataset.items()}
    return {"train_dataset": train_dataset, **parts}


def check_rollouts(args: GRADEConfig, rollout_func: RolloutFunc | None) -> None:
    """A rollout function, or none, and the settings that are for one."""
    defaults = {
        field.name: field.default for field in fields(args) if field.name.startswith("vllm_importance_sampling_")
    }
    changed = [name for name, default in defaults.items() if getattr(args, name) not in (default, False)]
    check_rollout_func(rollout_func, args.estimator, args.temperature, args.importance is not None, changed)


def load_by_name(what: str, loader: Any, name: str, **keywords: Any) -> Any:
    """`loader.from_pretrained(name, **keywords)`, with an error that says what was wanted and where it was looked for."""
    try:
        return loader.from_pretrained(name, **keywords)
    except (OSError, ValueError) as error:
        where = "in that directory" if Path(name).is_dir() else "as a directory here or as a name on the hub"
        raise ValueError(f"{what} {name!r} was not found {where}: {error}") from error


def _load_causal(
    what: str, name: str, args: GRADEConfig, dtype: torch.dtype = torch.float32, **more: object
) -> nn.Module:
    """A causal language model by name, with `args.model_init_kwargs`, in the given precision unless they say another."""
    given: dict[str, Any] = {**dict(args.model_init_kwargs or {}), **more}  # type: ignore[arg-type]
    if "torch_dtype" not in given:  # the name of dtype before transformers 5; a default dtype would override it
        given.setdefault("dtype", dtype)
    given.setdefault("trust_remote_code", args.trust_remote_code)
    model: nn.Module = load_by_name(what, AutoModelForCausalLM, name, **given)
    return model


def load_policy(
    model: str | nn.Module,
    args: GRADEConfig,
    peft_config: PeftConfig | None,
    quantization_config: QuantizationConfigMixin | None = None,
) -> nn.Module:
    """The policy that was given, by name or as it is, in a fresh adapter where one is asked for."""
    keywords = args.model_init_kwargs
    if isinstance(model, str):
        if quantization_config is not None and "quantization_config" in (keywords or {}):
            raise ValueError("quantization_config must be given once: as an argument, or in model_init_kwargs")
        more: dict[str, Any] = {} if quantization_config is None else {"quantization_config": quantization_config}
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
        model = get_peft_model(cast(PreTrainedModel, model), peft_config)
    return model


def load_reference(
    ref_model: str | nn.Module | Reference | None, args: GRADEConfig, policy: nn.Module
) -> nn.Module | Reference | None:
    """The reference that was given, by name or as it is; None where none was."""
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


def find_tokenizer(
    processing_class: ProcessingClass | None, parts: LanguageModel, args: GRADEConfig
) -> ProcessingClass:
    """The tokenizer or processor that was given, by default the one saved with the model."""
    if processing_class is not None:
        return processing_class
    name = parts.model.config._name_or_path
    if not name:
        raise ValueError("processing_class must be the policy's tokenizer: the model has no name to find it by")
    found: ProcessingClass = load_by_name(
        "the tokenizer of model", AutoTokenizer, name, trust_remote_code=args.trust_remote_code
    )
    return found


class Vocabulary(NamedTuple):
    """Which tokens completions are made of, by tokenizer and generation config."""

    allowed: AllowedTokens
    ends: tuple[int, ...]
    pad: int


def read_vocabulary(parts: LanguageModel, tokenizer: object, args: GRADEConfig) -> Vocabulary:
    """What a policy may sample, what ends a completion and what stands behind an end, or ValueError."""
    without_token = ids_without_token(tokenizer, parts.vocab_size)
    config = getattr(parts.model, "generation_config", None)
    allowed = read_generation_config(config, parts.vocab_size, without_token)
    ends = _end_of_sequence(parts, tokenizer, without_token)
    own = getattr(tokenizer, "pad_token_id", None)
    pad = int(own) if own is not None else (ends or (0,))[0]
    Ending(ends, pad, args.max_completion_length).check(parts.vocab_size)
    allowed.check_ends(ends)
    if args.mask_truncated_completions and not ends:
        raise ValueError("mask_truncated_completions needs an end of sequence, but neither tokenizer nor model has one")
    return Vocabulary(allowed, ends, pad)


def _end_of_sequence(parts: LanguageModel, tokenizer: object, without_token: Sequence[int]) -> tuple[int, ...]:
    """Every token that ends a completion, by tokenizer and generation config."""
    own = getattr(tokenizer, "eos_token_id", None)
    more = getattr(getattr(parts.model, "generation_config", None), "eos_token_id", None)
    # A small model that was made with another tokenizer may still have the end of sequence of its configuration's default,
    # which that tokenizer does not have.
    has_token = set(range(parts.vocab_size)).difference(without_token)
    known = [token for token in ([more] if isinstance(more, int) else more or []) if token in has_token]
    return tuple(dict.fromkeys([*([] if own is None else [own]), *known]))


def prepare_policy(policy: nn.Module, args: GRADEConfig) -> None:
    """Dropout off where that is asked for; ValueError for a policy that can not be trained as it is."""
    check_checkpointing(policy)
    if args.disable_dropout:
        _switch_off_dropout(policy)
        check_training_mode(read_language_model(policy))


def _switch_off_dropout(model: nn.Module) -> None:
    """No dropout in any module, as a layer or as a number that a module hands on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates that a module hands to functions, and the jitter of routers
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def read_rewards(
    reward_funcs: RewardFunctions, args: GRADEConfig, policy: nn.Module
) -> tuple[list[Objective], TextRewards, list[str]]:
    """Objectives to differentiate, functions of text to log, and the names of all."""
    functions: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
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
            except (TypeError, ValueError) as error:  # its message speaks of `model`, which is another argument here
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


def check_tokenizers(
    reward_funcs: RewardFunctions,
    given: ProcessingClass | Sequence[ProcessingClass | None] | None,
    tokenizer: object,
    trust_remote_code: bool,
) -> None:
    """Every token has the same id for the policy and for the rewards, as far as tokenizers tell."""
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if given is None:
        given = [None] * len(functions)
    others: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
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
