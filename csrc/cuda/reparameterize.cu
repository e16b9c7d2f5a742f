// reparameterize on CUDA: mean + exp(logvar / 2) * noise, the noise recomputed in backward instead of being kept.
//
// A counter-based generator makes the noise a function of an element's place alone: a thread draws the four normals of
// one counter, so no state is stored and the numbers do not depend on how threads are dealt out.

#include "common.cuh"

namespace fastdis::reparameterize {

constexpr int kThreads = 256;
constexpr int kNormals = 4;  // of one counter

struct Words {
  uint32_t x[kNormals];
};

// Philox4x32-10 (Salmon et al., 2011).
__device__ __forceinline__ Words philox(uint64_t counter, uint64_t key) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// log((word + 1/2) / 2^32), never of zero. In float32 the upper half goes by the distance from one: rounding the
// quotient there would leave nothing of small radii.
__device__ __forceinline__ double log_uniform(uint32_t word, double) { return log((word + 0.5) * 0x1p-32); }
__device__ __forceinline__ float log_uniform(uint32_t word, float) {
  const bool upper = word >> 31;
  const float quotient = (static_cast<float>(upper ? ~word : word) + 0.5f) * 0x1p-32f;
  return upper ? log1pf(-quotient) : logf(quotient);
}

__device__ __forceinline__ void sine_cosine_of_pi(float x, float* sine, float* cosine) { sincospif(x, sine, cosine); }
__device__ __forceinline__ void sine_cosine_of_pi(double x, double* sine, double* cosine) { sincospi(x, sine, cosine); }

// Box and Muller on each pair of words. The angle 2 pi word / 2^32 is taken modulo 2 pi by reading the word as signed.
template <typename A>
__device__ __forceinline__ void normals(const Words& words, A (&noise)[kNormals]) {
#pragma unroll
  for (int i = 0; i < kNormals; i += 2) {
    const A radius = square_root(-2 * log_uniform(words.x[i], A{}));
    A sine, cosine;
    sine_cosine_of_pi(static_cast<A>(static_cast<int32_t>(words.x[i + 1])) * A(0x1p-31), &sine, &cosine);
    noise[i] = radius * cosine;
    noise[i + 1] = radius * sine;
  }
}

// `operand` is the mean in forward and the gradient in backward, `out` what it turns into: the draw, or dlogvar.
template <typename T>
struct Draw {
  const T *operand, *logvar;
  const int64_t* seed;
  T* out;
  int64_t run;    // elements per seed
  int64_t quads;  // counters per seed
  int64_t total;  // counters of all seeds
  bool aligned;   // every counter's elements start on a multiple of their size
};

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads) draw(Draw<T> d) {
  using A = Accumulate<T>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= d.total) return;
  const int64_t s = index / d.quads, counter = index % d.quads;
  const int64_t offset = s * d.run + counter * kNormals, last = d.run - counter * kNormals;
  const auto operand = load_pack<kNormals>(d.operand + offset, 0, last, d.aligned);
  const auto logvar = load_pack<kNormals>(d.logvar + offset, 0, last, d.aligned);
  A noise[kNormals];
  normals(philox(static_cast<uint64_t>(counter), static_cast<uint64_t>(d.seed[s])), noise);
  Pack<T, kNormals> out;
#pragma unroll
  for (int i = 0; i < kNormals; ++i) {
    const A x = widen(operand.value[i]), deviation = exponential(A(0.5) * widen(logvar.value[i]));
    out.value[i] = narrow<T>(kBackward ? x * noise[i] * deviation * A(0.5) : x + deviation * noise[i]);
  }
  store_global<kNormals>(d.out + offset, out, 0, last, d.aligned);
}

// Needs `seeds` > 0, a divisor of `size`.
template <typename T, bool kBackward>
void run(const T* operand, const T* logvar, const int64_t* seed, T* out, int64_t size, int64_t seeds,
         cudaStream_t stream) {
  const int64_t length = size / seeds, quads = ceil_div(length, kNormals);
  const bool aligned = (seeds == 1 || length % kNormals == 0) && aligned_to_packs(operand, logvar, out);
  launch("reparameterize", draw<T, kBackward>, ceil_div(seeds * quads, kThreads), kThreads, 0, stream,
         {operand, logvar, seed, out, length, quads, seeds * quads, aligned});
}

}  // namespace fastdis::reparameterize

#ifndef FASTDIS_HOST_EMULATION

namespace fastdis::reparameterize {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <bool kBackward>
Tensor run_cuda(const Tensor& operand_, const Tensor& logvar_, const Tensor& seed_) {
  const DeviceGuard guard(operand_.get_device_index());
  const Tensor operand = torch::stable::contiguous(operand_), logvar = torch::stable::contiguous(logvar_);
  const Tensor seed = torch::stable::contiguous(seed_);
  const int64_t size = operand.numel();
  STD_TORCH_CHECK(logvar.numel() == size && logvar.scalar_type() == operand.scalar_type(),
                  "reparameterize: logvar must be like the mean and the gradient");
  const Tensor out = torch::stable::new_empty(operand, operand.sizes());
  if (size == 0) return out;
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() > 0 && size % seed.numel() == 0,
                  "reparameterize: seed must be [S] int64, S a divisor of the number of elements");
  dispatch("reparameterize", operand.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    run<T, kBackward>(input<T>(operand), input<T>(logvar), input<int64_t>(seed), output<T>(out), size, seed.numel(),
                      current_stream(operand));
  });
  return out;
}

// Noise is never kept: to make it again takes a GPU less time than to read it.
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& mean, const Tensor& logvar, const Tensor& seed, bool) {
  const int64_t none = 0;
  return {run_cuda<false>(mean, logvar, seed),
          torch::stable::new_empty(mean, {&none, 1}, accumulate_dtype(mean.scalar_type()))};
}

Tensor backward_cuda(const Tensor& grad, const Tensor& logvar, const Tensor& seed, const Tensor&) {
  return run_cuda<true>(grad, logvar, seed);
}

}  // namespace
}  // namespace fastdis::reparameterize

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("reparameterize_forward", TORCH_BOX(&fastdis::reparameterize::forward_cuda));
  m.impl("reparameterize_backward", TORCH_BOX(&fastdis::reparameterize::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
