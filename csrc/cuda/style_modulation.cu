// style_modulation on CUDA: y = act(gamma * x_hat + beta), gamma = weight * scale, beta = bias * scale + shift.
//
// Memory bound. Where a normalised group fits in shared memory (channels first), one block reads it once and writes it
// once. Otherwise each channel is cut into pieces: one kernel reduces every piece, one merges the pieces (count, mean,
// M2 after Chan), one applies; the applying kernel goes backwards, so that it finds what was read last in the L2 cache.
// Without normalisation only the applying kernel runs. Nothing uses atomics: results repeat bit by bit.

#include "common.cuh"

namespace fastdis::style_modulation {

enum Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3 };

struct Shape {
  int64_t batch, channels, spatial;
  int64_t groups;  // 0: no normalisation
  bool channels_last;
};

// What turns x into t. mean and rstd are [batch, groups], unread where groups == 0; weight and bias may be null.
template <typename A>
struct Modulation {
  const A *scale, *shift, *weight, *bias, *mean, *rstd;
  int64_t channels, groups;
  int activation;
  A negative_slope;
};

template <typename T>
struct Forward {
  const T* x;
  T* y;
  Accumulate<T>*mean, *rstd;
  Modulation<Accumulate<T>> modulation;
  Accumulate<T> eps;
};

template <typename T>
struct Backward {
  const T *dy, *x;
  T* dx;
  Accumulate<T>*dscale, *dshift, *dweight, *dbias;  // the last two null where there is no weight or bias
  Modulation<Accumulate<T>> modulation;
};

// How the positions of x are dealt out. Channels first: `team` threads share one piece of one channel. Channels last:
// `team` threads stand side by side along the channels, a pack each, and the block's rows of threads share the piece.
struct Split {
  int64_t batch, channels, spatial;
  int64_t pieces, piece;  // each channel's positions in `pieces` pieces of `piece`, the last one shorter
  int team;
  bool aligned;  // whole packs may be moved by 16-byte accesses
};

struct Plan {
  bool resident;    // a group per block, in shared memory
  int threads;      // of a resident block
  int team;         // threads that share a channel in a resident block
  int64_t shared;   // dynamic bytes of a resident block
  Split split;      // where not resident
  int64_t blocks;   // of the kernels that walk over x
  int64_t scratch;  // elements of the statistics dtype
};

constexpr int kThreads = 256;
constexpr int kMaxResidentThreads = 512;
constexpr int kBatch = 4;  // packs a thread loads before it uses the first

// ------------------------------------------------------------------------------------------ device functions

// x_hat = (x - mean) * rstd and t = gamma * x_hat + beta for one channel of one sample.
template <typename A>
struct Channel {
  A mean = 0, rstd = 1, gamma = 1, beta = 0;

  Channel() = default;
  __device__ Channel(const Modulation<A>& m, int64_t b, int64_t c) {
    if (m.groups > 0) {
      const int64_t group = b * m.groups + c / (m.channels / m.groups);
      mean = m.mean[group];
      rstd = m.rstd[group];
    }
    modulate(m, b, c);
  }
  __device__ Channel(const Modulation<A>& m, int64_t b, int64_t c, A mean, A rstd) : mean(mean), rstd(rstd) {
    modulate(m, b, c);
  }

  __device__ __forceinline__ void modulate(const Modulation<A>& m, int64_t b, int64_t c) {
    const A scale = m.scale[b * m.channels + c];
    gamma = m.weight ? m.weight[c] * scale : scale;
    beta = (m.bias ? m.bias[c] * scale : A(0)) + m.shift[b * m.channels + c];
  }

  __device__ __forceinline__ A normalized(A x) const { return (x - mean) * rstd; }
  __device__ __forceinline__ A modulated(A x_hat) const { return gamma * x_hat + beta; }
};

// The comparisons let NaN through, as torch's do.
template <typename A>
__device__ __forceinline__ A activate(A t, const Modulation<A>& m) {
  switch (m.activation) {
    case kRelu:
      return t <= 0 ? A(0) : t;
    case kLeakyRelu:
      return t > 0 ? t : t * m.negative_slope;
    case kSilu:
      return t / (1 + exponential(-t));
    default:
      return t;
  }
}

// act'(t) * dy
template <typename A>
__device__ __forceinline__ A activation_gradient(A t, A dy, const Modulation<A>& m) {
  switch (m.activation) {
    case kRelu:
      return t <= 0 ? A(0) : dy;
    case kLeakyRelu:
      return t > 0 ? dy : dy * m.negative_slope;
    case kSilu: {
      const A sigmoid = 1 / (1 + exponential(-t));
      return dy * sigmoid * (1 + t * (1 - sigmoid));
    }
    default:
      return dy;
  }
}

// Count, mean and sum of squared deviations; the values start at none seen.
template <typename A>
struct Moments {
  A count, mean, m2;
};

// a / b for counts: two ulp, which the merging below does not notice, and no call into the slow path of a division.
__device__ __forceinline__ float ratio(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double ratio(double a, double b) { return a / b; }

template <typename A>
__device__ __forceinline__ Moments<A> combine(const Moments<A>& a, const Moments<A>& b) {
  const A count = a.count + b.count;
  if (count == 0) return a;
  const A delta = b.mean - a.mean, share = ratio(b.count, count);
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

template <typename A>
__device__ __forceinline__ Moments<A> shuffle_down(const Moments<A>& m, int offset) {
  using fastdis::shuffle_down;
  return {shuffle_down(m.count, offset), shuffle_down(m.mean, offset), shuffle_down(m.m2, offset)};
}

// Adds the values whose flag is set (all of them where kAll): two passes over registers, one division.
template <bool kAll, typename A, int N>
__device__ __forceinline__ void accumulate(Moments<A>& m, const A (&value)[N], const bool (&valid)[N]) {
  A count = 0, sum = 0, m2 = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kAll || valid[i]) {
      count += 1;
      sum += value[i];
    }
  }
  if (count == 0) return;
  const A mean = ratio(sum, count);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (kAll || valid[i]) m2 += (value[i] - mean) * (value[i] - mean);
  }
  m = combine(m, {count, mean, m2});
}

// dgamma = sum dt * x_hat and dbeta = sum dt.
template <typename A>
struct Sums {
  A gamma, beta;
};

template <typename A>
__device__ __forceinline__ Sums<A> combine(const Sums<A>& a, const Sums<A>& b) {
  return {a.gamma + b.gamma, a.beta + b.beta};
}

template <typename A>
__device__ __forceinline__ Sums<A> shuffle_down(const Sums<A>& s, int offset) {
  using fastdis::shuffle_down;
  return {shuffle_down(s.gamma, offset), shuffle_down(s.beta, offset)};
}

// dscale, dshift and dgamma of one channel of one sample. With dgamma and dbeta known:
// dscale = dgamma * weight + dbeta * bias, dshift = dbeta.
template <typename A>
__device__ __forceinline__ void store_gradients(const Modulation<A>& m, int64_t b, int64_t c, const Sums<A>& sums,
                                                A* dscale, A* dshift, A* dgamma) {
  const int64_t index = b * m.channels + c;
  dscale[index] = sums.gamma * (m.weight ? m.weight[c] : A(1)) + (m.bias ? sums.beta * m.bias[c] : A(0));
  dshift[index] = sums.beta;
  dgamma[index] = sums.gamma;
}

// The packs of x one thread visits: at element offsets offset, offset + stride, ... < end, of which the elements
// first(o) <= i < last(o) are its own. Element i of a pack belongs to channel c (channels first) or c + i.
template <typename T, bool kLast>
struct Walk {
  int64_t b, c, piece, channels;
  int64_t begin, offset, stride, end;
  bool active;  // has anything to visit
  bool leads;   // gets what column_reduce (channels last) or team_reduce (channels first) returns

  __device__ Walk(const Split& s, int64_t block) : channels(s.channels) {
    constexpr int kLanes = kPack<T>;
    const int rank = threadIdx.x % s.team, row = threadIdx.x / s.team, rows = blockDim.x / s.team;
    if constexpr (kLast) {
      const int64_t tiles = ceil_div(ceil_div(channels, kLanes), s.team);
      c = (block % tiles * s.team + rank) * kLanes;
      piece = block / tiles % s.pieces;
      b = block / tiles / s.pieces;
      active = c < channels;
      leads = active && row == 0;
      begin = 0;
      offset = (b * s.spatial + piece * s.piece + row) * channels + c;
      stride = rows * channels;
      end = active ? (b * s.spatial + least(s.spatial, (piece + 1) * s.piece)) * channels : offset;
    } else {
      const int64_t unit = block * rows + row, channel = unit / s.pieces;
      piece = unit % s.pieces;
      b = channel / channels;
      c = channel % channels;
      active = b < s.batch;
      begin = channel * s.spatial + piece * s.piece;
      end = active ? channel * s.spatial + least(s.spatial, (piece + 1) * s.piece) : begin;
      leads = active && rank == 0;
      offset = begin / kLanes * kLanes + rank * kLanes;
      stride = s.team * kLanes;
    }
  }

  __device__ __forceinline__ int64_t first(int64_t o) const { return kLast ? 0 : begin - o; }
  __device__ __forceinline__ int64_t last(int64_t o) const { return kLast ? (o < end ? channels - c : 0) : end - o; }
};

// [batch, pieces, channels, 2]
__device__ __forceinline__ int64_t partial_index(const Split& s, int64_t b, int64_t piece, int64_t c) {
  return ((b * s.pieces + piece) * s.channels + c) * 2;
}

// Moments of the elements begin <= i < end of x, which start in the pack at `offset` for this thread. Every pack read
// is also written to `cache`, whose first pack is the one at `cache_offset`, unless cache is null.
template <typename T>
__device__ Moments<Accumulate<T>> span_moments(const T* x, int64_t begin, int64_t end, int64_t offset, int64_t stride,
                                               bool aligned, T* cache, int64_t cache_offset) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>, kPacks = kLanes > kBatch ? kBatch / 2 : kBatch;  // more would spill
  Moments<A> moments{0, 0, 0};
  for (int64_t o = offset; o < end; o += kPacks * stride) {
    Pack<T, kLanes> pack[kPacks];
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int64_t at = o + u * stride;
      pack[u] = load_pack<kLanes>(x + at, begin - at, end - at, aligned);
    }
    A value[kPacks * kLanes];
    bool valid[kPacks * kLanes];
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int64_t at = o + u * stride;
      if (cache != nullptr && at < end) {
        store_pack<kLanes>(cache + (at - cache_offset), pack[u], 0, kLanes, true);
      }
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        value[u * kLanes + i] = widen(pack[u].value[i]);
        valid[u * kLanes + i] = at + i >= begin && at + i < end;
      }
    }
    if (o >= begin && o + (kPacks - 1) * stride + kLanes <= end) {
      accumulate<true>(moments, value, valid);
    } else {
      accumulate<false>(moments, value, valid);
    }
  }
  return moments;
}

// ---------------------------------------------------------------------------------------- forward kernels

// One block per (b, group): the group stays in shared memory between its statistics and its output.
template <typename T>
__global__ void __launch_bounds__(kMaxResidentThreads)
    forward_resident(Forward<T> f, int64_t spatial, int team, bool aligned) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>;
  __shared__ Moments<A> shared[kMaxResidentThreads / kWarp];
  __shared__ A statistics[2];
  T* cache = dynamic_shared<T>();

  const Modulation<A>& m = f.modulation;
  const int64_t per_group = m.channels / m.groups, count = per_group * spatial;
  const int64_t begin = blockIdx.x * count, end = begin + count, cache_offset = begin / kLanes * kLanes;
  const Moments<A> moments = team_reduce(span_moments(f.x, begin, end, cache_offset + threadIdx.x * kLanes,
                                                      int64_t{blockDim.x} * kLanes, aligned, cache, cache_offset),
                                         blockDim.x, shared);
  if (threadIdx.x == 0) {
    statistics[0] = f.mean[blockIdx.x] = moments.mean;
    statistics[1] = f.rstd[blockIdx.x] = 1 / square_root(moments.m2 / A(count) + f.eps);
  }
  __syncthreads();  // the cache and the statistics are complete

  const int64_t b = blockIdx.x / m.groups, first_channel = blockIdx.x % m.groups * per_group;
  for (int64_t local = threadIdx.x / team; local < per_group; local += blockDim.x / team) {
    const Channel<A> channel(m, b, first_channel + local, statistics[0], statistics[1]);
    const int64_t row = begin + local * spatial, row_end = row + spatial;
    for (int64_t o = row / kLanes * kLanes + threadIdx.x % team * kLanes; o < row_end; o += team * kLanes) {
      Pack<T, kLanes> pack = load_pack<kLanes>(cache + (o - cache_offset), 0, kLanes, true);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const A t = channel.modulated(channel.normalized(widen(pack.value[i])));
        pack.value[i] = narrow<T>(activate(t, m));
      }
      store_global<kLanes>(f.y + o, pack, row - o, row_end - o, aligned);
    }
  }
}

// Mean and M2 of each piece of each channel.
template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads) piece_moments(const T* x, Accumulate<T>* partial, Split s) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>;
  __shared__ Moments<A> shared[kThreads];
  const Walk<T, kLast> walk(s, blockIdx.x);
  if constexpr (kLast) {
    A mean[kLanes] = {}, m2[kLanes] = {}, count = 0;  // every lane has seen as many rows
    for (int64_t o = walk.offset; o < walk.end; o += kBatch * walk.stride) {
      Pack<T, kLanes> pack[kBatch];
      A valid[kBatch], rows = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int64_t at = o + u * walk.stride;
        valid[u] = at < walk.end ? 1 : 0;
        rows += valid[u];
        pack[u] = load_pack<kLanes>(x + at, walk.first(at), walk.last(at), s.aligned);
      }
      const A inverse = ratio(A(1), rows), share = ratio(rows, count + rows), weight = count * share;
      count += rows;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        A sum = 0, squares = 0;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) sum += widen(pack[u].value[i]);
        const A batch_mean = sum * inverse, delta = batch_mean - mean[i];
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          const A deviation = widen(pack[u].value[i]) - batch_mean;
          squares += valid[u] * deviation * deviation;
        }
        mean[i] += delta * share;
        m2[i] += squares + delta * delta * weight;
      }
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const Moments<A> total = column_reduce(Moments<A>{count, mean[i], m2[i]}, s.team, shared);
      if (walk.leads && walk.c + i < s.channels) {
        A* target = partial + partial_index(s, walk.b, walk.piece, walk.c + i);
        target[0] = total.mean;
        target[1] = total.m2;
      }
    }
  } else {
    const Moments<A> total = team_reduce(
        span_moments<T>(x, walk.begin, walk.end, walk.offset, walk.stride, s.aligned, nullptr, 0), s.team, shared);
    if (walk.leads) {
      A* target = partial + partial_index(s, walk.b, walk.piece, walk.c);
      target[0] = total.mean;
      target[1] = total.m2;
    }
  }
}

// mean and rstd of each (b, group) from the moments of its pieces; `team` threads per group.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    merge_moments(const A* partial, A* mean, A* rstd, Split s, int64_t groups, int team, A eps) {
  __shared__ Moments<A> shared[kThreads / kWarp];
  const int64_t group = int64_t{blockIdx.x} * (blockDim.x / team) + threadIdx.x / team;
  const bool active = group < s.batch * groups;
  const int64_t per_group = s.channels / groups, b = group / groups, first_channel = group % groups * per_group;
  Moments<A> moments{0, 0, 0};
  for (int64_t i = threadIdx.x % team; active && i < per_group * s.pieces; i += team) {
    const int64_t piece = i / per_group;
    const A* source = partial + partial_index(s, b, piece, first_channel + i % per_group);
    const A count = A(least(s.piece, s.spatial - piece * s.piece));
    moments = combine(moments, {count, source[0], source[1]});
  }
  moments = team_reduce(moments, team, shared);
  if (threadIdx.x % team == 0 && active) {
    mean[group] = moments.mean;
    rstd[group] = 1 / square_root(moments.m2 / A(per_group * s.spatial) + eps);
  }
}

template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads) apply(const T* x, T* y, Modulation<Accumulate<T>> m, Split s) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>, kChannels = kLast ? kLanes : 1;
  const Walk<T, kLast> walk(s, gridDim.x - 1 - blockIdx.x);
  if (!walk.active) return;
  Channel<A> channel[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (walk.c + i < s.channels) channel[i] = Channel<A>(m, walk.b, walk.c + i);
  }
  for (int64_t o = walk.offset; o < walk.end; o += kBatch * walk.stride) {
    Pack<T, kLanes> pack[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t at = o + u * walk.stride;
      pack[u] = load_pack<kLanes>(x + at, walk.first(at), walk.last(at), s.aligned);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t at = o + u * walk.stride;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const Channel<A>& own = channel[kLast ? i : 0];
        pack[u].value[i] = narrow<T>(activate(own.modulated(own.normalized(widen(pack[u].value[i]))), m));
      }
      store_global<kLanes>(y + at, pack[u], walk.first(at), walk.last(at), s.aligned);
    }
  }
}

// --------------------------------------------------------------------------------------- backward kernels

// dt and x_hat of one element.
template <typename A>
struct Element {
  A x_hat, dt;
  __device__ __forceinline__ Element(const Channel<A>& channel, const Modulation<A>& m, A x, A dy)
      : x_hat(channel.normalized(x)), dt(activation_gradient(channel.modulated(x_hat), dy, m)) {}
};

// One block per (b, group): x and dy stay in shared memory between the sums and dx.
template <typename T>
__global__ void __launch_bounds__(kMaxResidentThreads)
    backward_resident(Backward<T> f, Accumulate<T>* dgamma, int64_t spatial, int team, bool aligned) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>;
  __shared__ Sums<A> shared[kMaxResidentThreads / kWarp];
  __shared__ Sums<A> group_mean;

  const Modulation<A>& m = f.modulation;
  const int64_t per_group = m.channels / m.groups, count = per_group * spatial;
  const int64_t begin = blockIdx.x * count, end = begin + count, cache_offset = begin / kLanes * kLanes;
  const int64_t cache_size = ceil_div(end - cache_offset, kLanes) * kLanes;
  T* x_cache = dynamic_shared<T>();
  T* dy_cache = x_cache + cache_size;
  for (int64_t o = cache_offset + threadIdx.x * kLanes; o < end; o += int64_t{blockDim.x} * kLanes) {
    const auto x = load_pack<kLanes>(f.x + o, begin - o, end - o, aligned);
    const auto dy = load_pack<kLanes>(f.dy + o, begin - o, end - o, aligned);
    store_pack<kLanes>(x_cache + (o - cache_offset), x, 0, kLanes, true);
    store_pack<kLanes>(dy_cache + (o - cache_offset), dy, 0, kLanes, true);
  }
  __syncthreads();

  // Per channel dgamma and dbeta; over the group the sums of gamma * dt * x_hat and gamma * dt.
  const int64_t b = blockIdx.x / m.groups, first_channel = blockIdx.x % m.groups * per_group;
  const A mean = m.mean[blockIdx.x], rstd = m.rstd[blockIdx.x];
  const int teams = blockDim.x / team;
  Sums<A> group_sum{0, 0};
  for (int64_t base = 0; base < per_group; base += teams) {
    const int64_t local = base + threadIdx.x / team;
    Sums<A> sums{0, 0};
    Channel<A> channel;
    if (local < per_group) {
      channel = Channel<A>(m, b, first_channel + local, mean, rstd);
      const int64_t row = begin + local * spatial, row_end = row + spatial;
      for (int64_t o = row / kLanes * kLanes + threadIdx.x % team * kLanes; o < row_end; o += team * kLanes) {
        const auto x = load_pack<kLanes>(x_cache + (o - cache_offset), 0, kLanes, true);
        const auto dy = load_pack<kLanes>(dy_cache + (o - cache_offset), 0, kLanes, true);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (o + i < row || o + i >= row_end) continue;
          const Element<A> element(channel, m, widen(x.value[i]), widen(dy.value[i]));
          sums.gamma += element.dt * element.x_hat;
          sums.beta += element.dt;
        }
      }
    }
    sums = team_reduce(sums, team, shared);
    if (threadIdx.x % team == 0 && local < per_group) {
      store_gradients(m, b, first_channel + local, sums, f.dscale, f.dshift, dgamma);
      group_sum = combine(group_sum, {channel.gamma * sums.gamma, channel.gamma * sums.beta});
    }
  }
  group_sum = team_reduce(group_sum, blockDim.x, shared);
  if (threadIdx.x == 0) group_mean = {group_sum.gamma / A(count), group_sum.beta / A(count)};
  __syncthreads();

  for (int64_t local = threadIdx.x / team; local < per_group; local += teams) {
    const Channel<A> channel(m, b, first_channel + local, mean, rstd);
    const int64_t row = begin + local * spatial, row_end = row + spatial;
    for (int64_t o = row / kLanes * kLanes + threadIdx.x % team * kLanes; o < row_end; o += team * kLanes) {
      auto x = load_pack<kLanes>(x_cache + (o - cache_offset), 0, kLanes, true);
      const auto dy = load_pack<kLanes>(dy_cache + (o - cache_offset), 0, kLanes, true);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const Element<A> element(channel, m, widen(x.value[i]), widen(dy.value[i]));
        x.value[i] =
            narrow<T>(rstd * (channel.gamma * element.dt - group_mean.beta - element.x_hat * group_mean.gamma));
      }
      store_global<kLanes>(f.dx + o, x, row - o, row_end - o, aligned);
    }
  }
}

constexpr int kBackwardBatch = kBatch / 2;  // two arrays are read at once

// dgamma and dbeta of each piece of each channel; without normalisation dx = gamma * dt as well.
template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads) piece_sums(Backward<T> f, Accumulate<T>* partial, Split s) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>, kChannels = kLast ? kLanes : 1;
  __shared__ Sums<A> shared[kThreads];
  const Modulation<A>& m = f.modulation;
  const Walk<T, kLast> walk(s, blockIdx.x);
  Channel<A> channel[kChannels];
  Sums<A> sums[kChannels] = {};
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (walk.active && walk.c + i < s.channels) channel[i] = Channel<A>(m, walk.b, walk.c + i);
  }
  for (int64_t o = walk.offset; o < walk.end; o += kBackwardBatch * walk.stride) {
    Pack<T, kLanes> x[kBackwardBatch], dy[kBackwardBatch];
#pragma unroll
    for (int u = 0; u < kBackwardBatch; ++u) {
      const int64_t at = o + u * walk.stride;
      x[u] = load_pack<kLanes>(f.x + at, walk.first(at), walk.last(at), s.aligned);
      dy[u] = load_pack<kLanes>(f.dy + at, walk.first(at), walk.last(at), s.aligned);
    }
#pragma unroll
    for (int u = 0; u < kBackwardBatch; ++u) {
      const int64_t at = o + u * walk.stride, first = walk.first(at), last = walk.last(at);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const int own = kLast ? i : 0;
        const Element<A> element(channel[own], m, widen(x[u].value[i]), widen(dy[u].value[i]));
        if (i >= first && i < last) {
          sums[own].gamma += element.dt * element.x_hat;
          sums[own].beta += element.dt;
        }
        x[u].value[i] = narrow<T>(channel[own].gamma * element.dt);
      }
      if (m.groups == 0) store_global<kLanes>(f.dx + at, x[u], first, last, s.aligned);
    }
  }
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const Sums<A> total = kLast ? column_reduce(sums[i], s.team, shared) : team_reduce(sums[i], s.team, shared);
    if (walk.leads && walk.c + i < s.channels) {
      A* target = partial + partial_index(s, walk.b, walk.piece, walk.c + i);
      target[0] = total.gamma;
      target[1] = total.beta;
    }
  }
}

// From the sums of the pieces: dscale, dshift and dgamma of each channel, and, unless group_means is null, the means
// over each group of gamma * dt * x_hat and of gamma * dt. `team` threads per group; without normalisation `groups`
// is the number of channels.
template <typename A>
__global__ void __launch_bounds__(kThreads) merge_sums(const A* partial, Modulation<A> m, A* dscale, A* dshift,
                                                       A* dgamma, A* group_means, Split s, int64_t groups, int team) {
  __shared__ Sums<A> shared[kThreads / kWarp];
  const int64_t group = int64_t{blockIdx.x} * (blockDim.x / team) + threadIdx.x / team;
  const bool active = group < s.batch * groups;
  const int64_t per_group = s.channels / groups, b = group / groups, first_channel = group % groups * per_group;
  Sums<A> group_sum{0, 0};
  for (int64_t local = threadIdx.x % team; active && local < per_group; local += team) {
    const int64_t c = first_channel + local;
    Sums<A> sums{0, 0};
    for (int64_t piece = 0; piece < s.pieces; ++piece) {
      const A* source = partial + partial_index(s, b, piece, c);
      sums = combine(sums, {source[0], source[1]});
    }
    store_gradients(m, b, c, sums, dscale, dshift, dgamma);
    const A gamma = Channel<A>(m, b, c, 0, 1).gamma;
    group_sum = combine(group_sum, {gamma * sums.gamma, gamma * sums.beta});
  }
  group_sum = team_reduce(group_sum, team, shared);
  if (group_means != nullptr && active && threadIdx.x % team == 0) {
    const A count = A(per_group * s.spatial);
    group_means[group * 2] = group_sum.gamma / count;
    group_means[group * 2 + 1] = group_sum.beta / count;
  }
}

// dx = rstd * (gamma * dt - mean(gamma * dt) - x_hat * mean(gamma * dt * x_hat)), the means over the group.
template <typename T, bool kLast>
__global__ void __launch_bounds__(kThreads) input_gradient(Backward<T> f, const Accumulate<T>* group_means, Split s) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>, kChannels = kLast ? kLanes : 1;
  const Modulation<A>& m = f.modulation;
  const Walk<T, kLast> walk(s, gridDim.x - 1 - blockIdx.x);
  if (!walk.active) return;
  Channel<A> channel[kChannels];
  Sums<A> mean[kChannels] = {};
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (walk.c + i < s.channels) {
      channel[i] = Channel<A>(m, walk.b, walk.c + i);
      const A* source = group_means + (walk.b * m.groups + (walk.c + i) / (m.channels / m.groups)) * 2;
      mean[i] = {source[0], source[1]};
    }
  }
  for (int64_t o = walk.offset; o < walk.end; o += kBackwardBatch * walk.stride) {
    Pack<T, kLanes> x[kBackwardBatch], dy[kBackwardBatch];
#pragma unroll
    for (int u = 0; u < kBackwardBatch; ++u) {
      const int64_t at = o + u * walk.stride;
      x[u] = load_pack<kLanes>(f.x + at, walk.first(at), walk.last(at), s.aligned);
      dy[u] = load_pack<kLanes>(f.dy + at, walk.first(at), walk.last(at), s.aligned);
    }
#pragma unroll
    for (int u = 0; u < kBackwardBatch; ++u) {
      const int64_t at = o + u * walk.stride;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const int own = kLast ? i : 0;
        const Element<A> element(channel[own], m, widen(x[u].value[i]), widen(dy[u].value[i]));
        x[u].value[i] = narrow<T>(channel[own].rstd *
                                  (channel[own].gamma * element.dt - mean[own].beta - element.x_hat * mean[own].gamma));
      }
      store_global<kLanes>(f.dx + at, x[u], walk.first(at), walk.last(at), s.aligned);
    }
  }
}

// dweight = sum_b dgamma * scale and dbias = sum_b dbeta * scale; a warp's lanes stand along the channels.
template <typename A>
__global__ void __launch_bounds__(kThreads) parameter_gradients(const A* dgamma, const A* dbeta, const A* scale,
                                                                A* dweight, A* dbias, int64_t batch, int64_t channels) {
  __shared__ Sums<A> shared[kThreads];
  const int64_t c = int64_t{blockIdx.x} * kWarp + threadIdx.x % kWarp;
  Sums<A> sums{0, 0};
  for (int64_t b = threadIdx.x / kWarp; b < batch && c < channels; b += blockDim.x / kWarp) {
    const int64_t index = b * channels + c;
    sums.gamma += dgamma[index] * scale[index];
    sums.beta += dbeta[index] * scale[index];
  }
  sums = column_reduce(sums, kWarp, shared);
  if (threadIdx.x < kWarp && c < channels) {
    if (dweight != nullptr) dweight[c] = sums.gamma;
    if (dbias != nullptr) dbias[c] = sums.beta;
  }
}

// ----------------------------------------------------------------------------------------------- launches

template <typename T>
Plan make_plan(const Shape& shape, bool backward, bool aligned, const Device& device) {
  constexpr int kLanes = kPack<T>;
  const int64_t channels = shape.batch * shape.channels;
  Plan plan{};
  plan.scratch = backward ? channels : 0;  // dgamma

  if (shape.groups > 0 && !shape.channels_last) {
    const int64_t per_group = shape.channels / shape.groups, groups = shape.batch * shape.groups;
    const int64_t packs = per_group * shape.spatial / kLanes + 2;  // a group may start and end inside a pack
    plan.shared = packs * 16 * (backward ? 2 : 1);
    // A warp per tiny group wastes most of it, which costs once the blocks no longer run all at the same time.
    const bool worth_a_block = packs >= kWarp || groups <= 16 * device.multiprocessors;
    plan.resident = plan.shared <= device.shared && worth_a_block;
    if (plan.resident) {
      plan.threads = power_of_two(ceil_div(packs, 8), kWarp, kMaxResidentThreads);
      plan.team = power_of_two(ceil_div(ceil_div(shape.spatial, kLanes), kBatch), 1, plan.threads);
      plan.blocks = groups;
      return plan;
    }
  }

  Split& split = plan.split;
  split.batch = shape.batch;
  split.channels = shape.channels;
  split.spatial = shape.spatial;
  constexpr int64_t kMaxPieces = 128;  // one thread adds up a channel's pieces
  const int64_t wanted_blocks = 16 * device.multiprocessors;
  if (shape.channels_last) {
    const int64_t packs = ceil_div(shape.channels, kLanes);
    split.aligned = aligned && shape.channels % kLanes == 0;
    split.team = power_of_two(packs, 1, kWarp);
    const int64_t columns = shape.batch * ceil_div(packs, split.team);
    const int64_t most = ceil_div(shape.spatial, kThreads / split.team * kBatch);
    split.piece =
        ceil_div(shape.spatial, greatest(1, least(ceil_div(wanted_blocks, columns), least(most, kMaxPieces))));
    split.pieces = ceil_div(shape.spatial, split.piece);
    plan.blocks = columns * split.pieces;
  } else {
    split.aligned = aligned;
    constexpr int64_t kLeast = kThreads * kBatch * kLanes;  // elements that keep a block busy
    const int64_t wanted = least(ceil_div(wanted_blocks, channels), kMaxPieces);
    const int64_t pieces = greatest(1, least(wanted, ceil_div(shape.spatial, kLeast)));
    split.piece = ceil_div(ceil_div(shape.spatial, pieces), 64) * 64;
    split.pieces = ceil_div(shape.spatial, split.piece);
    const int64_t packs = ceil_div(least(split.piece, shape.spatial), kLanes);
    split.team = power_of_two(ceil_div(packs, kBatch), 1, kThreads);
    plan.blocks = ceil_div(channels * split.pieces, kThreads / split.team);
  }
  const int64_t partials = channels * split.pieces * 2;
  if (backward) {
    plan.scratch += partials + shape.batch * shape.groups * 2;
  } else if (shape.groups > 0) {
    plan.scratch += partials;
  }
  return plan;
}

template <typename T, bool kLast>
void forward_split(const Forward<T>& f, const Shape& shape, const Plan& plan, Accumulate<T>* scratch,
                   cudaStream_t stream) {
  using A = Accumulate<T>;
  const Split& split = plan.split;
  if (shape.groups > 0) {
    launch("style_modulation piece_moments", piece_moments<T, kLast>, plan.blocks, kThreads, 0, stream, f.x, scratch,
           split);
    const int team = power_of_two(shape.channels / shape.groups * split.pieces, 1, kThreads);
    launch("style_modulation merge_moments", merge_moments<A>, ceil_div(shape.batch * shape.groups, kThreads / team),
           kThreads, 0, stream, scratch, f.mean, f.rstd, split, shape.groups, team, f.eps);
  }
  launch("style_modulation apply", apply<T, kLast>, plan.blocks, kThreads, 0, stream, f.x, f.y, f.modulation, split);
}

// Fills y, mean and rstd; the shape has no zero. `scratch` has plan.scratch elements.
template <typename T>
void forward(const Forward<T>& f, const Shape& shape, const Plan& plan, Accumulate<T>* scratch, cudaStream_t stream) {
  if (plan.resident) {
    launch("style_modulation forward_resident", forward_resident<T>, plan.blocks, plan.threads, plan.shared, stream, f,
           shape.spatial, plan.team, aligned_to_packs(f.x, f.y));
  } else if (shape.channels_last) {
    forward_split<T, true>(f, shape, plan, scratch, stream);
  } else {
    forward_split<T, false>(f, shape, plan, scratch, stream);
  }
}

template <typename T, bool kLast>
void backward_split(const Backward<T>& f, const Shape& shape, const Plan& plan, Accumulate<T>* dgamma,
                    Accumulate<T>* partial, Accumulate<T>* group_means, cudaStream_t stream) {
  const Split& split = plan.split;
  const int64_t groups = shape.groups > 0 ? shape.groups : shape.channels;
  const int team = power_of_two(shape.channels / groups, 1, kThreads);
  launch("style_modulation piece_sums", piece_sums<T, kLast>, plan.blocks, kThreads, 0, stream, f, partial, split);
  launch("style_modulation merge_sums", merge_sums<Accumulate<T>>, ceil_div(shape.batch * groups, kThreads / team),
         kThreads, 0, stream, partial, f.modulation, f.dscale, f.dshift, dgamma,
         shape.groups > 0 ? group_means : nullptr, split, groups, team);
  if (shape.groups > 0) {
    launch("style_modulation input_gradient", input_gradient<T, kLast>, plan.blocks, kThreads, 0, stream, f,
           group_means, split);
  }
}

// Fills every gradient of `f`; the shape has no zero. `scratch` has plan.scratch elements.
template <typename T>
void backward(const Backward<T>& f, const Shape& shape, const Plan& plan, Accumulate<T>* scratch, cudaStream_t stream) {
  Accumulate<T>* dgamma = scratch;
  Accumulate<T>* group_means = dgamma + shape.batch * shape.channels;
  Accumulate<T>* partial = group_means + shape.batch * shape.groups * 2;
  if (plan.resident) {
    launch("style_modulation backward_resident", backward_resident<T>, plan.blocks, plan.threads, plan.shared, stream,
           f, dgamma, shape.spatial, plan.team, aligned_to_packs(f.x, f.dy, f.dx));
  } else if (shape.channels_last) {
    backward_split<T, true>(f, shape, plan, dgamma, partial, group_means, stream);
  } else {
    backward_split<T, false>(f, shape, plan, dgamma, partial, group_means, stream);
  }
  if (f.dweight != nullptr || f.dbias != nullptr) {
    launch("style_modulation parameter_gradients", parameter_gradients<Accumulate<T>>, ceil_div(shape.channels, kWarp),
           kThreads, 0, stream, dgamma, f.dshift, f.modulation.scale, f.dweight, f.dbias, shape.batch, shape.channels);
  }
}

}  // namespace fastdis::style_modulation

#ifndef FASTDIS_HOST_EMULATION

#include <optional>
#include <tuple>
#include <vector>

namespace fastdis::style_modulation {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Whether x.movedim(1, -1) is contiguous; strides of dimensions of size 1 do not count.
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto matches = [&](int64_t dim) {
    const bool match = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return match;
  };
  if (x.dim() < 3 || !matches(1)) return false;
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) {
    if (!matches(dim)) return false;
  }
  return matches(0);
}

// An uninitialised tensor of x's shape and dtype in the layout asked for.
Tensor empty_in_layout(const Tensor& x, const Shape& shape) {
  if (!shape.channels_last) return torch::stable::new_empty(x, x.sizes());
  const Tensor storage = torch::stable::new_empty(x, std::vector<int64_t>{shape.batch, shape.spatial, shape.channels});
  return torch::stable::view(torch::stable::transpose(storage, 1, 2), x.sizes());
}

// x in the layout its kernels read: as it is where it is contiguous or channels-last, else a contiguous copy.
std::tuple<Tensor, Shape> normalize_layout(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "style_modulation: x must be [B, C, *]");
  int64_t spatial = 1;
  for (int64_t dim = 2; dim < x.dim(); ++dim) spatial *= x.size(dim);
  STD_TORCH_CHECK(groups >= 0 && (groups == 0 || x.size(1) % groups == 0),
                  "style_modulation: groups must divide the channels");
  const bool channels_last = !x.is_contiguous() && is_channels_last(x);
  return {channels_last ? x : torch::stable::contiguous(x),
          Shape{x.size(0), x.size(1), spatial, groups, channels_last}};
}

Tensor to_layout(const Tensor& dy, const Tensor& x, const Shape& shape) {
  if (!shape.channels_last) return torch::stable::contiguous(dy);
  if (is_channels_last(dy)) return dy;
  Tensor copy = empty_in_layout(x, shape);
  return torch::stable::copy_(copy, dy);
}

// What a modulation reads, checked and contiguous.
struct Parameters {
  Tensor scale, shift;
  std::optional<Tensor> weight, bias;

  Parameters(const Tensor& x, const Tensor& scale_, const Tensor& shift_, const std::optional<Tensor>& weight_,
             const std::optional<Tensor>& bias_)
      : scale(checked(scale_, x, x.size(0) * x.size(1))), shift(checked(shift_, x, x.size(0) * x.size(1))) {
    if (weight_) weight = checked(*weight_, x, x.size(1));
    if (bias_) bias = checked(*bias_, x, x.size(1));
  }

  static Tensor checked(const Tensor& tensor, const Tensor& x, int64_t size) {
    STD_TORCH_CHECK(tensor.numel() == size && tensor.scalar_type() == accumulate_dtype(x.scalar_type()),
                    "style_modulation: scale and shift must be [B, C], weight and bias [C], in the statistics dtype");
    return torch::stable::contiguous(tensor);
  }

  template <typename A>
  Modulation<A> modulation(const Tensor& mean, const Tensor& rstd, const Shape& shape, int64_t activation,
                           double negative_slope) const {
    return {input<A>(scale),
            input<A>(shift),
            weight ? input<A>(*weight) : nullptr,
            bias ? input<A>(*bias) : nullptr,
            input<A>(mean),
            input<A>(rstd),
            shape.channels,
            shape.groups,
            static_cast<int>(activation),
            static_cast<A>(negative_slope)};
  }
};

Tensor scratch_for(const Plan& plan, const Tensor& x) {
  return torch::stable::new_empty(x, std::vector<int64_t>{plan.scratch}, accumulate_dtype(x.scalar_type()));
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& x_, const Tensor& scale, const Tensor& shift,
                                                const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                int64_t groups, double eps, int64_t activation, double negative_slope) {
  const DeviceGuard guard(x_.get_device_index());
  const auto [x, shape] = normalize_layout(x_, groups);
  const Parameters parameters(x, scale, shift, weight, bias);
  const std::vector<int64_t> statistics_size{shape.batch, groups};
  const ScalarType statistics = accumulate_dtype(x.scalar_type());
  const Tensor y = empty_in_layout(x, shape);
  if (x.numel() == 0) {
    return {y, torch::stable::new_zeros(x, statistics_size, statistics),
            torch::stable::new_zeros(x, statistics_size, statistics)};
  }
  const Tensor mean = torch::stable::new_empty(x, statistics_size, statistics);
  const Tensor rstd = torch::stable::new_empty(x, statistics_size, statistics);
  dispatch("style_modulation", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Forward<T> f{input<T>(x),
                       output<T>(y),
                       output<A>(mean),
                       output<A>(rstd),
                       parameters.modulation<A>(mean, rstd, shape, activation, negative_slope),
                       static_cast<A>(eps)};
    const Plan plan = make_plan<T>(shape, false, aligned_to_packs(f.x, f.y), device_of(x.get_device_index()));
    forward<T>(f, shape, plan, output<A>(scratch_for(plan, x)), current_stream(x));
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(const Tensor& dy_, const Tensor& x_,
                                                                 const Tensor& mean_, const Tensor& rstd_,
                                                                 const Tensor& scale, const Tensor& shift,
                                                                 const std::optional<Tensor>& weight,
                                                                 const std::optional<Tensor>& bias, int64_t groups,
                                                                 int64_t activation, double negative_slope) {
  const DeviceGuard guard(x_.get_device_index());
  const auto [x, shape] = normalize_layout(x_, groups);
  const ScalarType statistics = accumulate_dtype(x.scalar_type());
  STD_TORCH_CHECK(dy_.numel() == x.numel() && dy_.dim() == x.dim() && dy_.scalar_type() == x.scalar_type(),
                  "style_modulation: dy must be like x");
  STD_TORCH_CHECK(mean_.numel() == shape.batch * groups && rstd_.numel() == shape.batch * groups &&
                      mean_.scalar_type() == statistics && rstd_.scalar_type() == statistics,
                  "style_modulation: mean and rstd must be [B, groups] in the statistics dtype");
  const Parameters parameters(x, scale, shift, weight, bias);
  const Tensor dx = empty_in_layout(x, shape);
  const std::vector<int64_t> per_sample{shape.batch, shape.channels};
  const std::vector<int64_t> weight_size{weight ? shape.channels : 0}, bias_size{bias ? shape.channels : 0};
  if (x.numel() == 0) {
    return {dx, torch::stable::new_zeros(x, per_sample, statistics),
            torch::stable::new_zeros(x, per_sample, statistics), torch::stable::new_zeros(x, weight_size, statistics),
            torch::stable::new_zeros(x, bias_size, statistics)};
  }
  const Tensor dy = to_layout(dy_, x, shape);
  const Tensor mean = torch::stable::contiguous(mean_), rstd = torch::stable::contiguous(rstd_);
  const Tensor dscale = torch::stable::new_empty(x, per_sample, statistics);
  const Tensor dshift = torch::stable::new_empty(x, per_sample, statistics);
  const Tensor dweight = torch::stable::new_empty(x, weight_size, statistics);
  const Tensor dbias = torch::stable::new_empty(x, bias_size, statistics);
  dispatch("style_modulation", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = Accumulate<T>;
    const Backward<T> f{input<T>(dy),
                        input<T>(x),
                        output<T>(dx),
                        output<A>(dscale),
                        output<A>(dshift),
                        weight ? output<A>(dweight) : nullptr,
                        bias ? output<A>(dbias) : nullptr,
                        parameters.modulation<A>(mean, rstd, shape, activation, negative_slope)};
    const Plan plan = make_plan<T>(shape, true, aligned_to_packs(f.x, f.dy, f.dx), device_of(x.get_device_index()));
    backward<T>(f, shape, plan, output<A>(scratch_for(plan, x)), current_stream(x));
  });
  return {dx, dscale, dshift, dweight, dbias};
}

}  // namespace
}  // namespace fastdis::style_modulation

STABLE_TORCH_LIBRARY_IMPL(fastdis, CUDA, m) {
  m.impl("style_modulation_forward", TORCH_BOX(&fastdis::style_modulation::forward_cuda));
  m.impl("style_modulation_backward", TORCH_BOX(&fastdis::style_modulation::backward_cuda));
}

#endif  // FASTDIS_HOST_EMULATION
