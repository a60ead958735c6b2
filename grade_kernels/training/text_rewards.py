"""Rewards of text, which are logged: plain functions, and asynchronous ones, all of a batch at once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["HELPERS", "TextRewards", "is_async", "numbers"]

HELPERS = ("trainer_state", "log_metric", "log_extra")
"""What the trainer gives to a function of text that names it among its parameters, as in TRL."""


def is_async(function: Any) -> bool:
    """Whether a call returns a coroutine: an `async def`, an object whose `__call__` is one, a partial of either."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.iscoroutinefunction(function):
        return True
    method = function.forward if isinstance(function, nn.Module) else getattr(function, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(method)


class TextRewards:
    """Functions `f(prompts, completions, completion_ids, **columns)` that return a number, or None, per completion.

    Asynchronous ones wait at the same time, on an event loop that stays the same for the whole training, as clients of
    network services want it. That loop has a thread of its own, so it does not matter whether the caller has one too
    (Jupyter).

    Args:
        functions: by the name that metrics and errors call them.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        self.functions = functions
        self._loop: asyncio.AbstractEventLoop | None = None

    def __bool__(self) -> bool:
        return bool(self.functions)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: dict[str, Any],
        extras: dict[str, Any],
    ) -> dict[str, list[float]]:
        """Every function's numbers by its name; NaN where it returned None.

        Args:
            prompts: one per completion.
            completions: texts, or lists of one message.
            completion_ids: their tokens.
            columns: the data set's other columns, as lists.
            extras: what a function gets only if its signature has that name.

        Raises:
            ValueError: another number of values than completions.
            Exception: what a function raises; a note on it has the function's name.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        results: dict[str, Any] = {}
        waiting: dict[str, Callable[[], Awaitable[Any]]] = {}
        for name, function in self.functions.items():
            call = functools.partial(function, **given, **_wanted(function, extras, given))
            if is_async(function):
                waiting[name] = call
                continue
            with _naming(name):
                results[name] = call()
            if inspect.isawaitable(results[name]):
                waiting[name] = functools.partial(_itself, results[name])
        if waiting:
            results |= self._wait(waiting)
        return {name: numbers(name, results[name], len(completions)) for name in self.functions}

    def _wait(self, calls: dict[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="grade-kernels-rewards", daemon=True).start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        future = asyncio.run_coroutine_threadsafe(_all(calls), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # so that Ctrl-C leaves no request behind
            raise


async def _all(calls: dict[str, Callable[[], Awaitable[Any]]]) -> dict[str, Any]:
    """All results; where one fails the others are cancelled, and its error is raised."""

    async def one(name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        with _naming(name):
            return await call()

    tasks = {name: asyncio.ensure_future(one(name, call)) for name, call in calls.items()}
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks.values():
            if task.done():
                task.result()  # raises the error of a function that failed
        return {name: task.result() for name, task in tasks.items()}
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


def _itself(awaitable: Awaitable[Any]) -> Awaitable[Any]:
    return awaitable


def numbers(name: str, values: Any, count: int) -> list[float]:
    """A function's result as one float per completion; NaN for None."""
    got = len(values) if hasattr(values, "__len__") else type(values).__name__
    if got != count:
        raise ValueError(f"{name} must return one number per completion ({count}), got {got}")
    return [float("nan") if value is None else float(value) for value in values]


def _wanted(function: Any, extras: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those extras that a function names."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    return {name: value for name, value in extras.items() if name not in given and name in parameters}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds a note to an error that says in which reward it happened.

    Python 3.10 has no notes, so there a line is written to the terminal. That can go with Python 3.10.
    """
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(f"in the reward {name}")
        else:
            sys.stderr.write(f"in the reward {name}: {type(error).__name__}: {error}\n")
        raise
