// Image-like tensors [B, C, *spatial], in the two dense layouts that kernels read without a copy.

#pragma once

#include "tensor.h"

namespace fastdis {

enum class Layout { channels_first, channels_last };

inline std::vector<int64_t> image_strides(const Tensor& x, Layout layout) {
  const auto sizes = x.sizes();
  const int64_t rank = x.dim();
  std::vector<int64_t> strides(rank, 1);
  int64_t running = 1;
  const auto take = [&](int64_t axis) {
    strides[axis] = running;
    running *= sizes[axis] > 0 ? sizes[axis] : 1;
  };
  if (layout == Layout::channels_last) take(1);
  for (int64_t axis = rank - 1; axis >= 2; --axis) take(axis);
  if (layout == Layout::channels_first) take(1);
  take(0);
  return strides;
}

inline bool has_layout(const Tensor& x, Layout layout) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const auto wanted = image_strides(x, layout);
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    if (sizes[axis] != 1 && strides[axis] != wanted[axis]) return false;
  }
  return true;
}

inline Tensor empty_image(const Tensor& like, Layout layout) {
  const auto sizes = like.sizes();
  return empty_strided(like, {sizes.begin(), sizes.end()}, image_strides(like, layout), like.scalar_type());
}

// `x` itself where it has the layout already, else a copy that has.
inline Tensor in_layout(const Tensor& x, Layout layout) {
  if (x.numel() == 0 || has_layout(x, layout)) return x;
  Tensor copy = empty_image(x, layout);
  torch::stable::copy_(copy, x);
  return copy;
}

struct Image {
  Layout layout;
  Tensor tensor;
  int64_t batch, channels, positions;

  explicit Image(const Tensor& x)
      : layout(!has_layout(x, Layout::channels_first) && has_layout(x, Layout::channels_last) ? Layout::channels_last
                                                                                              : Layout::channels_first),
        tensor(in_layout(x, layout)),
        batch(x.size(0)),
        channels(x.size(1)),
        positions(1) {
    for (int64_t axis = 2; axis < x.dim(); ++axis) positions *= x.size(axis);
  }
};

}  // namespace fastdis
