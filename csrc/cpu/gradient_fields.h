// What the ops on sub-gradient fields share on the CPU: the walk over samples and the weighted sum of fields.
//
// Samples are cut into stretches whose running sums stay in a near cache, so that every field is read once and nothing
// but results is written.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/tensor.h"

namespace fastdis {

constexpr int64_t field_block = 2048;
// Elements of each field that are read in a row: reading many fields side by side is at memory's pace only where each
// is read for long.
constexpr int64_t field_stretch = 6 * field_block;

// Stands in for a block of an image that is absent.
template <class T>
inline constexpr T zero_block[field_block] = {};

// noise [B, *] and fields [B, N, *] as B samples of `size` elements.
struct FieldShape {
  int64_t batch, factors, size;

  FieldShape(const Tensor& noise, int64_t factors_)
      : batch(noise.size(0)), factors(factors_), size(batch > 0 ? noise.numel() / batch : 0) {}
};

// body(sample, first, last) over parts of all samples, in parallel where the work, in elements read, is worth it. Parts
// start on multiples of the block.
template <class Body>
void for_each_part(const FieldShape& shape, int64_t read_per_element, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = (shape.size + field_block - 1) / field_block;
  const bool serial = threads == 1 || shape.batch * shape.size * read_per_element < 4 * serial_elements;
  const int64_t parts =
      serial || shape.batch >= threads
          ? 1
          : std::max<int64_t>(1, std::min(blocks, (threads + shape.batch - 1) / std::max<int64_t>(1, shape.batch)));
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i % parts;
      body(i / parts, part * blocks / parts * field_block,
           std::min(shape.size, (part + 1) * blocks / parts * field_block));
    }
  };
  if (serial) return run(0, shape.batch * parts);
  torch::stable::parallel_for(0, shape.batch * parts, 1, run);
}

// The weights of each sample, all 1 where none are given. Never null: a kernel that chose between a weight and 1 would
// be compiled to a masked load, and masked loads from null are slow.
template <class A>
class FieldWeights {
 public:
  FieldWeights(const std::optional<Tensor>& weights, int64_t factors)
      : ones_(weights ? 0 : factors, A(1)),
        values_(weights ? data<A>(*weights) : ones_.data()),
        stride_(weights && weights->dim() == 2 ? factors : 0) {}

  const A* of(int64_t sample) const { return values_ + sample * stride_; }

 private:
  std::vector<A> ones_;
  const A* values_;
  int64_t stride_;  // from sample to sample
};

// finish(i, sum_n weights_n fields[n * size + i]) over `factors` fields for i < count, added to sums[i] unless they are
// the first.
template <int factors, bool first, class T, class Finish>
FASTDIS_INLINE void sum_group(const T* fields, const accumulate_t<T>* weights, int64_t size, int64_t count,
                              const accumulate_t<T>* sums, const Finish& finish) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    accumulate_t<T> sum = first ? accumulate_t<T>(0) : sums[i];
#pragma GCC unroll 10
    for (int n = 0; n < factors; ++n) sum += weights[n] * load(fields + n * size, i);
    finish(i, sum);
  }
}

// The first `factors` fields, at most `most`.
template <int most, class T, class Finish>
FASTDIS_INLINE void sum_first(const T* fields, const accumulate_t<T>* weights, int64_t factors, int64_t size,
                              int64_t count, const Finish& finish) {
  if (factors == most) return sum_group<most, true, T>(fields, weights, size, count, nullptr, finish);
  if constexpr (most > 0) sum_first<most - 1>(fields, weights, factors, size, count, finish);
}

// finish(i, sum_n weights_n fields[n * size + i]) for i from `begin` to `end`. A few fields are read at once. More are
// read a group at a time, since fields of a power of two would push each other out of the nearest cache; their sums
// wait in a near one.
template <class T, class Finish>
FASTDIS_INLINE void sum_fields(const T* fields, const accumulate_t<T>* weights, int64_t factors, int64_t size,
                               int64_t begin, int64_t end, const Finish& finish) {
  using A = accumulate_t<T>;
  constexpr int few = 10, group = 5;
  if (factors <= few) {
    const auto at_once = [&](int64_t i, A sum) FASTDIS_INLINE_LAMBDA { finish(begin + i, sum); };
    return sum_first<few>(fields + begin, weights, factors, size, end - begin, at_once);
  }
  A sums[field_stretch];
  const auto keep = [&](int64_t i, A sum) FASTDIS_INLINE_LAMBDA { sums[i] = sum; };
  for (; begin < end; begin += field_stretch) {
    const int64_t count = std::min(field_stretch, end - begin);
    int64_t n = (factors - 1) % group + 1;
    sum_first<group>(fields + begin, weights, n, size, count, keep);
    for (; n < factors; n += group) {
      sum_group<group, false>(fields + begin + n * size, weights + n, size, count, sums, keep);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) finish(begin + i, sums[i]);
  }
}

inline Tensor empty_image(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  return empty(tensor, sizes, tensor.scalar_type());
}

// A tensor like this one if it is asked for, else an empty one.
inline Tensor empty_image_if(bool wanted, const Tensor& tensor) {
  return wanted ? empty_image(tensor) : empty(tensor, {0}, tensor.scalar_type());
}

// [B, factors, *] for a tensor [B, *].
inline Tensor empty_fields(const Tensor& image, int64_t factors) {
  std::vector<int64_t> sizes(image.sizes().begin(), image.sizes().end());
  sizes.insert(sizes.begin() + 1, factors);
  return empty(image, sizes, image.scalar_type());
}

inline std::optional<Tensor> make_contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return make_contiguous(*tensor);
}

// To ask a tensor for its elements is a call into another library: once an op, not once a sample.
template <class T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* data_if(bool wanted, const Tensor& tensor) {
  return wanted ? mutable_data<T>(tensor) : nullptr;
}

// The elements from `offset` on, or null if there are none.
template <class T>
T* from(T* elements, int64_t offset) {
  return elements == nullptr ? nullptr : elements + offset;
}

}  // namespace fastdis
