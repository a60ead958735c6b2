"""vLLM: in the trainer's own process, and the transfer of weights to a server.

None of this has been run: it needs vLLM and its GPUs. Calls and requests follow vLLM's documentation of 0.28 to 0.32. vLLM
is imported where it is asked for, and nowhere else.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grade_kernels.training.engines.server import CompletionsServer, SentWeights, always_suppressed
from grade_kernels.training.model import is_sharded, unwrap
from grade_kernels.training.prompt_tokens import Prompt

if TYPE_CHECKING:
    from grade_kernels.training.trainer import GRADETrainer

__all__ = ["VLLMColocated", "VLLMWeights", "named_weights"]


class VLLMColocated:
    """Draws completions with a vLLM engine on the trainer's own GPU, which gets the weights wherever they have changed.

    It is for a trainer of one process.

    Args:
        model: what vLLM loads, which must be the policy's architecture; its weights are overwritten.
        options: of `vllm.LLM`, such as `gpu_memory_utilization`.

    Raises:
        ValueError: tokens that are suppressed only at the beginning of completions, or weights that can not be handed over.
    """

    def __init__(self, model: str, **options: Any) -> None:
        # By default vLLM computes in a process of its own, whose model can not be reached from here.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        # Log-probabilities are then those of the distribution that is drawn from.
        self.llm: Any = LLM(model=model, logprobs_mode="processed_logprobs", **options)
        self._sent = SentWeights()

    def __call__(self, prompts: list[Prompt], trainer: GRADETrainer) -> dict[str, Any]:
        """The completions of a batch, by the signature of rollout functions."""
        from vllm import SamplingParams

        request = trainer.rollout_request
        suppressed = always_suppressed(request)
        self._sent.renew(trainer, lambda: self._load(request.model))
        settings = [
            SamplingParams(
                n=1, temperature=request.temperature, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, seed=seed,
                max_tokens=request.max_completion_length, logprobs=0, stop_token_ids=list(request.eos_token_id),
                logit_bias=dict.fromkeys(suppressed, -100.0) or None,
            )
            for seed in request.seeds
        ]  # fmt: skip
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in request.prompt_ids], sampling_params=settings, use_tqdm=False
        )
        drawn = [output.outputs[0] for output in outputs]
        return {
            "prompt_ids": [list(output.prompt_token_ids) for output in outputs],
            "completion_ids": [list(one.token_ids) for one in drawn],
            "logprobs": [
                [place[token].logprob for token, place in zip(one.token_ids, one.logprobs, strict=True)]
                for one in drawn
            ],
            "temperature": request.temperature,
        }

    def _load(self, model: nn.Module) -> None:
        """Bring the weights into the engine."""
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(named_weights(model))
        self.llm.reset_prefix_cache()  # what it holds was computed with other weights


class VLLMWeights:
    """Sends the policy's weights to `vllm serve` by NCCL: `CompletionsServer(url, sync=VLLMWeights(url))`.

    Of several processes that train, the first one sends them. The server needs `VLLM_SERVER_DEV_MODE=1` and
    `--weight-transfer-config '{"backend": "nccl"}'`, and GPUs of its own.

    Args:
        url: of the server.
        port: where trainer and server meet.
        timeout: seconds until a request must be answered.

    Raises:
        ValueError: weights that can not be sent, see `named_weights`.
    """

    def __init__(self, url: str, *, port: int = 51216, timeout: float = 600.0) -> None:
        self.server, self.port = CompletionsServer(url, timeout=timeout, tries=1), port
        self._group: Any = None

    def __call__(self, trainer: GRADETrainer) -> None:
        """Send the weights as they are now."""
        weights = named_weights(trainer.rollout_request.model)
        if not trainer.accelerator.is_main_process:
            return
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        group = self._joined()
        announced = {
            "names": [name for name, _ in weights],
            "dtype_names": [str(weight.dtype).removeprefix("torch.") for _, weight in weights],
            "shapes": [list(weight.shape) for _, weight in weights],
        }
        self.server.post("/start_weight_update", {})
        # The server waits for the tensors while it handles the request, so both run at the same time.
        with ThreadPoolExecutor(max_workers=1) as pool:
            answer = pool.submit(self.server.post, "/update_weights", {"update_info": announced})
            packed_nccl_broadcast_producer(
                iterator=iter(weights), group=group, src=0, post_iter_func=lambda named: named[1]
            )
            answer.result()
        self.server.post("/finish_weight_update", {})
        self.server.post("/reset_prefix_cache", {})

    def _joined(self) -> Any:
        """The group of trainer and server's workers, made at the first call."""
        if self._group is None:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init
            from vllm.utils.network_utils import get_ip

            workers = self.server.get("/get_world_size")["world_size"]
            meeting = {
                "master_address": get_ip(), "master_port": self.port, "rank_offset": 1, "world_size": workers + 1,
                "packed": True,
            }  # fmt: skip
            with ThreadPoolExecutor(max_workers=1) as pool:
                answer = pool.submit(self.server.post, "/init_weight_transfer_engine", {"init_info": meeting})
                self._group = trainer_init(meeting)
                answer.result()
        return self._group


def named_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The weights of a model by the names that its checkpoints have.

    Raises:
        ValueError: an adapter that is not merged, whose layers have other names, or layers that are spread over processes.
    """
    own = unwrap(model)
    if is_sharded(own):
        raise ValueError(
            "weights can not be sent to vLLM while the policy's layers are spread over processes (FSDP2, ZeRO-3)"
        )
    if any(".lora_" in name for name, _ in own.named_parameters()):
        raise ValueError(
            "an adapter must be merged before its weights are sent: vLLM knows the base model's names alone"
        )
    return [(name, parameter.detach()) for name, parameter in own.named_parameters()]
