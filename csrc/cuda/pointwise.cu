// The elementwise passes: each reads its matrices once and writes one. Bound by memory. Predicted,
// not measured, at 85 % of an H200's copy bandwidth (3.65 TB/s) for 256 images of 56x56 in
// bfloat16: bn_apply of 64 channels 206 MB, 56 us; bn_backward of 64, 308 MB, 84 us; residual_relu
// and masked_add of 256 channels 1.26 GB, 345 us.
#include "device.cuh"

namespace fused_bottleneck::cuda {
namespace {

constexpr int kRowsPerThread = 16;

Tiling elementwise_tiling(const Launch& where, bool whole) {
  Tiling t = tiling_of(where.rows, where.channels);
  cut_rows(t, t.lines * kRowsPerThread);
  t.whole = whole;
  return t;
}

template <class T>
struct Pair {
  Group<T> a, b;
};

// out = relu?((y - mean) * scale + beta) - centre. Bytes: y + out. 5 operations an element.
template <class T>
__global__ void __launch_bounds__(kThreads) bn_apply_kernel(Tiling t, BnApply p) {
  using A = Acc<T>;
  const Place at(t);
  if (at.count <= 0) return;
  const Coefficients<A> mean(p.mean, at.channel, at.count, 0);
  const Coefficients<A> scale(p.scale, at.channel, at.count, 0);
  const Coefficients<A> beta(p.beta, at.channel, at.count, 0);
  const Coefficients<A> centre(p.centre, at.channel, at.count, 0);
  const T* y = static_cast<const T*>(p.y) + at.channel;
  T* out = static_cast<T*>(p.out) + at.channel;
  for_rows<kRowsInFlight<T, 4>>(
      t, at, [&](int64_t row) { return load_group(y + row * t.channels, at.count, t.whole); },
      [&](int64_t row, Group<T>& value) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          A v = affine(widen(value.v[k]), mean.v[k], scale.v[k], beta.v[k]);
          if (p.relu) v = relu(v);
          value.v[k] = narrow<T>(v - centre.v[k]);
        }
        store_group(out + row * t.channels, value, at.count, t.whole);
      });
}

// v = (y - mean) * scale + shift + residual; out = relu(v), mask = live(v).
// Bytes: y + residual + out + mask. 5 operations an element.
template <class T>
__global__ void __launch_bounds__(kThreads) residual_relu_kernel(Tiling t, ResidualRelu p) {
  using A = Acc<T>;
  const Place at(t);
  if (at.count <= 0) return;
  const Coefficients<A> mean(p.mean, at.channel, at.count, 0);
  const Coefficients<A> scale(p.scale, at.channel, at.count, 1);  // (y - 0) * 1 is y
  const Coefficients<A> shift(p.shift, at.channel, at.count, 0);
  const bool has_residual = p.residual != nullptr;
  const T* y = static_cast<const T*>(p.y) + at.channel;
  const T* residual = static_cast<const T*>(p.residual) + at.channel;
  T* out = static_cast<T*>(p.out) + at.channel;
  uint8_t* mask = p.mask + at.channel / kGroup;
  for_rows<kRowsInFlight<T, 4>>(
      t, at,
      [&](int64_t row) {
        Pair<T> pair;
        pair.a = load_group(y + row * t.channels, at.count, t.whole);
        if (has_residual) pair.b = load_group(residual + row * t.channels, at.count, t.whole);
        return pair;
      },
      [&](int64_t row, Pair<T>& pair) {
        unsigned bits = 0;
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          A v = affine(widen(pair.a.v[k]), mean.v[k], scale.v[k], shift.v[k]);
          if (has_residual) v = v + widen(pair.b.v[k]);
          if (k < at.count && is_live(v)) bits |= 1u << k;
          pair.a.v[k] = narrow<T>(relu(v));
        }
        store_group(out + row * t.channels, pair.a, at.count, t.whole);
        mask[row * t.mask_stride] = static_cast<uint8_t>(bits);
      });
}

// out = value + (mask bit ? grad_out : 0). Bytes: value + grad_out + mask + out.
template <class T>
__global__ void __launch_bounds__(kThreads) masked_add_kernel(Tiling t, MaskedAdd p) {
  const Place at(t);
  if (at.count <= 0) return;
  const T* value = static_cast<const T*>(p.value) + at.channel;
  const T* grad_out = static_cast<const T*>(p.grad_out) + at.channel;
  const uint8_t* mask = p.mask + at.channel / kGroup;
  T* out = static_cast<T*>(p.out) + at.channel;
  for_rows<kRowsInFlight<T, 4>>(
      t, at,
      [&](int64_t row) {
        return Pair<T>{load_group(value + row * t.channels, at.count, t.whole),
                       load_group(grad_out + row * t.channels, at.count, t.whole)};
      },
      [&](int64_t row, Pair<T>& pair) {
        const unsigned bits = mask[row * t.mask_stride];
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          const Acc<T> g = bits >> k & 1 ? widen(pair.b.v[k]) : Acc<T>(0);
          pair.a.v[k] = narrow<T>(widen(pair.a.v[k]) + g);
        }
        store_group(out + row * t.channels, pair.a, at.count, t.whole);
      });
}

// out = scale * (g - k0 - (y - mean) * k1). Bytes: g + y + out. 5 operations an element.
template <class T>
__global__ void __launch_bounds__(kThreads) bn_backward_kernel(Tiling t, BnBackward p) {
  using A = Acc<T>;
  const Place at(t);
  if (at.count <= 0) return;
  const Coefficients<A> mean(p.mean, at.channel, at.count, 0);
  const Coefficients<A> scale(p.scale, at.channel, at.count, 0);
  const Coefficients<A> k0(p.k0, at.channel, at.count, 0);
  const Coefficients<A> k1(p.k1, at.channel, at.count, 0);
  const bool is_batch = p.k0 != nullptr;
  const T* g = static_cast<const T*>(p.g) + at.channel;
  const T* y = static_cast<const T*>(p.y) + at.channel;
  T* out = static_cast<T*>(p.out) + at.channel;
  for_rows<kRowsInFlight<T, 4>>(
      t, at,
      [&](int64_t row) {
        Pair<T> pair;
        pair.a = load_group(g + row * t.channels, at.count, t.whole);
        if (is_batch) pair.b = load_group(y + row * t.channels, at.count, t.whole);
        return pair;
      },
      [&](int64_t row, Pair<T>& pair) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          A v = widen(pair.a.v[k]);
          if (is_batch) v = v - k0.v[k] - (widen(pair.b.v[k]) - mean.v[k]) * k1.v[k];
          pair.a.v[k] = narrow<T>(scale.v[k] * v);
        }
        store_group(out + row * t.channels, pair.a, at.count, t.whole);
      });
}

}  // namespace

void launch_bn_apply(const Launch& where, const BnApply& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const Tiling t = elementwise_tiling(where, are_whole(where.channels, p.y, p.out));
    launch(bn_apply_kernel<T>, where, t.blocks(), t.threads(), 0, t, p);
  });
}

void launch_residual_relu(const Launch& where, const ResidualRelu& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = are_whole(where.channels, p.y, p.residual, p.out);
    const Tiling t = elementwise_tiling(where, whole);
    launch(residual_relu_kernel<T>, where, t.blocks(), t.threads(), 0, t, p);
  });
}

void launch_masked_add(const Launch& where, const MaskedAdd& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = are_whole(where.channels, p.value, p.grad_out, p.out);
    const Tiling t = elementwise_tiling(where, whole);
    launch(masked_add_kernel<T>, where, t.blocks(), t.threads(), 0, t, p);
  });
}

void launch_bn_backward(const Launch& where, const BnBackward& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const Tiling t = elementwise_tiling(where, are_whole(where.channels, p.g, p.y, p.out));
    launch(bn_backward_kernel<T>, where, t.blocks(), t.threads(), 0, t, p);
  });
}

}  // namespace fused_bottleneck::cuda
