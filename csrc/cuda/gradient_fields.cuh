// What sum_gradient_fields, ddim_step and disdiff_terms share. All are memory bound. A thread owns the same few
// elements of a sample in every tensor and walks over the sample's fields, so everything is read once; it loads several
// fields before it uses the first. Sums over a sample go by warps into scratch memory, which a second kernel adds up.

#pragma once

#include <optional>

#include "common.cuh"

namespace fastdis::gradient_fields {

constexpr int kMaxThreads = 256;
constexpr int kBatch = 4;  // packs a thread loads before it uses the first

// Fields are [batch, factors, length], everything else that is long [batch, length].
struct Shape {
  int64_t batch, factors, length;
};

// A block takes `threads * packs` packs of one sample, a sample takes `tiles` blocks.
struct Plan {
  bool aligned;  // packs are 16 bytes, else single elements
  int threads;
  int64_t tiles;
  int64_t parts;  // warps per sample
};

template <typename T, typename... Pointers>
Plan make_plan(const Shape& shape, int packs, const Device& device, const Pointers*... pointers) {
  Plan plan{};
  plan.aligned = shape.length % kPack<T> == 0 && aligned_to_packs(pointers...);
  const int64_t units = ceil_div(ceil_div(shape.length, plan.aligned ? kPack<T> : 1), packs);
  // Small blocks where samples are short, or where there would be too few blocks.
  const int64_t share = ceil_div(units * shape.batch, device.multiprocessors);
  plan.threads = power_of_two(least(units, share), kWarp, kMaxThreads);
  plan.tiles = ceil_div(units, plan.threads);
  plan.parts = plan.tiles * (plan.threads / kWarp);
  return plan;
}

// Calls function(lanes) with the number of elements in a pack as a constant.
template <typename T, typename Function>
void with_lanes(const Plan& plan, Function function) {
  if (plan.aligned) {
    function(std::integral_constant<int, kPack<T>>{});
  } else {
    function(std::integral_constant<int, 1>{});
  }
}

// The sample and the packs of the running thread.
template <int kLanes, int kPacks = 1>
struct Place {
  int64_t sample, tile, length;

  __device__ Place(const Shape& shape, int64_t tiles)
      : sample(blockIdx.x / tiles), tile(blockIdx.x % tiles), length(shape.length) {}

  // The first element of a pack.
  __device__ __forceinline__ int64_t element(int pack = 0) const {
    return ((tile * kPacks + pack) * blockDim.x + threadIdx.x) * kLanes;
  }
  // A pack is inside the sample or outside it, never both.
  __device__ __forceinline__ bool inside(int pack = 0) const { return element(pack) < length; }
  // Where a pack is in a tensor [batch, length].
  __device__ __forceinline__ int64_t offset(int pack = 0) const { return sample * length + element(pack); }
  // Where it is in field n of [batch, factors, length].
  __device__ __forceinline__ int64_t offset(int64_t factors, int64_t n, int pack) const {
    return (sample * factors + n) * length + element(pack);
  }
};

template <int kLanes, typename T>
__device__ __forceinline__ Pack<T, kLanes> load(const T* source) {
  return load_pack<kLanes>(source, 0, kLanes, true);
}

// Stores value(i) as element i.
template <int kLanes, typename T, typename Function>
__device__ __forceinline__ void store(T* target, Function value) {
  Pack<T, kLanes> pack;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) pack.value[i] = narrow<T>(value(i));
  store_global<kLanes>(target, pack, 0, kLanes, true);
}

// The weights of the fields: [factors] with stride 0, [batch, factors] with stride `factors`, or null for ones.
template <typename A>
struct Weights {
  const A* data;
  int64_t stride;

  __device__ __forceinline__ A operator()(int64_t sample, int64_t n) const {
    return data == nullptr ? A(1) : data[sample * stride + n];
  }
};

// total += sum_n weights_n fields_n; visit(n, pack) sees each field as it passes.
template <typename T, int kLanes, typename Visit>
__device__ __forceinline__ void add_fields(const T* fields, const Weights<Accumulate<T>>& weights, const Shape& shape,
                                           const Place<kLanes>& place, Accumulate<T> (&total)[kLanes], Visit visit) {
  const T* field = fields + place.offset(shape.factors, 0, 0);
  for (int64_t n = 0; n < shape.factors; n += kBatch) {
    Pack<T, kLanes> pack[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (n + u < shape.factors) pack[u] = load<kLanes>(field + (n + u) * shape.length);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (n + u >= shape.factors) continue;
      const Accumulate<T> weight = weights(place.sample, n + u);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) total[i] += weight * widen(pack[u].value[i]);
      visit(n + u, pack[u]);
    }
  }
}

// Adds up the value of every thread of a warp into that warp's place in row `row` of partial [rows, parts].
template <typename A>
__device__ __forceinline__ void store_part(A value, A* partial, int64_t row, int64_t parts, int64_t tile) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += shuffle_down(value, offset);
  if (lane == 0) partial[row * parts + tile * warps + threadIdx.x / kWarp] = value;
}

// out[row] = finish(row, the sum of partial[row, :]), with `team` threads per row.
template <typename A, typename Finish>
__global__ void __launch_bounds__(kMaxThreads)
    sum_parts(const A* partial, A* out, int64_t rows, int64_t parts, int team, Finish finish) {
  __shared__ A shared[kMaxThreads / kWarp];
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / team) + threadIdx.x / team;
  A sum = 0;
  for (int64_t i = threadIdx.x % team; row < rows && i < parts; i += team) sum += partial[row * parts + i];
  sum = team_reduce(sum, team, shared);
  if (row < rows && threadIdx.x % team == 0) out[row] = finish(row, sum);
}

template <typename A, typename Finish>
void launch_sum_parts(const char* name, const A* partial, A* out, int64_t rows, int64_t parts, const Finish& finish,
                      cudaStream_t stream) {
  const int team = power_of_two(parts, 1, kMaxThreads);
  launch(name, sum_parts<A, Finish>, ceil_div(rows, kMaxThreads / team), kMaxThreads, 0, stream, partial, out, rows,
         parts, team, finish);
}

#ifndef FASTDIS_HOST_EMULATION

// The shape of the op whose tensors [B, *] are like `like`.
inline Shape shape_of(const Tensor& like, int64_t factors) {
  int64_t length = 1;
  for (int64_t dim = 1; dim < like.dim(); ++dim) length *= like.size(dim);
  return {like.size(0), factors, length};
}

// [B, *] -> [B, factors, *]
inline std::vector<int64_t> fields_size(const Tensor& like, int64_t factors) {
  std::vector<int64_t> size{like.size(0), factors};
  for (int64_t dim = 1; dim < like.dim(); ++dim) size.push_back(like.size(dim));
  return size;
}

inline Tensor empty_or_none(const Tensor& like, bool wanted) {
  return wanted ? torch::stable::new_empty(like, like.sizes())
                : torch::stable::new_empty(like, std::vector<int64_t>{0});
}

inline Tensor scratch_for(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, std::vector<int64_t>{elements}, accumulate_dtype(like.scalar_type()));
}

// A contiguous tensor [B, *] like `like`.
inline Tensor checked_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(
      tensor.dim() == like.dim() && tensor.numel() == like.numel() && tensor.scalar_type() == like.scalar_type(), op,
      ": ", name, " must have one shape and dtype with the other tensors [B, *]");
  return torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> checked_like(const char* op, const char* name, const std::optional<Tensor>& tensor,
                                          const Tensor& like) {
  if (!tensor) return std::nullopt;
  return checked_like(op, name, *tensor, like);
}

// Fields, contiguous, [B, N, *] for `like` [B, *].
inline Tensor checked_fields(const char* op, const Tensor& fields, const Tensor& like) {
  STD_TORCH_CHECK(like.dim() >= 1 && fields.dim() == like.dim() + 1 && fields.size(0) == like.size(0) &&
                      fields.numel() == like.numel() * fields.size(1) && fields.scalar_type() == like.scalar_type(),
                  op, ": fields must be [B, N, *] in the dtype of the tensors [B, *]");
  return torch::stable::contiguous(fields);
}

// One number per sample in the statistics dtype.
inline Tensor checked_per_sample(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.numel() == like.size(0) && tensor.scalar_type() == accumulate_dtype(like.scalar_type()), op,
                  ": ", name, " must be [B] in the statistics dtype");
  return torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> checked_weights(const char* op, const std::optional<Tensor>& weights, const Tensor& like,
                                             int64_t factors) {
  if (!weights) return std::nullopt;
  STD_TORCH_CHECK((weights->dim() == 1 || (weights->dim() == 2 && weights->size(0) == like.size(0))) &&
                      weights->size(-1) == factors && weights->scalar_type() == accumulate_dtype(like.scalar_type()),
                  op, ": weights must be [N] or [B, N] in the statistics dtype");
  return torch::stable::contiguous(*weights);
}

template <typename A>
Weights<A> weights_of(const std::optional<Tensor>& weights) {
  if (!weights) return {nullptr, 0};
  return {input<A>(*weights), weights->dim() == 1 ? 0 : weights->size(1)};
}

template <typename T>
const T* input_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : nullptr;
}

template <typename T>
T* output_or_null(const Tensor& tensor, bool wanted) {
  return wanted && tensor.numel() > 0 ? output<T>(tensor) : nullptr;
}

#endif  // FASTDIS_HOST_EMULATION

}  // namespace fastdis::gradient_fields
