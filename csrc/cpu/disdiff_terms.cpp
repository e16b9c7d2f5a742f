// The tail of a DisDiff training step on the CPU.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "gradient_fields.h"

namespace fastdis {
namespace {

// shifted = noise + shift sum, x0 = inverse (x - d noise), x0_selected = x0 + guidance field, weight = guidance^2 mean
// field^2.
template <class A>
struct Terms {
  A shift, d, inverse, guidance;

  Terms(const Tensor& alpha_bar, const Tensor& alpha_bar_prev, int64_t b) {
    const A a = data<A>(alpha_bar)[b], previous = data<A>(alpha_bar_prev)[b];
    d = std::sqrt(1 - a);
    shift = -std::sqrt(a / previous) * (1 - previous) / d;
    inverse = 1 / std::sqrt(a);
    guidance = (1 - a) * inverse;
  }
};

template <class T>
struct TermsForward {
  // squares: of the selected field over the part.
  template <class Isa>
  static FASTDIS_INLINE void run(const T* x, const T* noise, const T* fields, Terms<accumulate_t<T>> t, T* shifted,
                                 T* x0, T* x0_selected, accumulate_t<T>* squares, int64_t selected, int64_t factors,
                                 int64_t size, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    A sums[field_block], total = 0;
    for (; first < last; first += field_block) {
      const int64_t count = std::min(field_block, last - first);
      sum_fields(fields + first, static_cast<const A*>(nullptr), factors, size, count, sums);
      const T* field = fields + selected * size + first;  // still in cache
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) {
        const A from = load(noise + first, i), g = load(field, i);
        const A clean = (load(x + first, i) - t.d * from) * t.inverse;
        store(shifted + first, i, from + t.shift * sums[i]);
        store(x0 + first, i, clean);
        store(x0_selected + first, i, clean + t.guidance * g);
        sum += g * g;
      }
      total += sum;
    }
    *squares = total;
  }
};

template <class T>
struct TermsBackward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad_noise, const T* grad_x0, const T* grad_selected,
                                 Terms<accumulate_t<T>> t, T* dx, T* dnoise, T* dfields, int64_t selected,
                                 int64_t factors, int64_t size, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    A shifted[field_block], clean[field_block], own[field_block];
    for (; first < last; first += field_block) {
      const int64_t count = std::min(field_block, last - first);
      read(grad_noise, first, count, shifted);
      read(grad_x0, first, count, clean);
      read(grad_selected, first, count, own);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) clean[i] = (clean[i] + own[i]) * t.inverse;
      if (dx != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(dx + first, i, clean[i]);
      }
      if (dnoise != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(dnoise + first, i, shifted[i] - t.d * clean[i]);
      }
      if (dfields == nullptr) continue;
      for (int64_t n = 0; n < factors; ++n) {
        const A guidance = n == selected ? t.guidance : A(0);
        T* to = dfields + n * size + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(to, i, t.shift * shifted[i] + guidance * own[i]);
      }
    }
  }

  static FASTDIS_INLINE void read(const T* from, int64_t first, int64_t count, accumulate_t<T>* to) {
    if (from == nullptr) {
      std::fill_n(to, count, accumulate_t<T>(0));
      return;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = load(from + first, i);
  }
};

void check_selected(const Tensor& selected, int64_t factors) {
  STD_TORCH_CHECK(selected.scalar_type() == ScalarType::Long, "selected has dtype ",
                  torch::headeronly::toString(selected.scalar_type()), "; int64 is needed");
  for (int64_t b = 0; b < selected.numel(); ++b) {
    const int64_t n = data<int64_t>(selected)[b];
    STD_TORCH_CHECK(n >= 0 && n < factors, "selected[", b, "] is ", n, "; a factor from 0 to ", factors - 1,
                    " is needed");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> disdiff_terms_forward(const Tensor& x, const Tensor& noise,
                                                                 const Tensor& fields, const Tensor& selected,
                                                                 const Tensor& alpha_bar,
                                                                 const Tensor& alpha_bar_prev) {
  check_same_dtype(noise, "noise", x.scalar_type());
  check_same_dtype(fields, "fields", x.scalar_type());
  const FieldShape shape(x, fields.size(1));
  const Tensor from = make_contiguous(x), predicted = make_contiguous(noise), f = make_contiguous(fields);
  const Tensor a = make_contiguous(alpha_bar), p = make_contiguous(alpha_bar_prev), c = make_contiguous(selected);
  check_selected(c, shape.factors);
  return dispatch_floating(x, "x", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor shifted = empty_image(x), x0 = empty_image(x), x0_selected = empty_image(x);
    Tensor weight = empty(x, {shape.batch}, scalar_type_of<A>());
    // A part's sum of squares stands where its first block would: parts are summed in their order.
    const int64_t blocks = (shape.size + field_block - 1) / field_block;
    std::vector<A> squares(std::max<int64_t>(1, shape.batch * blocks), A(0));
    for_each_part(shape, shape.factors + 5, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<TermsForward<T>>(data<T>(from) + at, data<T>(predicted) + at, data<T>(f) + at * shape.factors,
                                    Terms<A>(a, p, b), mutable_data<T>(shifted) + at, mutable_data<T>(x0) + at,
                                    mutable_data<T>(x0_selected) + at,
                                    squares.data() + b * blocks + first / field_block, data<int64_t>(c)[b],
                                    shape.factors, shape.size, first, last);
    });
    for (int64_t b = 0; b < shape.batch; ++b) {
      A sum = 0;
      for (int64_t i = 0; i < blocks; ++i) sum += squares[b * blocks + i];
      const A guidance = Terms<A>(a, p, b).guidance;
      mutable_data<A>(weight)[b] = guidance * guidance * (sum / static_cast<A>(shape.size));
    }
    return {shifted, x0, x0_selected, weight};
  });
}

std::tuple<Tensor, Tensor, Tensor> disdiff_terms_backward(const std::optional<Tensor>& grad_noise,
                                                          const std::optional<Tensor>& grad_x0,
                                                          const std::optional<Tensor>& grad_selected,
                                                          const Tensor& selected, const Tensor& alpha_bar,
                                                          const Tensor& alpha_bar_prev, int64_t factors, bool for_x,
                                                          bool for_noise, bool for_fields) {
  STD_TORCH_CHECK(grad_noise || grad_x0 || grad_selected, "all three gradients are None; at least one is needed");
  const Tensor& grad = grad_noise ? *grad_noise : grad_x0 ? *grad_x0 : *grad_selected;
  const FieldShape shape(grad, grad_selected ? factors : 1);
  const std::optional<Tensor> of_noise = make_contiguous(grad_noise), of_x0 = make_contiguous(grad_x0),
                              of_selected = make_contiguous(grad_selected);
  const Tensor a = make_contiguous(alpha_bar), p = make_contiguous(alpha_bar_prev), c = make_contiguous(selected);
  return dispatch_floating(grad, "grad", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    Tensor dx = empty_image_if(for_x, grad), dnoise = empty_image_if(for_noise, grad);
    Tensor dfields = for_fields ? empty_fields(grad, shape.factors) : empty(grad, {0}, grad.scalar_type());
    for_each_part(shape, 5 + shape.factors, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<TermsBackward<T>>(data_from<T>(of_noise, at), data_from<T>(of_x0, at), data_from<T>(of_selected, at),
                                     Terms<accumulate_t<T>>(a, p, b), for_x ? mutable_data<T>(dx) + at : nullptr,
                                     for_noise ? mutable_data<T>(dnoise) + at : nullptr,
                                     for_fields ? mutable_data<T>(dfields) + at * shape.factors : nullptr,
                                     data<int64_t>(c)[b], shape.factors, shape.size, first, last);
    });
    return {dx, dnoise, dfields};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("disdiff_terms_forward", TORCH_BOX(&fastdis::disdiff_terms_forward));
  m.impl("disdiff_terms_backward", TORCH_BOX(&fastdis::disdiff_terms_backward));
}
