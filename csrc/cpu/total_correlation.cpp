// The decomposition of the aggregate divergence on the CPU, over tiles of pairs of samples that stay in cache.
//
// Densities are kept as base-2 logarithms, so that no multiplication stands before a power. Vectors run over posteriors
// j; a few draws i share what is loaded of them.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../core/gemm.h"
#include "../core/tensor.h"

namespace fastdis {
namespace {

constexpr int64_t tile = 256;             // posteriors
constexpr int draws = 4;                  // handled together
constexpr int64_t parallel_pairs = 4096;  // powers of two that are worth a second thread
constexpr double log2_e = 1.4426950408889634, log_2 = 0.6931471805599453;
constexpr double half_log2_two_pi = 1.3257480647361593;  // log2(2 pi) / 2

// One batch of B draws and posteriors in K dimensions, in the accumulator's type. Posteriors lie by dimensions, [K][B
// padded]; those in the padding have density 0.
template <class A>
struct Batch {
  int64_t size, latents, row;
  const A* z = nullptr;  // [B padded][K]: where they were, or a copy
  Buffer<A> copied, mean, precision, constant;
  // The natural logarithm of most pairs' weight, and base-2 logarithms of what the pairs (i, i) and (i, i + 1) have
  // beyond that.
  double base;
  A diagonal = 0, neighbour = 0;
  bool stratified;

  Batch(int64_t size_, int64_t latents_, int64_t dataset_size, int64_t estimator)
      : size(size_),
        latents(latents_),
        row(padded(size_, column_pad<A>)),
        mean(latents_ * row),
        precision(latents_ * row),
        constant(latents_ * row, -std::numeric_limits<A>::infinity()),
        stratified(estimator != 0) {
    const double batch = static_cast<double>(size), whole = static_cast<double>(dataset_size), others = batch - 1;
    base = -std::log(stratified ? others : batch * whole);
    if (!stratified) return;
    diagonal = static_cast<A>(std::log2(others / whole));
    neighbour = static_cast<A>(std::log2((whole - others) / whole));
  }

  // What pairs of the draws with a tile of posteriors have in logarithms of weights beyond the base.
  FASTDIS_INLINE void extra_weights(int64_t draw, int64_t first, A* extra) const {
    std::fill_n(extra, draws * tile, A(0));
    if (!stratified) return;
    for (int r = 0; r < draws && draw + r < size; ++r) {
      const int64_t own = draw + r - first, right = (draw + r + 1 < size ? draw + r + 1 : 0) - first;
      if (own >= 0 && own < tile) extra[r * tile + own] += diagonal;
      if (right >= 0 && right < tile) extra[r * tile + right] += neighbour;
    }
  }
};

template <class T>
struct Fill {
  template <class Isa>
  static FASTDIS_INLINE void run(Batch<accumulate_t<T>>* batch, const T* z, const T* mean, const T* logvar) {
    using A = accumulate_t<T>;
    const int64_t latents = batch->latents, row = batch->row;
    if (std::is_same_v<T, A> && batch->size % draws == 0) {
      batch->z = reinterpret_cast<const A*>(z);
    } else {
      batch->copied.resize(padded(batch->size, draws) * latents);
      for (int64_t i = 0; i < batch->size * latents; ++i) batch->copied[i] = load(z, i);
      batch->z = batch->copied.data();
    }
    for (int64_t j = 0; j < batch->size; ++j) {
      for (int64_t k = 0; k < latents; ++k) {
        const A log_variance = load(logvar, j * latents + k);
        batch->mean[k * row + j] = load(mean, j * latents + k);
        batch->precision[k * row + j] = std::exp(-log_variance);
        batch->constant[k * row + j] = A(-0.5 * log2_e) * log_variance - A(half_log2_two_pi);
      }
    }
  }
};

// log2 of a sum of powers of two, from tile to tile.
template <class A>
struct RunningSum {
  A largest = -std::numeric_limits<A>::infinity(), sum = 0;

  FASTDIS_INLINE void add(const A* values, int64_t count) {
    A most = largest;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < count; ++j) most = values[j] > most ? values[j] : most;
    // Where nothing has a density, minus infinity less itself would be NaN; but what is NaN stays so.
    const A from = most == -std::numeric_limits<A>::infinity() ? A(0) : most;
    A more = 0;
#pragma omp simd reduction(+ : more)
    for (int64_t j = 0; j < count; ++j) more += power_of_two(values[j] - from);
    if (most == -std::numeric_limits<A>::infinity() && more == more) return;
    sum = sum * power_of_two(largest - from) + more;
    largest = most;
  }

  A value() const { return A(log_2) * (largest + std::log2(sum)); }
};

// log q(z_i) and log q(z_ik) less the base of draws first to last; first is a multiple of `draws`.
template <class A>
struct Forward {
  template <class Isa>
  static FASTDIS_INLINE void run(const Batch<A>* batch, A* log_joint, A* log_marginals, int64_t first, int64_t last) {
    const int64_t latents = batch->latents, row = batch->row;
    A joint[draws * tile], single[draws * tile], extra[draws * tile];
    Buffer<RunningSum<A>> sums(draws * (latents + 1));
    for (int64_t i = first; i < last; i += draws) {
      std::fill(sums.begin(), sums.end(), RunningSum<A>());
      for (int64_t j = 0; j < row; j += tile) {
        const int64_t count = std::min(tile, row - j);
        batch->extra_weights(i, j, extra);
        std::copy_n(extra, draws * tile, joint);
        for (int64_t k = 0; k < latents; ++k) {
          densities(*batch, i, j, k, count, extra, single, joint);
          for (int r = 0; r < draws; ++r) sums[r * (latents + 1) + k].add(single + r * tile, count);
        }
        for (int r = 0; r < draws; ++r) sums[r * (latents + 1) + latents].add(joint + r * tile, count);
      }
      for (int64_t r = 0; r < std::min<int64_t>(draws, last - i); ++r) {
        const RunningSum<A>* of = sums.data() + r * (latents + 1);
        log_joint[i + r] = of[latents].value();
        for (int64_t k = 0; k < latents; ++k) log_marginals[(i + r) * latents + k] = of[k].value();
      }
    }
  }

  // single = log2 density of dimension k + extra; joint += log2 density.
  static FASTDIS_INLINE void densities(const Batch<A>& batch, int64_t i, int64_t j, int64_t k, int64_t count,
                                       const A* extra, A* single, A* joint) {
    const A *mean = batch.mean.data() + k * batch.row + j, *precision = batch.precision.data() + k * batch.row + j;
    const A* constant = batch.constant.data() + k * batch.row + j;
    for (int r = 0; r < draws; ++r) {
      const A z = batch.z[(i + r) * batch.latents + k];
      const A* e = extra + r * tile;
      A *s = single + r * tile, *sum = joint + r * tile;
#pragma omp simd
      for (int64_t t = 0; t < count; ++t) {
        const A d = z - mean[t], l = d * d * (A(-0.5 * log2_e) * precision[t]) + constant[t];
        s[t] = l + e[t];
        sum[t] += l;
      }
    }
  }
};

// Coefficients of the logarithms in what is differentiated.
template <class A>
struct Coefficients {
  A joint, marginals, posterior, prior;
};

// Of posteriors first to last, with all draws: dz [B][K] (their part of it), dmean and twice dlogvar by dimensions.
template <class A>
struct Backward {
  template <class Isa>
  static FASTDIS_INLINE void run(const Batch<A>* batch, const A* log_joint, const A* log_marginals,
                                 Coefficients<A> factors, A* dz, A* dmean, A* dlogvar, int64_t first, int64_t last) {
    const int64_t latents = batch->latents, row = batch->row;
    A share[draws * tile], extra[draws * tile];
    for (int64_t j = first; j < last; j += tile) {
      const int64_t count = std::min(tile, last - j);
      for (int64_t i = 0; i < batch->size; i += draws) {
        const int64_t present = std::min<int64_t>(draws, batch->size - i);
        batch->extra_weights(i, j, extra);
        joint_shares(*batch, i, j, count, present, extra, log_joint, factors.joint, share);
        for (int64_t k = 0; k < latents; ++k) {
          const int64_t at = k * row + j;
          const A *mean = batch->mean.data() + at, *precision = batch->precision.data() + at;
          const A* constant = batch->constant.data() + at;
          A *to_mean = dmean + at, *to_logvar = dlogvar + at;
          for (int64_t r = 0; r < present; ++r) {
            const A z = batch->z[(i + r) * latents + k];
            const A less = A(log2_e) * log_marginals[(i + r) * latents + k];
            const A *e = extra + r * tile, *of_joint = share + r * tile;
            A sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t t = 0; t < count; ++t) {
              const A d = z - mean[t], u = d * precision[t], square = d * u;
              const A l = A(-0.5 * log2_e) * square + constant[t] + e[t];
              const A weight = of_joint[t] + factors.marginals * power_of_two(l - less);
              sum += weight * u;
              to_mean[t] += weight * u;
              to_logvar[t] += weight * (square - A(1));
            }
            dz[(i + r) * latents + k] -= sum;
          }
        }
      }
    }
  }

  // factor times the softmax over posteriors of the joint density.
  static FASTDIS_INLINE void joint_shares(const Batch<A>& batch, int64_t i, int64_t j, int64_t count, int64_t present,
                                          const A* extra, const A* log_joint, A factor, A* share) {
    std::copy_n(extra, draws * tile, share);
    for (int64_t k = 0; k < batch.latents; ++k) {
      const int64_t at = k * batch.row + j;
      const A *mean = batch.mean.data() + at, *precision = batch.precision.data() + at;
      const A* constant = batch.constant.data() + at;
      for (int r = 0; r < draws; ++r) {
        const A z = batch.z[(i + r) * batch.latents + k];
        A* sum = share + r * tile;
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) {
          const A d = z - mean[t];
          sum[t] += d * d * (A(-0.5 * log2_e) * precision[t]) + constant[t];
        }
      }
    }
    for (int64_t r = 0; r < present; ++r) {
      const A less = A(log2_e) * log_joint[i + r];
      A* of = share + r * tile;
#pragma omp simd
      for (int64_t t = 0; t < count; ++t) of[t] = factor * power_of_two(of[t] - less);
    }
  }
};

// z, mean, logvar [B, K] or [E, B, K] as E batches.
struct Shape {
  std::vector<int64_t> leading, rows, all;
  int64_t batches, size, latents;

  explicit Shape(const Tensor& z) : all(z.sizes().begin(), z.sizes().end()) {
    rows.assign(all.begin(), all.end() - 1);
    leading.assign(all.begin(), all.end() - 2);
    batches = leading.empty() ? 1 : leading[0];
    size = rows.back();
    latents = all.back();
  }
  bool serial() const { return size * size * (latents + 1) < parallel_pairs; }
};

// The means over samples of the three terms, in double precision.
template <class A>
void terms_of(const Batch<A>& batch, const A* log_joint, const A* log_marginals, A* terms[3]) {
  double information = 0, correlation = 0, divergence = 0;
  for (int64_t i = 0; i < batch.size; ++i) {
    double posterior = 0, prior = 0, marginals = 0;
    for (int64_t k = 0; k < batch.latents; ++k) {
      const double z = batch.z[i * batch.latents + k];
      const int64_t at = k * batch.row + i;
      const double d = z - batch.mean[at];
      posterior += log_2 * batch.constant[at] - 0.5 * (d * d * batch.precision[at]);
      prior -= log_2 * half_log2_two_pi + 0.5 * (z * z);
      marginals += log_marginals[i * batch.latents + k] + batch.base;
    }
    const double joint = log_joint[i] + batch.base;
    information += posterior - joint;
    correlation += joint - marginals;
    divergence += marginals - prior;
  }
  const double count = static_cast<double>(batch.size);
  *terms[0] = static_cast<A>(information / count);
  *terms[1] = static_cast<A>(correlation / count);
  *terms[2] = static_cast<A>(divergence / count);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> total_correlation_forward(const Tensor& z, const Tensor& mean,
                                                                             const Tensor& logvar, int64_t dataset_size,
                                                                             int64_t estimator) {
  check_same_dtype(mean, "mean", z.scalar_type());
  check_same_dtype(logvar, "logvar", z.scalar_type());
  const Shape shape(z);
  const Tensor from = make_contiguous(z), m = make_contiguous(mean), v = make_contiguous(logvar);
  return dispatch_floating(z, "z", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    const ScalarType wide = scalar_type_of<A>();
    Tensor information = empty(z, shape.leading, wide), correlation = empty(z, shape.leading, wide);
    Tensor divergence = empty(z, shape.leading, wide);
    Tensor log_joint = empty(z, shape.rows, wide), log_marginals = empty(z, shape.all, wide);
    for (int64_t e = 0; e < shape.batches; ++e) {
      const int64_t at = e * shape.size * shape.latents;
      Batch<A> batch(shape.size, shape.latents, dataset_size, estimator);
      multiversion<Fill<T>>(&batch, data<T>(from) + at, data<T>(m) + at, data<T>(v) + at);
      A *joint = mutable_data<A>(log_joint) + e * shape.size, *marginals = mutable_data<A>(log_marginals) + at;
      const auto run = [&](int64_t first, int64_t last) {
        multiversion<Forward<A>>(&batch, joint, marginals, first * draws, std::min(shape.size, last * draws));
      };
      const int64_t groups = (shape.size + draws - 1) / draws;
      if (shape.serial()) {
        run(0, groups);
      } else {
        torch::stable::parallel_for(0, groups, 1, run);
      }
      A* terms[3] = {mutable_data<A>(information) + e, mutable_data<A>(correlation) + e,
                     mutable_data<A>(divergence) + e};
      terms_of<A>(batch, joint, marginals, terms);
    }
    return {information, correlation, divergence, log_joint, log_marginals};
  });
}

// One batch's gradients: the pairs, then what a sample's own posterior and the prior add.
template <class T>
void batch_backward(const Batch<accumulate_t<T>>& batch, bool serial, const accumulate_t<T>* log_joint,
                    const accumulate_t<T>* log_marginals, const Coefficients<accumulate_t<T>>& factors, T* dz, T* dmean,
                    T* dlogvar) {
  using A = accumulate_t<T>;
  constexpr int64_t most = 16;  // parts: each has a sum for every draw
  const int64_t tiles = batch.row / column_pad<A>, latents = batch.latents;
  const int64_t parts = serial ? 1 : std::min<int64_t>({torch::stable::get_num_threads(), tiles, most});
  // The first part's sums may stand where the result will, if they are of one type.
  constexpr bool in_place = std::is_same_v<T, A>;
  const int64_t elements = batch.size * latents;
  Buffer<A> beside((parts - in_place) * elements), of_means(latents * batch.row), of_logvars(latents * batch.row);
  if constexpr (in_place) std::fill_n(dz, elements, A(0));
  const auto of_draws = [&](int64_t part) {
    if constexpr (in_place) {
      if (part == 0) return dz;
    }
    return beside.data() + (part - in_place) * elements;
  };
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      multiversion<Backward<A>>(&batch, log_joint, log_marginals, factors, of_draws(part), of_means.data(),
                                of_logvars.data(), part * tiles / parts * column_pad<A>,
                                (part + 1) * tiles / parts * column_pad<A>);
    }
  };
  if (parts == 1) {
    run(0, 1);
  } else {
    torch::stable::parallel_for(0, parts, 1, run);
  }
  for (int64_t i = 0; i < batch.size; ++i) {
    for (int64_t k = 0; k < latents; ++k) {
      const int64_t at = i * latents + k, by_dimension = k * batch.row + i;
      const A z = batch.z[at], d = z - batch.mean[by_dimension], u = d * batch.precision[by_dimension];
      A sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += of_draws(part)[at];
      store(dz, at, sum - factors.posterior * u - factors.prior * z);
      store(dmean, at, of_means[by_dimension] + factors.posterior * u);
      store(dlogvar, at, (of_logvars[by_dimension] + factors.posterior * (d * u - A(1))) / 2);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> total_correlation_backward(const Tensor& grad, const Tensor& z, const Tensor& mean,
                                                              const Tensor& logvar, const Tensor& log_joint,
                                                              const Tensor& log_marginals, int64_t dataset_size,
                                                              int64_t estimator) {
  check_same_dtype(mean, "mean", z.scalar_type());
  check_same_dtype(logvar, "logvar", z.scalar_type());
  const Shape shape(z);
  const Tensor g = make_contiguous(grad), from = make_contiguous(z), m = make_contiguous(mean);
  const Tensor v = make_contiguous(logvar), joint = make_contiguous(log_joint),
               marginals = make_contiguous(log_marginals);
  return dispatch_floating(z, "z", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    check_same_dtype(grad, "grad", scalar_type_of<A>());
    Tensor dz = empty(z, shape.all, z.scalar_type()), dmean = empty(z, shape.all, z.scalar_type());
    Tensor dlogvar = empty(z, shape.all, z.scalar_type());
    if (z.numel() == 0) return {dz, dmean, dlogvar};
    for (int64_t e = 0; e < shape.batches; ++e) {
      const int64_t at = e * shape.size * shape.latents;
      Batch<A> batch(shape.size, shape.latents, dataset_size, estimator);
      multiversion<Fill<T>>(&batch, data<T>(from) + at, data<T>(m) + at, data<T>(v) + at);
      const A share = A(1) / static_cast<A>(shape.size);
      const A information = data<A>(g)[e] * share, correlation = data<A>(g)[shape.batches + e] * share;
      const A divergence = data<A>(g)[2 * shape.batches + e] * share;
      const Coefficients<A> factors{correlation - information, divergence - correlation, information, -divergence};
      batch_backward<T>(batch, shape.serial(), data<A>(joint) + e * shape.size, data<A>(marginals) + at, factors,
                        mutable_data<T>(dz) + at, mutable_data<T>(dmean) + at, mutable_data<T>(dlogvar) + at);
    }
    return {dz, dmean, dlogvar};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("total_correlation_forward", TORCH_BOX(&fastdis::total_correlation_forward));
  m.impl("total_correlation_backward", TORCH_BOX(&fastdis::total_correlation_backward));
}
