// The divergence of diagonal Gaussians from the standard normal on the CPU.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../core/gemm.h"
#include "../core/tensor.h"

namespace fastdis {
namespace {

enum Reduction : int64_t { none, mean_of_all, sum_of_all };

// divergences[b] of samples first to last.
template <class T>
struct KlForward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* mean, const T* logvar, const accumulate_t<T>* weights,
                                 accumulate_t<T>* divergences, int64_t latents, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    for (int64_t b = first; b < last; ++b) {
      const T *m = mean + b * latents, *v = logvar + b * latents;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < latents; ++k) {
        const A mu = load(m, k), log_variance = load(v, k);
        sum += weights[k] * (mu * mu + (exponential(log_variance) - A(1) - log_variance));
      }
      divergences[b] = sum / 2;
    }
  }
};

// grads: one for every sample, `stride` apart. dweights, unless null: a part's sum over its samples.
template <class T>
struct KlBackward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grads, int64_t stride, accumulate_t<T> factor, const T* mean, const T* logvar,
                                 const accumulate_t<T>* weights, T* dmean, T* dlogvar, double* dweights,
                                 int64_t latents, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    for (int64_t b = first; b < last; ++b) {
      const A g = factor * load(grads, b * stride);
      const T *m = mean + b * latents, *v = logvar + b * latents;
      T *dm = dmean + b * latents, *dv = dlogvar + b * latents;
#pragma omp simd
      for (int64_t k = 0; k < latents; ++k) {
        const A w = g * weights[k];
        store(dm, k, w * load(m, k));
        store(dv, k, w * (exponential(A(load(v, k))) - A(1)) / 2);
      }
      if (dweights == nullptr) continue;
#pragma omp simd
      for (int64_t k = 0; k < latents; ++k) {
        const A mu = load(m, k), log_variance = load(v, k);
        dweights[k] += g * (mu * mu + (exponential(log_variance) - A(1) - log_variance)) / 2;
      }
    }
  }
};

// Samples in as many parts as there are threads, or one: run(part, first, last).
struct Parts {
  int64_t batch, count;

  explicit Parts(const Tensor& mean)
      : batch(mean.size(0)),
        count(mean.numel() < serial_elements ? 1 : std::min<int64_t>(batch, torch::stable::get_num_threads())) {}

  template <class Run>
  void for_each(const Run& run) const {
    if (count == 1) return run(0, 0, batch);
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(i, i * batch / count, (i + 1) * batch / count);
    });
  }
};

// The weights, or as many ones.
template <class A>
Buffer<A> weights_of(const std::optional<Tensor>& weights, int64_t latents) {
  Buffer<A> result(latents, A(1));
  if (weights) std::copy_n(data<A>(make_contiguous(*weights)), latents, result.begin());
  return result;
}

Tensor gaussian_kl_forward(const Tensor& mean, const Tensor& logvar, const std::optional<Tensor>& weights,
                           int64_t reduction) {
  check_same_dtype(logvar, "logvar", mean.scalar_type());
  const int64_t batch = mean.size(0), latents = mean.size(1);
  const Tensor m = make_contiguous(mean), v = make_contiguous(logvar);
  return dispatch_floating(mean, "mean", [&]<class T>() {
    using A = accumulate_t<T>;
    std::vector<A> divergences(batch);
    const Buffer<A> w = weights_of<A>(weights, latents);
    Parts(mean).for_each([&](int64_t, int64_t first, int64_t last) {
      multiversion<KlForward<T>>(data<T>(m), data<T>(v), w.data(), divergences.data(), latents, first, last);
    });
    if (reduction == none) {
      Tensor result = empty(mean, {batch}, mean.scalar_type());
      T* to = mutable_data<T>(result);
      for (int64_t b = 0; b < batch; ++b) store(to, b, divergences[b]);
      return result;
    }
    double sum = 0;
    for (const A divergence : divergences) sum += divergence;
    Tensor result = empty(mean, {}, mean.scalar_type());
    store(mutable_data<T>(result), 0,
          static_cast<A>(reduction == mean_of_all ? sum / static_cast<double>(batch) : sum));
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor> gaussian_kl_backward(const Tensor& grad, const Tensor& mean, const Tensor& logvar,
                                                        const std::optional<Tensor>& weights, int64_t reduction) {
  check_same_dtype(logvar, "logvar", mean.scalar_type());
  check_same_dtype(grad, "grad", mean.scalar_type());
  const int64_t batch = mean.size(0), latents = mean.size(1);
  const Tensor g = make_contiguous(grad), m = make_contiguous(mean), v = make_contiguous(logvar);
  return dispatch_floating(mean, "mean", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor dmean = empty(mean, {batch, latents}, mean.scalar_type());
    Tensor dlogvar = empty(mean, {batch, latents}, mean.scalar_type());
    Tensor dweights = empty(mean, {weights ? latents : 0}, scalar_type_of<A>());
    const Parts parts(mean);
    const Buffer<A> w = weights_of<A>(weights, latents);
    const int64_t row = padded(latents, column_pad<double>);
    Buffer<double> sums(weights ? parts.count * row : 0);
    const A factor = reduction == mean_of_all ? A(1) / static_cast<A>(batch) : A(1);
    parts.for_each([&](int64_t part, int64_t first, int64_t last) {
      multiversion<KlBackward<T>>(data<T>(g), static_cast<int64_t>(reduction == none), factor, data<T>(m), data<T>(v),
                                  w.data(), mutable_data<T>(dmean), mutable_data<T>(dlogvar),
                                  weights ? sums.data() + part * row : nullptr, latents, first, last);
    });
    A* to = mutable_data<A>(dweights);
    for (int64_t k = 0; weights && k < latents; ++k) {
      double sum = 0;
      for (int64_t part = 0; part < parts.count; ++part) sum += sums[part * row + k];
      to[k] = static_cast<A>(sum);
    }
    return {dmean, dlogvar, dweights};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("gaussian_kl_forward", TORCH_BOX(&fastdis::gaussian_kl_forward));
  m.impl("gaussian_kl_backward", TORCH_BOX(&fastdis::gaussian_kl_backward));
}
