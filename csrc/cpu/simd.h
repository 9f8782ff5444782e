// Vectors of channels for one instruction set, on the compiler's vector extensions (GCC, Clang).
//
// Included by kernels_impl.h, inside the target region of that instruction set. Intrinsics appear
// only where the extensions have no word for it: comparison to bits, and half precision.
// Nothing is contracted to fma (-ffp-contract=off), so every instruction set gives the same bits.
#pragma once

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

#define FB_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// W channels of element type E. W is the full vector width, or 1 for what is left of a row.
template <class E, int W>
struct Lanes {
  static constexpr int count = W;
  typedef E Value __attribute__((vector_size(W * sizeof(E))));
};
template <class E, int W>
using Value = typename Lanes<E, W>::Value;

template <class A>
using FullLanes = Lanes<A, FUSED_BOTTLENECK_VECTOR_BYTES / sizeof(A)>;

template <class To, class From>
FB_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
FB_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class V>
FB_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// --- Storage to accumulation dtype and back: widen(narrow(v)) is v rounded to storage. ---

template <class T, int W>
using Stored =
    std::conditional_t<std::is_floating_point_v<T>, Value<Acc<T>, W>, Value<uint16_t, W>>;

template <class T, int W>
FB_INLINE Value<Acc<T>, W> widen(Stored<T, W> s) {
  using Word = Value<uint32_t, W>;
  if constexpr (std::is_floating_point_v<T>) {
    return s;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast<Value<float, W>>(__builtin_convertvector(s, Word) << 16);
  } else {
#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
    if constexpr (W == 16) return (Value<float, W>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)s);
#elif FUSED_BOTTLENECK_VECTOR_BYTES == 32
    if constexpr (W == 8) return (Value<float, W>)_mm256_cvtph_ps((__m128i)s);
#endif
    const Word half = __builtin_convertvector(s, Word);
    const Word sign = (half & 0x8000u) << 16;
    const Word shifted = (half & 0x7fffu) << 13;
    const Word exponent = half & 0x7c00u;
    const Word normal = shifted + (112u << 23);
    const Word special = shifted + (224u << 23);  // infinity, NaN
    // A subnormal is 2^-14 + mantissa, less 2^-14: exact, and no subnormal float on the way.
    const Word tiny = Word{} + (113u << 23);
    const Word subnormal =
        bit_cast<Word>(bit_cast<Value<float, W>>(shifted + tiny) - bit_cast<Value<float, W>>(tiny));
    const Word magnitude = exponent == 0u ? subnormal : (exponent == 0x7c00u ? special : normal);
    return bit_cast<Value<float, W>>(magnitude | sign);
  }
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
template <class T, int W>
FB_INLINE Stored<T, W> narrow(Value<Acc<T>, W> v) {
  using Word = Value<uint32_t, W>;
  if constexpr (std::is_floating_point_v<T>) {
    return v;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Word bits = bit_cast<Word>(v);
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Word nan = Word{} + 0x7fc0u;
    return __builtin_convertvector(v == v ? rounded : nan, Value<uint16_t, W>);
  } else {
#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
    if constexpr (W == 16)
      return (Stored<T, W>)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif FUSED_BOTTLENECK_VECTOR_BYTES == 32
    if constexpr (W == 8)
      return (Stored<T, W>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
    const Word bits = bit_cast<Word>(v);
    const Word sign = (bits >> 16) & 0x8000u;
    const Word magnitude = bits & 0x7fffffffu;
    // The carry of the rounding runs into the exponent, as it should: 65520 becomes infinity.
    const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 lets the float adder round to 2^-24, the step of half's subnormals.
    const Word half_one = Word{} + (126u << 23);
    const Word subnormal =
        bit_cast<Word>(bit_cast<Value<float, W>>(magnitude) + bit_cast<Value<float, W>>(half_one)) -
        half_one;
    const Word infinity = Word{} + 0x7c00u;
    const Word nan = Word{} + 0x7e00u;
    Word half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= (143u << 23) ? infinity : half;
    half = v == v ? half : nan;
    return __builtin_convertvector(half | sign, Value<uint16_t, W>);
  }
}

template <class T, class A, int W>
FB_INLINE Value<A, W> load(Lanes<A, W>, const T* p) {
  return widen<T, W>(read<Stored<T, W>>(p));
}

template <class T, class A, int W>
FB_INLINE void store(Lanes<A, W>, T* p, Value<A, W> v) {
  write(p, narrow<T, W>(v));
}

// Stores past the caches, to an aligned address; pair with stream_fence().
template <class T, class A, int W>
FB_INLINE void stream(Lanes<A, W> lanes, T* p, Value<A, W> v) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float> && W * sizeof(float) == FUSED_BOTTLENECK_VECTOR_BYTES) {
#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
    _mm512_stream_ps(p, (__m512)v);
#elif FUSED_BOTTLENECK_VECTOR_BYTES == 32
    _mm256_stream_ps(p, (__m256)v);
#else
    _mm_stream_ps(p, (__m128)v);
#endif
    return;
  }
#endif
  store(lanes, p, v);
}

FB_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- relu and its mask. A live element is !(v <= 0): NaN is live, and relu(NaN) is NaN. ---

// value where `gate` is live, zero elsewhere.
template <class V>
FB_INLINE V where_live(V gate, V value) {
  return gate <= V{} ? V{} : value;
}

template <class V>
FB_INLINE V relu(V v) {
  return where_live(v, v);
}

// Bit k: lane k is live.
template <class A, int W>
FB_INLINE uint32_t live_bits(Lanes<A, W>, Value<A, W> v) {
  [[maybe_unused]] constexpr bool is_float = std::is_same_v<A, float>;
#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
  if constexpr (W == 16 && is_float)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  if constexpr (W == 8 && !is_float)
    return _mm512_cmp_pd_mask((__m512d)v, _mm512_setzero_pd(), _CMP_NLE_UQ);
#elif FUSED_BOTTLENECK_VECTOR_BYTES == 32
  if constexpr (W == 8 && is_float)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_NLE_UQ));
  if constexpr (W == 4 && !is_float)
    return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_setzero_pd(), _CMP_NLE_UQ));
#elif defined(__x86_64__)
  if constexpr (W == 4 && is_float)
    return _mm_movemask_ps(_mm_cmpnle_ps((__m128)v, _mm_setzero_ps()));
  if constexpr (W == 2 && !is_float)
    return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)v, _mm_setzero_pd()));
#endif
  uint32_t bits = 0;
  for (int k = 0; k < W; ++k) bits |= static_cast<uint32_t>(!(v[k] <= 0)) << k;
  return bits;
}

// v where the lane's bit is set, zero elsewhere.
template <class A, int W>
FB_INLINE Value<A, W> where_bits(Lanes<A, W>, uint32_t bits, Value<A, W> v) {
  using Word = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;
  Value<Word, W> lane_bit;
  for (int k = 0; k < W; ++k) lane_bit[k] = Word{1} << k;
  const Value<Word, W> set = lane_bit & (Value<Word, W>{} + Word{bits});
  return set != Value<Word, W>{} ? v : Value<A, W>{};
}

// The mask bits of lanes c .. c + W - 1 of a row; c is a multiple of W.
template <class A, int W>
FB_INLINE uint32_t read_bits(Lanes<A, W>, const uint8_t* row, int64_t c) {
  if constexpr (W > 8) {
    return row[c / 8] | static_cast<uint32_t>(row[c / 8 + 1]) << 8;
  } else {
    return static_cast<uint32_t>(row[c / 8]) >> (c % 8);
  }
}

// Called for increasing c: the first lanes of a byte overwrite it, the others add their bits.
template <class A, int W>
FB_INLINE void write_bits(Lanes<A, W>, uint8_t* row, int64_t c, uint32_t bits) {
  if constexpr (W > 8) {
    row[c / 8] = static_cast<uint8_t>(bits);
    row[c / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  } else {
    const uint32_t before = c % 8 == 0 ? 0 : row[c / 8];
    row[c / 8] = static_cast<uint8_t>(before | bits << (c % 8));
  }
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
