// What the ops on Jacobians share on the CPU: Gram matrices of rows, and rows mixed by a symmetric matrix.
//
// A sample's K rows are read in chunks of dimensions that stay in the nearest cache while all pairs of rows, or all
// results, are made of them, so that memory is read once. Rows in 16 bits are widened chunk by chunk.

#pragma once

#include <algorithm>

#include "../core/gemm.h"
#include "../core/tensor.h"

namespace fastdis {

// A Jacobian [B, K, D] whose rows are contiguous, by samples or by latents (a transposed [K, B, D]).
struct Rows {
  Tensor tensor;
  int64_t batch, latents, dimensions, sample, row;  // the last two: strides

  explicit Rows(const Tensor& jacobian)
      : tensor(by_latents(jacobian) ? jacobian : make_contiguous(jacobian)),
        batch(jacobian.size(0)),
        latents(jacobian.size(1)),
        dimensions(jacobian.size(2)),
        sample(by_latents(jacobian) ? dimensions : latents * dimensions),
        row(by_latents(jacobian) ? batch * dimensions : dimensions) {}

  // Whether it is dense with the latents outermost, and not contiguous as well.
  static bool by_latents(const Tensor& jacobian) {
    const int64_t batch = jacobian.size(0), latents = jacobian.size(1), dimensions = jacobian.size(2);
    if (jacobian.is_contiguous()) return false;
    return (jacobian.stride(2) == 1 || dimensions == 1) && (jacobian.stride(0) == dimensions || batch == 1) &&
           (jacobian.stride(1) == batch * dimensions || latents == 1);
  }

  Tensor empty_like() const {
    return empty_strided(tensor, {batch, latents, dimensions}, {sample, row, 1}, tensor.scalar_type());
  }
};

// Dimensions of a chunk, so that K rows of them fit the nearest cache.
template <class A>
int64_t chunk_of(int64_t latents) {
  const int64_t fits = 32768 / static_cast<int64_t>(sizeof(A)) / std::max<int64_t>(1, latents);
  return std::clamp<int64_t>(fits / 64 * 64, 64, 2048);
}

// K rows of one chunk in the accumulator's type: a view where they are whole vectors of that type already, else a copy
// that is padded with zeros to whole vectors.
template <class T>
struct Chunk {
  using A = accumulate_t<T>;
  static constexpr bool same = std::is_same_v<T, A>;
  const A* rows = nullptr;
  int64_t row = 0, count = 0, room;
  Buffer<A> copy;

  explicit Chunk(int64_t room_) : room(room_) {}

  // Reads up to `rest` dimensions; returns how many.
  FASTDIS_INLINE int64_t read(const T* from, int64_t from_row, int64_t latents, int64_t rest) {
    int64_t length = std::min(room, rest);
    if constexpr (same) {
      if (length >= column_pad<A>) {
        rows = from;
        row = from_row;
        return count = length / column_pad<A> * column_pad<A>;
      }
    }
    row = same ? column_pad<A> : room;
    count = padded(length, column_pad<A>);
    copy.resize(latents * row);
    for (int64_t k = 0; k < latents; ++k) {
      const T* source = from + k * from_row;
      A* to = copy.data() + k * row;
#pragma omp simd
      for (int64_t d = 0; d < length; ++d) to[d] = load(source, d);
      for (int64_t d = length; d < count; ++d) to[d] = A(0);
    }
    rows = copy.data();
    return length;
  }
};

// gram [K][K] = the products of all pairs of rows over `dimensions`.
template <class T>
struct GramOfRows {
  using A = accumulate_t<T>;

  template <class Isa>
  static FASTDIS_INLINE void run(const T* rows, int64_t row, int64_t latents, int64_t dimensions, A* gram) {
    if (latents <= 2) return tiled<Isa, 2>(rows, row, latents, dimensions, gram);
    tiled<Isa, pair_tile<Isa>>(rows, row, latents, dimensions, gram);
  }

  template <class Isa, int tile>
  static FASTDIS_INLINE void tiled(const T* rows, int64_t row, int64_t latents, int64_t dimensions, A* gram) {
    constexpr int lanes = Isa::vector_bytes / sizeof(A);
    constexpr int64_t part = tile * tile * lanes;
    const int64_t tiles = (latents + tile - 1) / tile;
    alignas(64) A one[part] = {};
    Buffer<A> more(tiles == 1 ? 0 : tiles * (tiles + 1) / 2 * part);
    A* const sums = tiles == 1 ? one : more.data();
    Chunk<T> chunk(chunk_of<A>(latents));
    for (int64_t first = 0; first < dimensions;) {
      first += chunk.read(rows + first, row, latents, dimensions - first);
      A* to = sums;
      for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t j = i; j < tiles; ++j, to += part) {
          multiply_pairs<Isa, A, tile>(chunk.rows, chunk.row, chunk.count, i * tile, j * tile, latents, to);
        }
      }
    }
    const A* from = sums;
    alignas(64) A products[tile * tile];
    for (int64_t i = 0; i < tiles; ++i) {
      for (int64_t j = i; j < tiles; ++j, from += part) {
        sum_lanes<Isa, A, tile * tile>(from, products);
        for (int64_t pair = 0; pair < tile * tile; ++pair) {
          const int64_t k = i * tile + pair / tile, l = j * tile + pair % tile;
          if (k < latents && l < latents) gram[k * latents + l] = gram[l * latents + k] = products[pair];
        }
      }
    }
  }
};

// Whether a result is streamed to memory: no cache near a core would keep it, and it is memory used before. Larger ones
// come fresh from the system, which zeroes their pages through the caches.
constexpr bool is_streamed(int64_t bytes) { return bytes >= int64_t{8} << 20 && bytes < int64_t{32} << 20; }

// Stores a whole vector past the caches, to an address that is a multiple of its size. For memory that is larger than
// they are: a plain store would first read what it overwrites.
template <class Isa, class Vector>
FASTDIS_INLINE void stream_store(Vector* to, Vector value) {
#if FASTDIS_MULTIVERSIONED
  if constexpr (Isa::vector_bytes > 16) {
    asm volatile("vmovntps %1, %0" : "=m"(*to) : "v"(value));
  } else {
    asm volatile("movntps %1, %0" : "=m"(*to) : "x"(value));
  }
#else
  *to = value;
#endif
}

// Makes what this thread has streamed visible before what it does next.
FASTDIS_INLINE void fence_streams() {
#if FASTDIS_MULTIVERSIONED
  __builtin_ia32_sfence();
#endif
}

// to_i = sum_j matrix[i][j] row_j over `dimensions`; the matrix has rows of `latents` numbers.
template <class T>
struct MixRows {
  using A = accumulate_t<T>;

  template <class Isa>
  static FASTDIS_INLINE void run(const T* rows, int64_t row, const A* matrix, int64_t latents, int64_t dimensions,
                                 T* to, int64_t to_row, bool stream) {
    if (latents <= 2) return tiled<Isa, 2>(rows, row, matrix, latents, dimensions, to, to_row, stream);
    tiled<Isa, 4>(rows, row, matrix, latents, dimensions, to, to_row, stream);
  }

  template <class Isa, int tile>
  static FASTDIS_INLINE void tiled(const T* rows, int64_t row, const A* matrix, int64_t latents, int64_t dimensions,
                                   T* to, int64_t to_row, bool stream) {
    const bool streamed = stream && (reinterpret_cast<uintptr_t>(to) | to_row * sizeof(T)) % 64 == 0;
    Chunk<T> chunk(chunk_of<A>(2 * latents));
    for (int64_t first = 0; first < dimensions;) {
      const int64_t length = chunk.read(rows + first, row, latents, dimensions - first);
      for (int64_t i = 0; i < latents; i += tile) {
        mix<Isa, tile>(chunk, matrix, latents, i, to + i * to_row + first, to_row, length, streamed);
      }
      first += length;
    }
    if (streamed) fence_streams();
  }

  // A tile of results, by a few vectors, then by single ones.
  template <class Isa, int tile>
  static FASTDIS_INLINE void mix(const Chunk<T>& chunk, const A* matrix, int64_t latents, int64_t first, T* to,
                                 int64_t to_row, int64_t length, bool streamed) {
    constexpr int width = Isa::vector_bytes == 64 ? 4 : 2;  // as many accumulators as registers allow
    if (latents == tile) {
      // A matrix of known size that no store can change: its numbers stay in registers.
      A own[tile * tile];
      std::copy_n(matrix, tile * tile, own);
      return blocks<Isa, tile, width, true>(chunk, own, latents, first, to, to_row, length, streamed);
    }
    blocks<Isa, tile, width, false>(chunk, matrix, latents, first, to, to_row, length, streamed);
  }

  template <class Isa, int tile, int width, bool square>
  static FASTDIS_INLINE void blocks(const Chunk<T>& chunk, const A* matrix, int64_t latents, int64_t first, T* to,
                                    int64_t to_row, int64_t length, bool streamed) {
    constexpr int64_t lanes = Isa::vector_bytes / sizeof(A);
    int64_t d = 0;
    for (; d + width * lanes <= chunk.count; d += width * lanes) {
      columns<Isa, tile, width, square>(chunk, matrix, latents, first, d, to, to_row, length, streamed);
    }
    for (; d < chunk.count; d += lanes)
      columns<Isa, tile, 1, square>(chunk, matrix, latents, first, d, to, to_row, length, streamed);
  }

  template <class Isa, int tile, int W, bool square>
  static FASTDIS_INLINE void columns(const Chunk<T>& chunk, const A* matrix, int64_t latents, int64_t first, int64_t d,
                                     T* to, int64_t to_row, int64_t length, bool streamed) {
    typedef A Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(A)), may_alias));
    constexpr int lanes = Isa::vector_bytes / sizeof(A);
    const auto for_each = []<int... i>(std::integer_sequence<int, i...>, const auto& body)
                              FASTDIS_INLINE_LAMBDA { (body(std::integral_constant<int, i>{}), ...); };
    constexpr auto all = std::make_integer_sequence<int, tile * W>{};
    const A* factors[tile];
    for_each(std::make_integer_sequence<int, tile>{}, [&](auto i) FASTDIS_INLINE_LAMBDA {
      factors[i] = square ? matrix + i * tile : matrix + std::min<int64_t>(first + i, latents - 1) * latents;
    });
    Vector sum[tile * W] = {};
    const auto add = [&](int64_t j) FASTDIS_INLINE_LAMBDA {
      Vector from[W];
      for_each(std::make_integer_sequence<int, W>{}, [&](auto w) FASTDIS_INLINE_LAMBDA {
        from[w] = *reinterpret_cast<const Vector*>(chunk.rows + j * chunk.row + d + w * lanes);
      });
      for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { sum[i] += from[i % W] * factors[i / W][j]; });
    };
    if constexpr (square) {
      for_each(std::make_integer_sequence<int, tile>{}, add);
    } else {
      for (int64_t j = 0; j < latents; ++j) add(j);
    }
    if constexpr (std::is_same_v<T, A>) {
      if (first + tile <= latents && d + W * lanes <= length) {
        for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA {
          Vector* at = reinterpret_cast<Vector*>(to + i / W * to_row + d + i % W * lanes);
          if (streamed) {
            stream_store<Isa>(at, sum[i]);
          } else {
            *at = sum[i];
          }
        });
        return;
      }
    }
    A result[tile * W * lanes];
    for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { reinterpret_cast<Vector*>(result)[i] = sum[i]; });
    const int64_t count = std::min<int64_t>(W * lanes, length - d);
    for (int64_t r = 0; r < std::min<int64_t>(tile, latents - first); ++r) {
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) store(to + r * to_row + d, c, result[r * W * lanes + c]);
    }
  }
};

// Samples cut into the same number of parts: one where there are samples enough for the threads.
struct GramPlan {
  int64_t parts, length;
  bool serial;

  explicit GramPlan(const Rows& rows) {
    const int64_t threads = torch::stable::get_num_threads();
    serial = threads == 1 || rows.tensor.numel() < serial_elements;
    const int64_t wanted =
        serial || rows.batch >= threads ? 1 : (threads + rows.batch - 1) / std::max<int64_t>(1, rows.batch);
    length = padded((rows.dimensions + wanted - 1) / wanted, 64);
    parts = rows.dimensions > 0 ? (rows.dimensions + length - 1) / length : 1;
  }

  // body(index, sample, first dimension, number of dimensions)
  template <class Body>
  void for_each_part(const Rows& rows, const Body& body) const {
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t from = i % parts * length;
        body(i, i / parts, from, std::min(length, rows.dimensions - from));
      }
    };
    if (serial) return run(0, rows.batch * parts);
    torch::stable::parallel_for(0, rows.batch * parts, 1, run);
  }
};

// gram [B, K, K] of a Jacobian, the parts of a sample summed in their order.
template <class T>
void gram_of(const Rows& rows, accumulate_t<T>* gram) {
  using A = accumulate_t<T>;
  const GramPlan plan(rows);
  const int64_t size = rows.latents * rows.latents;
  Buffer<A> sums(plan.parts > 1 ? rows.batch * plan.parts * size : 0);
  A* to = plan.parts > 1 ? sums.data() : gram;
  plan.for_each_part(rows, [&](int64_t i, int64_t b, int64_t first, int64_t count) {
    multiversion<GramOfRows<T>>(data<T>(rows.tensor) + b * rows.sample + first, rows.row, rows.latents, count,
                                to + i * size);
  });
  if (plan.parts == 1) return;
  for (int64_t b = 0; b < rows.batch; ++b) {
    std::copy_n(sums.data() + b * plan.parts * size, size, gram + b * size);
    for (int64_t part = 1; part < plan.parts; ++part) {
      for (int64_t i = 0; i < size; ++i) gram[b * size + i] += sums[(b * plan.parts + part) * size + i];
    }
  }
}

// matrix_b J_b of every sample, like the Jacobian; matrices [B, K, K].
template <class T>
Tensor mixed(const Rows& rows, const accumulate_t<T>* matrices) {
  Tensor result = rows.empty_like();
  const GramPlan plan(rows);
  const bool streamed = is_streamed(result.numel() * static_cast<int64_t>(sizeof(T)));
  plan.for_each_part(rows, [&](int64_t, int64_t b, int64_t first, int64_t count) {
    const int64_t at = b * rows.sample + first;
    multiversion<MixRows<T>>(data<T>(rows.tensor) + at, rows.row, matrices + b * rows.latents * rows.latents,
                             rows.latents, count, mutable_data<T>(result) + at, rows.row, streamed);
  });
  return result;
}

// Compiled once, in jacobian_gram.cpp.
extern template void gram_of<float>(const Rows&, float*);
extern template void gram_of<double>(const Rows&, double*);
extern template void gram_of<float16>(const Rows&, float*);
extern template void gram_of<bfloat16>(const Rows&, float*);
extern template Tensor mixed<float>(const Rows&, const float*);
extern template Tensor mixed<double>(const Rows&, const double*);
extern template Tensor mixed<float16>(const Rows&, const float*);
extern template Tensor mixed<bfloat16>(const Rows&, const float*);

}  // namespace fastdis
