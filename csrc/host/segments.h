// Statistics of codes within the rows that share a factor's value.

#pragma once

#include <cstdint>

namespace fastdis::host {

// spread[j, offset of k + c]: the `quantile` (0 to 1, between order statistics as a straight line) of
// |codes[j, i] - their mean|, both over the rows i where classes[k] is c; 0 where there are none.
// codes [d, n], classes [K, n] holds 0 to sizes[k] - 1, n < 2^32, spread [d, sum of sizes]; offset of k is the sum of
// the sizes before k. Throws std::out_of_range where a class is none of these.
void segment_spread(const double* codes, int64_t d, int64_t n, const int32_t* classes, int64_t K, const int32_t* sizes,
                    double quantile, double* spread, int threads);

}  // namespace fastdis::host
