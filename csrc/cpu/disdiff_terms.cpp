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

  Terms(A a, A previous) {
    d = std::sqrt(1 - a);
    shift = -std::sqrt(a / previous) * (1 - previous) / d;
    inverse = 1 / std::sqrt(a);
    guidance = (1 - a) * inverse;
  }
};

// The schedule of a batch.
template <class A>
struct Schedule {
  const A *alpha_bar, *alpha_bar_prev;

  Terms<A> of(int64_t b) const { return {alpha_bar[b], alpha_bar_prev[b]}; }
};

template <class T>
struct TermsForward {
  // squares: of the selected field over the part.
  template <class Isa>
  static FASTDIS_INLINE void run(const T* x, const T* noise, const T* fields, const accumulate_t<T>* ones,
                                 Terms<accumulate_t<T>> t, T* shifted, T* x0, T* x0_selected, accumulate_t<T>* squares,
                                 int64_t selected, int64_t factors, int64_t size, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    A sums[field_stretch], total = 0;
    for (; first < last; first += field_stretch) {
      const int64_t count = std::min(field_stretch, last - first);
      sum_fields(fields, ones, factors, size, first, first + count,
                 [&](int64_t i, A sum) FASTDIS_INLINE_LAMBDA { sums[i - first] = sum; });
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
    A others[field_block], own[field_block];  // gradients of the fields that are not selected, and of the one that is
    T unwanted[field_block];                  // takes the gradients that are not asked for
    for (; first < last; first += field_block) {
      const int64_t count = std::min(field_block, last - first);
      const auto from = [&](const T* grad)
                            FASTDIS_INLINE_LAMBDA { return grad == nullptr ? zero_block<T> : grad + first; };
      const auto to = [&](T* grad) FASTDIS_INLINE_LAMBDA { return grad == nullptr ? unwanted : grad + first; };
      const T *of_shifted = from(grad_noise), *of_x0 = from(grad_x0), *of_selected = from(grad_selected);
      T *of_x = to(dx), *of_noise = to(dnoise);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A shifted = load(of_shifted, i), guided = load(of_selected, i);
        const A clean = (load(of_x0, i) + guided) * t.inverse;
        store(of_x, i, clean);
        store(of_noise, i, shifted - t.d * clean);
        others[i] = t.shift * shifted;
        own[i] = others[i] + t.guidance * guided;
      }
      for (int64_t n = 0; dfields != nullptr && n < factors; ++n) {
        const A* gradient = n == selected ? own : others;
        T* of_field = dfields + n * size + first;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(of_field, i, gradient[i]);
      }
    }
  }
};

void check_selected(const Tensor& selected, int64_t factors) {
  STD_TORCH_CHECK(selected.scalar_type() == ScalarType::Long, "selected has dtype ",
                  torch::headeronly::toString(selected.scalar_type()), "; int64 is needed");
  const int64_t* factor = data<int64_t>(selected);
  for (int64_t b = 0; b < selected.numel(); ++b) {
    const int64_t n = factor[b];
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
  const Tensor given = make_contiguous(x), predicted = make_contiguous(noise), f = make_contiguous(fields);
  const Tensor a = make_contiguous(alpha_bar), p = make_contiguous(alpha_bar_prev), c = make_contiguous(selected);
  check_selected(c, shape.factors);
  return dispatch_floating(x, "x", [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor shifted = empty_image(x), x0 = empty_image(x), x0_selected = empty_image(x);
    Tensor weight = empty(x, {shape.batch}, scalar_type_of<A>());
    // A part's sum of squares stands where its first block would: parts are summed in their order.
    const int64_t blocks = (shape.size + field_block - 1) / field_block;
    std::vector<A> squares(std::max<int64_t>(1, shape.batch * blocks), A(0));
    const FieldWeights<A> ones(std::nullopt, shape.factors);
    const Schedule<A> schedule{data<A>(a), data<A>(p)};
    const T *of_x = data<T>(given), *of_noise = data<T>(predicted), *of_fields = data<T>(f);
    const int64_t* factor = data<int64_t>(c);
    T *to_noise = mutable_data<T>(shifted), *to_clean = mutable_data<T>(x0), *to_own = mutable_data<T>(x0_selected);
    A* to_weight = mutable_data<A>(weight);
    for_each_part(shape, shape.factors + 5, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<TermsForward<T>>(of_x + at, of_noise + at, of_fields + at * shape.factors, ones.of(b),
                                    schedule.of(b), to_noise + at, to_clean + at, to_own + at,
                                    squares.data() + b * blocks + first / field_block, factor[b], shape.factors,
                                    shape.size, first, last);
    });
    for (int64_t b = 0; b < shape.batch; ++b) {
      A sum = 0;
      for (int64_t i = 0; i < blocks; ++i) sum += squares[b * blocks + i];
      const A guidance = schedule.of(b).guidance;
      to_weight[b] = guidance * guidance * (sum / static_cast<A>(shape.size));
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
    using A = accumulate_t<T>;
    const Schedule<A> schedule{data<A>(a), data<A>(p)};
    const T *of_shifted = data_or_null<T>(of_noise), *of_clean = data_or_null<T>(of_x0);
    const T* of_own = data_or_null<T>(of_selected);
    const int64_t* factor = data<int64_t>(c);
    T *to_x = data_if<T>(for_x, dx), *to_noise = data_if<T>(for_noise, dnoise);
    T* to_fields = data_if<T>(for_fields, dfields);
    for_each_part(shape, 5 + shape.factors, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<TermsBackward<T>>(from(of_shifted, at), from(of_clean, at), from(of_own, at), schedule.of(b),
                                     from(to_x, at), from(to_noise, at), from(to_fields, at * shape.factors), factor[b],
                                     shape.factors, shape.size, first, last);
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
