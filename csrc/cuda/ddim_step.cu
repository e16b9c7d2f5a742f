// ddim_step on CUDA. With S = sum_n w_n fields_n, a = alpha_bar, d = sqrt(1 - a), p = sqrt(alpha_bar_prev) and
// q = sqrt(max(0, 1 - alpha_bar_prev - sigma^2)):
//   e = noise - d S,  x0 = (x - d e) / sqrt(a),  x_prev = p x0 + q e + sigma eta.
// Backward, with G0 = grad_x0 + p grad_prev and Ge = q grad_prev - d / sqrt(a) G0:
//   dx = G0 / sqrt(a),  dnoise = Ge,  dS = -d Ge,  deta = sigma grad_prev.

#include "gradient_fields.cuh"

namespace fastdis::ddim_step {

using namespace gradient_fields;

template <typename A>
struct Coefficients {
  A d, reciprocal, p, q, sigma;  // reciprocal: 1 / sqrt(a)
};

template <typename A>
struct Schedule {
  const A *alpha_bar, *alpha_bar_prev, *sigma;  // [batch]

  __device__ Coefficients<A> operator()(int64_t sample) const {
    const A a = alpha_bar[sample], previous = alpha_bar_prev[sample], s = sigma[sample];
    const A rest = 1 - previous - s * s;
    return {square_root(1 - a), 1 / square_root(a), square_root(previous), square_root(rest < 0 ? A(0) : rest), s};
  }
};

template <typename T>
struct Forward {
  const T *x, *noise, *fields, *eta_noise;  // the last may be null
  Schedule<Accumulate<T>> schedule;
  Weights<Accumulate<T>> weights;
  T *x_prev, *x0;
};

// Gradients that are missing or not wanted are null.
template <typename T>
struct Backward {
  const T *grad_prev, *grad_x0;
  Schedule<Accumulate<T>> schedule;
  T *dx, *dnoise, *dtotal, *deta_noise;
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kMaxThreads) step(Forward<T> f, Shape shape, int64_t tiles) {
  using A = Accumulate<T>;
  __shared__ Coefficients<A> shared;
  const Place<kLanes> place(shape, tiles);
  if (threadIdx.x == 0) shared = f.schedule(place.sample);
  A total[kLanes] = {};
  if (place.inside()) add_fields<T>(f.fields, f.weights, shape, place, total, [](auto...) {});
  __syncthreads();
  if (!place.inside()) return;
  const Coefficients<A> c = shared;
  const auto x = load<kLanes>(f.x + place.offset()), noise = load<kLanes>(f.noise + place.offset());
  A x0[kLanes], x_prev[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    const A e = widen(noise.value[i]) - c.d * total[i];
    x0[i] = (widen(x.value[i]) - c.d * e) * c.reciprocal;
    x_prev[i] = c.p * x0[i] + c.q * e;
  }
  if (f.eta_noise != nullptr) {
    const auto eta = load<kLanes>(f.eta_noise + place.offset());
#pragma unroll
    for (int i = 0; i < kLanes; ++i) x_prev[i] += c.sigma * widen(eta.value[i]);
  }
  store<kLanes>(f.x_prev + place.offset(), [&](int i) { return x_prev[i]; });
  store<kLanes>(f.x0 + place.offset(), [&](int i) { return x0[i]; });
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kMaxThreads) gradients(Backward<T> f, Shape shape, int64_t tiles) {
  using A = Accumulate<T>;
  __shared__ Coefficients<A> shared;
  const Place<kLanes> place(shape, tiles);
  const int64_t offset = place.offset();
  if (threadIdx.x == 0) shared = f.schedule(place.sample);
  Pack<T, kLanes> prev{}, x0{};
  if (place.inside()) {
    if (f.grad_prev != nullptr) prev = load<kLanes>(f.grad_prev + offset);
    if (f.grad_x0 != nullptr) x0 = load<kLanes>(f.grad_x0 + offset);
  }
  __syncthreads();
  if (!place.inside()) return;
  const Coefficients<A> c = shared;
  A of_x0[kLanes], of_e[kLanes];
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    of_x0[i] = widen(x0.value[i]) + c.p * widen(prev.value[i]);
    of_e[i] = c.q * widen(prev.value[i]) - c.d * c.reciprocal * of_x0[i];
  }
  if (f.dx != nullptr) store<kLanes>(f.dx + offset, [&](int i) { return c.reciprocal * of_x0[i]; });
  if (f.dnoise != nullptr) store<kLanes>(f.dnoise + offset, [&](int i) { return of_e[i]; });
  if (f.dtotal != nullptr) store<kLanes>(f.dtotal + offset, [&](int i) { return -c.d * of_e[i]; });
  if (f.deta_noise != nullptr) {
    store<kLanes>(f.deta_noise + offset, [&](int i) { return c.sigma * widen(prev.value[i]); });
  }
}

template <typename T>
void forward(const Forward<T>& f, const Shape& shape, const Device& device, cudaStream_t stream) {
  const Plan plan = make_plan<T>(shape, 1, device, f.x, f.noise, f.fields, f.eta_noise, f.x_prev, f.x0);
  with_lanes<T>(plan, [&](auto lanes) {
    launch("ddim_step", step<T, decltype(lanes)::value>, shape.batch * plan.tiles, plan.threads, 0, stream, f, shape,
           plan.tiles);
  });
}

template <typename T>
void backward(const Backward<T>& f, const Shape& shape, const Device& device, cudaStream_t stream) {
  const Plan plan = make_plan<T>(shape, 1, device, f.grad_prev, f.grad_x0, f.dx, f.dnoise, f.dtotal, f.deta_noise);
  with_lanes<T>(plan, [&](auto lanes) {
    launch("ddim_step backward", gradients<T, decltype(lanes)::value>, shape.batch * plan.tiles, plan.threads, 0,
           stream, f, shape, plan.tiles);
  });
}

}  // namespace fastdis::ddim_step

#ifndef FASTDIS_HOST_EMULATION

#include <tuple>

namespace fastdis::ddim_step {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "ddim_step";

// The three numbers of each sample, checked and contiguous.
struct ScheduleTensors {
  Tensor alpha_bar, alpha_bar_prev, sigma;

  ScheduleTensors(const Tensor& alpha_bar_, const Tensor& alpha_bar_prev_, const Tensor& sigma_, const Tensor& like)
      : alpha_bar(checked_per_sample(kOp, "alpha_bar", alpha_bar_, like)),
        alpha_bar_prev(checked_per_sample(kOp, "alpha_bar_prev", alpha_bar_prev_, like)),
        sigma(checked_per_sample(kOp, "sigma", sigma_, like)) {}

  template <typename A>
  Schedule<A> schedule() const {
    return {input<A>(alpha_bar), input<A>(alpha_bar_prev), input<A>(sigma)};
  }
};

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& x_, const Tensor& noise_, const Tensor& fields_,
                                        const Tensor& alpha_bar, const Tensor& alpha_bar_prev, const Tensor& sigma,
                                        const std::optional<Tensor>& weights_,
                                        const std::optional<Tensor>& eta_noise_) {
  const DeviceGuard guard(x_.get_device_index());
  const Tensor x = torch::stable::contiguous(x_), noise = checked_like(kOp, "noise", noise_, x);
  const Tensor fields = checked_fields(kOp, fields_, x);
  const ScheduleTensors schedule(alpha_bar, alpha_bar_prev, sigma, x);
  const auto weights = checked_weights(kOp, weights_, x, fields.size(1));
  const auto eta_noise = checked_like(kOp, "eta_noise", eta_noise_, x);
  const Tensor x_prev = torch::stable::new_empty(x, x.sizes()), x0 = torch::stable::new_empty(x, x.sizes());
  dispatch(kOp, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    forward<T>({input<T>(x), input<T>(noise), input<T>(fields), input_or_null<T>(eta_noise), schedule.schedule<A>(),
                weights_of<A>(weights), output<T>(x_prev), output<T>(x0)},
               shape_of(x, fields.size(1)), device_of(x.get_device_index()), current_stream(x));
  });
  return {x_prev, x0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(const std::optional<Tensor>& grad_prev_,
                                                         const std::optional<Tensor>& grad_x0_, const Tensor& alpha_bar,
                                                         const Tensor& alpha_bar_prev, const Tensor& sigma, bool for_x,
                                                         bool for_noise, bool for_fields, bool for_eta_noise) {
  STD_TORCH_CHECK(grad_prev_ || grad_x0_, kOp, ": at least one gradient must be given");
  const Tensor& like = grad_prev_ ? *grad_prev_ : *grad_x0_;
  const DeviceGuard guard(like.get_device_index());
  const auto grad_prev = checked_like(kOp, "grad_prev", grad_prev_, like);
  const auto grad_x0 = checked_like(kOp, "grad_x0", grad_x0_, like);
  const ScheduleTensors schedule(alpha_bar, alpha_bar_prev, sigma, like);
  const Tensor dx = empty_or_none(like, for_x), dnoise = empty_or_none(like, for_noise);
  const Tensor dtotal = torch::stable::new_empty(like, for_fields ? fields_size(like, 1) : std::vector<int64_t>{0});
  const Tensor deta_noise = empty_or_none(like, for_eta_noise);
  dispatch(kOp, like.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    backward<T>({input_or_null<T>(grad_prev), input_or_null<T>(grad_x0), schedule.schedule<Accumulate<T>>(),
                 output_or_null<T>(dx, for_x), output_or_null<T>(dnoise, for_noise),
                 output_or_null<T>(dtotal, for_fields), output_or_null<T>(deta_noise, for_eta_noise)},
                shape_of(like, 0), device_of(like.get_device_index()), current_stream(like));
  });
  return {dx, dnoise, dtotal, deta_noise};
}

}  // namespace
}  // namespace fastdis::ddim_step

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("ddim_step_forward", TORCH_BOX(&fastdis::ddim_step::forward_cuda));
  m.impl("ddim_step_backward", TORCH_BOX(&fastdis::ddim_step::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
