// Every draw is a function of (seed, vote, draw) alone, so that threads change nothing. A vote first draws all its rows
// and asks for them, then reads them: tables of whole datasets lie in main memory.

#include "votes.h"

#include <cmath>
#include <vector>

#include "../core/isa.h"
#include "../core/threads.h"

namespace fastdis::host {

void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1;
    counter[0] = next0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = next2;
    counter[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

namespace {

// The random numbers of one vote: blocks of four words.
class Draws {
 public:
  Draws(uint64_t seed, uint64_t vote) : seed_(seed), vote_(vote) {}

  // Uniform in [0, range), without bias (Lemire, ACM TOMACS 2019): a word that falls into the incomplete last share is
  // replaced by the same word of the block's next attempt.
  uint32_t below(uint32_t range, uint32_t block, int word) {
    for (uint32_t attempt = 0;; ++attempt) {
      const uint64_t product = uint64_t{words(block, attempt)[word]} * range;
      const uint32_t low = static_cast<uint32_t>(product);
      if (low >= range || low >= (0u - range) % range) return static_cast<uint32_t>(product >> 32);
    }
  }

 private:
  const uint32_t* words(uint32_t block, uint32_t attempt) {
    if (!known_ || block != block_ || attempt != attempt_) {
      words_[0] = block;
      words_[1] = attempt;
      words_[2] = static_cast<uint32_t>(vote_);
      words_[3] = static_cast<uint32_t>(vote_ >> 32);
      philox4x32(words_, static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
      block_ = block;
      attempt_ = attempt;
      known_ = true;
    }
    return words_;
  }

  uint64_t seed_, vote_;
  uint32_t words_[4] = {}, block_ = 0, attempt_ = 0;
  bool known_ = false;
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

struct Differences {
  // Rows come in twos.
  template <class Isa>
  static FASTDIS_INLINE void run(const double* codes, int64_t d, const uint32_t* rows, int64_t pairs, double* mean) {
    for (int64_t j = 0; j < d; ++j) mean[j] = 0;
    for (int64_t i = 0; i < pairs; ++i) {
      const double* a = codes + rows[2 * i] * d;
      const double* b = codes + rows[2 * i + 1] * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) mean[j] += std::fabs(a[j] - b[j]);
    }
    for (int64_t j = 0; j < d; ++j) mean[j] /= static_cast<double>(pairs);
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
      Draws draws(seed, static_cast<uint64_t>(vote));
      const uint32_t k = draws.below(static_cast<uint32_t>(groups.K), 0, 0);
      const int64_t* starts = groups.starts + groups.first[k];
      const uint32_t values = static_cast<uint32_t>(groups.first[k + 1] - groups.first[k] - 1);
      for (int64_t i = 0; i < pairs; ++i) {
        const uint32_t block = static_cast<uint32_t>(1 + i);
        const uint32_t value = draws.below(values, block, 0);
        const uint32_t size = static_cast<uint32_t>(starts[value + 1] - starts[value]);
        rows[2 * i] = static_cast<uint32_t>(starts[value] + draws.below(size, block, 1));
        rows[2 * i + 1] = static_cast<uint32_t>(starts[value] + draws.below(size, block, 2));
      }
      look_up(groups.rows + k * n, codes, d, rows);
      multiversion<Differences>(codes, d, static_cast<const uint32_t*>(rows.data()), pairs, differences + vote * d);
      factor[vote] = static_cast<int32_t>(k);
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
      Draws draws(seed, static_cast<uint64_t>(vote));
      const uint32_t k = draws.below(static_cast<uint32_t>(groups.K), 0, 0);
      const int64_t* starts = groups.starts + groups.first[k];
      const uint32_t values = static_cast<uint32_t>(groups.first[k + 1] - groups.first[k] - 1);
      const uint32_t value = draws.below(values, 0, 1);
      const uint32_t size = static_cast<uint32_t>(starts[value + 1] - starts[value]);
      for (int64_t i = 0; i < samples; ++i) {
        const uint32_t block = static_cast<uint32_t>(1 + i / 4);
        rows[i] = static_cast<uint32_t>(starts[value] + draws.below(size, block, static_cast<int>(i % 4)));
      }
      look_up(groups.rows + k * n, codes, d, rows);
      multiversion<Variances>(codes, d, static_cast<const uint32_t*>(rows.data()), samples, gathered.data(),
                              mean.data(), variance.data());
      int64_t least = active[0];
      for (int64_t a = 1; a < active_codes; ++a) {
        const int64_t j = active[a];
        if (variance[j] / variances[j] < variance[least] / variances[least]) least = j;
      }
      code[vote] = static_cast<int32_t>(least);
      factor[vote] = static_cast<int32_t>(k);
    }
  });
}

}  // namespace fastdis::host
