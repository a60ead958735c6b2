"""Calls that nothing looks at on their way: there an operation's kernel is called as it is, without torch's dispatcher.

The dispatcher takes longer than the kernels do for a few small rows. It is needed where torch must see an operation:
while a call is compiled, exported or traced, under modes and transforms, in a profile, and for subclasses of tensors.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch.autograd import forward_ad

__all__ = ["ORDINARY", "undisturbed"]

ORDINARY = (torch.Tensor, torch.nn.Parameter)  # types of tensors that do not look at operations either


def undisturbed() -> bool:
    """Whether nothing in this thread looks at operations: no compiler, tracer, mode, transform, autocast or profiler."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._autograd._profiler_enabled()
        and forward_ad._current_level < 0
        and (
            torch._C._dispatch_tls_local_include_set().raw_repr(),
            torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        )
        in _keys_undisturbed()
    )


@functools.cache
def _keys_undisturbed() -> frozenset[tuple[int, int]]:
    """Keys that a thread adds to those of tensors, and those that it leaves out: of a new thread, and in inference mode."""
    found = []

    def look() -> None:
        for inference in (False, True):
            with torch.inference_mode(inference):
                added, left_out = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
                found.append((added.raw_repr(), left_out.raw_repr()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return frozenset(found)
