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

// Turns counters into words, in 64-bit lanes of which only the low half counts.
template <class Isa, class Lanes>
FASTDIS_INLINE void philox(uint64_t key, Lanes& c0, Lanes& c1, Lanes& c2, Lanes& c3) {
  const Lanes m0 = Lanes{} + 0xD2511F53u, m1 = Lanes{} + 0xCD9E8D57u;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes p0 = multiply_low<Isa>(c0, m0), p1 = multiply_low<Isa>(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c3 = p0;
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
    constexpr int lanes = Isa::vector_bytes / sizeof(uint64_t);
    Lanes offset;
    for (int lane = 0; lane < lanes; ++lane) offset[lane] = lane;
    for (int64_t i = 0; i < counters; i += lanes) {
      const Lanes counter = offset + (first + static_cast<uint64_t>(i));
      Lanes c0 = counter, c1 = counter >> 32, c2 = Lanes{} + high, c3 = Lanes{} + (high >> 32);
      philox<Isa>(key, c0, c1, c2, c3);
      *reinterpret_cast<Halves*>(word[0] + i) = __builtin_convertvector(c0, Halves);
      *reinterpret_cast<Halves*>(word[1] + i) = __builtin_convertvector(c1, Halves);
      *reinterpret_cast<Halves*>(word[2] + i) = __builtin_convertvector(c2, Halves);
      *reinterpret_cast<Halves*>(word[3] + i) = __builtin_convertvector(c3, Halves);
    }
  }
};

}  // namespace fastdis
