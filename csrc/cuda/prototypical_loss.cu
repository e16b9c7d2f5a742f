// prototypical_loss on CUDA: logsumexp_n(s_qn) - s_q,label with s_qn = 2 (q - c) . (p_n - c) - |p_n - c|^2, which is
// minus the squared distance up to a constant of the query. Neither pass stores [queries, prototypes]: the forward pass
// keeps a running log-sum-exp, the backward pass computes the logits of a few queries at a time once more.

#include "prototypes.cuh"

namespace fastdis::prototypical_loss {

using namespace prototypes;

enum Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

template <typename T>
struct Forward {
  const int64_t* labels;     // [episodes, queries]
  T* loss;                   // [episodes, queries], or one element where the reduction is not none
  Accumulate<T>* logsumexp;  // [episodes, queries]
  int reduction;
};

template <typename A>
__device__ __forceinline__ A exchange(A x, int offset) {
  return __shfl_xor_sync(kFullWarp, x, offset);
}

// One block per kPullSize queries. Row y + kSide * i of the tile belongs to the kSide threads with that y, all of which
// end up with the same maximum and sum: the exchanges add the same pairs in either order. Per-query losses go to
// `loss`, or their sum over the block to `block_sums` where that is not null.
template <typename T>
__global__ void __launch_bounds__(kThreads) losses(Episodes<T> e, Forward<T> f, Accumulate<T>* block_sums) {
  using A = Accumulate<T>;
  using Scores = Tile<T, kPullSize>;
  constexpr int kMicro = Scores::kMicro;
  __shared__ typename Scores::Shared shared;
  __shared__ A row_loss[kPullSize];
  const int64_t row_tiles = ceil_div(e.num_queries, kPullSize), episode = blockIdx.x / row_tiles;
  const int first_q = static_cast<int>(blockIdx.x % row_tiles) * kPullSize;
  const int num_queries = static_cast<int>(e.num_queries), num_prototypes = static_cast<int>(e.num_prototypes);
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;

  A maximum[kMicro], sum[kMicro], own[kMicro];  // of the logits, of exp(logit - maximum), and the label's logit
  int64_t label[kMicro];
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int q = first_q + y + kSide * i;
    maximum[i] = -infinity<A>();
    sum[i] = own[i] = 0;
    label[i] = q < num_queries ? f.labels[episode * e.num_queries + q] : -1;
  }
#pragma unroll 1
  for (int first_n = 0; first_n < num_prototypes; first_n += kPullSize) {
    A product[kMicro][kMicro];
    Scores::multiply(shared, {e.queries_of(episode), first_q, num_queries},
                     {e.prototypes_of(episode), first_n, num_prototypes}, e.centre + episode * e.depth,
                     static_cast<int>(e.depth), e.aligned, product);
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      const int q = first_q + y + kSide * i;
      A largest = maximum[i];
#pragma unroll
      for (int j = 0; j < kMicro; ++j) {
        A& s = product[i][j];
        const int n = first_n + x + kSide * j;
        s = q < num_queries && n < num_prototypes
                ? logit(s, shared.column_norm[x + kSide * j], e.queries_of(episode) + q * e.depth,
                        e.prototypes_of(episode) + n * e.depth, e.depth)
                : -infinity<A>();
        if (n == label[i]) own[i] = s;
        largest = s > largest ? s : largest;
      }
#pragma unroll
      for (int offset = kSide / 2; offset > 0; offset /= 2) {
        const A other = exchange(largest, offset);
        largest = other > largest ? other : largest;
      }
      // Nothing but -Inf so far: any finite shift leaves the sum at 0.
      const A shift = largest == -infinity<A>() ? A(0) : largest;
      A added = 0;
#pragma unroll
      for (int j = 0; j < kMicro; ++j) added += exponential(product[i][j] - shift);
#pragma unroll
      for (int offset = kSide / 2; offset > 0; offset /= 2) added += exchange(added, offset);
      sum[i] = sum[i] * exponential(maximum[i] - shift) + added;
      maximum[i] = largest;
    }
  }

#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int q = first_q + y + kSide * i;
#pragma unroll
    for (int offset = kSide / 2; offset > 0; offset /= 2) own[i] += exchange(own[i], offset);
    const A logsumexp = maximum[i] + logarithm(sum[i]);
    const bool known = label[i] >= 0 && label[i] < num_prototypes;
    const A loss = known ? logsumexp - own[i] : not_a_number<A>();
    if (x == 0) row_loss[y + kSide * i] = q < num_queries ? loss : A(0);
    if (x == 0 && q < num_queries) {
      f.logsumexp[episode * e.num_queries + q] = logsumexp;
      if (block_sums == nullptr) f.loss[episode * e.num_queries + q] = narrow<T>(loss);
    }
  }
  if (block_sums == nullptr) return;
  __syncthreads();
  A total = threadIdx.x < kPullSize ? row_loss[threadIdx.x] : A(0);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) total += shuffle_down(total, offset);
  if (threadIdx.x == 0) block_sums[blockIdx.x] = total;
}

// The sum of the block sums over `divisor`, by one block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    reduce_losses(const Accumulate<T>* block_sums, int64_t count, Accumulate<T> divisor, T* loss) {
  using A = Accumulate<T>;
  __shared__ A shared[kThreads / kWarp];
  A sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += block_sums[i];
  sum = team_reduce(sum, kThreads, shared);
  if (threadIdx.x == 0) *loss = narrow<T>(sum / divisor);
}

// W_qn = (onehot_qn - softmax_qn) * grad_q: the gradient with respect to the squared distances.
template <typename T>
struct SoftmaxWeights {
  static constexpr bool kNeedsScores = true;
  const int64_t* labels;
  const Accumulate<T>* logsumexp;
  const T* grad;        // [episodes, queries], or one element for all queries
  int64_t grad_stride;  // 1 or 0
  Accumulate<T> divisor;
  int64_t num_prototypes;

  __device__ __forceinline__ Accumulate<T> operator()(int64_t query, int64_t n, Accumulate<T> s) const {
    using A = Accumulate<T>;
    const int64_t label = labels[query];
    if (label < 0 || label >= num_prototypes) return not_a_number<A>();
    const A softmax = exponential(s - logsumexp[query]);
    return ((n == label ? A(1) : A(0)) - softmax) * (widen(grad[query * grad_stride]) / divisor);
  }
};

template <typename T>
int64_t forward_scratch(const Episodes<T>& e) {
  return centre_size(e) + e.episodes * ceil_div(e.num_queries, kPullSize);
}

// Needs queries; `scratch` has forward_scratch(e) elements and starts on a 16-byte boundary.
template <typename T>
void forward(Episodes<T> e, const Forward<T>& f, Accumulate<T>* scratch, cudaStream_t stream) {
  using A = Accumulate<T>;
  e.centre = scratch;
  e.aligned = rows_aligned(e);
  launch_centre(e, scratch, stream);
  A* block_sums = f.reduction == kNone ? nullptr : scratch + centre_size(e);
  const int64_t blocks = e.episodes * ceil_div(e.num_queries, kPullSize);
  launch("prototypical_loss", losses<T>, blocks, kThreads, 0, stream, e, f, block_sums);
  if (block_sums != nullptr) {
    const A divisor = f.reduction == kMean ? A(e.episodes * e.num_queries) : A(1);
    launch("prototypical_loss reduce_losses", reduce_losses<T>, 1, kThreads, 0, stream, block_sums, blocks, divisor,
           f.loss);
  }
}

// `scratch` has backward_scratch(e, true, device) elements and starts on a 16-byte boundary.
template <typename T>
void backward(const Episodes<T>& e, const T* grad, const int64_t* labels, const Accumulate<T>* logsumexp, int reduction,
              T* dqueries, T* dprototypes, Accumulate<T>* scratch, const Device& device, cudaStream_t stream) {
  using A = Accumulate<T>;
  const A divisor = reduction == kMean ? A(e.episodes * e.num_queries) : A(1);
  const SoftmaxWeights<T> weights{labels, logsumexp, grad, reduction == kNone ? 1 : 0, divisor, e.num_prototypes};
  launch_gradients<T>(e, weights, dqueries, dprototypes, scratch, device, stream);
}

}  // namespace fastdis::prototypical_loss

#ifndef FASTDIS_HOST_EMULATION

#include <limits>
#include <tuple>

namespace fastdis::prototypical_loss {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor checked_labels(const EpisodeTensors& tensors, const Tensor& labels) {
  STD_TORCH_CHECK(
      labels.scalar_type() == ScalarType::Long && labels.numel() == tensors.num_episodes() * tensors.num_queries(),
      "prototypical_loss: labels must be [E, Q] int64");
  return torch::stable::contiguous(labels);
}

std::tuple<Tensor, Tensor> forward_cuda(const Tensor& queries_, const Tensor& prototypes_, const Tensor& labels_,
                                        int64_t reduction) {
  const DeviceGuard guard(queries_.get_device_index());
  const EpisodeTensors tensors("prototypical_loss", queries_, prototypes_);
  const Tensor& queries = tensors.queries;
  const Tensor labels = checked_labels(tensors, labels_);
  const std::vector<int64_t> per_query{tensors.num_episodes(), tensors.num_queries()};
  const Tensor loss = torch::stable::new_empty(queries, reduction == kNone ? per_query : std::vector<int64_t>{});
  const Tensor logsumexp = torch::stable::new_empty(queries, per_query, accumulate_dtype(queries.scalar_type()));
  if (logsumexp.numel() == 0) {  // the mean of nothing is NaN, its sum 0
    torch::stable::fill_(loss, reduction == kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0);
    return {loss, logsumexp};
  }
  dispatch("prototypical_loss", queries.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Episodes<T> e = tensors.episodes<T>();
    const Forward<T> f{input<int64_t>(labels), output<T>(loss), output<A>(logsumexp), static_cast<int>(reduction)};
    forward<T>(e, f, output<A>(tensors.scratch(forward_scratch(e))), current_stream(queries));
  });
  return {loss, logsumexp};
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_, const Tensor& queries_, const Tensor& prototypes_,
                                         const Tensor& labels_, const Tensor& logsumexp_, int64_t reduction) {
  const DeviceGuard guard(queries_.get_device_index());
  const EpisodeTensors tensors("prototypical_loss", queries_, prototypes_);
  const Tensor &queries = tensors.queries, &prototypes = tensors.prototypes;
  const Tensor labels = checked_labels(tensors, labels_);
  const Tensor grad = torch::stable::contiguous(grad_), logsumexp = torch::stable::contiguous(logsumexp_);
  STD_TORCH_CHECK(grad.numel() == (reduction == kNone ? labels.numel() : 1) &&
                      grad.scalar_type() == queries.scalar_type() && logsumexp.numel() == labels.numel() &&
                      logsumexp.scalar_type() == accumulate_dtype(queries.scalar_type()),
                  "prototypical_loss: grad must be like the loss, logsumexp [E, Q] in the statistics dtype");
  if (queries.numel() == 0 || prototypes.numel() == 0) {
    return {torch::stable::new_zeros(queries, queries.sizes()),
            torch::stable::new_zeros(prototypes, prototypes.sizes())};
  }
  const Tensor dqueries = torch::stable::new_empty(queries, queries.sizes());
  const Tensor dprototypes = torch::stable::new_empty(prototypes, prototypes.sizes());
  dispatch("prototypical_loss", queries.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Device device = device_of(queries.get_device_index());
    const Episodes<T> e = tensors.episodes<T>();
    const Tensor scratch = tensors.scratch(backward_scratch(e, true, device));
    backward<T>(e, input<T>(grad), input<int64_t>(labels), input<A>(logsumexp), static_cast<int>(reduction),
                output<T>(dqueries), output<T>(dprototypes), output<A>(scratch), device, current_stream(queries));
  });
  return {dqueries, dprototypes};
}

}  // namespace
}  // namespace fastdis::prototypical_loss

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("prototypical_loss_forward", TORCH_BOX(&fastdis::prototypical_loss::forward_cuda));
  m.impl("prototypical_loss_backward", TORCH_BOX(&fastdis::prototypical_loss::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
