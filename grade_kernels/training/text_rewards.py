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

_GIVEN = ("prompts", "completions", "completion_ids")
HELPERS = ("trainer_state", "log_metric", "log_extra")
"""What the trainer gives to a function of text that names it among its parameters, as in TRL."""


def is_async(function: Any) -> bool:
    """Whether a call returns a coroutine: an `async def`, an object whose `__call__` is one, a partial of either."""
    return any(inspect.iscoroutinefunction(one) for one in _called(function))


def _called(function: Any) -> tuple[Any, Any]:
    """A function without its partials, and what runs where it is an object that is called."""
    while isinstance(function, functools.partial):
        function = function.func
    method = function.forward if isinstance(function, nn.Module) else getattr(function, "__call__", None)  # noqa: B004
    return function, method


class TextRewards:
    """Functions `f(prompts, completions, completion_ids, **columns)` that return a number, or None, per completion.

    Asynchronous ones wait at the same time, on an event loop that stays the same for the whole training, as clients of
    network services want it. That loop has a thread of its own, so it does not matter whether the caller has one too
    (Jupyter).

    Args:
        functions: by the name that metrics and errors call them.

    Raises:
        TypeError: a generator, or a function that does not take what it is given.
    """

    def __init__(self, functions: dict[str, Callable[..., Any]]) -> None:
        for name, function in functions.items():
            for one in _called(function):
                if inspect.isasyncgenfunction(one) or inspect.isgeneratorfunction(one):
                    raise TypeError(f"{name} must return one number per completion, but it is a generator (it yields)")
        self.functions = functions
        self.check_columns(None)
        self._loop: asyncio.AbstractEventLoop | None = None

    def check_columns(self, columns: Sequence[str] | None) -> None:
        """Every function takes what it will be given, or TypeError.

        Args:
            columns: of the data set; None where they are not known.
        """
        for name, function in self.functions.items():
            try:
                parameters = inspect.signature(_signed(function)).parameters
            except (TypeError, ValueError):  # a builtin without a signature
                continue
            kinds = {parameter.kind for parameter in parameters.values()}
            only_by_place = inspect.Parameter.POSITIONAL_ONLY
            by_name = {key for key, parameter in parameters.items() if parameter.kind is not only_by_place}
            given = [*_GIVEN, *(columns or ())]
            if inspect.Parameter.VAR_KEYWORD not in kinds and (missing := [key for key in given if key not in by_name]):
                raise TypeError(
                    f"{name} must take {', '.join(given)} as keywords, but its signature has no {', '.join(missing)} and no "
                    "**kwargs"
                )
            variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            needed = [
                key
                for key, parameter in parameters.items()
                if parameter.default is inspect.Parameter.empty and parameter.kind not in variable
                if key not in (*given, *HELPERS) or parameter.kind is only_by_place
            ]
            if needed and (columns is not None or any(parameters[key].kind is only_by_place for key in needed)):
                raise TypeError(
                    f"{name} needs {', '.join(needed)}, but is given {', '.join(given)} as keywords: the data set has no "
                    "such column"
                )

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
            call = functools.partial(function, **given, **_wanted(function, extras))
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


def _signed(function: Any) -> Any:
    """What has the signature of a call: a module's is its forward's."""
    return function.forward if isinstance(function, nn.Module) else function


def _wanted(function: Any, extras: dict[str, Any]) -> dict[str, Any]:
    """Those extras that a function names. No column of a data set may have the name of one (`HELPERS`)."""
    try:
        parameters = inspect.signature(_signed(function)).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    return {name: value for name, value in extras.items() if name in parameters}


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
