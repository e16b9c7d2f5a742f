#include "neighbourhoods.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "../core/gemm.h"
#include "../core/isa.h"
#include "../core/threads.h"
#include "classes.h"
#include "ordered_set.h"

namespace fastdis::host {

namespace {

constexpr int64_t chunk = 1024;  // dimensions whose sums stay in the points' own precision

void check_below(const int64_t* indices, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= n) throw std::out_of_range("an index is below 0 or not below n");
  }
}

// The `count` smallest of a row, by one pass that keeps whatever is below the count-th smallest of what it has kept.
struct Smallest {
  using Entry = std::pair<float, int64_t>;

  template <class Isa>
  static FASTDIS_INLINE void run(const float* row, int64_t n, int64_t count, std::vector<Entry>* into) {
    std::vector<Entry>& kept = *into;
    constexpr int64_t block = 64;
    const std::size_t most = static_cast<std::size_t>(4 * count + 64);
    float limit = std::numeric_limits<float>::infinity();
    const auto drop = [&] {
      std::nth_element(kept.begin(), kept.begin() + (count - 1), kept.end());
      kept.resize(static_cast<std::size_t>(count));
      limit = kept[static_cast<std::size_t>(count - 1)].first;
    };
    kept.clear();
    for (int64_t first = 0; first < n; first += block) {
      const int64_t last = std::min(n, first + block);
      int below = 0;
#pragma omp simd reduction(+ : below)
      for (int64_t i = first; i < last; ++i) below += row[i] < limit ? 1 : 0;
      if (below == 0 && static_cast<int64_t>(kept.size()) >= count) continue;
      const bool open = limit == std::numeric_limits<float>::infinity();
      for (int64_t i = first; i < last; ++i) {
        if (open || row[i] < limit) kept.emplace_back(row[i], i);
      }
      if (kept.size() >= most) drop();
    }
    drop();
    std::sort(kept.begin(), kept.end());
  }
};

// Adds to out [count] what dimensions `first` to `last`, at most `chunk`, give.
template <class T>
struct Distances {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* points, int64_t D, const T* query, const int64_t* candidates, int64_t count,
                                 int64_t first, int64_t last, double* out) {
    for (int64_t c = 0; c < count; ++c) {
      const T* point = points + candidates[c] * D;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = first; j < last; ++j) sum += (query[j] - point[j]) * (query[j] - point[j]);
      out[c] += static_cast<double>(sum);
    }
  }
};

// Makes rows [count, length] orthonormal, twice, so that what rounding leaves the first time is gone; returns the
// smallest share of a row's length that was left.
FASTDIS_INLINE double orthonormalize(double* rows, int64_t count, int64_t length) {
  double least = 1;
  for (int64_t i = 0; i < count; ++i) {
    double* row = rows + i * length;
    double before = 0, after = 0;
#pragma omp simd reduction(+ : before)
    for (int64_t j = 0; j < length; ++j) before += row[j] * row[j];
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t other = 0; other < i; ++other) {
        const double* unit = rows + other * length;
        double product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t j = 0; j < length; ++j) product += unit[j] * row[j];
#pragma omp simd
        for (int64_t j = 0; j < length; ++j) row[j] -= product * unit[j];
      }
    }
#pragma omp simd reduction(+ : after)
    for (int64_t j = 0; j < length; ++j) after += row[j] * row[j];
    least = std::min(least, before > 0 ? std::sqrt(after / before) : 0.0);
    const double scale = after > 0 ? 1 / std::sqrt(after) : 0.0;
    for (int64_t j = 0; j < length; ++j) row[j] *= scale;
  }
  return least;
}

FASTDIS_INLINE void rotate(double* first, double* second, int64_t length, double c, double s) {
#pragma omp simd
  for (int64_t j = 0; j < length; ++j) {
    const double x = first[j], y = second[j];
    first[j] = c * x - s * y;
    second[j] = s * x + c * y;
  }
}

// Eigenvalues and vectors (as rows) of a symmetric matrix [r, r], by rotations (Jacobi); `order` puts the largest
// first. Rows of both are `row` long, a multiple of column_pad, and zero past r.
FASTDIS_INLINE void jacobi(double* matrix, int64_t r, int64_t row, double* vectors, std::vector<int64_t>& order) {
  std::fill_n(vectors, r * row, 0.0);
  double square = 0;
  for (int64_t i = 0; i < r; ++i) {
    vectors[i * row + i] = 1.0;
    for (int64_t j = 0; j < r; ++j) square += matrix[i * row + j] * matrix[i * row + j];
  }
  const double least = 1e-34 * square / static_cast<double>(r * r);
  bool turning = true;
  for (int sweep = 0; sweep < 30 && turning; ++sweep) {
    turning = false;
    for (int64_t p = 0; p < r; ++p) {
      for (int64_t q = p + 1; q < r; ++q) {
        double *first = matrix + p * row, *second = matrix + q * row;
        const double app = first[p], aqq = second[q], apq = first[q];
        if (apq * apq <= least) continue;
        turning = true;
        const double theta = (aqq - app) / (2 * apq);
        const double t = (theta >= 0 ? 1.0 : -1.0) / (std::abs(theta) + std::sqrt(theta * theta + 1));
        const double c = 1 / std::sqrt(t * t + 1), s = t * c;
        rotate(first, second, row, c, s);
        rotate(vectors + p * row, vectors + q * row, row, c, s);
        first[p] = app - t * apq;
        second[q] = aqq + t * apq;
        first[q] = second[p] = 0;
        for (int64_t j = 0; j < r; ++j) {
          matrix[j * row + p] = first[j];
          matrix[j * row + q] = second[j];
        }
      }
    }
  }
  for (int64_t i = 0; i < r; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.begin() + r,
                   [&](int64_t a, int64_t b) { return matrix[a * row + a] > matrix[b * row + b]; });
}

// Subspace iteration with Rayleigh-Ritz steps on one matrix, on more vectors than are wanted: what is wanted converges
// like the first eigenvalue left out relative to the last wanted. Rows of `v` and `w` [r, k], padded, are the vectors.
class Leading {
 public:
  Leading(int64_t k, int64_t d)
      : k_(k),
        d_(d),
        r_(std::min(k, d + 4)),
        row_(padded(k, column_pad<double>)),
        gram_(k * row_),
        v_(padded(r_, row_pad) * row_),
        w_(v_.size()),
        turned_(v_.size()),
        small_row_(padded(r_, column_pad<double>)),
        small_(r_ * small_row_),
        turn_(small_.size()),
        order_(r_) {}

  template <class Isa>
  FASTDIS_INLINE bool find(const double* gram, double* vectors, double* values) {
    for (int64_t a = 0; a < k_; ++a) std::copy_n(gram + a * k_, k_, gram_.data() + a * row_);
    // Any start that is no eigenvector's complement does: fixed, so that results are.
    uint64_t state = 0x9E3779B97F4A7C15u;
    std::fill(v_.begin(), v_.end(), 0.0);
    for (int64_t i = 0; i < r_; ++i) {
      for (int64_t a = 0; a < k_; ++a) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        v_[i * row_ + a] = static_cast<double>(state >> 11) * 0x1p-53 - 0.5;
      }
    }
    bool settled = false;
    for (int round = 0; round < 40 && !settled; ++round) {
      for (int step = 0; step < 3; ++step) {
        multiply_rows<Isa>();
        std::swap(v_, w_);
        orthonormalize(v_.data(), r_, row_);
      }
      settled = rayleigh_ritz<Isa>();
    }
    for (int64_t a = 0; a < k_; ++a) {
      for (int64_t j = 0; j < d_; ++j) vectors[a * d_ + j] = v_[j * row_ + a];
    }
    for (int64_t j = 0; j <= d_; ++j) values[j] = j < r_ ? value(j) : 0.0;
    return settled;
  }

 private:
  double value(int64_t j) const { return small_[order_[j] * small_row_ + order_[j]]; }

  // w = gram v, for every vector.
  template <class Isa>
  FASTDIS_INLINE void multiply_rows() {
    multiply<Isa>(padded(r_, row_pad), row_, k_, v_.data(), row_, 1, gram_.data(), row_, w_.data(), row_, false);
  }

  // Turns v into Ritz vectors; returns whether the wanted ones solve the eigenproblem to rounding.
  template <class Isa>
  FASTDIS_INLINE bool rayleigh_ritz() {
    multiply_rows<Isa>();
    for (int64_t i = 0; i < r_; ++i) {
      for (int64_t j = 0; j < r_; ++j) {
        const double *left = v_.data() + i * row_, *right = w_.data() + j * row_;
        double product = 0;
#pragma omp simd reduction(+ : product)
        for (int64_t a = 0; a < row_; ++a) product += left[a] * right[a];
        small_[i * small_row_ + j] = product;
      }
      for (int64_t j = 0; j < i; ++j) {
        double &one = small_[i * small_row_ + j], &other = small_[j * small_row_ + i];
        one = other = 0.5 * (one + other);
      }
    }
    jacobi(small_.data(), r_, small_row_, turn_.data(), order_);
    turn(v_);
    turn(w_);
    // A residual turns the wanted subspace by its length over the gap, so it is the gap that it is measured with.
    const double gap = value(d_ - 1) - (d_ < r_ ? value(d_) : 0.0);
    double worst = 0;
    for (int64_t j = 0; j < d_; ++j) {
      const double *vector = v_.data() + j * row_, *image = w_.data() + j * row_, scale = value(j);
      double square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t a = 0; a < row_; ++a) square += (image[a] - scale * vector[a]) * (image[a] - scale * vector[a]);
      worst = std::max(worst, square);
    }
    return std::sqrt(worst) <= std::max(1e-11 * gap, 4e-15 * value(0)) && gap > 0;
  }

  // Rows become those combinations of them that the last turn says, in its order.
  FASTDIS_INLINE void turn(Buffer<double>& rows) {
    std::fill(turned_.begin(), turned_.end(), 0.0);
    for (int64_t i = 0; i < r_; ++i) {
      double* to = turned_.data() + i * row_;
      for (int64_t j = 0; j < r_; ++j) {
        const double factor = turn_[order_[i] * small_row_ + j], *from = rows.data() + j * row_;
#pragma omp simd
        for (int64_t a = 0; a < row_; ++a) to[a] += factor * from[a];
      }
    }
    rows.swap(turned_);
  }

  int64_t k_, d_, r_, row_;
  Buffer<double> gram_, v_, w_, turned_;
  int64_t small_row_;
  Buffer<double> small_, turn_;
  std::vector<int64_t> order_;
};

// Vectors of the matrices from `begin` to `end`.
struct LeadingVectors {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* grams, int64_t begin, int64_t end, int64_t k, int64_t d, double* vectors,
                                 double* values, bool* settled) {
    Leading leading(k, d);
    for (int64_t q = begin; q < end; ++q)
      settled[q] = leading.find<Isa>(grams + q * k * k, vectors + q * k * d, values + q * (d + 1));
  }
};

// Bases of the neighbourhoods from `begin` to `end`.
struct HessianBases {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* vectors, int64_t begin, int64_t end, int64_t k, int64_t d, double* bases,
                                 bool* full) {
    const int64_t p = d * (d + 1) / 2, columns = 1 + d + p;
    std::vector<double> rows(columns * k);
    for (int64_t q = begin; q < end; ++q) {
      const double* frame = vectors + q * k * d;
      for (int64_t a = 0; a < k; ++a) {
        rows[a] = 1.0;
        for (int64_t j = 0; j < d; ++j) rows[(1 + j) * k + a] = frame[a * d + j];
        int64_t column = 1 + d;
        for (int64_t i = 0; i < d; ++i) {
          for (int64_t j = i; j < d; ++j) rows[column++ * k + a] = frame[a * d + i] * frame[a * d + j];
        }
      }
      full[q] = orthonormalize(rows.data(), columns, k) > 1e-8;
      for (int64_t a = 0; a < k; ++a) {
        for (int64_t c = 0; c < p; ++c) bases[(q * k + a) * p + c] = rows[(1 + d + c) * k + a];
      }
    }
  }
};

// Row `own` of the projector onto the rows of `vectors` [r, k], which are orthonormal, or of what that leaves of the
// identity.
struct ProjectorRow {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* vectors, int64_t r, int64_t k, int64_t own, bool complement,
                                 double* products) {
    std::fill_n(products, k, 0.0);
    for (int64_t c = 0; c < r; ++c) {
      const double factor = complement ? -vectors[c * k + own] : vectors[c * k + own];
#pragma omp simd
      for (int64_t b = 0; b < k; ++b) products[b] += factor * vectors[c * k + b];
    }
    if (complement) products[own] += 1.0;
  }
};

}  // namespace

void smallest(const float* values, int64_t n, const int64_t* rows, int64_t m, int64_t count, int64_t* columns,
              float* found, int threads) {
  parallel_ranges(m, 8, threads, [&](int64_t begin, int64_t end) {
    std::vector<Smallest::Entry> kept;
    for (int64_t q = begin; q < end; ++q) {
      multiversion<Smallest>(values + rows[q] * n, n, count, &kept);
      for (int64_t c = 0; c < count; ++c)
        std::tie(found[q * count + c], columns[q * count + c]) = kept[static_cast<std::size_t>(c)];
    }
  });
}

template <class T>
void squared_distances(const T* points, int64_t n, int64_t D, const T* queries, int64_t m, const int64_t* candidates,
                       int64_t count, double* out, int threads) {
  check_below(candidates, m * count, n);
  std::fill_n(out, m * count, 0.0);
  // Some dimensions of all points at a time: they stay in cache while each point is a candidate of many.
  for (int64_t first = 0; first < D; first += chunk) {
    parallel_ranges(m, 16, threads, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        multiversion<Distances<T>>(points, D, queries + q * D, candidates + q * count, count, first,
                                   std::min(D, first + chunk), out + q * count);
      }
    });
  }
}

template void squared_distances(const float*, int64_t, int64_t, const float*, int64_t, const int64_t*, int64_t, double*,
                                int);
template void squared_distances(const double*, int64_t, int64_t, const double*, int64_t, const int64_t*, int64_t,
                                double*, int);

void leading_vectors(const double* grams, int64_t m, int64_t k, int64_t d, double* vectors, double* values,
                     bool* settled, int threads) {
  parallel_ranges(m, 16, threads, [&](int64_t begin, int64_t end) {
    multiversion<LeadingVectors>(grams, begin, end, k, d, vectors, values, settled);
  });
}

void hessian_bases(const double* vectors, int64_t m, int64_t k, int64_t d, double* bases, bool* full, int threads) {
  parallel_ranges(m, 16, threads, [&](int64_t begin, int64_t end) {
    multiversion<HessianBases>(vectors, begin, end, k, d, bases, full);
  });
}

Occurrences occurrences(const int64_t* neighbours, int64_t m, int64_t k, int64_t n) {
  check_below(neighbours, m * k, n);
  if (n > INT32_MAX) throw std::out_of_range("there must be fewer than 2**31 points");
  if (m * k > UINT32_MAX) throw std::out_of_range("there must be fewer than 2**32 neighbours");
  Occurrences where;
  where.points.assign(neighbours, neighbours + m * k);
  where.places.resize(m * k);
  where.starts.resize(n + 1);
  group_rows(where.points.data(), m * k, static_cast<int32_t>(n), where.places.data(), where.starts.data());
  return where;
}

SparseRows alignment(const int64_t* neighbours, const double* bases, int64_t m, int64_t n, int64_t k, int64_t r,
                     bool complement, int threads) {
  const Occurrences where = occurrences(neighbours, m, k, n);
  std::vector<double> vectors(m * r * k);  // of each basis one after the other
  parallel_ranges(m, 64, threads, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      for (int64_t c = 0; c < r; ++c) {
        for (int64_t b = 0; b < k; ++b) vectors[(q * r + c) * k + b] = bases[(q * k + b) * r + c];
      }
    }
  });

  // A row at a time: its columns are few, but scattered.
  constexpr int64_t at_once = 64;
  const int64_t pieces = (n + at_once - 1) / at_once;
  std::vector<std::vector<int32_t>> columns(pieces);
  std::vector<std::vector<double>> values(pieces);
  SparseRows result;
  result.starts.assign(n + 1, 0);
  parallel_ranges(pieces, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(n, 0.0), products(k);
    OrderedSet touched(n);
    for (int64_t piece = begin; piece < end; ++piece) {
      for (int64_t row = piece * at_once; row < std::min(n, (piece + 1) * at_once); ++row) {
        for (int64_t i = where.starts[row]; i < where.starts[row + 1]; ++i) {
          const int64_t q = where.places[i] / k, own = where.places[i] % k;
          multiversion<ProjectorRow>(vectors.data() + q * r * k, r, k, own, complement, products.data());
          const int32_t* near = where.points.data() + q * k;
          for (int64_t b = 0; b < k; ++b) {
            touched.add(near[b]);
            sums[near[b]] += products[b];
          }
        }
        const std::size_t before = columns[piece].size();
        touched.drain([&](int64_t column) {
          columns[piece].push_back(static_cast<int32_t>(column));
          values[piece].push_back(sums[column]);
          sums[column] = 0.0;
        });
        result.starts[row + 1] = static_cast<int64_t>(columns[piece].size() - before);
      }
    }
  });
  for (int64_t i = 0; i < n; ++i) result.starts[i + 1] += result.starts[i];
  result.columns.reserve(result.starts[n]);
  result.values.reserve(result.starts[n]);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    result.columns.insert(result.columns.end(), columns[piece].begin(), columns[piece].end());
    result.values.insert(result.values.end(), values[piece].begin(), values[piece].end());
    columns[piece] = {};
    values[piece] = {};
  }
  return result;
}

}  // namespace fastdis::host
