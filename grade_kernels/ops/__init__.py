"""A room per operation: the public function and its checks, its torch.library registration, its autograd formula."""

from grade_kernels.ops.gumbel_sample import gumbel_sample
from grade_kernels.ops.gumbel_softmax import gumbel_softmax, gumbel_ste
from grade_kernels.ops.gumbel_ste_embedding import GumbelSTEEmbedding, gumbel_ste_embedding
from grade_kernels.ops.linear_gumbel_sample import linear_gumbel_sample
from grade_kernels.ops.linear_gumbel_ste import LinearGumbelSTE, linear_gumbel_ste
from grade_kernels.ops.linear_statistics import linear_entropy, linear_kl, linear_logprobs

__all__ = [
    "GumbelSTEEmbedding",
    "LinearGumbelSTE",
    "gumbel_sample",
    "gumbel_softmax",
    "gumbel_ste",
    "gumbel_ste_embedding",
    "linear_entropy",
    "linear_gumbel_sample",
    "linear_gumbel_ste",
    "linear_kl",
    "linear_logprobs",
]
