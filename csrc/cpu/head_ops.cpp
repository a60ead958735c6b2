// Registers the head's and the gather kernels with torch (stable ABI): pieces of a chunk over threads, and their merging.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <vector>

#include "cpu/gather.h"
#include "cpu/head.h"
#include "cpu/isa.h"
#include "cpu/products.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace gk {
namespace {

enum Kind { kSample, kScores, kSoftmax };

// A chunk is cut into at most so many pieces. Their number must not depend on that of threads, or results would.
constexpr int64_t kPieces = 8;
int64_t pieces_of(int64_t groups) { return std::clamp<int64_t>(64 / std::max<int64_t>(1, groups), 1, kPieces); }

// Statistics of all chunks so far; rows of the float tensor `state`.
struct State {
  float *score_max, *score_sum, *logit_max, *logit_sum, *moment;
  int64_t* id;
  int32_t *bad, *count, *overflow;
  Candidate* candidates;
  int64_t capacity;
};

float merged_scale(float from, float to, float tau) { return from == to ? 1.0f : std::exp((from - to) / tau); }

// Adds a piece's sum that counts from its own maximum.
void merge_sum(float& max, float& sum, float piece_max, float piece_sum, float tau) {
  const float top = std::max(max, piece_max);
  sum = (sum > 0 ? sum * merged_scale(max, top, tau) : 0.0f) + (piece_sum > 0 ? piece_sum * merged_scale(piece_max, top, tau) : 0.0f);
  max = top;
}

float uniform(uint32_t word) { return (float(word * 0x9E3779B1u) + 0.5f) * 0x1p-32f; }

// Which candidates of a row its normaliser so far does not rule out: exp((score - max) / tau) > uniform * eps * sum.
class Filter {
 public:
  Filter(float max, float sum, float tau, float eps)
      : max_(max), tau_(tau), bound_(eps * sum), scale_(1.4426950408889634 / tau), limit_(std::log2(double(bound_))) {}

  bool keeps(const Candidate& candidate) const {
    const float u = uniform(candidate.word);
    // In units of log2; a float's bits, read as an integer, are its log2 less at most 0.0861. What that leaves open, and
    // what rounding may, is decided by the exponential itself.
    const double clear = (double(candidate.score) - max_) * scale_ - (std::bit_cast<int32_t>(u) * 0x1p-23 - 127.0) - limit_;
    if (__builtin_expect(clear > -1e-3 && clear < 0.0871, 0)) return std::exp((candidate.score - max_) / tau_) > u * bound_;
    return clear > 0.0;
  }

  // Keeps those of a list; returns how many.
  int32_t keep(Candidate* list, int32_t count) const {
    int32_t kept = 0;
    for (int32_t i = 0; i < count; ++i) {
      const Candidate candidate = list[i];
      list[kept] = candidate;  // no branch, which nothing could predict
      kept += keeps(candidate);
    }
    return kept;
  }

 private:
  float max_, tau_, bound_;
  double scale_, limit_;
};

void append(State& state, int64_t row, const Filter& filter, const Candidate& added) {
  if (state.overflow[row]) return;
  Candidate* list = state.candidates + row * state.capacity;
  if (state.count[row] == state.capacity) {
    state.count[row] = filter.keep(list, state.count[row]);
    if (state.count[row] >= state.capacity - state.capacity / 8) {  // compaction no longer pays: the dense path will
      state.overflow[row] = 1;
      state.count[row] = 0;
      return;
    }
  }
  list[state.count[row]] = added;
  state.count[row] += filter.keeps(added);
}

void merge_row(Kind kind, const HeadArgs& args, int64_t row, const HeadPiece* pieces, int64_t groups, State& state) {
  const int64_t lane = row % kHeadLanes;
  const float tau = args.tau[row];
  for (int64_t i = 0; i < pieces_of(groups); ++i) {
    const HeadPiece& piece = pieces[i * groups];
    state.bad[row] |= piece.bad[lane];
    if (kind != kSoftmax && piece.score_max[lane] > state.score_max[row]) state.id[row] = args.in.first_token + piece.id[lane];
    if (kind == kSample) {
      state.score_max[row] = std::max(state.score_max[row], piece.score_max[lane]);
    } else {
      const float old_max = state.score_max[row], old_sum = state.score_sum[row], old_ref = state.logit_max[row];
      merge_sum(state.score_max[row], state.score_sum[row], piece.score_max[lane], piece.score_sum[lane], tau);
      if (kind == kSoftmax) {
        // A moment counts from its maxima.
        const float top = state.score_max[row], ref_top = std::max(old_ref, piece.logit_max[lane]);
        const auto moved = [&](float moment, float max, float ref_max, float sum) {
          const float scale = merged_scale(max, top, tau);
          if (!(sum > 0 && scale > 0)) return 0.0f;
          return scale * (moment + sum * (((max - top) - (args.ref ? ref_max - ref_top : 0.0f)) / tau));
        };
        state.moment[row] =
            moved(state.moment[row], old_max, old_ref, old_sum) +
            moved(piece.moment[lane], piece.score_max[lane], piece.logit_max[lane], piece.score_sum[lane]);
      }
    }
    if (kind != kSoftmax || args.ref) {
      merge_sum(state.logit_max[row], state.logit_sum[row], piece.logit_max[lane], piece.logit_sum[lane],
                kind == kSoftmax ? tau : 1.0f);
    }
  }
}

// The candidates that pieces of a group of rows found, after its rows are merged.
void merge_found(const HeadArgs& args, int64_t group, const HeadPiece* pieces, int64_t groups, const Found* found,
                 int64_t found_stride, State& state) {
  const int64_t first = group * kHeadLanes;
  std::vector<Filter> filters;
  for (int64_t row = first; row < std::min(args.in.rows, first + kHeadLanes); ++row) {
    filters.emplace_back(state.score_max[row], state.score_sum[row], args.tau[row], args.eps);
  }
  for (int64_t i = 0; i < pieces_of(groups); ++i) {
    for (int64_t k = 0; k < pieces[i * groups].found; ++k) {
      const Found& one = found[i * found_stride + k];
      const size_t lane = size_t(one.place % kHeadLanes);
      if (lane >= filters.size()) continue;  // padding
      append(state, first + int64_t(lane), filters[lane], {int32_t(args.in.first_token) + one.place / kHeadLanes, one.word, one.score});
    }
  }
}

void head_chunk(int64_t kind_, Tensor logits, std::optional<Tensor> ref, std::optional<Tensor> bias,
                std::optional<Tensor> ref_bias, double softcap, int64_t rows, Tensor tau, Tensor seed,
                std::optional<Tensor> row_ids, int64_t vocab_start, int64_t first_token, double eps, Tensor state_,
                Tensor ids, Tensor flags, Tensor candidates, Tensor scratch) {
  const Kind kind = static_cast<Kind>(kind_);
  const int64_t tokens = logits.size(0), groups = (rows + kHeadLanes - 1) / kHeadLanes;
  STD_TORCH_CHECK(logits.stride(1) == 1 && logits.size(1) >= groups * kHeadLanes, "grade_kernels: chunk layout");
  float* values = mutable_data<float>(state_);
  int32_t* marks = mutable_data<int32_t>(flags);
  State state{values, values + rows, values + 2 * rows, values + 3 * rows, values + 4 * rows, mutable_data<int64_t>(ids),
              marks, marks + rows, marks + 2 * rows, mutable_data<Candidate>(candidates),
              eps > 0 ? candidates.size(1) / 3 : 0};
  const HeadArgs args{{logits.const_data_ptr(), dtype_of(logits), tokens, logits.stride(0), rows, first_token,
                       data<float>(bias), float(softcap), noise_of(seed, row_ids, vocab_start)},
                      ref ? ref->const_data_ptr() : nullptr,
                      data<float>(ref_bias),
                      data<float>(tau),
                      state.score_max,
                      state.score_sum,
                      float(eps)};
  const HeadKernels& kernels = GK_KERNELS_OF(kHead);
  const auto kernel = kind == kSample ? kernels.sample : kind == kScores ? kernels.scores : kernels.softmax;
  const int64_t count = pieces_of(groups), piece_tokens = (tokens + count - 1) / count, piece_room = piece_tokens * kHeadLanes;
  std::vector<HeadPiece> pieces(size_t(count * groups));
  Found* found = mutable_data<Found>(scratch);
  parallel_rows(count * groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i % groups, first = std::min(tokens, i / groups * piece_tokens);
      HeadPiece& piece = pieces[size_t(i)];
      piece = HeadPiece{};
      kernel(args, group, first, std::min(tokens, first + piece_tokens), piece, found ? found + i * piece_room : nullptr);
    }
  });
  parallel_rows(groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kHeadLanes;
      for (int64_t row = first; row < std::min(rows, first + kHeadLanes); ++row) {
        merge_row(kind, args, row, pieces.data() + group, groups, state);
      }
      if (eps > 0) merge_found(args, group, pieces.data() + group, groups, found + group * piece_room, groups * piece_room, state);
    }
  });
}

// Last filter, with the final normaliser; a candidate's score becomes its probability.
void head_finish(Tensor tau_, double eps, Tensor state_, Tensor flags, Tensor candidates) {
  const int64_t rows = tau_.numel(), capacity = candidates.size(1) / 3;
  const float *tau = data<float>(tau_), *max = data<float>(state_);
  int32_t* marks = mutable_data<int32_t>(flags);
  Candidate* all = mutable_data<Candidate>(candidates);
  parallel_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Candidate* list = all + row * capacity;
      const float sum = max[rows + row];
      int32_t kept = 0;
      for (int32_t i = 0; i < marks[rows + row]; ++i) {
        const float p = std::exp((list[i].score - max[row]) / tau[row]) / sum;
        if (!(p > uniform(list[i].word) * float(eps))) continue;
        list[kept] = list[i];
        list[kept++].score = p;
      }
      marks[rows + row] = kept;
    }
  });
}

void head_support(Tensor candidates, Tensor offsets_, Tensor tokens_, Tensor p_) {
  const int64_t rows = offsets_.numel() - 1, capacity = candidates.size(1) / 3;
  const int64_t* offsets = data<int64_t>(offsets_);
  const Candidate* all = data<Candidate>(candidates);
  int64_t* tokens = mutable_data<int64_t>(tokens_);
  float* p = mutable_data<float>(p_);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = offsets[row]; k < offsets[row + 1]; ++k) {
      const Candidate& candidate = all[row * capacity + k - offsets[row]];
      tokens[k] = candidate.token;
      p[k] = candidate.score;
    }
  }
}

// A stable order of entries by token, and how many each token has (`counts`, zeros at first).
void token_order(Tensor tokens_, Tensor order_, Tensor counts_) {
  const int64_t entries = tokens_.numel(), vocab = counts_.numel();
  const int64_t* tokens = data<int64_t>(tokens_);
  int64_t *order = mutable_data<int64_t>(order_), *counts = mutable_data<int64_t>(counts_);
  for (int64_t i = 0; i < entries; ++i) ++counts[tokens[i]];
  std::vector<int64_t> place(size_t(vocab), 0);
  for (int64_t token = 0, before = 0; token < vocab; before += counts[token++]) place[size_t(token)] = before;
  for (int64_t i = 0; i < entries; ++i) order[place[size_t(tokens[i])]++] = i;
}

void gather_dot(Tensor x, Tensor table, Tensor rows, Tensor tokens, Tensor out) {
  const GatherArgs args{x.const_data_ptr(), dtype_of(x), x.stride(0), table.const_data_ptr(), dtype_of(table),
                        table.stride(0), table.size(1), data<int64_t>(rows), data<int64_t>(tokens), nullptr, nullptr,
                        mutable_data<float>(out)};
  parallel_rows(tokens.numel(), [&](int64_t begin, int64_t end) { GK_KERNELS_OF(kGather).dot(args, begin, end); });
}

void gather_sum(Tensor values, Tensor table, Tensor offsets, Tensor tokens, Tensor out) {
  const int64_t width = table.size(1), blocks = (width + kGatherBlock - 1) / kGatherBlock;
  const GatherArgs args{nullptr, Dtype::kFloat, 0, table.const_data_ptr(), dtype_of(table), table.stride(0), width,
                        nullptr, data<int64_t>(tokens), data<int64_t>(offsets), data<float>(values),
                        mutable_data<float>(out)};
  parallel_rows((offsets.numel() - 1) * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kGatherBlock;
      GK_KERNELS_OF(kGather).sum(args, i / blocks, first, std::min(width, first + kGatherBlock));
    }
  });
}

// x @ table.T for few rows of x, float32.
void few_product(Tensor x, Tensor table, Tensor out) {
  const int64_t vocab = table.size(0), blocks = (vocab + kProductBlock - 1) / kProductBlock;
  const ProductArgs args{data<float>(x), x.size(0), x.stride(0), data<float>(table), table.stride(0), table.size(1),
                         mutable_data<float>(out), out.stride(0)};
  parallel_rows(blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      GK_KERNELS_OF(kGather).product(args, i * kProductBlock, std::min(vocab, (i + 1) * kProductBlock));
    }
  });
}

// See TermsArgs: out is [2, N, C], weighted first; sums is [2, N]: total and dot.
void weight_terms(Tensor weights, Tensor dy, std::optional<Tensor> slope, Tensor out, Tensor sums, Tensor shift) {
  const int64_t rows = weights.size(0), bytes = out.element_size() * out.stride(0);
  char* terms = static_cast<char*>(out.mutable_data_ptr());
  float* totals = mutable_data<float>(sums);
  const TermsArgs args{data<float>(weights), data<float>(dy), data<float>(slope), weights.stride(0), dy.stride(0),
                       slope ? slope->stride(0) : 0, weights.size(1), terms, terms + bytes, dtype_of(out), out.stride(1),
                       totals, totals + rows, mutable_data<float>(shift)};
  parallel_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) GK_KERNELS_OF(kGather).terms(args, row);
  });
}

// Whether this machine's own kernels, rather than torch's, multiply what is of x's dtype.
bool has_product(Tensor x) { return product_kernels(dtype_of(x)) != nullptr; }

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// 16-bit numbers of x as `packed_product` wants it.
int64_t packed_numbers(Tensor x) { return product_kernels(dtype_of(x))->packed_numbers(dtype_of(x), x.size(0), x.size(1)); }

void product_pack(Tensor x, Tensor packed) {
  const Packing args{x.const_data_ptr(), dtype_of(x), x.size(0), x.size(1), x.stride(0),
                     static_cast<uint16_t*>(packed.mutable_data_ptr())};
  const ProductKernels& kernels = *product_kernels(args.dtype);
  parallel_rows(blocks_of(args.rows, kernels.packed_rows), [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
}

// table @ x.T in `out`, with x's rows, padded to a multiple of 16, along its second dimension; or, if by_row, x @ table.T.
void packed_product(Tensor packed, int64_t rows, Tensor table, bool by_row, Tensor out) {
  const Product args{static_cast<const uint16_t*>(packed.const_data_ptr()), rows, table.const_data_ptr(), dtype_of(table),
                     table.size(0), table.size(1), table.stride(0), out.mutable_data_ptr(), dtype_of(out), out.stride(0),
                     by_row};
  const ProductKernels& kernels = *product_kernels(args.dtype);
  parallel_rows(blocks_of(args.tokens, kernels.tokens), [&](int64_t begin, int64_t end) { kernels.multiply(args, begin, end); });
}

// values @ table in `out`. False if a sum is not finite and stands for one that may be.
bool weighted_sum(Tensor values, Tensor table, Tensor out) {
  const WeightedSum args{values.const_data_ptr(), dtype_of(values), values.size(0), values.stride(0), table.const_data_ptr(),
                         dtype_of(table), table.size(0), table.size(1), table.stride(0), mutable_data<float>(out), out.stride(0)};
  const ProductKernels& kernels = *product_kernels(args.dtype);
  std::atomic<bool> exact = true;
  parallel_rows(blocks_of(args.width, kernels.columns), [&](int64_t begin, int64_t end) {
    if (!kernels.sum(args, begin, end)) exact = false;
  });
  return exact;
}

}  // namespace
}  // namespace gk

STABLE_TORCH_LIBRARY_FRAGMENT(grade_kernels_cpu, m) {
  m.def(
      "head_chunk(int kind, Tensor logits, Tensor? ref, Tensor? bias, Tensor? ref_bias, float softcap, int rows, "
      "Tensor tau, Tensor seed, Tensor? row_ids, int vocab_start, int first_token, float eps, Tensor(a!) state, "
      "Tensor(b!) ids, Tensor(c!) flags, Tensor(d!) candidates, Tensor(e!) scratch) -> ()");
  m.def("head_finish(Tensor tau, float eps, Tensor state, Tensor(a!) flags, Tensor(b!) candidates) -> ()");
  m.def("head_support(Tensor candidates, Tensor offsets, Tensor(a!) tokens, Tensor(b!) p) -> ()");
  m.def("token_order(Tensor tokens, Tensor(a!) order, Tensor(b!) counts) -> ()");
  m.def("gather_dot(Tensor x, Tensor table, Tensor rows, Tensor tokens, Tensor(a!) out) -> ()");
  m.def("few_product(Tensor x, Tensor table, Tensor(a!) out) -> ()");
  m.def("weight_terms(Tensor weights, Tensor dy, Tensor? slope, Tensor(a!) out, Tensor(b!) sums, Tensor(c!) shift) -> ()");
  m.def("has_product(Tensor x) -> bool");
  m.def("packed_numbers(Tensor x) -> int");
  m.def("product_pack(Tensor x, Tensor(a!) packed) -> ()");
  m.def("packed_product(Tensor packed, int rows, Tensor table, bool by_row, Tensor(a!) out) -> ()");
  m.def("weighted_sum(Tensor values, Tensor table, Tensor(a!) out) -> bool");
  m.def("gather_sum(Tensor values, Tensor table, Tensor offsets, Tensor tokens, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(grade_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("head_chunk", TORCH_BOX(&gk::head_chunk));
  m.impl("head_finish", TORCH_BOX(&gk::head_finish));
  m.impl("head_support", TORCH_BOX(&gk::head_support));
  m.impl("token_order", TORCH_BOX(&gk::token_order));
  m.impl("gather_dot", TORCH_BOX(&gk::gather_dot));
  m.impl("few_product", TORCH_BOX(&gk::few_product));
  m.impl("weight_terms", TORCH_BOX(&gk::weight_terms));
  m.impl("has_product", TORCH_BOX(&gk::has_product));
  m.impl("packed_numbers", TORCH_BOX(&gk::packed_numbers));
  m.impl("product_pack", TORCH_BOX(&gk::product_pack));
  m.impl("packed_product", TORCH_BOX(&gk::packed_product));
  m.impl("weighted_sum", TORCH_BOX(&gk::weighted_sum));
  m.impl("gather_sum", TORCH_BOX(&gk::gather_sum));
}
