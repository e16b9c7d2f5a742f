// What prototype_distances and prototypical_loss share on the CPU: centred episodes and the work on blocks of queries.
//
// Queries and prototypes are centred on the episode's mean prototype before any product: distances do not change, and
// a common offset, however large, no longer cancels digits. Products run on blocks of queries that stay in cache, so
// no [Q, N, D] tensor exists, and [Q, N] only where it is the result.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../core/gemm.h"
#include "../core/tensor.h"

namespace fastdis {

struct EpisodeShape {
  int64_t episodes, queries, prototypes, dimensions;

  EpisodeShape(const Tensor& q, const Tensor& p)
      : episodes(q.size(0)), queries(q.size(1)), prototypes(p.size(1)), dimensions(q.size(2)) {}
};

// Queries handled at a time.
constexpr int64_t query_block = 64;

// The prototypes of one episode, centred, by rows [N][D] and by columns [D][N], with their squared norms, which are
// infinite in the padding: a prototype that is not there is infinitely far.
template <class A>
struct CentredPrototypes {
  int64_t count, dimensions, row, column;  // row: padded D, column: padded N
  Buffer<A> center, rows, columns, norms;

  CentredPrototypes(int64_t count_, int64_t dimensions_)
      : count(count_),
        dimensions(dimensions_),
        row(padded(dimensions_, column_pad<A>)),
        column(padded(count_, column_pad<A>)),
        center(row),
        rows(count * row),
        columns(dimensions * column),
        norms(column, std::numeric_limits<A>::infinity()) {}

  template <class T>
  FASTDIS_INLINE void fill(const T* prototypes) {
    for (int64_t n = 0; n < count; ++n) {
#pragma omp simd
      for (int64_t d = 0; d < dimensions; ++d) center[d] += load(prototypes + n * dimensions, d);
    }
    const A share = A(1) / static_cast<A>(count);
#pragma omp simd
    for (int64_t d = 0; d < dimensions; ++d) {
      const A mean = center[d] * share;
      center[d] = mean - mean == A(0) ? mean : A(0);  // one infinite prototype must not reach the others
    }
    for (int64_t n = 0; n < count; ++n) {
      A norm = 0;
#pragma omp simd reduction(+ : norm)
      for (int64_t d = 0; d < dimensions; ++d) {
        const A value = load(prototypes + n * dimensions, d) - center[d];
        rows[n * row + d] = value;
        norm += value * value;
      }
      norms[n] = norm;
    }
    // The transpose by strips of dimensions whose cache lines stay at hand for all prototypes.
    for (int64_t first = 0; first < row; first += column_pad<A>) {
      const int64_t last = std::min(first + column_pad<A>, dimensions);
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t d = first; d < last; ++d) columns[d * column + n] = rows[n * row + d];
      }
    }
  }
};

// One block of queries, centred, and a matrix [queries][prototypes] about them.
template <class A>
struct QueryBlock {
  int64_t rows = 0;  // padded
  Buffer<A> queries, matrix, gradient, column_sums;

  explicit QueryBlock(const CentredPrototypes<A>& p)
      : queries(query_block * p.row),
        matrix(query_block * p.column),
        gradient(query_block * p.row),
        column_sums(p.column) {}

  template <class T>
  FASTDIS_INLINE void fill(const CentredPrototypes<A>& p, const T* from, int64_t count) {
    rows = padded(count, row_pad);
    for (int64_t q = 0; q < count; ++q) {
#pragma omp simd
      for (int64_t d = 0; d < p.dimensions; ++d) {
        queries[q * p.row + d] = load(from + q * p.dimensions, d) - p.center[d];
      }
    }
    std::fill(queries.begin() + count * p.row, queries.begin() + rows * p.row, A(0));
  }

  // matrix = queries prototypes^T
  template <class Isa>
  FASTDIS_INLINE void multiply_prototypes(const CentredPrototypes<A>& p) {
    multiply<Isa, A>(rows, p.column, p.dimensions, queries.data(), p.row, 1, p.columns.data(), p.column, matrix.data(),
                     p.column, false);
  }

  // With the matrix M holding -2 d(loss)/d(distance), zero in its padding, and once `finish` has been called:
  //   dqueries = M P - rowsum(M) Q,   dprototypes += M^T Q - colsum(M) P.
  template <class Isa, class T>
  FASTDIS_INLINE void backward(const CentredPrototypes<A>& p, int64_t count, bool rows_sum_to_zero, T* dqueries,
                               A* dprototypes) {
    A* product = gradient.data();
    if constexpr (std::is_same_v<T, A>) {
      if (rows == count && p.row == p.dimensions) product = dqueries;  // nothing is padded
    }
    multiply<Isa, A>(rows, p.row, p.count, matrix.data(), p.column, 1, p.rows.data(), p.row, product, p.row, false);
    for (int64_t q = 0; q < count; ++q) {
      const A *from = product + q * p.row, *query = queries.data() + q * p.row;
      T* to = dqueries + q * p.dimensions;
      if (!rows_sum_to_zero) {
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < p.count; ++n) sum += matrix[q * p.column + n];
#pragma omp simd
        for (int64_t d = 0; d < p.dimensions; ++d) store(to, d, from[d] - sum * query[d]);
      } else if (product == gradient.data()) {
#pragma omp simd
        for (int64_t d = 0; d < p.dimensions; ++d) store(to, d, from[d]);
      }
    }
    multiply<Isa, A>(padded(p.count, row_pad), p.row, count, matrix.data(), 1, p.column, queries.data(), p.row,
                     dprototypes, p.row, true);
    for (int64_t q = 0; q < count; ++q) {
#pragma omp simd
      for (int64_t n = 0; n < p.column; ++n) column_sums[n] += matrix[q * p.column + n];
    }
  }

  FASTDIS_INLINE void finish(const CentredPrototypes<A>& p, A* dprototypes) {
    for (int64_t n = 0; n < p.count; ++n) {
      const A sum = column_sums[n];
      const A* prototype = p.rows.data() + n * p.row;
      A* to = dprototypes + n * p.row;
#pragma omp simd
      for (int64_t d = 0; d < p.dimensions; ++d) to[d] -= sum * prototype[d];
    }
  }
};

// Every episode's queries cut into the same number of chunks: one where there are episodes enough for the threads.
struct EpisodePlan {
  EpisodeShape shape;
  int64_t chunks;
  bool serial;

  explicit EpisodePlan(const EpisodeShape& shape_) : shape(shape_) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t per_query = shape.prototypes * shape.dimensions;
    serial = threads == 1 || shape.episodes * shape.queries * per_query < 16 * serial_elements;
    const int64_t blocks = std::max<int64_t>(1, (shape.queries + query_block - 1) / query_block);
    chunks =
        serial || shape.episodes >= threads ? 1 : std::min(blocks, (threads + shape.episodes - 1) / shape.episodes);
  }

  // chunk(index, episode, first query, last query)
  template <class Chunk>
  void for_each_chunk(const Chunk& chunk) const {
    const auto run = [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = i % chunks;
        chunk(i, i / chunks, part * shape.queries / chunks, (part + 1) * shape.queries / chunks);
      }
    };
    if (serial) return run(0, shape.episodes * chunks);
    torch::stable::parallel_for(0, shape.episodes * chunks, 1, run);
  }
};

// Sums the chunks' gradients of the prototypes, in order, into the tensor.
template <class T>
void gather_prototype_gradients(const EpisodePlan& plan, const Buffer<accumulate_t<T>>& parts, int64_t row,
                                T* dprototypes) {
  const auto& shape = plan.shape;
  const int64_t part_size = padded(shape.prototypes, row_pad) * row;
  Buffer<accumulate_t<T>> sums(shape.dimensions);
  for (int64_t e = 0; e < shape.episodes; ++e) {
    for (int64_t n = 0; n < shape.prototypes; ++n) {
      const accumulate_t<T>* from = parts.data() + e * plan.chunks * part_size + n * row;
      T* to = dprototypes + (e * shape.prototypes + n) * shape.dimensions;
      std::copy_n(from, shape.dimensions, sums.begin());
      for (int64_t part = 1; part < plan.chunks; ++part) {
#pragma omp simd
        for (int64_t d = 0; d < shape.dimensions; ++d) sums[d] += from[part * part_size + d];
      }
#pragma omp simd
      for (int64_t d = 0; d < shape.dimensions; ++d) store(to, d, sums[d]);
    }
  }
}

}  // namespace fastdis
