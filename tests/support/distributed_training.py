"""Two gloo processes: `torchrun --nproc-per-node 2 -m tests.support.distributed_training MODE PATH`."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import accelerate.accelerator
import torch
import torch.distributed as dist

from grade_kernels import GumbelNoise
from grade_kernels.training import grade_loss
from tests.support.trainers import PROMPTS, build, stream, weights
from tests.support.training_models import BagReward, policy, prompts, worst_difference

SETTINGS = {"eps": 0.05, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}


def trainer_run(path: Path, streaming: bool = False) -> None:
    """Train under DDP, each process with half of the batch; the first one saves the weights and what was logged."""
    dataset = stream() if streaming else None
    trainer = build(path, per_device_train_batch_size=2, dataset=dataset, **SETTINGS)
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save({"weights": weights(trainer), "log": trainer.state.log_history[0]}, path / "result.pt")


def sharded_trainer_run(path: Path) -> None:
    """The same under FSDP2 as accelerate sets it up, with an evaluation."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from datasets import Dataset

    class Sharding(AcceleratorState):
        """Accelerate shards on accelerators only; as far as it asks, these two processes are such."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            if kwargs.get("fsdp_plugin") is not None:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            super().__init__(*args, **kwargs)

    accelerate.accelerator.AcceleratorState = Sharding
    wrapping = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    trainer = build(
        path, model=policy("llama", dtype=torch.float32), per_device_train_batch_size=2, fsdp=True, fsdp_config=wrapping,
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}), **SETTINGS,
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.model, torch.distributed.fsdp.FSDPModule)
    result = {"weights": {name: p.full_tensor() for name, p in trainer.model.state_dict().items()}}
    result |= {"log": trainer.state.log_history[1], "metrics": trainer.evaluate()}
    if trainer.is_world_process_zero():
        torch.save(result, path / "result.pt")


def fsdp_step(path: Path) -> None:
    """A loss and its gradient under FSDP2, where completions end at different times, against the same in one process."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    for family in ("gpt2", "llama"):
        model, plain, reference = (policy(family, seed=seed) for seed in (0, 0, 1))
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
        ids, mask = prompts((4, 2, 3, 5))
        options = {"max_new_tokens": 12, "eps": 0.0, "beta": 0.1, "ref_model": reference, "feedback_hops": "exact"}
        options |= {"eos_token_id": list(range(2, 9))}
        whole = grade_loss(plain, BagReward(), ids, mask, noise=GumbelNoise(4), **options)
        whole.loss.backward()
        lengths = whole.completion_mask.sum(1).view(2, 2).amax(1)
        assert lengths[0] != lengths[1], "the processes end at one time, so the test shows nothing about it"
        mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        noise = GumbelNoise(4, torch.arange(4)[mine])
        grade_loss(model, BagReward(), ids[mine], mask[mine], noise=noise, **options).loss.backward()
        truth = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        ours = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        difference = worst_difference(ours, truth)
        assert difference < (1e-10 if family == "gpt2" else 1e-6), (family, difference)
    if dist.get_rank() == 0:
        (path / "passed").write_text("yes")


if __name__ == "__main__":
    modes = {
        "ddp": trainer_run,
        "ddp-stream": partial(trainer_run, streaming=True),
        "fsdp": fsdp_step,
        "fsdp-trainer": sharded_trainer_run,
    }
    modes[sys.argv[1]](Path(sys.argv[2]))
    dist.barrier()  # whoever leaves first closes connections that the other may still be reading
    dist.destroy_process_group()
    # A thread of gloo may still hold a tensor of the last collective; letting go of it while Python shuts down aborts.
    sys.stdout.flush()
    os._exit(0)
