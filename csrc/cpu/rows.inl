// Kernels over one row of given logits. Included like simd.h, after noise.h.
//
// A row is walked in blocks of 64 tokens that start at multiples of 64 of the global token id, so a block's noise is a
// fixed set of Philox calls whatever shard of the vocabulary the row is. The first and the last block may be partial.

constexpr int kBlock = 64, kVectors = kBlock / kLanes;

// Partial sums are closed after this many blocks: rounding then grows with the square root of the number of groups
// instead of that of the vocabulary.
constexpr int kGroup = 16;

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

template <typename T>
GK_INLINE_IF_WIDE void load_block(const T* row, const Block& block, float fill, f32 out[kVectors]) {
  if (__builtin_expect(block.full(), 1)) {
    for (int j = 0; j < kVectors; ++j) out[j] = load(row + block.column + j * kLanes);
    return;
  }
  T staged[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    staged[i] = i >= block.first && i < block.last ? row[block.column + i] : T(fill);
  }
  for (int j = 0; j < kVectors; ++j) out[j] = load(staged + j * kLanes);
}

template <typename T>
GK_INLINE_IF_WIDE void store_block(T* row, const Block& block, const f32 x[kVectors]) {
  if (__builtin_expect(block.full(), 1)) {
    for (int j = 0; j < kVectors; ++j) store(row + block.column + j * kLanes, x[j]);
    return;
  }
  T staged[kBlock];
  for (int j = 0; j < kVectors; ++j) store(staged + j * kLanes, x[j]);
  for (int i = block.first; i < block.last; ++i) row[block.column + i] = staged[i];
}

// Sum over a row, lane by lane.
struct Sum {
  f32 inner[kVectors] = {}, outer = {};
  int blocks = 0;
  [[gnu::always_inline]] void close() {
    outer += (inner[0] + inner[1]) + (inner[2] + inner[3]);
    for (int j = 0; j < kVectors; ++j) inner[j] = f32{};
    blocks = 0;
  }
  [[gnu::always_inline]] void add(int j, f32p x) {
    for (int i = 0; i < kPack; ++i) inner[j + i] += x.v[i];
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

// Gumbel noise of sixteen tokens.
GK_INLINE_IF_WIDE f32 gumbel_one(const RowKey& key, int64_t token, u32 w) {
  u32p words;
  for (int i = 0; i < kPack; ++i) words.v[i] = splat_u(0x80000000u);
  words.v[0] = w;
  return gumbel(key, token, words).v[0];
}

// The exact scores of sixteen tokens, taken only where the bound says that one of them may win.
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
    f32 l[kVectors];
    u32 w[kVectors];
    load_block(l_row, block, -__builtin_inff(), l);
    noise_words(key, block.counter, w);
    f32 bound[kVectors];
    for (int j = 0; j < kVectors; ++j) bound[j] = l[j] + gumbel_bound(w[j]);
    const i32 none_above =
        (bound[0] <= threshold) & (bound[1] <= threshold) & (bound[2] <= threshold) & (bound[3] <= threshold);
    if (__builtin_expect(any(~none_above), 0)) {
      for (int j = 0; j < kVectors; ++j) {
        if (!any_not_le(bound[j], threshold)) continue;
        contest(key, in.noise.vocab_start + block.column + j * kLanes, block.column + j * kLanes, l[j], w[j], best);
        const float m = best.score_max;
        threshold =
            splat(m - (1e-4f + __builtin_fabsf(m) * 0x1p-21f));  // room for the bound's and the score's rounding
      }
    }
    if constexpr (kLogSumExp) {
      const f32 top = vmax(vmax(l[0], l[1]), vmax(l[2], l[3]));
      if (__builtin_expect(any_gt(top, lane_max), 0)) {
        const f32 raised = vmax(top, lane_max), scale = vexp2_one((lane_max - raised) * kLog2E);
        for (int j = 0; j < kVectors; ++j) sum.inner[j] *= scale;
        sum.outer *= scale;
        lane_max = raised;
      }
      for (int j = 0; j < kVectors; j += kPack) sum.add(j, vexp2((pack(l + j) - lane_max) * kLog2E));
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

// exp((l + g - pivot) / tau), or without noise exp((l - pivot) / tau), of one block. At tau = 1 the first is
// exp(l - pivot) / E, one logarithm less.
template <bool kNoisy>
GK_INLINE_IF_WIDE void weigh(const RowKey& key, int64_t vocab_start, const Block& block, const f32 l[kVectors],
                             float pivot, float scale, f32 out[kVectors]) {
  u32 w[kVectors];
  if constexpr (kNoisy) noise_words(key, block.counter, w);
  if (kNoisy && scale == kLog2E) {
    for (int j = 0; j < kVectors; j += kPack) {
      const f32p e = exponential(key, vocab_start + block.column + j * kLanes, pack(w + j));
      f32p weight = vexp2((pack(l + j) - pivot) * kLog2E);
      for (int i = 0; i < kPack; ++i) weight.v[i] *= reciprocal(e.v[i]);
      unpack(weight, out + j);
    }
    return;
  }
  for (int j = 0; j < kVectors; j += kPack) {
    f32p s = pack(l + j);
    if constexpr (kNoisy) s = s + gumbel(key, vocab_start + block.column + j * kLanes, pack(w + j));
    unpack(vexp2((s - pivot) * scale), out + j);
  }
}

// exp(l - pivot) of one block.
GK_INLINE_IF_WIDE void weigh_untempered(const f32 l[kVectors], float pivot, f32 out[kVectors]) {
  for (int j = 0; j < kVectors; j += kPack) unpack(vexp2((pack(l + j) - pivot) * kLog2E), out + j);
}

template <typename T, typename Out>
static void softmax_row(const SoftmaxArgs<float>& args, int64_t row, float* scratch) {
  const Rows& in = args.in;
  const T* l_row = in.logits.row<const T>(row);
  Out* out = args.out.row<Out>(row);
  const RowKey key(in.noise.seed, in.noise.row(row), kDomainGumbel);
  const float scale = kLog2E / args.tau[row], pivot = args.score_max[row];
  Sum sum;
  for_each_block(in.noise.vocab_start, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    f32 l[kVectors], e[kVectors];
    load_block(l_row, block, -__builtin_inff(), l);
    weigh<true>(key, in.noise.vocab_start, block, l, pivot, scale, e);
    for (int j = 0; j < kVectors; ++j) sum.inner[j] += e[j];
    sum.tick();
    if (args.normalize) store_block(scratch, block, e);
    else store_block(out, block, e);
  });
  args.total[row] = sum.total();
  if (!args.normalize) return;
  const float inverse = 1.0f / args.total[row];
  for_each_block(0, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    f32 e[kVectors];
    load_block(scratch, block, 0.0f, e);
    for (int j = 0; j < kVectors; ++j) e[j] *= inverse;
    store_block(out, block, e);
  });
}

static void softmax(const SoftmaxArgs<float>& args, int64_t row, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() {
    with_dtype(args.out.dtype, [&]<Dtype kOut>() { softmax_row<Element<kDtype>, Element<kOut>>(args, row, scratch); });
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <typename T, Estimator kEstimator>
static void backward_row(const BackwardArgs<float>& args, int64_t row, float* scratch) {
  constexpr bool kNoisy = kEstimator == Estimator::kNoisy, kReinmax = kEstimator == Estimator::kReinmax;
  const Rows& in = args.in;
  const T* l_row = in.logits.row<const T>(row);
  const T* dy_row = args.dy.row<const T>(row);
  T* out = args.out.row<T>(row);
  const RowKey key(in.noise.seed, in.noise.row(row), kDomainGumbel);
  const int64_t vocab_start = kNoisy ? in.noise.vocab_start : 0;
  const float tau = args.tau[row], scale = kLog2E / tau;
  const float pivot = kNoisy ? args.score_max[row] : args.logit_max[row];
  const float dlogprob = args.dlogprobs ? args.dlogprobs[row] : 0.0f;
  const bool needs_untempered = kReinmax || args.dlogprobs;
  const float untempered_pivot = needs_untempered ? args.logit_max[row] : 0.0f;
  const float untempered_inverse = needs_untempered ? 1.0f / args.logit_sum[row] : 0.0f;

  // First pass: weights to scratch, their sum, and their products with dy. A weight of exactly zero (masked, or beyond
  // the exponent's reach) sends nothing, whatever dy holds there.
  Sum sum, dot, untempered_dot;
  for_each_block(vocab_start, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    f32 l[kVectors], dy[kVectors], e[kVectors];
    load_block(l_row, block, -__builtin_inff(), l);
    load_block(dy_row, block, 0.0f, dy);
    weigh<kNoisy>(key, vocab_start, block, l, pivot, scale, e);
    for (int j = 0; j < kVectors; ++j) {
      sum.inner[j] += e[j];
      dot.inner[j] += select(e[j] != 0.0f, e[j] * dy[j], f32{});
    }
    if constexpr (kReinmax) {
      f32 untempered[kVectors];
      weigh_untempered(l, untempered_pivot, untempered);
      for (int j = 0; j < kVectors; ++j)
        untempered_dot.inner[j] += select(untempered[j] != 0.0f, untempered[j] * dy[j], f32{});
    }
    sum.tick();
    dot.tick();
    if constexpr (kReinmax) untempered_dot.tick();
    store_block(scratch, block, e);
  });
  const float inverse = 1.0f / sum.total();
  float mean = dot.total() * inverse, untempered_mean = 0.0f, chosen_dy = 0.0f;
  if (kReinmax || args.dlogprobs) chosen_dy = float(dy_row[args.ids[row]]);
  if constexpr (kReinmax) {
    mean = 0.5f * (mean + chosen_dy);
    untempered_mean = untempered_dot.total() * untempered_inverse;
  }

  // Second pass: the gradient. reinmax's middle distribution is (one_hot + p) / 2, so 2 J(middle) is p (dy - mean) away
  // from the sampled token, whose own half is added at the end.
  const float factor = kReinmax ? inverse : inverse / tau;
  Sum moment;
  for_each_block(0, 0, in.vocab, [&](const Block& block) __attribute__((always_inline)) {
    f32 e[kVectors], dy[kVectors], dl[kVectors];
    load_block(scratch, block, 0.0f, e);
    load_block(dy_row, block, 0.0f, dy);
    for (int j = 0; j < kVectors; ++j) {
      dl[j] = select(e[j] != 0.0f, e[j] * factor * (dy[j] - mean), f32{});
    }
    if (args.dtau) {
      for (int j = 0; j < kVectors; ++j) e[j] = vmax(e[j], splat(0x1p-126f));  // where e was 0, so is dl
      for (int j = 0; j < kVectors; j += kPack) moment.add(j, pack(dl + j) * vlog(pack(e + j)));
      moment.tick();
    }
    if (needs_untempered) {
      f32 l[kVectors], untempered[kVectors];
      load_block(l_row, block, -__builtin_inff(), l);
      weigh_untempered(l, untempered_pivot, untempered);
      for (int j = 0; j < kVectors; ++j) {
        untempered[j] *= untempered_inverse;
        dl[j] -= dlogprob * untempered[j];
        if constexpr (kReinmax)
          dl[j] -= select(untempered[j] != 0.0f, 0.5f * untempered[j] * (dy[j] - untempered_mean), f32{});
      }
    }
    store_block(out, block, dl);
  });
  if (needs_untempered) {
    // The sampled token alone, in full precision: what the passes wrote there plus what only it receives.
    const int64_t id = args.ids[row];
    const float l = float(l_row[id]);
    if (l > -__builtin_inff()) {
      const float e = scratch[id],
                  untempered = vexp2_one(splat((l - untempered_pivot) * kLog2E))[0] * untempered_inverse;
      float dl = e * factor * (chosen_dy - mean) + dlogprob * (1.0f - untempered);
      if constexpr (kReinmax) dl += (chosen_dy - mean) - 0.5f * untempered * (chosen_dy - untempered_mean);
      out[id] = T(dl);
    }
  }
  // d/dtau of exp(s / tau) is -s / tau^2, and s - pivot = tau * log(weight): the pivot drops out, since dl sums to
  // zero.
  if (args.dtau) args.dtau[row] = kReinmax ? 0.0f : -moment.total();
}

static void softmax_backward(const BackwardArgs<float>& args, int64_t row, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() {
    with_estimator(args.estimator,
                   [&]<Estimator kRule>() { backward_row<Element<kDtype>, kRule>(args, row, scratch); });
  });
}
