// The samples that the BetaVAE and FactorVAE scores vote with, drawn from a table of codes.

#pragma once

#include <cstdint>

namespace fastdis::host {

// The rows of a table by the values of each of K factors. The rows with value v of factor k are
// rows[k * n + starts[first[k] + v]] up to rows[k * n + starts[first[k] + v + 1]].
struct Groups {
  const uint32_t* rows;   // [K, n]
  const int64_t* starts;  // [first[K]]: of factor k one more than it has values
  const int64_t* first;   // [K + 1]
  int64_t K;
};

// BetaVAE: for each vote a factor, and the mean of |z - z'| over `pairs` pairs of rows that agree in it.
void paired_differences(const double* codes, int64_t n, int64_t d, const Groups& groups, uint64_t seed, int64_t votes,
                        int64_t pairs, int threads, double* differences /* [votes, d] */,
                        int32_t* factor /* [votes] */);

// FactorVAE: for each vote a factor, and which of the `active` codes varies least, relative to `variances` [d], over
// `samples` rows that agree in one value of it.
void least_varying_codes(const double* codes, int64_t n, int64_t d, const Groups& groups, const double* variances,
                         const int64_t* active, int64_t active_codes, uint64_t seed, int64_t votes, int64_t samples,
                         int threads, int32_t* code /* [votes] */, int32_t* factor /* [votes] */);

// Philox4x32-10 (core/philox.h), in place on its four counter words.
void philox4x32(uint32_t counter[4], uint64_t key);

}  // namespace fastdis::host
