// Kernels over one row of given logits. Included like simd.h, after noise.h.
//
// A row is walked in blocks of 64 tokens that start at multiples of 64 of the global token id, so a block's noise is a
// fixed set of Philox calls whatever shard of the vocabulary the row is. The first and the last block may be partial.

// Partial sums are closed after this many blocks, sixteen numbers a lane: rounding then grows with the square root of
// the number of groups instead of that of the vocabulary.
constexpr int kGroup = 16 * kPack / kVectors;

struct Block {
  int64_t column;   // of its first token; negative in a first block that begins before the row
  int first, last;  // valid tokens [first, last) of the 64
  uint32_t counter;
  bool full() const { return first == 0 && last == kBlock; }
};

// Calls visit(block) for the blocks that cover columns [begin, end) of a row whose column 0 is token vocab_start.
template <typename Visit>
GK_INLINE void for_each_block(int64_t vocab_start, int64_t begin, int64_t end, Visit&& visit) {
  int64_t token = (vocab_start + begin) & ~int64_t(kBlock - 1);
  for (; token < vocab_start + end; token += kBlock) {
    const int64_t column = token - vocab_start;
    const int first = column < begin ? int(begin - column) : 0;
    const int last = end - column < kBlock ? int(end - column) : kBlock;
    visit(Block{column, first, last, uint32_t(token >> 2)});
  }
}

// A block of a row is read and written where it is. A partial block has no sixty-four numbers there: it takes a detour
// through `staged`, which has room for them.
template <typename T>
[[gnu::noinline, gnu::cold]] static void stage(const T* row, const Block& block, float fill, T staged[kBlock]) {
  for (int i = 0; i < kBlock; ++i) {
    staged[i] = i >= block.first && i < block.last ? row[block.column + i] : T(fill);
  }
}
template <typename T>
[[gnu::noinline, gnu::cold]] static void unstage(T* row, const Block& block, const T staged[kBlock]) {
  for (int i = block.first; i < block.last; ++i) row[block.column + i] = staged[i];
}

// The numbers of one block, `fill` where the row has none.
template <typename T>
struct BlockIn {
  T staged[kBlock];
  const T* at;
  [[gnu::always_inline]] BlockIn(const T* row, const Block& block, float fill) : at(row + block.column) {
    if (__builtin_expect(block.full(), 1)) return;
    stage(row, block, fill, staged);
    at = staged;
  }
  [[gnu::always_inline]] f32 vector(int j) const { return load(at + j * kLanes); }
  [[gnu::always_inline]] f32p pack(int j) const { return load_pack(at + j * kLanes); }  // vectors j and after
};

// Takes the numbers of one block for a row, which has them after `finish`.
template <typename T>
struct BlockOut {
  T staged[kBlock];
  T* at;
  [[gnu::always_inline]] BlockOut(T* row, const Block& block) : at(block.full() ? row + block.column : staged) {}
  [[gnu::always_inline]] void put(int j, f32p x) const { store_pack(at + j * kLanes, x); }
  [[gnu::always_inline]] void finish(T* row, const Block& block) const {
    if (__builtin_expect(!block.full(), 0)) unstage(row, block, staged);
  }
};

template <typename T>
GK_INLINE_IF_WIDE void load_block(const T* row, const Block& block, float fill, f32 out[kVectors]) {
  const BlockIn<T> in(row, block, fill);
  for (int j = 0; j < kVectors; ++j) out[j] = in.vector(j);
}

// Sum over a row, lane by lane.
struct Sum {
  f32 inner[kPack] = {}, outer = {};
  int blocks = 0;
  [[gnu::always_inline]] void close() {
    outer += (inner[0] + inner[1]) + (inner[2] + inner[3]);
    for (int i = 0; i < kPack; ++i) inner[i] = f32{};
    blocks = 0;
  }
  [[gnu::always_inline]] void add(f32p x) {
    for (int i = 0; i < kPack; ++i) inner[i] += x.v[i];
  }
  [[gnu::always_inline]] void tick() {  // once a block
    if (++blocks == kGroup) close();
  }
  [[gnu::always_inline]] float total() {
    close();
    return reduce_sum(outer);
  }
};

// ---- Sampling -----------------------------------------------------------------------------------------------------

// Gumbel noise of the tokens of one vector.
GK_INLINE_IF_WIDE f32 gumbel_one(const RowKey& key, int64_t token, u32 w) {
  u32p words;
  for (int i = 0; i < kPack; ++i) words.v[i] = splat_u(0x80000000u);
  words.v[0] = w;
  return gumbel(key, token, words).v[0];
}

// The exact scores of the tokens of one vector, taken only where the bound says that one of them may win.
[[gnu::noinline]] static void contest(const RowKey& key, int64_t token, int64_t column, f32 l, u32 w,
                                      SamplePart<float>& best) {
  const f32 s = l + gumbel_one(key, token, w);
  for (int i = 0; i < kLanes; ++i) {
    if (s[i] <= best.score_max) continue;
    if (!(s[i] < __builtin_inff())) {  // NaN or +inf
      best.bad = true;
      continue;
    }
    best.score_max = s[i];
    best.id = column + i;
  }
}

template <typename T, bool kLogSumExp>
static SamplePart<float> sample_part(const Rows& in, int64_t row, int64_t begin, int64_t end) {
  const T* l_row = in.logits.row<const T>(row);
  const RowKey key(in.noise.seed, in.noise.row(row), kDomainGumbel);
  SamplePart<float> best{-__builtin_inff(), 0, 0, -1, false};
  f32 threshold = splat(-__builtin_inff());
  // Reference points of the sum start at the most negative number: -inf would make NaN of -inf - -inf.
  f32 lane_max = splat(-3.402823466e38f);
  Sum sum;
  for_each_block(in.noise.vocab_start, begin, end, [&](const Block& block) __attribute__((always_inline)) {
    u32 w[kVectors];
    const BlockIn<T> l(l_row, block, -__builtin_inff());
    noise_words(key, block.counter, w);
    i32 none_above = ~i32{};
    for (int j = 0; j < kVectors; ++j) none_above &= l.vector(j) + gumbel_bound(w[j]) <= threshold;
    if (__builtin_expect(any(~none_above), 0)) {
      for (int j = 0; j < kVectors; ++j) {
        if (!any_not_le(l.vector(j) + gumbel_bound(w[j]), threshold)) continue;
        contest(key, in.noise.vocab_start + block.column + j * kLanes, block.column + j * kLanes, l.vector(j), w[j],
                best);
        const float m = best.score_max;
        threshold =
            splat(m - (1e-4f + __builtin_fabsf(m) * 0x1p-21f));  // room for the bound's and the score's rounding
      }
    }
    if constexpr (kLogSumExp) {
      f32 top = l.vector(0);
      for (int j = 1; j < kVectors; ++j) top = vmax(top, l.vector(j));
      if (__builtin_expect(any_gt(top, lane_max), 0)) {
        const f32 raised = vmax(top, lane_max), scale = vexp2_one((lane_max - raised) * kLog2E);
        for (int i = 0; i < kPack; ++i) sum.inner[i] *= scale;
        sum.outer *= scale;
        lane_max = raised;
      }
      for (int j = 0; j < kVectors; j += kPack) sum.add(vexp2((l.pack(j) - lane_max) * kLog2E));
      sum.tick();
    }
  });
  if (kLogSumExp) {
    sum.close();
    best.logit_max = reduce_max(lane_max);
    best.logit_sum = reduce_sum(sum.outer * vexp2_one((lane_max - best.logit_max) * kLog2E));
  }
  return best;
}

static SamplePart<float> sample(const Rows& in, int64_t row, int64_t begin, int64_t end, bool logsumexp) {
  return with_dtype(in.logits.dtype, [&]<Dtype kDtype>() {
    using T = Element<kDtype>;
    return logsumexp ? sample_part<T, true>(in, row, begin, end) : sample_part<T, false>(in, row, begin, end);
  });
}

// ---- Softmax of the scores ------------------------------------------------------------------------------------------

// exp(l + g - pivot) of the tokens of a pack that starts at `token`: exp(l - pivot) / E.
GK_INLINE_IF_WIDE f32p weigh_at_one(const RowKey& key, int64_t token, f32p l, u32p w, float pivot) {
  const f32p e = exponential(key, token, w);
  f32p weight = vexp2((l - pivot) * kLog2E);
  for (int i = 0; i < kPack; ++i) weight.v[i] *= reciprocal(e.v[i]);
  return weight;
}
// exp((l + g - pivot) / tau). At tau = 1 a logarithm less is needed.
GK_INLINE_IF_WIDE f32p weigh(const RowKey& key, int64_t token, f32p l, u32p w, float pivot, float scale) {
  if (scale == kLog2E) return weigh_at_one(key, token, l, w, pivot);
  return vexp2((l + gumbel(key, token, w) - pivot) * scale);
}
// exp((l - pivot) / tau).
GK_INLINE_IF_WIDE f32p weigh_noiseless(f32p l, float pivot, float scale) { return vexp2((l - pivot) * scale); }

// Weights with posterior noise, relative to T. `won` is the given token's place from the pack's first on.
GK_INLINE_IF_WIDE f32p weigh_given(const RowKey& key, int64_t token, f32p l, u32p w, float largest, float scale,
                                   int won) {
  const f32p e = exponential(key, token, w);
  // Clamped at 2^100, so that it stays finite. T is that far below a logit only if it is none of these logits'.
  const f32p y = vexp2(each(GK_EACH(i) {
    const f32 ahead = (l.v[i] - largest) * kLog2E;
    return ahead < 100.0f ? ahead : splat(100.0f);
  }));
  f32p weight = posterior_base(y, e);
  if (scale != kLog2E) weight = vexp2(posterior_log(l, splat(largest), y, e, weight) * scale);
  return each(GK_EACH(i) {
    i32 place;
    for (int lane = 0; lane < kLanes; ++lane) place[lane] = i * kLanes + lane;
    return select(place == splat_i(won), splat(1.0f), weight.v[i]);
  });
}
// The given token's place in a block, or one that is in none.
GK_INLINE int won_in(const Rows& in, int64_t row, const Block& block) {
  const int64_t place = in.given.ids[row] - block.column;
  return place >= block.first && place < block.last ? int(place) : -kBlock;
}

template <typename T, typename Out, bool kGiven>
static void softmax_row(const SoftmaxArgs<float>& args, int64_t row, float* scratch) {
  const Rows& in = args.in;
  const T* l_row = in.logits.row<const T>(row);
  Out* out_row = args.out.row<Out>(row);
  const RowKey key(in.noise.seed, in.noise.row(row), kGiven ? in.given.domain : kDomainGumbel);
  const float scale = kLog2E / args.tau[row], pivot = args.score_max[row];
  Sum sum;
  const auto weigh_to = [&]<typename To>(To* weights) __attribute__((always_inline)) {
    for_each_block(in.noise.vocab_start, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
      u32 w[kVectors];
      const BlockIn<T> l(l_row, block, -__builtin_inff());
      const BlockOut<To> out(weights, block);
      noise_words(key, block.counter, w);
      for (int j = 0; j < kVectors; j += kPack) {
        const int64_t token = in.noise.vocab_start + block.column + j * kLanes;
        f32p e;
        if constexpr (kGiven) {
          e = weigh_given(key, token, l.pack(j), pack(w + j), pivot, scale, won_in(in, row, block) - j * kLanes);
        } else {
          e = weigh(key, token, l.pack(j), pack(w + j), pivot, scale);
        }
        sum.add(e);
        out.put(j, e);
      }
      sum.tick();
      out.finish(weights, block);
    });
  };
  if (args.normalize) weigh_to(scratch);
  else weigh_to(out_row);
  args.total[row] = sum.total();
  if (!args.normalize) return;
  const float inverse = 1.0f / args.total[row];
  for_each_block(0, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    const BlockIn<float> e(scratch, block, 0.0f);
    const BlockOut<Out> out(out_row, block);
    for (int j = 0; j < kVectors; j += kPack) out.put(j, e.pack(j) * inverse);
    out.finish(out_row, block);
  });
}

static void softmax(const SoftmaxArgs<float>& args, int64_t row, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() {
    with_dtype(args.out.dtype, [&]<Dtype kOut>() {
      if (args.in.given.ids) softmax_row<Element<kDtype>, Element<kOut>, true>(args, row, scratch);
      else softmax_row<Element<kDtype>, Element<kOut>, false>(args, row, scratch);
    });
  });
}

// ---- Softmax and the maximum of the scores, in one pass -------------------------------------------------------------
//
// The largest score is known only at the end, but a weight needs something to count from now, or it is beyond float's
// range. So a row is cut into chunks, which have pivots of their own, and a last pass brings their weights to one
// scale.

constexpr int64_t kChunk = 4096;  // tokens that stay in the first-level cache
constexpr int kMostChunks = 64;   // of a row; longer rows have longer chunks

constexpr float kLowest = -3.402823466e38f;  // stands for -inf where that would make NaN of -inf - -inf

struct Chunk {
  int64_t begin, end, length;        // length: of whole chunks
  float pivot, score_max, top, sum;  // top: the largest weight; sum of exp((l + g - pivot) / tau)
  bool bad;                          // a logit is NaN or +inf
};

// The largest of many numbers, and whether one of them is NaN or +inf.
struct Largest {
  f32p top, sum;
  [[gnu::always_inline]] Largest() {
    for (int i = 0; i < kPack; ++i) top.v[i] = splat(kLowest), sum.v[i] = f32{};
  }
  [[gnu::always_inline]] void add(f32p x) {
    for (int i = 0; i < kPack; ++i) top.v[i] = vmax(x.v[i], top.v[i]), sum.v[i] += x.v[i];
  }
  [[gnu::always_inline]] float max() const {
    return reduce_max(vmax(vmax(top.v[0], top.v[1]), vmax(top.v[2], top.v[3])));
  }
  // True also where a sum of finite numbers overflows.
  [[gnu::always_inline]] bool may_be_bad() const {
    bool bad = false;
    for (int i = 0; i < kPack; ++i) bad |= any_not_le(sum.v[i], splat(-kLowest));
    return bad;
  }
};

template <typename T>
[[gnu::noinline, gnu::cold]] static bool is_bad(const T* l_row, int64_t begin, int64_t end) {
  for (int64_t v = begin; v < end; ++v) {
    if (!(float(l_row[v]) < __builtin_inff())) return true;
  }
  return false;
}

// Weights of a chunk at tau = 1. The pivot is the largest logit: no noise brings a weight exp(l - pivot) / E out of
// float's range.
template <typename T>
GK_INLINE void weigh_chunk_at_one(const Rows& in, const RowKey& key, const T* l_row, float* weights, Chunk& chunk) {
  Largest logits;
  for_each_block(in.noise.vocab_start, chunk.begin, chunk.end, [&](const Block& block) __attribute__((always_inline)) {
    const BlockIn<T> l(l_row, block, -__builtin_inff());
    for (int j = 0; j < kVectors; j += kPack) logits.add(l.pack(j));
  });
  chunk.bad = logits.may_be_bad() && is_bad(l_row, chunk.begin, chunk.end);
  chunk.pivot = logits.max();
  Sum sum;
  f32 top = {};
  for_each_block(in.noise.vocab_start, chunk.begin, chunk.end, [&](const Block& block) __attribute__((always_inline)) {
    u32 w[kVectors];
    const BlockIn<T> l(l_row, block, -__builtin_inff());
    const BlockOut<float> out(weights, block);
    // The next chunk is asked for now: its search for the maximum would have nothing to do but wait for memory.
    const char* next = reinterpret_cast<const char*>(l_row + block.column + chunk.length);
    for (int line = 0; line < kBlock * int(sizeof(T)); line += 64) __builtin_prefetch(next + line, 0, 2);
    noise_words(key, block.counter, w);
    for (int j = 0; j < kVectors; j += kPack) {
      const int64_t token = in.noise.vocab_start + block.column + j * kLanes;
      const f32p e = weigh_at_one(key, token, l.pack(j), pack(w + j), chunk.pivot);
      sum.add(e);
      top = vmax(top, vmax(vmax(e.v[0], e.v[1]), vmax(e.v[2], e.v[3])));
      out.put(j, e);
    }
    sum.tick();
    out.finish(weights, block);
  });
  chunk.sum = sum.total();
  chunk.top = reduce_max(top);
  chunk.score_max = chunk.top > 0.0f ? chunk.pivot + __builtin_logf(chunk.top) : -__builtin_inff();
}

// At other temperatures, where noise is multiplied, the pivot is the largest score.
template <typename T>
GK_INLINE void weigh_chunk(const Rows& in, const RowKey& key, const T* l_row, float scale, float* weights,
                           Chunk& chunk) {
  Largest scores;
  for_each_block(in.noise.vocab_start, chunk.begin, chunk.end, [&](const Block& block) __attribute__((always_inline)) {
    u32 w[kVectors];
    const BlockIn<T> l(l_row, block, -__builtin_inff());
    const BlockOut<float> out(weights, block);
    noise_words(key, block.counter, w);
    for (int j = 0; j < kVectors; j += kPack) {
      const f32p s = l.pack(j) + gumbel(key, in.noise.vocab_start + block.column + j * kLanes, pack(w + j));
      scores.add(s);
      out.put(j, s);
    }
    out.finish(weights, block);
  });
  chunk.bad = scores.may_be_bad() && is_bad(l_row, chunk.begin, chunk.end);
  chunk.pivot = scores.max();
  Sum sum;
  for_each_block(in.noise.vocab_start, chunk.begin, chunk.end, [&](const Block& block) __attribute__((always_inline)) {
    const BlockIn<float> s(weights, block, -__builtin_inff());
    const BlockOut<float> out(weights, block);
    for (int j = 0; j < kVectors; j += kPack) {
      const f32p e = weigh_noiseless(s.pack(j), chunk.pivot, scale);
      sum.add(e);
      out.put(j, e);
    }
    sum.tick();
    out.finish(weights, block);
  });
  chunk.sum = sum.total();
  chunk.top = chunk.sum > 0.0f ? 1.0f : 0.0f;
  chunk.score_max = chunk.sum > 0.0f ? chunk.pivot : -__builtin_inff();
}

template <typename T>
static void relax_row(const RelaxArgs<float>& args, int64_t row, float* scratch) {
  const Rows& in = args.in;
  const T* l_row = in.logits.row<const T>(row);
  T* out_row = args.out.row<T>(row);
  float* weights = scratch;
  if constexpr (sizeof(T) == sizeof(float)) weights = out_row;
  const RowKey key(in.noise.seed, in.noise.row(row), kDomainGumbel);
  const float scale = kLog2E / args.tau[row];
  // Chunks begin where blocks do, so that no block is drawn twice.
  const int64_t shift = in.noise.vocab_start & (kBlock - 1);
  int64_t length = kChunk;
  while (length * kMostChunks < shift + in.vocab) length *= 2;
  Chunk chunks[kMostChunks];
  int count = 0;
  bool bad = false;
  float pivot = kLowest, score_max = -__builtin_inff();
  for (int64_t begin = -shift; begin < in.vocab; begin += length) {
    Chunk& chunk = chunks[count++];
    chunk.begin = begin < 0 ? 0 : begin;
    chunk.end = begin + length < in.vocab ? begin + length : in.vocab;
    chunk.length = length;
    if (scale == kLog2E) weigh_chunk_at_one(in, key, l_row, weights, chunk);
    else weigh_chunk(in, key, l_row, scale, weights, chunk);
    bad |= chunk.bad;
    pivot = chunk.pivot > pivot ? chunk.pivot : pivot;
    score_max = chunk.score_max > score_max ? chunk.score_max : score_max;
  }
  bad |= score_max == -__builtin_inff();
  args.score_max[row] = bad ? __builtin_nanf("") : score_max;
  const auto factor = [&](const Chunk& chunk) { return __builtin_exp2((double(chunk.pivot) - pivot) * scale); };
  double total = 0.0;
  for (int i = 0; i < count; ++i) total += chunks[i].sum * factor(chunks[i]);
  for (int i = 0; i < count; ++i) {
    const Chunk& chunk = chunks[i];
    const double scaled = factor(chunk) / total;
    const float f = bad ? __builtin_nanf("") : float(scaled);
    // A token that has more than half of the row is divided exactly: where it is alone, 1 must come out.
    int64_t dominant = -1;
    if (!bad && chunk.top * scaled > 0.5) {
      dominant = chunk.begin;
      while (weights[dominant] != chunk.top) ++dominant;
    }
    for_each_block(in.noise.vocab_start, chunk.begin, chunk.end,
                   [&](const Block& block) __attribute__((always_inline)) {
                     const BlockIn<float> e(weights, block, 0.0f);
                     const BlockOut<T> out(out_row, block);
                     for (int j = 0; j < kVectors; j += kPack) out.put(j, e.pack(j) * f);
                     out.finish(out_row, block);
                   });
    if (dominant >= 0) out_row[dominant] = T(float(chunk.top * scaled));
  }
}

static void relax(const RelaxArgs<float>& args, int64_t row, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() { relax_row<Element<kDtype>>(args, row, scratch); });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// weight * x, and zero for a zero weight (masked, or beyond the exponent's reach), which sends nothing whatever x is.
GK_INLINE f32p sent(f32p weight, f32p x) {
  return each(GK_EACH(i) { return select(weight.v[i] != 0.0f, weight.v[i] * x.v[i], f32{}); });
}

template <typename T, Estimator kEstimator, bool kGiven>
static void backward_row(const BackwardArgs<float>& args, int64_t row, float* scratch) {
  constexpr bool kNoisy = kEstimator == Estimator::kNoisy, kReinmax = kEstimator == Estimator::kReinmax;
  const Rows& in = args.in;
  const T* l_row = in.logits.row<const T>(row);
  const T* dy_row = args.dy.row<const T>(row);
  T* out_row = args.out.row<T>(row);
  // Weights wait for the second pass where the gradient will be, if they fit, or the cache would have to hold a row
  // more.
  float* weights_row = scratch;
  if constexpr (sizeof(T) == sizeof(float)) weights_row = out_row == dy_row ? scratch : out_row;
  const RowKey key(in.noise.seed, in.noise.row(row), kGiven ? in.given.domain : kDomainGumbel);
  const int64_t vocab_start = kNoisy ? in.noise.vocab_start : 0;
  const float tau = args.tau[row], scale = kLog2E / tau;
  const float pivot = kNoisy ? args.score_max[row] : args.logit_max[row];
  const float dlogprob = args.dlogprobs ? args.dlogprobs[row] : 0.0f;
  const bool needs_untempered = kReinmax || args.dlogprobs;
  const float untempered_pivot = needs_untempered ? args.logit_max[row] : 0.0f;
  const float untempered_inverse = needs_untempered ? 1.0f / args.logit_sum[row] : 0.0f;

  // First pass: weights, their sum, and their products with dy.
  Sum sum, dot, untempered_dot;
  for_each_block(vocab_start, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    u32 w[kVectors];
    const BlockIn<T> l(l_row, block, -__builtin_inff()), dy(dy_row, block, 0.0f);
    const BlockOut<float> weights(weights_row, block);
    if constexpr (kNoisy) noise_words(key, block.counter, w);
    for (int j = 0; j < kVectors; j += kPack) {
      f32p e;
      const int64_t token = vocab_start + block.column + j * kLanes;
      if constexpr (kNoisy && kGiven) {
        e = weigh_given(key, token, l.pack(j), pack(w + j), pivot, scale, won_in(in, row, block) - j * kLanes);
      } else if constexpr (kNoisy) {
        e = weigh(key, token, l.pack(j), pack(w + j), pivot, scale);
      } else {
        e = weigh_noiseless(l.pack(j), pivot, scale);
      }
      sum.add(e);
      dot.add(sent(e, dy.pack(j)));
      if constexpr (kReinmax)
        untempered_dot.add(sent(weigh_noiseless(l.pack(j), untempered_pivot, kLog2E), dy.pack(j)));
      weights.put(j, e);
    }
    sum.tick();
    dot.tick();
    if constexpr (kReinmax) untempered_dot.tick();
    weights.finish(weights_row, block);
  });
  const float inverse = 1.0f / sum.total();
  float mean = dot.total() * inverse, untempered_mean = 0.0f, chosen_dy = 0.0f, chosen_weight = 0.0f;
  if (needs_untempered) {
    chosen_dy = float(dy_row[args.ids[row]]);
    chosen_weight = weights_row[args.ids[row]];
  }
  if constexpr (kReinmax) {
    mean = 0.5f * (mean + chosen_dy);
    untempered_mean = untempered_dot.total() * untempered_inverse;
  }

  // Second pass: the gradient. reinmax's middle distribution is (one_hot + p) / 2, so 2 J(middle) is p (dy - mean) away
  // from the sampled token, whose own half is added at the end.
  const float factor = kReinmax ? inverse : inverse / tau;
  Sum moment;
  for_each_block(0, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    const BlockIn<float> weights(weights_row, block, 0.0f);
    const BlockIn<T> dy(dy_row, block, 0.0f);
    const BlockOut<T> out(out_row, block);
    for (int j = 0; j < kVectors; j += kPack) {
      const f32p e = weights.pack(j);
      f32p dl = each(GK_EACH(i) { return select(e.v[i] != 0.0f, e.v[i] * factor * (dy.vector(j + i) - mean), f32{}); });
      if (args.dtau) {  // where a weight is 0, so is dl
        moment.add(dl * vlog(each(GK_EACH(i) { return vmax(e.v[i], splat(0x1p-126f)); })));
      }
      if (needs_untempered) {
        const BlockIn<T> l(l_row, block, -__builtin_inff());
        const f32p untempered = weigh_noiseless(l.pack(j), untempered_pivot, kLog2E) * untempered_inverse;
        for (int i = 0; i < kPack; ++i) dl.v[i] -= dlogprob * untempered.v[i];
        if constexpr (kReinmax) dl = dl - sent(untempered * 0.5f, dy.pack(j) - untempered_mean);
      }
      out.put(j, dl);
    }
    if (args.dtau) moment.tick();
    out.finish(out_row, block);
  });
  if (needs_untempered) {
    // The sampled token alone, in full precision: what the passes wrote there plus what only it receives.
    const int64_t id = args.ids[row];
    const float l = float(l_row[id]);
    if (l > -__builtin_inff()) {
      const float untempered = vexp2_one(splat((l - untempered_pivot) * kLog2E))[0] * untempered_inverse;
      float dl = chosen_weight * factor * (chosen_dy - mean) + dlogprob * (1.0f - untempered);
      if constexpr (kReinmax) dl += (chosen_dy - mean) - 0.5f * untempered * (chosen_dy - untempered_mean);
      out_row[id] = T(dl);
    }
  }
  // d/dtau of exp(s / tau) is -s / tau^2, and s - pivot = tau * log(weight): the pivot drops out, since dl sums to
  // zero.
  if (args.dtau) args.dtau[row] = kReinmax ? 0.0f : -moment.total();
}

static void softmax_backward(const BackwardArgs<float>& args, int64_t row, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() {
    with_estimator(args.estimator, [&]<Estimator kRule>() {
      if constexpr (kRule == Estimator::kNoisy) {
        if (args.in.given.ids) return backward_row<Element<kDtype>, kRule, true>(args, row, scratch);
      }
      backward_row<Element<kDtype>, kRule, false>(args, row, scratch);
    });
  });
}
