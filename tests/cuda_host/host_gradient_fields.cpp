#include "host_library.h"

#include "ddim_step.cu"
#include "disdiff_terms.cu"
#include "sum_gradient_fields.cu"

namespace {

// Pointers of ctypes, as what the kernels take.
struct In {
  const void* data;
  template <typename T>
  operator const T*() const {
    return static_cast<const T*>(data);
  }
};
struct Out {
  void* data;
  template <typename T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

}  // namespace

extern "C" {

const char* sum_gradient_fields_forward(int dtype, In noise, In fields, In coefficient, In weights, Out out,
                                        int64_t weights_stride, int64_t batch, int64_t factors, int64_t length,
                                        int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::sum_gradient_fields;
      using T = decltype(tag);
      forward<T>({noise, fields, coefficient, {weights, weights_stride}, out}, {batch, factors, length},
                 Device{multiprocessors, 0}, nullptr);
    });
  });
}

const char* sum_gradient_fields_backward(int dtype, In grad, In fields, In coefficient, In weights, Out dfields,
                                         Out products, int64_t weights_stride, int64_t batch, int64_t factors,
                                         int64_t length, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::sum_gradient_fields;
      using T = decltype(tag);
      const fastdis::gradient_fields::Shape shape{batch, factors, length};
      const Backward<T> f{grad, fields, coefficient, {weights, weights_stride}, dfields, products};
      const auto plan = plan_backward(f, shape, Device{multiprocessors, 0});
      with_scratch<Accumulate<T>>(backward_scratch(f, shape, plan),
                                  [&](auto* scratch) { backward(f, shape, plan, scratch, nullptr); });
    });
  });
}

const char* ddim_step_forward(int dtype, In x, In noise, In fields, In eta_noise, In alpha_bar, In alpha_bar_prev,
                              In sigma, In weights, Out x_prev, Out x0, int64_t weights_stride, int64_t batch,
                              int64_t factors, int64_t length, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::ddim_step;
      using T = decltype(tag);
      forward<T>(
          {x, noise, fields, eta_noise, {alpha_bar, alpha_bar_prev, sigma}, {weights, weights_stride}, x_prev, x0},
          {batch, factors, length}, Device{multiprocessors, 0}, nullptr);
    });
  });
}

const char* ddim_step_backward(int dtype, In grad_prev, In grad_x0, In alpha_bar, In alpha_bar_prev, In sigma, Out dx,
                               Out dnoise, Out dtotal, Out deta_noise, int64_t batch, int64_t length,
                               int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::ddim_step;
      using T = decltype(tag);
      fastdis::ddim_step::backward<T>(
          {grad_prev, grad_x0, {alpha_bar, alpha_bar_prev, sigma}, dx, dnoise, dtotal, deta_noise}, {batch, 0, length},
          Device{multiprocessors, 0}, nullptr);
    });
  });
}

const char* disdiff_terms_forward(int dtype, In x, In noise, In fields, In selected, In alpha_bar, In alpha_bar_prev,
                                  Out shifted, Out x0, Out x0_selected, Out weight, int64_t batch, int64_t factors,
                                  int64_t length, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::disdiff_terms;
      using T = decltype(tag);
      const fastdis::gradient_fields::Shape shape{batch, factors, length};
      const Forward<T> f{x, noise, fields, selected, {alpha_bar, alpha_bar_prev}, shifted, x0, x0_selected, weight};
      const auto plan = plan_forward(f, shape, Device{multiprocessors, 0});
      with_scratch<Accumulate<T>>(batch * plan.parts,
                                  [&](auto* scratch) { forward(f, shape, plan, scratch, nullptr); });
    });
  });
}

const char* disdiff_terms_backward(int dtype, In grad_noise, In grad_x0, In grad_selected, In selected, In alpha_bar,
                                   In alpha_bar_prev, Out dx, Out dnoise, Out dfields, int64_t batch, int64_t factors,
                                   int64_t length, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::disdiff_terms;
      using T = decltype(tag);
      fastdis::disdiff_terms::backward<T>(
          {grad_noise, grad_x0, grad_selected, selected, {alpha_bar, alpha_bar_prev}, dx, dnoise, dfields},
          {batch, factors, length}, Device{multiprocessors, 0}, nullptr);
    });
  });
}

}  // extern "C"
