// Products with rows of a table. Included like simd.h, after rows.inl.

// Rows of a table are visited in no order the hardware foresees, so several are read side by side, which keeps more of
// memory busy than one after the other does, while the next ones are asked for.
constexpr int kEntries = 4;

template <typename T>
GK_INLINE void prefetch(const T* p, int64_t elements) {
  for (int64_t byte = 0; byte < elements * int64_t(sizeof(T)); byte += 64) {
    // Into the second level of cache, which is faster than into the first.
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);
  }
}

// Rows that entries k and after name, no further than the last one before `end`.
template <typename T>
GK_INLINE void rows_of(const void* x, int64_t stride, const int64_t* rows, int64_t k, int64_t end,
                       const T* out[kEntries]) {
  for (int q = 0; q < kEntries; ++q) out[q] = static_cast<const T*>(x) + rows[k + q < end ? k + q : end - 1] * stride;
}

// kEntries entries from k on. kShared: they all are of one row of x, as most are, which is then loaded once.
template <bool kShared, typename X, typename Y>
GK_INLINE void dot_some(const GatherArgs& args, int64_t k, int64_t end) {
  constexpr int64_t kStep = 2 * kLanes;
  const X* x[kEntries];
  const Y *y[kEntries], *next[kEntries];
  rows_of(args.x, args.x_stride, args.rows, k, end, x);
  rows_of(args.table, args.table_stride, args.tokens, k, end, y);
  rows_of(args.table, args.table_stride, args.tokens, k + kEntries, end, next);
  f32 sum[kEntries][2];
  for (int q = 0; q < kEntries; ++q) sum[q][0] = sum[q][1] = f32{};
  int64_t i = 0;
  for (; i + kStep <= args.width; i += kStep) {
    const f32 first[2] = {load(x[0] + i), load(x[0] + i + kLanes)};
    for (int q = 0; q < kEntries; ++q) {
      prefetch(next[q] + i, kStep);
      for (int j = 0; j < 2; ++j) {
        sum[q][j] += (kShared ? first[j] : load(x[q] + i + j * kLanes)) * load(y[q] + i + j * kLanes);
      }
    }
  }
  for (int q = 0; q < kEntries && k + q < end; ++q) {
    float total = reduce_sum(sum[q][0] + sum[q][1]);
    for (int64_t column = i; column < args.width; ++column) total += float(x[q][column]) * float(y[q][column]);
    args.out[k + q] = total;
  }
}

template <typename X, typename Y>
static void dot_entries(const GatherArgs& args, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; k += kEntries) {
    const int64_t* row = args.rows + k;
    bool shared = k + kEntries <= end;
    for (int q = 1; q < kEntries && shared; ++q) shared = row[q] == row[0];
    shared ? dot_some<true, X, Y>(args, k, end) : dot_some<false, X, Y>(args, k, end);
  }
}

// out[row, columns] = sum over the row's entries of value * table[token, columns], for up to kGatherBlock columns.
template <typename T>
static void sum_block(const GatherArgs& args, int64_t row, int64_t begin, int64_t end) {
  const T* table = static_cast<const T*>(args.table);
  float* out = args.out + row * args.width;
  const int64_t first = args.offsets[row], last = args.offsets[row + 1], vectors = (end - begin) / kLanes;
  f32 sum[kGatherBlock / kLanes] = {};
  int64_t k = first;
  for (; k + kEntries <= last; k += kEntries) {
    const T *source[kEntries], *next[kEntries];
    rows_of(args.table, args.table_stride, args.tokens, k, last, source);
    rows_of(args.table, args.table_stride, args.tokens, k + kEntries, last, next);
    for (int64_t j = 0; j < vectors; ++j) {
      for (int q = 0; q < kEntries; ++q) {
        prefetch(next[q] + begin + j * kLanes, kLanes);
        sum[j] += args.values[k + q] * load(source[q] + begin + j * kLanes);
      }
    }
  }
  for (; k < last; ++k) {
    const T* source = table + args.tokens[k] * args.table_stride + begin;
    for (int64_t j = 0; j < vectors; ++j) sum[j] += args.values[k] * load(source + j * kLanes);
  }
  for (int64_t j = 0; j < vectors; ++j) store(out + begin + j * kLanes, sum[j]);
  for (int64_t column = begin + vectors * kLanes; column < end; ++column) {
    float total = 0.0f;
    for (k = first; k < last; ++k) total += args.values[k] * float(table[args.tokens[k] * args.table_stride + column]);
    out[column] = total;
  }
}

static void gather_dot(const GatherArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.x_dtype, [&]<Dtype kX>() {
    with_dtype(args.table_dtype, [&]<Dtype kTable>() { dot_entries<Element<kX>, Element<kTable>>(args, begin, end); });
  });
}
static void gather_sum(const GatherArgs& args, int64_t row, int64_t begin, int64_t end) {
  with_dtype(args.table_dtype, [&]<Dtype kDtype>() { sum_block<Element<kDtype>>(args, row, begin, end); });
}

template <typename T>
static void terms_of(const TermsArgs& args, int64_t row) {
  const float* weights = args.weights + row * args.weights_stride;
  const float* dy = args.dy + row * args.dy_stride;
  const float* slope = args.slope ? args.slope + row * args.slope_stride : nullptr;
  T* weighted = static_cast<T*>(args.weighted) + row * args.out_stride;
  T* unweighted = static_cast<T*>(args.unweighted) + row * args.out_stride;
  constexpr int64_t kStep = 2 * kLanes;
  f32 totals[2], dots[2];
  for (int j = 0; j < 2; ++j) totals[j] = dots[j] = f32{};
  int64_t i = 0;
  for (; i + kStep <= args.columns; i += kStep) {
    for (int j = 0; j < 2; ++j) {
      const f32 p = load(weights + i + j * kLanes);
      totals[j] += p;
      dots[j] += p * load(dy + i + j * kLanes);
    }
  }
  float total = reduce_sum(totals[0] + totals[1]), dot = reduce_sum(dots[0] + dots[1]);
  for (; i < args.columns; ++i) {
    total += weights[i];
    dot += weights[i] * dy[i];
  }
  const auto mean_of = [&] { return args.total[row] > 0.0f ? args.dot[row] / args.total[row] : 0.0f; };
  const float before = mean_of();
  args.total[row] += total;
  args.dot[row] += dot;
  const float mean = mean_of();
  args.shift[row] = mean - before;
  for (i = 0; i + kLanes <= args.columns; i += kLanes) {
    f32 p = load(weights + i);
    if (slope) p *= load(slope + i);
    store(unweighted + i, p);
    store(weighted + i, p * (load(dy + i) - mean));
  }
  for (; i < args.columns; ++i) {
    const float p = slope ? weights[i] * slope[i] : weights[i];
    unweighted[i] = T(p);
    weighted[i] = T(p * (dy[i] - mean));
  }
}
static void weight_terms(const TermsArgs& args, int64_t row) {
  args.out_dtype == Dtype::kFloat ? terms_of<float>(args, row) : terms_of<BFloat16>(args, row);
}

// The sums over the lanes of as many vectors as there are lanes.
GK_INLINE_IF_WIDE f32 lane_sums(const f32 v[kLanes]) {
#ifdef GK_AVX512
  // Each level adds the halves of two vectors and leaves the sums side by side.
  __m512 pairs[8], quads[4], halves[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    pairs[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)pairs[2 * i], b = (__m512d)pairs[2 * i + 1];
    quads[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
  }
  const auto across = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);
  };
  for (int i = 0; i < 2; ++i) halves[i] = across(quads[2 * i], quads[2 * i + 1]);
  return (f32)across(halves[0], halves[1]);
#elif defined(GK_AVX2)
  __m256 pairs[4], quads[2];  // the same, by halves of the vectors
  for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
  for (int i = 0; i < 2; ++i) quads[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
  return (f32)(_mm256_permute2f128_ps(quads[0], quads[1], 0x20) + _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
#else
  f32 out;
  for (int i = 0; i < kLanes; ++i) out[i] = reduce_sum(v[i]);
  return out;
#endif
}

// x[r] . table[v] for kRows rows of x and table rows [begin, end). The table is read once for all of these rows,
// several of its own at a time, and asked for well ahead: with few rows of x, that reading is nearly all the time there
// is.
template <int kRows, typename T>
GK_INLINE void product_rows(const FewRows<T>& args, int64_t first_row, int64_t begin, int64_t end) {
  constexpr int kTokens = kLanes / kRows, kAhead = 8192 / int(sizeof(T));
  const float* x = args.x + first_row * args.x_stride;
  const T* w[kTokens];
  float* out = args.out + first_row * args.out_stride;
  for (int64_t v = begin; v < end; v += kTokens) {
    for (int j = 0; j < kTokens; ++j) w[j] = args.table + (v + j < end ? v + j : end - 1) * args.table_stride;
    f32 sums[kLanes] = {};  // [kRows, kTokens]
    int64_t i = 0;
    for (; i + kLanes <= args.width; i += kLanes) {
      f32 h[kRows];
      for (int r = 0; r < kRows; ++r) h[r] = load(x + r * args.x_stride + i);
      for (int j = 0; j < kTokens; ++j) {
        __builtin_prefetch(w[j] + i + kAhead);
        const f32 y = load(w[j] + i);
        for (int r = 0; r < kRows; ++r) sums[r * kTokens + j] += h[r] * y;
      }
    }
    f32 total = lane_sums(sums);
    for (; i < args.width; ++i) {
      for (int j = 0; j < kLanes; ++j) total[j] += x[j / kTokens * args.x_stride + i] * float(w[j % kTokens][i]);
    }
    for (int j = 0; j < kLanes; ++j) {
      if (v + j % kTokens < end) out[j / kTokens * args.out_stride + v + j % kTokens] = total[j];
    }
  }
}

template <typename T>
GK_INLINE void multiply_few(const FewRows<T>& args, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= args.rows; row += 4) product_rows<4>(args, row, begin, end);
  for (; row < args.rows; ++row) product_rows<1>(args, row, begin, end);
}

static void few_product(const ProductArgs& args, int64_t begin, int64_t end) { multiply_few(args, begin, end); }
