// Every draw is a function of (seed, vote, draw) alone, so that threads change nothing. A vote first draws all its rows
// and asks for them, then reads them: tables of whole datasets lie in main memory.

#include "votes.h"

#include <algorithm>
#include <vector>

#include "../core/isa.h"
#include "../core/philox.h"
#include "../core/threads.h"

namespace fastdis::host {

void philox4x32(uint32_t counter[4], uint64_t key) {
  uint64_t words[4][1] = {{counter[0]}, {counter[1]}, {counter[2]}, {counter[3]}};
  philox<Baseline>(key, words);
  for (int w = 0; w < 4; ++w) counter[w] = static_cast<uint32_t>(words[w][0]);
}

namespace {

// The random numbers of one vote: blocks of four words.
struct Draws {
  uint64_t seed, vote;

  // Uniform in [0, range), without bias (Lemire, ACM TOMACS 2019): a word that falls into the incomplete last share is
  // replaced by the same word of the block's next attempt.
  uint32_t below(uint32_t range, int64_t block, int word) const {
    for (uint32_t attempt = 0;; ++attempt) {
      uint32_t words[4] = {static_cast<uint32_t>(block), attempt, static_cast<uint32_t>(vote),
                           static_cast<uint32_t>(vote >> 32)};
      philox4x32(words, seed);
      const uint64_t product = uint64_t{words[word]} * range;
      const uint32_t low = static_cast<uint32_t>(product);
      if (low >= range || low >= (0u - range) % range) return static_cast<uint32_t>(product >> 32);
    }
  }
};

// The same number of a block's first attempt. Where `doubtful` becomes true the word may have to be replaced.
FASTDIS_INLINE uint32_t share(uint32_t word, uint32_t range, bool& doubtful) {
  const uint64_t product = uint64_t{word} * range;
  doubtful |= static_cast<uint32_t>(product) < range;
  return static_cast<uint32_t>(product >> 32);
}

// What one vote is about: the rows of a factor.
struct Chosen {
  uint32_t factor;
  uint32_t values;
  const int64_t* starts;
  const uint32_t* rows;

  Chosen(const Draws& draws, const Groups& groups, int64_t n)
      : factor(draws.below(static_cast<uint32_t>(groups.K), 0, 0)) {
    starts = groups.starts + groups.first[factor];
    values = static_cast<uint32_t>(groups.first[factor + 1] - groups.first[factor] - 1);
    rows = groups.rows + factor * n;
  }
  uint32_t size(uint32_t value) const { return static_cast<uint32_t>(starts[value + 1] - starts[value]); }
};

// Replaces places in rows[] by rows, and asks for the codes of those rows.
void look_up(const uint32_t* rows, const double* codes, int64_t d, std::vector<uint32_t>& places) {
  for (uint32_t& place : places) {
    place = rows[place];
    const char* row = reinterpret_cast<const char*>(codes + place * d);
    for (int64_t byte = 0; byte < d * 8; byte += 64) __builtin_prefetch(row + byte);
    __builtin_prefetch(row + d * 8 - 1);
  }
}

// The places of pairs that agree in a factor, from block 1 on: a value, then two of its rows.
struct DrawPairs {
  template <class Isa>
  static FASTDIS_INLINE void run(const Draws* draws, const Chosen* chosen, int64_t pairs, uint32_t* places) {
    const Chosen from = *chosen;
    PhiloxWords words;
    uint32_t value[PhiloxWords::counters];
    for (int64_t begin = 0; begin < pairs; begin += PhiloxWords::counters, places += 2 * PhiloxWords::counters) {
      const int64_t count = std::min(PhiloxWords::counters, pairs - begin);
      words.fill<Isa>(draws->seed, 1 + begin, draws->vote);
      bool doubtful = false;
#pragma omp simd reduction(| : doubtful)
      for (int64_t i = 0; i < count; ++i) value[i] = share(words.word[0][i], from.values, doubtful);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t start = static_cast<uint32_t>(from.starts[value[i]]), size = from.size(value[i]);
        places[2 * i] = start + share(words.word[1][i], size, doubtful);
        places[2 * i + 1] = start + share(words.word[2][i], size, doubtful);
      }
      for (int64_t i = 0; doubtful && i < count; ++i) {
        const int64_t block = 1 + begin + i;
        const uint32_t of = draws->below(from.values, block, 0);
        for (int word = 1; word < 3; ++word) {
          places[2 * i + word - 1] = static_cast<uint32_t>(from.starts[of]) + draws->below(from.size(of), block, word);
        }
      }
    }
  }
};

// The places of samples that have one value of a factor, four to a block from block 1 on.
struct DrawSamples {
  template <class Isa>
  static FASTDIS_INLINE void run(const Draws* draws, const Chosen* chosen, int64_t samples, uint32_t* places) {
    const uint32_t value = draws->below(chosen->values, 0, 1);
    const uint32_t start = static_cast<uint32_t>(chosen->starts[value]), size = chosen->size(value);
    constexpr int64_t at_once = 4 * PhiloxWords::counters;
    PhiloxWords words;
    for (int64_t begin = 0; begin < samples; begin += at_once) {
      const int64_t count = std::min(at_once, samples - begin);
      words.fill<Isa>(draws->seed, 1 + begin / 4, draws->vote);
      bool doubtful = false;
      for (int64_t i = 0; i < count; ++i) places[begin + i] = start + share(words.word[i % 4][i / 4], size, doubtful);
      for (int64_t i = begin; doubtful && i < begin + count; ++i)
        places[i] = start + draws->below(size, 1 + i / 4, static_cast<int>(i % 4));
    }
  }
};

struct Differences {
  // Rows come in twos. Sums of as many codes as a vector holds stay in a register; the last vector ends with the row.
  template <class Isa, class Real = double>  // a name that vector types can depend on
  static FASTDIS_INLINE void run(const double* codes, int64_t d, const uint32_t* rows, int64_t pairs, double* mean) {
    typedef Real Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(Real)), may_alias));
    constexpr int64_t lanes = Isa::vector_bytes / sizeof(Real);
    if (d < lanes) {
      for (int64_t j = 0; j < d; ++j) average<Real>(codes + j, d, rows, pairs, mean + j);
    } else {
      for (int64_t j = 0; j < d; j += lanes) {
        const int64_t at = std::min(j, d - lanes);
        average<Vector>(codes + at, d, rows, pairs, mean + at);
      }
    }
  }

 private:
  template <class Lanes>
  static FASTDIS_INLINE void average(const double* codes, int64_t d, const uint32_t* rows, int64_t pairs,
                                     double* mean) {
    Lanes sum{};
    for (int64_t i = 0; i < pairs; ++i) {
      const Lanes apart = *reinterpret_cast<const Lanes*>(codes + rows[2 * i] * d) -
                          *reinterpret_cast<const Lanes*>(codes + rows[2 * i + 1] * d);
      sum += apart < 0 ? -apart : apart;
    }
    *reinterpret_cast<Lanes*>(mean) = sum / static_cast<double>(pairs);
  }
};

struct Variances {
  // Two passes over differences from the first row, so that a code that does not vary has variance 0 exactly.
  template <class Isa>
  static FASTDIS_INLINE void run(const double* codes, int64_t d, const uint32_t* rows, int64_t samples,
                                 double* gathered, double* mean, double* variance) {
    const double* origin = codes + rows[0] * d;
    for (int64_t j = 0; j < d; ++j) mean[j] = variance[j] = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const double* row = codes + rows[i] * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        gathered[i * d + j] = row[j] - origin[j];
        mean[j] += gathered[i * d + j];
      }
    }
    for (int64_t j = 0; j < d; ++j) mean[j] /= static_cast<double>(samples);
    for (int64_t i = 0; i < samples; ++i) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        const double deviation = gathered[i * d + j] - mean[j];
        variance[j] += deviation * deviation;
      }
    }
    for (int64_t j = 0; j < d; ++j) variance[j] /= static_cast<double>(samples - 1);
  }
};

constexpr int64_t votes_at_once = 64;

}  // namespace

void paired_differences(const double* codes, int64_t n, int64_t d, const Groups& groups, uint64_t seed, int64_t votes,
                        int64_t pairs, int threads, double* differences, int32_t* factor) {
  parallel_ranges(votes, votes_at_once, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> rows(2 * pairs);
    for (int64_t vote = begin; vote < end; ++vote) {
      const Draws draws{seed, static_cast<uint64_t>(vote)};
      const Chosen chosen(draws, groups, n);
      multiversion<DrawPairs>(&draws, &chosen, pairs, rows.data());
      look_up(chosen.rows, codes, d, rows);
      multiversion<Differences>(codes, d, static_cast<const uint32_t*>(rows.data()), pairs, differences + vote * d);
      factor[vote] = static_cast<int32_t>(chosen.factor);
    }
  });
}

void least_varying_codes(const double* codes, int64_t n, int64_t d, const Groups& groups, const double* variances,
                         const int64_t* active, int64_t active_codes, uint64_t seed, int64_t votes, int64_t samples,
                         int threads, int32_t* code, int32_t* factor) {
  parallel_ranges(votes, votes_at_once, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> rows(samples);
    std::vector<double> gathered(samples * d), mean(d), variance(d);
    for (int64_t vote = begin; vote < end; ++vote) {
      const Draws draws{seed, static_cast<uint64_t>(vote)};
      const Chosen chosen(draws, groups, n);
      multiversion<DrawSamples>(&draws, &chosen, samples, rows.data());
      look_up(chosen.rows, codes, d, rows);
      multiversion<Variances>(codes, d, static_cast<const uint32_t*>(rows.data()), samples, gathered.data(),
                              mean.data(), variance.data());
      int64_t least = active[0];
      for (int64_t a = 1; a < active_codes; ++a) {
        const int64_t j = active[a];
        if (variance[j] / variances[j] < variance[least] / variances[least]) least = j;
      }
      code[vote] = static_cast<int32_t>(least);
      factor[vote] = static_cast<int32_t>(chosen.factor);
    }
  });
}

}  // namespace fastdis::host
