// Blocks of sums on their way to memory. Included after transpose.inl, like it.

// Writes a block of sums to the product's output, in its layout and dtype. The block is [tokens, kLine]: line i has the
// sums of table row `token` + i with rows `row` to `row` + `columns` of x; `columns` is a multiple of 16, beyond x's
// last row it holds sums that nobody reads.
template <int kLine>
[[gnu::always_inline]] inline void put_sums(const Product& args, const float* sums, int64_t token, int64_t tokens,
                                            int64_t row, int64_t columns) {
  const auto write = [&](int64_t place, __mmask16 mask, __m512 x) {
    if (args.out_dtype == Dtype::kFloat) {
      _mm512_mask_storeu_ps(static_cast<float*>(args.out) + place, mask, x);
    } else if (args.out_dtype == Dtype::kHalf) {
      const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.out) + place, mask, halves);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.out) + place, mask,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
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
