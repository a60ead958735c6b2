// Rows of memory that a product reads, and those that it will read. Included by avx512.cpp and avx2.cpp inside a
// namespace and under a target pragma, like cpu/simd.h.

// One operand: rows of which each number is multiplied by a whole line of the other operand.
struct BroadcastRows {
  const char* first;
  int64_t stride;  // bytes
  bool half;       // the last step is a single number of bfloat16, and beyond it nothing may be read
};

// Rows of memory that will be wanted next. They are asked for a few lines at a time, while there is work to do.
class Ahead {
 public:
  // All of them within `calls` calls of ask().
  Ahead(const char* first, int64_t stride, int64_t rows, int64_t bytes, int64_t calls)
      : row_(first),
        stride_(stride),
        rows_(rows),
        bytes_(bytes),
        lines_((rows * ((bytes + 63) / 64) + calls - 1) / std::max<int64_t>(1, calls)) {}

  [[gnu::always_inline]] void ask() {
    for (int64_t i = 0; i < lines_ && rows_ > 0; ++i) {
      _mm_prefetch(row_ + at_, _MM_HINT_T1);
      at_ += 64;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
      --rows_;
    }
  }

 private:
  const char* row_;
  int64_t stride_, rows_, bytes_, lines_, at_ = 0;
};
