// tangent_activation on CUDA: phi(a + bias) for primal rows and phi'(a + bias) t for their K tangents.
//
// Memory bound. A thread owns a pack of neighbouring columns (c, s) of a sample, keeps phi' (and phi'') of its primal
// in registers and walks over the tangents, each of which is read once and written once. Where all samples share their
// tangents, their gradient is a sum over the batch, made by a second kernel.

#include "sums.cuh"

namespace fastdis::tangent_activation {

using namespace sums;

enum Activation : int {
  kNone = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kElu = 3,
  kSilu = 4,
  kGelu = 5,
  kGeluTanh = 6,
  kTanh = 7,
  kSigmoid = 8,
  kSoftplus = 9
};

// Up to here phi is linear on either side of 0, and the sign of phi(a), which is that of a, gives phi'.
constexpr int kLastPiecewiseLinear = kLeakyRelu;

constexpr int kBatch = 4;  // tangents a thread loads before it uses the first

struct Shape {
  int64_t batch, channels, spatial, tangents;
  bool shared;  // all samples have the same tangents

  __host__ __device__ int64_t columns() const { return channels * spatial; }
};

template <typename T>
struct Forward {
  const T* primal;    // [batch, channels, spatial]
  const T* tangents;  // [tangents, batch, channels, spatial], or without the batch where they are shared
  const T* bias;      // [channels] or null
  T* out;             // [1 + tangents, batch, channels, spatial]
  int activation;
  Accumulate<T> parameter;
};

template <typename T>
struct Backward {
  const T* grad_primal;    // [batch, channels, spatial] or null
  const T* grad_tangents;  // [tangents, batch, channels, spatial] or null
  const T* saved;          // the primal: phi(a + bias) where phi is piecewise linear, else a
  const T *tangents, *bias;
  T* dprimal;
  T* dtangents;    // like grad_tangents where the tangents are not shared
  T* ddirections;  // [tangents, channels, spatial] where they are
  T* dbias;        // null where there is no bias
  int activation;
  Accumulate<T> parameter;
};

// ------------------------------------------------------------------------------------------ device functions

__device__ __forceinline__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ __forceinline__ double hyperbolic_tangent(double x) { return tanh(x); }
__device__ __forceinline__ float error_function(float x) { return erff(x); }
__device__ __forceinline__ double error_function(double x) { return erf(x); }
__device__ __forceinline__ float logarithm_of_one_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double logarithm_of_one_plus(double x) { return log1p(x); }

// phi, phi' and phi'' at one point.
template <typename A>
struct Expansion {
  A value, slope, curvature;
};

// The comparisons treat 0 and NaN as torch's do.
template <int kActivation, typename A>
__device__ __forceinline__ Expansion<A> expand(A a, A parameter) {
  if constexpr (kActivation == kRelu) {
    return {a <= 0 ? A(0) : a, a <= 0 ? A(0) : A(1), 0};
  } else if constexpr (kActivation == kLeakyRelu) {
    const A slope = a > 0 ? A(1) : parameter;
    return {a * slope, slope, 0};
  } else if constexpr (kActivation == kElu) {
    const A slope = parameter * exponential(a);
    return {a <= 0 ? parameter * exponential_less_one(a) : a, a > 0 ? A(1) : slope, a < 0 ? slope : A(0)};
  } else if constexpr (kActivation == kSilu) {
    const A s = 1 / (1 + exponential(-a)), rest = 1 - s;
    return {a * s, s * (1 + a * rest), s * rest * (2 + a * (1 - 2 * s))};
  } else if constexpr (kActivation == kGelu) {
    const A density = A(0.39894228040143267794) * exponential(A(-0.5) * a * a);
    const A cumulative = A(0.5) * (1 + error_function(a * A(0.70710678118654752440)));
    return {a * cumulative, cumulative + a * density, density * (2 - a * a)};
  } else if constexpr (kActivation == kGeluTanh) {
    constexpr A kScale = A(0.79788456080286535588), kCubic = A(0.044715);
    const A square = a * a, t = hyperbolic_tangent(kScale * (a + kCubic * a * square));
    const A inner_slope = kScale * (1 + 3 * kCubic * square), outer_slope = (1 - t) * (1 + t);
    const A slope = outer_slope * inner_slope;
    return {A(0.5) * a * (1 + t), A(0.5) * (1 + t + a * slope),
            slope * (1 - a * t * inner_slope) + outer_slope * (3 * kScale * kCubic) * square};
  } else if constexpr (kActivation == kTanh) {
    const A t = hyperbolic_tangent(a), slope = (1 - t) * (1 + t);
    return {t, slope, -2 * t * slope};
  } else if constexpr (kActivation == kSigmoid) {
    const A s = 1 / (1 + exponential(-a)), slope = s * (1 - s);
    return {s, slope, slope * (1 - 2 * s)};
  } else if constexpr (kActivation == kSoftplus) {
    const A scaled = a * parameter, power = exponential(scaled), s = power / (1 + power);
    const bool linear = scaled > 20;
    return {linear ? a : logarithm_of_one_plus(power) / parameter, linear ? A(1) : s,
            linear ? A(0) : parameter * s / (1 + power)};
  } else {
    return {a, 1, 0};
  }
}

// Expands at each of N points. What a caller does not use of the results is not computed.
template <int N, typename A>
__device__ __forceinline__ void expand(int activation, A parameter, const A (&a)[N], Expansion<A> (&phi)[N]) {
  const auto all = [&](auto kind) {
#pragma unroll
    for (int i = 0; i < N; ++i) phi[i] = expand<decltype(kind)::value>(a[i], parameter);
  };
  switch (activation) {
    case kRelu:
      return all(std::integral_constant<int, kRelu>{});
    case kLeakyRelu:
      return all(std::integral_constant<int, kLeakyRelu>{});
    case kElu:
      return all(std::integral_constant<int, kElu>{});
    case kSilu:
      return all(std::integral_constant<int, kSilu>{});
    case kGelu:
      return all(std::integral_constant<int, kGelu>{});
    case kGeluTanh:
      return all(std::integral_constant<int, kGeluTanh>{});
    case kTanh:
      return all(std::integral_constant<int, kTanh>{});
    case kSigmoid:
      return all(std::integral_constant<int, kSigmoid>{});
    case kSoftplus:
      return all(std::integral_constant<int, kSoftplus>{});
    default:
      return all(std::integral_constant<int, kNone>{});
  }
}

// The bias of N columns from `column` on.
template <int N, typename T>
__device__ __forceinline__ void load_bias(const T* bias, const Shape& shape, int64_t column, Accumulate<T> (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    out[i] = bias != nullptr && column + i < shape.columns() ? widen(bias[(column + i) / shape.spatial]) : 0;
  }
}

template <int N, typename T>
__device__ __forceinline__ void add_bias(const Pack<T, N>& pack, const Accumulate<T> (&bias)[N],
                                         Accumulate<T> (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] = widen(pack.value[i]) + bias[i];
}

// ---------------------------------------------------------------------------------------------- kernels

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(Forward<T> f, Shape shape, Columns c, bool aligned) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const Walk walk(c, blockIdx.x, N);
  const int64_t last = c.columns - walk.column, rows = c.rows * c.columns;
  const int64_t stride = shape.shared ? c.columns : rows;  // from one tangent to the next
  A bias[N];
  load_bias(f.bias, shape, walk.column, bias);
  for (int64_t b = walk.row; b < walk.end; b += walk.stride) {
    const int64_t offset = b * c.columns + walk.column;
    auto pack = load_pack<N>(f.primal + offset, 0, last, aligned);
    A a[N];
    Expansion<A> phi[N];
    add_bias(pack, bias, a);
    expand(f.activation, f.parameter, a, phi);
#pragma unroll
    for (int i = 0; i < N; ++i) pack.value[i] = narrow<T>(phi[i].value);
    store_global<N>(f.out + offset, pack, 0, last, aligned);
    const T* source = f.tangents + (shape.shared ? walk.column : offset);
    T* target = f.out + rows + offset;
    for (int64_t k = 0; k < shape.tangents; k += kBatch) {
      Pack<T, N> tangent[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        tangent[u] = load_pack<N>(source + (k + u) * stride, 0, k + u < shape.tangents ? last : 0, aligned);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
#pragma unroll
        for (int i = 0; i < N; ++i) tangent[u].value[i] = narrow<T>(phi[i].slope * widen(tangent[u].value[i]));
        store_global<N>(target + (k + u) * rows, tangent[u], 0, k + u < shape.tangents ? last : 0, aligned);
      }
    }
  }
}

// dprimal and dtangents, and each block's part of the sums of dprimal over the batch where `partial` is not null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Backward<T> f, Shape shape, Columns c, bool aligned, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>, kPairs = kBatch / 2;  // two arrays are read at once
  const Walk walk(c, blockIdx.x, N);
  const int64_t last = c.columns - walk.column, rows = c.rows * c.columns;
  const int64_t stride = shape.shared ? c.columns : rows;
  const bool curved = f.activation > kLastPiecewiseLinear;
  // Without a gradient of the tangents, theirs is zero; without curvature and tangents of one's own they do nothing.
  const bool visit = f.grad_tangents != nullptr ? curved || !shape.shared : !shape.shared;
  A bias[N], sum[N] = {};
  load_bias(curved ? f.bias : nullptr, shape, walk.column, bias);
  for (int64_t b = walk.row; b < walk.end; b += walk.stride) {
    const int64_t offset = b * c.columns + walk.column;
    A a[N], dot[N] = {};
    Expansion<A> phi[N];
    add_bias(load_pack<N>(f.saved + offset, 0, last, aligned), bias, a);
    expand(f.activation, f.parameter, a, phi);
    const T* source = f.tangents + (shape.shared ? walk.column : offset);
    for (int64_t k = 0; visit && k < shape.tangents; k += kPairs) {
      Pack<T, N> grad[kPairs], tangent[kPairs];
#pragma unroll
      for (int u = 0; u < kPairs; ++u) {
        const int64_t present = k + u < shape.tangents ? last : 0;
        grad[u] = load_pack<N>(f.grad_tangents + (k + u) * rows + offset, 0, f.grad_tangents ? present : 0, aligned);
        tangent[u] = load_pack<N>(source + (k + u) * stride, 0, curved ? present : 0, aligned);
      }
#pragma unroll
      for (int u = 0; u < kPairs; ++u) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A g = widen(grad[u].value[i]);
          dot[i] += g * widen(tangent[u].value[i]);
          grad[u].value[i] = narrow<T>(phi[i].slope * g);
        }
        const int64_t present = k + u < shape.tangents && !shape.shared ? last : 0;
        store_global<N>(f.dtangents + (k + u) * rows + offset, grad[u], 0, present, aligned);
      }
    }
    auto pack = load_pack<N>(f.grad_primal + offset, 0, f.grad_primal ? last : 0, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A da = phi[i].slope * widen(pack.value[i]) + (curved ? phi[i].curvature * dot[i] : A(0));
      sum[i] += da;
      pack.value[i] = narrow<T>(da);
    }
    store_global<N>(f.dprimal + offset, pack, 0, last, aligned);
  }
  if (partial != nullptr) store_column_sums(c, walk, sum, partial, c.columns);
}

// Each block's part of ddirections: sums over the batch of phi' times the gradient of one tangent. Promised no more
// than two blocks, the compiler does not spill in float64 to fit in others.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    direction_sums(Backward<T> f, Shape shape, Columns c, bool aligned, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  constexpr int N = kPack<T>;
  const int64_t k = blockIdx.x % shape.tangents;
  const Walk walk(c, blockIdx.x / shape.tangents, N);
  const int64_t last = c.columns - walk.column;
  const T* grad_tangent = f.grad_tangents + k * c.rows * c.columns;
  A bias[N], sum[N] = {};
  load_bias(f.activation > kLastPiecewiseLinear ? f.bias : nullptr, shape, walk.column, bias);
  for (int64_t b = walk.row; b < walk.end; b += walk.stride) {
    const int64_t offset = b * c.columns + walk.column;
    const auto grad = load_pack<N>(grad_tangent + offset, 0, last, aligned);
    A a[N];
    Expansion<A> phi[N];
    add_bias(load_pack<N>(f.saved + offset, 0, last, aligned), bias, a);
    expand(f.activation, f.parameter, a, phi);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += phi[i].slope * widen(grad.value[i]);
  }
  store_column_sums(c, walk, sum, partial + k * c.columns, shape.tangents * c.columns);
}

// ----------------------------------------------------------------------------------------------- launches

// Fills f.out; batch and columns are not 0.
template <typename T>
void forward(const Forward<T>& f, const Shape& shape, const Device& device, cudaStream_t stream) {
  const Columns c = deal_columns(shape.batch, shape.columns(), kPack<T>, shape.batch, device);
  const bool aligned = c.columns % kPack<T> == 0 && aligned_to_packs(f.primal, f.tangents, f.out);
  launch("tangent_activation forward", forward_kernel<T>, c.blocks(), kThreads, 0, stream, f, shape, c, aligned);
}

// How backward deals out the batch, once for the primal and once per direction, and the partial sums either leaves.
template <typename T>
struct BackwardPlan {
  Columns primal, direction;
  int64_t primal_sums, direction_sums;

  BackwardPlan(const Shape& shape, bool has_bias, bool has_grad_tangents, const Device& device)
      : primal(deal_columns(shape.batch, shape.columns(), kPack<T>, has_bias ? kMaxPieces : shape.batch, device)),
        direction(deal_columns(shape.batch, shape.columns(), kPack<T>, kMaxPieces, device)),
        primal_sums(has_bias ? primal.pieces * shape.columns() : 0),
        direction_sums(shape.shared && has_grad_tangents ? shape.tangents * direction.pieces * shape.columns() : 0) {}

  int64_t scratch() const { return primal_sums + direction_sums; }
};

// Fills dprimal, dtangents, dbias and, where there is a gradient of the tangents, ddirections; batch and columns are
// not 0. `scratch` has plan.scratch() elements.
template <typename T>
void backward(const Backward<T>& f, const Shape& shape, const BackwardPlan<T>& plan, Accumulate<T>* scratch,
              cudaStream_t stream) {
  using A = Accumulate<T>;
  const int64_t columns = shape.columns();
  const bool aligned = columns % kPack<T> == 0 &&
                       aligned_to_packs(f.grad_primal, f.grad_tangents, f.saved, f.tangents, f.dprimal, f.dtangents);
  launch("tangent_activation backward", backward_kernel<T>, plan.primal.blocks(), kThreads, 0, stream, f, shape,
         plan.primal, aligned, f.dbias ? scratch : nullptr);
  if (f.dbias != nullptr) {
    launch_merge<T>("tangent_activation merge", scratch, f.dbias, shape.channels, shape.spatial, plan.primal.pieces,
                    A(1), stream);
  }
  if (plan.direction_sums > 0) {
    A* partial = scratch + plan.primal_sums;
    launch("tangent_activation direction_sums", direction_sums<T>, shape.tangents * plan.direction.blocks(), kThreads,
           0, stream, f, shape, plan.direction, aligned, partial);
    launch_merge<T>("tangent_activation merge", partial, f.ddirections, shape.tangents * columns, 1,
                    plan.direction.pieces, A(1), stream);
  }
}

}  // namespace fastdis::tangent_activation

#ifndef FASTDIS_HOST_EMULATION

#include <optional>
#include <tuple>

namespace fastdis::tangent_activation {
namespace {

using torch::stable::accelerator::DeviceGuard;

// rows [.., B, C, *] with their tangents, whose number is given where they are not among the rows.
Shape shape_of(const Tensor& rows, int64_t tangents, bool shared) {
  STD_TORCH_CHECK(rows.dim() >= 3 && rows.size(0) >= 1, "tangent_activation: rows must be [1 + K, B, C, *]");
  int64_t spatial = 1;
  for (int64_t dim = 3; dim < rows.dim(); ++dim) spatial *= rows.size(dim);
  return {rows.size(1), rows.size(2), spatial, tangents, shared};
}

// The sizes of `tensor`, the first one replaced.
std::vector<int64_t> sizes_with(const Tensor& tensor, int64_t first) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes[0] = first;
  return sizes;
}

void check_like(const std::optional<Tensor>& tensor, int64_t size, const Tensor& rows, const char* message) {
  STD_TORCH_CHECK(!tensor || (tensor->numel() == size && tensor->scalar_type() == rows.scalar_type()),
                  "tangent_activation: ", message);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename T>
const T* optional_input(const std::optional<Tensor>& tensor) {
  return tensor ? input<T>(*tensor) : nullptr;
}

Tensor forward_cuda(const Tensor& rows_, const std::optional<Tensor>& directions_, const std::optional<Tensor>& bias_,
                    int64_t activation, double parameter) {
  const DeviceGuard guard(rows_.get_device_index());
  const Tensor rows = torch::stable::contiguous(rows_);
  const auto directions = contiguous(directions_), bias = contiguous(bias_);
  const Shape shape = shape_of(rows, directions ? directions->size(0) : rows.size(0) - 1, directions.has_value());
  STD_TORCH_CHECK(!shape.shared || rows.size(0) == 1,
                  "tangent_activation: beside directions rows must be [1, B, C, *]");
  check_like(directions, shape.tangents * shape.columns(), rows, "directions must be [K, C, *] in the dtype of rows");
  check_like(bias, shape.channels, rows, "bias must be [C] in the dtype of rows");
  const Tensor out = torch::stable::new_empty(rows, sizes_with(rows, 1 + shape.tangents));
  if (out.numel() == 0) return out;
  dispatch("tangent_activation", rows.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* primal = input<T>(rows);
    const Forward<T> f{primal,
                       directions ? input<T>(*directions) : primal + shape.batch * shape.columns(),
                       optional_input<T>(bias),
                       output<T>(out),
                       static_cast<int>(activation),
                       static_cast<Accumulate<T>>(parameter)};
    forward<T>(f, shape, device_of(rows.get_device_index()), current_stream(rows));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const std::optional<Tensor>& grad_primal_,
                                                 const std::optional<Tensor>& grad_tangents_, const Tensor& saved_,
                                                 const std::optional<Tensor>& directions_,
                                                 const std::optional<Tensor>& bias_, int64_t activation,
                                                 double parameter) {
  const DeviceGuard guard(saved_.get_device_index());
  // Where phi is piecewise linear, directions and bias tell no more than their shapes.
  const bool curved = activation > kLastPiecewiseLinear, shared = directions_.has_value();
  const Tensor saved = torch::stable::contiguous(saved_);
  const auto grad_primal = contiguous(grad_primal_), grad_tangents = contiguous(grad_tangents_);
  const auto directions = curved ? contiguous(directions_) : directions_, bias = curved ? contiguous(bias_) : bias_;
  int64_t tangents = 0;
  if (shared) {
    tangents = directions->size(0);
  } else if (curved) {
    tangents = saved.size(0) - 1;
  } else if (grad_tangents) {
    tangents = grad_tangents->size(0);
  }
  const Shape shape = shape_of(saved, tangents, shared);
  const int64_t per_row = shape.batch * shape.columns();
  check_like(grad_primal, per_row, saved, "grad_primal must be like a row");
  check_like(grad_tangents, tangents * per_row, saved, "grad_tangents must be [K, B, C, *], like the rows");
  check_like(directions, tangents * shape.columns(), saved, "directions must be [K, C, *] in the dtype of rows");
  check_like(bias, shape.channels, saved, "bias must be [C] in the dtype of rows");
  const Tensor drows = torch::stable::new_empty(saved, sizes_with(saved, shared ? 1 : 1 + tangents));
  const auto gradient = [&](const std::optional<Tensor>& of, bool reached) {
    if (!of) return torch::stable::new_empty(saved, std::vector<int64_t>{0});
    return reached ? torch::stable::new_empty(saved, of->sizes()) : torch::stable::new_zeros(saved, of->sizes());
  };
  const Tensor ddirections = gradient(directions, per_row > 0 && grad_tangents.has_value());
  const Tensor dbias = gradient(bias, per_row > 0);
  if (per_row == 0) return {drows, ddirections, dbias};
  dispatch("tangent_activation", saved.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const T* primal = input<T>(saved);
    const Backward<T> f{optional_input<T>(grad_primal),
                        optional_input<T>(grad_tangents),
                        primal,
                        directions ? input<T>(*directions) : primal + per_row,
                        optional_input<T>(bias),
                        output<T>(drows),
                        output<T>(drows) + per_row,
                        output<T>(ddirections),
                        bias ? output<T>(dbias) : nullptr,
                        static_cast<int>(activation),
                        static_cast<A>(parameter)};
    const BackwardPlan<T> plan(shape, bias.has_value(), grad_tangents.has_value(), device_of(saved.get_device_index()));
    const Tensor scratch =
        torch::stable::new_empty(saved, std::vector<int64_t>{plan.scratch()}, accumulate_dtype(saved.scalar_type()));
    backward<T>(f, shape, plan, output<A>(scratch), current_stream(saved));
  });
  return {drows, ddirections, dbias};
}

}  // namespace
}  // namespace fastdis::tangent_activation

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("tangent_activation_forward", TORCH_BOX(&fastdis::tangent_activation::forward_cuda));
  m.impl("tangent_activation_backward", TORCH_BOX(&fastdis::tangent_activation::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
