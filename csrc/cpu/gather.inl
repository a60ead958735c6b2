// Sparse products with rows of a table. Included like simd.h, after rows.inl.

// x . y over n elements; two dtypes, float32 sums.
template <typename X, typename Y>
GK_INLINE float dot(const X* x, const Y* y, int64_t n) {
  f32 sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sum[j] += load(x + i + j * kLanes) * load(y + i + j * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) sum[0] += load(x + i) * load(y + i);
  float total = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += float(x[i]) * float(y[i]);
  return total;
}

template <typename X, typename Y>
static void dot_entries(const GatherArgs& args, int64_t begin, int64_t end) {
  const X* x = static_cast<const X*>(args.x);
  const Y* table = static_cast<const Y*>(args.table);
  for (int64_t k = begin; k < end; ++k) {
    args.out[k] = dot(x + args.rows[k] * args.x_stride, table + args.tokens[k] * args.table_stride, args.width);
  }
}

// out[row, columns] = sum over the row's entries of value * table[token, columns].
template <typename T>
static void sum_block(const GatherArgs& args, int64_t row, int64_t begin, int64_t end) {
  constexpr int kHeld = 8;  // vectors of the sum that stay in registers
  const T* table = static_cast<const T*>(args.table);
  float* out = args.out + row * args.width;
  const int64_t first = args.offsets[row], last = args.offsets[row + 1];
  int64_t column = begin;
  for (; column + kHeld * kLanes <= end; column += kHeld * kLanes) {
    f32 sum[kHeld] = {};
    for (int64_t k = first; k < last; ++k) {
      const T* source = table + args.tokens[k] * args.table_stride + column;
      if (k + 4 < last) __builtin_prefetch(table + args.tokens[k + 4] * args.table_stride + column);
      const float value = args.values[k];
      for (int j = 0; j < kHeld; ++j) sum[j] += value * load(source + j * kLanes);
    }
    for (int j = 0; j < kHeld; ++j) store(out + column + j * kLanes, sum[j]);
  }
  for (; column < end; ++column) {
    float sum = 0.0f;
    for (int64_t k = first; k < last; ++k) sum += args.values[k] * float(table[args.tokens[k] * args.table_stride + column]);
    out[column] = sum;
  }
}

template <typename X>
static void dot_with(const GatherArgs& args, int64_t begin, int64_t end) {
  switch (args.table_dtype) {
    case Dtype::kFloat:
      return dot_entries<X, float>(args, begin, end);
    case Dtype::kBFloat16:
      return dot_entries<X, BFloat16>(args, begin, end);
    default:
      return dot_entries<X, Half>(args, begin, end);
  }
}
static void gather_dot(const GatherArgs& args, int64_t begin, int64_t end) {
  switch (args.x_dtype) {
    case Dtype::kFloat:
      return dot_with<float>(args, begin, end);
    case Dtype::kBFloat16:
      return dot_with<BFloat16>(args, begin, end);
    default:
      return dot_with<Half>(args, begin, end);
  }
}
static void gather_sum(const GatherArgs& args, int64_t row, int64_t begin, int64_t end) {
  switch (args.table_dtype) {
    case Dtype::kFloat:
      return sum_block<float>(args, row, begin, end);
    case Dtype::kBFloat16:
      return sum_block<BFloat16>(args, row, begin, end);
    default:
      return sum_block<Half>(args, row, begin, end);
  }
}
