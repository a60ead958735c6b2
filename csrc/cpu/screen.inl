// Kernels of screen.h. Included like simd.h, after head.inl and gather.inl.

template <typename T>
static void encode_tokens(const ScreenCodes& args, int64_t begin, int64_t end) {
  // Rounding of a product's sum: that of a lane's terms, and of the lanes.
  const float rounding = float(args.padded / kLanes + 32) * 0x1p-23f;
  for (int64_t token = begin; token < end; ++token) {
    const T* row = static_cast<const T*>(args.weight) + token * args.stride;
    int8_t* codes = args.codes + token * args.padded;
    const auto weights = [&](int64_t i) __attribute__((always_inline)) {
      const f32 factor = load(args.columns + i);
      if (__builtin_expect(i + kLanes <= args.width, 1)) return load(row + i) * factor;
      f32 out = {};
      for (int j = 0; i + j < args.width; ++j) out[j] = float(row[i + j]) * factor[j];
      return out;
    };
    f32 largest = {}, square = {};
    for (int64_t i = 0; i < args.padded; i += kLanes) {
      const f32 w = weights(i);
      largest = vmax(w < 0.0f ? -w : w, largest);
      square += w * w;  // NaN and infinities show here
    }
    const float scale = reduce_max(largest) / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    f32 error = {};
    for (int64_t i = 0; i < args.padded; i += kLanes) {
      const f32 w = weights(i), code = (w * inverse + 12582912.0f) - 12582912.0f;  // to the nearest integer
      const f32 left = w - code * scale;
      error += left * left;
      store(codes + i, code);
    }
    args.scale[token] = scale;
    args.slack[token] = std::sqrt(reduce_sum(error)) * (1.0f + 0x1p-10f) + rounding * std::sqrt(reduce_sum(square));
  }
}

static void screen_encode(const ScreenCodes& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&]<Dtype kDtype>() { encode_tokens<Element<kDtype>>(args, begin, end); });
}

// Of the tokens of a vector with upper bounds u of their logits and twice as wide an error, those that may win.
[[gnu::noinline]] static void consider(const RowKey& key, int64_t token, int32_t column, f32 u, f32 width, u32 w,
                                       int32_t row, ScreenPiece& out, Contender* found) {
  const f32 s = u + gumbel_one(key, token, w), low = s - width;
  for (int i = 0; i < kLanes; ++i) {
    if (!(s[i] < __builtin_inff()) || out.count == kScreenRoom) {
      out.bad = true;
      return;
    }
    if (low[i] > out.lower[row]) out.lower[row] = low[i];
    if (s[i] == -__builtin_inff() || s[i] < out.lower[row]) continue;
    found[out.count++] = {row, column + i, s[i]};
  }
}

static void screen_tokens(const ScreenArgs& args, int64_t begin, int64_t end, ScreenPiece& out, Contender* found) {
  for (float& lower : out.lower) lower = -__builtin_inff();
  alignas(64) float products[kScreenRows * kBlock] = {};
  for_each_block(args.noise.vocab_start, begin, end, [&](const Block& block) __attribute__((always_inline)) {
    const int64_t first = block.column + block.first, tokens = block.last - block.first;
    multiply_few(FewRows<int8_t>{args.x, args.rows, args.padded, args.codes + first * args.padded, args.padded,
                                 args.padded, products + block.first, kBlock},
                 0, tokens);
    f32 scale[kVectors], slack[kVectors], bias[kVectors];
    load_block(args.scale, block, 0.0f, scale);
    load_block(args.slack, block, 0.0f, slack);
    if (args.bias) {
      load_block(args.bias, block, -__builtin_inff(), bias);
    } else {
      for (int j = 0; j < kVectors; ++j) {
        for (int i = 0; i < kLanes; ++i) {
          const int at = j * kLanes + i;
          bias[j][i] = block.full() || (at >= block.first && at < block.last) ? 0.0f : -__builtin_inff();
        }
      }
    }
    for (int row = 0; row < args.rows; ++row) {
      const RowKey key(args.noise.seed, args.noise.row(row), kDomainGumbel);
      u32 w[kVectors];
      noise_words(key, block.counter, w);
      // Room for the rounding of bounds and scores.
      const float lower = out.lower[row], threshold = lower - (1e-4f + __builtin_fabsf(lower) * 0x1p-21f);
      for (int j = 0; j < kVectors; ++j) {
        f32 l = load(products + row * kBlock + j * kLanes) * scale[j];
        const f32 error = slack[j] * args.norm[row];
        l += bias[j];
        if (args.softcap > 0.0f) l = softcapped(l, args.softcap);  // which brings no two logits further apart
        const f32 u = l + error;
        if (__builtin_expect(any_not_le(u + gumbel_bound(w[j]), splat(threshold)), 0)) {
          const int64_t column = block.column + j * kLanes;
          consider(key, args.noise.vocab_start + column, int32_t(column), u, error * 2.0f, w[j], row, out, found);
        }
      }
    }
  });
}
