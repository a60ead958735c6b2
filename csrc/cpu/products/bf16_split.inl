// Float32 numbers as sums of two or three bfloat16 ones, thirty-two at a time. Included by avx512.cpp and amx.cpp
// inside a namespace and under a target pragma, like cpu/simd.h.
//
// The parts of a number that is too large for bfloat16 are an infinity and NaN, so a product of them is NaN.

constexpr int kTileParts = 3;            // bfloat16 numbers that one of float32 is the sum of
constexpr float kLargest = 0x1.ffp127f;  // and beyond: rounds to an infinity in bfloat16

struct TwoParts {
  __m512i nearest, rest;  // low's sixteen numbers, then high's
};

// In two parts: the nearest bfloat16 number (ties to even), then the one nearest to what that leaves.
//
// Greatest error of nearest + rest: 2^-17 of the number. Valid: 2^-103 <= |x| < kLargest, and 0. Numbers that are
// bfloat16 already have a rest of 0. Needs AVX512_BF16, which takes subnormal numbers for zero.
[[gnu::always_inline]] inline TwoParts split_in_two(__m512 low, __m512 high) {
  const __m512i nearest = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  const auto left = [](__m512 from, __m256i part) {
    return _mm512_sub_ps(from, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
  };
  const __m512 low_left = left(low, _mm512_castsi512_si256(nearest));
  const __m512 high_left = left(high, _mm512_extracti64x4_epi64(nearest, 1));
  return {nearest, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high_left, low_left))};
}

// In three parts, part by part: out[part] has low's number i and high's number i side by side as pair i, because the
// upper halves of two float32 vectors meet by one shift and one select.
//
// A part is the nearest to what the parts before it leave (ties away from zero), so that the next one is small. The
// last part leaves nothing: the sum of the three is the number, exactly. Valid: 2^-103 <= |x| < kLargest, and 0; parts
// of smaller numbers are subnormal, which the products take for zero.
[[gnu::always_inline]] inline void split_in_three(__m512 low, __m512 high, __m512i out[kTileParts]) {
  const __m512i upper = _mm512_set1_epi32(int(0xFFFF0000u)), half = _mm512_set1_epi32(0x8000);
  for (int part = 0; part < kTileParts; ++part) {
    const bool last = part + 1 == kTileParts;
    const __m512i a = last ? _mm512_castps_si512(low) : _mm512_add_epi32(_mm512_castps_si512(low), half);
    const __m512i b = last ? _mm512_castps_si512(high) : _mm512_add_epi32(_mm512_castps_si512(high), half);
    out[part] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, 0xF8);  // (a >> 16) | (b & upper)
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(b, upper)));
  }
}
