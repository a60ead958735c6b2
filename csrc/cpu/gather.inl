// Sparse products with rows of a table. Included like simd.h, after rows.inl.

// Rows of a table are visited in no order the hardware foresees, so while one is read the next is asked for.
template <typename T>
GK_INLINE void prefetch(const T* p, int64_t elements) {
  for (int64_t byte = 0; byte < elements * int64_t(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 2);  // into the second level: faster than into the first
  }
}

// x . y over n elements; two dtypes, float32 sums. `next` is the y of the call after this one.
template <typename X, typename Y>
GK_INLINE float dot(const X* x, const Y* y, int64_t n, const Y* next) {
  f32 sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch(next + i, 4 * kLanes);
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
    const Y* next = table + args.tokens[k + 1 < end ? k + 1 : k] * args.table_stride;
    args.out[k] = dot(x + args.rows[k] * args.x_stride, table + args.tokens[k] * args.table_stride, args.width, next);
  }
}

// out[row, columns] = sum over the row's entries of value * table[token, columns], for up to kGatherBlock columns.
template <typename T>
static void sum_block(const GatherArgs& args, int64_t row, int64_t begin, int64_t end) {
  const T* table = static_cast<const T*>(args.table);
  float* out = args.out + row * args.width;
  const int64_t first = args.offsets[row], last = args.offsets[row + 1];
  f32 sum[kGatherBlock / kLanes] = {};
  const int64_t vectors = (end - begin) / kLanes;
  for (int64_t k = first; k < last; ++k) {
    const T* source = table + args.tokens[k] * args.table_stride + begin;
    const T* next = table + args.tokens[k + 1 < last ? k + 1 : k] * args.table_stride + begin;
    const float value = args.values[k];
    for (int64_t j = 0; j < vectors; ++j) {
      prefetch(next + j * kLanes, kLanes);
      sum[j] += value * load(source + j * kLanes);
    }
  }
  for (int64_t j = 0; j < vectors; ++j) store(out + begin + j * kLanes, sum[j]);
  for (int64_t column = begin + vectors * kLanes; column < end; ++column) {
    float total = 0.0f;
    for (int64_t k = first; k < last; ++k) total += args.values[k] * float(table[args.tokens[k] * args.table_stride + column]);
    out[column] = total;
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
