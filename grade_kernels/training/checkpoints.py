"""Checkpoints that are either complete or absent.

A run that is stopped while it writes would leave half a checkpoint under a name that promises a whole one. So a checkpoint
is written into a folder beside (`staging`), sealed by a list of its files (`seal`), and renamed into place (`settle`).
Before it is used, its files are compared with the list (`damage`).

A checkpoint without a seal was written by another trainer, or its seal was removed. With `allow_partial_checkpoint` a run
may go on from it: weights and the trainer's state must be there, and what else is missing begins anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

__all__ = [
    "SEAL",
    "absent",
    "advance",
    "complete_checkpoints",
    "damage",
    "is_sealed",
    "rotate",
    "seal",
    "settle",
    "sound",
    "staging",
]

logger = logging.getLogger(__name__)

SEAL = "grade_checkpoint.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(
    r"(model|pytorch_model|adapter_model).*\.(safetensors|bin|json)|pytorch_model_fsdp.*|global_step\d+"
)
# Other files that a run can not go on without where they were written: an adapter is made by its configuration, a
# reference that was copied has its values nowhere else, and DeepSpeed finds its folder by the name in `latest`.
_NEEDED = (STATE, "adapter_config.json", "grade_reference.safetensors", "latest")
_OPTION = "allow_partial_checkpoint=True resumes from what is there"


def seal(directory: Path) -> None:
    """List every file of a directory with its size and digest in it, and flush all of them to the disk."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SEAL):
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _flush(path)
    path = directory / SEAL
    path.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _flush(path)
    _flush(directory)


def settle(staged: Path, target: Path) -> None:
    """Give a sealed directory its name; one that bore it before goes only when the new one is there."""
    replaced = staged.with_name("replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(staged, target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def staging(run: Path, *, writes: bool) -> Iterator[Path]:
    """A folder beside a run's checkpoints in which one is written before it gets its name; gone on leaving.

    Args:
        run: the folder of the run's checkpoints.
        writes: whether this process is the one that clears the folder.
    """
    folder = run / ".incomplete"
    if writes:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        if writes:
            shutil.rmtree(folder, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Drop the oldest checkpoints of a run beyond a limit, never the best one.

    Args:
        run: the folder of the run's checkpoints.
        limit: how many stay, the best one among them; None or 0 keeps all.
        best: where the best one is, if any was found.
    """
    if limit is None or limit <= 0:
        return
    kept = 0
    found = complete_checkpoints(run)
    # By age and not by step: the directory may hold later steps of an earlier run.
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if best is not None and Path(best) == path:
            continue
        kept += 1
        if kept > max(limit - (best is not None), 1):
            shutil.rmtree(path, ignore_errors=True)


def sound(choice: str | bool | None, run: Path, *, allow_partial: bool = False) -> str | None:
    """The checkpoint that a run goes on from; None where none is asked for.

    Args:
        choice: a directory, or True for the latest one that is sound.
        run: the folder of the run's checkpoints.
        allow_partial: see `damage`.

    Raises:
        ValueError: the directory is damaged, or none of the run's is sound.
    """
    if not choice:
        return None
    if choice is not True:
        if wrong := damage(Path(choice), allow_partial):
            raise ValueError(f"{choice} can not be resumed from: {wrong}")
        return str(choice)
    found, reasons = complete_checkpoints(run), []
    for path in found:
        wrong = damage(path, allow_partial)
        if wrong is None:
            return str(path)
        reasons.append(f"{path.name}: {wrong}")
        if path != found[-1]:
            logger.warning("%s can not be resumed from: %s; trying the one before", path, wrong)
    names = ", ".join(path.name for path in found) or "none at all"
    because = f": {'. '.join(reasons)}" if reasons else ""
    raise ValueError(f"No sound checkpoint in {run} (found {names}){because}")


def damage(directory: Path, allow_partial: bool = False) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is as it was sealed.

    Args:
        directory: of the checkpoint.
        allow_partial: take one without a seal, or without files that a run can go on without (the optimizer's, the
            schedule's, random states, the tokenizer's). Files that are there must be whole all the same.
    """
    if not directory.is_dir():
        return "there is no such directory"
    try:
        files = json.loads((directory / SEAL).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = directory / name
            if not path.is_file():
                optional = not _is_needed(name)
                if optional and allow_partial:
                    continue
                return f"{name} is missing" + (f", which was removed since; {_OPTION}" if optional else "")
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} has other contents than were written"
    except FileNotFoundError:
        return _damage_unsealed(directory, allow_partial)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL} can not be read ({error})"
    lacking = absent(directory)
    if lacking and not allow_partial:
        return f"it was written without {' and '.join(lacking)} (save_only_model), which would begin anew; {_OPTION}"
    return None


def _is_needed(name: str) -> bool:
    """Whether a run can not go on without a file of a checkpoint, by its name in the seal."""
    parts = name.split("/")
    return parts[-1] in _NEEDED or any(_WEIGHTS.fullmatch(part) for part in parts)


def _damage_unsealed(directory: Path, allow_partial: bool) -> str | None:
    """What is wrong with a checkpoint without a seal; None if it may be resumed from and can be."""
    what = f"it has no {SEAL}, so another trainer wrote it, or that file was removed"
    missing = [] if any(_WEIGHTS.fullmatch(path.name) for path in _two_levels(directory)) else ["no weights"]
    missing += [] if (directory / STATE).is_file() else [f"no {STATE}, which says at which step it is"]
    if missing:
        return f"{what}, and it holds {' and '.join(missing)}: use it as model, not to resume from"
    if broken := _broken(directory):
        return f"{what}, and {broken}"
    if allow_partial:
        return None
    lacking = absent(directory)
    state = f"no {' and no '.join(lacking)}" if lacking else "an optimizer's and a schedule's state"
    return f"{what}; it holds weights, {STATE} and {state}; {_OPTION}"


def _two_levels(directory: Path) -> list[Path]:
    """What is in a directory and in its folders, where adapters with a name of their own are."""
    return [*directory.glob("*"), *directory.glob("*/adapter_model.*")]


def _broken(directory: Path) -> str | None:
    """A file of weights that is missing or cut off, where its format tells."""
    for path in sorted(directory.glob("*.index.json")):
        try:
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path.name} can not be read ({error})"
        for shard in sorted(shards):
            if not (directory / shard).is_file():
                return f"{shard} is missing, which {path.name} names"
    for path in sorted(directory.rglob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt"):
                pass
        except Exception as error:  # early releases of safetensors raise an error of a class that is not public
            return f"{path.relative_to(directory).as_posix()} can not be read ({error})"
    try:
        json.loads((directory / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{STATE} can not be read ({error})"
    return None


def is_sealed(directory: Path) -> bool:
    """Whether a checkpoint has a seal, so that this trainer wrote it."""
    return (directory / SEAL).is_file()


def absent(directory: Path) -> list[str]:
    """Which of the optimizer's and the schedule's files a checkpoint lacks, without which both begin anew."""
    names = [path.name for path in directory.iterdir()]
    deepspeed = any(name.startswith("global_step") for name in names)  # whose folder holds both
    found = {stem: deepspeed or any(name.startswith(stem) for name in names) for stem in ("optimizer", "scheduler")}
    return [f"{stem}.pt" for stem, there in found.items() if not there]


def advance(scheduler: Any, steps: int) -> None:
    """Take a fresh schedule of the learning rate to a step; one that goes by a metric stays where it is."""
    if scheduler is None or hasattr(scheduler, "metrics") or "metrics" in scheduler.step.__code__.co_varnames:
        return
    with warnings.catch_warnings():
        # PyTorch warns of a schedule that moves before the optimizer's first step, which is what is wanted here.
        warnings.simplefilter("ignore")
        for _ in range(steps):
            scheduler.step()


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Directories `checkpoint-<step>` of a run, the latest first; damaged ones included."""
    found = []
    if output_dir.is_dir():
        for path in output_dir.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
