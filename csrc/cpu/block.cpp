// See block.h.
#include "block.h"

#include "cpu_ops.h"
#include "product_operands.h"

namespace fused_bottleneck::cpu {

namespace {

// The most that a product of so many images' pixels with a tail unit's weight, [channels, W],
// needs.
int64_t images_bytes(const BlockSizes& s, int64_t images, int64_t channels) {
  const int64_t rows = images * s.out_height * s.out_width;
  return rows == 0 ? 0 : product_bytes(rows, channels, s.out_channels);
}

// The output of that many images, from the operands of all units that are folded into one product.
int64_t output_bytes(const BlockSizes& s, int64_t images) {
  const int64_t both = s.has_downsample() ? s.width + s.in_channels : s.width;
  return images_bytes(s, images, both);
}

// A unit in the gram way: over pixels, and of the weight, with [channels, channels].
int64_t gram_bytes(const BlockSizes& s, int64_t channels) {
  return std::max({images_bytes(s, s.count, channels),
                   summed_bytes(s.out_rows(), channels, channels),
                   summed_bytes(s.out_rows(), s.out_channels, channels),
                   product_bytes(s.out_rows(), channels, channels),
                   product_bytes(s.out_channels, channels, channels),
                   summed_bytes(s.out_channels, channels, channels)});
}

// In the product way, with that many images computed again.
int64_t product_way_bytes(const BlockSizes& s, int64_t channels, int64_t again) {
  return std::max({images_bytes(s, s.count, channels), images_bytes(s, again, channels),
                   product_bytes(s.out_rows(), s.out_channels, channels),
                   transposed_bytes(s.out_rows(), s.out_channels, channels)});
}

int64_t conv_bytes(const BlockSizes& s) {
  return std::max(
      {product_bytes(s.in_rows(), s.in_channels, s.width),
       product_bytes(s.in_rows(), s.width, s.in_channels),
       transposed_bytes(s.in_rows(), s.in_channels, s.width),
       winograd_workspace(s.count, s.out_height, s.out_width, s.width, s.width, s.stride, false),
       winograd_workspace(s.count, s.in_height, s.in_width, s.width, s.width, s.stride, true)});
}

}  // namespace

void BlockSizes::check(const char* op, const Tensor& x, const Tensor& y1, const Tensor& y2,
                       size_t units) const {
  STD_TORCH_CHECK(units == images.size() + 2, op, ": expected ", images.size() + 2, " units, got ",
                  units);
  check_images(op, "x", x, {count, in_channels, in_height, in_width});
  check_images(op, "y1", y1, {count, width, in_height, in_width});
  check_images(op, "y2", y2, {count, width, out_height, out_width});
}

int64_t BlockSizes::workspace_bytes(int64_t chunk) const {
  int64_t bytes = std::max(conv_bytes(*this), output_bytes(*this, count));
  if (chunk > 0)
    bytes = std::max({bytes, output_bytes(*this, chunk), output_bytes(*this, count % chunk)});
  for (size_t unit = 0; unit < images.size(); ++unit) {
    const int64_t channels = unit == 0 ? width : in_channels;
    bytes =
        std::max(bytes, is_gram(unit) ? gram_bytes(*this, channels)
                                      : product_way_bytes(*this, channels, count - images[unit]));
    if (chunk > 0)  // of one folded unit alone
      bytes = std::max({bytes, images_bytes(*this, chunk, channels),
                        images_bytes(*this, count % chunk, channels)});
  }
  return bytes;
}

ForwardScratch::ForwardScratch(const BlockSizes& s, int64_t chunk) {
  operand = layout.take(s.out_rows() * s.width);
  strided = layout.take(s.out_rows() * s.in_channels, s.writes_strided());
  for (size_t unit = 0; unit < s.images.size(); ++unit)
    outputs[unit] = layout.take(s.out_rows() * s.out_channels, !s.is_gram(unit));
  images = layout.take(chunk * s.out_height * s.out_width * s.out_channels);
  workspace = layout.take(s.workspace_bytes(chunk) / static_cast<int64_t>(sizeof(float)));
}

BackwardScratch::BackwardScratch(const BlockSizes& s) {
  for (size_t unit = 0; unit < s.images.size(); ++unit)
    products[unit] = layout.take(s.out_rows() * (unit == 0 ? s.width : s.in_channels));
  Scratch later = layout;
  operand = layout.take(s.out_rows() * s.width);
  strided = layout.take(s.out_rows() * s.in_channels, s.writes_strided());
  for (size_t unit = 0; unit < s.images.size(); ++unit)
    wide[unit] = layout.take(s.out_rows() * s.out_channels, !s.is_gram(unit));
  grad = later.take(s.in_rows() * s.width);
  layout.bytes = std::max(layout.bytes, later.bytes);
  workspace = layout.take(s.workspace_bytes(0) / static_cast<int64_t>(sizeof(float)));
}

namespace {

// body(pixel of the larger images, pixel of the smaller ones), rows of pixels in parallel.
template <class Body>
void for_each_strided(const Pixels& large, int64_t stride, const Pixels& small, const Body& body) {
  torch::stable::parallel_for(0, small.count * small.height, 4, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t image = line / small.height, row = line % small.height;
      float* from =
          large.data + image * large.image() + row * stride * large.width * large.channels;
      float* to = small.data + line * small.width * small.channels;
      for (int64_t x = 0; x < small.width; ++x)
        body(from + x * stride * large.channels, to + x * small.channels);
    }
  });
}

}  // namespace

Pixels BlockSizes::strided_operand(const Tensor& x, float* memory,
                                   const OptionalTensor& centre) const {
  const Pixels from(x);
  if (!writes_strided()) return from;
  const Pixels out = after(memory, in_channels);
  const float* shift = centre.has_value() ? floats(*centre) : nullptr;
  for_each_strided(from, downsample_stride, out, [&](const float* source, float* to) {
    if (shift == nullptr) {
      std::copy_n(source, in_channels, to);
    } else {
      for (int64_t c = 0; c < in_channels; ++c) to[c] = source[c] - shift[c];
    }
  });
  return out;
}

Tensor sampled_centre(const Tensor& x, int64_t stride) {
  const Pixels all(x);
  const auto step = [](int64_t size, int64_t most) { return (size + most - 1) / most; };
  const auto seen = [&](int64_t size) { return (size + stride - 1) / stride; };
  const int64_t images = step(all.count, 16), down = stride * step(seen(all.height), 4),
                across = stride * step(seen(all.width), 4);
  std::vector<double> sums(all.channels, 0.0);
  double count = 0;
  for (int64_t n = 0; n < all.count; n += images)
    for (int64_t y = 0; y < all.height; y += down)
      for (int64_t z = 0; z < all.width; z += across, ++count) {
        const float* pixel = all.data + n * all.image() + (y * all.width + z) * all.channels;
        for (int64_t c = 0; c < all.channels; ++c) sums[c] += pixel[c];
      }
  return vector_of(x, all.channels, [&](int64_t c) { return static_cast<float>(sums[c] / count); });
}

void copy_all(const float* from, float* to, int64_t count) {
  constexpr int64_t kGrain = 32768;  // elements, as in passes.cpp
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    std::copy(from + begin, from + end, to + begin);
  });
}

void add_strided(const Pixels& value, int64_t stride, const Pixels& grad_x) {
  const int64_t channels = value.channels;
  for_each_strided(grad_x, stride, value, [&](float* to, const float* from) {
    for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
  });
}

}  // namespace fused_bottleneck::cpu
