"""Finding the parts of a causal language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from grade_kernels.training.model.forward import cache_name
from grade_kernels.training.model.parts import LanguageModel, active_layer
from grade_kernels.training.model.probe import probe
from grade_kernels.training.model.sharding import unwrap

__all__ = ["read_language_model"]

# Whether a model reads padding on the left, as its probe found. The probe runs once for a model and not at every step.
_PROBED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


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
    unwrapped = unwrap(model)
    inner: Any = unwrapped
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
    # The text model of Llama 4 has the prefix of the multimodal model that it is a part of, and so no such attribute.
    backbone = getattr(inner, inner.base_model_prefix, None) or getattr(inner, "model", None)
    if not isinstance(backbone, nn.Module) or backbone is inner:
        raise ValueError(f"{name}: {kind} has no backbone {inner.base_model_prefix!r} below its head")
    # OPT and the like have a shell around their decoder, which their own forward does not run.
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    if isinstance(decoder, nn.Module) and any(module is decoder for module in backbone.modules()):
        backbone = decoder
    if cache_name(backbone) is None:
        raise ValueError(f"{name}: {kind} decodes without a key-value cache, which the rollout needs")
    for part, module, wanted in (("LM head", head, nn.Linear), ("input embedding", embedding, nn.Embedding)):
        active = active_layer(module)
        if not isinstance(active, wanted) or not active.weight.is_floating_point():
            raise ValueError(
                f"{name}: its {part} must be a plain torch.nn.{wanted.__name__} of floating point, got "
                f"{type(active).__module__}.{type(active).__qualname__} (adapters and quantisation must leave the LM head "
                "and the input embedding alone)"
            )
    parts = LanguageModel(
        whole=model,
        model=inner,
        backbone=backbone,
        lm_head=head,
        embedding=embedding,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    if unwrapped not in _PROBED:  # with its adapter: that may change what the base model was probed for
        _PROBED[unwrapped] = probe(parts, f"{name} ({kind})")
    return replace(parts, reads_left_padding=_PROBED[unwrapped])


def _logit_scale(config: object) -> float:
    """Cohere multiplies logits, Granite divides them; the softcap comes later, so hidden states can carry either."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
