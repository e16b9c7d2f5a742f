// What prototype_distances and prototypical_loss share. With c the mean of an episode's prototypes, both are built on
//   products(q, n) = (q - c) . (p_n - c),  |q - c|^2,  |p_n - c|^2            (Tile)
// and, W [rows, columns] being a matrix of weights, both have gradients of the form
//   out_r = 2 (sum_k W_rk (x_r - c) - sum_k W_rk (y_k - c))                   (pull)
// Subtracting c changes no distance, and keeps a common offset from eating the digits of small ones.

#pragma once

#include "common.cuh"

namespace fastdis::prototypes {

constexpr int kThreads = 256;
constexpr int kSide = 16;  // the threads of a block stand in a square of kSide * kSide

template <typename T>
struct Episodes {
  const T *queries, *prototypes;  // [episodes, num_queries, depth], [episodes, num_prototypes, depth]
  const Accumulate<T>* centre;    // [episodes, depth]
  int64_t episodes, num_queries, num_prototypes, depth;
  bool aligned;  // every row starts on a 16-byte boundary

  __device__ __forceinline__ const T* queries_of(int64_t e) const { return queries + e * num_queries * depth; }
  __device__ __forceinline__ const T* prototypes_of(int64_t e) const { return prototypes + e * num_prototypes * depth; }
};

// Elements of the statistics dtype that hold the centres, rounded so that what follows them is aligned.
template <typename T>
int64_t centre_size(const Episodes<T>& e) {
  return ceil_div(e.episodes * e.depth, 4) * 4;
}

template <typename T, typename... Outputs>
bool rows_aligned(const Episodes<T>& e, const Outputs*... outputs) {
  return e.depth % kPack<T> == 0 && aligned_to_packs(e.queries, e.prototypes, outputs...);
}

// The mean of each episode's prototypes, over its finite entries only: any c is correct, and a NaN in one prototype
// must not reach the others.
template <typename T>
__global__ void __launch_bounds__(kThreads) centre_prototypes(Episodes<T> e, Accumulate<T>* centre) {
  using A = Accumulate<T>;
  __shared__ A shared[kThreads];
  const int64_t tiles = ceil_div(e.depth, kWarp), episode = blockIdx.x / tiles;
  const int64_t d = blockIdx.x % tiles * kWarp + threadIdx.x % kWarp;
  A sum = 0;
  if (d < e.depth) {
    for (int64_t n = threadIdx.x / kWarp; n < e.num_prototypes; n += kThreads / kWarp) {
      const A value = widen(e.prototypes_of(episode)[n * e.depth + d]);
      if (value - value == 0) sum += value;
    }
  }
  sum = column_reduce(sum, kWarp, shared);
  if (threadIdx.x < kWarp && d < e.depth) centre[episode * e.depth + d] = sum / A(e.num_prototypes);
}

template <typename T>
void launch_centre(const Episodes<T>& e, Accumulate<T>* centre, cudaStream_t stream) {
  launch("prototypes centre", centre_prototypes<T>, e.episodes * ceil_div(e.depth, kWarp), kThreads, 0, stream, e,
         centre);
}

// |q - p|^2 without the expansion. The expansion turns an infinite distance into Inf - Inf, so wherever it gives NaN
// this has the last word.
template <typename T>
__device__ __forceinline__ Accumulate<T> direct_distance(const T* query, const T* prototype, int64_t depth) {
  Accumulate<T> sum = 0;
#pragma unroll 1
  for (int64_t d = 0; d < depth; ++d) {
    const Accumulate<T> difference = widen(query[d]) - widen(prototype[d]);
    sum += difference * difference;
  }
  return sum;
}

// s = 2 (q - c) . (p - c) - |p - c|^2: minus the squared distance, up to a constant of the query.
template <typename A, typename T>
__device__ __forceinline__ A logit(A product, A squared_norm, const T* query, const T* prototype, int64_t depth) {
  const A s = 2 * product - squared_norm;
  if (s == s) return s;
  return direct_distance(query, prototype, depth) == infinity<A>() ? -infinity<A>() : s;
}

// kSize rows against kSize columns of centred vectors: thread (y, x) gets the products of rows y + kSide * i and
// columns x + kSide * j. Both operands pass through shared memory in slabs of kDepth, row by row; a row is padded by 16
// bytes, so that the 16-byte reads of neighbouring rows fall into different banks.
template <typename T, int kSize>
struct Tile {
  using A = Accumulate<T>;
  static constexpr int kMicro = kSize / kSide;
  static constexpr int kUnit = kPack<T>;    // elements per global access
  static constexpr int kVector = kPack<A>;  // elements per shared access
  static constexpr int kDepth = 8192 / kSize / static_cast<int>(sizeof(A));
  static constexpr int kUnitsPerRow = kDepth / kUnit;
  static constexpr int kLoads = kSize * kUnitsPerRow / kThreads;
  static constexpr int kLead = kDepth + kVector;
  static_assert(kLoads >= 1 && kUnitsPerRow <= kWarp && kWarp % kUnitsPerRow == 0);

  struct Shared {
    alignas(16) A rows[kSize][kLead];
    alignas(16) A columns[kSize][kLead];
    A row_norm[kSize];  // squared
    A column_norm[kSize];
  };

  // `count` vectors of an episode, of which the tile takes kSize from `first` on; those past the end read as zeros.
  struct Operand {
    const T* base;
    int first, count;
  };

  // Fills `product` and the norms in `shared`, and ends with a barrier. A later call needs none before it: its slabs
  // have two between the caller's reads of the norms and the moment they change.
  static __device__ __forceinline__ void multiply(Shared& shared, Operand rows, Operand columns, const A* centre,
                                                  int depth, bool aligned, A (&product)[kMicro][kMicro]) {
    // Otherwise a caller's loop over tiles keeps the addresses of all loads in registers, which then spill.
    rows.base = opaque(rows.base);
    columns.base = opaque(columns.base);
    centre = opaque(centre);
    Pack<T, kUnit> row_pack[kLoads], column_pack[kLoads];
    A row_square[kLoads] = {}, column_square[kLoads] = {};
    const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
#pragma unroll
      for (int j = 0; j < kMicro; ++j) product[i][j] = 0;
    }
    fetch(row_pack, rows, 0, depth, aligned);
    fetch(column_pack, columns, 0, depth, aligned);
#pragma unroll 1
    for (int k0 = 0; k0 < depth; k0 += kDepth) {
      place(shared.rows, row_square, row_pack, rows, centre, k0, depth, aligned);
      place(shared.columns, column_square, column_pack, columns, centre, k0, depth, aligned);
      __syncthreads();
      if (k0 + kDepth < depth) {  // on its way while this slab is multiplied
        fetch(row_pack, rows, k0 + kDepth, depth, aligned);
        fetch(column_pack, columns, k0 + kDepth, depth, aligned);
      }
#pragma unroll 1  // more would spill
      for (int k = 0; k < kDepth; k += kVector) {
        Pack<A, kVector> a[kMicro], b[kMicro];
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
          a[i] = load_pack<kVector>(&shared.rows[y + kSide * i][k], 0, kVector, true);
          b[i] = load_pack<kVector>(&shared.columns[x + kSide * i][k], 0, kVector, true);
        }
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
#pragma unroll
          for (int i = 0; i < kMicro; ++i) {
#pragma unroll
            for (int j = 0; j < kMicro; ++j) product[i][j] += a[i].value[v] * b[j].value[v];
          }
        }
      }
      __syncthreads();
    }
    store_norms(shared.row_norm, row_square);
    store_norms(shared.column_norm, column_square);
    __syncthreads();
  }

 private:
  static __device__ __forceinline__ void fetch(Pack<T, kUnit> (&pack)[kLoads], const Operand& operand, int k0,
                                               int depth, bool aligned) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int unit = threadIdx.x + kThreads * load;
      const int row = operand.first + unit / kUnitsPerRow;
      const int k = k0 + unit % kUnitsPerRow * kUnit;
      pack[load] =
          load_pack<kUnit>(operand.base + int64_t{row} * depth + k, 0, row < operand.count ? depth - k : 0, aligned);
    }
  }

  // Centres the fetched packs, puts them into shared memory and adds up their squares.
  static __device__ __forceinline__ void place(A (&target)[kSize][kLead], A (&square)[kLoads],
                                               const Pack<T, kUnit> (&pack)[kLoads], const Operand& operand,
                                               const A* centre, int k0, int depth, bool aligned) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int unit = threadIdx.x + kThreads * load;
      const int row = unit / kUnitsPerRow, local = unit % kUnitsPerRow * kUnit;
      const bool valid = operand.first + row < operand.count;
#pragma unroll
      for (int part = 0; part < kUnit; part += kVector) {
        const int k = k0 + local + part;
        auto centred = load_pack<kVector>(centre + k, 0, depth - k, aligned);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const A value = valid ? widen(pack[load].value[part + v]) - centred.value[v] : A(0);
          centred.value[v] = value;
          square[load] += value * value;
        }
        store_pack<kVector>(&target[row][local + part], centred, 0, kVector, true);
      }
    }
  }

  // The kUnitsPerRow threads that placed a row are neighbours.
  static __device__ __forceinline__ void store_norms(A (&norm)[kSize], const A (&square)[kLoads]) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      A sum = square[load];
#pragma unroll
      for (int offset = kUnitsPerRow / 2; offset > 0; offset /= 2) sum += shuffle_down(sum, offset);
      const int unit = threadIdx.x + kThreads * load;
      if (unit % kUnitsPerRow == 0) norm[unit / kUnitsPerRow] = sum;
    }
  }
};

// ----------------------------------------------------------------------------------------------- gradients

constexpr int kPullSize = 32;  // rows of a block, and columns of a step

// Blocks per multiprocessor that the compiler is to make room for where a block computes scores: two would spill on
// sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kScoringBlocks = 1;
#else
constexpr int kScoringBlocks = 2;
#endif

// Columns whose weights a block holds at a time.
template <typename A>
inline constexpr int kChunk = 512 / static_cast<int>(sizeof(A));

// Width of the pieces of the depth that a block works through.
template <typename A>
inline constexpr int kWide = kSide * kPack<A>;

// A block owns kPullSize rows, `split` columns and `slice` pieces of the depth.
struct PullPlan {
  int64_t row_tiles, splits, split, slices, slice;
  int64_t scratch;  // elements of partial sums [splits, episodes, rows, depth]; 0: blocks write the output themselves
};

// Where the weights need scores, a block computes them over the whole depth, so cutting the depth repeats that work:
// columns are cut first. Where they are read, cutting the depth is free, and cutting columns costs partial sums.
template <typename T>
PullPlan plan_pull(int64_t episodes, int64_t rows, int64_t columns, int64_t depth, bool needs_scores,
                   const Device& device) {
  using A = Accumulate<T>;
  PullPlan plan{};
  plan.row_tiles = ceil_div(rows, kPullSize);
  const int64_t depth_tiles = ceil_div(depth, kWide<A>), column_tiles = ceil_div(columns, kPullSize);
  int64_t wanted = 2 * device.multiprocessors / (episodes * plan.row_tiles);
  const auto cut = [&wanted](int64_t tiles) {
    const int64_t pieces = greatest(1, least(wanted, tiles));
    wanted /= pieces;
    return ceil_div(tiles, pieces);
  };
  if (needs_scores) {
    plan.split = cut(column_tiles) * kPullSize;
    plan.slice = cut(depth_tiles);
  } else {
    plan.slice = cut(depth_tiles);
    plan.split = cut(column_tiles) * kPullSize;
  }
  plan.splits = ceil_div(columns, plan.split);
  plan.slices = ceil_div(depth_tiles, plan.slice);
  if (plan.splits > 1 || columns > kChunk<A>) plan.scratch = plan.splits * episodes * rows * depth;
  return plan;
}

// out_r = 2 (sum_k W_rk (x_r - c) - sum_k W_rk (y_k - c)): the gradient of the queries (rows are queries, columns
// prototypes) or of the prototypes (the other way round). weights(episode, q, n, logit) gives W; logits are computed
// where Weights::kNeedsScores. Sums go to `partial` [splits, episodes, rows, depth] unless it is null.
template <typename T, bool kRowsAreQueries, typename Weights>
__global__ void __launch_bounds__(kThreads, Weights::kNeedsScores ? kScoringBlocks : 2)
    pull(Episodes<T> e, Weights weights, PullPlan plan, T* out, Accumulate<T>* partial) {
  using A = Accumulate<T>;
  using Scores = Tile<T, kPullSize>;
  constexpr int kMicro = Scores::kMicro, kUnit = kPack<T>, kVector = kPack<A>;
  constexpr int kUnitsPerRow = kWide<A> / kUnit, kLoads = kPullSize * kUnitsPerRow / kThreads;
  struct NoShared {};
  __shared__ std::conditional_t<Weights::kNeedsScores, typename Scores::Shared, NoShared> scores;
  alignas(16) __shared__ A weight[kPullSize][kChunk<A> + kVector];
  alignas(16) __shared__ A vectors[kPullSize][kWide<A> + kVector];
  __shared__ A weight_sum[kPullSize];

  const int64_t slice = blockIdx.x % plan.slices, split = blockIdx.x / plan.slices % plan.splits;
  const int64_t row_tile = blockIdx.x / plan.slices / plan.splits % plan.row_tiles;
  const int64_t episode = blockIdx.x / plan.slices / plan.splits / plan.row_tiles;
  const int row_count = static_cast<int>(kRowsAreQueries ? e.num_queries : e.num_prototypes);
  const int column_count = static_cast<int>(kRowsAreQueries ? e.num_prototypes : e.num_queries);
  const T* rows = kRowsAreQueries ? e.queries_of(episode) : e.prototypes_of(episode);
  const T* columns = kRowsAreQueries ? e.prototypes_of(episode) : e.queries_of(episode);
  const A* centre = e.centre + episode * e.depth;
  const int first_row = static_cast<int>(row_tile) * kPullSize;
  const int split_begin = static_cast<int>(split * plan.split);
  const int split_end = static_cast<int>(least(column_count, (split + 1) * plan.split));
  const int depth = static_cast<int>(e.depth);
  const int depth_begin = static_cast<int>(slice * plan.slice) * kWide<A>;
  const int depth_end = static_cast<int>(least(depth, (slice + 1) * plan.slice * kWide<A>));
  const int depth_tiles = static_cast<int>(ceil_div(depth_end - depth_begin, kWide<A>));
  const int y = threadIdx.x / kSide, x = threadIdx.x % kSide;

#pragma unroll 1
  for (int chunk = split_begin; chunk < split_end; chunk += kChunk<A>) {
    const int chunk_size = split_end - chunk < kChunk<A> ? split_end - chunk : kChunk<A>;
    const int column_tiles = (chunk_size + kPullSize - 1) / kPullSize;
#pragma unroll 1
    for (int tile = 0; tile < column_tiles; ++tile) {
      const int first_column = chunk + tile * kPullSize;
      // Prototypes lie side by side in the weights that are read, so they go along x.
      constexpr bool kColumnsAlongX = kRowsAreQueries || Weights::kNeedsScores;
      const int own_row = kColumnsAlongX ? y : x, own_column = kColumnsAlongX ? x : y;
      if constexpr (Weights::kNeedsScores) {
        A product[kMicro][kMicro];
        Scores::multiply(scores, {rows, first_row, row_count}, {columns, first_column, split_end}, centre, depth,
                         e.aligned, product);
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
#pragma unroll
          for (int j = 0; j < kMicro; ++j) {
            weight[own_row + kSide * i][tile * kPullSize + own_column + kSide * j] = product[i][j];
          }
        }
      }
      // Each thread turns its own products into weights, one after the other to save registers.
#pragma unroll(Weights::kNeedsScores ? 1 : kMicro * kMicro)
      for (int own = 0; own < kMicro * kMicro; ++own) {
        const int row = own_row + kSide * (own / kMicro), column = own_column + kSide * (own % kMicro);
        const int q = kRowsAreQueries ? first_row + row : first_column + column;
        const int n = kRowsAreQueries ? first_column + column : first_row + row;
        A& target = weight[row][tile * kPullSize + column];
        if (first_row + row >= row_count || first_column + column >= split_end) {
          target = 0;
          continue;
        }
        A s = 0;
        if constexpr (Weights::kNeedsScores) {
          s = logit(target, kRowsAreQueries ? scores.column_norm[column] : scores.row_norm[row],
                    e.queries_of(episode) + int64_t{q} * depth, e.prototypes_of(episode) + int64_t{n} * depth, depth);
        }
        target = weights(episode * e.num_queries + q, n, s);
      }
    }
    __syncthreads();

    constexpr int kThreadsPerRow = kThreads / kPullSize;
    A sum = 0;
    for (int k = threadIdx.x % kThreadsPerRow; k < chunk_size; k += kThreadsPerRow) {
      sum += weight[threadIdx.x / kThreadsPerRow][k];
    }
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) sum += shuffle_down(sum, offset);
    if (threadIdx.x % kThreadsPerRow == 0) weight_sum[threadIdx.x / kThreadsPerRow] = sum;

    // One step per piece of the depth and tile of columns; the next step's vectors are fetched during each.
    Pack<T, kUnit> pack[kLoads];
    const auto locate = [&](int step, int load, int& column, int& d) {
      const int unit = threadIdx.x + kThreads * load;
      column = chunk + step % column_tiles * kPullSize + unit / kUnitsPerRow;
      d = depth_begin + step / column_tiles * kWide<A> + unit % kUnitsPerRow * kUnit;
      return column < split_end ? depth_end - d : 0;
    };
    const auto fetch = [&](int step) {
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int column, d;
        const int valid = locate(step, load, column, d);
        pack[load] = load_pack<kUnit>(columns + int64_t{column} * depth + d, 0, valid, e.aligned);
      }
    };
    const auto place = [&](int step) {
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        int column, d;
        const int valid = locate(step, load, column, d);
        const int unit = threadIdx.x + kThreads * load;
#pragma unroll
        for (int part = 0; part < kUnit; part += kVector) {
          auto centred = load_pack<kVector>(centre + d + part, 0, valid - part, e.aligned);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            centred.value[v] = widen(pack[load].value[part + v]) - centred.value[v];
          }
          store_pack<kVector>(&vectors[unit / kUnitsPerRow][unit % kUnitsPerRow * kUnit + part], centred, 0, kVector,
                              true);
        }
      }
    };

    A pulled[kMicro][kVector];
    const int steps = depth_tiles * column_tiles;
    fetch(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int tile = step % column_tiles;
      place(step);
      __syncthreads();
      if (step + 1 < steps) fetch(step + 1);
      if (tile == 0) {
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) pulled[i][v] = 0;
        }
      }
#pragma unroll 1
      for (int k = 0; k < kPullSize; k += kVector) {
        Pack<A, kVector> a[kMicro];
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
          a[i] = load_pack<kVector>(&weight[y + kSide * i][tile * kPullSize + k], 0, kVector, true);
        }
#pragma unroll
        for (int inner = 0; inner < kVector; ++inner) {
          const auto b = load_pack<kVector>(&vectors[k + inner][x * kVector], 0, kVector, true);
#pragma unroll
          for (int i = 0; i < kMicro; ++i) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) pulled[i][v] += a[i].value[inner] * b.value[v];
          }
        }
      }
      if (tile == column_tiles - 1) {
        const int d = depth_begin + step / column_tiles * kWide<A> + x * kVector;
#pragma unroll
        for (int i = 0; i < kMicro; ++i) {
          const int row = first_row + y + kSide * i;
          if (row >= row_count) continue;
          const auto own = load_pack<kVector>(rows + int64_t{row} * depth + d, 0, depth - d, e.aligned);
          auto total = load_pack<kVector>(centre + d, 0, depth - d, e.aligned);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            total.value[v] = 2 * (weight_sum[y + kSide * i] * (widen(own.value[v]) - total.value[v]) - pulled[i][v]);
          }
          if (partial == nullptr) {
            Pack<T, kVector> result;
#pragma unroll
            for (int v = 0; v < kVector; ++v) result.value[v] = narrow<T>(total.value[v]);
            store_global<kVector>(out + (episode * row_count + row) * depth + d, result, 0, depth - d, e.aligned);
          } else {
            // This thread wrote the sum over the chunks before, so it may read it without a barrier.
            A* target = partial + ((split * e.episodes + episode) * row_count + row) * depth + d;
            if (chunk > split_begin) {
              const auto before = load_pack<kVector>(target, 0, depth - d, e.aligned);
#pragma unroll
              for (int v = 0; v < kVector; ++v) total.value[v] += before.value[v];
            }
            store_global<kVector>(target, total, 0, depth - d, e.aligned);
          }
        }
      }
      __syncthreads();
    }
  }
}

template <bool kRowsAreQueries, typename T, typename Weights>
void launch_pull(const Episodes<T>& e, const Weights& weights, T* out, Accumulate<T>* scratch, const Device& device,
                 cudaStream_t stream) {
  const int64_t rows = kRowsAreQueries ? e.num_queries : e.num_prototypes;
  const int64_t columns = kRowsAreQueries ? e.num_prototypes : e.num_queries;
  const PullPlan plan = plan_pull<T>(e.episodes, rows, columns, e.depth, Weights::kNeedsScores, device);
  Accumulate<T>* partial = plan.scratch > 0 ? scratch : nullptr;
  launch("prototypes pull", pull<T, kRowsAreQueries, Weights>, e.episodes * plan.row_tiles * plan.splits * plan.slices,
         kThreads, 0, stream, e, weights, plan, out, partial);
  if (partial != nullptr) {
    launch_sum_splits("prototypes sum", partial, out, plan.splits, e.episodes * rows * e.depth, stream);
  }
}

// Both gradients. `scratch` has backward_scratch(...) elements and starts on a 16-byte boundary.
template <typename T, typename Weights>
void launch_gradients(Episodes<T> e, const Weights& weights, T* dqueries, T* dprototypes, Accumulate<T>* scratch,
                      const Device& device, cudaStream_t stream) {
  e.centre = scratch;
  e.aligned = rows_aligned(e, dqueries, dprototypes);
  launch_centre(e, scratch, stream);
  launch_pull<true>(e, weights, dqueries, scratch + centre_size(e), device, stream);
  launch_pull<false>(e, weights, dprototypes, scratch + centre_size(e), device, stream);
}

template <typename T>
int64_t backward_scratch(const Episodes<T>& e, bool needs_scores, const Device& device) {
  const auto partials = [&](int64_t rows, int64_t columns) {
    return plan_pull<T>(e.episodes, rows, columns, e.depth, needs_scores, device).scratch;
  };
  return centre_size(e) +
         greatest(partials(e.num_queries, e.num_prototypes), partials(e.num_prototypes, e.num_queries));
}

#ifndef FASTDIS_HOST_EMULATION

// Queries and prototypes, checked and contiguous, and what is allocated like them.
struct EpisodeTensors {
  Tensor queries, prototypes;

  EpisodeTensors(const char* op, const Tensor& queries_, const Tensor& prototypes_)
      : queries(torch::stable::contiguous(queries_)), prototypes(torch::stable::contiguous(prototypes_)) {
    STD_TORCH_CHECK(queries.dim() == 3 && prototypes.dim() == 3 && queries.size(0) == prototypes.size(0) &&
                        queries.size(2) == prototypes.size(2) && queries.scalar_type() == prototypes.scalar_type(),
                    op, ": queries and prototypes must be [E, Q, D] and [E, N, D] of one dtype");
    // Positions inside an episode are 32-bit, those in whole tensors 64-bit. A step below the limit: tiles stick out.
    constexpr int64_t kMost = int64_t{1} << 30;
    STD_TORCH_CHECK(queries.size(1) <= kMost && prototypes.size(1) <= kMost && queries.size(2) <= kMost, op,
                    ": at most 2^30 queries, prototypes and dimensions");
  }

  int64_t num_episodes() const { return queries.size(0); }
  int64_t num_queries() const { return queries.size(1); }
  int64_t num_prototypes() const { return prototypes.size(1); }

  // Without centre and alignment, which the launching functions fill in.
  template <typename T>
  Episodes<T> episodes() const {
    return {input<T>(queries), input<T>(prototypes), nullptr,         num_episodes(),
            num_queries(),     num_prototypes(),     queries.size(2), false};
  }

  Tensor scratch(int64_t elements) const {
    return torch::stable::new_empty(queries, std::vector<int64_t>{elements}, accumulate_dtype(queries.scalar_type()));
  }
};

#endif  // FASTDIS_HOST_EMULATION

}  // namespace fastdis::prototypes
