// Gradient boosting of a classifier, with exact splits or splits between bins.
//
// The one estimator of DCI that no library serves: scikit-learn sorts the rows of every node anew, in which it spends
// nineteen twentieths of its minutes, and faster libraries grow other trees (second-order gains, leaves of one Newton
// step on all rows), which moves DCI's scores by 0.04 to 0.08. scikit-learn is the tests' oracle.

#pragma once

#include <cstdint>

namespace fastdis::host {

struct BoostingSettings {
  int64_t rounds;
  int64_t depth;
  int64_t bins;  // that every code is cut into, at most 65536; 0 for exact splits
  double rate;
  uint64_t seed;
};

// How many trees a round takes: one for each class, but one in all where there are two.
int64_t boosting_trees(int32_t size);

// Boosts regression trees against the multinomial deviance (Friedman 2001, algorithm 6; for two classes algorithm 5,
// the binomial one), without shrinking of leaves or sampling, as scikit-learn's GradientBoostingClassifier does by
// default. Of splits equally good the seed chooses the code; results do not depend on the number of threads.
//
// codes [n, d] by rows, n at least 1; classes [n] holds 0 to size - 1; test_codes [m, d].
// importance [d]: how much the splits on each code reduced the squared error of the trees, as shares of the whole, or
// all 0 where nothing was split. scores [trees, n] and test_scores [trees, m]: the final sums over all rounds.
// Throws std::out_of_range where a class is none of these.
void boost(const float* codes, int64_t n, int64_t d, const int32_t* classes, int32_t size, const float* test_codes,
           int64_t m, const BoostingSettings& settings, double* importance, double* scores, double* test_scores,
           int threads);

}  // namespace fastdis::host
