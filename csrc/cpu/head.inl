// Kernels over a chunk of a head's logits, hidden rows in the lanes. Included like simd.h, after lane_noise.h.
//
// A group of kHeadLanes rows is one vector or several. Each of these is taken through a whole span before the next: its
// statistics then stay in registers.

// The logits of a quad for the rows from first_row on; those outside the span are masked.
template <typename T>
GK_INLINE_IF_WIDE void load_quad(const HeadChunk& in, const void* logits, const float* bias, const Span& span,
                                 int64_t first_row, int64_t token, f32 out[kTokensPerPhilox]) {
  const T* x = static_cast<const T*>(logits) + first_row;
  for (int j = 0; j < kTokensPerPhilox; ++j) {
    const int64_t t = token + j;
    if (__builtin_expect(t < span.begin || t >= span.end, 0)) {
      out[j] = splat(-__builtin_inff());
      continue;
    }
    __builtin_prefetch(x + (t + 16) * in.stride);
    out[j] = load(x + t * in.stride);
    if (bias) out[j] += bias[t];
  }
  if (in.softcap > 0.0f) {
    for (int j = 0; j < kTokensPerPhilox; ++j) out[j] = softcapped(out[j], in.softcap);
  }
}

// exp2((x - max) * scale) of a quad, and `sum` plus these. Vectors come by reference, since a call would copy them.
GK_INLINE_IF_WIDE f32 add_weights(const f32& sum, const f32 x[kTokensPerPhilox], const f32& max, const f32& scale,
                                  f32 out[kTokensPerPhilox]) {
  for (int j = 0; j < kTokensPerPhilox; j += kPack) {
    f32p y;
    for (int i = 0; i < kPack; ++i) y.v[i] = (x[j + i] - max) * scale;
    unpack(vexp2(y), out + j);
  }
  return sum + ((out[0] + out[1]) + (out[2] + out[3]));
}

// Running maximum and sum of exp2((x - max) * scale), lane by lane.
struct LaneSum {
  f32 max, sum;

  // Starts at the most negative number: from -inf, -inf - -inf would make NaN. (Constructors are written out, because
  // the compiler's own would be compiled without this file's instruction set.)
  [[gnu::always_inline]] LaneSum() : max(splat(-3.402823466e38f)), sum{} {}

  // Raises the maximum to cover x. Returns whether anything changed and, if so, the factor of what was summed before.
  [[gnu::always_inline]] bool raise(const f32 x[kTokensPerPhilox], f32 scale, f32& factor) {
    const f32 top = vmax(vmax(x[0], x[1]), vmax(x[2], x[3]));
    if (__builtin_expect(!any_gt(top, max), 1)) return false;
    const f32 raised = vmax(top, max);
    factor = vexp2_one((max - raised) * scale);
    max = raised;
    sum *= factor;
    return true;
  }
  [[gnu::always_inline]] void weigh(const f32 x[kTokensPerPhilox], f32 scale, f32 out[kTokensPerPhilox]) {
    sum = add_weights(sum, x, max, scale, out);
  }
  [[gnu::always_inline]] void add(const f32 x[kTokensPerPhilox], f32 scale) {
    f32 factor, unused[kTokensPerPhilox];
    raise(x, scale, factor);
    weigh(x, scale, unused);
  }
};

// The best score so far and its token, lane by lane.
struct LaneBest {
  f32 score;
  i32 id;

  [[gnu::always_inline]] LaneBest() : score(splat(-__builtin_inff())), id{} {}

  // A tie stays with the smaller token.
  [[gnu::always_inline]] void take(const f32 s[kTokensPerPhilox], int64_t token) {
    for (int j = 0; j < kTokensPerPhilox; ++j) take(j, s[j], token);
  }
  [[gnu::always_inline]] void take(int j, f32 s, int64_t token) {
    const i32 better = s > score;
    score = select(better, s, score);
    id = better ? splat_i(int32_t(token + j)) : id;
  }
};

GK_INLINE f32 load_lanes(const float* x, int64_t first_row, int64_t rows, float fill) {
  f32 out = splat(fill);
  for (int i = 0; i < kLanes && first_row + i < rows; ++i) out[i] = x[first_row + i];
  return out;
}

// Rows with a logit that is NaN or +inf.
[[gnu::noinline, gnu::cold]] static void mark_bad(const f32 l[kTokensPerPhilox], int32_t bad[kLanes], int32_t mark) {
  for (int j = 0; j < kTokensPerPhilox; ++j) {
    for (int i = 0; i < kLanes; ++i) bad[i] |= l[j][i] < __builtin_inff() ? 0 : mark;
  }
}
GK_INLINE void check(const f32 l[kTokensPerPhilox], int32_t bad[kLanes], int32_t mark) {
  const f32 sum = (l[0] + l[1]) + (l[2] + l[3]);
  if (__builtin_expect(any_not_le(sum, splat(3.402823466e38f)), 0)) mark_bad(l, bad, mark);
}

// Candidates of a quad: weight > uniform * bound, uniform the word times the golden ratio modulo one. first_lane is the
// vector's first row in its group.
template <typename Score>
GK_INLINE_IF_WIDE void collect(const f32 weight[kTokensPerPhilox], const u32 w[kTokensPerPhilox], f32 bound,
                               int64_t token, int first_lane, Piece& out, Hit* hits, const Score& score) {
  f32 excess[kTokensPerPhilox];
#ifdef GK_AVX512
  const f32 unit = bound * -0x1p-32f;
  for (int j = 0; j < kTokensPerPhilox; ++j) excess[j] = to_float(w[j] * 0x9E3779B1u) * unit + weight[j];
#else
  // Conversion of signed numbers is a single instruction. What is left out of the uniform number would only make it
  // larger, and the candidates fewer.
  const f32 unit = bound * -0x1p-31f;
  for (int j = 0; j < kTokensPerPhilox; ++j) {
    excess[j] = __builtin_convertvector((i32)((w[j] * 0x9E3779B1u) >> 1), f32) * unit + weight[j];
  }
#endif
  if (__builtin_expect(!any_gt(vmax(vmax(excess[0], excess[1]), vmax(excess[2], excess[3])), f32{}), 1)) return;
  // One loop over the set bits of all four vectors, so that there is a single branch that is hard to predict: its end.
  uint64_t rest = 0;
  for (int j = 0; j < kTokensPerPhilox; ++j) rest |= uint64_t(greater_bits(excess[j], f32{})) << j * kLanes;
  for (; rest; rest &= rest - 1) {
    const int bit = __builtin_ctzll(rest), j = bit / kLanes, lane = bit % kLanes;
    hits[out.hits++] = {(int32_t(token) + j) * kHeadLanes + first_lane + lane, w[j][lane], score(j, lane)};
  }
}

// Calls visit(token) for the first tokens of the quads that cover a span. Quads begin at multiples of four of the
// global token id, as the noise's counters do, so the first quad may begin before the span.
template <typename Visit>
GK_INLINE void for_each_quad(const HeadChunk& in, const Span& span, Visit&& visit) {
  constexpr int64_t kMask = kTokensPerPhilox - 1;
  const int64_t shift = (in.noise.vocab_start + in.first_token) & kMask;
  for (int64_t token = ((span.begin + shift) & ~kMask) - shift; token < span.end; token += kTokensPerPhilox)
    visit(token);
}

// The words of a span's quads, in order. They wait for nothing else, so drawn a quad ahead they are made while
// logarithms and exponentials, chains of dependent instructions, leave the processor idle.
class Words {
 public:
  [[gnu::always_inline]] Words(const HeadChunk& in, const LaneKey& key, int64_t begin)
      : key_(key), counter_(uint32_t((in.noise.vocab_start + in.first_token + begin) >> 2)) {
    lane_words(key_, counter_, next_);
  }
  [[gnu::always_inline]] void take(u32 w[kTokensPerPhilox]) {
    for (int j = 0; j < kTokensPerPhilox; ++j) w[j] = next_[j];
    lane_words(key_, ++counter_, next_);
  }

 private:
  const LaneKey& key_;
  uint32_t counter_;
  u32 next_[kTokensPerPhilox];
};

// ---- Passes ---------------------------------------------------------------------------------------------------------
//
// A pass is a class with the statistics of its lanes. `run_piece` shows it the quads of a span one after the other
// (`visit`), then asks it for the result (`store`), which begins at the vector's first lane in its group.

// The quad at hand and what belongs to it.
struct Quad {
  const HeadArgs& args;
  const Span& span;
  const LaneKey& key;
  Words& words;
  int64_t first_row, token;  // the vector's, and the quad's first token's place in the chunk

  int first_lane() const { return int(first_row % kHeadLanes); }
  int64_t global_token() const { return args.in.noise.vocab_start + args.in.first_token + token; }
};

template <typename T, typename Pass>
static void run_piece(const HeadArgs& args, const Span& span, typename Pass::Result& out, Hit* hits) {
  const HeadChunk& in = args.in;
  for (int lane = 0; lane < kHeadLanes; lane += kLanes) {
    const int64_t first_row = span.group * kHeadLanes + lane;
    if (first_row >= in.rows) break;
    const LaneKey key(in.noise, first_row, in.rows, Pass::domain(args));
    Pass pass(args, span, first_row);
    Words words(in, key, span.begin);
    for_each_quad(in, span, [&](int64_t token) __attribute__((always_inline)) {
      f32 l[kTokensPerPhilox];
      load_quad<T>(in, in.logits, in.bias, span, first_row, token, l);
      check(l, out.bad + lane, 1);
      pass.template visit<T>(Quad{args, span, key, words, first_row, token}, l, out, hits);
    });
    pass.store(out, lane);
  }
}

// argmax(l + g), and the sum of exp(l).
struct SamplePass {
  using Result = SamplePiece;
  static uint32_t domain(const HeadArgs&) { return kDomainGumbel; }

  LaneBest best;
  f32 threshold = splat(-__builtin_inff());  // a token whose upper bound of l + g is at most this cannot win
  LaneSum logits;

  [[gnu::always_inline]] SamplePass(const HeadArgs&, const Span&, int64_t) {}

  template <typename T>
  [[gnu::always_inline]] void visit(const Quad& at, const f32 l[kTokensPerPhilox], SamplePiece&, Hit*) {
    u32 w[kTokensPerPhilox];
    at.words.take(w);
    f32 bound[kTokensPerPhilox];
    for (int j = 0; j < kTokensPerPhilox; ++j) bound[j] = l[j] + gumbel_bound(w[j]);
    const i32 below =
        (bound[0] <= threshold) & (bound[1] <= threshold) & (bound[2] <= threshold) & (bound[3] <= threshold);
    if (__builtin_expect(any(~below), 0)) {
      f32 e[kTokensPerPhilox], g[kTokensPerPhilox];
      lane_exponential(at.key, at.global_token(), w, e);
      lane_gumbel(e, g);
      for (int j = 0; j < kTokensPerPhilox; ++j) best.take(j, l[j] + g[j], at.token);
      // 2^-21 of the score and 1e-4 cover the rounding of both.
      const f32 magnitude = best.score < 0.0f ? -best.score : best.score;
      threshold = best.score - (magnitude * 0x1p-21f + 1e-4f);
    }
    logits.add(l, splat(kLog2E));
  }

  [[gnu::always_inline]] void store(SamplePiece& out, int lane) const {
    *(f32u*)(out.score_max + lane) = best.score;
    *(f32u*)(out.logit_max + lane) = logits.max;
    *(f32u*)(out.logit_sum + lane) = logits.sum;
    *(i32u*)(out.id + lane) = best.id;
  }
};

// The same, and the sum of exp((l + g) / tau) with its candidates.
struct ScoresPass {
  using Result = ScoresPiece;
  static uint32_t domain(const HeadArgs&) { return kDomainGumbel; }

  const f32 scale, eps;
  LaneSum scores, logits;
  f32 before;  // the sum of all chunks before this one, relative to scores.max
  LaneBest best;

  [[gnu::always_inline]] ScoresPass(const HeadArgs& args, const Span&, int64_t first_row)
      : scale(kLog2E / load_lanes(args.tau, first_row, args.in.rows, 1.0f)),
        eps(splat(args.eps)),
        before(load_lanes(args.sum, first_row, args.in.rows, 0.0f)) {
    // Weights count from the row's maximum so far, so that what earlier chunks rule out is no candidate.
    scores.max = vmax(load_lanes(args.max, first_row, args.in.rows, 0.0f), scores.max);
  }

  template <typename T>
  [[gnu::always_inline]] void visit(const Quad& at, const f32 l[kTokensPerPhilox], ScoresPiece& out, Hit* hits) {
    f32 e[kTokensPerPhilox], s[kTokensPerPhilox], weight[kTokensPerPhilox], factor;
    u32 w[kTokensPerPhilox];
    at.words.take(w);
    lane_exponential(at.key, at.global_token(), w, e);
    lane_gumbel(e, s);
    for (int j = 0; j < kTokensPerPhilox; ++j) s[j] += l[j];
    if (scores.raise(s, scale, factor)) {
      before *= factor;
      best.take(s, at.token);
    }
    scores.weigh(s, scale, weight);
    if (at.args.eps > 0.0f) {
      const auto score = [&](int j, int lane) { return s[j][lane]; };
      collect(weight, w, eps * (before + scores.sum), at.token, at.first_lane(), out, hits, score);
    }
    logits.add(l, splat(kLog2E));
  }

  [[gnu::always_inline]] void store(ScoresPiece& out, int lane) const {
    *(f32u*)(out.score_max + lane) = scores.max;
    *(f32u*)(out.score_sum + lane) = scores.sum;
    *(f32u*)(out.logit_max + lane) = logits.max;
    *(f32u*)(out.logit_sum + lane) = logits.sum;
    *(i32u*)(out.id + lane) = best.score > -__builtin_inff() ? best.id : splat_i(-1);
  }
};

// ScoresPass at tau = 1, where exp(l + g) is exp(l) / E: one exponential serves both sums, and the noise itself is
// wanted only where a token may win or may be a candidate.
struct ScoresAtOnePass {
  using Result = ScoresPiece;
  static uint32_t domain(const HeadArgs&) { return kDomainGumbel; }

  const f32 eps, max_before, sum_before;  // of all chunks before this one
  LaneSum logits;
  f32 before = {}, noisy = {};  // sums of exp(score - logits.max): of the chunks before this one, and of the span
  f32 hurdle = splat(-1.0f);    // a token with a smaller weight cannot win
  LaneBest best;

  [[gnu::always_inline]] ScoresAtOnePass(const HeadArgs& args, const Span&, int64_t first_row)
      : eps(splat(args.eps)),
        max_before(load_lanes(args.max, first_row, args.in.rows, 0.0f)),
        sum_before(load_lanes(args.sum, first_row, args.in.rows, 0.0f)) {}

  template <typename T>
  [[gnu::always_inline]] void visit(const Quad& at, const f32 l[kTokensPerPhilox], ScoresPiece& out, Hit* hits) {
    f32 e[kTokensPerPhilox], weight[kTokensPerPhilox], factor;
    u32 w[kTokensPerPhilox];
    at.words.take(w);
    lane_exponential(at.key, at.global_token(), w, e);
    if (logits.raise(l, splat(kLog2E), factor)) {
      noisy *= factor;
      hurdle *= factor;
      // Clamped at 2^100, so that it stays finite: with that much before it, no token of this span is a candidate
      // anyway.
      const f32 ahead = (max_before - logits.max) * kLog2E;
      before = sum_before * vexp2_one(ahead < 100.0f ? ahead : splat(100.0f));
    }
    logits.weigh(l, splat(kLog2E), weight);
    for (int j = 0; j < kTokensPerPhilox; ++j) weight[j] *= reciprocal(e[j]);
    noisy += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    const f32 top = vmax(vmax(weight[0], weight[1]), vmax(weight[2], weight[3]));
    if (__builtin_expect(any_gt(top, hurdle), 0)) {
      f32 g[kTokensPerPhilox];
      lane_gumbel(e, g);
      for (int j = 0; j < kTokensPerPhilox; ++j) best.take(j, l[j] + g[j], at.token);
      hurdle = vmax(top * (1.0f - 0x1p-15f), hurdle);  // with room for the weights' rounding
    }
    if (at.args.eps > 0.0f) {
      const auto score = [&](int j, int lane) { return l[j][lane] - std::log(e[j][lane]); };
      collect(weight, w, eps * (before + noisy), at.token, at.first_lane(), out, hits, score);
    }
  }

  [[gnu::always_inline]] void store(ScoresPiece& out, int lane) const {
    const i32 any_token = best.score > -__builtin_inff();
    *(f32u*)(out.score_max + lane) = select(any_token, best.score, LaneSum{}.max);
    *(f32u*)(out.score_sum + lane) = select(any_token, noisy * vexp2_one((logits.max - best.score) * kLog2E), f32{});
    *(f32u*)(out.logit_max + lane) = logits.max;
    *(f32u*)(out.logit_sum + lane) = logits.sum;
    *(i32u*)(out.id + lane) = any_token ? best.id : splat_i(-1);
  }
};

// The same with posterior noise: weights are base^(1 / tau) (see noise.h), and 1 at the given token. At tau = 1 there
// is no logarithm but E's. One exponential serves both sums.
template <bool kAtOne>
struct PosteriorPass {
  using Result = ScoresPiece;
  static uint32_t domain(const HeadArgs& args) { return args.given.domain; }

  const f32 scale, eps, largest;  // largest: T
  LaneSum logits;
  f32 reach = {};        // exp(logits.max - T)
  f32 before, sum = {};  // of weights: in the chunks before this one, and in the span
  i32 given;             // place in the chunk, if it is in the span

  [[gnu::always_inline]] PosteriorPass(const HeadArgs& args, const Span& span, int64_t first_row)
      : scale(kLog2E / load_lanes(args.tau, first_row, args.in.rows, 1.0f)),
        eps(splat(args.eps)),
        largest(load_lanes(args.given_scores, first_row, args.in.rows, 0.0f)),
        before(load_lanes(args.sum, first_row, args.in.rows, 0.0f)) {
    for (int i = 0; i < kLanes; ++i) {
      given[i] = INT32_MIN;
      if (first_row + i >= args.in.rows) continue;
      const int64_t place = args.given.ids[first_row + i] - args.in.first_token;
      if (place >= span.begin && place < span.end) given[i] = int32_t(place);
    }
  }

  template <typename T>
  [[gnu::always_inline]] void visit(const Quad& at, const f32 l[kTokensPerPhilox], ScoresPiece& out, Hit* hits) {
    f32 e[kTokensPerPhilox], y[kTokensPerPhilox], weight[kTokensPerPhilox], factor;
    u32 w[kTokensPerPhilox];
    at.words.take(w);
    lane_exponential(at.key, at.global_token(), w, e);
    if (logits.raise(l, splat(kLog2E), factor)) {
      // Clamped at 2^100, so that it stays finite. T is that far below a logit only if it is none of these logits'.
      const f32 ahead = (logits.max - largest) * kLog2E;
      reach = vexp2_one(ahead < 100.0f ? ahead : splat(100.0f));
    }
    logits.weigh(l, splat(kLog2E), y);
    for (int j = 0; j < kTokensPerPhilox; ++j) y[j] *= reach;
    const f32p base = posterior_base(pack(y), pack(e));
    f32p log_base;
    if constexpr (kAtOne) {
      unpack(base, weight);
    } else {
      log_base = posterior_log(pack(l), largest, pack(y), pack(e), base);
      unpack(vexp2(each(GK_EACH(j) { return log_base.v[j] * scale; })), weight);
    }
    for (int j = 0; j < kTokensPerPhilox; ++j) {
      const i32 won = given == splat_i(int32_t(at.token + j));
      weight[j] = select(won, splat(1.0f), weight[j]);
    }
    sum += (weight[0] + weight[1]) + (weight[2] + weight[3]);
    if (at.args.eps > 0.0f) {
      const auto score = [&](int j, int lane) {
        if (given[lane] == at.token + j) return 0.0f;
        return kAtOne ? std::log(base.v[j][lane]) : log_base.v[j][lane];
      };
      collect(weight, w, eps * (before + sum), at.token, at.first_lane(), out, hits, score);
    }
  }

  [[gnu::always_inline]] void store(ScoresPiece& out, int lane) const {
    *(f32u*)(out.score_max + lane) = f32{};
    *(f32u*)(out.score_sum + lane) = sum;
    *(f32u*)(out.logit_max + lane) = logits.max;
    *(f32u*)(out.logit_sum + lane) = logits.sum;
    *(i32u*)(out.id + lane) = splat_i(-1);
  }
};

// The sum of exp(l / tau) with its moment and candidates, and with kRef the sum of the reference's exp(r / tau).
template <bool kRef>
struct SoftmaxPass {
  using Result = SoftmaxPiece;
  static uint32_t domain(const HeadArgs&) { return kDomainSupport; }

  const f32 inverse_tau, scale, eps;
  LaneSum logits, ref;
  f32 before;  // the sum of all chunks before this one, relative to logits.max
  f32 moment = {};

  [[gnu::always_inline]] SoftmaxPass(const HeadArgs& args, const Span&, int64_t first_row)
      : inverse_tau(1.0f / load_lanes(args.tau, first_row, args.in.rows, 1.0f)),
        scale(kLog2E * inverse_tau),
        eps(splat(args.eps)),
        before(load_lanes(args.sum, first_row, args.in.rows, 0.0f)) {
    logits.max = vmax(load_lanes(args.max, first_row, args.in.rows, 0.0f), logits.max);  // as in ScoresPass
  }

  template <typename T>
  [[gnu::always_inline]] void visit(const Quad& at, const f32 l[kTokensPerPhilox], SoftmaxPiece& out, Hit* hits) {
    f32 r[kTokensPerPhilox], weight[kTokensPerPhilox], unused[kTokensPerPhilox], factor;
    // Moment: the sum of weight * ((l - max l) - (r - max r)) / tau. If a maximum rises, each term shifts by the
    // change, so the moment gains (sum so far) * change / tau.
    const f32 old_max = logits.max, old_sum = logits.sum, old_ref = ref.max;
    bool moved = logits.raise(l, scale, factor);
    if (moved) {
      before *= factor;
      moment *= factor;
    }
    const f32 kept_sum = logits.sum;
    logits.weigh(l, scale, weight);
    if constexpr (kRef) {
      load_quad<T>(at.args.in, at.args.ref, at.args.ref_bias, at.span, at.first_row, at.token, r);
      check(r, out.bad + at.first_lane(), 2);
      moved |= ref.raise(r, scale, factor);
      ref.weigh(r, scale, unused);
    }
    if (__builtin_expect(moved, 0)) {
      const f32 distance = (old_max - logits.max) - (old_ref - ref.max);
      moment += select((old_sum > 0.0f) & (kept_sum > 0.0f), kept_sum * (distance * inverse_tau), f32{});
    }
    for (int j = 0; j < kTokensPerPhilox; ++j) {
      f32 x = l[j] - logits.max;
      if constexpr (kRef) x -= r[j] - ref.max;
      moment += select(weight[j] > 0.0f, weight[j] * (x * inverse_tau), f32{});
    }
    if (at.args.eps > 0.0f) {
      u32 w[kTokensPerPhilox];
      at.words.take(w);
      const auto score = [&](int j, int lane) { return l[j][lane]; };
      collect(weight, w, eps * (before + logits.sum), at.token, at.first_lane(), out, hits, score);
    }
  }

  [[gnu::always_inline]] void store(SoftmaxPiece& out, int lane) const {
    *(f32u*)(out.max + lane) = logits.max;
    *(f32u*)(out.sum + lane) = logits.sum;
    *(f32u*)(out.moment + lane) = moment;
    *(f32u*)(out.ref_max + lane) = ref.max;
    *(f32u*)(out.ref_sum + lane) = ref.sum;
  }
};

static void head_sample(const HeadArgs& args, const Span& span, SamplePiece& out) {
  with_dtype(args.in.dtype, [&]<Dtype kDtype>() { run_piece<Element<kDtype>, SamplePass>(args, span, out, nullptr); });
}
static void head_scores(const HeadArgs& args, const Span& span, ScoresPiece& out, Hit* hits) {
  const int64_t first = span.group * kHeadLanes,
                last = first + kHeadLanes < args.in.rows ? first + kHeadLanes : args.in.rows;
  bool at_one = true;
  for (int64_t row = first; row < last; ++row) at_one &= args.tau[row] == 1.0f;
  with_dtype(args.in.dtype, [&]<Dtype kDtype>() {
    if (args.given.ids) {
      if (at_one) run_piece<Element<kDtype>, PosteriorPass<true>>(args, span, out, hits);
      else run_piece<Element<kDtype>, PosteriorPass<false>>(args, span, out, hits);
    } else if (at_one) {
      run_piece<Element<kDtype>, ScoresAtOnePass>(args, span, out, hits);
    } else {
      run_piece<Element<kDtype>, ScoresPass>(args, span, out, hits);
    }
  });
}
static void head_softmax(const HeadArgs& args, const Span& span, SoftmaxPiece& out, Hit* hits) {
  with_dtype(args.in.dtype, [&]<Dtype kDtype>() {
    if (args.ref) {
      run_piece<Element<kDtype>, SoftmaxPass<true>>(args, span, out, hits);
    } else {
      run_piece<Element<kDtype>, SoftmaxPass<false>>(args, span, out, hits);
    }
  });
}
