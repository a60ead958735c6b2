// Sixteen vectors of sixteen numbers, transposed. Included by avx512.cpp and amx.cpp inside a namespace and under a
// target pragma, like cpu/simd.h.

// x[i][j] and x[j][i] change places, float32. The first loop moves single numbers, the second pairs of them, both
// within the quarters of a vector (128 bits); the third moves whole quarters.
[[gnu::always_inline]] inline void transpose(__m512 x[16]) {
  __m512 y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // x[i + k]: number k of each quarter, of rows i to i + 3
    for (int k = 0; k < 2; ++k) {
      const __m512d a = _mm512_castps_pd(y[i + k]), b = _mm512_castps_pd(y[i + k + 2]);
      x[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int k = 0; k < 4; ++k) {
    const __m512 a = _mm512_shuffle_f32x4(x[k], x[k + 4], 0x88), b = _mm512_shuffle_f32x4(x[k], x[k + 4], 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(x[k + 8], x[k + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(x[k + 8], x[k + 12], 0xDD);
    y[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    y[k + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    y[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    y[k + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}
