// Blocks of sums on their way to memory. Included by products_*.cpp inside a namespace and under a target pragma, like simd.h.

// Sixteen rows of sixteen: numbers, then pairs of them, then quarters of a vector change places.
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
    const __m512 c = _mm512_shuffle_f32x4(x[k + 8], x[k + 12], 0x88), d = _mm512_shuffle_f32x4(x[k + 8], x[k + 12], 0xDD);
    y[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    y[k + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    y[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    y[k + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Sums of `columns` rows of x (from `row` on, a multiple of 16 of them) with some tokens, in lines of kLine numbers, to where they belong.
template <int kLine>
[[gnu::always_inline]] inline void put_sums(const Product& args, const float* sums, int64_t token, int64_t tokens, int64_t row, int64_t columns) {
  const auto write = [&](int64_t place, __mmask16 mask, __m512 x) {
    if (args.out_dtype == Dtype::kFloat) {
      _mm512_mask_storeu_ps(static_cast<float*>(args.out) + place, mask, x);
    } else if (args.out_dtype == Dtype::kHalf) {
      const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.out) + place, mask, halves);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.out) + place, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }
  };
  if (!args.by_row) {
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t j = 0; j < columns; j += 16) {
        write((token + i) * args.out_stride + row + j, 0xFFFF, _mm512_load_ps(sums + i * kLine + j));
      }
    }
    return;
  }
  for (int64_t j = 0; j < std::min(columns, args.rows - row); j += 16) {
    const int64_t rows = std::min<int64_t>(16, args.rows - row - j);
    for (int64_t i = 0; i < tokens; i += 16) {
      __m512 block[16];
      for (int k = 0; k < 16; ++k) block[k] = _mm512_load_ps(sums + (i + k) * kLine + j);
      transpose(block);
      const __mmask16 mask = tokens - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (tokens - i)) - 1);
      for (int64_t k = 0; k < rows; ++k) write((row + j + k) * args.out_stride + token + i, mask, block[k]);
    }
  }
}
