// What the CUDA kernels share: element conversion, 16-byte packs, team reductions, launches and the torch plumbing.
//
// Kernels, and the host code that picks their launch parameters, include no torch header: tests/cuda_host compiles them
// with the system compiler and runs them on the CPU (FASTDIS_HOST_EMULATION), where cuda_on_host.h stands in for CUDA.

#pragma once

#ifdef FASTDIS_HOST_EMULATION
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#endif

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace fastdis {

// The dtype of statistics and sums: float64 for float64, else float32.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// The least power of two that is >= value, kept within [low, high] (powers of two themselves).
inline int power_of_two(int64_t value, int low, int high) {
  int power = low;
  while (power < value && power < high) power *= 2;
  return power;
}

// ------------------------------------------------------------------------------------------------ elements

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Accumulate<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
// e^x - 1 without the cancellation near 0
__device__ __forceinline__ float exponential_less_one(float x) { return expm1f(x); }
__device__ __forceinline__ double exponential_less_one(double x) { return expm1(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

template <typename A>
__device__ __forceinline__ A infinity() {
  return std::is_same_v<A, float> ? A(__builtin_huge_valf()) : A(__builtin_huge_val());
}
template <typename A>
__device__ __forceinline__ A not_a_number() {
  return std::is_same_v<A, float> ? A(__builtin_nanf("")) : A(__builtin_nan(""));
}

#ifndef FASTDIS_HOST_EMULATION

// The same pointer to global memory, of which the compiler no longer knows where it comes from.
template <typename T>
__device__ __forceinline__ T* opaque(T* pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

#endif

// `N` neighbouring elements, moved by one access where they are 16 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T value[N];
};

template <typename T>
inline constexpr int kPack = 16 / sizeof(T);

// Elements first <= i < last of the pack at `source`, zeros for the others, which are not touched.
template <int N, typename T, typename Index>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source, std::type_identity_t<Index> first, Index last,
                                                bool aligned) {
  if (aligned && first <= 0 && last >= N) return *reinterpret_cast<const Pack<T, N>*>(source);
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = i >= first && i < last ? source[i] : narrow<T>(0);
  return pack;
}

template <int N, typename T, typename Index>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, N>& pack, std::type_identity_t<Index> first,
                                           Index last, bool aligned) {
  if (aligned && first <= 0 && last >= N) {
    *reinterpret_cast<Pack<T, N>*>(target) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= first && i < last) target[i] = pack.value[i];
  }
}

// The same for packs in global memory. The opaque address keeps the compiler from moving it in a loop, whereupon it no
// longer sees the alignment and stores element by element.
template <int N, typename T, typename Index>
__device__ __forceinline__ void store_global(T* target, const Pack<T, N>& pack, std::type_identity_t<Index> first,
                                             Index last, bool aligned) {
  store_pack<N>(opaque(target), pack, first, last, aligned);
}

template <typename... Pointers>
bool aligned_to_packs(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// ---------------------------------------------------------------------------------------------- reductions

inline constexpr unsigned kFullWarp = 0xffffffffu;
inline constexpr int kWarp = 32;

__device__ __forceinline__ float shuffle_down(float x, int offset) { return __shfl_down_sync(kFullWarp, x, offset); }
__device__ __forceinline__ double shuffle_down(double x, int offset) { return __shfl_down_sync(kFullWarp, x, offset); }
__device__ __forceinline__ float combine(float a, float b) { return a + b; }
__device__ __forceinline__ double combine(double a, double b) { return a + b; }

// Combines the values of `team` consecutive threads (a power of two that divides the block) into the first of them.
// Every thread of the block calls it; `shared` holds one value per warp. Always in the same order, so deterministic.
template <typename Value>
__device__ Value team_reduce(Value value, int team, Value* shared) {
  for (int offset = (team < kWarp ? team : kWarp) / 2; offset > 0; offset /= 2) {
    value = combine(value, shuffle_down(value, offset));
  }
  if (team > kWarp) {
    const int warp = threadIdx.x / kWarp;
    __syncthreads();  // an earlier call may still be reading
    if (threadIdx.x % kWarp == 0) shared[warp] = value;
    __syncthreads();
    if (threadIdx.x % team == 0) {
      for (int other = 1; other < team / kWarp; ++other) value = combine(value, shared[warp + other]);
    }
  }
  return value;
}

// Combines the values of threads that agree in threadIdx.x % columns (a power of two <= 32) into threads 0..columns-1.
// Every thread of the block calls it; `shared` holds `columns` values per warp.
template <typename Value>
__device__ Value column_reduce(Value value, int columns, Value* shared) {
  for (int offset = kWarp / 2; offset >= columns; offset /= 2) value = combine(value, shuffle_down(value, offset));
  const int thread = threadIdx.x, warps = blockDim.x / kWarp;
  __syncthreads();  // an earlier call may still be reading
  if (thread % kWarp < columns) shared[thread / kWarp * columns + thread % kWarp] = value;
  __syncthreads();
  if (thread < columns) {
    for (int warp = 1; warp < warps; ++warp) value = combine(value, shared[warp * columns + thread]);
  }
  return value;
}

// ------------------------------------------------------------------------------------------------ launches

struct Device {
  int multiprocessors;
  int64_t shared;  // bytes a block may use so that two blocks share a multiprocessor
};

#ifndef FASTDIS_HOST_EMULATION

// The dynamic shared memory of the running block.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("fastdis: ") + what + ": " + cudaGetErrorString(status));
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline Device device_of(int device) {
  const int per_multiprocessor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  const int per_block = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // A block's static arrays and the 1 KiB that the system keeps per block come out of the same memory.
  constexpr int kReserved = 8 * 1024;
  return {device_attribute(cudaDevAttrMultiProcessorCount, device),
          least(per_multiprocessor / 2, per_block) - kReserved};
}

// Runs `kernel` on the current stream in a one-dimensional grid; no blocks, no launch.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
            cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("fastdis: ") + name + ": the input has too many rows");
  constexpr int64_t kDefaultShared = 48 * 1024;
  if (shared > kDefaultShared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

// ------------------------------------------------------------------------------------------------ plumbing

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls function(T{}) with the element type of `dtype`.
template <typename Function>
void dispatch(const char* op, ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(__half{});
    case ScalarType::BFloat16:
      return function(__nv_bfloat16{});
    default:
      throw std::runtime_error(std::string("fastdis: ") + op + ": expected float32, float64, float16 or bfloat16");
  }
}

template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

#endif  // FASTDIS_HOST_EMULATION

// ---------------------------------------------------------------------------------------------- split sums

inline constexpr int kSumThreads = 256;

// out[i] = the sum of partial[split][i], always in the same order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_splits(const Accumulate<T>* partial, T* out, int64_t splits, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= size) return;
  Accumulate<T> sum = 0;
#pragma unroll 4
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * size + i];
  out[i] = narrow<T>(sum);
}

template <typename T>
void launch_sum_splits(const char* name, const Accumulate<T>* partial, T* out, int64_t splits, int64_t size,
                       cudaStream_t stream) {
  launch(name, sum_splits<T>, ceil_div(size, kSumThreads), kSumThreads, 0, stream, partial, out, splits, size);
}

}  // namespace fastdis
