// Kernels over a chunk of a head's logits, sixteen hidden rows in the lanes. Included like simd.h, after rows.inl.

constexpr int kCall = 4;  // tokens whose words one Philox call makes

// Philox for sixteen rows at one counter: what depends on the row alone is computed once, the rest is scalar until the
// two meet in the third round.
struct LaneKey {
  uint64_t seed;
  int64_t row[kLanes];
  uint32_t domain;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  alignas(64) uint64_t round1_c1[kLanes], round1_high[kLanes], round1_low[kLanes];  // even rows first, then odd ones

  LaneKey(const Noise& noise, int64_t first_row, int64_t rows, uint32_t domain_) : seed(noise.seed), domain(domain_) {
    for (int i = 0; i < kPhiloxRounds; ++i) {
      k0[i] = uint32_t(seed) + uint32_t(i) * kPhiloxW0;
      k1[i] = uint32_t(seed >> 32) + uint32_t(i) * kPhiloxW1;
    }
    for (int i = 0; i < kLanes; ++i) {
      row[i] = first_row + i < rows ? noise.row(first_row + i) : 0;
      const int place = (i & 1) * (kLanes / 2) + i / 2;
      const uint64_t p1 = uint64_t(kPhiloxM1) * uint32_t(uint64_t(row[i]) >> 32);
      const uint32_t c0 = uint32_t(p1 >> 32) ^ uint32_t(uint64_t(row[i])) ^ k0[0];
      const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
      round1_c1[place] = uint32_t(p1) ^ k0[1];
      round1_high[place] = uint32_t(p0 >> 32) ^ k1[1];
      round1_low[place] = uint32_t(p0) ^ k1[2];
    }
  }
};

// Words of tokens 4 * counter .. 4 * counter + 3 for the sixteen rows.
GK_STEP void lane_words(const LaneKey& key, uint32_t counter, u32 out[kCall]) {
  const uint64_t p0_scalar = uint64_t(kPhiloxM0) * counter;
  const uint64_t p1_scalar = uint64_t(kPhiloxM1) * (uint32_t(p0_scalar >> 32) ^ key.domain ^ key.k1[0]);
  const uint32_t c0_scalar = uint32_t(p1_scalar >> 32), c2_scalar = uint32_t(p0_scalar);
  const uint32_t c0_round2 = uint32_t(p1_scalar) ^ key.k0[2];
#if defined(GK_AVX512) || defined(GK_AVX2)
  constexpr int kWide = 2 * kCountersPerCall;  // lanes of `wide` counted as 32-bit ones
  const wide m0 = w_set(kPhiloxM0), m1 = w_set(kPhiloxM1), zero = w_set(0);
  wide parity[2][kCall];
#pragma GCC unroll 2
  for (int part = 0; part < kLanes / kWide; ++part) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const int place = odd * (kLanes / 2) + part * kCountersPerCall;
      wide c0 = w_xor3(*(const wide*)(key.round1_c1 + place), w_set(c0_scalar), zero);
      wide c2 = w_xor3(*(const wide*)(key.round1_high + place), w_set(c2_scalar), zero);
      wide p0 = w_mul(c0, m0), p1 = w_mul(c2, m1);  // round 2
      c0 = w_xor3(w_high(p1), w_set(c0_round2), zero);
      wide c1 = p1, c3 = p0;
      c2 = w_xor3(w_high(p0), *(const wide*)(key.round1_low + place), zero);
#pragma GCC unroll 7
      for (int round = 3; round < kPhiloxRounds; ++round) {
        p0 = w_mul(c0, m0);
        p1 = w_mul(c2, m1);
        c0 = w_xor3(w_high(p1), c1, w_set(key.k0[round]));
        c1 = p1;
        c2 = w_xor3(w_high(p0), c3, w_set(key.k1[round]));
        c3 = p0;
      }
      parity[odd][0] = c0;
      parity[odd][1] = c1;
      parity[odd][2] = c2;
      parity[odd][3] = c3;
    }
    for (int j = 0; j < kCall; ++j) ((wide*)(out + j))[part] = w_pair(parity[0][j], parity[1][j]);
  }
#else
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int place = (i & 1) * (kLanes / 2) + i / 2;
    const uint32_t a = uint32_t(key.round1_c1[place]) ^ c0_scalar, b = uint32_t(key.round1_high[place]) ^ c2_scalar;
    const uint64_t p0 = uint64_t(kPhiloxM0) * a, p1 = uint64_t(kPhiloxM1) * b;
    c0[i] = uint32_t(p1 >> 32) ^ c0_round2;
    c1[i] = uint32_t(p1);
    c2[i] = uint32_t(p0 >> 32) ^ uint32_t(key.round1_low[place]);
    c3[i] = uint32_t(p0);
  }
  for (int round = 3; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t(kPhiloxM0) * c0[i], p1 = uint64_t(kPhiloxM1) * c2[i];
      c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ key.k0[round];
      c1[i] = uint32_t(p1);
      c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ key.k1[round];
      c3[i] = uint32_t(p0);
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    out[0][i] = c0[i];
    out[1][i] = c1[i];
    out[2][i] = c2[i];
    out[3][i] = c3[i];
  }
#endif
}

[[gnu::noinline, gnu::cold]] static void refine_lanes(const LaneKey& key, int64_t token, u32 w, f32& e) {
  for (int i = 0; i < kLanes; ++i) {
    if (w[i] < kRefineBelow) {
      e[i] = exponential_from_word<float>(w[i], token_word(key.seed, key.row[i], token, kDomainRefine));
    }
  }
}

// E of one call's four tokens for the sixteen rows; the noise is -log(E).
GK_STEP void lane_exponential(const LaneKey& key, int64_t token, const u32 w[kCall], f32 out[kCall]) {
  for (int j = 0; j < kCall; j += kPack) {
    f32p e = exponential_unrefined(pack(w + j));
    u32 least = w[j];
    for (int i = 1; i < kPack; ++i) least = least < w[j + i] ? least : w[j + i];
    if (__builtin_expect(any_below(least, kRefineBelow), 0)) {
      for (int i = 0; i < kPack; ++i) {
        f32 refined = e.v[i];
        refine_lanes(key, token + j + i, w[j + i], refined);
        e.v[i] = refined;
      }
    }
    unpack(e, out + j);
  }
}

GK_STEP void lane_gumbel(const f32 e[kCall], f32 out[kCall]) {
  for (int j = 0; j < kCall; j += kPack) unpack(vlog(pack(e + j)) * -1.0f, out + j);
}

// c tanh(x / c). What is masked stays so, and NaN is NaN.
GK_INLINE f32 softcapped(f32 x, float softcap) {
  // tanh(y) = sign(y) (1 - t) / (1 + t) with t = exp(-2 |y|).
  const f32 y = x * (1.0f / softcap), magnitude = y < 0.0f ? -y : y;
  const f32 t = vexp2_one(magnitude * (-2.0f * kLog2E));
  // Small arguments cancel in 1 - t, where the odd series is exact enough.
  const f32 square = y * y;
  const f32 series = x * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.053968254f)));
  const f32 ratio = (1.0f - t) / (1.0f + t);
  const f32 value = select(magnitude < 0.1f, series, (y < 0.0f ? -ratio : ratio) * softcap);
  return select((x == x) & (x > -__builtin_inff()), value, x);
}

// The logits of up to four tokens; those outside [begin, end) are masked.
template <typename T>
GK_STEP void load_call(const HeadChunk& in, const void* logits, const float* bias, int64_t group, int64_t token,
                         int64_t begin, int64_t end, f32 out[kCall]) {
  const T* x = static_cast<const T*>(logits) + group * kLanes;
  for (int j = 0; j < kCall; ++j) {
    const int64_t t = token + j;
    if (__builtin_expect(t < begin || t >= end, 0)) {
      out[j] = splat(-__builtin_inff());
      continue;
    }
    __builtin_prefetch(x + (t + 16) * in.stride);
    out[j] = load(x + t * in.stride);
    if (bias) out[j] += bias[t];
  }
  if (in.softcap > 0.0f) {
    for (int j = 0; j < kCall; ++j) out[j] = softcapped(out[j], in.softcap);
  }
}

// Running maximum and sum of exp((x - max) * scale), lane by lane.
struct LaneSum {
  f32 max, sum;
  // Raise the maximum to cover x; returns whether anything changed and, if so, the factor of what was summed before.
  [[gnu::always_inline]] bool raise(const f32 x[kCall], f32 scale, f32& factor) {
    const f32 top = vmax(vmax(x[0], x[1]), vmax(x[2], x[3]));
    if (__builtin_expect(!any_gt(top, max), 1)) return false;
    const f32 raised = vmax(top, max);
    factor = vexp2_one((max - raised) * scale);
    max = raised;
    sum *= factor;
    return true;
  }
#ifdef GK_AVX512
  [[gnu::always_inline]]
#else
  [[gnu::noinline]]
#endif
  void weigh(const f32 x[kCall], f32 scale, f32 out[kCall]) {
    for (int j = 0; j < kCall; j += kPack) {
      f32p y;
      for (int i = 0; i < kPack; ++i) y.v[i] = (x[j + i] - max) * scale;
      unpack(vexp2(y), out + j);
    }
    sum += (out[0] + out[1]) + (out[2] + out[3]);
  }
};

// Starts at the most negative number: from -inf, -inf - -inf would make NaN.
GK_INLINE LaneSum empty_sum() { return {splat(-3.402823466e38f), f32{}}; }

GK_INLINE f32 load_lanes(const float* x, int64_t group, int64_t rows, float fill) {
  f32 out = splat(fill);
  for (int i = 0; i < kLanes && group * kLanes + i < rows; ++i) out[i] = x[group * kLanes + i];
  return out;
}

// Rows whose score is NaN or +inf.
[[gnu::noinline, gnu::cold]] static void mark_bad(const f32 s[kCall], HeadPiece& out, int32_t mark) {
  for (int j = 0; j < kCall; ++j) {
    for (int i = 0; i < kLanes; ++i) out.bad[i] |= s[j][i] < __builtin_inff() ? 0 : mark;
  }
}
GK_INLINE void check(const f32 s[kCall], HeadPiece& out, int32_t mark = 1) {
  const f32 sum = (s[0] + s[1]) + (s[2] + s[3]);
  if (__builtin_expect(any_not_le(sum, splat(3.402823466e38f)), 0)) mark_bad(s, out, mark);
}

// Candidates among four tokens: weight > uniform * bound, uniform the word times the golden ratio modulo one.
template <typename Score>
GK_STEP void collect(const f32 weight[kCall], const u32 w[kCall], f32 bound, int64_t token, HeadPiece& out, Found* found,
                     const Score& score) {
  const f32 unit = bound * -0x1p-32f;
  f32 excess[kCall];
  for (int j = 0; j < kCall; ++j) excess[j] = to_float(w[j] * 0x9E3779B1u) * unit + weight[j];
  if (__builtin_expect(!any_gt(vmax(vmax(excess[0], excess[1]), vmax(excess[2], excess[3])), f32{}), 1)) return;
  // One loop over all: its end is the only jump that nothing foresees.
  uint64_t rest = 0;
  for (int j = 0; j < kCall; ++j) rest |= uint64_t(greater_bits(excess[j], f32{})) << j * kLanes;
  for (; rest; rest &= rest - 1) {
    const int place = __builtin_ctzll(rest), j = place / kLanes, lane = place % kLanes;
    found[out.found++] = {int32_t(token) * kLanes + place, w[j][lane], score(j, lane)};
  }
}

// Token positions that a piece visits: four at a time, aligned to the noise's counters.
template <typename Visit>
GK_INLINE void for_each_call(const HeadChunk& in, int64_t begin, int64_t end, Visit&& visit) {
  const int64_t shift = (in.noise.vocab_start + in.first_token) & (kCall - 1);
  for (int64_t token = ((begin + shift) & ~int64_t(kCall - 1)) - shift; token < end; token += kCall) visit(token);
}

// The words of a piece's calls. They wait for nothing else, so drawn a call ahead they are made while logarithms and
// exponentials, chains of dependent instructions, leave the processor idle.
class Words {
 public:
  [[gnu::always_inline]] Words(const HeadChunk& in, const LaneKey& key, int64_t begin)
      : key_(key), counter_(uint32_t((in.noise.vocab_start + in.first_token + begin) >> 2)) {
    lane_words(key_, counter_, next_);
  }
  [[gnu::always_inline]] void take(u32 w[kCall]) {
    for (int j = 0; j < kCall; ++j) w[j] = next_[j];
    lane_words(key_, ++counter_, next_);
  }

 private:
  const LaneKey& key_;
  uint32_t counter_;
  u32 next_[kCall];
};

template <typename T>
static void sample_piece(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out) {
  const HeadChunk& in = args.in;
  const LaneKey key(in.noise, group * kLanes, in.rows, kDomainGumbel);
  f32 best = splat(-__builtin_inff()), threshold = best;
  i32 id = splat_i(0);
  LaneSum plain = empty_sum();
  Words words(in, key, begin);
  for_each_call(in, begin, end, [&](int64_t token) __attribute__((always_inline)) {
    f32 l[kCall], weight[kCall];
    u32 w[kCall];
    load_call<T>(in, in.logits, in.bias, group, token, begin, end, l);
    check(l, out);
    words.take(w);
    f32 bound[kCall];
    for (int j = 0; j < kCall; ++j) bound[j] = l[j] + gumbel_bound(w[j]);
    const i32 below = (bound[0] <= threshold) & (bound[1] <= threshold) & (bound[2] <= threshold) & (bound[3] <= threshold);
    if (__builtin_expect(any(~below), 0)) {
      f32 e[kCall], g[kCall];
      lane_exponential(key, in.noise.vocab_start + in.first_token + token, w, e);
      lane_gumbel(e, g);
      for (int j = 0; j < kCall; ++j) {
        const f32 s = l[j] + g[j];
        const i32 better = s > best;
        best = select(better, s, best);
        id = better ? splat_i(int32_t(token + j)) : id;
      }
      // Room for the bound's and the score's rounding.
      const f32 magnitude = best < 0.0f ? -best : best;
      threshold = best - (magnitude * 0x1p-21f + 1e-4f);
    }
    f32 factor;
    plain.raise(l, splat(kLog2E), factor);
    plain.weigh(l, splat(kLog2E), weight);
  });
  *(f32u*)out.score_max = best;
  *(f32u*)out.logit_max = plain.max;
  *(f32u*)out.logit_sum = plain.sum;
  for (int i = 0; i < kLanes; ++i) out.id[i] = id[i];
}

template <typename T>
static void scores_piece(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out,
                         Found* found) {
  const HeadChunk& in = args.in;
  const LaneKey key(in.noise, group * kLanes, in.rows, kDomainGumbel);
  const f32 scale = kLog2E / load_lanes(args.tau, group, in.rows, 1.0f);
  const f32 eps = splat(args.eps);
  LaneSum noisy = empty_sum(), plain = empty_sum();
  noisy.max = vmax(load_lanes(args.max, group, in.rows, 0.0f), noisy.max);
  f32 before = load_lanes(args.sum, group, in.rows, 0.0f), leader = splat(-__builtin_inff());
  i32 id = splat_i(0);
  Words words(in, key, begin);
  for_each_call(in, begin, end, [&](int64_t token) __attribute__((always_inline)) {
    f32 l[kCall], e[kCall], s[kCall], weight[kCall], unused[kCall], factor;
    u32 w[kCall];
    load_call<T>(in, in.logits, in.bias, group, token, begin, end, l);
    check(l, out);
    words.take(w);
    lane_exponential(key, in.noise.vocab_start + in.first_token + token, w, e);
    lane_gumbel(e, s);
    for (int j = 0; j < kCall; ++j) s[j] += l[j];
    if (noisy.raise(s, scale, factor)) {
      before *= factor;
      for (int j = 0; j < kCall; ++j) {
        const i32 better = s[j] > leader;
        leader = select(better, s[j], leader);
        id = better ? splat_i(int32_t(token + j)) : id;
      }
    }
    noisy.weigh(s, scale, weight);
    if (args.eps > 0.0f) {
      collect(weight, w, eps * (before + noisy.sum), token, out, found, [&](int j, int lane) { return s[j][lane]; });
    }
    plain.raise(l, splat(kLog2E), factor);
    plain.weigh(l, splat(kLog2E), unused);
  });
  *(f32u*)out.score_max = noisy.max;
  *(f32u*)out.score_sum = noisy.sum;
  *(f32u*)out.logit_max = plain.max;
  *(f32u*)out.logit_sum = plain.sum;
  for (int i = 0; i < kLanes; ++i) out.id[i] = leader[i] > -__builtin_inff() ? id[i] : -1;
}

// The same at tau = 1, where exp(l + g) is exp(l) / E: one exponential serves both sums, and the noise itself is wanted
// only where a token may win or may be a candidate.
template <typename T>
static void scores_piece_at_one(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out,
                                Found* found) {
  const HeadChunk& in = args.in;
  const LaneKey key(in.noise, group * kLanes, in.rows, kDomainGumbel);
  const f32 eps = splat(args.eps);
  const f32 max_before = load_lanes(args.max, group, in.rows, 0.0f), sum_before = load_lanes(args.sum, group, in.rows, 0.0f);
  LaneSum plain = empty_sum();
  // Sums of exp(score - plain.max), and what a weight must exceed for its token to be looked at as a winner.
  f32 before = {}, noisy = {}, hurdle = splat(-1.0f), leader = splat(-__builtin_inff());
  i32 id = splat_i(0);
  Words words(in, key, begin);
  for_each_call(in, begin, end, [&](int64_t token) __attribute__((always_inline)) {
    f32 l[kCall], e[kCall], weight[kCall], factor;
    u32 w[kCall];
    load_call<T>(in, in.logits, in.bias, group, token, begin, end, l);
    check(l, out);
    words.take(w);
    lane_exponential(key, in.noise.vocab_start + in.first_token + token, w, e);
    if (plain.raise(l, splat(kLog2E), factor)) {
      noisy *= factor;
      hurdle *= factor;
      // Where the row is far beyond this piece, any large number is bound enough.
      const f32 ahead = (max_before - plain.max) * kLog2E;
      before = sum_before * vexp2_one(ahead < 100.0f ? ahead : splat(100.0f));
    }
    plain.weigh(l, splat(kLog2E), weight);
    for (int j = 0; j < kCall; ++j) weight[j] *= reciprocal(e[j]);
    noisy += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    const f32 top = vmax(vmax(weight[0], weight[1]), vmax(weight[2], weight[3]));
    if (__builtin_expect(any_gt(top, hurdle), 0)) {
      f32 g[kCall];
      lane_gumbel(e, g);
      for (int j = 0; j < kCall; ++j) {
        const f32 s = l[j] + g[j];
        const i32 better = s > leader;
        leader = select(better, s, leader);
        id = better ? splat_i(int32_t(token + j)) : id;
      }
      hurdle = vmax(top * (1.0f - 0x1p-15f), hurdle);  // with room for the weights' rounding
    }
    if (args.eps > 0.0f) {
      collect(weight, w, eps * (before + noisy), token, out, found,
              [&](int j, int lane) { return l[j][lane] - std::log(e[j][lane]); });
    }
  });
  const i32 any_token = leader > -__builtin_inff();
  *(f32u*)out.score_max = select(any_token, leader, empty_sum().max);
  *(f32u*)out.score_sum = select(any_token, noisy * vexp2_one((plain.max - leader) * kLog2E), f32{});
  *(f32u*)out.logit_max = plain.max;
  *(f32u*)out.logit_sum = plain.sum;
  for (int i = 0; i < kLanes; ++i) out.id[i] = any_token[i] ? id[i] : -1;
}

template <typename T, bool kRef>
static void softmax_piece(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out,
                          Found* found) {
  const HeadChunk& in = args.in;
  const LaneKey key(in.noise, group * kLanes, in.rows, kDomainSupport);
  const f32 inverse_tau = 1.0f / load_lanes(args.tau, group, in.rows, 1.0f), scale = kLog2E * inverse_tau;
  const f32 eps = splat(args.eps);
  LaneSum sum = empty_sum(), ref_sum = empty_sum();
  sum.max = vmax(load_lanes(args.max, group, in.rows, 0.0f), sum.max);
  f32 before = load_lanes(args.sum, group, in.rows, 0.0f), moment = {};
  Words words(in, key, begin);
  for_each_call(in, begin, end, [&](int64_t token) __attribute__((always_inline)) {
    f32 l[kCall], r[kCall], weight[kCall], unused[kCall], factor;
    load_call<T>(in, in.logits, in.bias, group, token, begin, end, l);
    check(l, out);
    // The moment counts from the maxima, which may move: a constant on all logits does not show in it.
    const f32 old_max = sum.max, old_sum = sum.sum, old_ref = ref_sum.max;
    bool moved = sum.raise(l, scale, factor);
    if (moved) {
      before *= factor;
      moment *= factor;
    }
    const f32 kept_sum = sum.sum;
    sum.weigh(l, scale, weight);
    if constexpr (kRef) {
      load_call<T>(in, args.ref, args.ref_bias, group, token, begin, end, r);
      check(r, out, 2);
      moved |= ref_sum.raise(r, scale, factor);
      ref_sum.weigh(r, scale, unused);
    }
    if (__builtin_expect(moved, 0)) {
      const f32 distance = (old_max - sum.max) - (old_ref - ref_sum.max);
      moment += select((old_sum > 0.0f) & (kept_sum > 0.0f), kept_sum * (distance * inverse_tau), f32{});
    }
    for (int j = 0; j < kCall; ++j) {
      f32 x = l[j] - sum.max;
      if constexpr (kRef) x -= r[j] - ref_sum.max;
      moment += select(weight[j] > 0.0f, weight[j] * (x * inverse_tau), f32{});
    }
    if (args.eps > 0.0f) {
      u32 w[kCall];
      words.take(w);
      collect(weight, w, eps * (before + sum.sum), token, out, found, [&](int j, int lane) { return l[j][lane]; });
    }
  });
  *(f32u*)out.score_max = sum.max;
  *(f32u*)out.score_sum = sum.sum;
  *(f32u*)out.moment = moment;
  *(f32u*)out.logit_max = ref_sum.max;
  *(f32u*)out.logit_sum = ref_sum.sum;
}

#define GK_HEAD_DISPATCH(call)              \
  switch (args.in.dtype) {                  \
    case Dtype::kFloat: {                   \
      using T = float;                      \
      return call;                          \
    }                                       \
    case Dtype::kBFloat16: {                \
      using T = BFloat16;                   \
      return call;                          \
    }                                       \
    default: {                              \
      using T = Half;                       \
      return call;                          \
    }                                       \
  }

static void head_sample(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out, Found*) {
  GK_HEAD_DISPATCH(sample_piece<T>(args, group, begin, end, out))
}
static void head_scores(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out,
                        Found* found) {
  const f32 tau = load_lanes(args.tau, group, args.in.rows, 1.0f);
  if (!any(~(tau == 1.0f))) {
    GK_HEAD_DISPATCH(scores_piece_at_one<T>(args, group, begin, end, out, found))
  }
  GK_HEAD_DISPATCH(scores_piece<T>(args, group, begin, end, out, found))
}
static void head_softmax(const HeadArgs& args, int64_t group, int64_t begin, int64_t end, HeadPiece& out,
                         Found* found) {
  if (args.ref) {
    GK_HEAD_DISPATCH((softmax_piece<T, true>(args, group, begin, end, out, found)))
  }
  GK_HEAD_DISPATCH((softmax_piece<T, false>(args, group, begin, end, out, found)))
}
