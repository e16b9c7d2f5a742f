// total_correlation on CUDA: log-sum-exps over all pairs of samples, and their gradients, without a tensor of pairs.
//
// With l_ijk = log q(z_ik | x_j) and weights w_ij, forward finds log_joint_i = log sum_j w_ij exp(sum_k l_ijk) and
// log_marginals_ik = log sum_j w_ij exp(l_ijk) by running log-sum-exps. Backward takes both from forward, so that
//   dl_ijk = a w_ij exp(sum_k l_ijk - log_joint_i) + m w_ij exp(l_ijk - log_marginals_ik)
// can be computed anew in two sweeps: one whose threads own rows i, for dz, and one whose threads own columns j, for
// dmean and dlogvar. Bound by arithmetic; latents are worked on in quads, samples as owners (some in each lane of a
// warp) against others (the same for the whole warp), so that what is read of the others serves a warp of owners.

#include "sums.cuh"

#include <cmath>

namespace fastdis::total_correlation {

using sums::kThreads;

enum Estimator : int { kWeighted = 0, kStratified = 1 };

constexpr int kQuad = 4;
constexpr int kPadding = 64;  // the samples of a prepared batch are a multiple of this
constexpr int kFields = 3;    // of one side, at most

template <typename A>
using Quad = Pack<A, kQuad>;

template <typename A>
inline constexpr int kPerLane = std::is_same_v<A, double> ? 1 : 2;  // owners; more would spill
template <typename A>
inline constexpr int kOwners = kWarp * kPerLane<A>;

// The inputs as the kernels read them, [episodes, quads, padded, kQuad]. Latents beyond the last have density 1
// everywhere; samples beyond the last have density 0 as columns, and as rows log-sum-exps of infinity: no effect.
template <typename A>
struct Batch {
  A *z, *mean;
  A* half_precision;  // exp(-logvar) / 2
  A* constant;        // -(logvar + log(2 pi)) / 2
  A* log_marginals;   // null in forward, like log_joint
  A* log_joint;       // [episodes, padded]
  int64_t episodes, batch, latents, quads, padded;

  __host__ __device__ int64_t size() const { return episodes * quads * padded * kQuad; }
  __device__ __forceinline__ int64_t index(int64_t e, int64_t quad, int64_t sample) const {
    return ((e * quads + quad) * padded + sample) * kQuad;
  }
  // What a row (columns where not kRows) is made of.
  template <bool kRows>
  __device__ __forceinline__ const A* field(int f) const {
    if constexpr (kRows) return f == 0 ? z : log_marginals;
    return f == 0 ? mean : f == 1 ? half_precision : constant;
  }
};

// log w_ij takes three values: on the diagonal, right of it (cyclically), and elsewhere. It is added to a log-density
// last, in both passes alike: then rounding does not show in the difference from a log-sum-exp that one pair dominates.
template <typename A>
struct LogWeights {
  A elsewhere, diagonal, right;
  int64_t batch;

  // Whether any of these pairs may be on the diagonal or right of it.
  __device__ __forceinline__ bool near(int64_t row, int rows, int64_t column, int columns) const {
    return (column <= row + rows && row < column + columns) || (column == 0 && row + rows >= batch);
  }
  __device__ __forceinline__ A of(bool near, int64_t row, int64_t column) const {
    if (!near) return elsewhere;
    const int64_t next = row + 1 == batch ? 0 : row + 1;
    return column == row ? diagonal : column == next ? right : elsewhere;
  }
};

template <typename A>
LogWeights<A> log_weights(int64_t batch, int64_t dataset_size, int estimator) {
  const double n = static_cast<double>(dataset_size), b = static_cast<double>(batch);
  if (estimator == kWeighted) {
    const A all = static_cast<A>(-std::log(b * n));
    return {all, all, all, batch};
  }
  const double others = batch > 1 ? b - 1 : 1;
  return {static_cast<A>(-std::log(others)), static_cast<A>(-std::log(n)),
          static_cast<A>(std::log((n - (b - 1)) / (n * others))), batch};
}

// ------------------------------------------------------------------------------------------ device functions

// Two ulp next to 0, where the exponentials of log-sum-exps matter; further down the error grows slower than they fall.
__device__ __forceinline__ float quick_exponential(float x) { return __expf(x); }
__device__ __forceinline__ double quick_exponential(double x) { return exp(x); }

// pull = (z - mean) exp(-logvar) / 2, square = (z - mean) pull and the logarithm of the density of z.
template <typename A>
struct Density {
  A pull, square, log;
};

template <bool kOwnersAreRows, typename A>
__device__ __forceinline__ Density<A> density(const Quad<A> (&own)[kFields], const Quad<A> (&other)[kFields], int v) {
  const auto& row = kOwnersAreRows ? own : other;
  const auto& column = kOwnersAreRows ? other : own;
  const A deviation = row[0].value[v] - column[0].value[v];
  const A pull = deviation * column[1].value[v], square = deviation * pull;
  return {pull, square, column[2].value[v] - square};
}

// The logarithm of a sum of exponentials is maximum + log(sum).
template <typename A>
struct LogSum {
  A maximum, sum;
};

template <typename A>
__device__ __forceinline__ LogSum<A> nothing() {
  return {-infinity<A>(), 0};
}

// Nothing but -Inf so far: any finite shift leaves the sum at 0.
template <typename A>
__device__ __forceinline__ A shift_by(A maximum) {
  return maximum == -infinity<A>() ? A(0) : maximum;
}

template <int N, typename A>
__device__ __forceinline__ void add(LogSum<A>& total, const A (&log)[N]) {
  A maximum = total.maximum;
#pragma unroll
  for (int i = 0; i < N; ++i) maximum = log[i] > maximum ? log[i] : maximum;
  const A shift = shift_by(maximum);
  total.sum *= quick_exponential(total.maximum - shift);
#pragma unroll
  for (int i = 0; i < N; ++i) total.sum += quick_exponential(log[i] - shift);
  total.maximum = maximum;
}

template <typename A>
__device__ __forceinline__ LogSum<A> combine(const LogSum<A>& a, const LogSum<A>& b) {
  const A maximum = a.maximum > b.maximum ? a.maximum : b.maximum, shift = shift_by(maximum);
  return {maximum, a.sum * exponential(a.maximum - shift) + b.sum * exponential(b.maximum - shift)};
}

// The log-sum-exps of the block's owners, of which each warp has seen some of the others; valid in thread t < kOwners
// for owner t. Every thread of the block calls it.
template <int kWarps, typename A>
__device__ __forceinline__ A combine_warps(const LogSum<A> (&state)[kPerLane<A>],
                                           LogSum<A> (&shared)[kWarps][kOwners<A>]) {
  const int thread = threadIdx.x;
  __syncthreads();  // an earlier call may still be reading
#pragma unroll
  for (int r = 0; r < kPerLane<A>; ++r) shared[thread / kWarp][thread % kWarp + kWarp * r] = state[r];
  __syncthreads();
  LogSum<A> total = nothing<A>();
  if (thread < kOwners<A>) {
    for (int warp = 0; warp < kWarps; ++warp) total = combine(total, shared[warp][thread]);
  }
  return total.maximum + logarithm(total.sum);
}

// Puts `count` fields of `others` others from first_other on, in `quads` quads from first_quad on, into
// stage [kFields][kPitch], quad by quad. Every thread of the block calls it.
template <bool kRows, int kPitch, typename A>
__device__ __forceinline__ void stage_others(const Batch<A>& b, int64_t e, int64_t first_quad, int quads,
                                             int64_t first_other, int others, int count, Quad<A>* stage) {
  __syncthreads();  // what was there may still be read
  for (int t = threadIdx.x; t < quads * others; t += blockDim.x) {
    const int64_t index = b.index(e, first_quad + t / others, first_other + t % others);
#pragma unroll
    for (int f = 0; f < kFields; ++f) {
      if (f < count) stage[f * kPitch + t] = load_pack<kQuad>(b.template field<kRows>(f) + index, 0, kQuad, true);
    }
  }
  __syncthreads();
}

// The log-densities of the rows z_i given the columns x_j, summed over all latents, for this lane's owners against its
// warp's kCount others, of kOthers that the block has. The stage holds kSlab quads of them at a time and ends with the
// last ones.
template <bool kOwnersAreRows, int kSlab, int kOthers, int kCount, typename A>
__device__ __forceinline__ void joint_densities(const Batch<A>& b, int64_t e, int64_t first_owner, int64_t first_other,
                                                Quad<A>* stage, A (&sum)[kCount][kPerLane<A>]) {
  constexpr int kPitch = kSlab * kOthers, kOwnerFields = kOwnersAreRows ? 1 : 3, kOtherFields = kOwnersAreRows ? 3 : 1;
  constexpr int kStaged = kOwnersAreRows ? 3 : 2;  // columns will be needed with the rows' log_marginals
  const int first = threadIdx.x / kWarp * kCount;
#pragma unroll
  for (int o = 0; o < kCount; ++o) {
#pragma unroll
    for (int r = 0; r < kPerLane<A>; ++r) sum[o][r] = 0;
  }
#pragma unroll 1
  for (int64_t first_quad = 0; first_quad < b.quads; first_quad += kSlab) {
    const int quads = static_cast<int>(least(kSlab, b.quads - first_quad));
    stage_others<!kOwnersAreRows, kPitch>(b, e, first_quad, quads, first_other, kOthers, kStaged, stage);
#pragma unroll 1
    for (int quad = 0; quad < quads; ++quad) {
      Quad<A> own[kPerLane<A>][kFields];
#pragma unroll
      for (int r = 0; r < kPerLane<A>; ++r) {
        const int64_t index = b.index(e, first_quad + quad, first_owner + threadIdx.x % kWarp + kWarp * r);
#pragma unroll
        for (int f = 0; f < kOwnerFields; ++f) {
          own[r][f] = load_pack<kQuad>(b.template field<kOwnersAreRows>(f) + index, 0, kQuad, true);
        }
      }
#pragma unroll
      for (int o = 0; o < kCount; ++o) {
        Quad<A> other[kFields];
#pragma unroll
        for (int f = 0; f < kOtherFields; ++f) other[f] = stage[f * kPitch + quad * kOthers + first + o];
#pragma unroll
        for (int r = 0; r < kPerLane<A>; ++r) {
#pragma unroll
          for (int v = 0; v < kQuad; ++v) sum[o][r] += density<kOwnersAreRows>(own[r], other, v).log;
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- forward

constexpr int kWarps = kThreads / kWarp;

// A thread per quad of a sample. log_joint and log_marginals are those of forward, or null.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    prepare(const T* z, const T* mean, const T* logvar, const Accumulate<T>* log_joint,
            const Accumulate<T>* log_marginals, Batch<Accumulate<T>> b) {
  using A = Accumulate<T>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread * kQuad >= b.size()) return;
  const int64_t sample = thread % b.padded, quad = thread / b.padded % b.quads, e = thread / b.padded / b.quads;
  const bool real = sample < b.batch;
  Quad<A> row, column[kFields], marginals;
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    const int64_t k = quad * kQuad + v, index = (e * b.batch + sample) * b.latents + k;
    const bool present = real && k < b.latents;
    const A lv = present ? widen(logvar[index]) : A(0);
    row.value[v] = present ? widen(z[index]) : A(0);
    column[0].value[v] = present ? widen(mean[index]) : A(0);
    // Outside the batch not 0: infinities of z must not turn into NaN.
    column[1].value[v] = present || !real ? A(0.5) * exponential(-lv) : A(0);
    column[2].value[v] = present ? A(-0.5) * (lv + A(1.83787706640934548356)) : real ? A(0) : -infinity<A>();
    marginals.value[v] = present && log_marginals ? log_marginals[index] : infinity<A>();
  }
  store_global<kQuad>(b.z + thread * kQuad, row, 0, kQuad, true);
  store_global<kQuad>(b.mean + thread * kQuad, column[0], 0, kQuad, true);
  store_global<kQuad>(b.half_precision + thread * kQuad, column[1], 0, kQuad, true);
  store_global<kQuad>(b.constant + thread * kQuad, column[2], 0, kQuad, true);
  if (log_marginals == nullptr) return;
  store_global<kQuad>(b.log_marginals + thread * kQuad, marginals, 0, kQuad, true);
  if (quad == 0) {
    b.log_joint[e * b.padded + sample] = real ? log_joint[e * b.batch + sample] : infinity<A>();
  }
}

// A block per tile of rows, for the joint or for one quad of the marginals; its warps share the columns. Promised no
// more than one block, the compiler does not spill in float64 to fit in others.
template <typename A>
__global__ void __launch_bounds__(kThreads, 1) log_sums(Batch<A> b, LogWeights<A> w, A* log_joint, A* log_marginals) {
  constexpr int kPitch = kThreads, kPer = kPerLane<A>;
  __shared__ Quad<A> stage[kFields * kPitch];
  __shared__ LogSum<A> shared[kWarps][kOwners<A>];
  const int64_t kinds = b.quads + 1, tiles = ceil_div(b.batch, kOwners<A>);
  const int64_t kind = blockIdx.x % kinds, e = blockIdx.x / kinds / tiles;
  const int64_t first_row = blockIdx.x / kinds % tiles * kOwners<A>;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const bool stores = thread < kOwners<A> && first_row + thread < b.batch;
  const int64_t stored = e * b.batch + first_row + thread;

  if (kind == 0) {
    constexpr int kColumns = 64, kCount = kColumns / kWarps, kSlab = kPitch / kColumns;
    LogSum<A> state[kPer];
#pragma unroll
    for (int r = 0; r < kPer; ++r) state[r] = nothing<A>();
#pragma unroll 1
    for (int64_t first_column = 0; first_column < b.padded; first_column += kColumns) {
      A sum[kCount][kPer];
      joint_densities<true, kSlab, kColumns>(b, e, first_row, first_column, stage, sum);
      const int64_t column = first_column + warp * kCount;
      const bool near = w.near(first_row, kOwners<A>, column, kCount);
#pragma unroll
      for (int r = 0; r < kPer; ++r) {
        A log[kCount];
#pragma unroll
        for (int o = 0; o < kCount; ++o) {
          log[o] = sum[o][r] + w.of(near, first_row + lane + kWarp * r, column + o);
        }
        add(state[r], log);
      }
    }
    const A result = combine_warps(state, shared);
    if (stores) log_joint[stored] = result;
    return;
  }

  const int64_t quad = kind - 1;
  constexpr int kCount = 4;  // columns a warp takes at a time
  Quad<A> own[kPer][kFields];
  LogSum<A> state[kQuad][kPer];
#pragma unroll
  for (int r = 0; r < kPer; ++r) {
    own[r][0] = load_pack<kQuad>(b.z + b.index(e, quad, first_row + lane + kWarp * r), 0, kQuad, true);
#pragma unroll
    for (int v = 0; v < kQuad; ++v) state[v][r] = nothing<A>();
  }
#pragma unroll 1
  for (int64_t first_column = 0; first_column < b.padded; first_column += kPitch) {
    const int columns = static_cast<int>(least(kPitch, b.padded - first_column));
    stage_others<false, kPitch>(b, e, quad, 1, first_column, columns, kFields, stage);
#pragma unroll 1
    for (int first = warp * kCount; first < columns; first += kWarps * kCount) {
      const bool near = w.near(first_row, kOwners<A>, first_column + first, kCount);
      A log[kQuad][kPer][kCount];
#pragma unroll
      for (int o = 0; o < kCount; ++o) {
        Quad<A> other[kFields];
#pragma unroll
        for (int f = 0; f < kFields; ++f) other[f] = stage[f * kPitch + first + o];
#pragma unroll
        for (int r = 0; r < kPer; ++r) {
          const int64_t row = first_row + lane + kWarp * r;
          const A weight = w.of(near, row, first_column + first + o);
#pragma unroll
          for (int v = 0; v < kQuad; ++v) log[v][r][o] = density<true>(own[r], other, v).log + weight;
        }
      }
#pragma unroll
      for (int r = 0; r < kPer; ++r) {
#pragma unroll
        for (int v = 0; v < kQuad; ++v) add(state[v][r], log[v][r]);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kQuad; ++v) {
    const A result = combine_warps(state[v], shared);
    const int64_t k = quad * kQuad + v;
    if (stores && k < b.latents) log_marginals[stored * b.latents + k] = result;
  }
}

// Of one row, or summed over some.
template <typename A>
struct Terms {
  A information, correlation, divergence;
};

template <typename A>
__device__ __forceinline__ Terms<A> combine(const Terms<A>& a, const Terms<A>& b) {
  return {a.information + b.information, a.correlation + b.correlation, a.divergence + b.divergence};
}

template <typename A>
__device__ __forceinline__ Terms<A> shuffle_down(const Terms<A>& t, int offset) {
  using fastdis::shuffle_down;
  return {shuffle_down(t.information, offset), shuffle_down(t.correlation, offset), shuffle_down(t.divergence, offset)};
}

// Sums of the three terms over some rows, partial [3, episodes, blocks]; `team` threads (at most a warp) share a row.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    term_sums(Batch<A> b, const A* log_joint, const A* log_marginals, A* partial, int64_t blocks, int team) {
  __shared__ Terms<A> shared[kWarps];
  const int64_t block = blockIdx.x % blocks, e = blockIdx.x / blocks, rows = kThreads / team;
  Terms<A> sum{0, 0, 0};
  for (int64_t first = block * rows; first < b.batch; first += blocks * rows) {
    const int64_t i = first + threadIdx.x / team;
    A posterior = 0, marginals = 0, divergence = 0;
    for (int64_t k = threadIdx.x % team; i < b.batch && k < b.latents; k += team) {
      const int64_t index = b.index(e, k / kQuad, i) + k % kQuad;
      const A z = b.z[index], deviation = z - b.mean[index];
      const A marginal = log_marginals[(e * b.batch + i) * b.latents + k];
      posterior += b.constant[index] - deviation * (deviation * b.half_precision[index]);
      marginals += marginal;
      divergence += marginal + A(0.5) * (z * z + A(1.83787706640934548356));
    }
    const Terms<A> row = team_reduce(Terms<A>{posterior, marginals, divergence}, team, shared);
    if (threadIdx.x % team == 0 && i < b.batch) {
      const A joint = log_joint[e * b.batch + i];
      sum = combine(sum, {row.information - joint, joint - row.correlation, row.divergence});
    }
  }
  sum = team_reduce(sum, kThreads, shared);
  if (threadIdx.x == 0) {
    A* target = partial + e * blocks + block;
    target[0] = sum.information;
    target[b.episodes * blocks] = sum.correlation;
    target[2 * b.episodes * blocks] = sum.divergence;
  }
}

// ------------------------------------------------------------------------------------------------ backward

constexpr int kSweepWarps = 16;
constexpr int kSweepThreads = kSweepWarps * kWarp;
constexpr int kSweepOthers = 32;  // of a step

// Quads of latents that a block works on: as many as its stage holds, and no more than it has warps.
template <typename A>
inline constexpr int kSlab = 64 / static_cast<int>(sizeof(A));

// Blocks own a tile of samples and a slab of latents, and see one piece of the others.
struct SweepPlan {
  int64_t tiles, slabs;
  int64_t pieces, piece;  // in steps of kSweepOthers others
};

template <typename A>
SweepPlan plan_sweep(int64_t episodes, int64_t batch, int64_t quads, const Device& device) {
  SweepPlan plan{};
  plan.tiles = ceil_div(batch, kOwners<A>);
  plan.slabs = ceil_div(quads, kSlab<A>);
  const int64_t steps = ceil_div(batch, kSweepOthers), blocks = episodes * plan.tiles * plan.slabs;
  plan.piece = ceil_div(steps, least(steps, ceil_div(2 * device.multiprocessors, blocks)));
  plan.pieces = ceil_div(steps, plan.piece);
  return plan;
}

// Over one piece of the others, sums of dl pull (and, for columns, of dl (square - 1/2)): partial [pieces, 1 or 2
// results, episodes, quads, padded, kQuad]. In each step the block first gets the joint part of dl, for which a warp
// takes some others and all latents; then each warp takes one quad and a share of the others.
template <typename A, bool kRows>
__global__ void __launch_bounds__(kSweepThreads)
    sweep(Batch<A> b, LogWeights<A> w, const A* grad, SweepPlan plan, A* partial) {
  constexpr int kPer = kPerLane<A>, kPitch = kSlab<A> * kSweepOthers, kCount = kSweepOthers / kSweepWarps;
  constexpr int kResults = kRows ? 1 : 2, kOwnFields = kRows ? 2 : 3, kOtherFields = kRows ? 3 : 2;
  static_assert(kSlab<A> <= kSweepWarps && kSweepWarps * kOwners<A> <= kFields * kPitch);
  __shared__ Quad<A> stage[kFields * kPitch];
  __shared__ A joint[kSweepOthers][kOwners<A>];

  const int64_t first_quad = blockIdx.x % plan.slabs * kSlab<A>, piece = blockIdx.x / plan.slabs % plan.pieces;
  const int64_t first_owner = blockIdx.x / plan.slabs / plan.pieces % plan.tiles * kOwners<A>;
  const int64_t e = blockIdx.x / plan.slabs / plan.pieces / plan.tiles;
  const int64_t end = least(b.batch, (piece + 1) * plan.piece * kSweepOthers);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int quads = static_cast<int>(least(kSlab<A>, b.quads - first_quad)), shares = kSweepWarps / quads;
  const int own_quad = warp % quads, share = warp / quads;
  const A to_joint = (grad[b.episodes + e] - grad[e]) / A(b.batch);
  const A to_marginals = (grad[2 * b.episodes + e] - grad[b.episodes + e]) / A(b.batch);

  Quad<A> own[kPer][kFields], result[kPer][kResults];
#pragma unroll
  for (int r = 0; r < kPer; ++r) {
    const int64_t index = b.index(e, first_quad + own_quad, first_owner + lane + kWarp * r);
#pragma unroll
    for (int f = 0; f < kOwnFields; ++f) {
      own[r][f] = load_pack<kQuad>(b.template field<kRows>(f) + index, 0, kQuad, true);
    }
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
#pragma unroll
      for (int i = 0; i < kResults; ++i) result[r][i].value[v] = 0;
    }
  }

#pragma unroll 1
  for (int64_t first_other = piece * plan.piece * kSweepOthers; first_other < end; first_other += kSweepOthers) {
    const bool near = kRows ? w.near(first_owner, kOwners<A>, first_other, kSweepOthers)
                            : w.near(first_other, kSweepOthers, first_owner, kOwners<A>);
    {
      A sum[kCount][kPer];
      joint_densities<kRows, kSlab<A>, kSweepOthers>(b, e, first_owner, first_other, stage, sum);
#pragma unroll
      for (int o = 0; o < kCount; ++o) {
#pragma unroll
        for (int r = 0; r < kPer; ++r) {
          const int local = warp * kCount + o;
          const int64_t owner = first_owner + lane + kWarp * r, other = first_other + local;
          const int64_t row = kRows ? owner : other, column = kRows ? other : owner;
          const A log = sum[o][r] + w.of(near, row, column);
          joint[local][lane + kWarp * r] = to_joint * quick_exponential(log - b.log_joint[e * b.padded + row]);
        }
      }
    }
    if (first_quad + kSlab<A> < b.quads) {
      stage_others<!kRows, kPitch>(b, e, first_quad, quads, first_other, kSweepOthers, kOtherFields, stage);
    } else {
      __syncthreads();  // the block's own quads are the last ones staged
    }
    if (share < shares) {
#pragma unroll 1
      for (int local = share; local < kSweepOthers; local += shares) {
        Quad<A> other[kFields];
#pragma unroll
        for (int f = 0; f < kOtherFields; ++f) other[f] = stage[f * kPitch + own_quad * kSweepOthers + local];
#pragma unroll
        for (int r = 0; r < kPer; ++r) {
          const int64_t owner = first_owner + lane + kWarp * r, other_sample = first_other + local;
          const A weight = kRows ? w.of(near, owner, other_sample) : w.of(near, other_sample, owner);
          const A share_of_joint = joint[local][lane + kWarp * r];
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            const Density<A> d = density<kRows>(own[r], other, v);
            const A log_marginal = kRows ? own[r][1].value[v] : other[1].value[v];
            const A dl = share_of_joint + to_marginals * quick_exponential(d.log + weight - log_marginal);
            result[r][0].value[v] += dl * d.pull;
            if constexpr (!kRows) result[r][1].value[v] += dl * (d.square - A(0.5));
          }
        }
      }
    }
  }

  // Adds up the shares of each quad.
#pragma unroll
  for (int i = 0; i < kResults; ++i) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kPer; ++r) stage[warp * kOwners<A> + lane + kWarp * r] = result[r][i];
    __syncthreads();
    for (int t = threadIdx.x; t < quads * kOwners<A>; t += kSweepThreads) {
      const int quad = t / kOwners<A>, owner = t % kOwners<A>;
      Quad<A> total = stage[t];
      for (int other_share = 1; other_share < shares; ++other_share) {
        const Quad<A>& added = stage[(other_share * quads + quad) * kOwners<A> + owner];
#pragma unroll
        for (int v = 0; v < kQuad; ++v) total.value[v] += added.value[v];
      }
      A* target = partial + (piece * kResults + i) * b.size() + b.index(e, first_quad + quad, first_owner + owner);
      store_global<kQuad>(target, total, 0, kQuad, true);
    }
  }
}

// Adds up the pieces, and what comes through log q(z_i|x_i) and log p(z_i). A thread per element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish(Batch<Accumulate<T>> b, const Accumulate<T>* grad, const Accumulate<T>* of_rows,
           const Accumulate<T>* of_columns, int64_t pieces, T* dz, T* dmean, T* dlogvar) {
  using A = Accumulate<T>;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, per_episode = b.batch * b.latents;
  if (i >= b.episodes * per_episode) return;
  const int64_t e = i / per_episode, sample = i / b.latents % b.batch, k = i % b.latents;
  const int64_t index = b.index(e, k / kQuad, sample) + k % kQuad;
  A row = 0, column = 0, scale = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    row += of_rows[piece * b.size() + index];
    column += of_columns[2 * piece * b.size() + index];
    scale += of_columns[(2 * piece + 1) * b.size() + index];
  }
  const A to_posterior = grad[e] / A(b.batch), to_prior = grad[2 * b.episodes + e] / A(b.batch);
  const A z = b.z[index], deviation = z - b.mean[index], pull = deviation * b.half_precision[index];
  dz[i] = narrow<T>(to_prior * z - 2 * (row + to_posterior * pull));
  dmean[i] = narrow<T>(2 * (column + to_posterior * pull));
  dlogvar[i] = narrow<T>(scale + to_posterior * (deviation * pull - A(0.5)));
}

// ------------------------------------------------------------------------------------------------ launches

template <typename T>
struct Inputs {
  const T *z, *mean, *logvar;  // [episodes, batch, latents]
  int64_t episodes, batch, latents;
};

template <typename T>
struct Outputs {
  Accumulate<T>* term[3];  // mutual information, total correlation, dimension-wise divergence: [episodes]
  Accumulate<T>*log_joint, *log_marginals;
};

// The terms as one array [3, episodes].
template <typename A>
struct TermPointers {
  A* term[3];
  int64_t episodes;

  __device__ __forceinline__ A& operator[](int64_t i) const { return term[i / episodes][i % episodes]; }
};

template <typename A>
Batch<A> make_batch(int64_t episodes, int64_t batch, int64_t latents) {
  Batch<A> b{};
  b.episodes = episodes;
  b.batch = batch;
  b.latents = latents;
  b.quads = greatest(1, ceil_div(latents, kQuad));
  b.padded = ceil_div(batch, kPadding) * kPadding;
  return b;
}

// Gives the arrays of the batch their places in `scratch`, and returns what follows them.
template <typename A>
A* place(Batch<A>& b, bool backward, A* scratch) {
  const auto take = [&scratch](int64_t elements) {
    A* taken = scratch;
    scratch += elements;
    return taken;
  };
  b.z = take(b.size());
  b.mean = take(b.size());
  b.half_precision = take(b.size());
  b.constant = take(b.size());
  if (backward) {
    b.log_marginals = take(b.size());
    b.log_joint = take(b.episodes * b.padded);
  }
  return scratch;
}

template <typename T, typename A>
void launch_prepare(const Inputs<T>& in, const Batch<A>& b, const A* log_joint, const A* log_marginals,
                    cudaStream_t stream) {
  launch("total_correlation prepare", prepare<T>, ceil_div(b.size() / kQuad, kThreads), kThreads, 0, stream, in.z,
         in.mean, in.logvar, log_joint, log_marginals, b);
}

inline int term_team(int64_t latents) { return power_of_two(latents, 1, kWarp); }

// Blocks of one episode that add up terms.
inline int64_t term_blocks(int64_t batch, int64_t latents) {
  constexpr int64_t kMost = 128;
  return least(kMost, ceil_div(batch, kThreads / term_team(latents)));
}

template <typename A>
int64_t forward_scratch(int64_t episodes, int64_t batch, int64_t latents) {
  return 4 * make_batch<A>(episodes, batch, latents).size() + 3 * episodes * term_blocks(batch, latents);
}

// Episodes and batch are not 0; `scratch` has forward_scratch(...) elements and starts on a 16-byte boundary.
template <typename T>
void forward(const Inputs<T>& in, const Outputs<T>& out, int64_t dataset_size, int estimator, Accumulate<T>* scratch,
             cudaStream_t stream) {
  using A = Accumulate<T>;
  const LogWeights<A> w = log_weights<A>(in.batch, dataset_size, estimator);
  Batch<A> b = make_batch<A>(in.episodes, in.batch, in.latents);
  A* partial = place(b, false, scratch);
  launch_prepare<T, A>(in, b, nullptr, nullptr, stream);
  launch("total_correlation log_sums", log_sums<A>, in.episodes * ceil_div(in.batch, kOwners<A>) * (b.quads + 1),
         kThreads, 0, stream, b, w, out.log_joint, out.log_marginals);
  const int64_t blocks = term_blocks(in.batch, in.latents);
  launch("total_correlation term_sums", term_sums<A>, in.episodes * blocks, kThreads, 0, stream, b, out.log_joint,
         out.log_marginals, partial, blocks, term_team(in.latents));
  const TermPointers<A> terms{{out.term[0], out.term[1], out.term[2]}, in.episodes};
  sums::launch_merge<A>("total_correlation merge", partial, terms, 3 * in.episodes, blocks, 1, A(in.batch), stream);
}

template <typename A>
int64_t backward_scratch(int64_t episodes, int64_t batch, int64_t latents, const Device& device) {
  const Batch<A> b = make_batch<A>(episodes, batch, latents);
  return (5 + 3 * plan_sweep<A>(episodes, batch, b.quads, device).pieces) * b.size() + episodes * b.padded;
}

// grad is [3, episodes], the gradients [episodes, batch, latents], none of them empty; `scratch` has
// backward_scratch(...) elements and starts on a 16-byte boundary.
template <typename T>
void backward(const Inputs<T>& in, const Accumulate<T>* grad, const Accumulate<T>* log_joint,
              const Accumulate<T>* log_marginals, int64_t dataset_size, int estimator, T* dz, T* dmean, T* dlogvar,
              Accumulate<T>* scratch, const Device& device, cudaStream_t stream) {
  using A = Accumulate<T>;
  const LogWeights<A> w = log_weights<A>(in.batch, dataset_size, estimator);
  Batch<A> b = make_batch<A>(in.episodes, in.batch, in.latents);
  A* of_rows = place(b, true, scratch);
  const SweepPlan plan = plan_sweep<A>(in.episodes, in.batch, b.quads, device);
  A* of_columns = of_rows + plan.pieces * b.size();
  launch_prepare<T, A>(in, b, log_joint, log_marginals, stream);
  const int64_t blocks = in.episodes * plan.tiles * plan.pieces * plan.slabs;
  launch("total_correlation sweep of rows", sweep<A, true>, blocks, kSweepThreads, 0, stream, b, w, grad, plan,
         of_rows);
  launch("total_correlation sweep of columns", sweep<A, false>, blocks, kSweepThreads, 0, stream, b, w, grad, plan,
         of_columns);
  launch("total_correlation finish", finish<T>, ceil_div(in.episodes * in.batch * in.latents, kThreads), kThreads, 0,
         stream, b, grad, of_rows, of_columns, plan.pieces, dz, dmean, dlogvar);
}

}  // namespace fastdis::total_correlation

#ifndef FASTDIS_HOST_EMULATION

#include <limits>
#include <tuple>

namespace fastdis::total_correlation {
namespace {

using torch::stable::accelerator::DeviceGuard;

// z, mean and logvar, checked and contiguous.
struct InputTensors {
  Tensor z, mean, logvar;

  InputTensors(const Tensor& z_, const Tensor& mean_, const Tensor& logvar_)
      : z(torch::stable::contiguous(z_)),
        mean(torch::stable::contiguous(mean_)),
        logvar(torch::stable::contiguous(logvar_)) {
    STD_TORCH_CHECK(z.dim() == 2 || z.dim() == 3, "total_correlation: z must be [B, K] or [E, B, K]");
    for (const Tensor* other : {&mean, &logvar}) {
      STD_TORCH_CHECK(other->numel() == z.numel() && other->dim() == z.dim() && other->size(-1) == z.size(-1) &&
                          other->size(-2) == z.size(-2) && other->scalar_type() == z.scalar_type(),
                      "total_correlation: mean and logvar must be like z");
    }
  }

  int64_t episodes() const { return z.dim() == 3 ? z.size(0) : 1; }
  int64_t batch() const { return z.size(-2); }
  int64_t latents() const { return z.size(-1); }
  ScalarType statistics() const { return accumulate_dtype(z.scalar_type()); }
  Tensor empty(const std::vector<int64_t>& size) const { return torch::stable::new_empty(z, size, statistics()); }
  Tensor scratch(int64_t elements) const { return empty(std::vector<int64_t>{elements}); }

  // The sizes of z without the last `dropped`.
  std::vector<int64_t> leading(int64_t dropped) const {
    return std::vector<int64_t>(z.sizes().begin(), z.sizes().end() - dropped);
  }

  template <typename T>
  Inputs<T> inputs() const {
    return {input<T>(z), input<T>(mean), input<T>(logvar), episodes(), batch(), latents()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& z, const Tensor& mean,
                                                                const Tensor& logvar, int64_t dataset_size,
                                                                int64_t estimator) {
  const DeviceGuard guard(z.get_device_index());
  const InputTensors tensors(z, mean, logvar);
  std::vector<Tensor> term;
  for (int i = 0; i < 3; ++i) term.push_back(tensors.empty(tensors.leading(2)));
  const Tensor log_joint = tensors.empty(tensors.leading(1)), log_marginals = tensors.empty(tensors.leading(0));
  if (log_joint.numel() == 0) {
    for (Tensor& mean_of_none : term) torch::stable::fill_(mean_of_none, std::numeric_limits<double>::quiet_NaN());
  } else {
    dispatch("total_correlation", z.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Outputs<T> out{
          {output<A>(term[0]), output<A>(term[1]), output<A>(term[2])}, output<A>(log_joint), output<A>(log_marginals)};
      const Tensor scratch =
          tensors.scratch(forward_scratch<A>(tensors.episodes(), tensors.batch(), tensors.latents()));
      forward<T>(tensors.inputs<T>(), out, dataset_size, static_cast<int>(estimator), output<A>(scratch),
                 current_stream(z));
    });
  }
  return {term[0], term[1], term[2], log_joint, log_marginals};
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_, const Tensor& z, const Tensor& mean,
                                                 const Tensor& logvar, const Tensor& log_joint_,
                                                 const Tensor& log_marginals_, int64_t dataset_size,
                                                 int64_t estimator) {
  const DeviceGuard guard(z.get_device_index());
  const InputTensors tensors(z, mean, logvar);
  const Tensor grad = torch::stable::contiguous(grad_), log_joint = torch::stable::contiguous(log_joint_);
  const Tensor log_marginals = torch::stable::contiguous(log_marginals_);
  for (const Tensor* statistic : {&grad, &log_joint, &log_marginals}) {
    STD_TORCH_CHECK(statistic->scalar_type() == tensors.statistics(),
                    "total_correlation: grad, log_joint and log_marginals must have the statistics dtype");
  }
  STD_TORCH_CHECK(grad.numel() == 3 * tensors.episodes() && log_marginals.numel() == tensors.z.numel() &&
                      log_joint.numel() == tensors.episodes() * tensors.batch(),
                  "total_correlation: grad must be [3] or [3, E], log_joint and log_marginals as forward gave them");
  const auto gradient = [&] { return torch::stable::new_empty(tensors.z, tensors.z.sizes()); };
  const Tensor dz = gradient(), dmean = gradient(), dlogvar = gradient();
  if (dz.numel() == 0) return {dz, dmean, dlogvar};
  dispatch("total_correlation", z.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Device device = device_of(z.get_device_index());
    const Tensor scratch =
        tensors.scratch(backward_scratch<A>(tensors.episodes(), tensors.batch(), tensors.latents(), device));
    backward<T>(tensors.inputs<T>(), input<A>(grad), input<A>(log_joint), input<A>(log_marginals), dataset_size,
                static_cast<int>(estimator), output<T>(dz), output<T>(dmean), output<T>(dlogvar), output<A>(scratch),
                device, current_stream(z));
  });
  return {dz, dmean, dlogvar};
}

}  // namespace
}  // namespace fastdis::total_correlation

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("total_correlation_forward", TORCH_BOX(&fastdis::total_correlation::forward_cuda));
  m.impl("total_correlation_backward", TORCH_BOX(&fastdis::total_correlation::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
