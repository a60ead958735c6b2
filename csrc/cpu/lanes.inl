// Kernels over rows of given logits with kLanes rows in a vector. Included like simd.h, after lane_noise.h.
//
// They serve vocabularies too small to fill vectors, and rows whose tokens do not lie side by side. kLanes consecutive
// rows are a group. What a group's rows hold of one token is one vector, and a tile is up to kTile of them, in the
// first-level cache: all tokens of several groups, or where a vocabulary is larger than a tile, some tokens of a few.
// What a tile holds at a time is a patch.
// Work goes tile by tile in steps (words, exponential numbers, scores, weights), each a loop over independent vectors.
// So no vector is filled up with tokens that are not there, and chains of dependent instructions overlap.
//
// Scores are those of rows.inl to the last bit: noise is made by the same functions, lane by lane.

constexpr int kWideTokens = kTile / kWideGroups;  // in a patch of a vocabulary that is larger than a tile
constexpr int kMostGroups = 32;                   // in a tile
constexpr int kRoom = kTile + kTokensPerPhilox;   // steps may write so far beyond a tile's last vector

// Groups of rows from `first` on and tokens [begin, begin + tokens). Vector g * tokens + j of its tile is token
// begin + j of group g. In memory that has room for all tokens of the groups, its vectors begin at `place`.
struct Patch {
  int64_t first, begin;
  int groups, tokens;
  int vectors() const { return groups * tokens; }
  int64_t place() const { return begin * groups; }
  int64_t row(int g) const { return first + g * kLanes; }
};

GK_INLINE int rows_in_group(int64_t first, int64_t end) { return end - first < kLanes ? int(end - first) : kLanes; }

// ---- From memory to a tile and back ---------------------------------------------------------------------------------

// Where the rows of a group begin in memory. Lanes beyond its last row repeat that one.
struct Places {
  int64_t offset[kLanes];
  int64_t token_stride;
  int count;
  bool adjacent;  // one vector in memory has a token's numbers of all lanes

  [[gnu::always_inline]] Places(const View& x, int64_t first, int count_)
      : token_stride(x.token_stride), count(count_) {
    const int64_t a = x.inner == 1 ? first : first / x.inner, b = first - a * x.inner;
    const int64_t start = a * x.outer_stride + b * x.inner_stride;
    adjacent = false;
    if (x.inner == 1 || b + count <= x.inner) {
      const int64_t step = x.inner == 1 ? x.outer_stride : x.inner_stride;
      adjacent = step == 1 && count == kLanes;
      for (int i = 0; i < kLanes; ++i) offset[i] = start + (i < count ? i : count - 1) * step;
    } else {
      int64_t at = start, column = b, outer = a;
      for (int i = 0; i < kLanes; ++i) {
        offset[i] = at;
        if (i + 1 >= count) continue;
        at += x.inner_stride;
        if (++column == x.inner) {
          column = 0;
          at = ++outer * x.outer_stride;
        }
      }
    }
  }
};

// Four tokens of four rows.
using f32x4 = float __attribute__((vector_size(16)));
constexpr int kQuarters = kLanes / 4;

// A vector of such parts, and its parts.
GK_INLINE f32 joined(const f32x4 part[kQuarters]) {
#if defined(GK_AVX512)
  __m512 x = _mm512_castps128_ps512((__m128)part[0]);
  x = _mm512_insertf32x4(x, (__m128)part[1], 1);
  x = _mm512_insertf32x4(x, (__m128)part[2], 2);
  return (f32)_mm512_insertf32x4(x, (__m128)part[3], 3);
#elif defined(GK_AVX2)
  return (f32)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)part[0]), (__m128)part[1], 1);
#else
  return part[0];
#endif
}
GK_INLINE void part_up(f32 x, f32x4 part[kQuarters]) {
#if defined(GK_AVX512)
  part[0] = (f32x4)_mm512_castps512_ps128((__m512)x);
  part[1] = (f32x4)_mm512_extractf32x4_ps((__m512)x, 1);
  part[2] = (f32x4)_mm512_extractf32x4_ps((__m512)x, 2);
  part[3] = (f32x4)_mm512_extractf32x4_ps((__m512)x, 3);
#elif defined(GK_AVX2)
  part[0] = (f32x4)_mm256_castps256_ps128((__m256)x);
  part[1] = (f32x4)_mm256_extractf128_ps((__m256)x, 1);
#else
  part[0] = x;
#endif
}

// Part p of vector k is tokens 0 to 3 of row 4 p + k; afterwards, part p of vector j is token j of rows 4 p to 4 p + 3.
// It is its own inverse.
GK_INLINE void transpose(f32 x[4]) {
#if defined(GK_AVX512)
  const __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
  const __m512d ab = (__m512d)_mm512_unpacklo_ps(a, b), ab2 = (__m512d)_mm512_unpackhi_ps(a, b);
  const __m512d cd = (__m512d)_mm512_unpacklo_ps(c, d), cd2 = (__m512d)_mm512_unpackhi_ps(c, d);
  x[0] = (f32)_mm512_unpacklo_pd(ab, cd);
  x[1] = (f32)_mm512_unpackhi_pd(ab, cd);
  x[2] = (f32)_mm512_unpacklo_pd(ab2, cd2);
  x[3] = (f32)_mm512_unpackhi_pd(ab2, cd2);
#elif defined(GK_AVX2)
  const __m256 a = (__m256)x[0], b = (__m256)x[1], c = (__m256)x[2], d = (__m256)x[3];
  const __m256d ab = (__m256d)_mm256_unpacklo_ps(a, b), ab2 = (__m256d)_mm256_unpackhi_ps(a, b);
  const __m256d cd = (__m256d)_mm256_unpacklo_ps(c, d), cd2 = (__m256d)_mm256_unpackhi_ps(c, d);
  x[0] = (f32)_mm256_unpacklo_pd(ab, cd);
  x[1] = (f32)_mm256_unpackhi_pd(ab, cd);
  x[2] = (f32)_mm256_unpacklo_pd(ab2, cd2);
  x[3] = (f32)_mm256_unpackhi_pd(ab2, cd2);
#else
  f32 out[4];
  for (int j = 0; j < 4; ++j) {
    for (int k = 0; k < 4; ++k) out[j][k] = x[k][j];
  }
  for (int j = 0; j < 4; ++j) x[j] = out[j];
#endif
}

// kWidth numbers in memory, the rest zeros, and back. Without the instructions named, GCC goes through the stack.
template <int kWidth>
GK_INLINE f32x4 load_part(const float* x) {
#if defined(GK_AVX512) || defined(GK_AVX2)
  if constexpr (kWidth == 1) return (f32x4)_mm_load_ss(x);
  if constexpr (kWidth == 2) return (f32x4)_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)x));
  if constexpr (kWidth == 3) {
    return (f32x4)_mm_movelh_ps(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)x)), _mm_load_ss(x + 2));
  }
#endif
  f32x4 out{};
  __builtin_memcpy(&out, x, 4 * kWidth);
  return out;
}
template <int kWidth>
GK_INLINE void store_part(float* x, f32x4 part) {
  if constexpr (kWidth == 4) {
    __builtin_memcpy(x, &part, 16);
  } else {
    using Two = float __attribute__((vector_size(8)));
    if constexpr (kWidth >= 2) {
      const Two two{part[0], part[1]};
      __builtin_memcpy(x, &two, 8);
    }
    if constexpr (kWidth != 2) x[kWidth - 1] = part[kWidth - 1];
  }
}

// kWidth tokens of rows in memory at `x + offset[row]`, whose tokens lie side by side, to as many vectors, and back.
template <int kWidth>
GK_INLINE void load_columns(const float* x, const int64_t offset[kLanes], f32* out) {
  f32 column[4];
  for (int k = 0; k < 4; ++k) {
    f32x4 part[kQuarters];
    for (int p = 0; p < kQuarters; ++p) part[p] = load_part<kWidth>(x + offset[4 * p + k]);
    column[k] = joined(part);
  }
  transpose(column);
  for (int j = 0; j < kWidth; ++j) out[j] = column[j];
}
template <int kWidth>
GK_INLINE void store_columns(float* x, const int64_t offset[kLanes], int count, const f32* in) {
  f32 column[4] = {};
  for (int j = 0; j < kWidth; ++j) column[j] = in[j];
  transpose(column);
  for (int k = 0; k < 4; ++k) {
    f32x4 part[kQuarters];
    part_up(column[k], part);
    for (int p = 0; p < kQuarters; ++p) {
      if (4 * p + k < count) store_part<kWidth>(x + offset[4 * p + k], part[p]);
    }
  }
}

// The same for any number of tokens.
[[gnu::noinline]] static void load_rows(const float* x, const int64_t offset[kLanes], int tokens, f32* out) {
  int j = 0;
  for (; j + 4 <= tokens; j += 4) load_columns<4>(x + j, offset, out + j);
  switch (tokens - j) {
    case 1: return load_columns<1>(x + j, offset, out + j);
    case 2: return load_columns<2>(x + j, offset, out + j);
    case 3: return load_columns<3>(x + j, offset, out + j);
  }
}
GK_INLINE void store_full_rows(float* x, const int64_t offset[kLanes], int count, int tokens, const f32* in) {
  int j = 0;
  for (; j + 4 <= tokens; j += 4) store_columns<4>(x + j, offset, count, in + j);
  switch (tokens - j) {
    case 1: return store_columns<1>(x + j, offset, count, in + j);
    case 2: return store_columns<2>(x + j, offset, count, in + j);
    case 3: return store_columns<3>(x + j, offset, count, in + j);
  }
}
[[gnu::noinline]] static void store_rows(float* x, const int64_t offset[kLanes], int count, int tokens, const f32* in) {
  if (count == kLanes) store_full_rows(x, offset, kLanes, tokens, in);  // a loop without a condition
  else store_full_rows(x, offset, count, tokens, in);
}

// Rows of a narrower type pass through rows of float32 in the first-level cache.
struct Widened {
  alignas(64) float x[kLanes * kTile];
  int64_t offset[kLanes];

  [[gnu::always_inline]] explicit Widened(int tokens) {
    for (int i = 0; i < kLanes; ++i) offset[i] = i * tokens;
  }
};

// Whether the rows of a whole group follow one another in memory without a gap, so that they are one run of numbers.
GK_INLINE bool dense(const Places& at, int64_t tokens) {
  return at.count == kLanes && at.offset[kLanes - 1] - at.offset[0] == (kLanes - 1) * tokens &&
         at.offset[1] - at.offset[0] == tokens;
}

template <typename T>
GK_INLINE void widen(const T* x, int count, float* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = float(x[i]);
}
template <typename T>
GK_INLINE void narrow(const float* x, int count, T* out) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  for (; i < count; ++i) out[i] = T(x[i]);
}

// Tokens [begin, begin + tokens) of a group. In a patch of a large vocabulary each token may be on a page of its own,
// where the hardware foresees nothing, so the next patch is asked for.
template <typename T>
[[gnu::noinline]] static void load_tokens(const View& view, const Places& at, int64_t begin, int tokens, f32* out) {
  const T* x = static_cast<const T*>(view.data) + begin * at.token_stride;
  if (at.adjacent) {
    x += at.offset[0];
    for (int j = 0; j < tokens; ++j) {
      if (tokens == kWideTokens) __builtin_prefetch(x + (j + kWideTokens) * at.token_stride);
      out[j] = load(x + j * at.token_stride);
    }
    return;
  }
  if (at.token_stride == 1) {
    if constexpr (sizeof(T) == sizeof(float)) {
      load_rows(x, at.offset, tokens, out);
    } else {
      Widened rows(tokens);
      if (dense(at, tokens)) {
        widen(x + at.offset[0], kLanes * tokens, rows.x);
      } else {
        for (int i = 0; i < at.count; ++i) widen(x + at.offset[i], tokens, rows.x + rows.offset[i]);
        for (int i = at.count; i < kLanes; ++i) rows.offset[i] = rows.offset[at.count - 1];
      }
      load_rows(rows.x, rows.offset, tokens, out);
    }
    return;
  }
  for (int j = 0; j < tokens; ++j) {
    for (int i = 0; i < kLanes; ++i) out[j][i] = float(x[at.offset[i] + j * at.token_stride]);
  }
}

template <typename T>
[[gnu::noinline]] static void store_tokens(const View& view, const Places& at, int64_t begin, int tokens,
                                           const f32* in) {
  T* x = static_cast<T*>(view.data) + begin * at.token_stride;
  if (at.adjacent) {
    x += at.offset[0];
    for (int j = 0; j < tokens; ++j) {
      if (tokens == kWideTokens) __builtin_prefetch(x + (j + kWideTokens) * at.token_stride, 1);
      store(x + j * at.token_stride, in[j]);
    }
    return;
  }
  if (at.token_stride == 1) {
    if constexpr (sizeof(T) == sizeof(float)) {
      store_rows(x, at.offset, at.count, tokens, in);
    } else {
      Widened rows(tokens);
      store_rows(rows.x, rows.offset, kLanes, tokens, in);
      if (dense(at, tokens)) {
        narrow(rows.x, kLanes * tokens, x + at.offset[0]);
      } else {
        for (int i = 0; i < at.count; ++i) narrow(rows.x + rows.offset[i], tokens, x + at.offset[i]);
      }
    }
    return;
  }
  for (int j = 0; j < tokens; ++j) {
    for (int i = 0; i < at.count; ++i) x[at.offset[i] + j * at.token_stride] = T(in[j][i]);
  }
}

// One number per row of a group.
GK_INLINE f32 load_numbers(const float* x, int64_t first, int count, float fill) {
  if (count == kLanes) return load(x + first);
  f32 out = splat(fill);
  for (int i = 0; i < count; ++i) out[i] = x[first + i];
  return out;
}
GK_INLINE void store_numbers(float* x, int64_t first, int count, f32 in) {
  if (count == kLanes) return store(x + first, in);
  for (int i = 0; i < count; ++i) x[first + i] = in[i];
}

// ---- Noise ----------------------------------------------------------------------------------------------------------

// Words of `tokens` tokens from the global token on; a call of Philox may write three words more.
GK_INLINE void words_of(const LaneKey& key, int64_t token, int tokens, u32* out) {
  uint32_t counter = uint32_t(uint64_t(token) >> 2);
  int j = 0, place = int(token & 3);
  if (place) {
    u32 quad[kTokensPerPhilox];
    lane_words(key, counter++, quad);
    for (; place < kTokensPerPhilox && j < tokens; ++place, ++j) out[j] = quad[place];
  }
  for (; j < tokens; j += kTokensPerPhilox) lane_words(key, counter++, out + j);
}

[[gnu::noinline, gnu::cold]] static void refine_patch(const Rows& in, const Patch& at, const u32* words, f32* e) {
  for (int g = 0; g < at.groups; ++g) {
    for (int i = 0; i < kLanes && at.row(g) + i < in.rows; ++i) {
      for (int j = 0; j < at.tokens; ++j) {
        const uint32_t w = words[g * at.tokens + j][i];
        if (w >= kRefineBelow) continue;
        const int64_t row = in.noise.row(at.row(g) + i), token = in.noise.vocab_start + at.begin + j;
        e[g * at.tokens + j][i] = exponential_from_word<float>(w, token_word(in.noise.seed, row, token, kDomainRefine));
      }
    }
  }
}

// E of a patch, refined. Errors as in exponential().
GK_INLINE void exponentials(const Rows& in, const Patch& at, const u32* words, f32* e) {
  u32 least = splat_u(~0u);
  for (int i = 0; i < at.vectors(); i += kPack) {
    const u32p w = pack(words + i);
    for (int k = 0; k < kPack; ++k) least = vmin(least, w.v[k]);
    unpack(exponential_unrefined(w), e + i);
  }
  // Words beyond the last vector may be small, too, which does no harm.
  if (__builtin_expect(any_below(least, kRefineBelow), 0)) refine_patch(in, at, words, e);
}

// Logits and words of a patch.
template <typename T>
GK_INLINE void draw(const Rows& in, const Patch& at, int64_t end, LaneKey& key, f32* logits, u32* words) {
  for (int g = 0; g < at.groups; ++g) {
    const int64_t row = at.row(g);
    key.seek(in.noise, row, in.rows);
    words_of(key, in.noise.vocab_start + at.begin, at.tokens, words + g * at.tokens);
    load_tokens<T>(in.logits, Places(in.logits, row, rows_in_group(row, end)), at.begin, at.tokens,
                   logits + g * at.tokens);
  }
}

// l + g of a patch.
GK_INLINE void scores_of(const f32* logits, const f32* e, int vectors, f32* out) {
  for (int i = 0; i < vectors; i += kPack) unpack(pack(logits + i) + vlog(pack(e + i)) * -1.0f, out + i);
}

// exp2 of vectors in place.
GK_INLINE void exp2_of(f32* x, int64_t vectors) {
  for (int64_t i = 0; i < vectors; i += kPack) unpack(vexp2(pack(x + i)), x + i);
}

// Calls visit(patch) for the patches of some groups. How they are cut depends on the vocabulary alone, and so do sums.
template <typename Visit>
GK_INLINE void for_each_patch(int64_t first, int groups, int64_t vocab, Visit&& visit) {
  const int64_t most = vocab > kTile ? kWideTokens : vocab;
  for (int64_t begin = 0; begin < vocab; begin += most) {
    visit(Patch{first, begin, groups, int(vocab - begin < most ? vocab - begin : most)});
  }
}

// How many groups share a tile.
GK_INLINE int groups_in_tile(int64_t vocab, int64_t first, int64_t end) {
  const int64_t left = (end - first + kLanes - 1) / kLanes;
  int64_t most = vocab > kTile ? wide_groups(vocab) : kTile / vocab;
  if (most > kMostGroups) most = kMostGroups;
  return int(left < most ? left : most);
}

// ---- Forward --------------------------------------------------------------------------------------------------------

// The greatest score of each lane, and its token.
struct Best {
  f32 score;
  i32 id;

  [[gnu::always_inline]] Best() : score(splat(-__builtin_inff())), id{} {}
  // A tie stays with the token that came first.
  [[gnu::always_inline]] void take(f32 s, int32_t token) {
    const i32 better = s > score;
    score = select(better, s, score);
    id = better ? splat_i(token) : id;
  }
};

// NaN in the lanes that hold NaN or +inf.
[[gnu::noinline, gnu::cold]] static void mark_bad_lanes(const f32* x, int vectors, f32& bad) {
  for (int j = 0; j < vectors; ++j) bad = x[j] < __builtin_inff() ? bad : splat(__builtin_nanf(""));
}

// max(l + g) as it is returned: NaN in a bad row.
GK_INLINE f32 settled(f32 score_max, f32 bad) {
  const i32 good = (bad == bad) & (score_max > -__builtin_inff());
  return select(good, score_max, splat(__builtin_nanf("")));
}

// The sum of vectors, whose rounding error grows with the square root of their number. Where all are at most
// `FLT_MAX`, so is the sum, or it overflows.
GK_INLINE f32 sum_of(const f32* x, int count) {
  f32 a{}, b{};
  int j = 0;
  for (; j + 2 <= count; j += 2) {
    a += x[j];
    b += x[j + 1];
  }
  if (j < count) a += x[j];
  return a + b;
}

GK_INLINE void look_for_bad(const f32* x, int count, f32& bad) {
  if (__builtin_expect(any_not_le(sum_of(x, count), splat(3.402823466e38f)), 0)) mark_bad_lanes(x, count, bad);
}

// softmax((l + g) / tau).
template <typename T>
static void relax_soft(const RelaxArgs<float>& args, int64_t begin, int64_t end, float* scratch) {
  const Rows& in = args.in;
  const int64_t vocab = in.vocab;
  LaneKey key(in.noise.seed, kDomainGumbel);
  f32 logits[kRoom], e[kRoom], own[kRoom];
  u32 words[kRoom];
  f32* scores = vocab > kTile ? (f32*)scratch : own;
  for (int64_t first = begin; first < end;) {
    const int groups = groups_in_tile(vocab, first, end);
    f32 bad[kMostGroups], top[kMostGroups], scale[kMostGroups], total[kMostGroups];
    for (int g = 0; g < groups; ++g) {
      bad[g] = total[g] = f32{};
      top[g] = splat(-__builtin_inff());
    }
    for_each_patch(first, groups, vocab, [&](const Patch& at) __attribute__((always_inline)) {
      f32* s = scores + at.place();
      draw<T>(in, at, end, key, logits, words);
      exponentials(in, at, words, e);
      scores_of(logits, e, at.vectors(), s);
      for (int g = 0; g < groups; ++g, s += at.tokens) {
        look_for_bad(s, at.tokens, bad[g]);
        for (int j = 0; j < at.tokens; ++j) top[g] = vmax(s[j], top[g]);
      }
    });
    for (int g = 0; g < groups; ++g) {
      const int64_t row = first + g * kLanes;
      const int count = rows_in_group(row, end);
      bad[g] = settled(top[g], bad[g]);
      store_numbers(args.score_max, row, count, bad[g]);
      scale[g] = kLog2E / load_numbers(args.tau, row, count, 1.0f);
    }
    for_each_patch(first, groups, vocab, [&](const Patch& at) __attribute__((always_inline)) {
      f32* s = scores + at.place();
      for (int g = 0; g < groups; ++g, s += at.tokens) {
        for (int j = 0; j < at.tokens; ++j) s[j] = (s[j] - top[g]) * scale[g];
      }
      s = scores + at.place();
      exp2_of(s, at.vectors());
      for (int g = 0; g < groups; ++g, s += at.tokens) total[g] += sum_of(s, at.tokens);
    });
    // A bad row is NaN throughout.
    for (int g = 0; g < groups; ++g) total[g] = select(bad[g] == bad[g], 1.0f / total[g], bad[g]);
    for_each_patch(first, groups, vocab, [&](const Patch& at) __attribute__((always_inline)) {
      f32* s = scores + at.place();
      for (int g = 0; g < groups; ++g, s += at.tokens) {
        for (int j = 0; j < at.tokens; ++j) s[j] *= total[g];
        const int64_t row = at.row(g);
        store_tokens<T>(args.out, Places(args.out, row, rows_in_group(row, end)), at.begin, at.tokens, s);
      }
    });
    first += int64_t(groups) * kLanes;
  }
}

// One one in each row of a group, and zeros elsewhere.
template <typename T>
GK_INLINE void store_ones(const RelaxArgs<float>& args, int64_t row, int count, i32 id) {
  const Places at(args.out, row, count);
  T* x = static_cast<T*>(args.out.data);
  const int64_t vocab = args.in.vocab;
  if (!args.zeroed) {
    if (at.adjacent) {
      for (int64_t v = 0; v < vocab; ++v) store(x + at.offset[0] + v * at.token_stride, f32{});
    } else if (at.token_stride == 1) {
      if (dense(at, vocab)) {
        __builtin_memset(x + at.offset[0], 0, size_t(kLanes * vocab) * sizeof(T));
      } else {
        for (int i = 0; i < count; ++i) __builtin_memset(x + at.offset[i], 0, size_t(vocab) * sizeof(T));
      }
    } else {
      for (int64_t v = 0; v < vocab; ++v) {
        for (int i = 0; i < count; ++i) x[at.offset[i] + v * at.token_stride] = T(0.0f);
      }
    }
  }
  for (int i = 0; i < count; ++i) x[at.offset[i] + id[i] * at.token_stride] = T(1.0f);
}

// one_hot(argmax(l + g)).
template <typename T>
static void relax_hard(const RelaxArgs<float>& args, int64_t begin, int64_t end) {
  const Rows& in = args.in;
  const int64_t vocab = in.vocab;
  LaneKey key(in.noise.seed, kDomainGumbel);
  f32 logits[kRoom], e[kRoom];
  u32 words[kRoom];
  for (int64_t first = begin; first < end;) {
    const int groups = groups_in_tile(vocab, first, end);
    Best best[kMostGroups];
    f32 bad[kMostGroups] = {};
    for_each_patch(first, groups, vocab, [&](const Patch& at) __attribute__((always_inline)) {
      draw<T>(in, at, end, key, logits, words);
      exponentials(in, at, words, e);
      scores_of(logits, e, at.vectors(), logits);
      for (int g = 0; g < groups; ++g) {
        const f32* s = logits + g * at.tokens;
        look_for_bad(s, at.tokens, bad[g]);
        for (int j = 0; j < at.tokens; ++j) best[g].take(s[j], int32_t(at.begin) + j);
      }
    });
    for (int g = 0; g < groups; ++g) {
      const int64_t row = first + g * kLanes;
      const int count = rows_in_group(row, end);
      store_numbers(args.score_max, row, count, settled(best[g].score, bad[g]));
      store_ones<T>(args, row, count, best[g].id);
    }
    first += int64_t(groups) * kLanes;
  }
}

static void lanes_gumbel_softmax(const RelaxArgs<float>& args, int64_t begin, int64_t end, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() {
    if (args.hard) relax_hard<Element<kDtype>>(args, begin, end);
    else relax_soft<Element<kDtype>>(args, begin, end, scratch);
  });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// p (dy - mean) / tau with p = softmax((l + g) / tau), as backward_row has it.
template <typename T>
static void relax_backward(const BackwardArgs<float>& args, int64_t begin, int64_t end, float* scratch) {
  const Rows& in = args.in;
  const int64_t vocab = in.vocab;
  LaneKey key(in.noise.seed, kDomainGumbel);
  f32 logits[kRoom], e[kRoom], own[2][kRoom];
  u32 words[kRoom];
  // The gradient of y is kept beside the weights: strided memory is slow to read again.
  f32* all_weights = vocab > kTile ? (f32*)scratch : own[0];
  f32* all_dy = vocab > kTile ? all_weights + lane_room(vocab) : own[1];
  for (int64_t first = begin; first < end;) {
    const int groups = groups_in_tile(vocab, first, end);
    f32 pivot[kMostGroups], tau[kMostGroups], scale[kMostGroups], sum[kMostGroups], dot[kMostGroups];
    bool some_at_one = false, all_at_one = true;
    for (int g = 0; g < groups; ++g) {
      const int64_t row = first + g * kLanes;
      const int count = rows_in_group(row, end);
      pivot[g] = load_numbers(args.score_max, row, count, 0.0f);
      tau[g] = load_numbers(args.tau, row, count, 1.0f);
      scale[g] = kLog2E / tau[g];
      some_at_one |= any(tau[g] == 1.0f);
      all_at_one &= !any(tau[g] != 1.0f);
      sum[g] = dot[g] = f32{};
    }
    for_each_patch(first, groups, vocab, [&](const Patch& at) __attribute__((always_inline)) {
      f32 *w = all_weights + at.place(), *dy = all_dy + at.place();
      draw<T>(in, at, end, key, logits, words);
      for (int g = 0; g < groups; ++g) {
        const int64_t row = at.row(g);
        load_tokens<T>(args.dy, Places(args.dy, row, rows_in_group(row, end)), at.begin, at.tokens, dy + g * at.tokens);
      }
      exponentials(in, at, words, e);
      if (!all_at_one) {
        scores_of(logits, e, at.vectors(), w);
        for (int g = 0; g < groups; ++g) {
          for (int i = g * at.tokens; i < (g + 1) * at.tokens; ++i) w[i] = (w[i] - pivot[g]) * scale[g];
        }
        exp2_of(w, at.vectors());
      }
      // At tau = 1, exp(l + g - pivot) is exp(l - pivot) / E, one logarithm less. It must be so beside rows of any tau,
      // or a row's last bits would depend on its neighbours.
      if (some_at_one) {
        for (int g = 0; g < groups; ++g) {
          for (int i = g * at.tokens; i < (g + 1) * at.tokens; ++i) logits[i] = (logits[i] - pivot[g]) * kLog2E;
        }
        exp2_of(logits, at.vectors());
        for (int g = 0; g < groups; ++g) {
          const i32 at_one = tau[g] == 1.0f;
          for (int i = g * at.tokens; i < (g + 1) * at.tokens; ++i) {
            const f32 weight = logits[i] * reciprocal(e[i]);
            w[i] = all_at_one ? weight : select(at_one, weight, w[i]);
          }
        }
      }
      for (int g = 0; g < groups; ++g) {
        const f32 *own_dy = dy + g * at.tokens, *own_w = w + g * at.tokens;
        f32 some{}, part{};
        for (int j = 0; j < at.tokens; ++j) {
          some += own_w[j];
          part += select(own_w[j] != 0.0f, own_w[j] * own_dy[j], f32{});
        }
        sum[g] += some;
        dot[g] += part;
      }
    });
    f32 mean[kMostGroups], factor[kMostGroups], moment[kMostGroups];
    for (int g = 0; g < groups; ++g) {
      const f32 inverse = 1.0f / sum[g];
      mean[g] = dot[g] * inverse;
      factor[g] = inverse / tau[g];
      moment[g] = f32{};
    }
    for_each_patch(first, groups, vocab, [&](const Patch& at) __attribute__((always_inline)) {
      f32 *w = all_weights + at.place(), *dy = all_dy + at.place();
      for (int g = 0; g < groups; ++g) {
        for (int i = g * at.tokens; i < (g + 1) * at.tokens; ++i)
          dy[i] = select(w[i] != 0.0f, w[i] * factor[g] * (dy[i] - mean[g]), f32{});
      }
      if (args.dtau) {
        for (int i = 0; i < at.vectors(); ++i) e[i] = vmax(w[i], splat(0x1p-126f));  // where w was 0, so is dl
        for (int i = 0; i < at.vectors(); i += kPack) unpack(vlog(pack(e + i)), e + i);
        for (int g = 0; g < groups; ++g) {
          for (int i = g * at.tokens; i < (g + 1) * at.tokens; ++i) moment[g] += dy[i] * e[i];
        }
      }
      for (int g = 0; g < groups; ++g) {
        const int64_t row = at.row(g);
        store_tokens<T>(args.out, Places(args.out, row, rows_in_group(row, end)), at.begin, at.tokens,
                        dy + g * at.tokens);
      }
    });
    if (args.dtau) {
      for (int g = 0; g < groups; ++g) {
        const int64_t row = first + g * kLanes;
        store_numbers(args.dtau, row, rows_in_group(row, end), -moment[g]);
      }
    }
    first += int64_t(groups) * kLanes;
  }
}

static void lanes_softmax_backward(const BackwardArgs<float>& args, int64_t begin, int64_t end, float* scratch) {
  with_dtype(args.in.logits.dtype, [&]<Dtype kDtype>() { relax_backward<Element<kDtype>>(args, begin, end, scratch); });
}
