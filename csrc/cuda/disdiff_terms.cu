// disdiff_terms on CUDA. With a = alpha_bar, p = alpha_bar_prev, k = -sqrt(a / p) (1 - p) / sqrt(1 - a), f the fields:
//   shifted = noise + k sum_n f_n,  x0 = (x - sqrt(1 - a) noise) / sqrt(a),  x0_selected = x0 + (1 - a) / sqrt(a) f_s,
//   weight = (1 - a)^2 / a mean_m f_sm^2.
// Backward: dx = (g0 + gs) / sqrt(a),  dnoise = gn - sqrt(1 - a) dx,  df_n = k gn + [n = s] (1 - a) / sqrt(a) gs.
// A sample whose s is not the index of a field gets NaN for x0_selected and weight.

#include "gradient_fields.cuh"

namespace fastdis::disdiff_terms {

using namespace gradient_fields;

template <typename A>
struct Coefficients {
  A shift, d, reciprocal, selected;  // k, sqrt(1 - a), 1 / sqrt(a), (1 - a) / sqrt(a)
};

template <typename A>
struct Schedule {
  const A *alpha_bar, *alpha_bar_prev;  // [batch]

  __device__ Coefficients<A> operator()(int64_t sample) const {
    const A a = alpha_bar[sample], previous = alpha_bar_prev[sample], d = square_root(1 - a);
    return {-square_root(a / previous) * (1 - previous) / d, d, 1 / square_root(a), (1 - a) / square_root(a)};
  }
};

template <typename T>
struct Forward {
  const T *x, *noise, *fields;
  const int64_t* selected;
  Schedule<Accumulate<T>> schedule;
  T *shifted, *x0, *x0_selected;
  Accumulate<T>* weight;
};

// Gradients that are missing or not wanted are null. dfields is the same for every field, and is stored once, where
// grad_selected is null.
template <typename T>
struct Backward {
  const T *grad_noise, *grad_x0, *grad_selected;
  const int64_t* selected;
  Schedule<Accumulate<T>> schedule;
  T *dx, *dnoise, *dfields;
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kMaxThreads)
    terms(Forward<T> f, Shape shape, int64_t tiles, Accumulate<T>* partial, int64_t parts) {
  using A = Accumulate<T>;
  __shared__ Coefficients<A> shared;
  const Place<kLanes> place(shape, tiles);
  const int64_t offset = place.offset(), selected = f.selected[place.sample];
  if (threadIdx.x == 0) shared = f.schedule(place.sample);
  A total[kLanes] = {}, squares = 0;
  Pack<T, kLanes> field;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) field.value[i] = narrow<T>(not_a_number<A>());
  if (place.inside()) {
    add_fields<T>(f.fields, {nullptr, 0}, shape, place, total, [&](int64_t n, const Pack<T, kLanes>& pack) {
      if (n == selected) field = pack;
    });
#pragma unroll
    for (int i = 0; i < kLanes; ++i) squares += widen(field.value[i]) * widen(field.value[i]);
  }
  store_part(squares, partial, place.sample, parts, place.tile);
  __syncthreads();
  if (!place.inside()) return;
  const Coefficients<A> c = shared;
  const auto x = load<kLanes>(f.x + offset), noise = load<kLanes>(f.noise + offset);
  const auto x0 = [&](int i) { return (widen(x.value[i]) - c.d * widen(noise.value[i])) * c.reciprocal; };
  store<kLanes>(f.shifted + offset, [&](int i) { return widen(noise.value[i]) + c.shift * total[i]; });
  store<kLanes>(f.x0 + offset, x0);
  store<kLanes>(f.x0_selected + offset, [&](int i) { return x0(i) + c.selected * widen(field.value[i]); });
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kMaxThreads) gradients(Backward<T> f, Shape shape, int64_t tiles) {
  using A = Accumulate<T>;
  __shared__ Coefficients<A> shared;
  const Place<kLanes> place(shape, tiles);
  const int64_t offset = place.offset();
  if (threadIdx.x == 0) shared = f.schedule(place.sample);
  Pack<T, kLanes> of_noise{}, of_x0{}, of_selected{};
  if (place.inside()) {
    if (f.grad_noise != nullptr) of_noise = load<kLanes>(f.grad_noise + offset);
    if (f.grad_x0 != nullptr) of_x0 = load<kLanes>(f.grad_x0 + offset);
    if (f.grad_selected != nullptr) of_selected = load<kLanes>(f.grad_selected + offset);
  }
  __syncthreads();
  if (!place.inside()) return;
  const Coefficients<A> c = shared;
  const auto dx = [&](int i) { return (widen(of_x0.value[i]) + widen(of_selected.value[i])) * c.reciprocal; };
  if (f.dx != nullptr) store<kLanes>(f.dx + offset, dx);
  if (f.dnoise != nullptr) {
    store<kLanes>(f.dnoise + offset, [&](int i) { return widen(of_noise.value[i]) - c.d * dx(i); });
  }
  if (f.dfields == nullptr) return;
  const auto of_each = [&](int i) { return c.shift * widen(of_noise.value[i]); };
  if (f.grad_selected == nullptr) {
    store<kLanes>(f.dfields + offset, of_each);
    return;
  }
  const int64_t selected = f.selected[place.sample];
  for (int64_t n = 0; n < shape.factors; ++n) {
    store<kLanes>(f.dfields + place.offset(shape.factors, n, 0), [&](int i) {
      return of_each(i) + (n == selected ? c.selected * widen(of_selected.value[i]) : A(0));
    });
  }
}

// (1 - a)^2 / a times the mean of the squares that `sum` adds up.
template <typename A>
struct Weight {
  const A* alpha_bar;
  int64_t length;

  __device__ __forceinline__ A operator()(int64_t sample, A sum) const {
    const A a = alpha_bar[sample];
    return (1 - a) * (1 - a) / a * (sum / A(length));
  }
};

template <typename T>
Plan plan_forward(const Forward<T>& f, const Shape& shape, const Device& device) {
  return make_plan<T>(shape, 1, device, f.x, f.noise, f.fields, f.shifted, f.x0, f.x0_selected);
}

// `scratch` has batch * plan.parts elements.
template <typename T>
void forward(const Forward<T>& f, const Shape& shape, const Plan& plan, Accumulate<T>* scratch, cudaStream_t stream) {
  with_lanes<T>(plan, [&](auto lanes) {
    launch("disdiff_terms", terms<T, decltype(lanes)::value>, shape.batch * plan.tiles, plan.threads, 0, stream, f,
           shape, plan.tiles, scratch, plan.parts);
  });
  launch_sum_parts("disdiff_terms weight", scratch, f.weight, shape.batch, plan.parts,
                   Weight<Accumulate<T>>{f.schedule.alpha_bar, shape.length}, stream);
}

template <typename T>
void backward(const Backward<T>& f, const Shape& shape, const Device& device, cudaStream_t stream) {
  const Plan plan = make_plan<T>(shape, 1, device, f.grad_noise, f.grad_x0, f.grad_selected, f.dx, f.dnoise, f.dfields);
  with_lanes<T>(plan, [&](auto lanes) {
    launch("disdiff_terms backward", gradients<T, decltype(lanes)::value>, shape.batch * plan.tiles, plan.threads, 0,
           stream, f, shape, plan.tiles);
  });
}

}  // namespace fastdis::disdiff_terms

#ifndef FASTDIS_HOST_EMULATION

#include <tuple>

namespace fastdis::disdiff_terms {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "disdiff_terms";

// What belongs to each sample, checked and contiguous.
struct SampleTensors {
  Tensor selected, alpha_bar, alpha_bar_prev;

  SampleTensors(const Tensor& selected_, const Tensor& alpha_bar_, const Tensor& alpha_bar_prev_, const Tensor& like)
      : selected(torch::stable::contiguous(selected_)),
        alpha_bar(checked_per_sample(kOp, "alpha_bar", alpha_bar_, like)),
        alpha_bar_prev(checked_per_sample(kOp, "alpha_bar_prev", alpha_bar_prev_, like)) {
    STD_TORCH_CHECK(selected.numel() == like.size(0) && selected.scalar_type() == ScalarType::Long, kOp,
                    ": selected must be [B] int64");
  }

  template <typename A>
  Schedule<A> schedule() const {
    return {input<A>(alpha_bar), input<A>(alpha_bar_prev)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& x_, const Tensor& noise_, const Tensor& fields_,
                                                        const Tensor& selected, const Tensor& alpha_bar,
                                                        const Tensor& alpha_bar_prev) {
  const DeviceGuard guard(x_.get_device_index());
  const Tensor x = torch::stable::contiguous(x_), noise = checked_like(kOp, "noise", noise_, x);
  const Tensor fields = checked_fields(kOp, fields_, x);
  const SampleTensors samples(selected, alpha_bar, alpha_bar_prev, x);
  const Tensor shifted = torch::stable::new_empty(x, x.sizes()), x0 = torch::stable::new_empty(x, x.sizes());
  const Tensor x0_selected = torch::stable::new_empty(x, x.sizes()), weight = scratch_for(x, x.size(0));
  dispatch(kOp, x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Shape shape = shape_of(x, fields.size(1));
    const Forward<T> f{input<T>(x),           input<T>(noise),    input<T>(fields), input<int64_t>(samples.selected),
                       samples.schedule<A>(), output<T>(shifted), output<T>(x0),    output<T>(x0_selected),
                       output<A>(weight)};
    const Plan plan = plan_forward(f, shape, device_of(x.get_device_index()));
    const Tensor scratch = scratch_for(x, shape.batch * plan.parts);
    forward(f, shape, plan, output<A>(scratch), current_stream(x));
  });
  return {shifted, x0, x0_selected, weight};
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const std::optional<Tensor>& grad_noise_,
                                                 const std::optional<Tensor>& grad_x0_,
                                                 const std::optional<Tensor>& grad_selected_, const Tensor& selected,
                                                 const Tensor& alpha_bar, const Tensor& alpha_bar_prev, int64_t factors,
                                                 bool for_x, bool for_noise, bool for_fields) {
  STD_TORCH_CHECK(grad_noise_ || grad_x0_ || grad_selected_, kOp, ": at least one gradient must be given");
  const Tensor& like = grad_noise_ ? *grad_noise_ : grad_x0_ ? *grad_x0_ : *grad_selected_;
  const DeviceGuard guard(like.get_device_index());
  const auto grad_noise = checked_like(kOp, "grad_noise", grad_noise_, like);
  const auto grad_x0 = checked_like(kOp, "grad_x0", grad_x0_, like);
  const auto grad_selected = checked_like(kOp, "grad_selected", grad_selected_, like);
  const SampleTensors samples(selected, alpha_bar, alpha_bar_prev, like);
  const Tensor dx = empty_or_none(like, for_x), dnoise = empty_or_none(like, for_noise);
  const Tensor dfields = torch::stable::new_empty(
      like, for_fields ? fields_size(like, grad_selected ? factors : 1) : std::vector<int64_t>{0});
  dispatch(kOp, like.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    backward<T>({input_or_null<T>(grad_noise), input_or_null<T>(grad_x0), input_or_null<T>(grad_selected),
                 input<int64_t>(samples.selected), samples.schedule<Accumulate<T>>(), output_or_null<T>(dx, for_x),
                 output_or_null<T>(dnoise, for_noise), output_or_null<T>(dfields, for_fields)},
                shape_of(like, factors), device_of(like.get_device_index()), current_stream(like));
  });
  return {dx, dnoise, dfields};
}

}  // namespace
}  // namespace fastdis::disdiff_terms

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("disdiff_terms_forward", TORCH_BOX(&fastdis::disdiff_terms::forward_cuda));
  m.impl("disdiff_terms_backward", TORCH_BOX(&fastdis::disdiff_terms::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
