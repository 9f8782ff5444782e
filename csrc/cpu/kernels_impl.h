// The vector kernels, for one instruction set: compiled once per kernels_<isa>.cpp, which defines
//   FUSED_BOTTLENECK_ISA           the namespace of this copy,
//   FUSED_BOTTLENECK_VECTOR_BYTES  the width of a vector register,
//   FUSED_BOTTLENECK_TARGET        the compiler's target string (absent: the baseline).
//
// Every function of this copy lives in that namespace, and no function of a shared header is
// called: see kernels.h for why. All passes are bound by memory: each reads and writes its matrices
// once.
#include "kernels.h"
#include "target.h"

// After the target is set:
#include "simd.h"
#include "loops.h"
#include "moments.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

// --- bn_apply, residual_relu ---

// (y - mean) * scale + beta. The one place that says so: the forward's relu and the backward's
// gate must see the same bits.
template <class V>
FB_INLINE V affine(V y, V mean, V scale, V beta) {
  return (y - mean) * scale + beta;
}

template <class T>
void bn_apply(const BnApply& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const T* y = static_cast<const T*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* beta = static_cast<const A*>(p.beta);
  const A* centre = static_cast<const A*>(p.centre);
  T* out = static_cast<T*>(p.out);
  const int64_t channels = p.channels;
  const bool with_relu = p.relu;
  for_each_lanes<A>(begin, end, 0, channels, [&](auto lanes, auto rows, int64_t row, int64_t c) {
    const auto mean_c = load(lanes, mean + c);
    const auto scale_c = load(lanes, scale + c);
    const auto beta_c = load(lanes, beta + c);
    const auto centre_c = load(lanes, centre + c);
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * channels + c;
      auto v = affine(load(lanes, y + at), mean_c, scale_c, beta_c);
      if (with_relu) v = relu(v);
      store(lanes, out + at, v - centre_c);
    }
  });
}

// Whether rows of so many channels may be streamed to `out`: every full vector is aligned.
template <class T>
FB_INLINE bool can_stream(const T* out, int64_t channels) {
  constexpr int64_t bytes = FUSED_BOTTLENECK_VECTOR_BYTES;
  return reinterpret_cast<uintptr_t>(out) % bytes == 0 && channels * sizeof(T) % bytes == 0;
}

template <class T, class V>
void residual_relu(const ResidualRelu& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const V* y = static_cast<const V*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* shift = static_cast<const A*>(p.shift);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  uint8_t* mask = p.mask;
  const int64_t channels = p.channels;
  const int64_t mask_stride = (channels + 7) / 8;
  const bool streaming = p.stream && can_stream(out, channels);
  for_each_lanes<A>(begin, end, 0, channels, [&](auto lanes, auto rows, int64_t row, int64_t c) {
    const auto mean_c = load(lanes, mean + c);
    const auto scale_c = load(lanes, scale + c);
    const auto shift_c = load(lanes, shift + c);
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * channels + c;
      auto v = affine(load(lanes, y + at), mean_c, scale_c, shift_c);
      if (residual != nullptr) v += load(lanes, residual + at);
      if (streaming) {
        stream(lanes, out + at, relu(v));
      } else {
        store(lanes, out + at, relu(v));
      }
      write_bits(lanes, mask + (row + r) * mask_stride, c, live_bits(lanes, v));
    }
  });
  if (streaming) stream_fence();
}

// --- mask_grad, masked_add, bn_backward_reduce: gradients through a ReLU, their column sums ---

template <class T>
void mask_grad(const MaskGrad& p, int64_t begin, int64_t end, double* sum_g) {
  using A = Acc<T>;
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const uint8_t* mask = p.mask;
  T* g = static_cast<T*>(p.g);
  const int64_t channels = p.channels;
  const int64_t mask_stride = (channels + 7) / 8;
  A tile_sum_g[kChannelBlock];
  for (int64_t c = 0; c < channels; ++c) sum_g[c] = 0;
  const auto tile = [&](int64_t row_begin, int64_t row_end, int64_t c_begin, int64_t c_end) {
    clear(tile_sum_g);
    for_each_lanes<A>(row_begin, row_end, c_begin, c_end,
                      [&](auto lanes, auto rows, int64_t row, int64_t c) {
                        auto total = load(lanes, tile_sum_g + (c - c_begin));
                        for (int r = 0; r < rows; ++r) {
                          const int64_t at = (row + r) * channels + c;
                          const uint32_t bits = read_bits(lanes, mask + (row + r) * mask_stride, c);
                          const auto v = where_bits(lanes, bits, load(lanes, grad_out + at));
                          store(lanes, g + at, v);
                          total += v;
                        }
                        store(lanes, tile_sum_g + (c - c_begin), total);
                      });
    add_tile_sum(tile_sum_g, c_begin, c_end, sum_g);
  };
  for_each_tile(begin, end, channels, kMaxTileRows, tile);
}

template <class T, class V>
void masked_add(const MaskedAdd& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const V* value = static_cast<const V*>(p.value);
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const uint8_t* mask = p.mask;
  T* out = static_cast<T*>(p.out);
  const int64_t channels = p.channels;
  const int64_t mask_stride = (channels + 7) / 8;
  const bool streaming = p.stream && can_stream(out, channels);
  for_each_lanes<A>(begin, end, 0, channels, [&](auto lanes, auto rows, int64_t row, int64_t c) {
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * channels + c;
      const uint32_t bits = read_bits(lanes, mask + (row + r) * mask_stride, c);
      const auto g = where_bits(lanes, bits, load(lanes, grad_out + at));
      const auto sum = load(lanes, value + at) + g;
      if (streaming) {
        stream(lanes, out + at, sum);
      } else {
        store(lanes, out + at, sum);
      }
    }
  });
  if (streaming) stream_fence();
}

template <class T, class V>
void bn_backward_reduce(const BnBackwardReduce& p, int64_t begin, int64_t end, double* sum_g,
                        double* sum_g_xhat) {
  using A = Acc<T>;
  const V* grad = static_cast<const V*>(p.grad);
  const T* addend = static_cast<const T*>(p.addend);
  const T* y = static_cast<const T*>(p.y);
  const A* shift = static_cast<const A*>(p.shift);
  const A* mean = static_cast<const A*>(p.mean);
  const A* invstd = static_cast<const A*>(p.invstd);
  const A* scale = static_cast<const A*>(p.scale);
  const A* beta = static_cast<const A*>(p.beta);
  T* g = static_cast<T*>(p.g);
  const uint8_t* mask = p.mask;
  const int64_t channels = p.channels;
  const int64_t mask_stride = (channels + 7) / 8;
  A tile_sum_g[kChannelBlock], tile_sum_g_xhat[kChannelBlock];
  for (int64_t c = 0; c < channels; ++c) sum_g[c] = sum_g_xhat[c] = 0;
  const auto tile = [&](int64_t row_begin, int64_t row_end, int64_t c_begin, int64_t c_end) {
    clear(tile_sum_g);
    clear(tile_sum_g_xhat);
    for_each_lanes<A>(row_begin, row_end, c_begin, c_end,
                      [&](auto lanes, auto rows, int64_t row, int64_t c) {
                        constexpr int width = decltype(lanes)::count;
                        const auto shift_c = load(lanes, shift + c);
                        const auto mean_c = load(lanes, mean + c);
                        const auto invstd_c = load(lanes, invstd + c);
                        const auto scale_c = load(lanes, scale + c);
                        const auto beta_c = load(lanes, beta + c);
                        auto total_g = load(lanes, tile_sum_g + (c - c_begin));
                        auto total_g_xhat = load(lanes, tile_sum_g_xhat + (c - c_begin));
                        for (int r = 0; r < rows; ++r) {
                          const int64_t at = (row + r) * channels + c;
                          const auto y_c = load(lanes, y + at);
                          auto v = load(lanes, grad + at);
                          if (addend != nullptr) v += load(lanes, addend + at);
                          v += shift_c;
                          if (mask != nullptr) {
                            const uint8_t* bits = mask + (row + r) * mask_stride;
                            v = where_bits(lanes, read_bits(lanes, bits, c), v);
                          } else {
                            v = where_live(affine(y_c, mean_c, scale_c, beta_c), v);
                          }
                          const auto rounded = narrow<T, width>(v);
                          if (g != nullptr) write(g + at, rounded);
                          v = widen<T, width>(rounded);
                          total_g += v;
                          total_g_xhat += v * ((y_c - mean_c) * invstd_c);
                        }
                        store(lanes, tile_sum_g + (c - c_begin), total_g);
                        store(lanes, tile_sum_g_xhat + (c - c_begin), total_g_xhat);
                      });
    add_tile_sum(tile_sum_g, c_begin, c_end, sum_g);
    add_tile_sum(tile_sum_g_xhat, c_begin, c_end, sum_g_xhat);
  };
  for_each_tile(begin, end, channels, kMaxTileRows, tile);
}

// --- bn_backward ---

template <class T>
void bn_backward(const BnBackward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const T* g = static_cast<const T*>(p.g);
  const T* y = static_cast<const T*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* k0 = static_cast<const A*>(p.k0);
  const A* k1 = static_cast<const A*>(p.k1);
  T* out = static_cast<T*>(p.out);
  const uint8_t* mask = p.mask;
  const int64_t channels = p.channels;
  const int64_t mask_stride = (channels + 7) / 8;
  if (k0 == nullptr) {
    for_each_lanes<A>(begin, end, 0, channels, [&](auto lanes, auto rows, int64_t row, int64_t c) {
      const auto scale_c = load(lanes, scale + c);
      for (int r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * channels + c;
        store(lanes, out + at, scale_c * load(lanes, g + at));
      }
    });
    return;
  }
  for_each_lanes<A>(begin, end, 0, channels, [&](auto lanes, auto rows, int64_t row, int64_t c) {
    const auto mean_c = load(lanes, mean + c);
    const auto scale_c = load(lanes, scale + c);
    const auto k0_c = load(lanes, k0 + c);
    const auto k1_c = load(lanes, k1 + c);
    for (int r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * channels + c;
      const auto centred = load(lanes, y + at) - mean_c;
      auto g_c = load(lanes, g + at);
      if (mask != nullptr)
        g_c = where_bits(lanes, read_bits(lanes, mask + (row + r) * mask_stride, c), g_c);
      store(lanes, out + at, scale_c * (g_c - k0_c - centred * k1_c));
    }
  });
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA

#include "pooling_impl.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

// V: the storage of what a product has computed.
template <class T, class V = T>
inline constexpr Kernels kernels_of = {
    channel_moments<T>,         merge_moments,       bn_apply<T>,
    residual_relu<T, V>,        mask_grad<T>,        masked_add<T, V>,
    bn_backward_reduce<T, V>,   bn_backward<T>,      bn_relu_pool<T>,
    pool_bn_backward_reduce<T>, pool_bn_backward<T>,
};

// In the order of Dtype.
const Kernels kernels[kDtypes] = {kernels_of<float>, kernels_of<double>, kernels_of<BFloat16>,
                                  kernels_of<Half>, kernels_of<BFloat16, float>};

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA

#if FUSED_BOTTLENECK_VECTOR_BYTES >= 32
#include "single_impl.h"
#include "products_impl.h"
#include "fold_impl.h"
#include "winograd_impl.h"
#endif

FB_END_TARGET
