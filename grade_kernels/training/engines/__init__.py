"""Engines that draw completions for `GRADETrainer(rollout_func=...)`; each is imported only by who asks for it.

| module | engine |
|---|---|
| `generate` | transformers' `generate` and its continuous batching, on the policy itself |
| `server` | a server that speaks vLLM's `/v1/completions`: `vllm serve`, and llama.cpp's as far as it does |
| `vllm` | vLLM in the trainer's own process, and the transfer of weights to a server |

Every request tells the engine all settings of sampling, since an engine's own defaults, or those of the model's
generation config, would cut the distribution off. What comes back is checked by `grade_kernels.training.rollout_func`.
"""

__all__: list[str] = []
