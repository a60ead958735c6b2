"""A room per operation: the public function and its checks, its torch.library registration, its autograd formula."""

from grade_kernels.ops.gumbel_sample import gumbel_sample
from grade_kernels.ops.gumbel_softmax import gumbel_softmax, gumbel_ste
from grade_kernels.ops.gumbel_ste_embedding import GumbelSTEEmbedding, gumbel_ste_embedding

__all__ = ["GumbelSTEEmbedding", "gumbel_sample", "gumbel_softmax", "gumbel_ste", "gumbel_ste_embedding"]
