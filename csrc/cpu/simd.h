// Vectors as wide as the instruction set's registers, in the compiler's own vector types, so that one source serves
// AVX-512, AVX2, NEON and the rest. Wider ones would be cut into pieces: the compiler does that badly, and lanes by the
// piece leave no registers for interleaving several chains of dependent instructions.
//
// Included once by each kernels_<isa>.cpp inside its own namespace and under its own target pragma; hence no include
// guard, and no includes of its own (a standard function compiled for one instruction set must never serve another).
//
// What is said of a function: its lanes, its greatest error, and the arguments it is valid for. Errors are the greatest
// of all instruction sets, were measured against float64 and are checked by tests/backends/cpu/test_simd.py. One ulp is
// the distance of the result's neighbours. A function without a word about its error is exact.

#define GK_INLINE [[gnu::always_inline]] static inline

// For the steps of kernels' inner loops. With 128-bit registers a step is many instructions: a call costs nothing
// beside them, and inlining every step everywhere would make a library of four times the size, a minute to compile.
#if defined(GK_AVX512) || defined(GK_AVX2)
#define GK_INLINE_IF_WIDE GK_INLINE
#else
#define GK_INLINE_IF_WIDE [[gnu::noinline]] static
#endif

#if defined(GK_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(GK_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // NEON's, SSE2's
#endif
constexpr int kLanes = kVectorBytes / 4;

using f32 = float __attribute__((vector_size(kVectorBytes)));
using i32 = int32_t __attribute__((vector_size(kVectorBytes)));
using u32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using u16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using f32u = float __attribute__((vector_size(kVectorBytes), aligned(4)));
using i32u = int32_t __attribute__((vector_size(kVectorBytes), aligned(4)));
using i8u = int8_t __attribute__((vector_size(kVectorBytes / 4), aligned(1)));
using u16u = uint16_t __attribute__((vector_size(kVectorBytes / 2), aligned(2)));

// The C++ type of a dtype's numbers; see with_dtype.
template <Dtype kDtype>
struct ElementOf {
  using Type = float;
};
template <>
struct ElementOf<Dtype::kBFloat16> {
  using Type = BFloat16;
};
template <>
struct ElementOf<Dtype::kHalf> {
  using Type = Half;
};
template <Dtype kDtype>
using Element = typename ElementOf<kDtype>::Type;

GK_INLINE f32 splat(float x) { return f32{} + x; }
GK_INLINE i32 splat_i(int32_t x) { return i32{} + x; }
GK_INLINE u32 splat_u(uint32_t x) { return u32{} + x; }

// a where a lane of the mask is all ones, b where it is zero.
GK_INLINE f32 select(i32 mask, f32 a, f32 b) {
#ifdef GK_AVX2
  return (f32)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);  // GCC would compare the mask with zero first
#else
  return mask ? a : b;
#endif
}
// a where x is negative (-0 counts), else b.
GK_INLINE f32 select_negative(f32 x, f32 a, f32 b) {
#ifdef GK_AVX2
  return select((i32)x, a, b);  // it looks at the sign bit alone
#else
  return select((i32)x < 0, a, b);
#endif
}
// The larger of two; b where either is NaN.
GK_INLINE f32 vmax(f32 a, f32 b) {
#ifdef GK_AVX2
  return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
GK_INLINE u32 vmin(u32 a, u32 b) {
#ifdef GK_AVX2
  return (u32)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
  return a < b ? a : b;
#endif
}

// Whether any lane's bits are not all zero.
GK_INLINE bool any(i32 mask) {
#if defined(GK_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(GK_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  using i64 = int64_t __attribute__((vector_size(kVectorBytes)));
  const i64 m = (i64)mask;
  return (m[0] | m[1]) != 0;
#endif
}

// 1 / x. Lanes: f32. Greatest error: 0.53 ulp. Valid: [2^-126, 2^126].
GK_INLINE f32 reciprocal(f32 x) {
#ifdef GK_AVX512
  const f32 r = (f32)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// A bit per lane: whether a > b. False where either is NaN.
GK_INLINE uint32_t greater_bits(f32 a, f32 b) {
#if defined(GK_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif defined(GK_AVX2)
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)));
#else
  const i32 mask = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

// Whether a <= b fails in any lane, as it does where either is NaN.
GK_INLINE bool any_not_le(f32 a, f32 b) {
#if defined(GK_AVX512)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ) != 0;
#elif defined(GK_AVX2)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLE_UQ)) != 0;
#else
  return any(~(a <= b));
#endif
}
// Whether a > b in any lane. Lanes with a NaN do not count.
GK_INLINE bool any_gt(f32 a, f32 b) { return greater_bits(a, b) != 0; }

// Valid: bound > 0.
GK_INLINE bool any_below(u32 a, uint32_t bound) {
#ifdef GK_AVX512
  return _mm512_cmplt_epu32_mask((__m512i)a, _mm512_set1_epi32(int(bound))) != 0;
#else
  return any(a == vmin(a, splat_u(bound - 1)));
#endif
}

// Lanes: u32 to f32. Rounds to nearest, ties to even.
GK_INLINE f32 to_float(u32 x) {
#ifdef GK_AVX512
  return (f32)_mm512_cvtepu32_ps((__m512i)x);
#else
  // Unsigned conversion is slow or missing elsewhere: both halves are exact, and their sum rounds once.
  return __builtin_convertvector((i32)(x >> 16), f32) * 65536.0f + __builtin_convertvector((i32)(x & 0xFFFFu), f32);
#endif
}

// The sum of the lanes, in a fixed order: halves of the vector are added up until one number is left. Greatest error: a
// rounding for each time, 2^-24 of the sum of the lanes' magnitudes.
GK_INLINE float reduce_sum(f32 x) {
#ifdef GK_AVX2
  __m128 s = _mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1);
  s += _mm_movehl_ps(s, s);
  return s[0] + s[1];
#else
  float s[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) s[i] = x[i] + x[i + kLanes / 2];
  for (int half = kLanes / 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  }
  return s[0];
#endif
}
// The largest lane. Lanes with a NaN do not count, but for the first.
GK_INLINE float reduce_max(f32 x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// ---- Loads and stores, with conversion from and to narrower types ---------------------------------------------------
//
// A vector of numbers at any address. A load is exact. A store rounds to nearest, ties to even; what is too large for
// the narrower type becomes an infinity, and NaN stays NaN.

GK_INLINE f32 load(const float* p) { return *(const f32u*)p; }
GK_INLINE f32 load(const int8_t* p) {
#ifdef GK_AVX512
  return (f32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(GK_AVX2)
  return (f32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const i8u*)p, i32), f32);
#endif
}
// Valid: whole numbers in [-128, 127].
GK_INLINE void store(int8_t* p, f32 x) {
#ifdef GK_AVX512
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
#elif defined(GK_AVX2)
  const __m256i whole = _mm256_cvtps_epi32((__m256)x);
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(pairs, pairs));
#else
  *(i8u*)p = __builtin_convertvector(__builtin_convertvector(x, i32), i8u);
#endif
}
GK_INLINE f32 load(const BFloat16* p) {
  const u16 x = *(const u16u*)p;
#if defined(GK_AVX512)
  return (f32)((u32)_mm512_cvtepu16_epi32((__m256i)x) << 16);  // GCC 12 takes five instructions to widen a vector
#elif defined(GK_AVX2)
  return (f32)((u32)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return (f32)(__builtin_convertvector(x, u32) << 16);
#endif
}
GK_INLINE_IF_WIDE f32 load(const Half* p) {
  const u16 x = *(const u16u*)p;
#ifdef GK_AVX512
  return (f32)_mm512_cvtph_ps((__m256i)x);
#elif defined(GK_AVX2)
  return (f32)_mm256_cvtph_ps((__m128i)x);
#else
  const u32 h = __builtin_convertvector(x, u32);
  const u32 magnitude = h & 0x7FFFu, sign = (h & 0x8000u) << 16;
  // Subnormals are whole numbers of 2^-24: as float32's own they would be flushed to zero. Infinities and NaN keep a
  // full exponent.
  const u32 small = (u32)(__builtin_convertvector((i32)magnitude, f32) * 0x1p-24f);
  const u32 rebiased = (magnitude << 13) + ((u32)(magnitude >= 0x7C00u) & (112u << 23)) + (112u << 23);
  return (f32)(((magnitude < 0x400u) ? small : rebiased) | sign);
#endif
}

GK_INLINE void store(float* p, f32 x) { *(f32u*)p = x; }
GK_INLINE_IF_WIDE void store(BFloat16* p, f32 x) {
  const u32 bits = (u32)x;
  const u32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const u32 quiet = (bits >> 16) | 0x40u;
  const u32 narrow = (u32)select(x == x, (f32)rounded, (f32)quiet);
#if defined(GK_AVX512)
  *(u16u*)p = (u16)_mm512_cvtepi32_epi16((__m512i)narrow);
#elif defined(GK_AVX2)
  const __m128i low = _mm256_castsi256_si128((__m256i)narrow), high = _mm256_extracti128_si256((__m256i)narrow, 1);
  *(u16u*)p = (u16)_mm_packus_epi32(low, high);
#else
  *(u16u*)p = __builtin_convertvector(narrow, u16);
#endif
}
GK_INLINE_IF_WIDE void store(Half* p, f32 x) {
#ifdef GK_AVX512
  *(u16u*)p = (u16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(GK_AVX2)
  *(u16u*)p = (u16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = Half(x[i]);
#endif
}

// ---- Several vectors at once ---------------------------------------------------------------------------------------

// A logarithm is a chain of dependent instructions three times as long as the processor looks ahead. Written for a pack
// of independent vectors, step by step, the chains interleave.
constexpr int kPack = 4;

template <typename V>
struct Packed {
  V v[kPack];
};
using f32p = Packed<f32>;
using i32p = Packed<i32>;
using u32p = Packed<u32>;

template <typename V>
GK_INLINE Packed<V> pack(const V* x) {
  Packed<V> out;
  for (int i = 0; i < kPack; ++i) out.v[i] = x[i];
  return out;
}
GK_INLINE void unpack(f32p x, f32* out) {
  for (int i = 0; i < kPack; ++i) out[i] = x.v[i];
}
// The numbers of a pack from p on.
template <typename T>
GK_INLINE f32p load_pack(const T* p) {
  f32p out;
  for (int i = 0; i < kPack; ++i) out.v[i] = load(p + i * kLanes);
  return out;
}
template <typename T>
GK_INLINE void store_pack(T* p, f32p x) {
  for (int i = 0; i < kPack; ++i) store(p + i * kLanes, x.v[i]);
}

// make(i) for every vector of a pack.
template <typename Make>
GK_INLINE f32p each(const Make& make) {
  f32p out;
  for (int i = 0; i < kPack; ++i) out.v[i] = make(i);
  return out;
}
// Begins such a function of a vector's number: a lambda that is always inlined.
#define GK_EACH(i) [&](int i) __attribute__((always_inline))

GK_INLINE f32p operator+(f32p a, f32p b) {
  return each(GK_EACH(i) { return a.v[i] + b.v[i]; });
}
GK_INLINE f32p operator-(f32p a, f32p b) {
  return each(GK_EACH(i) { return a.v[i] - b.v[i]; });
}
GK_INLINE f32p operator*(f32p a, f32p b) {
  return each(GK_EACH(i) { return a.v[i] * b.v[i]; });
}
GK_INLINE f32p operator*(f32p a, float b) {
  return each(GK_EACH(i) { return a.v[i] * b; });
}
GK_INLINE f32p operator-(f32p a, float b) {
  return each(GK_EACH(i) { return a.v[i] - b; });
}
GK_INLINE f32p operator-(f32p a, f32 b) {
  return each(GK_EACH(i) { return a.v[i] - b; });
}
GK_INLINE f32p fma(f32p a, f32p b, float c) {
  return each(GK_EACH(i) { return a.v[i] * b.v[i] + c; });
}
GK_INLINE f32p fma(f32p a, f32p b, f32p c) {
  return each(GK_EACH(i) { return a.v[i] * b.v[i] + c.v[i]; });
}
GK_INLINE f32p fma(f32p a, float b, f32p c) {
  return each(GK_EACH(i) { return a.v[i] * b + c.v[i]; });
}
GK_INLINE f32p fma(f32p a, float b, float c) {
  return each(GK_EACH(i) { return a.v[i] * b + c; });
}

// ---- Logarithm and exponential ------------------------------------------------------------------------------------

// log(1 + f), by a minimax polynomial whose own relative error is 5e-9. Lanes: f32. Greatest error: 1.1 ulp, relative
// 8.2e-8. Valid: [-0.25, 0.5].
GK_INLINE_IF_WIDE f32p log1p_core(f32p f) {
  f32p q = fma(f, -0.044909629970788956f, 0.10448333621025085f);
  q = fma(q, f, -0.1316223293542862f);
  q = fma(q, f, 0.14482061564922333f);
  q = fma(q, f, -0.16647766530513763f);
  q = fma(q, f, 0.19990606606006622f);
  q = fma(q, f, -0.250000536441803f);
  q = fma(q, f, 0.3333345353603363f);
  q = fma(q, f, -0.5f);
  return fma(f * f, q, f);
}

// x = 2^k * (1 + f) with 1 + f in [0.75, 1.5). Lanes: f32. Valid: positive normal numbers.
GK_INLINE void split(f32p x, f32p& k, f32p& f) {
  constexpr int32_t three_quarters = 0x3F400000;
  for (int i = 0; i < kPack; ++i) {
    const i32 bits = (i32)x.v[i], exponent = (bits - three_quarters) >> 23;
    k.v[i] = __builtin_convertvector(exponent, f32);
    f.v[i] = (f32)(bits - (exponent << 23)) - 1.0f;
  }
}

// log(x). Lanes: f32. Greatest error: 1.1 ulp. Valid: positive normal numbers.
GK_INLINE_IF_WIDE f32p vlog(f32p x) {
  f32p k, f;
  split(x, k, f);
  return fma(k, kLn2, log1p_core(f));
}

// 2^x. Lanes: f32. Greatest error: 1.3 ulp. Valid: x < 128. Below -126, at -inf and at NaN it is 0, so no result is
// subnormal.
GK_INLINE_IF_WIDE f32p vexp2(f32p x) {
  f32p n, f, out;
  u32p exponent;  // n in the place of a float's exponent
  for (int i = 0; i < kPack; ++i) {
    const f32 clamped = vmax(x.v[i], splat(-126.0f));
#ifdef GK_AVX512
    n.v[i] = (f32)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const f32 shifted = clamped + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, in the lowest bits
    n.v[i] = shifted - 12582912.0f;
    exponent.v[i] = (u32)shifted << 23;
#endif
    f.v[i] = clamped - n.v[i];
  }
  f32p p = fma(f, 0.0001534581242594868f, 0.0013399930903688073f);
  p = fma(p, f, 0.009618489071726799f);
  p = fma(p, f, 0.05550328642129898f);
  p = fma(p, f, 0.24022646248340607f);
  p = fma(p, f, 0.6931471824645996f);
  p = fma(p, f, 1.0f);
  for (int i = 0; i < kPack; ++i) {
#ifdef GK_AVX512
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x.v[i], (__m512)splat(-126.0f), _CMP_GE_OQ);
    out.v[i] = (f32)_mm512_maskz_scalef_ps(normal, (__m512)p.v[i], (__m512)n.v[i]);
#else
    out.v[i] = (f32)((x.v[i] >= -126.0f) & (i32)((u32)p.v[i] + exponent.v[i]));
#endif
  }
  return out;
}

// vexp2 of a single vector.
GK_INLINE f32 vexp2_one(f32 x) {
  f32p all;
  for (int i = 0; i < kPack; ++i) all.v[i] = x;
  return vexp2(all).v[0];
}

// c * tanh(x / c). Lanes: f32. Greatest error: 6 ulp, and 1.6e-7 * c. Valid: c a positive normal number, x any; -inf,
// which masks a token, stays -inf, and NaN stays NaN.
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
