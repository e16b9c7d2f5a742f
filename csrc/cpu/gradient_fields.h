// What the ops on sub-gradient fields share on the CPU: the walk over samples and the weighted sum of fields.
//
// Samples are cut into blocks whose running sums stay in the nearest cache, so that every field is read once and
// nothing but results is written.

#pragma once

#include <algorithm>
#include <optional>

#include "../core/tensor.h"

namespace fastdis {

constexpr int64_t field_block = 2048;

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
  const bool serial = threads == 1 || shape.batch * shape.size * read_per_element < 8 * serial_elements;
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

// The weights of one sample; all 1 where the pointer is null.
template <class A>
struct FieldWeights {
  const A* values = nullptr;
  int64_t stride = 0;  // from sample to sample

  FieldWeights(const std::optional<Tensor>& weights, int64_t factors) {
    if (!weights) return;
    values = data<A>(*weights);
    stride = weights->dim() == 2 ? factors : 0;
  }
  const A* of(int64_t sample) const { return values == nullptr ? nullptr : values + sample * stride; }
};

// sums[i] = sum_n weights_n fields[n * size + i] for i < count.
template <class T>
FASTDIS_INLINE void sum_fields(const T* fields, const accumulate_t<T>* weights, int64_t factors, int64_t size,
                               int64_t count, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  const auto weight = [&](int64_t n) FASTDIS_INLINE_LAMBDA { return weights == nullptr ? A(1) : weights[n]; };
  std::fill_n(sums, count, A(0));
  int64_t n = 0;
  for (; n + 4 <= factors; n += 4) {  // four at a time: a quarter of the traffic on the sums
    const T *f0 = fields + n * size, *f1 = f0 + size, *f2 = f1 + size, *f3 = f2 + size;
    const A w0 = weight(n), w1 = weight(n + 1), w2 = weight(n + 2), w3 = weight(n + 3);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      sums[i] += (w0 * load(f0, i) + w1 * load(f1, i)) + (w2 * load(f2, i) + w3 * load(f3, i));
    }
  }
  for (; n < factors; ++n) {
    const T* field = fields + n * size;
    const A w = weight(n);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sums[i] += w * load(field, i);
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

// The elements of an optional image from `offset` on, or null.
template <class T>
const T* data_from(const std::optional<Tensor>& tensor, int64_t offset) {
  return tensor ? data<T>(*tensor) + offset : nullptr;
}

}  // namespace fastdis
