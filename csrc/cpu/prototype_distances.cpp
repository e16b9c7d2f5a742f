// Squared Euclidean distances to prototypes on the CPU: max(0, |q|^2 - 2 q.p + |p|^2), centred.

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "prototypes.h"

namespace fastdis {
namespace {

template <class T>
struct DistancesForward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* queries, const T* prototypes, T* distances, int64_t Q, int64_t N, int64_t D) {
    using A = accumulate_t<T>;
    CentredPrototypes<A> p(N, D);
    p.fill(prototypes);
    QueryBlock<A> block(p);
    for (int64_t first = 0; first < Q; first += query_block) {
      const int64_t count = std::min(query_block, Q - first);
      block.fill(p, queries + first * D, count);
      block.template multiply_prototypes<Isa>(p);
      for (int64_t q = 0; q < count; ++q) {
        const A *query = block.queries.data() + q * p.row, *product = block.matrix.data() + q * p.column;
        T* to = distances + (first + q) * N;
        A norm = 0;
#pragma omp simd reduction(+ : norm)
        for (int64_t d = 0; d < D; ++d) norm += query[d] * query[d];
#pragma omp simd
        for (int64_t n = 0; n < N; ++n) {
          const A norms = norm + p.norms[n], distance = norms - 2 * product[n];
          const A clamped = distance < A(0) ? A(0) : distance;  // this comparison lets NaN through
          store(to, n, norms == std::numeric_limits<A>::infinity() ? norms : clamped);
        }
      }
    }
  }
};

template <class T>
struct DistancesBackward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad, const T* queries, const T* prototypes, T* dqueries,
                                 accumulate_t<T>* dprototypes, int64_t Q, int64_t N, int64_t D) {
    using A = accumulate_t<T>;
    CentredPrototypes<A> p(N, D);
    p.fill(prototypes);
    QueryBlock<A> block(p);
    for (int64_t first = 0; first < Q; first += query_block) {
      const int64_t count = std::min(query_block, Q - first);
      block.fill(p, queries + first * D, count);
      std::fill(block.matrix.begin(), block.matrix.end(), A(0));
      for (int64_t q = 0; q < count; ++q) {
        A* to = block.matrix.data() + q * p.column;
#pragma omp simd
        for (int64_t n = 0; n < N; ++n) to[n] = -2 * load(grad + (first + q) * N, n);
      }
      block.template backward<Isa>(p, count, false, dqueries + first * D, dprototypes);
    }
    block.finish(p, dprototypes);
  }
};

Tensor prototype_distances_forward(const Tensor& queries, const Tensor& prototypes) {
  check_same_dtype(prototypes, "prototypes", queries.scalar_type());
  const EpisodePlan plan(EpisodeShape(queries, prototypes));
  const auto [E, Q, N, D] = plan.shape;
  const Tensor q = make_contiguous(queries), p = make_contiguous(prototypes);
  return dispatch_floating(queries, "queries", [&]<class T>() {
    Tensor distances = empty(queries, {E, Q, N}, queries.scalar_type());
    if (distances.numel() == 0) return distances;
    plan.for_each_chunk([&](int64_t, int64_t e, int64_t first, int64_t last) {
      multiversion<DistancesForward<T>>(data<T>(q) + (e * Q + first) * D, data<T>(p) + e * N * D,
                                        mutable_data<T>(distances) + (e * Q + first) * N, last - first, N, D);
    });
    return distances;
  });
}

std::tuple<Tensor, Tensor> prototype_distances_backward(const Tensor& grad, const Tensor& queries,
                                                        const Tensor& prototypes) {
  check_same_dtype(prototypes, "prototypes", queries.scalar_type());
  check_same_dtype(grad, "grad", queries.scalar_type());
  const EpisodePlan plan(EpisodeShape(queries, prototypes));
  const auto [E, Q, N, D] = plan.shape;
  const Tensor g = make_contiguous(grad), q = make_contiguous(queries), p = make_contiguous(prototypes);
  return dispatch_floating(queries, "queries", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor dqueries = empty(queries, {E, Q, D}, queries.scalar_type());
    Tensor dprototypes = empty(queries, {E, N, D}, queries.scalar_type());
    const int64_t row = padded(D, column_pad<A>), part = padded(N, row_pad) * row;
    Buffer<A> parts(E * plan.chunks * part);
    if (N > 0 && D > 0) {
      plan.for_each_chunk([&](int64_t i, int64_t e, int64_t first, int64_t last) {
        multiversion<DistancesBackward<T>>(data<T>(g) + (e * Q + first) * N, data<T>(q) + (e * Q + first) * D,
                                           data<T>(p) + e * N * D, mutable_data<T>(dqueries) + (e * Q + first) * D,
                                           parts.data() + i * part, last - first, N, D);
      });
    } else {
      std::fill_n(reinterpret_cast<char*>(mutable_data<T>(dqueries)), dqueries.numel() * sizeof(T), 0);
    }
    gather_prototype_gradients(plan, parts, row, mutable_data<T>(dprototypes));
    return {dqueries, dprototypes};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("prototype_distances_forward", TORCH_BOX(&fastdis::prototype_distances_forward));
  m.impl("prototype_distances_backward", TORCH_BOX(&fastdis::prototype_distances_backward));
}
