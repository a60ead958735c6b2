// Sixteen lanes in the compiler's own vector types, so that one source serves AVX-512, AVX2, NEON and the rest.
//
// Included once by each rows_<isa>.cpp inside its own namespace and under its own target pragma; hence no include
// guard, and no includes of its own (a standard function compiled for one instruction set must never serve another).

#define GK_INLINE [[gnu::always_inline]] static inline

// A step of a kernel's inner loop. Without 512-bit registers a vector is many instructions, and inlining every step
// everywhere makes a library four times the size that takes a minute to compile; there a call costs nothing beside it.
#ifdef GK_AVX512
#define GK_INLINE_IF_WIDE GK_INLINE
#else
#define GK_INLINE_IF_WIDE [[gnu::noinline]] static
#endif

using f32 = float __attribute__((vector_size(64)));
using i32 = int32_t __attribute__((vector_size(64)));
using u32 = uint32_t __attribute__((vector_size(64)));
using u16 = uint16_t __attribute__((vector_size(32)));
using f32u = float __attribute__((vector_size(64), aligned(4)));
using i8u = int8_t __attribute__((vector_size(16), aligned(1)));
using u16u = uint16_t __attribute__((vector_size(32), aligned(2)));

constexpr int kLanes = 16;

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
GK_INLINE f32 select(i32 mask, f32 a, f32 b) { return mask ? a : b; }
GK_INLINE f32 vmax(f32 a, f32 b) { return a > b ? a : b; }  // b where a is NaN

GK_INLINE bool any(i32 mask) {
#ifdef GK_AVX512
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  using i64 = int64_t __attribute__((vector_size(64)));
  const i64 m = (i64)mask;
  return ((m[0] | m[1]) | (m[2] | m[3]) | (m[4] | m[5]) | (m[6] | m[7])) != 0;
#endif
}

// 1 / x to the last bit or two, for positive normal x.
GK_INLINE f32 reciprocal(f32 x) {
#ifdef GK_AVX512
  const f32 r = (f32)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// Bit per lane of a > b.
GK_INLINE uint32_t greater_bits(f32 a, f32 b) {
#ifdef GK_AVX512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
  const i32 mask = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

// Whether any lane is greater or unordered: a NaN answers yes.
GK_INLINE bool any_not_le(f32 a, f32 b) {
#ifdef GK_AVX512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ) != 0;
#else
  return any(~(a <= b));
#endif
}
GK_INLINE bool any_gt(f32 a, f32 b) {
#ifdef GK_AVX512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  return any(a > b);
#endif
}

GK_INLINE bool any_below(u32 a, uint32_t bound) {
#ifdef GK_AVX512
  return _mm512_cmplt_epu32_mask((__m512i)a, _mm512_set1_epi32(int(bound))) != 0;
#else
  return any((i32)(a < bound));
#endif
}

GK_INLINE f32 to_float(u32 x) {
#ifdef GK_AVX512
  return (f32)_mm512_cvtepu32_ps((__m512i)x);
#else
  // Unsigned conversion is slow or missing elsewhere: both halves are exact, and their sum rounds once.
  return __builtin_convertvector((i32)(x >> 16), f32) * 65536.0f + __builtin_convertvector((i32)(x & 0xFFFFu), f32);
#endif
}

GK_INLINE float reduce_sum(f32 x) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = x[i] + x[i + 8];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
GK_INLINE float reduce_max(f32 x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// ---- Loads and stores, with conversion from and to the two narrow types -------------------------------------------

GK_INLINE f32 load(const float* p) { return *(const f32u*)p; }
GK_INLINE f32 load(const int8_t* p) {
#ifdef GK_AVX512
  return (f32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(*(const i8u*)p, i32), f32);
#endif
}
GK_INLINE void store(int8_t* p, f32 x) {  // whole numbers
#ifdef GK_AVX512
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
#else
  *(i8u*)p = __builtin_convertvector(__builtin_convertvector(x, i32), i8u);
#endif
}
GK_INLINE f32 load(const BFloat16* p) {
  const u16 x = *(const u16u*)p;
#ifdef GK_AVX512
  return (f32)((u32)_mm512_cvtepu16_epi32((__m256i)x) << 16);  // GCC 12 takes five instructions to widen a vector
#else
  return (f32)(__builtin_convertvector(x, u32) << 16);
#endif
}
GK_INLINE_IF_WIDE f32 load(const Half* p) {
  const u16 x = *(const u16u*)p;
#ifdef GK_AVX512
  return (f32)_mm512_cvtph_ps((__m256i)x);
#elif defined(GK_AVX2)
  const __m128i* halves = (const __m128i*)&x;
  f32 out;
  for (int i = 0; i < 2; ++i) ((__m256*)&out)[i] = _mm256_cvtph_ps(halves[i]);
  return out;
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
  const u32 narrow = ((u32)(x == x) & rounded) | ((u32)(x != x) & quiet);
#ifdef GK_AVX512
  *(u16u*)p = (u16)_mm512_cvtepi32_epi16((__m512i)narrow);
#else
  *(u16u*)p = __builtin_convertvector(narrow, u16);
#endif
}
GK_INLINE_IF_WIDE void store(Half* p, f32 x) {
#ifdef GK_AVX512
  *(u16u*)p = (u16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(GK_AVX2)
  for (int i = 0; i < 2; ++i) {
    _mm_storeu_si128((__m128i*)p + i,
                     _mm256_cvtps_ph(((const __m256*)&x)[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  for (int i = 0; i < kLanes; ++i) p[i] = Half(x[i]);
#endif
}

// ---- Several vectors at once ---------------------------------------------------------------------------------------

// A logarithm is a chain of dependent instructions three times as long as the processor looks ahead. Written for a pack
// of independent vectors, step by step, the chains interleave.
#ifdef GK_AVX512
constexpr int kPack = 4;
#else
constexpr int kPack = 1;  // sixteen lanes are several registers already
#endif

template <typename V>
struct Packed {
  V v[kPack];
};
using f32p = Packed<f32>;
using i32p = Packed<i32>;
using u32p = Packed<u32>;

// make(i) for every vector of a pack.
template <typename Make>
GK_INLINE f32p each(const Make& make) {
  f32p out;
  for (int i = 0; i < kPack; ++i) out.v[i] = make(i);
  return out;
}
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

// log1p(f) for f in [-0.25, 0.5], minimax: relative error 5e-9 before rounding.
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

// x = 2^k * (1 + f) with 1 + f in [0.75, 1.5), for positive normal x.
GK_INLINE void split(f32p x, f32p& k, f32p& f) {
  constexpr int32_t three_quarters = 0x3F400000;
  for (int i = 0; i < kPack; ++i) {
    const i32 bits = (i32)x.v[i], exponent = (bits - three_quarters) >> 23;
    k.v[i] = __builtin_convertvector(exponent, f32);
    f.v[i] = (f32)(bits - (exponent << 23)) - 1.0f;
  }
}

// Natural logarithm of positive normal numbers.
GK_INLINE_IF_WIDE f32p vlog(f32p x) {
  f32p k, f;
  split(x, k, f);
  return fma(k, kLn2, log1p_core(f));
}

// 2^x for x up to 100 or so; zero below 2^-126, so that nothing is ever subnormal.
GK_INLINE_IF_WIDE f32p vexp2(f32p x) {
  f32p n, f, out;
  for (int i = 0; i < kPack; ++i) {
    const f32 clamped = vmax(x.v[i], splat(-126.0f));
#ifdef GK_AVX512
    n.v[i] = (f32)_mm512_roundscale_ps((__m512)clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    n.v[i] = (clamped + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
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
    const i32 scaled = (i32)p.v[i] + (__builtin_convertvector(n.v[i], i32) << 23);
    out.v[i] = (f32)((x.v[i] >= -126.0f) & scaled);
#endif
  }
  return out;
}
