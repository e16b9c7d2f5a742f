// Deterministic sums in two passes, for tangent_activation, total_correlation and gaussian_kl: blocks leave partial
// sums behind, and a second kernel adds them up in a fixed order.

#pragma once

#include "common.cuh"

namespace fastdis::sums {

constexpr int kThreads = 256;

// A matrix [rows, columns] dealt out so that a block can sum its columns over the rows: `team` threads stand side by
// side along the columns, `lanes` columns each, and the block's rows of threads share one piece of the matrix's rows.
struct Columns {
  int64_t rows, columns;
  int64_t tiles;          // of team * lanes columns
  int64_t pieces, piece;  // the rows in `pieces` pieces of `piece`, the last one shorter
  int team;

  int64_t blocks() const { return tiles * pieces; }
};

inline int64_t wanted_blocks(const Device& device) { return 8 * device.multiprocessors; }

// At most `most` pieces, and no more than fill the device; a piece gives each thread one row or more. The matrix is not
// empty.
inline Columns deal_columns(int64_t rows, int64_t columns, int lanes, int64_t most, const Device& device) {
  Columns c{};
  c.rows = rows;
  c.columns = columns;
  c.team = power_of_two(ceil_div(columns, lanes), 1, kWarp);
  c.tiles = ceil_div(columns, c.team * lanes);
  const int64_t block_rows = kThreads / c.team, wanted = ceil_div(wanted_blocks(device), c.tiles);
  c.piece = ceil_div(ceil_div(rows, least(wanted, most)), block_rows) * block_rows;
  c.pieces = ceil_div(rows, c.piece);
  return c;
}

// deal_columns makes no more blocks, however many lanes.
inline int64_t most_blocks(int64_t columns, const Device& device) {
  return wanted_blocks(device) + ceil_div(columns, kWarp);
}

constexpr int64_t kMaxPieces = 128;  // where one thread of merge adds them up

// The rows row, row + stride, ... < end that a thread visits, in its columns from `column` on.
struct Walk {
  int64_t column, piece, row, stride, end;

  __device__ Walk(const Columns& c, int64_t block, int lanes) {
    column = (block % c.tiles * c.team + threadIdx.x % c.team) * lanes;
    piece = block / c.tiles;
    row = piece * c.piece + threadIdx.x / c.team;
    stride = blockDim.x / c.team;
    end = column < c.columns ? least(c.rows, (piece + 1) * c.piece) : 0;
  }
};

// Leaves the block's sums of its columns in partial [pieces, columns], `pitch` elements from piece to piece. Every
// thread of the block calls it.
template <int N, typename A>
__device__ __forceinline__ void store_column_sums(const Columns& c, const Walk& walk, const A (&sum)[N], A* partial,
                                                  int64_t pitch) {
  __shared__ A shared[kThreads];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A total = column_reduce(sum[i], c.team, shared);
    if (static_cast<int>(threadIdx.x) < c.team && walk.column + i < c.columns) {
      partial[walk.piece * pitch + walk.column + i] = total;
    }
  }
}

// out[r] = sum of partial[:, r, :] / divisor for partial [pieces, size, inner]; `team` threads each. Out is a pointer
// to T, or what else has elements of that type.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) merge(const Accumulate<T>* partial, Out out, int64_t size, int64_t inner,
                                                  int64_t pieces, Accumulate<T> divisor, int team) {
  using A = Accumulate<T>;
  __shared__ A shared[kThreads / kWarp];
  const int64_t r = int64_t{blockIdx.x} * (kThreads / team) + threadIdx.x / team;
  A sum = 0;
  if (r < size) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const A* source = partial + (piece * size + r) * inner;
      for (int64_t i = threadIdx.x % team; i < inner; i += team) sum += source[i];
    }
  }
  sum = team_reduce(sum, team, shared);
  if (threadIdx.x % team == 0 && r < size) out[r] = narrow<T>(sum / divisor);
}

template <typename T, typename Out>
void launch_merge(const char* name, const Accumulate<T>* partial, Out out, int64_t size, int64_t inner, int64_t pieces,
                  Accumulate<T> divisor, cudaStream_t stream) {
  const int team = power_of_two(inner, 1, kThreads);
  launch(name, merge<T, Out>, ceil_div(size, kThreads / team), kThreads, 0, stream, partial, out, size, inner, pieces,
         divisor, team);
}

}  // namespace fastdis::sums
