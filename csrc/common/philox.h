// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), the generator of the noise contract. Host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GK_HOST_DEVICE __host__ __device__
#else
#define GK_HOST_DEVICE static  // what is compiled for one instruction set must never serve another
#endif

namespace gk {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// What the third and fourth counter words and the purpose of a draw are called in the noise contract.
constexpr uint32_t kDomainGumbel = 0, kDomainRefine = 1, kDomainSupport = 2, kDomainPosterior = 3;

// Domains of noise and of its refinement follow each other: 0 and 1, or 3 + 2 m and 4 + 2 m for draw m of posterior
// noise.
GK_HOST_DEVICE inline constexpr uint32_t refinement_of(uint32_t domain) { return domain + 1; }

struct Words4 {
  uint32_t w[4];
};

// Both words of a product. On a GPU it is named in PTX: the compiler would widen what follows to 64 bits, and add up
// high words that are zero.
GK_HOST_DEVICE inline void wide_product(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%1, %0}, p; }" : "=r"(high), "=r"(low) : "r"(a), "r"(b));
#else
  const uint64_t p = uint64_t(a) * b;
  high = uint32_t(p >> 32);
  low = uint32_t(p);
#endif
}

GK_HOST_DEVICE inline Words4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    uint32_t high0, low0, high1, low1;
    wide_product(kPhiloxM0, c0, high0, low0);
    wide_product(kPhiloxM1, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The word of one token: counter (token / 4, row, domain), element token % 4.
GK_HOST_DEVICE inline uint32_t token_word(uint64_t seed, int64_t row, int64_t token, uint32_t domain) {
  const uint64_t r = uint64_t(row);
  return philox(uint32_t(uint64_t(token) >> 2), uint32_t(r), uint32_t(r >> 32), domain, uint32_t(seed),
                uint32_t(seed >> 32))
      .w[token & 3];
}

}  // namespace gk
