// noise + coefficient * sum_n weights_n fields_n on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gradient_fields.h"

namespace fastdis {
namespace {

template <class T>
struct SumForward {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* noise, const T* fields, accumulate_t<T> coefficient,
                                 const accumulate_t<T>* weights, T* to, int64_t factors, int64_t size, int64_t first,
                                 int64_t last) {
    sum_fields(fields, weights, factors, size, first, last, [&](int64_t i, accumulate_t<T> sum) FASTDIS_INLINE_LAMBDA {
      store(to, i, load(noise, i) + coefficient * sum);
    });
  }
};

// to = factor * grad
template <class T>
struct Scale {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad, accumulate_t<T> factor, T* to, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) store(to, i, factor * load(grad, i));
  }
};

// products[n] = grad . field_n: short sums in the accumulator's type, their sum in double precision.
template <class T>
struct Products {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* grad, const T* fields, double* products, int64_t factors, int64_t size) {
    constexpr int64_t shorter = 64;
    std::fill_n(products, factors, 0.0);
    for (int64_t first = 0; first < size; first += shorter) {
      const int64_t last = std::min(first + shorter, size);
      for (int64_t n = 0; n < factors; ++n) {
        const T* field = fields + n * size;
        accumulate_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < last; ++i) sum += load(grad, i) * load(field, i);
        products[n] += sum;
      }
    }
  }
};

Tensor sum_gradient_fields_forward(const Tensor& noise, const Tensor& fields, const Tensor& coefficient,
                                   const std::optional<Tensor>& weights) {
  check_same_dtype(fields, "fields", noise.scalar_type());
  const FieldShape shape(noise, fields.size(1));
  const Tensor from = make_contiguous(noise), f = make_contiguous(fields), c = make_contiguous(coefficient);
  const std::optional<Tensor> w = make_contiguous(weights);
  return dispatch_floating(noise, "noise", [&]<class T>() {
    using A = accumulate_t<T>;
    Tensor to = empty_image(noise);
    const FieldWeights<A> each(w, shape.factors);
    const T *of_noise = data<T>(from), *of_fields = data<T>(f);
    const A* factor = data<A>(c);
    T* target = mutable_data<T>(to);
    for_each_part(shape, shape.factors + 2, [&](int64_t b, int64_t first, int64_t last) {
      const int64_t at = b * shape.size;
      multiversion<SumForward<T>>(of_noise + at, of_fields + at * shape.factors, factor[b], each.of(b), target + at,
                                  shape.factors, shape.size, first, last);
    });
    return to;
  });
}

std::tuple<Tensor, Tensor> sum_gradient_fields_backward(const Tensor& grad, const std::optional<Tensor>& fields,
                                                        const Tensor& coefficient, const std::optional<Tensor>& weights,
                                                        bool for_fields) {
  const int64_t distinct = weights ? weights->size(weights->dim() - 1) : 1;
  const FieldShape shape(grad, fields ? fields->size(1) : distinct);
  const Tensor g = make_contiguous(grad), c = make_contiguous(coefficient);
  const std::optional<Tensor> f = make_contiguous(fields), w = make_contiguous(weights);
  return dispatch_floating(grad, "grad", [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = accumulate_t<T>;
    Tensor dfields = for_fields ? empty_fields(grad, distinct) : empty(grad, {0}, grad.scalar_type());
    Tensor products = f ? empty(grad, {shape.batch, shape.factors}, coefficient.scalar_type())
                        : empty(grad, {0}, coefficient.scalar_type());
    const FieldWeights<A> each(w, distinct);
    const T* from = data<T>(g);
    const A* factor = data<A>(c);
    if (for_fields) {
      T* to = mutable_data<T>(dfields);
      for_each_part(shape, 1 + distinct, [&](int64_t b, int64_t first, int64_t last) {
        for (int64_t n = 0; n < distinct; ++n) {
          multiversion<Scale<T>>(from + b * shape.size, factor[b] * each.of(b)[n], to + (b * distinct + n) * shape.size,
                                 first, last);
        }
      });
    }
    if (f) {
      const T* of_fields = data<T>(*f);
      A* to = mutable_data<A>(products);
      const auto run = [&](int64_t begin, int64_t end) {
        std::vector<double> sums(shape.factors);
        for (int64_t b = begin; b < end; ++b) {
          multiversion<Products<T>>(from + b * shape.size, of_fields + b * shape.factors * shape.size, sums.data(),
                                    shape.factors, shape.size);
          std::copy(sums.begin(), sums.end(), to + b * shape.factors);
        }
      };
      if (f->numel() < serial_elements) {
        run(0, shape.batch);
      } else {
        torch::stable::parallel_for(0, shape.batch, 1, run);
      }
    }
    return {dfields, products};
  });
}

}  // namespace
}  // namespace fastdis

STABLE_TORCH_LIBRARY_IMPL(fastdis, CPU, m) {
  m.impl("sum_gradient_fields_forward", TORCH_BOX(&fastdis::sum_gradient_fields_forward));
  m.impl("sum_gradient_fields_backward", TORCH_BOX(&fastdis::sum_gradient_fields_backward));
}
