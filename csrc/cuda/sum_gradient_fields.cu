// sum_gradient_fields on CUDA: out = noise + c sum_n w_n fields_n, and with g the gradient of out
// dfields_n = c w_n g, products_n = sum_m g_m fields_nm.

#include "gradient_fields.cuh"

namespace fastdis::sum_gradient_fields {

using namespace gradient_fields;

template <typename T>
struct Forward {
  const T *noise, *fields;
  const Accumulate<T>* coefficient;
  Weights<Accumulate<T>> weights;
  T* out;
};

// products is null where the products are not wanted, and fields is unread then; dfields is null where the fields'
// gradient is not wanted. Without weights that gradient is the same for every field and is stored once.
template <typename T>
struct Backward {
  const T *grad, *fields;
  const Accumulate<T>* coefficient;
  Weights<Accumulate<T>> weights;
  T* dfields;
  Accumulate<T>* products;
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kMaxThreads) sum_fields(Forward<T> f, Shape shape, int64_t tiles) {
  using A = Accumulate<T>;
  const Place<kLanes> place(shape, tiles);
  if (!place.inside()) return;
  const auto noise = load<kLanes>(f.noise + place.offset());
  const A coefficient = f.coefficient[place.sample];
  A total[kLanes] = {};
  add_fields<T>(f.fields, f.weights, shape, place, total, [](auto...) {});
  store<kLanes>(f.out + place.offset(), [&](int i) { return widen(noise.value[i]) + coefficient * total[i]; });
}

// A thread keeps its part of the gradient while the fields pass.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kMaxThreads)
    gradients(Backward<T> f, Shape shape, int64_t tiles, Accumulate<T>* partial, int64_t parts) {
  using A = Accumulate<T>;
  const Place<kLanes, kBatch> place(shape, tiles);
  const A coefficient = f.coefficient[place.sample];
  Pack<T, kLanes> grad[kBatch];
#pragma unroll
  for (int u = 0; u < kBatch; ++u) {
    if (place.inside(u)) grad[u] = load<kLanes>(f.grad + place.offset(u));
  }
  const auto store_scaled = [&](A factor, int64_t factors, int64_t n) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (!place.inside(u)) continue;
      store<kLanes>(f.dfields + place.offset(factors, n, u), [&](int i) { return factor * widen(grad[u].value[i]); });
    }
  };
  const bool one_for_all = f.weights.data == nullptr;
  if (f.dfields != nullptr && one_for_all) store_scaled(coefficient, 1, 0);
  if (f.products == nullptr && (f.dfields == nullptr || one_for_all)) return;
  for (int64_t n = 0; n < shape.factors; ++n) {
    if (f.products != nullptr) {
      Pack<T, kLanes> field[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (place.inside(u)) field[u] = load<kLanes>(f.fields + place.offset(shape.factors, n, u));
      }
      A product = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!place.inside(u)) continue;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) product += widen(grad[u].value[i]) * widen(field[u].value[i]);
      }
      store_part(product, partial, place.sample * shape.factors + n, parts, place.tile);
    }
    if (f.dfields != nullptr && !one_for_all) {
      store_scaled(coefficient * f.weights(place.sample, n), shape.factors, n);
    }
  }
}

template <typename T>
void forward(const Forward<T>& f, const Shape& shape, const Device& device, cudaStream_t stream) {
  const Plan plan = make_plan<T>(shape, 1, device, f.noise, f.fields, f.out);
  with_lanes<T>(plan, [&](auto lanes) {
    launch("sum_gradient_fields", sum_fields<T, decltype(lanes)::value>, shape.batch * plan.tiles, plan.threads, 0,
           stream, f, shape, plan.tiles);
  });
}

template <typename T>
Plan plan_backward(const Backward<T>& f, const Shape& shape, const Device& device) {
  return make_plan<T>(shape, kBatch, device, f.grad, f.fields, f.dfields);
}

// Elements of the statistics dtype that `backward` needs as scratch memory.
template <typename T>
int64_t backward_scratch(const Backward<T>& f, const Shape& shape, const Plan& plan) {
  return f.products == nullptr ? 0 : shape.batch * shape.factors * plan.parts;
}

struct AsItIs {
  template <typename A>
  __device__ __forceinline__ A operator()(int64_t, A sum) const {
    return sum;
  }
};

template <typename T>
void backward(const Backward<T>& f, const Shape& shape, const Plan& plan, Accumulate<T>* scratch, cudaStream_t stream) {
  with_lanes<T>(plan, [&](auto lanes) {
    launch("sum_gradient_fields backward", gradients<T, decltype(lanes)::value>, shape.batch * plan.tiles, plan.threads,
           0, stream, f, shape, plan.tiles, scratch, plan.parts);
  });
  if (f.products != nullptr) {
    launch_sum_parts("sum_gradient_fields products", scratch, f.products, shape.batch * shape.factors, plan.parts,
                     AsItIs{}, stream);
  }
}

}  // namespace fastdis::sum_gradient_fields

#ifndef FASTDIS_HOST_EMULATION

#include <tuple>

namespace fastdis::sum_gradient_fields {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "sum_gradient_fields";

Tensor forward_cuda(const Tensor& noise_, const Tensor& fields_, const Tensor& coefficient_,
                    const std::optional<Tensor>& weights_) {
  const DeviceGuard guard(noise_.get_device_index());
  const Tensor noise = torch::stable::contiguous(noise_), fields = checked_fields(kOp, fields_, noise);
  const Tensor coefficient = checked_per_sample(kOp, "coefficient", coefficient_, noise);
  const auto weights = checked_weights(kOp, weights_, noise, fields.size(1));
  const Tensor out = torch::stable::new_empty(noise, noise.sizes());
  dispatch(kOp, noise.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    forward<T>({input<T>(noise), input<T>(fields), input<A>(coefficient), weights_of<A>(weights), output<T>(out)},
               shape_of(noise, fields.size(1)), device_of(noise.get_device_index()), current_stream(noise));
  });
  return out;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_, const std::optional<Tensor>& fields_,
                                         const Tensor& coefficient_, const std::optional<Tensor>& weights_,
                                         bool for_fields) {
  const DeviceGuard guard(grad_.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_);
  std::optional<Tensor> fields;
  if (fields_) fields = checked_fields(kOp, *fields_, grad);
  const int64_t factors = fields ? fields->size(1) : weights_ ? weights_->size(-1) : 1;
  const Tensor coefficient = checked_per_sample(kOp, "coefficient", coefficient_, grad);
  const auto weights = checked_weights(kOp, weights_, grad, factors);
  const Tensor dfields =
      torch::stable::new_empty(grad, for_fields ? fields_size(grad, weights ? factors : 1) : std::vector<int64_t>{0});
  const Tensor products =
      torch::stable::new_empty(grad, fields ? std::vector<int64_t>{grad.size(0), factors} : std::vector<int64_t>{0},
                               accumulate_dtype(grad.scalar_type()));
  dispatch(kOp, grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Shape shape = shape_of(grad, factors);
    const Backward<T> f{input<T>(grad),
                        input_or_null<T>(fields),
                        input<A>(coefficient),
                        weights_of<A>(weights),
                        output_or_null<T>(dfields, for_fields),
                        output_or_null<A>(products, fields.has_value())};
    const Plan plan = plan_backward(f, shape, device_of(grad.get_device_index()));
    const Tensor scratch = scratch_for(grad, backward_scratch(f, shape, plan));
    backward(f, shape, plan, output<A>(scratch), current_stream(grad));
  });
  return {dfields, products};
}

}  // namespace
}  // namespace fastdis::sum_gradient_fields

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("sum_gradient_fields_forward", TORCH_BOX(&fastdis::sum_gradient_fields::forward_cuda));
  m.impl("sum_gradient_fields_backward", TORCH_BOX(&fastdis::sum_gradient_fields::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
