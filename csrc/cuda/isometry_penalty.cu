// isometry_penalty on CUDA. With G_b = J_b J_b^T, t_b = tr G_b, q_b = |G_b|^2, and D_b = G_b - s_b I:
//   isometry            mean |D_b|^2, s = 1             dJ_b = 4 / B D_b J_b
//   scaled_isometry     mean |D_b|^2, s = mean t / K    dJ_b = 4 / B D_b J_b
//   conformal           mean |D_b|^2, s_b = t_b / K     dJ_b = 4 / B D_b J_b
//   orthogonality       mean |offdiag G_b|^2            dJ_b = 4 / B offdiag(G_b) J_b
//   relaxed_distortion  mean q / (mean t)^2             dJ_b = 4 / (B (mean t)^2) D_b J_b, s = mean q / mean t
// Sums are of squared deviations, never differences of sums: near an isometry those would cancel. scaled_isometry
// needs the mean trace only at the end: |G_b - s I|^2 = |G_b - t_b / K I|^2 + (t_b - mean t)^2 / K.

#include "gram.cuh"

namespace fastdis::isometry_penalty {

using namespace gram;

enum Kind : int { kIsometry = 0, kScaledIsometry = 1, kConformal = 2, kRelaxedDistortion = 3, kOrthogonality = 4 };

// Per sample the trace and the sum of squares: of G - I, of G - t / K I, of offdiag G, or of G.
template <typename A>
struct Terms {
  A *trace, *squares;  // [batch]
};

// `team` threads per sample.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    sample_terms(const A* gram, Terms<A> terms, int64_t batch, int64_t rows, int kind, int team) {
  __shared__ A shared[kThreads / kWarp];
  __shared__ A traces[kThreads];
  const int64_t sample = int64_t{blockIdx.x} * (kThreads / team) + threadIdx.x / team;
  const bool active = sample < batch;
  const A* own = gram + sample * rows * rows;
  A sum = 0;
  for (int64_t i = threadIdx.x % team; active && i < rows; i += team) sum += own[i * rows + i];
  sum = team_reduce(sum, team, shared);
  if (threadIdx.x % team == 0) traces[threadIdx.x / team] = sum;
  __syncthreads();
  const A trace = traces[threadIdx.x / team];
  const A shift = kind == kIsometry ? A(1) : kind == kRelaxedDistortion ? A(0) : trace / A(rows);
  A squares = 0;
  for (int64_t e = threadIdx.x % team; active && e < rows * rows; e += team) {
    A value = own[e];
    if (e / rows == e % rows) value = kind == kOrthogonality ? A(0) : value - shift;
    squares += value * value;
  }
  squares = team_reduce(squares, team, shared);
  if (active && threadIdx.x % team == 0) {
    terms.trace[sample] = trace;
    terms.squares[sample] = squares;
  }
}

// The mean of value(b) over the batch, for every thread of the one block.
template <typename A, typename Value>
__device__ A batch_mean(int64_t batch, A* shared, Value value) {
  A sum = 0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) sum += value(b);
  sum = team_reduce(sum, kThreads, shared);
  __syncthreads();  // the first thread has read the others' sums
  if (threadIdx.x == 0) shared[0] = sum / A(batch);
  __syncthreads();
  const A mean = shared[0];
  __syncthreads();
  return mean;
}

// The loss, by one block.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    combine_terms(Terms<A> terms, A* loss, int64_t batch, int64_t rows, int kind) {
  __shared__ A shared[kThreads / kWarp];
  const A trace = batch_mean(batch, shared, [&](int64_t b) { return terms.trace[b]; });
  const A mean = batch_mean(batch, shared, [&](int64_t b) {
    if (kind != kScaledIsometry || rows == 0) return terms.squares[b];
    return terms.squares[b] + (terms.trace[b] - trace) * (terms.trace[b] - trace) / A(rows);
  });
  if (threadIdx.x == 0) *loss = kind == kRelaxedDistortion ? mean / (trace * trace) : mean;
}

// dJ_b = scale (G_b - shift_b I) J_b: writes scale and shift [batch], by one block.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    combine_slopes(Terms<A> terms, const A* grad, A* scale, A* shift, int64_t batch, int64_t rows, int kind) {
  __shared__ A shared[kThreads / kWarp];
  const A trace = batch_mean(batch, shared, [&](int64_t b) { return terms.trace[b]; });
  const A squares = batch_mean(batch, shared, [&](int64_t b) { return terms.squares[b]; });
  if (threadIdx.x == 0) {
    *scale = 4 * *grad / A(batch) / (kind == kRelaxedDistortion ? trace * trace : A(1));
  }
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    shift[b] = kind == kScaledIsometry      ? trace / A(rows)
               : kind == kConformal         ? terms.trace[b] / A(rows)
               : kind == kRelaxedDistortion ? squares / trace
                                            : A(1);
  }
}

template <typename A>
struct DeviationMatrix {
  const A *gram, *scale, *shift;
  int64_t rows;
  int kind;

  __device__ __forceinline__ A operator()(int64_t sample, int64_t i, int64_t j) const {
    A value = gram[(sample * rows + i) * rows + j];
    if (i == j) value = kind == kOrthogonality ? A(0) : value - shift[sample];
    return *scale * value;
  }
};

template <typename A>
void launch_terms(const A* gram, const Terms<A>& terms, int64_t batch, int64_t rows, int kind, cudaStream_t stream) {
  const int team = power_of_two(ceil_div(rows * rows, 4), 1, kThreads);
  launch("isometry_penalty terms", sample_terms<A>, ceil_div(batch, kThreads / team), kThreads, 0, stream, gram, terms,
         batch, rows, kind, team);
}

// The sums of the splits are done with when the terms are written over them.
inline int64_t forward_scratch(const Layout& l, const Plan& plan) { return greatest(plan.scratch, 2 * l.batch); }

// `scratch` has forward_scratch(l, plan) elements.
template <typename T>
void forward(const T* jacobian, const Layout& l, const Plan& plan, int kind, Accumulate<T>* loss, Accumulate<T>* gram,
             Accumulate<T>* scratch, cudaStream_t stream) {
  using A = Accumulate<T>;
  launch_gram(jacobian, l, plan, gram, scratch, stream);
  const Terms<A> terms{scratch, scratch + l.batch};
  launch_terms(gram, terms, l.batch, l.rows, kind, stream);
  launch("isometry_penalty", combine_terms<A>, 1, kThreads, 0, stream, terms, loss, l.batch, l.rows, kind);
}

inline int64_t backward_scratch(const Layout& l) { return 3 * l.batch + 1; }

// `scratch` has backward_scratch(l) elements.
template <typename T>
void backward(const Accumulate<T>* grad, const T* jacobian, const Layout& l, const Accumulate<T>* gram, int kind,
              T* out, Accumulate<T>* scratch, cudaStream_t stream) {
  using A = Accumulate<T>;
  const Terms<A> terms{scratch, scratch + l.batch};
  A *shift = scratch + 2 * l.batch, *scale = scratch + 3 * l.batch;
  launch_terms(gram, terms, l.batch, l.rows, kind, stream);
  launch("isometry_penalty slopes", combine_slopes<A>, 1, kThreads, 0, stream, terms, grad, scale, shift, l.batch,
         l.rows, kind);
  launch_pull_back(jacobian, l, DeviationMatrix<A>{gram, scale, shift, l.rows, kind}, out, stream);
}

}  // namespace fastdis::isometry_penalty

#ifndef FASTDIS_HOST_EMULATION

#include <tuple>

namespace fastdis::isometry_penalty {
namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kOp = "isometry_penalty";

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& jacobian_, int64_t kind) {
  const DeviceGuard guard(jacobian_.get_device_index());
  const JacobianTensor jacobian(kOp, jacobian_);
  const Tensor loss = jacobian.empty({}), gram = jacobian.empty_gram();
  dispatch(kOp, jacobian.tensor.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Layout layout = jacobian.layout();
    const T* data = input<T>(jacobian.tensor);
    const Plan plan = plan_gram(data, layout, device_of(jacobian.tensor.get_device_index()));
    const Tensor scratch = jacobian.empty({forward_scratch(layout, plan)});
    forward(data, layout, plan, static_cast<int>(kind), output<A>(loss), output<A>(gram), output<A>(scratch),
            current_stream(jacobian.tensor));
  });
  return {loss, gram};
}

Tensor backward_cuda(const Tensor& grad, const Tensor& jacobian_, const Tensor& gram_, int64_t kind) {
  const DeviceGuard guard(jacobian_.get_device_index());
  const JacobianTensor jacobian(kOp, jacobian_);
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == accumulate_dtype(jacobian_.scalar_type()), kOp,
                  ": grad must be a scalar in the statistics dtype");
  const Tensor gram = jacobian.checked_square(kOp, "gram", gram_), out = jacobian.empty_like();
  dispatch(kOp, jacobian.tensor.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Layout layout = jacobian.layout();
    const Tensor scratch = jacobian.empty({backward_scratch(layout)});
    backward(input<A>(grad), input<T>(jacobian.tensor), layout, input<A>(gram), static_cast<int>(kind), output<T>(out),
             output<A>(scratch), current_stream(jacobian.tensor));
  });
  return out;
}

}  // namespace
}  // namespace fastdis::isometry_penalty

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("isometry_penalty_forward", TORCH_BOX(&fastdis::isometry_penalty::forward_cuda));
  m.impl("isometry_penalty_backward", TORCH_BOX(&fastdis::isometry_penalty::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
