// In one dimension the neighbours of a sorted point lie beside it: the k nearest in its class are a window of the
// sorted class, the points within their distance a window of the whole sorted code. Both windows only move forward.

#include "neighbours.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../core/threads.h"

namespace fastdis::host {

namespace {

// digamma at the whole numbers 1 ... n.
std::vector<double> digammas(int64_t n) {
  std::vector<double> values(n + 1);
  long double sum = -0.577215664901532860606512090082402431L;
  for (int64_t m = 1; m <= n; ++m) {
    values[m] = static_cast<double>(sum);
    sum += 1.0L / m;
  }
  return values;
}

// The first of [0, n) where `holds`, which is false up to there and true from there on; n where it is true nowhere.
// Looks outward from `guess` in doubling steps, so that a short way takes a short time.
template <class Predicate>
int64_t first_where(int64_t n, int64_t guess, const Predicate& holds) {
  int64_t below = guess - 1, above = guess;  // false up to `below`, true from `above` on, once the steps end
  int64_t step = 1;
  if (guess < n && !holds(guess)) {
    for (below = guess, above = guess + 1; above < n && !holds(above); step *= 2) {
      below = above;
      above += step;
    }
    above = std::min(above, n);
  } else {
    for (; below >= 0 && holds(below); step *= 2) {
      above = below;
      below -= step;
    }
    below = std::max<int64_t>(below, -1);
  }
  while (above - below > 1) {
    const int64_t middle = below + (above - below) / 2;
    (holds(middle) ? above : below) = middle;
  }
  return above;
}

// The sum of digamma(m) over one class, m the points of `all` that lie closer than the k-th neighbour in the class,
// the point itself among them; where that neighbour lies at distance 0, the points at distance 0.
double sum_over_class(const double* members, int64_t count, int64_t k, const std::vector<double>& all,
                      const std::vector<double>& digamma) {
  const int64_t n = static_cast<int64_t>(all.size());
  double sum = 0;
  int64_t window = 0, lower = 0, upper = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double x = members[i];
    window = std::max(window, i - k);
    while (window < i && window + k + 1 < count && members[window + k + 1] - x < x - members[window]) ++window;
    const double distance = std::max(x - members[window], members[window + k] - x);
    const double radius = std::nextafter(distance, 0.0);
    lower = first_where(n, lower, [&](int64_t j) { return x - all[j] <= radius; });
    upper = first_where(n, upper, [&](int64_t j) { return all[j] - x > radius; });
    sum += digamma[upper - lower];
  }
  return sum;
}

double information_about(const std::vector<double>& sorted, const std::vector<uint32_t>& order, const int32_t* classes,
                         int64_t neighbours, const std::vector<double>& digamma) {
  const int64_t n = static_cast<int64_t>(sorted.size());
  std::vector<int64_t> counts(*std::max_element(classes, classes + n) + 1);
  for (int64_t i = 0; i < n; ++i) ++counts[classes[i]];
  std::vector<int64_t> starts(counts.size() + 1);
  std::partial_sum(counts.begin(), counts.end(), starts.begin() + 1);

  std::vector<double> members(n), all;
  all.reserve(n);
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t c = classes[order[i]];
    members[next[c]++] = sorted[i];
    if (counts[c] > 1) all.push_back(sorted[i]);  // a point alone in its class has no neighbour, and is left out
  }
  if (all.empty()) return 0;

  double sum = 0;
  for (size_t c = 0; c < counts.size(); ++c) {
    if (counts[c] < 2) continue;
    const int64_t k = std::min(neighbours, counts[c] - 1);
    sum += static_cast<double>(counts[c]) * (digamma[k] - digamma[counts[c]]) -
           sum_over_class(members.data() + starts[c], counts[c], k, all, digamma);
  }
  return std::max(0.0, digamma[all.size()] + sum / static_cast<double>(all.size()));
}

}  // namespace

void neighbour_information(const double* codes, const int32_t* classes, int64_t n, int64_t d, int64_t K,
                           int64_t neighbours, int threads, double* information) {
  const std::vector<double> digamma = digammas(n);
  std::vector<std::vector<double>> sorted(d);
  std::vector<std::vector<uint32_t>> order(d);
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const double* code = codes + j * n;
      std::vector<std::pair<double, uint32_t>> pairs(n);
      for (int64_t i = 0; i < n; ++i) pairs[i] = {code[i], static_cast<uint32_t>(i)};
      std::sort(pairs.begin(), pairs.end());
      sorted[j].resize(n);
      order[j].resize(n);
      for (int64_t i = 0; i < n; ++i) {
        sorted[j][i] = pairs[i].first;
        order[j][i] = pairs[i].second;
      }
    }
  });
  parallel_ranges(d * K, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      const int64_t j = cell / K;
      information[cell] = information_about(sorted[j], order[j], classes + cell % K * n, neighbours, digamma);
    }
  });
}

}  // namespace fastdis::host
