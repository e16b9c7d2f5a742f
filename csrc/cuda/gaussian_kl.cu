// gaussian_kl on CUDA: sum_k w_k (mean_k^2 + exp(logvar_k) - 1 - logvar_k) / 2, one read of mean and logvar in either
// pass.

#include "sums.cuh"

namespace fastdis::gaussian_kl {

using namespace sums;

enum Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

template <typename T>
struct Posterior {
  const T *mean, *logvar;        // [batch, latents]
  const Accumulate<T>* weights;  // [latents] or null
  int64_t batch, latents;
};

template <typename T>
struct Gradients {
  T *dmean, *dlogvar;
  Accumulate<T>* dweights;  // null where there are no weights
};

template <typename A>
__device__ __forceinline__ A divergence(A mean, A logvar) {
  return A(0.5) * (mean * mean + (exponential_less_one(logvar) - logvar));
}

// The sum of `N` neighbouring elements; those from `k` on belong to latents.
template <int N, typename T>
__device__ __forceinline__ Accumulate<T> pack_divergence(const Posterior<T>& p, int64_t sample, int64_t k) {
  using A = Accumulate<T>;
  const auto mean = load_pack<N>(p.mean + sample * p.latents + k, 0, N, true);
  const auto logvar = load_pack<N>(p.logvar + sample * p.latents + k, 0, N, true);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A value = divergence<A>(widen(mean.value[i]), widen(logvar.value[i]));
    sum += p.weights ? p.weights[k + i] * value : value;
  }
  return sum;
}

// out [batch]; `team` threads share a sample.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) per_sample(Posterior<T> p, T* out, int team) {
  using A = Accumulate<T>;
  __shared__ A shared[kThreads / kWarp];
  const int64_t sample = int64_t{blockIdx.x} * (kThreads / team) + threadIdx.x / team;
  A sum = 0;
  if (sample < p.batch) {
    for (int64_t k = threadIdx.x % team * N; k < p.latents; k += team * N) sum += pack_divergence<N>(p, sample, k);
  }
  sum = team_reduce(sum, team, shared);
  if (threadIdx.x % team == 0 && sample < p.batch) out[sample] = narrow<T>(sum);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) block_sums(Posterior<T> p, Columns c, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  __shared__ A shared[kThreads / kWarp];
  const Walk walk(c, blockIdx.x, N);
  A sum = 0;
  for (int64_t sample = walk.row; sample < walk.end; sample += walk.stride) {
    sum += pack_divergence<N>(p, sample, walk.column);
  }
  sum = team_reduce(sum, kThreads, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// dmean and dlogvar, and each block's part of dweights where `partial` is not null. grad is [batch], or one element for
// all samples.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    gradients(Posterior<T> p, const T* grad, int64_t grad_stride, Accumulate<T> divisor, Gradients<T> g, Columns c,
              Accumulate<T>* partial) {
  using A = Accumulate<T>;
  const Walk walk(c, blockIdx.x, N);
  A weight[N], sum[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) weight[i] = p.weights && walk.column < c.columns ? p.weights[walk.column + i] : A(1);
  for (int64_t sample = walk.row; sample < walk.end; sample += walk.stride) {
    const int64_t offset = sample * p.latents + walk.column;
    auto mean = load_pack<N>(p.mean + offset, 0, N, true);
    auto logvar = load_pack<N>(p.logvar + offset, 0, N, true);
    const A upstream = widen(grad[sample * grad_stride]) / divisor;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A m = widen(mean.value[i]), v = widen(logvar.value[i]), factor = upstream * weight[i];
      sum[i] += upstream * divergence(m, v);
      mean.value[i] = narrow<T>(factor * m);
      logvar.value[i] = narrow<T>(A(0.5) * factor * exponential_less_one(v));
    }
    store_global<N>(g.dmean + offset, mean, 0, N, true);
    store_global<N>(g.dlogvar + offset, logvar, 0, N, true);
  }
  if (partial != nullptr) store_column_sums(c, walk, sum, partial, c.columns);
}

// Calls function(std::integral_constant<int, N>{}) with the number of elements to move at once.
template <typename T, typename Function, typename... Pointers>
auto with_lanes(const Posterior<T>& p, Function function, const Pointers*... pointers) {
  if (p.latents % kPack<T> == 0 && aligned_to_packs(p.mean, p.logvar, pointers...)) {
    return function(std::integral_constant<int, kPack<T>>{});
  }
  return function(std::integral_constant<int, 1>{});
}

// Elements of the statistics dtype that forward needs, at most.
inline int64_t forward_scratch(int64_t latents, int reduction, const Device& device) {
  return reduction == kNone ? 0 : most_blocks(latents, device);
}

// out is [batch] or, where the reduction is not none, one element; batch and latents are not 0.
template <typename T>
void forward(const Posterior<T>& p, T* out, int reduction, Accumulate<T>* scratch, const Device& device,
             cudaStream_t stream) {
  using A = Accumulate<T>;
  with_lanes(p, [&](auto lanes) {
    constexpr int N = decltype(lanes)::value;
    if (reduction == kNone) {
      const int team = power_of_two(ceil_div(p.latents, N), 1, kThreads);
      launch("gaussian_kl per_sample", per_sample<T, N>, ceil_div(p.batch, kThreads / team), kThreads, 0, stream, p,
             out, team);
      return;
    }
    const Columns c = deal_columns(p.batch, p.latents, N, p.batch, device);
    launch("gaussian_kl block_sums", block_sums<T, N>, c.blocks(), kThreads, 0, stream, p, c, scratch);
    launch_merge<T>("gaussian_kl merge", scratch, out, 1, c.blocks(), 1, reduction == kMean ? A(p.batch) : A(1),
                    stream);
  });
}

inline int64_t backward_scratch(int64_t batch, int64_t latents, bool weighted) {
  return weighted ? least(batch, kMaxPieces) * latents : 0;
}

// Batch and latents are not 0; `scratch` has backward_scratch(...) elements.
template <typename T>
void backward(const Posterior<T>& p, const T* grad, int reduction, const Gradients<T>& g, Accumulate<T>* scratch,
              const Device& device, cudaStream_t stream) {
  using A = Accumulate<T>;
  const A divisor = reduction == kMean ? A(p.batch) : A(1);
  with_lanes(
      p,
      [&](auto lanes) {
        constexpr int N = decltype(lanes)::value;
        const Columns c = deal_columns(p.batch, p.latents, N, g.dweights ? kMaxPieces : p.batch, device);
        launch("gaussian_kl gradients", gradients<T, N>, c.blocks(), kThreads, 0, stream, p, grad,
               reduction == kNone ? 1 : 0, divisor, g, c, g.dweights ? scratch : nullptr);
        if (g.dweights) {
          launch_merge<A>("gaussian_kl merge", scratch, g.dweights, p.latents, 1, c.pieces, A(1), stream);
        }
      },
      g.dmean, g.dlogvar);
}

}  // namespace fastdis::gaussian_kl

#ifndef FASTDIS_HOST_EMULATION

#include <limits>
#include <optional>
#include <tuple>

namespace fastdis::gaussian_kl {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Mean, logvar and weights, checked and contiguous.
struct Inputs {
  Tensor mean, logvar;
  std::optional<Tensor> weights;

  Inputs(const Tensor& mean_, const Tensor& logvar_, const std::optional<Tensor>& weights_)
      : mean(torch::stable::contiguous(mean_)), logvar(torch::stable::contiguous(logvar_)) {
    STD_TORCH_CHECK(mean.dim() == 2 && logvar.dim() == 2 && mean.size(0) == logvar.size(0) &&
                        mean.size(1) == logvar.size(1) && mean.scalar_type() == logvar.scalar_type(),
                    "gaussian_kl: mean and logvar must be [B, K] of one dtype");
    if (weights_) {
      STD_TORCH_CHECK(
          weights_->numel() == mean.size(1) && weights_->scalar_type() == accumulate_dtype(mean.scalar_type()),
          "gaussian_kl: weights must be [K] in the statistics dtype");
      weights = torch::stable::contiguous(*weights_);
    }
  }

  template <typename T>
  Posterior<T> posterior() const {
    return {input<T>(mean), input<T>(logvar), weights ? input<Accumulate<T>>(*weights) : nullptr, mean.size(0),
            mean.size(1)};
  }

  Device device() const { return device_of(mean.get_device_index()); }
  Tensor scratch(int64_t elements) const {
    return torch::stable::new_empty(mean, std::vector<int64_t>{elements}, accumulate_dtype(mean.scalar_type()));
  }
};

Tensor forward_cuda(const Tensor& mean, const Tensor& logvar, const std::optional<Tensor>& weights, int64_t reduction) {
  const DeviceGuard guard(mean.get_device_index());
  const Inputs inputs(mean, logvar, weights);
  const int64_t batch = mean.size(0), latents = mean.size(1);
  const std::vector<int64_t> size = reduction == kNone ? std::vector<int64_t>{batch} : std::vector<int64_t>{};
  Tensor out = torch::stable::new_empty(inputs.mean, size);
  if (batch == 0 || latents == 0) {  // the mean over no samples is NaN
    torch::stable::fill_(out, reduction == kMean && batch == 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    return out;
  }
  dispatch("gaussian_kl", mean.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const int kind = static_cast<int>(reduction);
    const Device device = inputs.device();
    const Tensor scratch = inputs.scratch(forward_scratch(latents, kind, device));
    forward<T>(inputs.posterior<T>(), output<T>(out), kind, output<Accumulate<T>>(scratch), device,
               current_stream(mean));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_, const Tensor& mean, const Tensor& logvar,
                                                 const std::optional<Tensor>& weights, int64_t reduction) {
  const DeviceGuard guard(mean.get_device_index());
  const Inputs inputs(mean, logvar, weights);
  const int64_t batch = mean.size(0), latents = mean.size(1);
  const Tensor grad = torch::stable::contiguous(grad_);
  STD_TORCH_CHECK(grad.numel() == (reduction == kNone ? batch : 1) && grad.scalar_type() == mean.scalar_type(),
                  "gaussian_kl: grad must be like the divergence");
  const ScalarType statistics = accumulate_dtype(mean.scalar_type());
  const std::vector<int64_t> weights_size{weights ? latents : 0};
  const Tensor dmean = torch::stable::new_empty(inputs.mean, inputs.mean.sizes());
  const Tensor dlogvar = torch::stable::new_empty(inputs.mean, inputs.mean.sizes());
  if (dmean.numel() == 0) return {dmean, dlogvar, torch::stable::new_zeros(inputs.mean, weights_size, statistics)};
  const Tensor dweights = torch::stable::new_empty(inputs.mean, weights_size, statistics);
  dispatch("gaussian_kl", mean.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Device device = inputs.device();
    const Tensor scratch = inputs.scratch(backward_scratch(batch, latents, weights.has_value()));
    const Gradients<T> g{output<T>(dmean), output<T>(dlogvar), weights ? output<A>(dweights) : nullptr};
    backward<T>(inputs.posterior<T>(), input<T>(grad), static_cast<int>(reduction), g, output<A>(scratch), device,
                current_stream(mean));
  });
  return {dmean, dlogvar, dweights};
}

}  // namespace
}  // namespace fastdis::gaussian_kl

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("gaussian_kl_forward", TORCH_BOX(&fastdis::gaussian_kl::forward_cuda));
  m.impl("gaussian_kl_backward", TORCH_BOX(&fastdis::gaussian_kl::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
