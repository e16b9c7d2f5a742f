// Trees grow level by level. Where splits are exact, every code is sorted once; a node scans its sorted rows from left
// to right and hands them to its children in that same order, so that nothing is ever sorted again. Where codes are cut
// into bins, a node sums the residuals in each bin, and of two children only the smaller has to: the other's sums are
// what is left of its parent's.

#include "boosting.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../core/isa.h"
#include "../core/scalar.h"
#include "../core/threads.h"

namespace fastdis::host {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// Values of a code no further apart than this count as equal, and a node whose residuals vary less is not split, as in
// scikit-learn.
constexpr float least_gap = 1e-7f;
constexpr double least_variance = std::numeric_limits<double>::epsilon();
constexpr double least_curvature = 1e-150;

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

// Children of node i are nodes 2 i + 1 and 2 i + 2. Its rows are those at the positions from `begin` to `end`.
struct Node {
  int64_t begin = 0, end = 0, middle = 0;
  int64_t code = -1;  // that it is split on, or -1
  double threshold = 0, step = 0;
  double gain = -infinity;  // total^2 / count, summed over the two children

  int64_t count() const { return end - begin; }
};

// Visits codes in random order, so that chance decides between splits equally good. The order must start the same for
// every tree, whoever grows it.
template <class Visit>
void shuffled(std::vector<int64_t>& codes, Random& random, const Visit& visit) {
  for (size_t unseen = codes.size(); unseen > 0; --unseen) {
    std::swap(codes[unseen - 1], codes[random.next() % unseen]);
    visit(codes[unseen - 1]);
  }
}

double midpoint(double low, double high) {
  const double middle = low / 2 + high / 2;
  return middle == high ? low : middle;
}

struct Entry {
  float value;
  int32_t row;
};

bool apart(const Entry& low, const Entry& high) { return high.value > low.value + least_gap; }

// The rows of all codes, [d, n], in rising order of each.
std::vector<Entry> sorted_entries(const float* codes, int64_t n, int64_t d, int threads) {
  std::vector<Entry> entries(d * n);
  parallel_ranges(d, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      Entry* column = entries.data() + j * n;
      for (int64_t i = 0; i < n; ++i) column[i] = {codes[i * d + j], static_cast<int32_t>(i)};
      std::sort(column, column + n, [](const Entry& a, const Entry& b) {
        return a.value < b.value || (a.value == b.value && a.row < b.row);
      });
    }
  });
  return entries;
}

// gains[i]: how much of the squared error it explains to put the first i + 1 of `count` rows, whose residuals add up to
// sums[i], on the left; minus infinity where barrier[i] says that it cannot be done. Returns the largest.
struct Gains {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* sums, const double* barrier, const double* inverse, double total,
                                 int64_t count, double* gains, double* largest) {
    double most = -infinity;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count - 1; ++i) {
      const double left = sums[i], right = total - left;
      const double gain = left * left * inverse[i + 1] + right * right * inverse[count - 1 - i] + barrier[i];
      gains[i] = gain;
      most = gain > most ? gain : most;
    }
    *largest = most;
  }
};

// Considers every split between two values of a node.
class ExactSplitter {
 public:
  ExactSplitter(const std::vector<Entry>& sorted, int64_t n, int64_t d)
      : sorted_(sorted),
        n_(n),
        d_(d),
        current_(d * n),
        next_(d * n),
        right_(n),
        goes_left_(n),
        sums_(n),
        barrier_(n),
        gains_(n),
        inverse_(n + 1),
        codes_(d) {
    for (int64_t i = 1; i <= n; ++i) inverse_[i] = 1.0 / static_cast<double>(i);
  }

  void start(const double*) {
    entries_ = sorted_.data();
    std::iota(codes_.begin(), codes_.end(), int64_t{0});
  }

  void next_level() {
    current_.swap(next_);
    entries_ = current_.data();
  }

  int32_t row(int64_t position) const { return entries_[position].row; }

  void find(int64_t, Node& node, double total, const double* residual, Random& random) {
    const int64_t count = node.count();
    shuffled(codes_, random, [&](int64_t j) {
      const Entry* column = entries_ + j * n_ + node.begin;
      if (!apart(column[0], column[count - 1])) return;
      double sum = 0;
      for (int64_t i = 0; i + 1 < count; ++i) {
        sum += residual[column[i].row];
        sums_[i] = sum;
        barrier_[i] = apart(column[i], column[i + 1]) ? 0 : -infinity;
      }
      double gain;
      multiversion<Gains>(static_cast<const double*>(sums_.data()), static_cast<const double*>(barrier_.data()),
                          static_cast<const double*>(inverse_.data()), total, count, gains_.data(), &gain);
      if (gain > node.gain) {
        const int64_t last = std::find(gains_.begin(), gains_.end(), gain) - gains_.begin();
        node.gain = gain;
        node.code = j;
        node.middle = node.begin + last + 1;
        node.threshold = midpoint(column[last].value, column[last + 1].value);
      }
    });
  }

  // Gives the entries to the two children, each in the order they have; leaves need those of one code only.
  void hand_down(int64_t, const Node& node, bool to_leaves, const double*) {
    const Entry* chosen = entries_ + node.code * n_;
    for (int64_t i = node.begin; i < node.end; ++i) goes_left_[chosen[i].row] = i < node.middle;
    for (int64_t j = 0; j < (to_leaves ? 1 : d_); ++j) {
      const Entry* from = entries_ + j * n_;
      Entry* to = next_.data() + j * n_;
      // No branches, for no processor foresees them: each entry is written to both sides, and stays on one.
      int64_t left = node.begin, right = 0;
      for (int64_t i = node.begin; i < node.end; ++i) {
        const int64_t goes_left = goes_left_[from[i].row];
        to[left] = right_[right] = from[i];
        left += goes_left;
        right += 1 - goes_left;
      }
      std::copy_n(right_.begin(), right, to + node.middle);
    }
  }

 private:
  const std::vector<Entry>& sorted_;
  const int64_t n_, d_;
  const Entry* entries_ = nullptr;
  std::vector<Entry> current_, next_;  // [d, n], of this level and of the one below
  std::vector<Entry> right_;
  std::vector<char> goes_left_;
  std::vector<double> sums_, barrier_, gains_, inverse_;
  std::vector<int64_t> codes_;
};

// Codes cut into bins of about as many rows each.
struct Binned {
  std::vector<uint16_t> bins;      // [n, d]
  std::vector<int64_t> offsets;    // [d + 1], of the bins of each code among those of all
  std::vector<double> thresholds;  // that each bin ends at
};

Binned binned(const std::vector<Entry>& sorted, int64_t n, int64_t d, int64_t bins) {
  Binned result{std::vector<uint16_t>(n * d), {0}, {}};
  for (int64_t j = 0; j < d; ++j) {
    const Entry* column = sorted.data() + j * n;
    int64_t values = 1;
    for (int64_t i = 1; i < n; ++i) values += apart(column[i - 1], column[i]);
    int64_t bin = 0;
    for (int64_t i = 0; i < n; ++i) {
      // A bin ends where it has its share of the rows, or after every value where there are no more values than bins.
      const bool full = values <= bins || i * bins >= (bin + 1) * n;
      if (i > 0 && full && bin + 1 < bins && apart(column[i - 1], column[i])) {
        result.thresholds.push_back(midpoint(column[i - 1].value, column[i].value));
        ++bin;
      }
      result.bins[column[i].row * d + j] = static_cast<uint16_t>(bin);
    }
    result.thresholds.push_back(infinity);
    result.offsets.push_back(static_cast<int64_t>(result.thresholds.size()));
  }
  return result;
}

// Considers the splits between bins.
class HistogramSplitter {
 public:
  HistogramSplitter(const Binned& binned, int64_t n, int64_t d, int64_t depth)
      : binned_(binned),
        n_(n),
        d_(d),
        cells_(binned.offsets.back()),
        rows_(n),
        right_(n),
        histograms_(((int64_t{1} << depth) - 1) * cells_),
        codes_(d) {}

  void start(const double* residual) {
    std::iota(codes_.begin(), codes_.end(), int64_t{0});
    std::iota(rows_.begin(), rows_.end(), int32_t{0});
    count_up(0, 0, n_, residual);
  }

  void next_level() {}

  int32_t row(int64_t position) const { return rows_[position]; }

  void find(int64_t index, Node& node, double total, const double*, Random& random) {
    const double count = static_cast<double>(node.count());
    shuffled(codes_, random, [&](int64_t j) {
      const Cell* cells = histograms_.data() + index * cells_;
      Cell left;
      for (int64_t cell = binned_.offsets[j]; cell + 1 < binned_.offsets[j + 1]; ++cell) {
        if (cells[cell].count == 0) continue;
        left.sum += cells[cell].sum;
        left.count += cells[cell].count;
        const double right = total - left.sum, right_count = count - left.count;
        if (right_count == 0) break;
        const double gain =
            (left.sum * left.sum * right_count + right * right * left.count) / (left.count * right_count);
        if (gain > node.gain) {
          node.gain = gain;
          node.code = j;
          node.middle = node.begin + static_cast<int64_t>(left.count);
          node.threshold = binned_.thresholds[cell];
          last_bin_ = cell - binned_.offsets[j];
        }
      }
    });
  }

  // Called for a node right after its split was found.
  void hand_down(int64_t index, const Node& node, bool to_leaves, const double* residual) {
    int64_t left = node.begin, right = 0;
    for (int64_t i = node.begin; i < node.end; ++i) {
      const int32_t row = rows_[i];
      const int64_t goes_left = binned_.bins[row * d_ + node.code] <= last_bin_;
      rows_[left] = right_[right] = row;
      left += goes_left;
      right += 1 - goes_left;
    }
    std::copy_n(right_.begin(), right, rows_.begin() + node.middle);
    if (to_leaves) return;
    const bool left_is_smaller = node.middle - node.begin <= node.end - node.middle;
    const int64_t smaller = 2 * index + (left_is_smaller ? 1 : 2), larger = 2 * index + (left_is_smaller ? 2 : 1);
    count_up(smaller, left_is_smaller ? node.begin : node.middle, left_is_smaller ? node.middle : node.end, residual);
    const Cell* parent = histograms_.data() + index * cells_;
    const Cell* known = histograms_.data() + smaller * cells_;
    Cell* rest = histograms_.data() + larger * cells_;
    for (int64_t cell = 0; cell < cells_; ++cell)
      rest[cell] = {parent[cell].sum - known[cell].sum, parent[cell].count - known[cell].count};
  }

 private:
  struct Cell {
    double sum = 0, count = 0;
  };

  void count_up(int64_t index, int64_t begin, int64_t end, const double* residual) {
    Cell* cells = histograms_.data() + index * cells_;
    std::fill_n(cells, cells_, Cell{});
    const int64_t* offsets = binned_.offsets.data();
    for (int64_t i = begin; i < end; ++i) {
      const double r = residual[rows_[i]];
      const uint16_t* bins = binned_.bins.data() + rows_[i] * d_;
      for (int64_t j = 0; j < d_; ++j) {
        Cell& cell = cells[offsets[j] + bins[j]];
        cell.sum += r;
        cell.count += 1;
      }
    }
  }

  const Binned& binned_;
  const int64_t n_, d_, cells_;
  std::vector<int32_t> rows_, right_;
  std::vector<Cell> histograms_;  // [nodes that may be split, cells]
  std::vector<int64_t> codes_;
  int64_t last_bin_ = 0;  // on the left of the split found last
};

// Grows one tree after another, in memory of its own.
template <class Splitter>
class Grower {
 public:
  Grower(const Splitter& splitter, int64_t n, int64_t depth)
      : splitter_(splitter), n_(n), depth_(depth), nodes_((int64_t{2} << depth) - 1) {}

  // Fits residual [n], adds to importance [d] what each split explains, and moves the scores [n] by `rate` times the
  // Newton step of their leaf.
  void grow(const double* residual, double rate, uint64_t seed, double* importance, double* scores) {
    Random random(seed);
    nodes_[0] = {0, n_};
    splitter_.start(residual);
    for (int64_t level = 0, first = 0; level <= depth_; ++level, first = 2 * first + 1) {
      for (int64_t i = first; i <= 2 * first; ++i) {
        Node& node = nodes_[i];
        const bool splits = level < depth_ && split(i, node, residual, random, importance);
        if (splits) {
          splitter_.hand_down(i, node, level + 1 == depth_, residual);
        } else {
          settle(node, residual, rate, scores);
        }
        if (level < depth_) {
          nodes_[2 * i + 1] = splits ? Node{node.begin, node.middle} : Node{};
          nodes_[2 * i + 2] = splits ? Node{node.middle, node.end} : Node{};
        }
      }
      splitter_.next_level();
    }
  }

  // What the last tree adds to the score of a row that it did not see.
  double operator()(const float* row) const {
    int64_t i = 0;
    while (nodes_[i].code >= 0) i = 2 * i + (row[nodes_[i].code] <= nodes_[i].threshold ? 1 : 2);
    return nodes_[i].step;
  }

 private:
  bool split(int64_t index, Node& node, const double* residual, Random& random, double* importance) {
    const double count = static_cast<double>(node.count());
    if (count < 2) return false;
    double total = 0, squares = 0;
    for (int64_t i = node.begin; i < node.end; ++i) {
      const double r = residual[splitter_.row(i)];
      total += r;
      squares += r * r;
    }
    const double explained = total * total / count;
    if (squares - explained <= least_variance * count) return false;
    splitter_.find(index, node, total, residual, random);
    if (node.code < 0) return false;
    importance[node.code] += std::max(node.gain - explained, 0.0);
    return true;
  }

  void settle(Node& node, const double* residual, double rate, double* scores) const {
    double gradient = 0, curvature = 0;
    for (int64_t i = node.begin; i < node.end; ++i) {
      const double r = residual[splitter_.row(i)];
      gradient += r;
      curvature += std::abs(r) * (1 - std::abs(r));
    }
    node.step = std::abs(curvature) < least_curvature ? 0 : rate * (gradient / curvature);
    for (int64_t i = node.begin; i < node.end; ++i) scores[splitter_.row(i)] += node.step;
  }

  Splitter splitter_;
  const int64_t n_, depth_;
  std::vector<Node> nodes_;
};

// residual [trees, n] of the rows from `begin` to `end`: whether a row is of the class, less how likely it is said to
// be.
struct Residuals {
  template <class Isa>
  static FASTDIS_INLINE void run(const double* scores, const int32_t* classes, int64_t n, int64_t trees, int64_t begin,
                                 int64_t end, double* residual) {
    if (trees == 1) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) residual[i] = (classes[i] == 1 ? 1.0 : 0.0) - logistic(scores[i]);
      return;
    }
    constexpr int64_t block = 256;
    double most[block], sum[block];
    for (int64_t start = begin; start < end; start += block) {
      const int64_t count = end - start < block ? end - start : block;
      for (int64_t i = 0; i < count; ++i) most[i] = scores[start + i], sum[i] = 0;
      for (int64_t c = 1; c < trees; ++c) {
        const double* score = scores + c * n + start;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) most[i] = score[i] > most[i] ? score[i] : most[i];
      }
      for (int64_t c = 0; c < trees; ++c) {
        const double* score = scores + c * n + start;
        double* share = residual + c * n + start;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          share[i] = share_of_softmax(score[i] - most[i]);
          sum[i] += share[i];
        }
      }
      for (int64_t c = 0; c < trees; ++c) {
        double* share = residual + c * n + start;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) share[i] = (classes[start + i] == c ? 1.0 : 0.0) - share[i] / sum[i];
      }
    }
  }
};

// What the scores are before the first round: what is known of the classes without the codes.
std::vector<double> prior_scores(const int32_t* classes, int64_t n, int32_t size) {
  std::vector<double> share(size);
  for (int64_t i = 0; i < n; ++i) share[classes[i]] += 1.0 / static_cast<double>(n);
  constexpr double least = std::numeric_limits<float>::epsilon();
  for (double& p : share) p = std::clamp(p, least, 1 - least);
  if (size == 2) return {std::log(share[1] / (1 - share[1]))};
  for (double& p : share) p = std::log(p);
  return share;
}

template <class Splitter>
void boost_with(const Splitter& splitter, int64_t n, int64_t d, const int32_t* classes, int32_t size,
                const float* test_codes, int64_t m, const BoostingSettings& settings, double* importance,
                double* scores, double* test_scores, int threads) {
  const int64_t trees = boosting_trees(size);
  const std::vector<double> prior = prior_scores(classes, n, size);
  for (int64_t c = 0; c < trees; ++c) {
    std::fill_n(scores + c * n, n, prior[c]);
    std::fill_n(test_scores + c * m, m, prior[c]);
  }
  // More than two scores share one freedom, which gives the Newton step of a leaf this factor.
  const double rate = settings.rate * (size == 2 ? 1.0 : (size - 1.0) / size);
  Random random(settings.seed);
  std::vector<uint64_t> seeds(trees);
  std::vector<double> residual(trees * n), explained(trees * d);
  const int64_t growers = std::clamp<int64_t>(threads, 1, trees);
  std::vector<Grower<Splitter>> grower(growers, Grower<Splitter>(splitter, n, settings.depth));

  for (int64_t round = 0; round < settings.rounds; ++round) {
    parallel_ranges(n, 2048, threads, [&](int64_t begin, int64_t end) {
      multiversion<Residuals>(static_cast<const double*>(scores), classes, n, trees, begin, end, residual.data());
    });
    for (uint64_t& seed : seeds) seed = random.next();
    // The trees of a round do not depend on each other.
    parallel_ranges(growers, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t c = g; c < trees; c += growers) {
          grower[g].grow(residual.data() + c * n, rate, seeds[c], explained.data() + c * d, scores + c * n);
          for (int64_t i = 0; i < m; ++i) test_scores[c * m + i] += grower[g](test_codes + i * d);
        }
      }
    });
  }

  std::fill_n(importance, d, 0.0);
  for (int64_t i = 0; i < trees * d; ++i) importance[i % d] += explained[i];
  const double whole = std::accumulate(importance, importance + d, 0.0);
  for (int64_t j = 0; j < d && whole > 0; ++j) importance[j] /= whole;
}

}  // namespace

int64_t boosting_trees(int32_t size) { return size == 2 ? 1 : size; }

void boost(const float* codes, int64_t n, int64_t d, const int32_t* classes, int32_t size, const float* test_codes,
           int64_t m, const BoostingSettings& settings, double* importance, double* scores, double* test_scores,
           int threads) {
  if (!std::all_of(classes, classes + n, [&](int32_t c) { return 0 <= c && c < size; }))
    throw std::out_of_range("classes must be from 0 to size - 1");
  if (settings.bins < 0 || settings.bins > 65536) throw std::out_of_range("bins must be from 0 to 65536");
  const std::vector<Entry> sorted = sorted_entries(codes, n, d, threads);
  const auto run = [&](const auto& splitter) {
    boost_with(splitter, n, d, classes, size, test_codes, m, settings, importance, scores, test_scores, threads);
  };
  if (settings.bins == 0) {
    run(ExactSplitter(sorted, n, d));
  } else {
    const Binned bins = binned(sorted, n, d, settings.bins);
    run(HistogramSplitter(bins, n, d, settings.depth));
  }
}

}  // namespace fastdis::host
