"""Arguments and settings of transformers' and TRL's trainers that have no meaning here, each with the reason.

Whoever comes from `GRPOTrainer` or `RLOOTrainer` passes them by habit. In Python a value that asks for nothing
(`use_vllm=False`, `temperature=1.0`) is taken without a word; any other one is refused, since it would be ignored. The
command line knows none of the names, and says why. docs/training.md has the same as a table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "ARGUMENTS",
    "PREFIXES",
    "SETTINGS",
    "reason_for_argument",
    "reason_for_setting",
    "refuse_arguments",
    "refusing_foreign_settings",
]

T = TypeVar("T", bound=type)

_OWN_DISTRIBUTION = "completions are drawn from the model's own distribution, which is the one that is differentiated"
_NO_RATIO = (
    "there is no policy gradient: the reward is differentiated through the samples, so no ratio is clipped and no "
    "advantage is scaled"
)
_ONE_USE = "every step draws its own completions, since the gradient runs through how they were drawn"
_ENGINE = "an engine is a rollout function: GRADETrainer(rollout_func=...), see grade_kernels.training.engines"
_ENTROPY = "no bonus for entropy is added to the loss; beta holds the policy to its reference"
_REFERENCE = "the reference stays what it is when training begins"
_TOOLS = "a completion is one answer of the model: what a tool returns has no gradient"


class Foreign(NamedTuple):
    """A name that is refused: why, and values that ask for nothing."""

    reason: str
    harmless: tuple[Any, ...] = (None,)


ARGUMENTS: dict[str, Foreign] = {
    "data_collator": Foreign(
        "the trainer makes batches itself, since it must know each completion's prompt, padding and noise; columns of the "
        "data set reach the rewards"
    ),
    "compute_loss_func": Foreign(
        "the loss is the reward of sampled completions, not a function of logits and labels; give it as reward_funcs"
    ),
    "preprocess_logits_for_metrics": Foreign(
        "logits of the whole vocabulary never exist; compute_metrics gets the completions' ids"
    ),
    "tools": Foreign(_TOOLS),
    "environment_factory": Foreign(_TOOLS),
    "tokenizer": Foreign("it is called processing_class, as in transformers 5"),
    "ref_adapter_name": Foreign("it is a setting: GRADEConfig(ref_adapter_name=...)"),
}

SETTINGS: dict[str, Foreign] = {
    "top_p": Foreign(_OWN_DISTRIBUTION, (None, 1.0)),
    "top_k": Foreign(_OWN_DISTRIBUTION, (None, 0, -1)),
    "min_p": Foreign(_OWN_DISTRIBUTION, (None, 0.0)),
    "repetition_penalty": Foreign(_OWN_DISTRIBUTION, (None, 1.0)),
    "generation_kwargs": Foreign(_OWN_DISTRIBUTION, (None, {})),
    "cache_implementation": Foreign("the rollout has its own key-value cache"),
    "num_iterations": Foreign(_ONE_USE, (None, 1)),
    "steps_per_generation": Foreign(_ONE_USE, (None, 1)),
    "generation_batch_size": Foreign(_ONE_USE),
    "num_generations_eval": Foreign("evaluation draws one completion for each prompt", (None, 1)),
    "epsilon": Foreign(_NO_RATIO),
    "epsilon_high": Foreign(_NO_RATIO),
    "delta": Foreign(_NO_RATIO),
    "loss_type": Foreign(_NO_RATIO),
    "scale_rewards": Foreign(_NO_RATIO, (None, False, "none")),
    "normalize_advantages": Foreign(_NO_RATIO, (None, False)),
    "reward_clip_range": Foreign("a reward that is cut off has no gradient there; bound it in the reward itself"),
    "multi_objective_aggregation": Foreign("the loss is the sum of the rewards by reward_weights"),
    "importance_sampling_level": Foreign(_NO_RATIO),
    "off_policy_mask_threshold": Foreign(_NO_RATIO),
    "use_bias_correction_kl": Foreign("the KL is exact in each token's distribution", (None, False)),
    "top_entropy_quantile": Foreign("every token of a completion counts", (None, 1.0)),
    "entropy_coef": Foreign(_ENTROPY, (None, 0.0)),
    "entropy_coef_min": Foreign(_ENTROPY),
    "entropy_coef_max": Foreign(_ENTROPY),
    "entropy_coef_delta": Foreign(_ENTROPY),
    "entropy_target": Foreign(_ENTROPY),
    "use_adaptive_entropy": Foreign(_ENTROPY, (None, False)),
    "router_aux_loss_coef": Foreign("no loss that balances experts is added", (None, 0.0)),
    "sync_ref_model": Foreign(_REFERENCE, (None, False)),
    "ref_model_mixup_alpha": Foreign(_REFERENCE),
    "ref_model_sync_steps": Foreign(_REFERENCE),
    "cast_lm_head_to_fp32": Foreign(
        "sums through the LM head are float32 whatever its dtype; load the model with dtype float32 for its weights",
        (None, False),
    ),
    "ds3_gather_for_generation": Foreign("the rollout runs layer by layer through the sharded model", (None, True)),
    "pad_to_multiple_of": Foreign("batches are padded to their longest row"),
    "max_tool_calling_iterations": Foreign(_TOOLS),
    "log_completions_hub_repo": Foreign("completions are shown in the terminal alone"),
    "wandb_log_unique_prompts": Foreign("it is called log_unique_prompts", (None, False)),
    "use_liger_loss": Foreign("operations through the LM head are this package's own", (None, False)),
    "use_vllm": Foreign(_ENGINE, (None, False)),
    "use_transformers_paged": Foreign(_ENGINE, (None, False)),
    "use_transformers_continuous_batching": Foreign(_ENGINE, (None, False)),
    "transformers_continuous_batching_config": Foreign(_ENGINE),
    "vllm_importance_sampling_cap": Foreign("it is called vllm_importance_sampling_clip_max"),
}

PREFIXES: dict[str, Foreign] = {
    "vllm_": Foreign(_ENGINE),
    "sapo_": Foreign(_NO_RATIO),
    "vespo_": Foreign(_NO_RATIO),
}


def reason_for_setting(name: str) -> str | None:
    """Why there is no such setting; None for a name that is nobody's."""
    foreign = _setting(name)
    return None if foreign is None else foreign.reason


def reason_for_argument(name: str) -> str | None:
    """Why trainers have no such argument here; None for a name that is nobody's."""
    foreign = ARGUMENTS.get(name)
    return None if foreign is None else foreign.reason


def refuse_arguments(trainer: str, given: Mapping[str, object]) -> None:
    """Nothing for arguments of others that ask for nothing; ValueError or TypeError for all the rest.

    Args:
        trainer: what the error calls the one they were given to.
        given: arguments that it does not have.

    Raises:
        ValueError: an argument that another trainer has, with the reason that this one does not.
        TypeError: one that no trainer has.
    """
    for name, value in given.items():
        foreign = ARGUMENTS.get(name)
        if foreign is None:
            raise TypeError(f"{trainer}.__init__() got an unexpected keyword argument {name!r}")
        _refuse(f"{trainer} has no {name}", foreign, value)


def refusing_foreign_settings(config: T) -> T:
    """Decorates a dataclass of settings: others' names are refused with the reason, or dropped where they ask for nothing."""
    generated: Callable[..., None] = vars(config)["__init__"]
    own = {field.name for field in dataclasses.fields(config)}

    @functools.wraps(generated)
    def checked(self: object, *args: object, **kwargs: object) -> None:
        for name in [name for name in kwargs if name not in own]:
            foreign = _setting(name)
            if foreign is not None:
                _refuse(f"{config.__name__} has no {name}", foreign, kwargs.pop(name))
        generated(self, *args, **kwargs)

    setattr(config, "__init__", checked)  # noqa: B010, of a type that is any dataclass
    return config


def _setting(name: str) -> Foreign | None:
    prefixed = (foreign for prefix, foreign in PREFIXES.items() if name.startswith(prefix))
    return SETTINGS.get(name) or next(prefixed, None)


def _refuse(what: str, foreign: Foreign, value: object) -> None:
    if value not in foreign.harmless:
        raise ValueError(f"{what}: {foreign.reason}")
