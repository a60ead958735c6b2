"""What the trainer needs of a causal language model: its backbone, its LM head and its input embeddings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from grade_kernels.training.allowed_tokens import AllowedTokens

__all__ = [
    "Capture",
    "LanguageModel",
    "cache_arguments",
    "cache_of",
    "check_checkpointing",
    "check_training_mode",
    "evaluating",
    "gather_root",
    "is_reentrant",
    "is_sharded",
    "last_hidden_state",
    "position_arguments",
    "position_ids",
    "read_language_model",
    "sweeping",
    "unwrap",
]

# What the probe said of a model, which is run on it once and not at every step: does it read padding on the left?
_PROBED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


_ROUNDING = 0.05  # a relative difference that bfloat16 stays far below


@dataclass(frozen=True)
class LanguageModel:
    """The parts of a causal language model whose logits are `softcap((logit_scale * hidden) @ weight.T + bias)`.

    Attributes:
        model: the model itself, out of every wrapper.
        backbone: everything below the head; returns `last_hidden_state`.
        head: the module that holds the head's `weight` `[V, H]` and perhaps its `bias` `[V]`.
        embedding: the module that looks up the input embeddings: `embed_scale * weight[ids]`.
        logit_scale: factor on the hidden states before the head.
        softcap: c in `c * tanh(l / c)`, or None.
        reads_left_padding: whether a row that is padded on the left has the hidden states of the row alone. Not so
            where positions are counted from the row's start whatever the mask says (Bart), or where a state that stands
            for a cache counts padding (MiniMax).
        allowed: the tokens that may be sampled.
    """

    model: Any
    backbone: nn.Module
    head: nn.Linear
    embedding: nn.Embedding
    logit_scale: float
    softcap: float | None
    reads_left_padding: bool = True
    allowed: AllowedTokens = field(default_factory=AllowedTokens)

    @property
    def vocab_size(self) -> int:
        """Number of tokens the head scores."""
        return self.head.weight.shape[0]

    @property
    def table(self) -> torch.Tensor:
        """The input embedding table `[V, D]`, without the model's scale."""
        return _active(self.embedding).weight

    @property
    def embed_scale(self) -> torch.Tensor | float:
        """Factor between a row of the table and the embedding the model reads (1 for most; Gemma has one)."""
        return _scale_of(_active(self.embedding))

    def allowing(self, allowed: AllowedTokens) -> LanguageModel:
        """The same model, which samples nothing but these tokens."""
        return replace(self, allowed=allowed)

    def head_options(self, first: bool = False) -> dict[str, Any]:
        """Keyword arguments of the `linear_*` operations that describe this head, for the first tokens or for others."""
        head = _active(self.head)
        return {"bias": self.allowed.bias(head.weight, head.bias, first), "logit_softcap": self.softcap}

    def head_input(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states as the head's product takes them, scaled and in its dtype, and the head's weight."""
        weight = _active(self.head).weight
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        return hidden.to(weight.dtype), weight


def is_reentrant(arguments: Mapping[str, Any]) -> bool:
    """Whether torch checkpoints reentrantly with these arguments: it does if they don't say."""
    word = arguments.get("use_reentrant")
    return word is None or bool(word)


def check_checkpointing(model: nn.Module) -> None:
    """No reentrant gradient checkpointing, or ValueError: the sweeps differentiate to the inputs alone."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        reentrant = isinstance(function, functools.partial) and is_reentrant(function.keywords)
        if getattr(module, "gradient_checkpointing", False) and reentrant:
            raise ValueError(
                "model must not have reentrant gradient checkpointing, which gives no gradient to the inputs alone: "
                'enable it with {"use_reentrant": False}'
            )


@torch.no_grad()
def _some_states(model: nn.Module, training: bool = False) -> torch.Tensor | None:
    """Hidden states of a few tokens in eval or training mode; None where the weights are not here."""
    parts = read_language_model(model)
    if _is_abstract(parts.table):
        return None
    with evaluating(parts.model), torch.random.fork_rng(devices=[]):
        parts.model.train(training)
        return last_hidden_state(parts.backbone(input_ids=_some_ids(parts), use_cache=False))


def check_training_mode(model: nn.Module) -> None:
    """The same hidden states in training mode as in the eval mode of the rollout, or ValueError."""
    expected, *trained = (_some_states(model, training) for training in (False, True, True))
    if expected is None:
        return
    difference = max(_difference(states, expected) for states in trained if states is not None)
    if not difference < _ROUNDING:
        parts = read_language_model(model)
        raise ValueError(
            f"model ({type(parts.model).__name__}) computes something else in training than when it completes prompts, "
            f"although dropout is off in its modules (relative difference {difference:.3g}): its config has rates to set "
            "to 0, or it is random by design"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """A model out of the wrappers of distributed training and of `torch.compile`; PEFT's wrapper stays."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def read_language_model(model: nn.Module, *, name: str = "model") -> LanguageModel:
    """Find a causal language model's parts, and check once by a small forward pass that they are what they seem.

    Args:
        model: a `PreTrainedModel` or `PeftModel` for causal language modelling, possibly wrapped for training.
        name: what errors call it.

    Raises:
        TypeError: something that is no module.
        ValueError: an architecture whose samples can not be differentiated exactly by this package, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a causal language model, got {type(model).__name__}")
    whole: Any = unwrap(model)
    inner = whole
    kind = type(inner).__name__
    if hasattr(inner, "get_base_model"):  # PEFT's wrapper
        configs = inner.peft_config.values()
        if any(getattr(config, "is_prompt_learning", False) for config in configs):
            raise ValueError(f"{name} is tuned by learned prompts, which its replay can not see; use LoRA or the like")
        if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
            raise ValueError(f"{name} has an adapter that tokens invoke (aLoRA), which no step of a rollout sees")
        inner = inner.get_base_model()
    config = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_output_embeddings"):
        raise ValueError(f"{name} must be a transformers model for causal language modelling, got {kind}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} must be decoder-only, but {kind} is an encoder-decoder model")
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head is None:
        raise ValueError(f"{name} must have a language modelling head, but {kind} has none")
    # Llama-4's text model bears the prefix of what it is a part of.
    backbone = getattr(inner, inner.base_model_prefix, None) or getattr(inner, "model", None)
    if not isinstance(backbone, nn.Module) or backbone is inner:
        raise ValueError(f"{name}: {kind} has no backbone {inner.base_model_prefix!r} below its head")
    # OPT and the like keep an empty shell around their decoder, which their own forward passes by.
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if isinstance(decoder, nn.Module) and any(module is decoder for module in backbone.modules()):
        backbone = decoder
    if _cache_name(backbone) is None:
        raise ValueError(f"{name}: {kind} decodes without a key-value cache, which the rollout needs")
    for part, module, wanted in (("LM head", head, nn.Linear), ("input embedding", embedding, nn.Embedding)):
        active = _active(module)
        if not isinstance(active, wanted) or not active.weight.is_floating_point():
            raise ValueError(
                f"{name}: its {part} must be a plain torch.nn.{wanted.__name__} of floating point, got "
                f"{type(active).__module__}.{type(active).__qualname__} (adapters and quantisation must leave the LM head "
                "and the input embedding alone)"
            )
    parts = LanguageModel(
        model=inner,
        backbone=backbone,
        head=head,
        embedding=embedding,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    if whole not in _PROBED:  # by the whole: an adapter may change what its base model was probed for
        _PROBED[whole] = _probe(parts, f"{name} ({kind})")
    return replace(parts, reads_left_padding=_PROBED[whole])


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens alone, `[B, L]`; 0 under left padding."""
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


def position_arguments(module: nn.Module, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` for a module that takes them; the others (ALiBi) read the mask."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(module.forward).parameters else {}


def cache_arguments(module: nn.Module, cache: Any) -> dict[str, Any]:
    """A key-value cache, or None to begin with, for a module that takes one: by the name its forward has for it."""
    return {str(_cache_name(module)): cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The key-value cache that a module returns; None without one."""
    # Outputs of transformers from 5.24 on have the old name too, but warn of it.
    return getattr(output, "cache" if hasattr(output, "cache") else "past_key_values", None)


def last_hidden_state(output: Any) -> torch.Tensor:
    """The hidden states `[B, L, H]` that a backbone returns."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


class Capture:
    """While entered, sees the input embeddings and the final hidden states of a forward pass through the whole model.

    The forward pass goes through the model that the training loop holds, wrappers and all, so that their hooks run;
    only its logits are not wanted.

    Args:
        parts: the model's parts.
        edit: called with the embeddings `[B, L, D]` of the pass, returns what the model shall read instead.
    """

    embedded: torch.Tensor
    hidden: torch.Tensor

    def __init__(self, parts: LanguageModel, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._parts, self._edit = parts, edit

    def __enter__(self) -> Capture:
        def see_embedding(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            output = self._edit(output)
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()
            self.embedded = output
            return output.clone()  # CTRL scales it in place, behind which its gradient would be another

        def see_hidden(module: nn.Module, arguments: Any, output: Any) -> None:
            self.hidden = last_hidden_state(output)

        self._hooks = [
            self._parts.embedding.register_forward_hook(see_embedding),
            self._parts.backbone.register_forward_hook(see_hidden),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def is_sharded(model: nn.Module) -> bool:
    """Whether processes must run a model's layers together, since each holds a part of them (FSDP2, ZeRO-3)."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def gather_root(model: nn.Module) -> None:
    """Under FSDP2, bring embedding, head and what no layer owns together, until the next backward pass ends."""
    if not isinstance(model, FSDPModule):
        return
    # Whoever runs forward first is taken for the root, and the rollout starts below it.
    model._get_fsdp_state()._lazy_init()
    for module in _read_apart(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


@contextmanager
def sweeping(model: nn.Module) -> Iterator[None]:
    """Backward passes that are not the last one: under FSDP2 they leave the gathered parameters where they are."""
    gathered = _read_apart(model) if isinstance(model, FSDPModule) else []
    for module in gathered:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module in gathered:
            module.set_reshard_after_backward(True, recurse=False)


def _read_apart(model: Any) -> list[FSDPModule]:
    """The sharded units whose parameters are read outside their own forward pass: the root's, embedding and head."""
    units = (model, model.get_input_embeddings(), model.get_output_embeddings())
    return [unit for unit in units if isinstance(unit, FSDPModule)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and each module's own mode again afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _cache_name(module: nn.Module) -> str | None:
    """What a module's forward calls its cache: the old name, or that of transformers from 5.24 on; None without one."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in parameters), None)


def _active(module: nn.Module) -> Any:
    """The layer at work where PEFT keeps a trained copy beside the original (`modules_to_save`)."""
    wrapper: Any = module
    copies = getattr(wrapper, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    return copies[wrapper.active_adapters[0]]


def _scale_of(embedding: nn.Module) -> torch.Tensor | float:
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(embedding.weight.dtype) if isinstance(scale, torch.Tensor) else float(scale)  # type: ignore[arg-type]


def _logit_scale(config: Any) -> float:
    """Cohere multiplies logits, Granite divides them; the softcap comes later, so hidden states can carry either."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))


@torch.no_grad()
def _probe(parts: LanguageModel, name: str) -> bool:
    """Compare the model's own logits with those of its parts on a few tokens; ValueError where they differ.

    Returns:
        Whether the model reads rows that are padded on the left.
    """
    table = parts.table
    if _is_abstract(table):
        return True  # nothing to run; whoever sharded the model had it checked before
    if table.shape[0] != _active(parts.head).weight.shape[0]:
        raise ValueError(
            f"{name}: the input embedding has {table.shape[0]} tokens, but the LM head {parts.vocab_size}; "
            "a sample of the head must be an input"
        )
    ids = _some_ids(parts)
    with evaluating(parts.model), torch.random.fork_rng(devices=[]):
        embedded = parts.embedding(ids)
        scaled = table[ids] * parts.embed_scale
        if not torch.allclose(embedded, scaled, rtol=1e-3, atol=1e-6):
            raise ValueError(
                f"{name}: its input embedding of a token is not a multiple of the table's row that this package can "
                "read, so a relaxed sample `y @ table` would not be an input of the model"
            )
        with Capture(parts, lambda embedded: embedded) as seen:
            from_ids = _run(name, parts.model, input_ids=ids, use_cache=False)
        logits = getattr(from_ids, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape != (1, 4, parts.vocab_size):
            raise ValueError(f"{name}: its forward must return one tensor of logits [batch, time, vocabulary]")
        if not hasattr(seen, "embedded") or not hasattr(seen, "hidden"):
            raise ValueError(
                f"{name}: its forward does not run its input embedding and its {type(parts.backbone).__name__}, so "
                "their samples can not be replayed"
            )
        # Gemma-4 looks a token up a second time, by the row of the table that its embedding is: a mixture has none.
        _run(name, parts.model, inputs_embeds=(embedded + embedded.roll(1, dims=1)) / 2, use_cache=False)
        from_embeds = _run(name, parts.model, inputs_embeds=embedded, use_cache=False).logits
        _close(
            from_embeds, logits, f"{name}: it computes other logits from embeddings than from ids, so the embedding of "
            "a relaxed sample does not carry all of the token's influence"
        )  # fmt: skip
        states = last_hidden_state(_run(name, parts.backbone, input_ids=ids, use_cache=False))
        hidden, weight = parts.head_input(states)
        if hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name}: its LM head reads {weight.shape[1]} features, but its {type(parts.backbone).__name__} returns "
                f"{hidden.shape[-1]}"
            )
        ours = hidden @ weight.T
        bias = _active(parts.head).bias
        ours = ours if bias is None else ours + bias
        ours = ours if parts.softcap is None else parts.softcap * torch.tanh(ours / parts.softcap)
        _close(ours, logits, f"{name}: its logits are not `softcap(scale * hidden @ weight.T + bias)` of its LM head")
        last = states[:, -1:]
        if _difference(_decoded(parts, name, ids, padding=2), last) < _ROUNDING:
            return True
        # Mamba takes the mask of all tokens for one of the token behind its cache.
        _close(
            _decoded(parts, name, ids, padding=0), last, f"{name}: its {type(parts.backbone).__name__} returns other "
            "hidden states step by step than of all tokens at once, so what a rollout reads is not what is replayed"
        )  # fmt: skip
        return False


def _decoded(parts: LanguageModel, name: str, ids: torch.Tensor, padding: int) -> torch.Tensor:
    """Hidden states `[1, 1, H]` of the last token as a rollout reads it: behind padding and a key-value cache."""
    # Two steps behind the prompt, since the first may be right and yet leave the cache wrong.
    padded = torch.cat([ids[:, :padding], ids], dim=1)
    mask = (torch.arange(padded.shape[1], device=ids.device) >= padding).long()[None]
    positions, cache, start = position_ids(mask), None, 0
    for end in range(padded.shape[1] - 2, padded.shape[1] + 1):
        output = _run(
            name, parts.backbone, input_ids=padded[:, start:end], attention_mask=mask[:, :end],
            **cache_arguments(parts.backbone, cache), **position_arguments(parts.backbone, positions[:, start:end]),
        )  # fmt: skip
        cache, start = cache_of(output), end
        if cache is None:
            raise ValueError(f"{name} decodes without a key-value cache, which the rollout needs")
    return last_hidden_state(output)[:, -1:]


def _is_abstract(table: torch.Tensor) -> bool:
    """Whether a table's values are not here: on no device, or in parts on several."""
    return table.device.type == "meta" or type(table.data).__name__ == "DTensor"


def _some_ids(parts: LanguageModel) -> torch.Tensor:
    """Four tokens `[1, 4]`: a stride through the vocabulary, for neighbours at its start are often special tokens."""
    return (torch.arange(1, 5, device=parts.table.device) * (parts.vocab_size // 5))[None]


def _run(name: str, module: Any, **arguments: Any) -> Any:
    """A forward pass whose failure names the model and what it was run on."""
    try:
        return module(**arguments)
    except Exception as error:
        given = " and ".join(key for key, value in arguments.items() if not isinstance(value, bool | None))
        raise ValueError(f"{name} can not be run from {given}: {type(error).__name__}: {error}") from error


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.float(), theirs.float()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()


def _close(ours: torch.Tensor, theirs: torch.Tensor, message: str) -> None:
    difference = _difference(ours, theirs)
    if not difference < _ROUNDING:  # NaN is refused as well
        raise ValueError(f"{message} (relative difference {difference:.3g})")
