#include "segments.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "../core/isa.h"
#include "../core/threads.h"
#include "classes.h"

namespace fastdis::host {

namespace {

// Quantiles of many sets of values, with the memory that they need.
class Quantile {
 public:
  explicit Quantile(double quantile) : quantile_(quantile) {}

  // Of m > 0 values, which it reorders: NumPy's default, a straight line between order statistics.
  FASTDIS_INLINE double operator()(double* values, int64_t m) {
    const double position = static_cast<double>(m - 1) * quantile_;
    const int64_t below = std::min(static_cast<int64_t>(position), m - 1);
    const int64_t above = m - 1 - below;
    double low, high;
    if ((above + 1) * 2 * group_size <= m) {
      keep_largest(values, m, above + 1);
      std::partial_sort(largest_.begin(), largest_.begin() + above + 1, largest_.end(), std::greater<>());
      low = largest_[above];
      high = above > 0 ? largest_[above - 1] : low;
    } else {
      std::nth_element(values, values + below, values + m);
      low = values[below];
      high = above > 0 ? *std::min_element(values + below + 1, values + m) : low;
    }
    const double part = position - static_cast<double>(below);
    // From the nearer end, so that a part of 1 gives `high` itself.
    return part < 0.5 ? low + (high - low) * part : high - (high - low) * (1.0 - part);
  }

 private:
  static constexpr int64_t group_size = 16;

  // Leaves the `count` largest in largest_, and few others. As many groups of values as `count` have a maximum not
  // below the count-th largest maximum, so as many values are not below it, and all of the largest are among those.
  FASTDIS_INLINE void keep_largest(const double* values, int64_t m, int64_t count) {
    const int64_t groups = m / group_size;
    maxima_.assign(values, values + groups);
    for (int64_t t = 1; t < group_size; ++t) {
      const double* next = values + t * groups;
      double* maxima = maxima_.data();
#pragma omp simd
      for (int64_t g = 0; g < groups; ++g) maxima[g] = next[g] > maxima[g] ? next[g] : maxima[g];
    }
    largest_ = maxima_;
    std::nth_element(largest_.begin(), largest_.begin() + count - 1, largest_.end(), std::greater<>());
    const double enough = largest_[count - 1];
    largest_.clear();
    for (int64_t g = 0; g < groups; ++g) {
      if (maxima_[g] < enough) continue;
      for (int64_t i = g; i < group_size * groups; i += groups) {
        if (values[i] >= enough) largest_.push_back(values[i]);
      }
    }
    for (int64_t i = group_size * groups; i < m; ++i) {
      if (values[i] >= enough) largest_.push_back(values[i]);
    }
  }

  double quantile_;
  std::vector<double> maxima_, largest_;
};

// Of one code, for every class of one factor.
struct Spread {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* code, const uint32_t* rows, const int64_t* starts, int32_t size,
                                 Quantile* quantile, double* values, double* spread) {
    for (int32_t c = 0; c < size; ++c) {
      const uint32_t* members = rows + starts[c];
      const int64_t m = starts[c + 1] - starts[c];
      spread[c] = 0.0;
      if (m == 0) continue;
      // Differences to the first value keep the digits that a common offset would cost the sum.
      const double origin = code[members[0]];
      double sum = 0.0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < m; ++i) {
        values[i] = code[members[i]] - origin;
        sum += values[i];
      }
      const double mean = sum / static_cast<double>(m);
#pragma omp simd
      for (int64_t i = 0; i < m; ++i) values[i] = std::abs(values[i] - mean);
      spread[c] = (*quantile)(values, m);
    }
  }
};

}  // namespace

void segment_spread(const double* codes, int64_t d, int64_t n, const int32_t* classes, int64_t K, const int32_t* sizes,
                    double quantile, double* spread, int threads) {
  std::vector<uint32_t> rows(K * n);
  std::vector<int64_t> offsets(K + 1, 0);
  for (int64_t k = 0; k < K; ++k) offsets[k + 1] = offsets[k] + sizes[k];
  std::vector<int64_t> starts(offsets[K] + K);  // of each factor one more than it has classes
  for (int64_t k = 0; k < K; ++k)
    group_rows(classes + k * n, n, sizes[k], rows.data() + k * n, starts.data() + offsets[k] + k);
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> values(n);
    Quantile quantile_of(quantile);
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t k = 0; k < K; ++k) {
        multiversion<Spread>(codes + j * n, static_cast<const uint32_t*>(rows.data() + k * n),
                             static_cast<const int64_t*>(starts.data() + offsets[k] + k), sizes[k], &quantile_of,
                             values.data(), spread + j * offsets[K] + offsets[k]);
      }
    }
  });
}

}  // namespace fastdis::host
