// Prototypical loss on the CPU: cross entropy of softmax over prototypes of the negative squared distance.
//
// |q|^2 is the same for every prototype and cancels, so the logits are s_n = 2 q.p_n - |p_n|^2, centred. Only their
// log-sum-exp is kept for backward, which finds the logits again block by block.

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <limits>
#include <tuple>

#include "prototypes.h"

namespace fastdis {
namespace {

enum class Reduction { none, mean, sum };

// s_n = 2 q.p_n - |p_n|^2; a prototype at infinity has no share, whatever infinity times q is.
template <class A>
FASTDIS_INLINE A logit_of(A product, A norm) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  return norm == infinity ? -infinity : 2 * product - norm;
}

template <class T>
struct LossForward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* queries, const T* prototypes, const int64_t* labels, accumulate_t<T>* loss,
                                 accumulate_t<T>* logsumexp, int64_t Q, int64_t N, int64_t D) {
    using A = accumulate_t<T>;
    CentredPrototypes<A> p(N, D);
    p.fill(prototypes);
    QueryBlock<A> block(p);
    for (int64_t first = 0; first < Q; first += query_block) {
      const int64_t count = std::min(query_block, Q - first);
      block.fill(p, queries + first * D, count);
      block.template multiply_prototypes<Isa>(p);
      for (int64_t q = 0; q < count; ++q) {
        A* logit = block.matrix.data() + q * p.column;
        // By lanes, because a maximum that must see NaN as the comparison does is not vectorised as a reduction.
        constexpr int64_t lanes = column_pad<A>;
        A highest_of[lanes];
        std::fill_n(highest_of, lanes, -std::numeric_limits<A>::infinity());
        for (int64_t n = 0; n < p.column; n += lanes) {
#pragma omp simd
          for (int64_t j = 0; j < lanes; ++j) {
            const A value = logit_of(logit[n + j], p.norms[n + j]);
            logit[n + j] = value;
            highest_of[j] = value > highest_of[j] ? value : highest_of[j];
          }
        }
        const A highest = *std::max_element(highest_of, highest_of + lanes);
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t n = 0; n < p.column; ++n) sum += exponential(logit[n] - highest);
        const A lse = highest + std::log(sum);
        logsumexp[first + q] = lse;
        loss[first + q] = lse - logit[labels[first + q]];
      }
    }
  }
};

template <class T>
struct LossBackward {
  template <class Isa>
  static FASTDIS_INLINE void run(const accumulate_t<T>* grad, const T* queries, const T* prototypes,
                                 const int64_t* labels, const accumulate_t<T>* logsumexp, T* dqueries,
                                 accumulate_t<T>* dprototypes, int64_t Q, int64_t N, int64_t D) {
    using A = accumulate_t<T>;
    CentredPrototypes<A> p(N, D);
    p.fill(prototypes);
    QueryBlock<A> block(p);
    for (int64_t first = 0; first < Q; first += query_block) {
      const int64_t count = std::min(query_block, Q - first);
      block.fill(p, queries + first * D, count);
      block.template multiply_prototypes<Isa>(p);
      // In place: from the products to 2 g (softmax - one-hot).
      for (int64_t q = 0; q < count; ++q) {
        A* logit = block.matrix.data() + q * p.column;
        const A lse = logsumexp[first + q], scale = 2 * grad[first + q];
#pragma omp simd
        for (int64_t n = 0; n < N; ++n) logit[n] = scale * share_of_softmax(logit_of(logit[n], p.norms[n]) - lse);
        std::fill(logit + N, logit + p.column, A(0));
        logit[labels[first + q]] -= scale;
      }
      std::fill(block.matrix.begin() + count * p.column, block.matrix.begin() + block.rows * p.column, A(0));
      block.template backward<Isa>(p, count, true, dqueries + first * D, dprototypes);
    }
    block.finish(p, dprototypes);
  }
};

const int64_t* checked_labels(const Tensor& labels, int64_t prototypes) {
  check_same_dtype(labels, "labels", ScalarType::Long);
  const int64_t* values = data<int64_t>(labels);
  for (int64_t i = 0; i < labels.numel(); ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < prototypes, "labels holds ", values[i], " at position ", i,
                    "; allowed are 0 to ", prototypes - 1, ", one for each prototype");
  }
  return values;
}

std::tuple<Tensor, Tensor> prototypical_loss_forward(const Tensor& queries, const Tensor& prototypes,
                                                     const Tensor& labels, int64_t reduction) {
  check_same_dtype(prototypes, "prototypes", queries.scalar_type());
  const EpisodePlan plan(EpisodeShape(queries, prototypes));
  const auto [E, Q, N, D] = plan.shape;
  const Tensor q = make_contiguous(queries), p = make_contiguous(prototypes), y = make_contiguous(labels);
  const int64_t* label = checked_labels(y, N);
  return dispatch_floating(queries, "queries", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    const bool reduced = static_cast<Reduction>(reduction) != Reduction::none;
    Tensor loss = reduced ? empty(queries, {}, queries.scalar_type()) : empty(queries, {E, Q}, queries.scalar_type());
    Tensor logsumexp = empty(queries, {E, Q}, scalar_type_of<A>());
    std::vector<A> losses(E * Q);
    plan.for_each_chunk([&](int64_t, int64_t e, int64_t first, int64_t last) {
      const int64_t at = e * Q + first;
      if (last > first) {
        multiversion<LossForward<T>>(data<T>(q) + at * D, data<T>(p) + e * N * D, label + at, losses.data() + at,
                                     mutable_data<A>(logsumexp) + at, last - first, N, D);
      }
    });
    if (reduced) {
      double total = 0;
      for (const A value : losses) total += value;
      if (static_cast<Reduction>(reduction) == Reduction::mean) total /= static_cast<double>(E * Q);
      store(mutable_data<T>(loss), 0, static_cast<A>(total));
    } else {
      T* to = mutable_data<T>(loss);
      for (int64_t i = 0; i < E * Q; ++i) store(to, i, losses[i]);
    }
    return {loss, logsumexp};
  });
}

std::tuple<Tensor, Tensor> prototypical_loss_backward(const Tensor& grad, const Tensor& queries,
                                                      const Tensor& prototypes, const Tensor& labels,
                                                      const Tensor& logsumexp, int64_t reduction) {
  check_same_dtype(prototypes, "prototypes", queries.scalar_type());
  check_same_dtype(grad, "grad", queries.scalar_type());
  const EpisodePlan plan(EpisodeShape(queries, prototypes));
  const auto [E, Q, N, D] = plan.shape;
  const Tensor g = make_contiguous(grad), q = make_contiguous(queries), p = make_contiguous(prototypes),
               y = make_contiguous(labels), lse = make_contiguous(logsumexp);
  const int64_t* label = checked_labels(y, N);
  return dispatch_floating(queries, "queries", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor dqueries = empty(queries, {E, Q, D}, queries.scalar_type());
    Tensor dprototypes = empty(queries, {E, N, D}, queries.scalar_type());
    std::vector<A> grads(E * Q);
    const T* of_loss = data<T>(g);
    for (int64_t i = 0; i < E * Q; ++i) {
      const A value = load(of_loss, static_cast<Reduction>(reduction) == Reduction::none ? i : 0);
      grads[i] = static_cast<Reduction>(reduction) == Reduction::mean ? value / static_cast<A>(E * Q) : value;
    }
    const int64_t row = padded(D, column_pad<A>), part = padded(N, row_pad) * row;
    Buffer<A> parts(E * plan.chunks * part);
    plan.for_each_chunk([&](int64_t i, int64_t e, int64_t first, int64_t last) {
      const int64_t at = e * Q + first;
      if (last > first) {
        multiversion<LossBackward<T>>(grads.data() + at, data<T>(q) + at * D, data<T>(p) + e * N * D, label + at,
                                      data<A>(lse) + at, mutable_data<T>(dqueries) + at * D, parts.data() + i * part,
                                      last - first, N, D);
      }
    });
    gather_prototype_gradients(plan, parts, row, mutable_data<T>(dprototypes));
    return {dqueries, dprototypes};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("prototypical_loss_forward", TORCH_BOX(&fastdis::prototypical_loss_forward));
  m.impl("prototypical_loss_backward", TORCH_BOX(&fastdis::prototypical_loss_backward));
}
