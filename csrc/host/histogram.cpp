#include "histogram.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../core/threads.h"

namespace fastdis::host {

namespace {

// Rows taken at once: few enough that their factors are still in cache for the next code.
constexpr int64_t block_rows = 2048;

std::vector<int64_t> offsets_of(const int32_t* sizes, int64_t K) {
  std::vector<int64_t> offsets(K + 1, 0);
  for (int64_t k = 0; k < K; ++k) offsets[k + 1] = offsets[k] + sizes[k];
  return offsets;
}

void check_range(const int32_t* values, int64_t n, int32_t limit) {
  uint32_t highest = 0;  // a negative value reads as a large one
  for (int64_t i = 0; i < n; ++i) highest = std::max(highest, static_cast<uint32_t>(values[i]));
  if (n > 0 && (limit < 0 || highest >= static_cast<uint32_t>(limit)))
    throw std::out_of_range("a class is below 0 or not below the number of classes");
}

// Standard normal distribution function, precise in both tails.
double normal_cdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

}  // namespace

void discretize(const double* codes, int64_t d, int64_t n, const double* edges, int64_t count, int32_t* bins,
                int threads) {
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const double* edge = edges + j * (count + 1);
      const double width = edge[count] - edge[0];
      // Where it is not a number to reckon with, every search starts at bin 0.
      const double bins_per_unit = width > 0 && std::isfinite(count / width) ? count / width : 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const double value = codes[j * n + i];
        const double guess = (value - edge[0]) * bins_per_unit;
        int64_t bin = guess > 0 ? (guess < count ? static_cast<int64_t>(guess) : count - 1) : 0;
        // The edges decide, not the guess, which rounding may put one bin off.
        while (bin > 0 && value < edge[bin]) --bin;
        while (bin + 1 < count && value >= edge[bin + 1]) ++bin;
        bins[j * n + i] = static_cast<int32_t>(bin);
      }
    }
  });
}

void joint_histogram(const int32_t* rows, int64_t d, int32_t limit, const int32_t* columns, int64_t K,
                     const int32_t* sizes, int64_t n, int64_t* counts, int threads) {
  const std::vector<int64_t> offsets = offsets_of(sizes, K);
  for (int64_t j = 0; j < d; ++j) check_range(rows + j * n, n, limit);
  for (int64_t k = 0; k < K; ++k) check_range(columns + k * n, n, sizes[k]);
  std::fill_n(counts, d * offsets[K] * limit, int64_t{0});
  // Each code has a table of its own, small enough to stay in cache, so threads share nothing.
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t start = 0; start < n; start += block_rows) {
      const int64_t stop = std::min(n, start + block_rows);
      for (int64_t j = begin; j < end; ++j) {
        const int32_t* row = rows + j * n;
        for (int64_t k = 0; k < K; ++k) {
          const int32_t* column = columns + k * n;
          int64_t* table = counts + (j * offsets[K] + offsets[k]) * limit;
          for (int64_t i = start; i < stop; ++i) ++table[int64_t{column[i]} * limit + row[i]];
        }
      }
    }
  });
}

void gaussian_histogram(const double* mean, const double* std, int64_t d, int64_t n, const double* edges, int32_t limit,
                        const int32_t* columns, int64_t K, const int32_t* sizes, double* mass, int threads) {
  const std::vector<int64_t> offsets = offsets_of(sizes, K);
  for (int64_t k = 0; k < K; ++k) check_range(columns + k * n, n, sizes[k]);
  std::fill_n(mass, d * offsets[K] * limit, 0.0);
  constexpr double reach = 9.0;  // standard deviations; what lies beyond rounds to nothing
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> share(limit);
    for (int64_t j = begin; j < end; ++j) {
      const double* inner = edges + j * (int64_t{limit} + 1) + 1;  // the edges between bins, limit - 1 of them
      for (int64_t i = 0; i < n; ++i) {
        const double center = mean[j * n + i], spread = std[j * n + i];
        // No further than numbers go: an infinite edge is beyond any reach, even an infinite one.
        const double until = std::min(center + reach * spread, std::numeric_limits<double>::max());
        const double* first = std::lower_bound(inner, inner + limit - 1, center - reach * spread);
        const double* last = std::upper_bound(first, inner + limit - 1, until);
        // Bins `low` to `high` are all that the row reaches; a point (spread 0) has the bin above the edge it lies on.
        int64_t low = first - inner, high = last - inner;
        if (spread > 0) {
          double below = 0.0;
          for (int64_t b = low; b < high; ++b) {
            const double here = normal_cdf((inner[b] - center) / spread);
            share[b] = here - below;
            below = here;
          }
          share[high] = 1.0 - below;
        } else {
          low = high;
          share[high] = 1.0;
        }
        for (int64_t k = 0; k < K; ++k) {
          double* table = mass + (j * offsets[K] + offsets[k] + columns[k * n + i]) * limit;
          for (int64_t b = low; b <= high; ++b) table[b] += share[b];
        }
      }
    }
  });
}

}  // namespace fastdis::host
