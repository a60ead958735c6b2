"""What the KL's reference is: a model of its own, or the policy with other values in the parameters that it trains.

The reference is the policy as training begins, unless another one is given. An adapter is a small part of a model, so
such a reference shares all of the rest with the policy: `WithoutAdapter` needs no memory at all, and `FrozenCopy` that
of the trained parameters alone.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from grade_kernels.training.model import (
    LanguageModel,
    active_layer,
    evaluating,
    gather_root,
    read_language_model,
    unwrap,
)
from grade_kernels.training.positions import position_limit

__all__ = [
    "FrozenCopy",
    "NamedAdapter",
    "OtherModel",
    "Reference",
    "WithoutAdapter",
    "changes_nothing",
    "fingerprint",
    "has_adapter",
    "is_adapted",
    "reference_for_loss",
    "reference_for_training",
]

# Models whose adapter `reference_for_loss` has looked at: either it is fresh, or a warning was given. Looking costs a walk
# over all parameters, and the warning comes once.
_SEEN: WeakSet[nn.Module] = WeakSet()


class Reference(ABC):
    """The frozen distribution that the policy is held to."""

    @abstractmethod
    def parts(self, model: nn.Module) -> AbstractContextManager[LanguageModel]:
        """While entered, the reference's parts, in eval mode.

        Args:
            model: the policy, in whatever wrapper. It is as it was again on leaving.
        """

    @abstractmethod
    def check(self, model: nn.Module, policy: LanguageModel, length: int = 0) -> None:
        """ValueError where this can not be the reference of a policy.

        Args:
            model: the policy, in whatever wrapper.
            policy: its parts.
            length: tokens of the longest prompt and completion together.
        """


class OtherModel(Reference):
    """A model of its own.

    Args:
        model: a causal language model, which nothing trains. Its vocabulary is the policy's, perhaps padded otherwise.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def parts(self, model: nn.Module) -> Iterator[LanguageModel]:
        """The other model's parts."""
        own = read_language_model(self.model, name="ref_model")
        with evaluating(own.model):
            yield own

    def check(self, model: nn.Module, policy: LanguageModel, length: int = 0) -> None:
        """ValueError for another vocabulary, another cap of the logits, or too few positions."""
        own = read_language_model(self.model, name="ref_model")
        if (last := policy.allowed.last(policy.vocab_size)) >= own.vocab_size:
            raise ValueError(
                f"ref_model must share the policy's vocabulary: its LM head scores {own.vocab_size} tokens, the policy's "
                f"{policy.vocab_size}, of which it samples ids up to {last}"
            )
        if own.softcap != policy.softcap:
            raise ValueError(
                f"ref_model must cap its logits as the policy does: at {policy.softcap}, not {own.softcap}"
            )
        limit = position_limit(own.model.config)
        if limit is not None and limit < length:
            raise ValueError(
                f"ref_model has {limit} positions, but a prompt and its completion may have {length} tokens together"
            )


class WithoutAdapter(Reference):
    """A PEFT policy with its adapters switched off: the bare base model."""

    @contextmanager
    def parts(self, model: nn.Module) -> Iterator[LanguageModel]:
        """The policy's parts, meanwhile without its adapters."""
        inner: Any = unwrap(model)
        with _flags_kept(inner), _unmerged(inner), inner.disable_adapter(), evaluating(inner):
            yield read_language_model(inner)

    def check(self, model: nn.Module, policy: LanguageModel, length: int = 0) -> None:
        """ValueError for a model without an adapter, or one that trains more than its adapter."""
        inner: Any = unwrap(model)
        if not has_adapter(inner):
            raise ValueError("ref_model must be given: the model has no adapter to switch off")
        with _flags_kept(inner), inner.disable_adapter():  # which freezes what belongs to the adapter
            left = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
        if left:
            raise ValueError(
                "the KL needs a reference, which is model without its adapter, but training would change that too: "
                f"{len(left)} parameters outside of the adapter require gradients, the first of them {left[0]} "
                '(an adapter with a `bias` other than "none" has such); freeze them, or give '
                "ref_model=FrozenCopy(model), made before the first step"
            )


class NamedAdapter(Reference):
    """A PEFT policy with another one of its adapters at work, which nothing trains.

    Args:
        name: of that adapter.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @contextmanager
    def parts(self, model: nn.Module) -> Iterator[LanguageModel]:
        """The policy's parts, meanwhile with the named adapter alone."""
        inner: Any = unwrap(model)
        single, several = inner.active_adapter, list(inner.active_adapters)
        with _flags_kept(inner), _unmerged(inner), evaluating(inner):
            inner.set_adapter(self.name)
            try:
                yield read_language_model(inner)
            finally:
                inner.base_model.set_adapter(several)
                inner.active_adapter = single

    def check(self, model: nn.Module, policy: LanguageModel, length: int = 0) -> None:
        """ValueError for a name that no adapter has, or that of one which is trained or is the policy itself."""
        inner: Any = unwrap(model)
        known = list(getattr(inner, "peft_config", {})) if has_adapter(inner) else []
        if self.name not in known:
            raise ValueError(f"ref_adapter_name must be one of the model's adapters {known}, got {self.name!r}")
        if self.name in inner.active_adapters:
            raise ValueError(f"ref_adapter_name = {self.name!r} is the adapter that the policy itself uses")
        trained = [name for name, p in inner.named_parameters() if p.requires_grad and f".{self.name}." in f".{name}."]
        if trained:
            raise ValueError(
                f"ref_adapter_name = {self.name!r} must not be trained, but {len(trained)} of its parameters require "
                f"gradients, the first of them {trained[0]}"
            )
        outside = [name for name, p in inner.named_parameters() if p.requires_grad and not _belongs(inner, name)]
        if outside:
            raise ValueError(
                f"ref_adapter_name = {self.name!r}: training would change the reference too, since {len(outside)} "
                f"parameters outside of the adapters require gradients, the first of them {outside[0]}; freeze them"
            )


class FrozenCopy(Reference):
    """The policy as it is now: a copy of the parameters that require gradients; it shares all the others with it.

    So it holds an adapter as it came, whatever its kind, with its trained biases and its `modules_to_save`. It takes as
    much memory as the adapter. While the reference is computed, the copied values take the place of the policy's.

    Args:
        model: the policy before training, in whatever wrapper.

    Raises:
        ValueError: a model of which nothing is trained, or whose parameters are not here (DeepSpeed ZeRO-3).
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: p for name, p in _named(unwrap(model)).items() if p.requires_grad}
        if not trained:
            raise ValueError("model must have a parameter that requires a gradient, but all are frozen")
        absent = [name for name, p in trained.items() if hasattr(p, "ds_id") or p.is_meta]
        if absent:
            raise ValueError(
                f"the values of {absent[0]} are not on this process (DeepSpeed ZeRO-3, or the meta device), so no copy "
                "can be the reference: give ref_model, or the name of an adapter that nothing trains"
            )
        # A parameter that two modules share is copied once.
        self._values = {name: p.detach().clone() for name, p in trained.items()}
        self._placed: dict[str, torch.Tensor] = {}

    @contextmanager
    def parts(self, model: nn.Module) -> Iterator[LanguageModel]:
        """The policy's parts, meanwhile with the copied values in them."""
        inner = unwrap(model)
        with _unmerged(inner), self._in_place(inner), evaluating(inner):
            yield self._with_own_head(inner, read_language_model(inner))

    def check(self, model: nn.Module, policy: LanguageModel, length: int = 0) -> None:
        """ValueError where the policy trains other parameters than were copied."""
        now = _named(unwrap(model))
        missing = [name for name in self._values if name not in now]
        if missing:
            raise ValueError(f"the reference is a copy of another model: {missing[0]} is no parameter of this one")
        new = [name for name, p in now.items() if p.requires_grad and name not in self._values]
        if new:
            raise ValueError(
                f"training would change the reference too: {len(new)} parameters require gradients that did not when it "
                f"was copied, the first of them {new[0]}"
            )

    def state(self) -> dict[str, torch.Tensor]:
        """The copied values, whole and on the CPU; processes that hold shards must call this together."""
        whole = {
            name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in self._values.items()
        }
        return {name: value.cpu().contiguous() for name, value in whole.items()}

    def save(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        """Write `state()` into a file."""
        save_file(state, str(path))

    def load(self, path: Path) -> None:
        """Take the values of a file, of the run that this one goes on with.

        Raises:
            ValueError: other parameters, or of other shapes.
        """
        state = load_file(str(path))
        shapes = {name: tuple(value.shape) for name, value in self._values.items()}
        stored = {name: tuple(value.shape) for name, value in state.items()}
        if stored != shapes:
            differing = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
            raise ValueError(
                f"{path} holds the reference of another policy: {len(differing)} parameters differ in name or shape, "
                f"such as {differing[0]}"
            )
        for name, value in self._values.items():
            if isinstance(value, DTensor):
                self._values[name] = distribute_tensor(
                    state[name].to(value.device, value.dtype), value.device_mesh, value.placements
                )
            else:
                self._values[name] = state[name].to(value.device, value.dtype)
        self._placed.clear()

    def _with_own_head(self, inner: nn.Module, parts: LanguageModel) -> LanguageModel:
        """Parts whose LM head keeps the copied values.

        The KL reads the head after the policy has its own values back, and would find those in it.
        """
        active = active_layer(parts.lm_head)
        weight, bias = active.weight.detach(), None if active.bias is None else active.bias.detach()
        names = {name for name, module in inner.named_modules() if module is active}
        trained = any(f"{name}.{own}" in self._values for name in names for own in ("weight", "bias"))
        if trained and any(isinstance(module, FSDPModule) for module in inner.modules()):
            # The gathered parameters of FSDP2 are overwritten in place when the policy's values come back.
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias, requires_grad=False)
        return replace(parts, lm_head=head)

    @contextmanager
    def _in_place(self, inner: nn.Module) -> Iterator[None]:
        """The copied values instead of the policy's.

        A graph of the policy's may have saved whole parameters for its backward pass, and overwriting them would change
        its gradient. So they exchange their storage, and the graph keeps the old one. FSDP2 gathers each layer from the
        shards, so a parameter that it shards is overwritten there, and put back afterwards.
        """
        units = [module for module in inner.modules() if isinstance(module, FSDPModule)]

        def regather() -> None:
            gather_root(inner)

        def free() -> None:
            for unit in units:
                unit.reshard()

        free()  # while a parameter is gathered, a module holds the whole of it, and not the shard that counts here
        swapped: list[tuple[nn.Parameter, torch.Tensor]] = []
        overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []
        parameters = _named(inner)
        try:
            for name in self._values:
                parameter = parameters[name]
                value = self._value_for(name, parameter)
                if isinstance(parameter, DTensor):
                    local = _local(parameter)
                    overwritten.append((local, local.clone()))
                    local.copy_(value)
                else:
                    swapped.append((parameter, parameter.data))
                    parameter.data = value
            regather()
            yield
        finally:
            free()
            for parameter, own in swapped:
                parameter.data = own
            for local, own in overwritten:
                local.copy_(own)
            regather()

    def _value_for(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The copied value as the parameter is held here: on its device, in its dtype, its shard of it."""
        placed = self._placed.get(name)
        local = _local(parameter)
        if placed is None or placed.device != local.device or placed.dtype != local.dtype:
            value = self._values[name]
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(
                    value.to(local.device, local.dtype), parameter.device_mesh, parameter.placements
                )
            if isinstance(value, DTensor):
                value = value.to_local()
            placed = value.to(local.device, local.dtype)
            self._placed[name] = placed
        return placed


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT's wrapper is around a model, whose adapters can be switched off."""
    return hasattr(unwrap(model), "disable_adapter")


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters, PEFT's wrapper around it or not (transformers' `add_adapter`)."""
    inner = unwrap(model)
    return has_adapter(inner) or bool(getattr(inner, "_hf_peft_config_loaded", False))


def changes_nothing(model: nn.Module) -> bool:
    """Whether a PEFT model computes exactly what it does without its adapters, and trains nothing else.

    So does LoRA before its first step, whose B is zero. All other kinds of adapters count as if they did not.
    """
    inner: Any = unwrap(model)
    active = list(inner.active_adapters)
    configs = [inner.peft_config[name] for name in active]
    if any(str(getattr(c.peft_type, "value", c.peft_type)) != "LORA" or getattr(c, "use_dora", False) for c in configs):
        return False
    if any(_merged(module) for module in inner.modules()):
        return False
    factors = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    for name, parameter in inner.named_parameters():
        parts = set(name.split("."))
        if parameter.requires_grad and not parts & (factors | {"modules_to_save"}):
            return False
        outer = parts & {"lora_B", "lora_embedding_B"} and parts & set(active)
        if outer and (parameter.is_meta or bool(_local(parameter).ne(0).any())):
            return False
    for module in inner.modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            original = module.original_module.state_dict()  # type: ignore[union-attr, operator]
            for name in set(active) & set(copies):
                state = copies[name].state_dict()
                if any(
                    not torch.equal(_local(state[key]), _local(original[key]).to(state[key].dtype)) for key in state
                ):
                    return False
    return True


def reference_for_loss(
    model: nn.Module, ref_model: nn.Module | Reference | None, ref_adapter_name: str | None, beta: float
) -> Reference | None:
    """What `grade_loss` compares with, or None for no KL; a warning where that may not be what is meant.

    Raises:
        TypeError: a `ref_model` that is neither a model nor a reference.
        ValueError: two references, or none where `beta` needs one.
    """
    if ref_model is not None and ref_adapter_name is not None:
        raise ValueError("give ref_model or ref_adapter_name, not both")
    if ref_adapter_name is not None:
        return NamedAdapter(ref_adapter_name)
    if isinstance(ref_model, Reference):
        return ref_model
    if ref_model is not None:
        if not isinstance(ref_model, nn.Module):
            raise TypeError(f"ref_model must be a model or a reference, got {type(ref_model).__name__}")
        return OtherModel(ref_model)
    if beta == 0.0:
        return None
    inner = unwrap(model)
    if not has_adapter(inner):
        raise ValueError(f"ref_model must be given for beta = {beta}: the model has no adapter to switch off")
    if inner not in _SEEN:
        _SEEN.add(inner)
        if not changes_nothing(inner):
            warnings.warn(
                "The model came with an adapter that has been trained, and the KL's reference is the model without it. "
                "For the adapter as it came give ref_model=FrozenCopy(model), made before the first step, or "
                "ref_adapter_name; ref_model=WithoutAdapter() says that the bare model is meant",
                stacklevel=3,
            )
    return WithoutAdapter()


def reference_for_training(
    policy: nn.Module, ref_model: nn.Module | Reference | None, ref_adapter_name: str | None, beta: float
) -> Reference | None:
    """What the trainer compares with: what was given, or the policy as training begins; None for no KL.

    Raises:
        ValueError: two references, or one that can not be the policy's.
    """
    if ref_model is not None and ref_adapter_name is not None:
        raise ValueError("give ref_model or ref_adapter_name, not both")
    reference: Reference
    if isinstance(ref_model, Reference):
        reference = ref_model
    elif ref_model is not None:
        reference = OtherModel(ref_model.eval().requires_grad_(False))
    elif ref_adapter_name is not None:
        reference = NamedAdapter(ref_adapter_name)
    elif beta == 0.0:
        return None
    elif has_adapter(policy) and changes_nothing(policy):
        reference = WithoutAdapter()
    elif is_adapted(policy):
        reference = FrozenCopy(policy)
    else:
        reference = OtherModel(copy.deepcopy(policy).eval().requires_grad_(False))
    return reference


@torch.no_grad()
def fingerprint(model: nn.Module) -> str | None:
    """A digest of a few values of every parameter, to know a reference again; None where they are not all here."""
    digest = hashlib.sha256()
    for name, parameter in _named(unwrap(model)).items():
        if parameter.is_meta or isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            return None
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(len(flat) // 64, 1)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the name that they have without the wrapper of activation checkpointing."""
    return {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, without graph."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _belongs(model: Any, name: str) -> bool:
    """Whether a parameter is a part of some adapter: one of the parts of its name is an adapter's."""
    return bool(set(name.split(".")) & set(model.peft_config))


def _merged(module: nn.Module) -> list[str]:
    """The adapters that are merged into a layer at present."""
    merged = getattr(module, "merged_adapters", None)
    return list(merged) if isinstance(merged, list) and hasattr(module, "unmerge") else []


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every parameter requires a gradient or not, as before.

    PEFT's `disable_adapter` and `set_adapter` also switch which parameters are trained.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _unmerged(model: nn.Module) -> Iterator[None]:
    """No layer has its adapters merged into its weights meanwhile; afterwards each is to the bit what it was.

    A merged layer does not read its adapter's parameters (https://github.com/huggingface/peft/issues/3756), so another
    adapter or other values would have no effect. PEFT's `disable_adapter` unmerges a layer and leaves it so, which would
    change the policy. This can go when PEFT restores what was merged.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if _merged(module):
                stack.enter_context(_layer_unmerged(module))
        yield


@contextmanager
def _layer_unmerged(layer: Any) -> Iterator[None]:
    merged = list(layer.merged_adapters)
    kept = [(parameter, parameter.data) for parameter in layer.parameters()]
    for parameter, value in kept:
        parameter.data = value.clone()
    layer.unmerge()
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data = value
        layer.merged_adapters[:] = merged
