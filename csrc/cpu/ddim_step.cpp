// A DDIM step under sub-gradient fields on the CPU.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "gradient_fields.h"

namespace fastdis {
namespace {

// With d = sqrt(1 - alpha_bar): e = noise - d sum, x0 = (x - d e) / sqrt(alpha_bar), x_prev = p x0 + q e + sigma eta.
template <class A>
struct Step {
  A d, inverse, p, q, sigma;

  Step(A a, A previous, A sigma_) : sigma(sigma_) {
    d = std::sqrt(1 - a);
    inverse = 1 / std::sqrt(a);
    p = std::sqrt(previous);
    const A left = 1 - previous - sigma * sigma;
    q = std::sqrt(left < 0 ? A(0) : left);
  }
};

// The schedule of a batch.
template <class A>
struct Schedule {
  const A *alpha_bar, *alpha_bar_prev, *sigma;

  Step<A> of(int64_t b) const { return {alpha_bar[b], alpha_bar_prev[b], sigma[b]}; }
};

template <class T>
struct StepForward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* x, const T* noise, const T* fields, const T* eta,
                                 const accumulate_t<T>* weights, Step<accumulate_t<T>> s, T* x_prev, T* x0,
                                 int64_t factors, int64_t size, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    // Writes the clean image; returns the step without fresh noise.
    const auto step = [&](int64_t i, A sum) FASTDIS_INLINE_LAMBDA {
      const A e = load(noise, i) - s.d * sum;
      const A clean = (load(x, i) - s.d * e) * s.inverse;
      store(x0, i, clean);
      return s.p * clean + s.q * e;
    };
    if (eta == nullptr) {
      sum_fields(fields, weights, factors, size, first, last,
                 [&](int64_t i, A sum) FASTDIS_INLINE_LAMBDA { store(x_prev, i, step(i, sum)); });
    } else {
      sum_fields(fields, weights, factors, size, first, last, [&](int64_t i, A sum) FASTDIS_INLINE_LAMBDA {
        store(x_prev, i, step(i, sum) + s.sigma * load(eta, i));
      });
    }
  }
};

// The gradients of x, noise, the sum of fields and eta are linear in the two incoming ones.
template <class T>
struct StepBackward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad_prev, const T* grad_x0, Step<accumulate_t<T>> s, T* dx, T* dnoise,
                                 T* dtotal, T* deta, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    T unwanted[field_block];  // takes the gradients that are not asked for
    for (; first < last; first += field_block) {
      const int64_t count = std::min(field_block, last - first);
      const auto from = [&](const T* grad)
                            FASTDIS_INLINE_LAMBDA { return grad == nullptr ? zero_block<T> : grad + first; };
      const auto to = [&](T* grad) FASTDIS_INLINE_LAMBDA { return grad == nullptr ? unwanted : grad + first; };
      const T *of_prev = from(grad_prev), *of_x0 = from(grad_x0);
      T *of_x = to(dx), *of_noise = to(dnoise), *of_total = to(dtotal), *of_eta = to(deta);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A before = load(of_prev, i), clean = (load(of_x0, i) + s.p * before) * s.inverse;
        const A e = s.q * before - s.d * clean;
        store(of_x, i, clean);
        store(of_noise, i, e);
        store(of_total, i, -s.d * e);
        store(of_eta, i, s.sigma * before);
      }
    }
  }
};

std::tuple<Tensor, Tensor> ddim_step_forward(const Tensor& x, const Tensor& noise, const Tensor& fields,
                                             const Tensor& alpha_bar, const Tensor& alpha_bar_prev, const Tensor& sigma,
                                             const std::optional<Tensor>& weights,
                                             const std::optional<Tensor>& eta_noise) {
  check_same_dtype(noise, "noise", x.scalar_type());
  check_same_dtype(fields, "fields", x.scalar_type());
  const FieldShape shape(x, fields.size(1));
  const Tensor given = make_contiguous(x), predicted = make_contiguous(noise), f = make_contiguous(fields);
  const Tensor a = make_contiguous(alpha_bar), p = make_contiguous(alpha_bar_prev), s = make_contiguous(sigma);
  const std::optional<Tensor> w = make_contiguous(weights), eta = make_contiguous(eta_noise);
  return dispatch_floating(x, "x", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor x_prev = empty_image(x), x0 = empty_image(x);
    const FieldWeights<A> each(w, shape.factors);
    const Schedule<A> schedule{data<A>(a), data<A>(p), data<A>(s)};
    const T *of_x = data<T>(given), *of_noise = data<T>(predicted), *of_fields = data<T>(f);
    const T* of_eta = data_or_null<T>(eta);
    T *to_prev = mutable_data<T>(x_prev), *to_clean = mutable_data<T>(x0);
    for_each_part(shape, shape.factors + 4, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<StepForward<T>>(of_x + at, of_noise + at, of_fields + at * shape.factors, from(of_eta, at),
                                   each.of(b), schedule.of(b), to_prev + at, to_clean + at, shape.factors, shape.size,
                                   first, last);
    });
    return {x_prev, x0};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ddim_step_backward(const std::optional<Tensor>& grad_prev,
                                                              const std::optional<Tensor>& grad_x0,
                                                              const Tensor& alpha_bar, const Tensor& alpha_bar_prev,
                                                              const Tensor& sigma, bool for_x, bool for_noise,
                                                              bool for_fields, bool for_eta_noise) {
  STD_TORCH_CHECK(grad_prev || grad_x0, "grad_prev and grad_x0 are both None; at least one is needed");
  const Tensor& grad = grad_prev ? *grad_prev : *grad_x0;
  const FieldShape shape(grad, 1);
  const std::optional<Tensor> before = make_contiguous(grad_prev), clean = make_contiguous(grad_x0);
  const Tensor a = make_contiguous(alpha_bar), p = make_contiguous(alpha_bar_prev), s = make_contiguous(sigma);
  return dispatch_floating(grad, "grad", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    Tensor dx = empty_image_if(for_x, grad), dnoise = empty_image_if(for_noise, grad);
    Tensor dtotal = for_fields ? empty_fields(grad, 1) : empty(grad, {0}, grad.scalar_type());
    Tensor deta = empty_image_if(for_eta_noise, grad);
    using A = accumulate_t<T>;
    const Schedule<A> schedule{data<A>(a), data<A>(p), data<A>(s)};
    const T *of_prev = data_or_null<T>(before), *of_x0 = data_or_null<T>(clean);
    T *to_x = data_if<T>(for_x, dx), *to_noise = data_if<T>(for_noise, dnoise);
    T *to_total = data_if<T>(for_fields, dtotal), *to_eta = data_if<T>(for_eta_noise, deta);
    for_each_part(shape, 4, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<StepBackward<T>>(from(of_prev, at), from(of_x0, at), schedule.of(b), from(to_x, at),
                                    from(to_noise, at), from(to_total, at), from(to_eta, at), first, last);
    });
    return {dx, dnoise, dtotal, deta};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("ddim_step_forward", TORCH_BOX(&fastdis::ddim_step_forward));
  m.impl("ddim_step_backward", TORCH_BOX(&fastdis::ddim_step_backward));
}
