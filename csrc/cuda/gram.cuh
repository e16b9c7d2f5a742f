// What jacobian_gram and isometry_penalty share, J [batch, rows, depth] being Jacobians:
//   G_b = J_b J_b^T                                  (launch_gram)
//   dJ_b = A_b J_b, A [batch, rows, rows] symmetric  (launch_pull_back)
//
// Both read J once. G: blocks take pieces of the depth where samples alone do not fill the device, and a second kernel
// adds up what they leave. Up to kMostRows rows, threads keep all of the symmetric half in registers and read J
// directly; beyond, J passes through shared memory in slabs of kTile rows. Only products i >= j are computed.

#pragma once

#include "common.cuh"

namespace fastdis::gram {

constexpr int kThreads = 256;
constexpr int kDirectThreads = 128;  // of the kernels that keep all rows in registers
constexpr int kSide = 8;

// float64 has half the registers.
template <typename A>
inline constexpr int kMostRows = std::is_same_v<A, double> ? 8 : 16;

// Of the kernels with tiles: a thread's side of the products, and rows of a slab.
template <typename A>
inline constexpr int kMicro = std::is_same_v<A, double> ? 4 : 8;
template <typename A>
inline constexpr int kTile = kSide * kMicro<A>;

// Rows are contiguous.
struct Layout {
  int64_t batch, rows, depth, sample_stride, row_stride;
};

// Whether all rows start on 16-byte boundaries and are whole packs.
template <typename T, typename... Pointers>
bool rows_aligned(const Layout& l, const Pointers*... pointers) {
  return l.depth % kPack<T> == 0 && l.sample_stride % kPack<T> == 0 && l.row_stride % kPack<T> == 0 &&
         aligned_to_packs(pointers...);
}

// Elements of a pack where kRows rows of them are held at once: eight of sixteen rows would spill.
template <typename T, int kRows>
inline constexpr int kDirectPack = kRows > 12 && kPack<T> > 4 ? 4 : kPack<T>;

template <int kLanes, typename T>
__device__ __forceinline__ Pack<T, kLanes> load_or_zero(const T* source, bool inside) {
  return inside ? load_pack<kLanes>(source, 0, kLanes, true) : Pack<T, kLanes>{};
}

// Stores the `left` first elements of sums.
template <int kLanes, typename T>
__device__ __forceinline__ void store(T* target, const Accumulate<T> (&sum)[kLanes], int64_t left, bool aligned) {
  Pack<T, kLanes> pack;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) pack.value[i] = narrow<T>(sum[i]);
  store_global<kLanes>(target, pack, 0, left, aligned);
}

// Puts a pack into shared memory, in the statistics dtype.
template <typename T, int kLanes>
__device__ __forceinline__ void place(Accumulate<T>* target, const Pack<T, kLanes>& pack) {
  using A = Accumulate<T>;
  constexpr int kVector = kLanes < kPack<A> ? kLanes : kPack<A>;
#pragma unroll
  for (int part = 0; part < kLanes; part += kVector) {
    Pack<A, kVector> wide;
#pragma unroll
    for (int v = 0; v < kVector; ++v) wide.value[v] = widen(pack.value[part + v]);
    store_pack<kVector>(target + part, wide, 0, kVector, true);
  }
}

// Calls function(rows) with the least of 4, 8, 12 and 16 that is >= the rows of J, as a constant.
template <typename A, typename Function>
void with_rows(int64_t rows, Function function) {
  if (rows <= 4) return function(std::integral_constant<int, 4>{});
  if (rows <= 8) return function(std::integral_constant<int, 8>{});
  if constexpr (kMostRows<A> > 8) {
    if (rows <= 12) return function(std::integral_constant<int, 12>{});
    function(std::integral_constant<int, 16>{});
  }
}

// ---------------------------------------------------------------------------------------------------- G = J J^T

// J's depth in `splits` pieces of `piece`; the tiled kernel works on `pairs` pairs of row tiles.
struct Plan {
  bool aligned, direct;
  int64_t pairs, splits, piece;
  int64_t scratch;  // elements of partial sums [splits, batch, rows, rows]; 0: blocks write G themselves
};

// Depth of a slab, and its distance from row to row in shared memory: rows that are neighbours start in different
// banks.
template <typename A>
inline constexpr int kDepth = 64;
template <typename A>
inline constexpr int kLead = kDepth<A> + kPack<A>;

template <typename T>
Plan plan_gram(const T* jacobian, const Layout& l, const Device& device) {
  using A = Accumulate<T>;
  Plan plan{};
  plan.aligned = rows_aligned<T>(l, jacobian);
  plan.direct = plan.aligned && l.rows <= kMostRows<A>;
  const int64_t tiles = plan.direct ? 1 : ceil_div(l.rows, kTile<A>);
  plan.pairs = tiles * (tiles + 1) / 2;
  const int64_t step = plan.direct ? kDirectThreads * kPack<T> : kDepth<A>;
  const int64_t steps = ceil_div(l.depth, step), blocks = greatest(1, l.batch * plan.pairs);
  // A piece has to be worth the reduction at the end of a block.
  constexpr int64_t kLeastSteps = 4;
  const int64_t wanted = ceil_div(4 * device.multiprocessors, blocks);
  const int64_t pieces = greatest(1, least(wanted, steps / kLeastSteps));
  plan.piece = greatest(1, ceil_div(steps, pieces)) * step;
  plan.splits = greatest(1, ceil_div(l.depth, plan.piece));
  if (plan.splits > 1) plan.scratch = plan.splits * l.batch * l.rows * l.rows;
  return plan;
}

// The products of at most kRows rows, all in every thread's registers: for each element of the depth it visits.
template <typename T, int kRows>
__global__ void __launch_bounds__(kDirectThreads)
    multiply_in_registers(const T* jacobian, Layout l, Plan plan, Accumulate<T>* out) {
  using A = Accumulate<T>;
  constexpr int kLanes = kDirectPack<T, kRows>, kHalf = kRows * (kRows + 1) / 2;
  __shared__ A sums[kDirectThreads / kWarp][kHalf];
  const unsigned batch = static_cast<unsigned>(l.batch);  // less than the number of blocks
  const int64_t sample = blockIdx.x % batch, split = blockIdx.x / batch;
  const T* base = jacobian + sample * l.sample_stride;
  const int64_t end = least(l.depth, (split + 1) * plan.piece);
  const int rows = static_cast<int>(l.rows);
  A product[kHalf] = {};
#pragma unroll 1
  for (int64_t d = split * plan.piece + threadIdx.x * kLanes; d < end; d += kDirectThreads * kLanes) {
    Pack<T, kLanes> row[kRows];
    const T* source = opaque(base + d);  // otherwise the addresses of all rows stay in registers, which then spill
#pragma unroll
    for (int k = 0; k < kRows; ++k) row[k] = load_or_zero<kLanes>(source + k * l.row_stride, k < rows);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      A value[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) value[k] = widen(row[k].value[i]);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int j = 0; j <= k; ++j) product[k * (k + 1) / 2 + j] += value[k] * value[j];
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kHalf; ++e) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) product[e] += shuffle_down(product[e], offset);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp][e] = product[e];
  }
  __syncthreads();
  A* target = out + (split * l.batch + sample) * rows * rows;
  for (int e = threadIdx.x; e < rows * rows; e += kDirectThreads) {
    const int i = e / rows, j = e % rows, high = i > j ? i : j, low = i > j ? j : i;
    A sum = 0;
#pragma unroll
    for (int warp = 0; warp < kDirectThreads / kWarp; ++warp) sum += sums[warp][high * (high + 1) / 2 + low];
    target[e] = sum;
  }
}

// One pair of row tiles. The rows of a tile are dealt to `groups` <= kSide groups, row i + groups * r being the r-th of
// group i. A thread holds the products of one group of either tile, on the diagonal i <= j, and shares the depth of the
// slab with the other threads that hold the same products.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    multiply_in_tiles(const T* jacobian, Layout l, Plan plan, Accumulate<T>* out) {
  using A = Accumulate<T>;
  constexpr int kSize = kMicro<A>, kRows = kTile<A>, kVector = kPack<A>, kUnits = kDepth<A> / kLanes;
  constexpr int kWriters = kThreads / 2;  // of products, in a step of the reduction
  alignas(16) __shared__ A slab[2][kRows][kLead<A>];
  static_assert(sizeof(slab) >= kWriters * kSize * kSize * sizeof(A));

  int64_t left = 0, right = blockIdx.x % plan.pairs;  // tiles left <= right
  for (const int64_t tiles = ceil_div(l.rows, kRows); right >= tiles - left; ++left) right -= tiles - left;
  right += left;
  const bool diagonal = left == right;
  const int64_t sample = blockIdx.x / plan.pairs % l.batch, split = blockIdx.x / plan.pairs / l.batch;
  const int64_t end = least(l.depth, (split + 1) * plan.piece);
  const auto rows_in = [&](int64_t tile) { return static_cast<int>(least(kRows, l.rows - tile * kRows)); };
  const int rows[2] = {rows_in(left), rows_in(right)};
  const int groups[2] = {(rows[0] + kSize - 1) / kSize, (rows[1] + kSize - 1) / kSize};
  const int holders = diagonal ? groups[0] * (groups[0] + 1) / 2 : groups[0] * groups[1];
  const int shares = kThreads / holders, holder = threadIdx.x % holders, share = threadIdx.x / holders;
  int i = 0, j = holder;
  for (int width = groups[1]; j >= width; ++i) {
    j -= width;
    if (diagonal) --width;
  }
  if (diagonal) j += i;

  A product[kSize][kSize];
#pragma unroll
  for (int r = 0; r < kSize; ++r) {
#pragma unroll
    for (int s = 0; s < kSize; ++s) product[r][s] = 0;
  }
#pragma unroll 1
  for (int64_t d0 = split * plan.piece; d0 < end; d0 += kDepth<A>) {
    for (int side = 0; side < (diagonal ? 1 : 2); ++side) {
      const T* base = jacobian + sample * l.sample_stride + (side == 0 ? left : right) * kRows * l.row_stride + d0;
#pragma unroll 2
      for (int unit = threadIdx.x; unit < groups[side] * kSize * kUnits; unit += kThreads) {
        const int row = unit / kUnits, d = unit % kUnits * kLanes;
        place<T>(&slab[side][row][d],
                 load_or_zero<kLanes>(base + row * l.row_stride + d, row < rows[side] && d0 + d < end));
      }
    }
    __syncthreads();
    const A(&columns)[kRows][kLead<A>] = slab[diagonal ? 0 : 1];
    if (share < shares) {
#pragma unroll 1
      for (int d = share * kVector; d < kDepth<A>; d += shares * kVector) {
        Pack<A, kVector> a[kSize];
#pragma unroll
        for (int r = 0; r < kSize; ++r) {
          a[r] = load_pack<kVector>(&slab[0][i + groups[0] * r][d], 0, kVector, true);
        }
#pragma unroll
        for (int s = 0; s < kSize; ++s) {
          const auto b = load_pack<kVector>(&columns[j + groups[1] * s][d], 0, kVector, true);
#pragma unroll
          for (int r = 0; r < kSize; ++r) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) product[r][s] += a[r].value[v] * b.value[v];
          }
        }
      }
    }
    __syncthreads();
  }

  // The upper half of those who share products gives its sums to the lower half, until one is left.
  A* given = &slab[0][0][0];
#pragma unroll 1
  for (int active = shares; active > 1; active = (active + 1) / 2) {
    const int kept = (active + 1) / 2;
    const bool gives = share >= kept && share < active, takes = share < active - kept;
    const int writer = (gives ? share - kept : share) * holders + holder;
    if (gives) {
#pragma unroll
      for (int e = 0; e < kSize * kSize; ++e) given[e * kWriters + writer] = product[e / kSize][e % kSize];
    }
    __syncthreads();
    if (takes) {
#pragma unroll
      for (int e = 0; e < kSize * kSize; ++e) product[e / kSize][e % kSize] += given[e * kWriters + writer];
    }
    __syncthreads();
  }
  if (share > 0) return;
  A* target = out + (split * l.batch + sample) * l.rows * l.rows;
#pragma unroll
  for (int r = 0; r < kSize; ++r) {
#pragma unroll
    for (int s = 0; s < kSize; ++s) {
      const int row = i + groups[0] * r, column = j + groups[1] * s;
      if (row >= rows[0] || column >= rows[1]) continue;
      const int64_t y = left * kRows + row, x = right * kRows + column;
      target[y * l.rows + x] = target[x * l.rows + y] = product[r][s];
    }
  }
}

// G into `gram` [batch, rows, rows]; `scratch` has plan.scratch elements.
template <typename T>
void launch_gram(const T* jacobian, const Layout& l, const Plan& plan, Accumulate<T>* gram, Accumulate<T>* scratch,
                 cudaStream_t stream) {
  using A = Accumulate<T>;
  A* target = plan.splits > 1 ? scratch : gram;
  const int64_t blocks = plan.splits * l.batch * plan.pairs;
  if (plan.direct) {
    with_rows<A>(l.rows, [&](auto rows) {
      launch("jacobian_gram", multiply_in_registers<T, decltype(rows)::value>, blocks, kDirectThreads, 0, stream,
             jacobian, l, plan, target);
    });
  } else {
    const auto kernel = plan.aligned ? multiply_in_tiles<T, kPack<T>> : multiply_in_tiles<T, 1>;
    launch("jacobian_gram", kernel, blocks, kThreads, 0, stream, jacobian, l, plan, target);
  }
  if (plan.splits > 1) {
    launch_sum_splits("jacobian_gram sum", scratch, gram, plan.splits, l.batch * l.rows * l.rows, stream);
  }
}

// ---------------------------------------------------------------------------------------------------- dJ = A J

// At most kRows rows: a thread reads a pack of every row, and writes a pack of every row. matrix(b, i, j) gives A.
template <typename T, int kRows, typename Matrix>
__global__ void __launch_bounds__(kDirectThreads)
    pull_back_in_registers(const T* jacobian, Layout l, Matrix matrix, T* out) {
  using A = Accumulate<T>;
  constexpr int kLanes = kPack<T>;
  alignas(16) __shared__ A weights[kRows][kRows];
  const int64_t tiles = ceil_div(l.depth, kDirectThreads * kLanes), sample = blockIdx.x / tiles;
  const int64_t d = (blockIdx.x % tiles * kDirectThreads + threadIdx.x) * kLanes;
  const int64_t offset = sample * l.sample_stride + d;
  const int rows = static_cast<int>(l.rows);
  Pack<T, kLanes> row[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    row[k] = load_or_zero<kLanes>(jacobian + offset + k * l.row_stride, k < rows && d < l.depth);
  }
  for (int e = threadIdx.x; e < kRows * kRows; e += kDirectThreads) {
    const int i = e / kRows, j = e % kRows;
    weights[i][j] = i < rows && j < rows ? matrix(sample, i, j) : A(0);
  }
  __syncthreads();
  if (d >= l.depth) return;
#pragma unroll 1
  for (int k = 0; k < rows; ++k) {
    A sum[kLanes] = {};
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const A weight = weights[k][j];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) sum[i] += weight * widen(row[j].value[i]);
    }
    store(out + offset + k * l.row_stride, sum, kLanes, true);
  }
}

constexpr int kPullThreads = 128;
constexpr int kPullColumns = 16;  // of threads, kVector elements of the depth each
constexpr int kPullSteps = 4;     // pieces of the depth that a block works through, to load A less often

template <typename A>
inline constexpr int kPullWidth = kPullColumns * kPack<A>;

// A tile of rows of dJ: thread (y, x) has rows y + kSide * r.
template <typename T, int kLanes, typename Matrix>
__global__ void __launch_bounds__(kPullThreads) pull_back_in_tiles(const T* jacobian, Layout l, Matrix matrix, T* out) {
  using A = Accumulate<T>;
  constexpr int kSize = kMicro<A>, kRows = kTile<A>, kVector = kPack<A>, kWidth = kPullWidth<A>;
  constexpr int kUnits = kWidth / kLanes;
  static_assert(kSide * kPullColumns == kPullThreads && kWidth % kLanes == 0);
  alignas(16) __shared__ A weights[kRows][kRows + kVector];
  alignas(16) __shared__ A slab[kRows][kWidth];
  const int64_t row_tiles = ceil_div(l.rows, kRows), pieces = ceil_div(l.depth, kPullSteps * kWidth);
  const int64_t first_row = blockIdx.x % row_tiles * kRows, piece = blockIdx.x / row_tiles % pieces;
  const int64_t sample = blockIdx.x / row_tiles / pieces;
  const int64_t begin = piece * kPullSteps * kWidth, end = least(l.depth, begin + kPullSteps * kWidth);
  const int y = threadIdx.x / kPullColumns, x = threadIdx.x % kPullColumns;
#pragma unroll 1
  for (int64_t d0 = begin; d0 < end; d0 += kWidth) {
    A sum[kSize][kVector];
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[r][v] = 0;
    }
#pragma unroll 1
    for (int64_t j0 = 0; j0 < l.rows; j0 += kRows) {
      const T* base = jacobian + sample * l.sample_stride + j0 * l.row_stride + d0;
#pragma unroll 2
      for (int unit = threadIdx.x; unit < kRows * kUnits; unit += kPullThreads) {
        const int row = unit / kUnits, d = unit % kUnits * kLanes;
        place<T>(&slab[row][d], load_or_zero<kLanes>(base + row * l.row_stride + d, j0 + row < l.rows && d0 + d < end));
      }
      if (d0 == begin || row_tiles > 1) {
#pragma unroll 1
        for (int e = threadIdx.x; e < kRows * kRows; e += kPullThreads) {
          const int64_t i = first_row + e / kRows, j = j0 + e % kRows;
          weights[e / kRows][e % kRows] = i < l.rows && j < l.rows ? matrix(sample, i, j) : A(0);
        }
      }
      __syncthreads();
      const int count = static_cast<int>(least(kRows, ceil_div(l.rows - j0, kVector) * kVector));
#pragma unroll 1
      for (int j = 0; j < count; j += kVector) {
        Pack<A, kVector> a[kSize];
#pragma unroll
        for (int r = 0; r < kSize; ++r) a[r] = load_pack<kVector>(&weights[y + kSide * r][j], 0, kVector, true);
#pragma unroll
        for (int inner = 0; inner < kVector; ++inner) {
          const auto b = load_pack<kVector>(&slab[j + inner][x * kVector], 0, kVector, true);
#pragma unroll
          for (int r = 0; r < kSize; ++r) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) sum[r][v] += a[r].value[inner] * b.value[v];
          }
        }
      }
      __syncthreads();
    }
    const int64_t d = d0 + x * kVector;
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
      const int64_t row = first_row + y + kSide * r;
      if (row >= l.rows) continue;
      store(out + sample * l.sample_stride + row * l.row_stride + d, sum[r], end - d, kLanes > 1);
    }
  }
}

// dJ into `out`, which has J's layout.
template <typename T, typename Matrix>
void launch_pull_back(const T* jacobian, const Layout& l, const Matrix& matrix, T* out, cudaStream_t stream) {
  using A = Accumulate<T>;
  const bool aligned = rows_aligned<T>(l, jacobian, out);
  if (aligned && l.rows <= kMostRows<A>) {
    with_rows<A>(l.rows, [&](auto rows) {
      launch("jacobian_gram backward", pull_back_in_registers<T, decltype(rows)::value, Matrix>,
             l.batch * ceil_div(l.depth, kDirectThreads * kPack<T>), kDirectThreads, 0, stream, jacobian, l, matrix,
             out);
    });
  } else {
    const auto kernel = aligned ? pull_back_in_tiles<T, kPack<T>, Matrix> : pull_back_in_tiles<T, 1, Matrix>;
    launch("jacobian_gram backward", kernel,
           l.batch * ceil_div(l.rows, kTile<A>) * ceil_div(l.depth, kPullSteps * kPullWidth<A>), kPullThreads, 0,
           stream, jacobian, l, matrix, out);
  }
}

#ifndef FASTDIS_HOST_EMULATION

// A Jacobian as the kernels read it: contiguous, or the transpose of a contiguous [K, B, D].
struct JacobianTensor {
  Tensor tensor;
  bool transposed;

  JacobianTensor(const char* op, const Tensor& jacobian) : tensor(jacobian), transposed(false) {
    STD_TORCH_CHECK(jacobian.dim() == 3, op, ": jacobian must be [B, K, D]");
    if (jacobian.is_contiguous()) return;
    transposed = torch::stable::transpose(jacobian, 0, 1).is_contiguous();
    if (!transposed) tensor = torch::stable::contiguous(jacobian);
  }

  Layout layout() const {
    const int64_t batch = tensor.size(0), rows = tensor.size(1), depth = tensor.size(2);
    if (transposed) return {batch, rows, depth, depth, batch * depth};
    return {batch, rows, depth, rows * depth, depth};
  }

  // Uninitialised, of the same shape, dtype and layout.
  Tensor empty_like() const {
    if (!transposed) return torch::stable::new_empty(tensor, tensor.sizes());
    const std::vector<int64_t> size{tensor.size(1), tensor.size(0), tensor.size(2)};
    return torch::stable::transpose(torch::stable::new_empty(tensor, size), 0, 1);
  }

  Tensor empty(const std::vector<int64_t>& size) const {
    return torch::stable::new_empty(tensor, size, accumulate_dtype(tensor.scalar_type()));
  }

  Tensor empty_gram() const { return empty({tensor.size(0), tensor.size(1), tensor.size(1)}); }

  // A contiguous tensor [B, K, K].
  Tensor checked_square(const char* op, const char* name, const Tensor& square) const {
    STD_TORCH_CHECK(square.dim() == 3 && square.size(0) == tensor.size(0) && square.size(1) == tensor.size(1) &&
                        square.size(2) == tensor.size(1) &&
                        square.scalar_type() == accumulate_dtype(tensor.scalar_type()),
                    op, ": ", name, " must be [B, K, K] in the statistics dtype");
    return torch::stable::contiguous(square);
  }
};

#endif  // FASTDIS_HOST_EMULATION

}  // namespace fastdis::gram
