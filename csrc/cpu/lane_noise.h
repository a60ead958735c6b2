// The noise contract for rows in the lanes: a vector holds one token's number of each of kLanes rows. Included like
// simd.h, after noise.h, with the same words about errors.

// Tokens come in quads: the four tokens whose words one Philox call makes.
constexpr int kTokensPerPhilox = 4;

#if defined(GK_AVX512)
// The even ones of the 64-bit numbers of two vectors, and the odd ones.
GK_INLINE wide w_even(wide a, wide b) {
  return _mm512_permutex2var_epi64(a, _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0), b);
}
GK_INLINE wide w_odd(wide a, wide b) {
  return _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 13, 11, 9, 7, 5, 3, 1), b);
}
#elif defined(GK_AVX2)
GK_INLINE wide w_even(wide a, wide b) { return _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(a, b), 0xD8); }
GK_INLINE wide w_odd(wide a, wide b) { return _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(a, b), 0xD8); }
#endif

// Philox for the rows of a vector at one counter: what depends on the row alone is computed once, the rest is scalar
// until the two meet in the third round.
struct LaneKey {
  uint64_t seed;
  uint32_t domain;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  alignas(64) int64_t row[kLanes];
  alignas(64) uint64_t round1_c1[kLanes], round1_high[kLanes], round1_low[kLanes];  // even rows first, then odd ones

  LaneKey(uint64_t seed_, uint32_t domain_) : seed(seed_), domain(domain_) {
    for (int i = 0; i < kPhiloxRounds; ++i) {
      k0[i] = uint32_t(seed) + uint32_t(i) * kPhiloxW0;
      k1[i] = uint32_t(seed >> 32) + uint32_t(i) * kPhiloxW1;
    }
  }
  LaneKey(const Noise& noise, int64_t first_row, int64_t rows, uint32_t domain_) : LaneKey(noise.seed, domain_) {
    seek(noise, first_row, rows);
  }

  // The rows from first_row on. Lanes beyond the last of so many rows get some identity.
  [[gnu::always_inline]] void seek(const Noise& noise, int64_t first_row, int64_t rows) {
    if (!noise.row_ids) {
      for (int i = 0; i < kLanes; ++i) row[i] = first_row + i;
    } else {
      for (int i = 0; i < kLanes; ++i) row[i] = first_row + i < rows ? noise.row_ids[first_row + i] : 0;
    }
#if defined(GK_AVX512) || defined(GK_AVX2)
    constexpr int kWide = 2 * kCountersPerCall;
    const wide m0 = w_set(kPhiloxM0), m1 = w_set(kPhiloxM1), zero = w_set(0);
    for (int part = 0; part < kLanes / kWide; ++part) {
      const wide a = *(const wide*)(row + part * kWide), b = *(const wide*)(row + part * kWide + kCountersPerCall);
      for (int odd = 0; odd < 2; ++odd) {
        const int place = odd * (kLanes / 2) + part * kCountersPerCall;
        const wide ids = odd ? w_odd(a, b) : w_even(a, b);
        const wide p1 = w_mul(w_high(ids), m1), c0 = w_xor3(w_high(p1), ids, w_set(k0[0])), p0 = w_mul(c0, m0);
        *(wide*)(round1_c1 + place) = w_xor3(p1, w_set(k0[1]), zero);
        *(wide*)(round1_high + place) = w_xor3(w_high(p0), w_set(k1[1]), zero);
        *(wide*)(round1_low + place) = w_xor3(p0, w_set(k1[2]), zero);
      }
    }
#else
    for (int i = 0; i < kLanes; ++i) {
      const int place = (i & 1) * (kLanes / 2) + i / 2;
      const uint64_t p1 = uint64_t(kPhiloxM1) * uint32_t(uint64_t(row[i]) >> 32);
      const uint32_t c0 = uint32_t(p1 >> 32) ^ uint32_t(uint64_t(row[i])) ^ k0[0];
      const uint64_t p0 = uint64_t(kPhiloxM0) * c0;
      round1_c1[place] = uint32_t(p1) ^ k0[1];
      round1_high[place] = uint32_t(p0 >> 32) ^ k1[1];
      round1_low[place] = uint32_t(p0) ^ k1[2];
    }
#endif
  }
};

// Words of tokens 4 * counter .. 4 * counter + 3 for the rows of a vector.
GK_INLINE_IF_WIDE void lane_words(const LaneKey& key, uint32_t counter, u32 out[kTokensPerPhilox]) {
  const uint64_t p0_scalar = uint64_t(kPhiloxM0) * counter;
  const uint64_t p1_scalar = uint64_t(kPhiloxM1) * (uint32_t(p0_scalar >> 32) ^ key.domain ^ key.k1[0]);
  const uint32_t c0_scalar = uint32_t(p1_scalar >> 32), c2_scalar = uint32_t(p0_scalar);
  const uint32_t c0_round2 = uint32_t(p1_scalar) ^ key.k0[2];
#if defined(GK_AVX512) || defined(GK_AVX2)
  constexpr int kWide = 2 * kCountersPerCall;  // lanes of `wide` counted as 32-bit ones
  const wide m0 = w_set(kPhiloxM0), m1 = w_set(kPhiloxM1), zero = w_set(0);
#pragma GCC unroll 2
  for (int part = 0; part < kLanes / kWide; ++part) {
    // A round waits for the one before, so those of even and of odd rows are interleaved.
    wide c0[2], c1[2], c2[2], c3[2];
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const int place = odd * (kLanes / 2) + part * kCountersPerCall;
      const wide p0 = w_mul(w_xor3(*(const wide*)(key.round1_c1 + place), w_set(c0_scalar), zero), m0);  // round 2
      const wide p1 = w_mul(w_xor3(*(const wide*)(key.round1_high + place), w_set(c2_scalar), zero), m1);
      c0[odd] = w_xor3(w_high(p1), w_set(c0_round2), zero);
      c1[odd] = p1;
      c2[odd] = w_xor3(w_high(p0), *(const wide*)(key.round1_low + place), zero);
      c3[odd] = p0;
    }
#pragma GCC unroll 7
    for (int round = 3; round < kPhiloxRounds; ++round) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const wide p0 = w_mul(c0[odd], m0), p1 = w_mul(c2[odd], m1);
        c0[odd] = w_xor3(w_high(p1), c1[odd], w_set(key.k0[round]));
        c1[odd] = p1;
        c2[odd] = w_xor3(w_high(p0), c3[odd], w_set(key.k1[round]));
        c3[odd] = p0;
      }
    }
    const wide words[2][kTokensPerPhilox] = {{c0[0], c1[0], c2[0], c3[0]}, {c0[1], c1[1], c2[1], c3[1]}};
    for (int j = 0; j < kTokensPerPhilox; ++j) ((wide*)(out + j))[part] = w_pair(words[0][j], words[1][j]);
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
      e[i] = exponential_from_word<float>(w[i], token_word(key.seed, key.row[i], token, refinement_of(key.domain)));
    }
  }
}

// E of a quad for the rows of a vector, refined. `token` is the quad's first. Errors as in exponential().
GK_INLINE_IF_WIDE void lane_exponential(const LaneKey& key, int64_t token, const u32 w[kTokensPerPhilox],
                                        f32 out[kTokensPerPhilox]) {
  for (int j = 0; j < kTokensPerPhilox; j += kPack) {
    f32p e = exponential_unrefined(pack(w + j));
    u32 least = w[j];
    for (int i = 1; i < kPack; ++i) least = vmin(least, w[j + i]);
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

// Gumbel noise -log(E) of a quad. Error as in gumbel().
GK_INLINE_IF_WIDE void lane_gumbel(const f32 e[kTokensPerPhilox], f32 out[kTokensPerPhilox]) {
  for (int j = 0; j < kTokensPerPhilox; j += kPack) unpack(vlog(pack(e + j)) * -1.0f, out + j);
}
