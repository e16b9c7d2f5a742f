// prototype_distances on CUDA: |q - p|^2 as max(0, |q - c|^2 - 2 (q - c) . (p - c) + |p - c|^2), c the mean of the
// episode's prototypes. float32 products are float32 FMAs: no TF32.

#include "prototypes.cuh"

namespace fastdis::prototype_distances {

using namespace prototypes;

constexpr int kSmall = 32, kLarge = 64;  // tile sides

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) distances(Episodes<T> e, T* out) {
  using A = Accumulate<T>;
  using Products = Tile<T, kSize>;
  __shared__ typename Products::Shared shared;
  const int64_t column_tiles = ceil_div(e.num_prototypes, kSize), row_tiles = ceil_div(e.num_queries, kSize);
  const int first_n = static_cast<int>(blockIdx.x % column_tiles) * kSize;
  const int first_q = static_cast<int>(blockIdx.x / column_tiles % row_tiles) * kSize;
  const int num_queries = static_cast<int>(e.num_queries), num_prototypes = static_cast<int>(e.num_prototypes);
  const int64_t episode = blockIdx.x / column_tiles / row_tiles;
  A product[Products::kMicro][Products::kMicro];
  Products::multiply(shared, {e.queries_of(episode), first_q, num_queries},
                     {e.prototypes_of(episode), first_n, num_prototypes}, e.centre + episode * e.depth,
                     static_cast<int>(e.depth), e.aligned, product);
#pragma unroll
  for (int i = 0; i < Products::kMicro; ++i) {
#pragma unroll
    for (int j = 0; j < Products::kMicro; ++j) {
      const int row = threadIdx.x / kSide + kSide * i, column = threadIdx.x % kSide + kSide * j;
      const int q = first_q + row, n = first_n + column;
      if (q >= num_queries || n >= num_prototypes) continue;
      A value = shared.row_norm[row] - 2 * product[i][j] + shared.column_norm[column];
      if (value != value) {
        value = direct_distance(e.queries_of(episode) + q * e.depth, e.prototypes_of(episode) + n * e.depth, e.depth);
      }
      out[(episode * e.num_queries + q) * e.num_prototypes + n] = narrow<T>(value < 0 ? A(0) : value);
    }
  }
}

// The incoming gradient is the matrix of weights.
template <typename T>
struct GradientWeights {
  static constexpr bool kNeedsScores = false;
  const T* grad;  // [episodes, queries, prototypes]
  int64_t num_prototypes;

  __device__ __forceinline__ Accumulate<T> operator()(int64_t query, int64_t n, Accumulate<T>) const {
    return widen(grad[query * num_prototypes + n]);
  }
};

// `scratch` has centre_size(e) elements and starts on a 16-byte boundary.
template <typename T>
void forward(Episodes<T> e, T* out, Accumulate<T>* scratch, const Device& device, cudaStream_t stream) {
  e.centre = scratch;
  e.aligned = rows_aligned(e);
  launch_centre(e, scratch, stream);
  const auto blocks = [&](int size) {
    return e.episodes * ceil_div(e.num_queries, size) * ceil_div(e.num_prototypes, size);
  };
  // Large tiles do more arithmetic per byte of shared memory, if there are enough of them and they are not mostly
  // empty.
  if (e.num_prototypes > kSmall && blocks(kLarge) >= device.multiprocessors) {
    launch("prototype_distances", distances<T, kLarge>, blocks(kLarge), kThreads, 0, stream, e, out);
  } else {
    launch("prototype_distances", distances<T, kSmall>, blocks(kSmall), kThreads, 0, stream, e, out);
  }
}

}  // namespace fastdis::prototype_distances

#ifndef FASTDIS_HOST_EMULATION

#include <tuple>

namespace fastdis::prototype_distances {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor forward_cuda(const Tensor& queries_, const Tensor& prototypes_) {
  const DeviceGuard guard(queries_.get_device_index());
  const EpisodeTensors tensors("prototype_distances", queries_, prototypes_);
  const Tensor& queries = tensors.queries;
  const std::vector<int64_t> size{tensors.num_episodes(), tensors.num_queries(), tensors.num_prototypes()};
  if (queries.size(2) == 0) return torch::stable::new_zeros(queries, size);
  const Tensor out = torch::stable::new_empty(queries, size);
  if (out.numel() == 0) return out;
  dispatch("prototype_distances", queries.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Episodes<T> e = tensors.episodes<T>();
    forward<T>(e, output<T>(out), output<Accumulate<T>>(tensors.scratch(centre_size(e))),
               device_of(queries.get_device_index()), current_stream(queries));
  });
  return out;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_, const Tensor& queries_, const Tensor& prototypes_) {
  const DeviceGuard guard(queries_.get_device_index());
  const EpisodeTensors tensors("prototype_distances", queries_, prototypes_);
  const Tensor &queries = tensors.queries, &prototypes = tensors.prototypes;
  const Tensor grad = torch::stable::contiguous(grad_);
  STD_TORCH_CHECK(grad.numel() == tensors.num_episodes() * tensors.num_queries() * tensors.num_prototypes() &&
                      grad.scalar_type() == queries.scalar_type(),
                  "prototype_distances: grad must be [E, Q, N] in the dtype of the queries");
  if (grad.numel() == 0 || queries.size(2) == 0) {
    return {torch::stable::new_zeros(queries, queries.sizes()),
            torch::stable::new_zeros(prototypes, prototypes.sizes())};
  }
  const Tensor dqueries = torch::stable::new_empty(queries, queries.sizes());
  const Tensor dprototypes = torch::stable::new_empty(prototypes, prototypes.sizes());
  dispatch("prototype_distances", queries.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Device device = device_of(queries.get_device_index());
    const Episodes<T> e = tensors.episodes<T>();
    const Tensor scratch = tensors.scratch(backward_scratch(e, false, device));
    launch_gradients<T>(e, GradientWeights<T>{input<T>(grad), tensors.num_prototypes()}, output<T>(dqueries),
                        output<T>(dprototypes), output<Accumulate<T>>(scratch), device, current_stream(queries));
  });
  return {dqueries, dprototypes};
}

}  // namespace
}  // namespace fastdis::prototype_distances

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("prototype_distances_forward", TORCH_BOX(&fastdis::prototype_distances::forward_cuda));
  m.impl("prototype_distances_backward", TORCH_BOX(&fastdis::prototype_distances::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
