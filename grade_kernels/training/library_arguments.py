"""Arguments that go on to the library's trainer: checked here, since it uses some of them only in the middle of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from grade_kernels.training.text_rewards import is_async

__all__ = ["check_library_arguments", "check_rollout_signature", "checked_metrics"]


def check_library_arguments(
    *, callbacks: object, optimizers: object, optimizer_cls_and_kwargs: object, model_init: object
) -> None:
    """Nothing for arguments that the library can use; TypeError naming the first that it can not."""
    if callbacks is not None:
        if not isinstance(callbacks, (list, tuple)):
            raise TypeError(f"callbacks must be a list of TrainerCallback, got {type(callbacks).__name__}")
        for i, one in enumerate(callbacks):
            if not (isinstance(one, TrainerCallback) or (isinstance(one, type) and issubclass(one, TrainerCallback))):
                raise TypeError(f"callbacks[{i}] must be a TrainerCallback, got {one!r}")
    if not isinstance(optimizers, (list, tuple)) or len(optimizers) != 2:
        raise TypeError(f"optimizers must be a pair (optimizer, scheduler), either may be None, got {optimizers!r}")
    for what, one in zip(("the optimizer", "the scheduler"), optimizers, strict=True):
        if one is not None and (isinstance(one, type) or not hasattr(one, "step")):
            raise TypeError(f"optimizers must hold {what} itself or None, got {one!r}")
    if model_init is not None and not callable(model_init):
        raise TypeError(f"model_init must be a function that returns a model, got {type(model_init).__name__}")
    if optimizer_cls_and_kwargs is not None:
        _check_optimizer(optimizer_cls_and_kwargs)


def _check_optimizer(pair: object) -> None:
    wanted = "optimizer_cls_and_kwargs must be a pair (optimizer's class, dict of its keywords)"
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise TypeError(f"{wanted}, got {pair!r}")
    made_by, keywords = pair
    if not callable(made_by) or isinstance(made_by, torch.optim.Optimizer):
        raise TypeError(f"{wanted}, got {made_by!r} as the class")
    if not isinstance(keywords, dict) or not all(isinstance(key, str) for key in keywords):
        raise TypeError(f"{wanted}, got {keywords!r} as the keywords")
    if not (isinstance(made_by, type) and issubclass(made_by, torch.optim.Optimizer)):
        return  # a factory, whose call has a signature of its own
    # The library takes parameters by these names for those of the model.
    own = {key: value for key, value in keywords.items() if key not in ("params", "model", "optimizer_dict")}
    try:
        inspect.signature(made_by).bind([], **own)
    except TypeError as error:
        raise TypeError(
            f"optimizer_cls_and_kwargs: {made_by.__name__} can not be made of {keywords!r}: {error}"
        ) from error
    except ValueError:  # a class without a signature
        return


def check_rollout_signature(rollout_func: object) -> None:
    """A plain function that can be called with prompts and a trainer, or TypeError."""
    if not callable(rollout_func):
        raise TypeError(f"rollout_func must be a function of prompts and trainer, got {type(rollout_func).__name__}")
    if is_async(rollout_func):
        raise TypeError("rollout_func must be a plain function, got an asynchronous one")
    try:
        inspect.signature(rollout_func).bind(None, None)
    except TypeError as error:
        raise TypeError(f"rollout_func must be a function of prompts and trainer, but: {error}") from error
    except ValueError:  # a builtin without a signature
        return


def checked_metrics(compute_metrics: object, *, by_batch: bool) -> Callable[..., dict[str, Any]] | None:
    """`compute_metrics`, which now says so where it returns no metrics; None for none.

    Args:
        compute_metrics: a function of an `EvalPrediction`.
        by_batch: whether it also takes `compute_result`, and may return anything until that is True.

    Raises:
        TypeError: it is no such function.
    """
    if compute_metrics is None:
        return None
    if not callable(compute_metrics):
        raise TypeError(f"compute_metrics must be a function of an EvalPrediction, got {compute_metrics!r}")
    if is_async(compute_metrics):
        raise TypeError("compute_metrics must be a plain function, got an asynchronous one")
    if not by_batch:  # else the library checks it
        try:
            inspect.signature(compute_metrics).bind(None)
        except TypeError as error:
            raise TypeError(f"compute_metrics must be a function of one EvalPrediction, but: {error}") from error
        except ValueError:  # a builtin without a signature
            pass

    @functools.wraps(compute_metrics)
    def checked(*args: object, **kwargs: object) -> dict[str, Any]:
        found = compute_metrics(*args, **kwargs)
        if (not by_batch or kwargs.get("compute_result", True)) and not isinstance(found, dict):
            raise TypeError(f"compute_metrics must return a dict of metrics by name, got {found!r}")
        return found  # type: ignore[no-any-return]  # before the last batch, anything

    return checked
