// The transforms of winograd.h's schemes, for one instruction set; float32. Included by
// kernels_impl.h after products_impl.h.
//
// Their coefficients are 0, 1, -1 and 1/2: additions, and an error below that of a direct
// convolution, whose chains of sums are longer.
#pragma once

#include "winograd.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

template <int N, class Vector = FloatVector>
struct Line {
  Vector at[N];
};

// What one position takes along one dimension: sign0 * element0 + sign1 * element1.
struct Taps {
  int element[2];
  float sign[2];
};

// F(2, 3). Input pixel 0 is output pixel 0 less the padding.
struct Forward {
  static constexpr int inputs = 4, points = 4, outputs = 2, weights = 4, step = 2, origin = -1;
  static constexpr Needed needed = {{0, 0b0111, 0b1111}};

  static FB_INLINE Line<4> input(const Line<4>& d) {
    return {{d.at[0] - d.at[2], d.at[1] + d.at[2], d.at[2] - d.at[1], d.at[1] - d.at[3]}};
  }
  static FB_INLINE Line<4> weight(const Line<3>& g) {
    const FloatVector outer = (g.at[0] + g.at[2]) * 0.5f, inner = g.at[1] * 0.5f;
    return {{g.at[0], outer + inner, outer - inner, g.at[2]}};
  }
  static FB_INLINE Line<2> output(const Line<4>& m) {
    return {{m.at[0] + m.at[1] + m.at[2], m.at[1] - m.at[2] - m.at[3]}};
  }

  static constexpr Taps input_taps[4] = {
      {{0, 2}, {1, -1}}, {{1, 2}, {1, 1}}, {{2, 1}, {1, -1}}, {{1, 3}, {1, -1}}};
  static constexpr Taps grad_taps[4] = {
      {{0, 0}, {1, 0}}, {{0, 1}, {1, 1}}, {{0, 1}, {1, -1}}, {{1, 1}, {-1, 0}}};
  template <class Vector>
  static FB_INLINE Line<3, Vector> weight_grad(const Line<4, Vector>& u) {
    const Vector middle = (u.at[1] + u.at[2]) * 0.5f;
    return {{u.at[0] + middle, (u.at[1] - u.at[2]) * 0.5f, middle + u.at[3]}};
  }
};

// Stride 2: two taps over the even inputs, F(2, 2), and one tap over the odd ones.
struct Strided {
  static constexpr int inputs = 5, points = 5, outputs = 2, weights = 4, step = 4, origin = -1;
  static constexpr Needed needed = {{0, 0b01011, 0b11111}};

  static FB_INLINE Line<5> input(const Line<5>& d) {
    return {{d.at[0] - d.at[2], d.at[2], d.at[4] - d.at[2], d.at[1], d.at[3]}};
  }
  static FB_INLINE Line<4> weight(const Line<3>& g) {
    return {{g.at[0], g.at[0] + g.at[2], g.at[2], g.at[1]}};
  }
  static FB_INLINE Line<2> output(const Line<5>& m) {
    return {{m.at[0] + m.at[1] + m.at[3], m.at[1] + m.at[2] + m.at[4]}};
  }

  static constexpr Taps input_taps[5] = {
      {{0, 2}, {1, -1}}, {{2, 2}, {1, 0}}, {{4, 2}, {1, -1}}, {{1, 1}, {1, 0}}, {{3, 3}, {1, 0}}};
  static constexpr Taps grad_taps[5] = {
      {{0, 0}, {1, 0}}, {{0, 1}, {1, 1}}, {{1, 1}, {1, 0}}, {{0, 0}, {1, 0}}, {{1, 1}, {1, 0}}};
  template <class Vector>
  static FB_INLINE Line<3, Vector> weight_grad(const Line<4, Vector>& u) {
    return {{u.at[0] + u.at[1], u.at[3], u.at[1] + u.at[2]}};
  }
};

// The gradient of its input: four pixels from three gradients y. Pixels 0 and 2 have one tap, 1 and
// 3 two of the turned weight.
struct StridedGrad {
  static constexpr int inputs = 3, points = 5, outputs = 4, weights = 4, step = 2, origin = 0;
  static constexpr Needed needed = {{0, 0b01000, 0b01011, 0b11011, 0b11111}};

  static FB_INLINE Line<5> input(const Line<3>& y) {
    return {{y.at[0] - y.at[1], y.at[1], y.at[2] - y.at[1], y.at[0], y.at[1]}};
  }
  static FB_INLINE Line<4> weight(const Line<3>& g) {
    return {{g.at[2], g.at[0] + g.at[2], g.at[0], g.at[1]}};
  }
  static FB_INLINE Line<4> output(const Line<5>& m) {
    return {{m.at[3], m.at[0] + m.at[1], m.at[4], m.at[1] + m.at[2]}};
  }
};

// Stride 2, a tile to an output pixel, for the gradient of the weight only.
struct Direct {
  static constexpr int inputs = 3, points = 3, outputs = 1, weights = 3, step = 2, origin = -1;
  static constexpr Needed needed = {{0, 0b111}};

  static constexpr Taps input_taps[3] = {{{0, 0}, {1, 0}}, {{1, 1}, {1, 0}}, {{2, 2}, {1, 0}}};
  static constexpr Taps grad_taps[3] = {{{0, 0}, {1, 0}}, {{0, 0}, {1, 0}}, {{0, 0}, {1, 0}}};
  template <class Vector>
  static FB_INLINE Line<3, Vector> weight_grad(const Line<3, Vector>& u) {
    return u;
  }
};

FB_INLINE int64_t tiles_along(int64_t pixels, int outputs) {
  return (pixels + outputs - 1) / outputs;
}

// body(image, tile row, first tile column, tiles, their first row in the panels) for tiles of one
// class side by side.
template <class Scheme, class Body>
FB_INLINE void for_each_tile_run(const TileRange& p, const Body& body) {
  const int64_t across = tiles_along(p.out_width, Scheme::outputs);
  const int64_t down = tiles_along(p.out_height, Scheme::outputs);
  const int64_t whole_across = p.out_width / Scheme::outputs;
  const int64_t whole_down = p.out_height / Scheme::outputs;
  int64_t next[kTileClasses];
  for (int i = 0; i < kTileClasses; ++i) next[i] = p.first_of[i];
  for (int64_t t = 0; t < p.count;) {
    const int64_t tile = p.begin + t;
    const int64_t column = tile % across, row = tile / across % down, image = tile / across / down;
    const bool inside = column < whole_across;
    const int kind = row < whole_down ? (inside ? kWhole : kRight) : (inside ? kBelow : kCorner);
    const int64_t tiles = min64((inside ? whole_across : across) - column, p.count - t);
    body(image, row, column, tiles, next[kind]);
    next[kind] += tiles;
    t += tiles;
  }
}

// --- input ---

// The prologue of kVector channels from c on; the identity where there is none.
template <bool Present>
struct Normalise {
  FB_INLINE Normalise(const Prologue& p, int64_t c) {
    if constexpr (Present) {
      mean = load(Float{}, p.mean + c);
      scale = load(Float{}, p.scale + c);
      beta = load(Float{}, p.beta + c);
    }
  }

  FB_INLINE FloatVector operator()(FloatVector v) const {
    if constexpr (Present) return relu((v - mean) * scale + beta);
    return v;
  }

  FloatVector mean, scale, beta;
};

// A transformed column of a tile for kVector channels; pixels outside of the image are zero.
template <class Scheme, class OnLoad>
FB_INLINE Line<Scheme::points> input_column(const TileRange& p, const OnLoad& on_load,
                                            const float* image, int64_t top, int64_t x) {
  Line<Scheme::inputs> d{};
  if (x >= 0 && x < p.in_width) {
#pragma GCC unroll 5
    for (int i = 0; i < Scheme::inputs; ++i)
      if (top + i >= 0 && top + i < p.in_height) {
        const float* pixel = image + ((top + i) * p.in_width + x) * p.in_channels;
        __builtin_prefetch(pixel + kVector);  // for the next pass over these tiles
        d.at[i] = on_load(load(Float{}, pixel));
      }
  }
  return Scheme::input(d);
}

// The tiles of one row for kVector channels; a tile shares its first columns with the one before.
template <class Scheme, class OnLoad>
FB_INLINE void transform_input_run(const TransformInput& p, const OnLoad& on_load,
                                   const float* image, int64_t row, int64_t column, int64_t tiles,
                                   float* out) {
  constexpr int inputs = Scheme::inputs, points = Scheme::points, step = Scheme::step;
  const int64_t top = row * step + Scheme::origin, panel = p.stride * kLeft;
  int64_t x = column * step + Scheme::origin;
  Line<points> columns[inputs];
#pragma GCC unroll 5
  for (int j = 0; j < inputs - step; ++j)
    columns[step + j] = input_column<Scheme>(p.tiles, on_load, image, top, x + j);
  for (int64_t t = 0; t < tiles; ++t, out += kLeft, x += step) {
#pragma GCC unroll 5
    for (int j = 0; j < inputs - step; ++j) columns[j] = columns[step + j];
#pragma GCC unroll 5
    for (int j = inputs - step; j < inputs; ++j)
      columns[j] = input_column<Scheme>(p.tiles, on_load, image, top, x + j);
#pragma GCC unroll 5
    for (int i = 0; i < points; ++i) {
      Line<inputs> line;
#pragma GCC unroll 5
      for (int j = 0; j < inputs; ++j) line.at[j] = columns[j].at[i];
      const Line<points> v = Scheme::input(line);
#pragma GCC unroll 5
      for (int j = 0; j < points; ++j)
        write_left(out + (points * i + j) * p.position_step, panel, v.at[j]);
    }
  }
}

template <class Scheme, bool Normalised>
FB_INLINE void transform_input_as(const TransformInput& p) {
  const TileRange& range = p.tiles;
  const int64_t channels = range.in_channels,
                image_size = range.in_height * range.in_width * channels;
  for (int64_t c = 0; c < channels; c += kVector) {
    const Normalise<Normalised> on_load(p.prologue, c);
    for_each_tile_run<Scheme>(
        range, [&](int64_t image, int64_t row, int64_t column, int64_t tiles, int64_t t) {
          transform_input_run<Scheme>(p, on_load, p.x + image * image_size + c, row, column, tiles,
                                      p.panels + c * p.stride + t * kLeft);
        });
  }
  for (int position = 0; position < Scheme::points * Scheme::points; ++position)
    for (int64_t c = 0; c < channels; c += kLeft)
      for (int64_t at = range.count * kLeft; at < p.padded * kLeft; ++at)
        p.panels[position * p.position_step + c * p.stride + at] = 0;
}

template <class Scheme>
void transform_input(const TransformInput& p) {
  if (p.prologue.mean != nullptr) {
    transform_input_as<Scheme, true>(p);
  } else {
    transform_input_as<Scheme, false>(p);
  }
}

// --- weight ---

// The 3 x 3 weights of kVector output channels and kGathered input channels, from those of the
// first on: gathered[9 k + tap][channel].
constexpr int kGathered = 8;

FB_INLINE void gather_weight(const TransformWeight& p, const float* weight,
                             float (&gathered)[9 * kGathered][kVector]) {
  const bool packed = p.depth_stride == 9 && p.row_stride == 3 && p.column_stride == 1;
  if (packed) {
    for (int at = 0; at < 9 * kGathered; at += 8)
      for (int lane = 0; lane < kVector; lane += 8)
        transpose_8x8(weight + lane * p.channel_stride + at, p.channel_stride, &gathered[at][lane],
                      kVector);
    return;
  }
  for (int tap = 0; tap < 9; ++tap) {
    const float* from = weight + tap / 3 * p.row_stride + tap % 3 * p.column_stride;
    if (p.depth_stride == 1) {
      for (int lane = 0; lane < kVector; lane += 8)
        transpose_8x8(from + lane * p.channel_stride, p.channel_stride, &gathered[tap][lane],
                      9 * kVector);
      continue;
    }
    for (int k = 0; k < kGathered; ++k, from += p.depth_stride) {
      float* to = gathered[9 * k + tap];
      if (p.channel_stride == 1) {
        write(to, read<FloatVector>(from));
      } else {
        for (int lane = 0; lane < kVector; ++lane) to[lane] = from[lane * p.channel_stride];
      }
    }
  }
}

// U of kVector output channels and one input channel.
template <class Scheme>
FB_INLINE void transform_weight_vector(const TransformWeight& p, const float (*taps)[kVector],
                                       float* out) {
  constexpr int weights = Scheme::weights;
  const auto g = [&](int i, int j) { return load(Float{}, taps[3 * i + j]); };
  Line<weights> columns[3];
  for (int j = 0; j < 3; ++j) columns[j] = Scheme::weight({{g(0, j), g(1, j), g(2, j)}});
  for (int i = 0; i < weights; ++i) {
    const Line<weights> u =
        Scheme::weight({{columns[0].at[i], columns[1].at[i], columns[2].at[i]}});
    for (int j = 0; j < weights; ++j)
      store(Float{}, out + (weights * i + j) * p.weight_step, u.at[j]);
  }
}

template <class Scheme>
void transform_weight(const TransformWeight& p, int64_t begin, int64_t end) {
  static_assert(kChannelMultiple % kGathered == 0);
  float gathered[9 * kGathered][kVector];
  for_each_panel(end - begin, [&](auto vectors, int64_t from) {
    constexpr int width = vectors * kVector;
    const int64_t c = begin + from;
    for (int64_t k = 0; k < p.depth; k += kGathered)
      for (int v = 0; v < width; v += kVector) {
        gather_weight(p, p.weight + (c + v) * p.channel_stride + k * p.depth_stride, gathered);
        for (int i = 0; i < kGathered; ++i)
          transform_weight_vector<Scheme>(p, gathered + 9 * i,
                                          p.panels + c * p.depth + (k + i) * width + v);
      }
  });
}

// --- output ---

// One tile of kVector channels to y, of which `wide` x `high` pixels are inside of the image.
template <class Scheme>
FB_INLINE void transform_output_tile(const TransformOutput& p, const float* values, float* y,
                                     int64_t wide, int64_t high) {
  constexpr int points = Scheme::points, outputs = Scheme::outputs;
  Line<outputs> columns[points];
#pragma GCC unroll 5
  for (int j = 0; j < points; ++j) {
    Line<points> m;
#pragma GCC unroll 5
    for (int i = 0; i < points; ++i)
      m.at[i] = load(Float{}, values + (points * i + j) * p.position_step);
    columns[j] = Scheme::output(m);
  }
  const int64_t line = p.tiles.out_width * p.tiles.out_channels;
#pragma GCC unroll 4
  for (int i = 0; i < outputs; ++i) {
    if (i >= high) break;
    Line<points> m;
#pragma GCC unroll 5
    for (int j = 0; j < points; ++j) m.at[j] = columns[j].at[i];
    const Line<outputs> out = Scheme::output(m);
#pragma GCC unroll 4
    for (int j = 0; j < outputs; ++j)
      if (j < wide) store(Float{}, y + i * line + j * p.tiles.out_channels, out.at[j]);
  }
}

template <class Scheme>
void transform_output(const TransformOutput& p) {
  constexpr int outputs = Scheme::outputs;
  const int64_t height = p.tiles.out_height, width = p.tiles.out_width;
  for_each_tile_run<Scheme>(
      p.tiles, [&](int64_t image, int64_t row, int64_t column, int64_t tiles, int64_t first) {
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t x = outputs * (column + t), top = outputs * row;
          float* y = p.y + ((image * height + top) * width + x) * p.tiles.out_channels + p.begin;
          for (int64_t c = 0; c < p.channels; c += kVector)
            transform_output_tile<Scheme>(p, p.values + (first + t) * p.channels + c, y + c,
                                          width - x, height - top);
        }
      });
}

// --- the gradient of the weight ---

// The pixels of one column of a tile that a row of positions takes: none, one or two.
struct Column {
  const float* pixel[2];
  float sign[2];
  int count = 0;
};

// Columns first .. first + Count - 1 of images [height, width, channels], rows by `down` from
// `top`.
template <int Count>
FB_INLINE void columns_of(const float* image, int64_t height, int64_t width, int64_t channels,
                          const Taps& down, int64_t top, int64_t first, Column (&columns)[Count]) {
  for (int j = 0; j < Count; ++j) {
    columns[j].count = 0;
    for (int i = 0; i < 2; ++i) {
      const int64_t y = top + down.element[i], x = first + j;
      if (down.sign[i] == 0 || y < 0 || y >= height || x < 0 || x >= width) continue;
      columns[j].pixel[columns[j].count] = image + (y * width + x) * channels;
      columns[j].sign[columns[j].count++] = down.sign[i];
    }
  }
}

// ahead: how many floats the same pixels of the next tile are away.
template <class OnLoad>
FB_INLINE FloatVector column_sum(const Column& column, const OnLoad& on_load, int64_t c,
                                 int64_t ahead) {
  FloatVector sum{};
  for (int i = 0; i < column.count; ++i) {
    __builtin_prefetch(column.pixel[i] + c + ahead);
    sum = multiply_add(column.sign[i], on_load(load(Float{}, column.pixel[i] + c)), sum);
  }
  return sum;
}

template <int Count>
FB_INLINE FloatVector position_of(const Line<Count>& line, const Taps& across) {
  const FloatVector v = line.at[across.element[0]] * across.sign[0];
  return across.sign[1] == 0 ? v : v + line.at[across.element[1]] * across.sign[1];
}

// put(position of the row, row of the panels, channel after p.begin, vector) for every tile of
// images [height, width, channels], whose first pixel is the tile's number * step + origin.
template <int Count, int Points, class Scheme, bool Normalised, class Put>
FB_INLINE void for_each_of_row(const PackRow& p, const Taps (&taps)[Scheme::points], int step,
                               int origin, int64_t height, int64_t width, int64_t channels,
                               const Put& put) {
  for_each_tile_run<Scheme>(
      p.tiles, [&](int64_t image, int64_t row, int64_t column, int64_t tiles, int64_t first) {
        for (int64_t t = 0; t < tiles; ++t) {
          Column columns[Count];
          columns_of(p.source + image * height * width * channels, height, width, channels,
                     taps[p.row], step * row + origin, step * (column + t) + origin, columns);
          for (int64_t c = p.begin; c < p.end; c += kVector) {
            const Normalise<Normalised> on_load(p.prologue, c);
            Line<Count> line;
#pragma GCC unroll 5
            for (int i = 0; i < Count; ++i)
              line.at[i] = column_sum(columns[i], on_load, c, step * channels);
#pragma GCC unroll 5
            for (int j = 0; j < Points; ++j)
              put(j, first + t, c - p.begin, position_of(line, taps[j]));
          }
        }
      });
}

template <class Scheme, bool Normalised>
FB_INLINE void pack_input_row_as(const PackRow& p) {
  const int64_t in_wide = (p.end - p.begin) / kWide * kWide;
  for_each_of_row<Scheme::inputs, Scheme::points, Scheme, Normalised>(
      p, Scheme::input_taps, Scheme::step, Scheme::origin, p.tiles.in_height, p.tiles.in_width,
      p.tiles.in_channels, [&](int position, int64_t row, int64_t c, FloatVector v) {
        const int64_t width = c < in_wide ? kWide : kVector;
        const int64_t panel = c < in_wide ? c / kWide * kWide : c;
        store(Float{},
              p.panels + position * p.position_step + panel * p.stride + row * width + (c - panel),
              v);
      });
}

template <class Scheme>
void pack_input_row(const PackRow& p) {
  if (p.prologue.mean != nullptr) {
    pack_input_row_as<Scheme, true>(p);
  } else {
    pack_input_row_as<Scheme, false>(p);
  }
}

template <class Scheme, int Points>
void pack_grad_row(const PackRow& p) {
  for_each_of_row<Scheme::outputs, Points, Scheme, false>(
      p, Scheme::grad_taps, Scheme::outputs, 0, p.tiles.out_height, p.tiles.out_width,
      p.tiles.out_channels, [&](int position, int64_t row, int64_t c, FloatVector v) {
        write_left(p.panels + position * p.position_step + c * p.stride + row * kLeft,
                   p.stride * kLeft, v);
      });
}

// Gt u G of one vector of sums.
template <class Scheme, class Vector, class Sum>
FB_INLINE void transform_sums_vector(const TransformSums& p, const Sum* sums, float* weight) {
  constexpr int weights = Scheme::weights;
  Line<3, Vector> columns[weights];
#pragma GCC unroll 5
  for (int j = 0; j < weights; ++j) {
    Line<weights, Vector> u;
#pragma GCC unroll 5
    for (int i = 0; i < weights; ++i) {
      const Sum* at = sums + (weights * i + j) * p.weight_step;
      u.at[i] = read<Vector>(at);
      for (int64_t part = 1; part < p.parts; ++part)
        u.at[i] += read<Vector>(at + part * p.part_step);
    }
    columns[j] = Scheme::weight_grad(u);
  }
  using Rounded = Value<float, sizeof(Vector) / sizeof(Sum)>;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Line<weights, Vector> u;
#pragma GCC unroll 5
    for (int j = 0; j < weights; ++j) u.at[j] = columns[j].at[i];
    const Line<3, Vector> g = Scheme::weight_grad(u);
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j)
      write(weight + (3 * i + j) * p.right_channels, __builtin_convertvector(g.at[j], Rounded));
  }
}

template <class Scheme, class Vector, class Sum>
FB_INLINE void transform_all_sums(const TransformSums& p, const Sum* sums) {
  constexpr int lanes = sizeof(Vector) / sizeof(Sum);
  for (int64_t l = p.begin; l < p.end; l += kTileLeft)
    for_each_panel(p.right_channels, [&](auto vectors, int64_t c) {
      constexpr int width = vectors * kVector;
      const Sum* tile = sums + l * p.right_channels + c * kTileLeft;
      for (int i = 0; i < kTileLeft; ++i)
        for (int v = 0; v < width; v += lanes)
          transform_sums_vector<Scheme, Vector>(p, tile + i * width + v,
                                                p.weight + (l + i) * 9 * p.right_channels + c + v);
    });
}

template <class Scheme>
void transform_sums(const TransformSums& p) {
  if (p.sums.floats != nullptr) {
    transform_all_sums<Scheme, FloatVector>(p, p.sums.floats);
  } else {
    transform_all_sums<Scheme, DoubleVector>(p, p.sums.doubles);
  }
}

template <class Scheme>
inline constexpr WinogradKernels kernels_with_weight_grad = {
    Scheme::points,
    Scheme::outputs,
    Scheme::weights,
    Scheme::step,
    Scheme::needed,
    false,
    transform_input<Scheme>,
    transform_weight<Scheme>,
    transform_output<Scheme>,
    pack_input_row<Scheme>,
    pack_grad_row<Scheme, Scheme::points>,
    transform_sums<Scheme>,
};

// In the order of WinogradScheme.
const WinogradKernels winograd_kernels[kWinogradSchemes] = {
    kernels_with_weight_grad<Forward>,
    kernels_with_weight_grad<Strided>,
    {StridedGrad::points, StridedGrad::outputs, StridedGrad::weights, StridedGrad::step,
     StridedGrad::needed, false, transform_input<StridedGrad>, transform_weight<StridedGrad>,
     transform_output<StridedGrad>, nullptr, nullptr, nullptr},
    {Direct::points, Direct::outputs, Direct::weights, Direct::step, Direct::needed, true, nullptr,
     nullptr, nullptr, pack_input_row<Direct>, pack_grad_row<Direct, 1>, transform_sums<Direct>},
};

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
