// Registers the kernels of head.h, gather.h and products.h with torch (stable ABI). Spreads pieces of a chunk over
// threads and merges what they found.
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
#include "cpu/products/products.h"
#include "cpu/tensors.h"
#include "cpu/threads.h"

namespace gk {
namespace {

enum Kind { kSample, kScores, kSoftmax };  // of a pass over the vocabulary; numbered as in backends/cpu/head_pass.py

// A chunk is cut into at most so many pieces. Their number must not depend on that of threads, or results would.
constexpr int64_t kPieces = 8;
int64_t pieces_of(int64_t groups) { return std::clamp<int64_t>(64 / std::max<int64_t>(1, groups), 1, kPieces); }

float merged_scale(float from, float to, float tau) { return from == to ? 1.0f : std::exp((from - to) / tau); }

// Adds a piece's sum that counts from its own maximum.
void merge_sum(float& max, float& sum, float piece_max, float piece_sum, float tau) {
  const float top = std::max(max, piece_max);
  sum = (sum > 0 ? sum * merged_scale(max, top, tau) : 0.0f) +
        (piece_sum > 0 ? piece_sum * merged_scale(piece_max, top, tau) : 0.0f);
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
    // The test in units of log2, without a logarithm of u: with b the bits of u read as an integer,
    // b * 2^-23 - 127 <= log2(u) <= b * 2^-23 - 127 + 0.0861. Outside this band, widened for rounding, that decides;
    // inside it the exponential itself does.
    const double clear =
        (double(candidate.score) - max_) * scale_ - (std::bit_cast<int32_t>(u) * 0x1p-23 - 127.0) - limit_;
    if (__builtin_expect(clear > -1e-3 && clear < 0.0871, 0)) {
      return std::exp((candidate.score - max_) / tau_) > u * bound_;
    }
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

// ---- What a pass knows of its rows, and how pieces join it ----------------------------------------------------------
//
// Each kind of pass has statistics of its own, all in the rows of one float tensor `state` [5, rows]. The first two
// rows are the normaliser that candidates are filtered with.

struct PassRows {
  const float* tau;
  float* state;   // [5, rows]
  int64_t* ids;   // [rows]
  int32_t* bad;   // [rows]
  int64_t count;  // rows
  int64_t first_token;

  float* statistic(int i) const { return state + i * count; }
  const float* max() const { return statistic(0); }
  const float* sum() const { return statistic(1); }

  template <typename AnyPiece>
  void mark(const AnyPiece& piece, int64_t lane, int64_t row) const {
    bad[row] |= piece.bad[lane];
  }
};

struct SampleRows : PassRows {
  float *score_max = statistic(0), *logit_max = statistic(2), *logit_sum = statistic(3);

  void merge(const SamplePiece& piece, int64_t lane, int64_t row) const {
    if (piece.score_max[lane] > score_max[row]) ids[row] = first_token + piece.id[lane];
    score_max[row] = std::max(score_max[row], piece.score_max[lane]);
    merge_sum(logit_max[row], logit_sum[row], piece.logit_max[lane], piece.logit_sum[lane], 1.0f);
  }
};

struct ScoresRows : PassRows {
  float *score_max = statistic(0), *score_sum = statistic(1), *logit_max = statistic(2), *logit_sum = statistic(3);

  void merge(const ScoresPiece& piece, int64_t lane, int64_t row) const {
    if (piece.score_max[lane] > score_max[row]) ids[row] = first_token + piece.id[lane];
    merge_sum(score_max[row], score_sum[row], piece.score_max[lane], piece.score_sum[lane], tau[row]);
    merge_sum(logit_max[row], logit_sum[row], piece.logit_max[lane], piece.logit_sum[lane], 1.0f);
  }
};

template <bool kRef>
struct SoftmaxRows : PassRows {
  float *logit_max = statistic(0), *logit_sum = statistic(1), *ref_max = statistic(2), *ref_sum = statistic(3);
  float* moment = statistic(4);

  void merge(const SoftmaxPiece& piece, int64_t lane, int64_t row) const {
    const float old_max = logit_max[row], old_sum = logit_sum[row], old_ref = ref_max[row], t = tau[row];
    merge_sum(logit_max[row], logit_sum[row], piece.max[lane], piece.sum[lane], t);
    // Both moments count from their own maxima; they are added up counting from the new ones.
    const float top = logit_max[row], ref_top = std::max(old_ref, piece.ref_max[lane]);
    const auto moved = [&](float m, float max, float ref, float sum) {
      const float scale = merged_scale(max, top, t);
      if (!(sum > 0 && scale > 0)) return 0.0f;
      return scale * (m + sum * (((max - top) - (kRef ? ref - ref_top : 0.0f)) / t));
    };
    moment[row] = moved(moment[row], old_max, old_ref, old_sum) +
                  moved(piece.moment[lane], piece.max[lane], piece.ref_max[lane], piece.sum[lane]);
    if (kRef) merge_sum(ref_max[row], ref_sum[row], piece.ref_max[lane], piece.ref_sum[lane], t);
  }
};

// The candidates of all rows so far.
struct Candidates {
  Candidate* all;     // [rows, capacity]
  int32_t* count;     // [rows]
  int32_t* overflow;  // [rows], 1: they do not fit, and the row takes the dense backward
  int64_t capacity;

  void append(int64_t row, const Filter& filter, const Candidate& added) const {
    if (overflow[row]) return;
    Candidate* list = all + row * capacity;
    if (count[row] == capacity) {
      count[row] = filter.keep(list, count[row]);
      if (count[row] >= capacity - capacity / 8) {  // compaction no longer pays
        overflow[row] = 1;
        count[row] = 0;
        return;
      }
    }
    list[count[row]] = added;
    count[row] += filter.keeps(added);
  }
};

// One chunk: pieces over threads, then, group by group, their statistics and their candidates.
template <typename AnyPiece, typename AnyRows, typename Kernel>
void run_chunk(const HeadArgs& args, const AnyRows& state, const Candidates& candidates, Hit* scratch,
               const Kernel& kernel) {
  const HeadChunk& in = args.in;
  const int64_t groups = (in.rows + kHeadLanes - 1) / kHeadLanes, count = pieces_of(groups);
  const int64_t piece_tokens = (in.tokens + count - 1) / count, room = piece_tokens * kHeadLanes;
  std::vector<AnyPiece> pieces(size_t(count * groups));  // [count, groups]
  const auto hits_of = [&](int64_t i) { return scratch ? scratch + i * room : nullptr; };
  parallel_rows(count * groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = std::min(in.tokens, i / groups * piece_tokens);
      AnyPiece& piece = pieces[size_t(i)];
      piece = AnyPiece{};
      kernel(Span{i % groups, first, std::min(in.tokens, first + piece_tokens)}, piece, hits_of(i));
    }
  });
  parallel_rows(groups, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kHeadLanes, last = std::min(in.rows, first + kHeadLanes);
      for (int64_t row = first; row < last; ++row) {
        for (int64_t i = group; i < count * groups; i += groups) {
          state.mark(pieces[size_t(i)], row - first, row);
          state.merge(pieces[size_t(i)], row - first, row);
        }
      }
      if (!(args.eps > 0)) continue;
      std::vector<Filter> filters;
      for (int64_t row = first; row < last; ++row) {
        filters.emplace_back(state.max()[row], state.sum()[row], args.tau[row], args.eps);
      }
      for (int64_t i = group; i < count * groups; i += groups) {
        for (const Hit* hit = hits_of(i); hit < hits_of(i) + pieces[size_t(i)].hits; ++hit) {
          const int64_t lane = hit->place % kHeadLanes;
          if (first + lane >= last) continue;  // padding
          const int32_t token = int32_t(in.first_token) + hit->place / kHeadLanes;
          candidates.append(first + lane, filters[size_t(lane)], {token, hit->word, hit->score});
        }
      }
    }
  });
}

// A pass over one chunk; backends/cpu/head_pass.py says in which order chunks come. `state` is [5, rows] (see above),
// `flags` [3, rows]: bad, number of candidates, overflow; `candidates` [rows, capacity * 3], `scratch` room for the
// chunk's hits. `given` [rows] and `given_scores` [rows] make the noise posterior, with words of `domain`.
void head_chunk(int64_t kind, Tensor logits, std::optional<Tensor> ref, std::optional<Tensor> bias,
                std::optional<Tensor> ref_bias, double softcap, int64_t rows, Tensor tau, Tensor seed,
                std::optional<Tensor> row_ids, int64_t vocab_start, int64_t first_token, double eps, Tensor state,
                Tensor ids, Tensor flags, Tensor candidates, Tensor scratch, std::optional<Tensor> given,
                std::optional<Tensor> given_scores, int64_t domain) {
  STD_TORCH_CHECK(logits.stride(1) == 1 && logits.size(1) >= (rows + kHeadLanes - 1) / kHeadLanes * kHeadLanes,
                  "grade_kernels: chunk layout");
  int32_t* marks = mutable_data<int32_t>(flags);
  const PassRows all{.tau = data<float>(tau),
                     .state = mutable_data<float>(state),
                     .ids = mutable_data<int64_t>(ids),
                     .bad = marks,
                     .count = rows,
                     .first_token = first_token};
  const Candidates found{.all = mutable_data<Candidate>(candidates),
                         .count = marks + rows,
                         .overflow = marks + 2 * rows,
                         .capacity = eps > 0 ? candidates.size(1) / 3 : 0};
  const HeadArgs args{.in = {.logits = logits.const_data_ptr(),
                             .dtype = dtype_of(logits),
                             .tokens = logits.size(0),
                             .stride = logits.stride(0),
                             .rows = rows,
                             .first_token = first_token,
                             .bias = data<float>(bias),
                             .softcap = float(softcap),
                             .noise = noise_of(seed, row_ids, vocab_start)},
                      .given = {.ids = data<int64_t>(given), .domain = uint32_t(domain)},
                      .given_scores = data<float>(given_scores),
                      .ref = ref ? ref->const_data_ptr() : nullptr,
                      .ref_bias = data<float>(ref_bias),
                      .tau = data<float>(tau),
                      .max = all.max(),
                      .sum = all.sum(),
                      .eps = float(eps)};
  const HeadKernels& kernels = GK_KERNELS_OF(kHead);
  Hit* hits = mutable_data<Hit>(scratch);
  const auto sample = [&](const Span& span, SamplePiece& out, Hit*) { kernels.sample(args, span, out); };
  const auto scores = [&](const Span& span, ScoresPiece& out, Hit* h) { kernels.scores(args, span, out, h); };
  const auto softmax = [&](const Span& span, SoftmaxPiece& out, Hit* h) { kernels.softmax(args, span, out, h); };
  switch (kind) {
    case kSample: return run_chunk<SamplePiece>(args, SampleRows{all}, found, hits, sample);
    case kScores: return run_chunk<ScoresPiece>(args, ScoresRows{all}, found, hits, scores);
    default:
      if (ref) return run_chunk<SoftmaxPiece>(args, SoftmaxRows<true>{all}, found, hits, softmax);
      return run_chunk<SoftmaxPiece>(args, SoftmaxRows<false>{all}, found, hits, softmax);
  }
}

int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

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
  const GatherArgs args{.x = x.const_data_ptr(),
                        .x_dtype = dtype_of(x),
                        .x_stride = x.stride(0),
                        .table = table.const_data_ptr(),
                        .table_dtype = dtype_of(table),
                        .table_stride = table.stride(0),
                        .width = table.size(1),
                        .rows = data<int64_t>(rows),
                        .tokens = data<int64_t>(tokens),
                        .offsets = nullptr,
                        .values = nullptr,
                        .out = mutable_data<float>(out)};
  parallel_rows(tokens.numel(), [&](int64_t begin, int64_t end) { GK_KERNELS_OF(kGather).dot(args, begin, end); });
}

void gather_sum(Tensor values, Tensor table, Tensor offsets, Tensor tokens, Tensor out) {
  const int64_t width = table.size(1), blocks = blocks_of(width, kGatherBlock);
  const GatherArgs args{.x = nullptr,
                        .x_dtype = Dtype::kFloat,
                        .x_stride = 0,
                        .table = table.const_data_ptr(),
                        .table_dtype = dtype_of(table),
                        .table_stride = table.stride(0),
                        .width = width,
                        .rows = nullptr,
                        .tokens = data<int64_t>(tokens),
                        .offsets = data<int64_t>(offsets),
                        .values = data<float>(values),
                        .out = mutable_data<float>(out)};
  parallel_rows((offsets.numel() - 1) * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kGatherBlock;
      GK_KERNELS_OF(kGather).sum(args, i / blocks, first, std::min(width, first + kGatherBlock));
    }
  });
}

// x @ table.T for few rows of x, float32.
void few_product(Tensor x, Tensor table, Tensor out) {
  const int64_t vocab = table.size(0);
  const ProductArgs args{.x = data<float>(x),
                         .rows = x.size(0),
                         .x_stride = x.stride(0),
                         .table = data<float>(table),
                         .table_stride = table.stride(0),
                         .width = table.size(1),
                         .out = mutable_data<float>(out),
                         .out_stride = out.stride(0)};
  parallel_rows(blocks_of(vocab, kProductBlock), [&](int64_t begin, int64_t end) {
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
  const TermsArgs args{.weights = data<float>(weights),
                       .dy = data<float>(dy),
                       .slope = data<float>(slope),
                       .weights_stride = weights.stride(0),
                       .dy_stride = dy.stride(0),
                       .slope_stride = slope ? slope->stride(0) : 0,
                       .columns = weights.size(1),
                       .weighted = terms,
                       .unweighted = terms + bytes,
                       .out_dtype = dtype_of(out),
                       .out_stride = out.stride(1),
                       .total = totals,
                       .dot = totals + rows,
                       .shift = mutable_data<float>(shift)};
  parallel_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) GK_KERNELS_OF(kGather).terms(args, row);
  });
}

// Whether this machine's own kernels, rather than torch's, multiply what is of x's dtype.
bool has_product(Tensor x) { return product_kernels(dtype_of(x)) != nullptr; }

// 16-bit numbers of x as `packed_product` wants it.
int64_t packed_numbers(Tensor x) {
  return product_kernels(dtype_of(x))->packed_numbers(dtype_of(x), x.size(0), x.size(1));
}

void product_pack(Tensor x, Tensor packed) {
  const Packing args{.x = x.const_data_ptr(),
                     .dtype = dtype_of(x),
                     .rows = x.size(0),
                     .width = x.size(1),
                     .stride = x.stride(0),
                     .packed = static_cast<uint16_t*>(packed.mutable_data_ptr())};
  const ProductKernels& kernels = *product_kernels(args.dtype);
  parallel_rows(blocks_of(args.rows, kernels.packed_rows),
                [&](int64_t begin, int64_t end) { kernels.pack(args, begin, end); });
}

// table @ x.T in `out`, with x's rows, padded to a multiple of 16, along its second dimension; or, if by_row, x @
// table.T.
void packed_product(Tensor packed, int64_t rows, Tensor table, bool by_row, Tensor out) {
  const Product args{.packed = static_cast<const uint16_t*>(packed.const_data_ptr()),
                     .rows = rows,
                     .table = table.const_data_ptr(),
                     .dtype = dtype_of(table),
                     .tokens = table.size(0),
                     .width = table.size(1),
                     .stride = table.stride(0),
                     .out = out.mutable_data_ptr(),
                     .out_dtype = dtype_of(out),
                     .out_stride = out.stride(0),
                     .by_row = by_row};
  const ProductKernels& kernels = *product_kernels(args.dtype);
  parallel_rows(blocks_of(args.tokens, kernels.tokens),
                [&](int64_t begin, int64_t end) { kernels.multiply(args, begin, end); });
}

// values @ table in `out`. False if an infinity in the arguments made a sum NaN; the caller must take that sum again.
bool weighted_sum(Tensor values, Tensor table, Tensor out) {
  const WeightedSum args{.values = values.const_data_ptr(),
                         .values_dtype = dtype_of(values),
                         .rows = values.size(0),
                         .values_stride = values.stride(0),
                         .table = table.const_data_ptr(),
                         .dtype = dtype_of(table),
                         .tokens = table.size(0),
                         .width = table.size(1),
                         .stride = table.stride(0),
                         .out = mutable_data<float>(out),
                         .out_stride = out.stride(0)};
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
      "Tensor(b!) ids, Tensor(c!) flags, Tensor(d!) candidates, Tensor(e!) scratch, Tensor? given, "
      "Tensor? given_scores, int domain) -> ()");
  m.def("head_finish(Tensor tau, float eps, Tensor state, Tensor(a!) flags, Tensor(b!) candidates) -> ()");
  m.def("head_support(Tensor candidates, Tensor offsets, Tensor(a!) tokens, Tensor(b!) p) -> ()");
  m.def("token_order(Tensor tokens, Tensor(a!) order, Tensor(b!) counts) -> ()");
  m.def("gather_dot(Tensor x, Tensor table, Tensor rows, Tensor tokens, Tensor(a!) out) -> ()");
  m.def("few_product(Tensor x, Tensor table, Tensor(a!) out) -> ()");
  m.def(
      "weight_terms(Tensor weights, Tensor dy, Tensor? slope, Tensor(a!) out, Tensor(b!) sums, Tensor(c!) shift) "
      "-> ()");
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
