#include "classes.h"

#include <algorithm>
#include <stdexcept>

namespace fastdis::host {

std::vector<int64_t> dense_classes(const int64_t* factor, int64_t stride, int64_t n, int32_t* classes) {
  std::vector<int64_t> values;
  if (n == 0) return values;
  int64_t lowest = factor[0], highest = factor[0];
  for (int64_t i = 1; i < n; ++i) {
    lowest = std::min(lowest, factor[i * stride]);
    highest = std::max(highest, factor[i * stride]);
  }
  // Differences of unsigned numbers do not overflow.
  const uint64_t base = static_cast<uint64_t>(lowest), span = static_cast<uint64_t>(highest) - base;
  const auto place = [&](int64_t i) { return static_cast<uint64_t>(factor[i * stride]) - base; };
  if (span < 4 * static_cast<uint64_t>(n) + 4096) {
    // Marking a value in a table costs far less than sorting.
    std::vector<int32_t> number(span + 1, 0);
    for (int64_t i = 0; i < n; ++i) number[place(i)] = 1;
    for (uint64_t at = 0; at <= span; ++at) {
      if (number[at] == 0) continue;
      number[at] = static_cast<int32_t>(values.size());
      values.push_back(static_cast<int64_t>(base + at));
    }
    for (int64_t i = 0; i < n; ++i) classes[i] = number[place(i)];
  } else {
    values.resize(n);
    for (int64_t i = 0; i < n; ++i) values[i] = factor[i * stride];
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    for (int64_t i = 0; i < n; ++i) {
      const auto found = std::lower_bound(values.begin(), values.end(), factor[i * stride]);
      classes[i] = static_cast<int32_t>(found - values.begin());
    }
  }
  return values;
}

void group_rows(const int32_t* classes, int64_t n, int32_t size, uint32_t* rows, int64_t* starts) {
  std::fill_n(starts, std::max(size, 0) + 1, int64_t{0});
  for (int64_t i = 0; i < n; ++i) {
    if (classes[i] < 0 || classes[i] >= size)
      throw std::out_of_range("a class is below 0 or not below the number of classes");
    ++starts[classes[i] + 1];
  }
  for (int32_t c = 0; c < size; ++c) starts[c + 1] += starts[c];
  std::vector<int64_t> next(starts, starts + std::max(size, 0));
  for (int64_t i = 0; i < n; ++i) rows[next[classes[i]]++] = static_cast<uint32_t>(i);
}

}  // namespace fastdis::host
