// Philox4x32-10, random words that are a function of a key and a counter (Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3, SC 2011), for many counters at a time.

#pragma once

#include <cstdint>

#include "isa.h"

namespace fastdis {

// The product of the low halves of 64-bit lanes, for which compilers find no instruction by themselves.
template <class Isa, class Lanes>
FASTDIS_INLINE Lanes multiply_low(Lanes a, Lanes b) {
#if FASTDIS_MULTIVERSIONED
  if constexpr (Isa::vector_bytes > 16) {
    Lanes product;
    asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
    return product;
  }
#endif
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
}

// Turns counters into words, in 64-bit lanes of which only the low half counts: c[w][g] is word w of group g. Groups do
// not depend on each other, which hides how long a product takes.
template <class Isa, class Lanes, int groups>
FASTDIS_INLINE void philox(uint64_t key, Lanes (&c)[4][groups]) {
  const Lanes m0 = Lanes{} + 0xD2511F53u, m1 = Lanes{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes key0 = Lanes{} + k0, key1 = Lanes{} + k1;
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      const Lanes p0 = multiply_low<Isa>(c[0][g], m0), p1 = multiply_low<Isa>(c[2][g], m1);
      c[0][g] = (p1 >> 32) ^ c[1][g] ^ key0;
      c[1][g] = p1;
      c[2][g] = (p0 >> 32) ^ c[3][g] ^ key1;
      c[3][g] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Words for consecutive counters under one key.
struct PhiloxWords {
  static constexpr int64_t counters = 64;  // at a time

  uint32_t word[4][counters];

  // From counter (first, high) on, each 64 bits.
  template <class Isa, class Word = uint64_t, class Half = uint32_t>  // names that vector types can depend on
  FASTDIS_INLINE void fill(uint64_t key, uint64_t first, uint64_t high) {
    typedef Word Lanes __attribute__((vector_size(Isa::vector_bytes)));
    typedef Half Halves __attribute__((vector_size(Isa::vector_bytes / 2), aligned(4), may_alias));
    constexpr int lanes = Isa::vector_bytes / sizeof(uint64_t), groups = Isa::vector_bytes == 64 ? 4 : 2;
    Lanes offset;
    for (int lane = 0; lane < lanes; ++lane) offset[lane] = lane;
    for (int64_t i = 0; i < counters; i += groups * lanes) {
      Lanes c[4][groups];
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) {
        c[0][g] = offset + (first + static_cast<uint64_t>(i + g * lanes));
        c[1][g] = c[0][g] >> 32;
        c[2][g] = Lanes{} + high;
        c[3][g] = Lanes{} + (high >> 32);
      }
      philox<Isa>(key, c);
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
        for (int g = 0; g < groups; ++g)
          *reinterpret_cast<Halves*>(word[w] + i + g * lanes) = __builtin_convertvector(c[w][g], Halves);
      }
    }
  }
};

}  // namespace fastdis
