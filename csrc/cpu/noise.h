// The noise contract, sixty-four tokens at a time. Included like simd.h, after it, with the same words about errors.

constexpr int kBlock = 64, kVectors = kBlock / kLanes;

// Everything about a row's Philox calls that does not depend on the token, two of the ten rounds included.
struct RowKey {
  uint64_t seed;
  int64_t row;
  uint32_t domain;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  uint32_t round0_c2, round1_c0, round1_c2, round2_c0_low, round2_c2;

  RowKey(uint64_t seed_, int64_t row_, uint32_t domain_) : seed(seed_), row(row_), domain(domain_) {
    for (int i = 0; i < kPhiloxRounds; ++i) {
      k0[i] = uint32_t(seed) + uint32_t(i) * kPhiloxW0;
      k1[i] = uint32_t(seed >> 32) + uint32_t(i) * kPhiloxW1;
    }
    const uint32_t row_low = uint32_t(uint64_t(row)), row_high = uint32_t(uint64_t(row) >> 32);
    // Round 0 sees constants in c1, c2, c3; its products of c2 make c0 and c1 of round 1 constant, and so on.
    const uint64_t p1 = uint64_t(kPhiloxM1) * row_high;
    const uint32_t c0 = uint32_t(p1 >> 32) ^ row_low ^ k0[0], c1 = uint32_t(p1);
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
    round0_c2 = domain ^ k1[0];
    round1_c0 = c1 ^ k0[1];
    round1_c2 = uint32_t(p0 >> 32) ^ k1[1];
    round2_c0_low = k0[2];
    round2_c2 = uint32_t(p0) ^ k1[2];
  }
};

#if defined(GK_AVX512) || defined(GK_AVX2)
// Counters live in the low halves of 64-bit lanes: a widening multiply reads nothing else, so its product serves as the
// next low word as it is, and a round is two multiplies, two shifts and two (or four) exclusive ors.
#ifdef GK_AVX512
using wide = __m512i;
GK_INLINE wide w_set(uint32_t x) { return _mm512_set1_epi32(int32_t(x)); }
GK_INLINE wide w_mul(wide a, wide b) { return _mm512_mul_epu32(a, b); }
// A shuffle, not a shift: the multiplies are on the shift's port already. What is left above is ignored by the next
// multiply.
GK_INLINE wide w_high(wide a) { return _mm512_shuffle_epi32(a, _MM_PERM_DDBB); }
GK_INLINE wide w_xor3(wide a, wide b, wide c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
// Even 32-bit lanes of a, even 32-bit lanes of b in the odd places.
GK_INLINE wide w_pair(wide a, wide b) { return _mm512_mask_shuffle_epi32(a, 0xAAAA, b, _MM_PERM_CCAA); }
GK_INLINE wide w_low(wide a, wide b) { return _mm512_unpacklo_epi64(a, b); }
GK_INLINE wide w_high_pairs(wide a, wide b) { return _mm512_unpackhi_epi64(a, b); }
// Lane order that makes the unpacks below deliver tokens in order.
GK_INLINE wide w_counters(uint32_t q) { return _mm512_add_epi64(w_set(q), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)); }
constexpr int kCountersPerCall = 8, kTogether = 2;
#else
using wide = __m256i;
GK_INLINE wide w_set(uint32_t x) { return _mm256_set1_epi32(int32_t(x)); }
GK_INLINE wide w_mul(wide a, wide b) { return _mm256_mul_epu32(a, b); }
GK_INLINE wide w_high(wide a) { return _mm256_shuffle_epi32(a, 0xF5); }  // as above
GK_INLINE wide w_xor3(wide a, wide b, wide c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
GK_INLINE wide w_pair(wide a, wide b) { return _mm256_blend_epi32(a, _mm256_shuffle_epi32(b, 0xA0), 0xAA); }
GK_INLINE wide w_low(wide a, wide b) { return _mm256_unpacklo_epi64(a, b); }
GK_INLINE wide w_high_pairs(wide a, wide b) { return _mm256_unpackhi_epi64(a, b); }
GK_INLINE wide w_counters(uint32_t q) { return _mm256_add_epi64(w_set(q), _mm256_set_epi64x(3, 1, 2, 0)); }
constexpr int kCountersPerCall = 4, kTogether = 2;
#endif

// Words of the tokens of kCalls calls, in token order, to out. A round waits for the one before, so calls are
// interleaved.
template <int kCalls>
GK_INLINE void philox_calls(const RowKey& key, uint32_t q, uint32_t* out) {
  const wide m0 = w_set(kPhiloxM0), m1 = w_set(kPhiloxM1), zero = w_set(0);
  wide c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
#pragma GCC unroll 4
  for (int i = 0; i < kCalls; ++i) {
    wide p0 = w_mul(w_counters(q + uint32_t(i * kCountersPerCall)), m0);
    c2[i] = w_xor3(w_high(p0), w_set(key.round0_c2), zero), c3[i] = p0;
    wide p1 = w_mul(c2[i], m1);  // round 1
    c0[i] = w_xor3(w_high(p1), w_set(key.round1_c0), zero), c1[i] = p1;
    c2[i] = w_xor3(c3[i], w_set(key.round1_c2), zero);
    p0 = w_mul(c0[i], m0);  // round 2
    p1 = w_mul(c2[i], m1);
    c0[i] = w_xor3(w_high(p1), c1[i], w_set(key.round2_c0_low));
    c1[i] = p1;
    c2[i] = w_xor3(w_high(p0), w_set(key.round2_c2), zero);
    c3[i] = p0;
  }
#pragma GCC unroll 7
  for (int round = 3; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < kCalls; ++i) {
      const wide p0 = w_mul(c0[i], m0), p1 = w_mul(c2[i], m1);
      c0[i] = w_xor3(w_high(p1), c1[i], w_set(key.k0[round]));
      c1[i] = p1;
      c2[i] = w_xor3(w_high(p0), c3[i], w_set(key.k1[round]));
      c3[i] = p0;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCalls; ++i) {
    const wide w01 = w_pair(c0[i], c1[i]), w23 = w_pair(c2[i], c3[i]);
    *(wide*)(out + 4 * i * kCountersPerCall) = w_low(w01, w23);
    *(wide*)(out + (4 * i + 2) * kCountersPerCall) = w_high_pairs(w01, w23);
  }
}
// Words of the sixty-four tokens from counter q on, in token order.
GK_INLINE_IF_WIDE void noise_words(const RowKey& key, uint32_t q, u32 out[kVectors]) {
#pragma GCC unroll 2
  for (int i = 0; i < kBlock / 4; i += kTogether * kCountersPerCall) {
    philox_calls<kTogether>(key, q + uint32_t(i), (uint32_t*)out + 4 * i);
  }
}
#else
GK_INLINE_IF_WIDE void noise_words(const RowKey& key, uint32_t q, u32 out[kVectors]) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (int i = 0; i < 16; ++i) {
    c0[i] = q + uint32_t(i);
    c1[i] = uint32_t(uint64_t(key.row));
    c2[i] = uint32_t(uint64_t(key.row) >> 32);
    c3[i] = key.domain;
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < 16; ++i) {
      const uint64_t p0 = uint64_t(kPhiloxM0) * c0[i], p1 = uint64_t(kPhiloxM1) * c2[i];
      c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ key.k0[round];
      c1[i] = uint32_t(p1);
      c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ key.k1[round];
      c3[i] = uint32_t(p0);
    }
  }
  uint32_t* flat = (uint32_t*)out;
  for (int i = 0; i < 16; ++i) {
    flat[4 * i] = c0[i];
    flat[4 * i + 1] = c1[i];
    flat[4 * i + 2] = c2[i];
    flat[4 * i + 3] = c3[i];
  }
}
#endif

[[gnu::noinline, gnu::cold]] static void refine(const RowKey& key, int64_t token, const u32* words, f32* e) {
  for (int i = 0; i < kPack * kLanes; ++i) {
    const uint32_t w = ((const uint32_t*)words)[i];
    if (w < kRefineBelow) {
      ((float*)e)[i] =
          exponential_from_word<float>(w, token_word(key.seed, key.row, token + i, refinement_of(key.domain)));
    }
  }
}

// E = -log(1 - u), u = (w + 0.5) / 2^32, but for the refinement of words below kRefineBelow. Lanes: u32 to f32.
// Greatest error: relative 2.4e-7; for w < 2^20, where winners are, 6e-8. Valid: any word.
GK_INLINE_IF_WIDE f32p exponential_unrefined(u32p w) {
  f32p y, k, f;
#ifdef GK_AVX512
  for (int i = 0; i < kPack; ++i) y.v[i] = to_float(~w.v[i]) * 0x1p-32f + 0x1p-33f;  // 1 - u, exact where u is near 1
  split(y, k, f);
  // Where 1 - u > 3/4 its exponent is 0, and -u itself is the more precise f.
  for (int i = 0; i < kPack; ++i) {
    f.v[i] = select((i32)(w.v[i] < 0x40000000u), -(to_float(w.v[i]) * 0x1p-32f + 0x1p-33f), f.v[i]);
  }
#else
  // Conversion of signed numbers is a single instruction. It gives the distance from the nearer end: -u for words below
  // 2^31, 1 - u for the others.
  f32p end;
  for (int i = 0; i < kPack; ++i) {
    end.v[i] = __builtin_convertvector((i32)w.v[i], f32) * -0x1p-32f - 0x1p-33f;
    y.v[i] = select_negative(end.v[i], 1.0f + end.v[i], end.v[i]);
  }
  split(y, k, f);
  // 1 + end is rounded where end is -u. There k is 0 or -1, so f is end or 1 + 2 end, which is more precise.
  for (int i = 0; i < kPack; ++i) {
    f.v[i] = select_negative(end.v[i], end.v[i] * (1.0f - k.v[i]) - k.v[i], f.v[i]);
  }
#endif
  return fma(k, -kLn2, log1p_core(f) * -1.0f);
}

// E of the tokens of a pack that starts at `token`, refined. Lanes and error as above: where a word is refined, E is
// the standard library's.
GK_INLINE_IF_WIDE f32p exponential(const RowKey& key, int64_t token, u32p w) {
  f32p e = exponential_unrefined(w);
  u32 least = w.v[0];
  for (int i = 1; i < kPack; ++i) least = vmin(least, w.v[i]);
  if (__builtin_expect(any_below(least, kRefineBelow), 0)) {
    u32p words = w;  // their addresses must not escape from the usual path, or all of it would live in memory
    f32p refined = e;
    refine(key, token, words.v, refined.v);
    e = refined;
  }
  return e;
}

// Gumbel noise -log(E) of the tokens of a pack. Greatest error: 2.4e-7 absolute (E's) plus 1.1 ulp (the logarithm's).
GK_INLINE_IF_WIDE f32p gumbel(const RowKey& key, int64_t token, u32p w) {
  return vlog(exponential(key, token, w)) * -1.0f;
}

// ---- Posterior noise ------------------------------------------------------------------------------------------------
//
// With y = exp(l - T), the weight of a token that lost is base^(1 / tau), base = y / (y + E) = 1 / (1 + E exp(T - l)).

// Scores are l - log(E) where T is so far above that y is nearly 0 or underflows.
constexpr float kFarBelow = 0x1p-100f;
[[gnu::noinline, gnu::cold]] static void far_below(const f32p& l, const f32& largest, const f32p& y, const f32p& e,
                                                   f32p& log_base) {
  const f32p noise = vlog(e) * -1.0f;
  for (int i = 0; i < kPack; ++i) {
    log_base.v[i] = select(y.v[i] < kFarBelow, (l.v[i] - largest) + noise.v[i], log_base.v[i]);
  }
}

// base, from y up to 2^100.
GK_INLINE f32p posterior_base(f32p y, f32p e) {
  return each(GK_EACH(i) { return y.v[i] * reciprocal(y.v[i] + e.v[i]); });
}

// log(base), which is the score less T; -inf for a masked token.
GK_INLINE_IF_WIDE f32p posterior_log(f32p l, f32 largest, f32p y, f32p e, f32p base) {
  f32p out = vlog(each(GK_EACH(i) { return vmax(base.v[i], splat(0x1p-126f)); }));
  i32 far = {};
  for (int i = 0; i < kPack; ++i) {
    const i32 masked = l.v[i] == -__builtin_inff();
    out.v[i] = select(masked, l.v[i], out.v[i]);
    far |= (y.v[i] < kFarBelow) & ~masked;
  }
  if (__builtin_expect(any(far), 0)) {
    f32p settled = out;  // its address must not escape from the usual path
    far_below(l, largest, y, e, settled);
    out = settled;
  }
  return out;
}

// An upper bound of the noise, refined or not, for five instructions: g <= -log(u), and the bits of a float read as an
// integer are a lower bound of its base-2 logarithm. Lanes: u32 to f32. Rounding may take it below the noise by 1e-5,
// for which callers leave room. For words from 4096 on it is above -log(u) by at most 0.06. Valid: any word.
GK_INLINE f32 gumbel_bound(u32 w) {
#ifdef GK_AVX512
  const f32 x = to_float(w);
  constexpr float halved = 0.0f;
#else
  const f32 x = __builtin_convertvector((i32)(w >> 1), f32);  // signed conversion is one instruction everywhere
  constexpr float halved = 1.0f;
#endif
  return (127.0f + 32.0f - halved) * kLn2 - __builtin_convertvector((i32)x, f32) * (kLn2 * 0x1p-23f);
}
