// Two points are neighbours of many points in common, so squared distances between neighbours are computed once for
// each pair of points, not once for each neighbourhood; double centring turns those of a neighbourhood into products.
//
// Points that are neighbours of the same points are put into groups, and a group is compared with all its partners, the
// points that share a neighbourhood with one of its members: each partner that is loaded serves all members. Groups lie
// one after the other as a walk through the neighbourhoods passes them, so that groups that follow each other share
// partners, and those are still in cache.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/gemm.h"
#include "../core/isa.h"
#include "../core/threads.h"
#include "neighbourhoods.h"
#include "ordered_set.h"

namespace fastdis::host {

namespace {

constexpr int members = 4;  // of a group
// Bytes of a point that are compared at a time, so that a group and a tile of partners fit the nearest cache; and of
// all points, where that is less.
constexpr int64_t row_bytes = 4096, packed_bytes = int64_t{1} << 25;
constexpr int64_t batch = 32;  // groups that visit the same partners, one after the other
constexpr int64_t block = 64;  // groups whose points stay in the next cache meanwhile

// Partners in a tile, as many as registers hold sums for.
template <class Isa>
constexpr int partner_tile = Isa::vector_bytes == 64 ? 4 : 2;

// distances[c, i] += the squared distance of partner c and member i of a group, in `length` dimensions, whole vectors.
// Rows of `packed` are points; those of the group are one after the other. `parts` holds count * members vectors.
template <class T>
struct PairDistances {
  template <class Isa>
  static FASTDIS_INLINE void run(const T* packed, int64_t row, int64_t length, int64_t first_member,
                                 const int32_t* partners, int64_t count, T* parts, double* distances) {
    constexpr int tile = partner_tile<Isa>, sums = tile * members, lanes = Isa::vector_bytes / sizeof(T);
    // Two loops: in one, the sums over lanes would take registers from the comparison.
    for (int64_t c = 0; c < count; c += tile) {
      const T* others[tile];
      for (int64_t i = 0; i < tile; ++i) others[i] = packed + partners[std::min(c + i, count - 1)] * row;
      compare<Isa>(others, packed + first_member * row, row, length, parts + c * members * lanes);
    }
    alignas(64) T totals[sums];
    for (int64_t c = 0; c < count; c += tile) {
      sum_lanes<Isa, T, sums>(parts + c * members * lanes, totals);
      const int64_t wanted = std::min<int64_t>(sums, (count - c) * members);
      for (int64_t i = 0; i < wanted; ++i) distances[c * members + i] += static_cast<double>(totals[i]);
    }
  }

  template <class Isa>
  static FASTDIS_INLINE void compare(const T* const* others, const T* group, int64_t row, int64_t length, T* parts) {
    typedef T Vector __attribute__((vector_size(Isa::vector_bytes), aligned(alignof(T)), may_alias));
    constexpr int lanes = Isa::vector_bytes / sizeof(T), tile = partner_tile<Isa>;
    const auto for_each = []<int... i>(std::integer_sequence<int, i...>, const auto& body)
                              FASTDIS_INLINE_LAMBDA { (body(std::integral_constant<int, i>{}), ...); };
    constexpr auto own = std::make_integer_sequence<int, members>{};
    constexpr auto all = std::make_integer_sequence<int, tile * members>{};
    Vector sum[tile * members];
    for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { sum[i] = Vector{}; });
    for (int64_t d = 0; d < length; d += lanes) {
      Vector member[members], other[tile];
      for_each(own, [&](auto i)
                        FASTDIS_INLINE_LAMBDA { member[i] = *reinterpret_cast<const Vector*>(group + i * row + d); });
      for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA {
        constexpr int c = i / members;
        if constexpr (i % members == 0) other[c] = *reinterpret_cast<const Vector*>(others[c] + d);
        const Vector apart = other[c] - member[i % members];
        sum[i] += apart * apart;
      });
    }
    for_each(all, [&](auto i) FASTDIS_INLINE_LAMBDA { reinterpret_cast<Vector*>(parts)[i] = sum[i]; });
  }
};

// Points that are neighbours, `members` to a group; where a group has fewer its first stands in the place of others.
// `ranks` says where each point stands first.
struct Groups {
  std::vector<int32_t> points, ranks;
};

Groups walk(const Occurrences& where, int64_t n, int64_t k) {
  Groups groups;
  groups.ranks.assign(n, -1);
  std::vector<int32_t> shared(n), near;  // in how many neighbourhoods each point is with the leader; those in one
  int32_t leader = -1;
  for (int64_t lowest = 0;;) {
    if (leader < 0) {
      while (lowest < n && (groups.ranks[lowest] >= 0 || where.starts[lowest] == where.starts[lowest + 1])) ++lowest;
      if (lowest == n) return groups;
      leader = static_cast<int32_t>(lowest);
    }
    const auto join = [&](int32_t point) {
      groups.ranks[point] = static_cast<int32_t>(groups.points.size());
      groups.points.push_back(point);
    };
    join(leader);
    for (int64_t i = where.starts[leader]; i < where.starts[leader + 1]; ++i) {
      const int32_t* row = where.points.data() + where.places[i] / k * k;
      for (int64_t b = 0; b < k; ++b) {
        if (groups.ranks[row[b]] < 0 && shared[row[b]]++ == 0) near.push_back(row[b]);
      }
    }
    // Who shares most with the leader joins it, and the next leads on.
    const int64_t most = std::min<int64_t>(members, static_cast<int64_t>(near.size()));
    std::partial_sort(near.begin(), near.begin() + most, near.end(),
                      [&](int32_t a, int32_t b) { return std::tuple(-shared[a], a) < std::tuple(-shared[b], b); });
    for (int64_t i = 0; i < members - 1; ++i) {
      if (i < most) {
        join(near[i]);
      } else {
        groups.points.push_back(leader);
      }
    }
    leader = most == members ? near[members - 1] : -1;
    for (const int32_t point : near) shared[point] = 0;
    near.clear();
  }
}

// Of each group g its partners, as ranks, none of an earlier group, in rising order: partners[starts[g]] to
// partners[starts[g + 1]].
struct Partners {
  std::vector<int64_t> starts;
  std::vector<int32_t> ranks;
};

// `neighbours` [m, k] are ranks.
Partners partners(const Groups& groups, const Occurrences& where, const std::vector<int32_t>& neighbours, int64_t k,
                  int threads) {
  const int64_t count = static_cast<int64_t>(groups.points.size()) / members;
  std::vector<std::vector<int32_t>> found(count);
  parallel_ranges(count, block, threads, [&](int64_t begin, int64_t end) {
    OrderedSet ranks(count * members);
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t rank = g * members; rank < (g + 1) * members; ++rank) {
        const int32_t point = groups.points[rank];
        if (groups.ranks[point] != rank) continue;
        for (int64_t i = where.starts[point]; i < where.starts[point + 1]; ++i) {
          const int32_t* row = neighbours.data() + where.places[i] / k * k;
          for (int64_t b = 0; b < k; ++b) {
            if (row[b] >= g * members) ranks.add(row[b]);
          }
        }
      }
      ranks.drain([&](int64_t rank) { found[g].push_back(static_cast<int32_t>(rank)); });
    }
  });
  Partners result;
  result.starts.assign(count + 1, 0);
  for (int64_t g = 0; g < count; ++g) result.starts[g + 1] = result.starts[g] + static_cast<int64_t>(found[g].size());
  result.ranks.reserve(result.starts[count]);
  for (std::vector<int32_t>& some : found) {
    result.ranks.insert(result.ranks.end(), some.begin(), some.end());
    some = {};
  }
  return result;
}

// The squared distances of all members of all groups from their partners, [partners, members].
template <class T>
std::vector<double> pair_distances(const T* points, int64_t D, const Groups& groups, const Partners& partners,
                                   int threads) {
  const int64_t ranks = static_cast<int64_t>(groups.points.size()), count = ranks / members;
  constexpr int64_t pad = column_pad<T>, most = row_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t fitting = packed_bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(ranks, 1) / pad * pad;
  const int64_t width = std::min(padded(D, pad), std::clamp(fitting, pad, most));
  std::vector<double> distances(partners.ranks.size() * members);
  Buffer<T> packed(ranks * width);
  for (int64_t first = 0; first < D; first += width) {
    // Points where the walk passes them: in place, each would be on a page of its own.
    const int64_t length = std::min(width, D - first), whole = padded(length, pad);
    parallel_ranges(ranks, batch * members, threads, [&](int64_t begin, int64_t end) {
      for (int64_t rank = begin; rank < end; ++rank) {
        T* to = packed.data() + rank * width;
        std::copy_n(points + groups.points[rank] * D + first, length, to);
        std::fill(to + length, to + whole, T(0));
      }
    });
    parallel_ranges((count + batch - 1) / batch, 1, threads, [&](int64_t begin, int64_t end) {
      Buffer<T> parts((block + 1) * members * members * pad);
      for (int64_t some = begin; some < end; ++some) {
        const int64_t from = some * batch, to = std::min(count, from + batch);
        std::vector<int64_t> next(partners.starts.begin() + from, partners.starts.begin() + to);
        for (int64_t edge = from + block; edge < count + block; edge += block) {
          for (int64_t g = from; g < to; ++g) {
            const int64_t start = next[g - from];
            int64_t& stop = next[g - from];
            while (stop < partners.starts[g + 1] && partners.ranks[stop] < edge * members) ++stop;
            multiversion<PairDistances<T>>(packed.data(), width, whole, g * members, partners.ranks.data() + start,
                                           stop - start, parts.data(), distances.data() + start * members);
          }
        }
      }
    });
  }
  return distances;
}

}  // namespace

template <class T>
void local_grams(const T* points, int64_t n, int64_t D, const int64_t* neighbours, int64_t m, int64_t k, double* grams,
                 int threads) {
  const Occurrences where = occurrences(neighbours, m, k, n);
  const Groups groups = walk(where, n, k);
  std::vector<int32_t> ranks(m * k);
  for (int64_t i = 0; i < m * k; ++i) ranks[i] = groups.ranks[where.points[i]];
  const Partners others = partners(groups, where, ranks, k, threads);
  const std::vector<double> distances = pair_distances(points, D, groups, others, threads);

  // Rows of a neighbourhood's distances come from the groups of its points, as far as these hold them.
  const int64_t count = static_cast<int64_t>(groups.points.size()) / members;
  parallel_ranges(count, block, threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> places(groups.points.size());
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t i = others.starts[g]; i < others.starts[g + 1]; ++i) places[others.ranks[i]] = i;
      for (int64_t member = 0; member < members; ++member) {
        const int64_t rank = g * members + member;
        const int32_t point = groups.points[rank];
        if (groups.ranks[point] != rank) continue;
        for (int64_t i = where.starts[point]; i < where.starts[point + 1]; ++i) {
          const int64_t place = where.places[i];
          const int32_t* row = ranks.data() + place / k * k;
          for (int64_t b = 0; b < k; ++b) {
            if (row[b] >= g * members) grams[place * k + b] = distances[places[row[b]] * members + member];
          }
        }
      }
    }
  });
  parallel_ranges(m, block, threads, [&](int64_t begin, int64_t end) {
    std::vector<double> means(k);
    for (int64_t q = begin; q < end; ++q) {
      double* gram = grams + q * k * k;
      const int32_t* row = ranks.data() + q * k;
      for (int64_t a = 0; a < k; ++a) {
        for (int64_t b = 0; b < a; ++b) {
          if (row[b] / members >= row[a] / members) {
            gram[b * k + a] = gram[a * k + b];
          } else {
            gram[a * k + b] = gram[b * k + a];
          }
        }
      }
      double grand = 0;
      for (int64_t a = 0; a < k; ++a) {
        double sum = 0;
        for (int64_t b = 0; b < k; ++b) sum += gram[a * k + b];
        means[a] = sum / static_cast<double>(k);
        grand += means[a];
      }
      grand /= static_cast<double>(k);
      for (int64_t a = 0; a < k; ++a) {
        for (int64_t b = 0; b < k; ++b) gram[a * k + b] = 0.5 * (means[a] + means[b] - grand - gram[a * k + b]);
      }
    }
  });
}

template void local_grams(const float*, int64_t, int64_t, const int64_t*, int64_t, int64_t, double*, int);
template void local_grams(const double*, int64_t, int64_t, const int64_t*, int64_t, int64_t, double*, int);

}  // namespace fastdis::host
