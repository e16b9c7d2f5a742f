// Small dense matrix products for operands that are already in cache, compiled per instruction set.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

#include "isa.h"

namespace fastdis {

// Vectors that start on a cache line, so that no vector of a row straddles two.
template <class A>
struct CacheLineAllocator {
  using value_type = A;
  CacheLineAllocator() = default;
  template <class Other>
  CacheLineAllocator(const CacheLineAllocator<Other>&) {}
  A* allocate(std::size_t n) { return static_cast<A*>(::operator new(n * sizeof(A), std::align_val_t{64})); }
  void deallocate(A* p, std::size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const CacheLineAllocator&) const { return true; }
};
template <class A>
using Buffer = std::vector<A, CacheLineAllocator<A>>;

// Columns of B and C are padded to this many elements, rows of C to `row_pad`.
template <class A>
constexpr int64_t column_pad = 64 / static_cast<int64_t>(sizeof(A));
constexpr int64_t row_pad = 8;

constexpr int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One tile: R rows by W vectors of C, its accumulators in registers.
template <class Isa, class A, int R, int W>
FASTDIS_INLINE void multiply_tile(int64_t depth, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_row,
                                  A* c, int64_t c_row, bool accumulate) {
  typedef A Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(A)), may_alias));
  constexpr int lanes = Isa::vector_bytes / sizeof(A);
  // Index sequences, because arrays of accumulators become registers only under constant indices.
  const auto for_each = []<int... i>(std::integer_sequence<int, i...>, const auto& body)
                            FASTDIS_INLINE_LAMBDA { (body(std::integral_constant<int, i>{}), ...); };
  constexpr auto all = std::make_integer_sequence<int, R * W>{};
  Vector sum[R * W];
  for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA {
    Vector* from = reinterpret_cast<Vector*>(c + i / W * c_row + i % W * lanes);
    sum[i] = accumulate ? *from : Vector{};
  });
  for (int64_t k = 0; k < depth; ++k) {
    for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA {
      const Vector row = *reinterpret_cast<const Vector*>(b + k * b_row + i % W * lanes);
      sum[i] += row * a[i / W * a_row + k * a_column];
    });
  }
  for_each(all, [&](auto i)
                    FASTDIS_INLINE_LAMBDA { *reinterpret_cast<Vector*>(c + i / W * c_row + i % W * lanes) = sum[i]; });
}

// C[i][j] = (accumulate ? C[i][j] : 0) + sum_k A(i, k) B[k][j], with A(i, k) = a[i * a_row + k * a_column].
// rows is a multiple of row_pad, columns of column_pad.
template <class Isa, class A>
FASTDIS_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row, int64_t a_column,
                             const A* b, int64_t b_row, A* c, int64_t c_row, bool accumulate) {
  constexpr int R = Isa::tile_rows;
  constexpr int64_t lanes = Isa::vector_bytes / sizeof(A);
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    for (int64_t i = 0; i < rows; i += R) {
      multiply_tile<Isa, A, R, 2>(depth, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row,
                                  accumulate);
    }
  }
  for (; j < columns; j += lanes) {
    for (int64_t i = 0; i < rows; i += R) {
      multiply_tile<Isa, A, R, 1>(depth, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row,
                                  accumulate);
    }
  }
}

// Rows in a tile of pairs.
template <class Isa>
constexpr int pair_tile = Isa::vector_bytes == 64 ? 4 : 2;

// sums[i * tile + j] += row_i * row_j, by vectors, for a tile of pairs; rows at or past `latents` repeat the last.
template <class Isa, class A, int tile>
FASTDIS_INLINE void multiply_pairs(const A* rows, int64_t row, int64_t count, int64_t first, int64_t second,
                                   int64_t latents, A* sums) {
  typedef A Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(A)), may_alias));
  constexpr int lanes = Isa::vector_bytes / sizeof(A);
  const auto for_each = []<int... i>(std::integer_sequence<int, i...>, const auto& body)
                            FASTDIS_INLINE_LAMBDA { (body(std::integral_constant<int, i>{}), ...); };
  constexpr auto side = std::make_integer_sequence<int, tile>{};
  constexpr auto all = std::make_integer_sequence<int, tile * tile>{};
  const A *left[tile], *right[tile];
  for_each(side, [&](auto i) FASTDIS_INLINE_LAMBDA {
    left[i] = rows + std::min<int64_t>(first + i, latents - 1) * row;
    right[i] = rows + std::min<int64_t>(second + i, latents - 1) * row;
  });
  Vector sum[tile * tile];
  for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { sum[i] = reinterpret_cast<Vector*>(sums)[i]; });
  int64_t d = 0;
  if constexpr (tile == 2) {  // four sums would wait for one another
    constexpr int chains = Isa::vector_bytes == 64 ? 4 : 2;
    Vector chain[4 * chains] = {};
    for (; d + chains * lanes <= count; d += chains * lanes) {
      for_each(std::make_integer_sequence<int, 4 * chains>{}, [&](auto i) FASTDIS_INLINE_LAMBDA {
        const int64_t at = d + i / 4 * lanes;
        chain[i] += *reinterpret_cast<const Vector*>(left[i / 2 % 2] + at) *
                    *reinterpret_cast<const Vector*>(right[i % 2] + at);
      });
    }
    for_each(std::make_integer_sequence<int, 4 * chains>{},
             [&](auto i) FASTDIS_INLINE_LAMBDA { sum[i % 4] += chain[i]; });
  }
  for (; d < count; d += lanes) {
    Vector a[tile], b[tile];
    for_each(side, [&](auto i) FASTDIS_INLINE_LAMBDA {
      a[i] = *reinterpret_cast<const Vector*>(left[i] + d);
      b[i] = *reinterpret_cast<const Vector*>(right[i] + d);
    });
    for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { sum[i] += a[i / tile] * b[i % tile]; });
  }
  for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { reinterpret_cast<Vector*>(sums)[i] = sum[i]; });
}

// sums[i] = the sum over the lanes of vector i of `vectors` [count, lanes].
template <class Isa, class A, int count>
FASTDIS_INLINE void sum_lanes(const A* vectors, A* sums) {
  typedef A Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(A)), may_alias));
  constexpr int lanes = Isa::vector_bytes / sizeof(A);
  const auto add_neighbours = []<int... i>(std::integer_sequence<int, i...>, const Vector& one,
                                           const Vector& other) FASTDIS_INLINE_LAMBDA {
    return __builtin_shufflevector(one, other, 2 * i...) + __builtin_shufflevector(one, other, 2 * i + 1 ...);
  };
  for (int first = 0; first < count; first += lanes) {
    Vector parts[lanes] = {};
    for (int i = 0; i < lanes && first + i < count; ++i)
      parts[i] = *reinterpret_cast<const Vector*>(vectors + (first + i) * lanes);
    // Neighbouring lanes are added, of two vectors at a time, until each vector has one lane.
#pragma GCC unroll 4
    for (int left = lanes; left > 1; left /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < left / 2; ++i) {
        parts[i] = add_neighbours(std::make_integer_sequence<int, lanes>{}, parts[2 * i], parts[2 * i + 1]);
      }
    }
    for (int i = 0; i < lanes && first + i < count; ++i) sums[first + i] = parts[0][i];
  }
}

// The sum of a vector's lanes, by halves.
template <class A, int half, class Vector, int... i>
FASTDIS_INLINE A sum_of_half(const Vector& v, std::integer_sequence<int, i...> all) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    const Vector folded = v + __builtin_shufflevector(v, v, (i + half) % static_cast<int>(sizeof...(i))...);
    return sum_of_half<A, half / 2>(folded, all);
  }
}
template <class A, class Vector, int... i>
FASTDIS_INLINE A sum_of_lanes(const Vector& v, std::integer_sequence<int, i...> all) {
  return sum_of_half<A, sizeof...(i) / 2>(v, all);
}

}  // namespace fastdis
