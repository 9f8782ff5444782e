// The transforms of Winograd's F(2x2, 3x3), for one instruction set; float32. Included by
// kernels_impl.h after products_impl.h. See winograd.h for the formulas.
//
// The transforms' coefficients are 0, 1, -1 and 1/2: additions, and an error below that of a direct
// convolution, whose sums are nine times as long.
#pragma once

#include "winograd.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

FB_INLINE int64_t tiles_along(int64_t pixels) { return (pixels + 1) / 2; }

// body(image, tile row, first tile column, tiles, number within the range) for each row of a range.
template <class Body>
FB_INLINE void for_each_tile_run(const TileRange& p, const Body& body) {
  const int64_t across = tiles_along(p.width), down = tiles_along(p.height);
  for (int64_t t = 0; t < p.count;) {
    const int64_t tile = p.begin + t;
    const int64_t column = tile % across, row = tile / across % down, image = tile / across / down;
    const int64_t tiles = min64(across - column, p.count - t);
    body(image, row, column, tiles, t);
    t += tiles;
  }
}

struct Four {
  FloatVector at[4];
};

// Bt d, along one dimension.
FB_INLINE Four input_transform(const Four& d) {
  return {{d.at[0] - d.at[2], d.at[1] + d.at[2], d.at[2] - d.at[1], d.at[1] - d.at[3]}};
}

// A column of four pixels of one image's channels; those outside of the image are zero.
FB_INLINE Four input_column(const TileRange& p, const float* image, int64_t top, int64_t x) {
  Four d{};
  if (x < 0 || x >= p.width) return d;
  for (int i = 0; i < 4; ++i)
    if (top + i >= 0 && top + i < p.height)
      d.at[i] = load(Float{}, image + ((top + i) * p.width + x) * p.channels);
  return d;
}

// The tiles of one row for kVector channels; a tile shares two columns with the one before it.
FB_INLINE void transform_input_run(const TransformInput& p, const float* image, int64_t row,
                                   int64_t column, int64_t tiles, float* out) {
  const int64_t top = 2 * row - 1, panel = p.stride * kLeft;
  Four e[4];
  e[2] = input_transform(input_column(p.tiles, image, top, 2 * column - 1));
  e[3] = input_transform(input_column(p.tiles, image, top, 2 * column));
  for (int64_t t = 0; t < tiles; ++t, out += kLeft) {
    const int64_t x = 2 * (column + t) + 1;
    e[0] = e[2];
    e[1] = e[3];
    e[2] = input_transform(input_column(p.tiles, image, top, x));
    e[3] = input_transform(input_column(p.tiles, image, top, x + 1));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Four v =
          input_transform({{e[0].at[i], e[1].at[i], e[2].at[i], e[3].at[i]}});
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        write_left(out + (4 * i + j) * p.position_step, panel, v.at[j]);
    }
  }
}

void transform_input(const TransformInput& p) {
  const int64_t pixels = p.tiles.height * p.tiles.width, channels = p.tiles.channels;
  for (int64_t c = 0; c < channels; c += kVector)
    for_each_tile_run(p.tiles, [&](int64_t image, int64_t row, int64_t column, int64_t tiles,
                                   int64_t t) {
      transform_input_run(p, p.x + image * pixels * channels + c, row, column, tiles,
                          p.panels + c * p.stride + t * kLeft);
    });
  const int64_t padded = (p.tiles.count + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  for (int position = 0; position < kPositions; ++position)
    for (int64_t c = 0; c < channels; c += kLeft)
      for (int64_t at = p.tiles.count * kLeft; at < padded * kLeft; ++at)
        p.panels[position * p.position_step + c * p.stride + at] = 0;
}

// --- weight ---

// G g, along one dimension.
FB_INLINE Four weight_transform(FloatVector g0, FloatVector g1, FloatVector g2) {
  const FloatVector outer = (g0 + g2) * 0.5f, inner = g1 * 0.5f;
  return {{g0, outer + inner, outer - inner, g2}};
}

// The 3 x 3 weights of kVector output channels and one input channel.
FB_INLINE void transform_weight_vector(const TransformWeight& p, const float* weight, float* out) {
  float gathered[9][kVector];
  for (int lane = 0; lane < kVector; ++lane)
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        gathered[3 * i + j][lane] =
            weight[lane * p.channel_stride + i * p.row_stride + j * p.column_stride];
  const auto g = [&](int i, int j) { return load(Float{}, gathered[3 * i + j]); };
  Four rows[3];
  for (int j = 0; j < 3; ++j) rows[j] = weight_transform(g(0, j), g(1, j), g(2, j));
  for (int i = 0; i < 4; ++i) {
    const Four u = weight_transform(rows[0].at[i], rows[1].at[i], rows[2].at[i]);
    for (int j = 0; j < 4; ++j) store(Float{}, out + (4 * i + j) * p.position_step, u.at[j]);
  }
}

void transform_weight(const TransformWeight& p, int64_t begin, int64_t end) {
  for_each_panel(end - begin, [&](auto vectors, int64_t from) {
    constexpr int width = vectors * kVector;
    const int64_t c = begin + from;
    for (int64_t k = 0; k < p.depth; ++k)
      for (int v = 0; v < width; v += kVector)
        transform_weight_vector(p, p.weight + (c + v) * p.channel_stride + k * p.depth_stride,
                                p.panels + c * p.depth + k * width + v);
  });
}

// --- output ---

struct Two {
  FloatVector at[2];
};

// At m, along one dimension.
FB_INLINE Two output_transform(FloatVector m0, FloatVector m1, FloatVector m2, FloatVector m3) {
  return {{m0 + m1 + m2, m1 - m2 - m3}};
}

// One tile of kVector channels to y, of which `right` and `below` say what is inside of the image.
FB_INLINE void transform_output_tile(const TransformOutput& p, const float* values, float* y,
                                     bool right, bool below) {
  Two rows[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto m = [&](int i) { return load(Float{}, values + (4 * i + j) * p.position_step); };
    rows[j] = output_transform(m(0), m(1), m(2), m(3));
  }
  const int64_t line = p.tiles.width * p.tiles.channels;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && !below) break;
    const Two out = output_transform(rows[0].at[i], rows[1].at[i], rows[2].at[i], rows[3].at[i]);
    store(Float{}, y + i * line, out.at[0]);
    if (right) store(Float{}, y + i * line + p.tiles.channels, out.at[1]);
  }
}

void transform_output(const TransformOutput& p) {
  const int64_t height = p.tiles.height, width = p.tiles.width, channels = p.tiles.channels;
  for_each_tile_run(p.tiles, [&](int64_t image, int64_t row, int64_t column, int64_t tiles,
                                 int64_t first) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t x = 2 * (column + t), line = image * height + 2 * row;
      float* y = p.y + (line * width + x) * channels;
      for (int64_t c = 0; c < channels; c += kVector)
        transform_output_tile(p, p.values + (first + t) * channels + c, y + c, x + 1 < width,
                              2 * row + 1 < height);
    }
  });
}

// --- the gradient of the weight ---

// What a position takes along one dimension: sign0 * element0 + sign1 * element1.
struct Taps {
  int element[2];
  float sign[2];
};
constexpr Taps kInputTaps[4] = {
    {{0, 2}, {1, -1}}, {{1, 2}, {1, 1}}, {{2, 1}, {1, -1}}, {{1, 3}, {1, -1}}};
constexpr Taps kGradTaps[4] = {
    {{0, 0}, {1, 0}}, {{0, 1}, {1, 1}}, {{0, 1}, {1, -1}}, {{1, 1}, {-1, 0}}};

// put(number of the tile, first channel, vector) for one position of every tile, whose top left
// element is pixel (2 row + offset, 2 column + offset).
template <class Put>
FB_INLINE void for_each_at_position(const PackPosition& p, const Taps* taps, int offset,
                                    const Put& put) {
  const int64_t height = p.tiles.height, width = p.tiles.width, channels = p.tiles.channels;
  const Taps &down = taps[p.position / 4], &across = taps[p.position % 4];
  for_each_tile_run(p.tiles, [&](int64_t image, int64_t row, int64_t column, int64_t tiles,
                                 int64_t first) {
    for (int64_t t = 0; t < tiles; ++t) {
      const float* pixel[4];
      float sign[4];
      int count = 0;
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
          const int64_t y = 2 * row + offset + down.element[i];
          const int64_t x = 2 * (column + t) + offset + across.element[j];
          const float s = down.sign[i] * across.sign[j];
          if (s == 0 || y < 0 || y >= height || x < 0 || x >= width) continue;
          pixel[count] = p.source + ((image * height + y) * width + x) * channels;
          sign[count++] = s;
        }
      for (int64_t c = 0; c < channels; c += kVector) {
        FloatVector sum{};
        for (int i = 0; i < count; ++i)
          sum = multiply_add(sign[i], load(Float{}, pixel[i] + c), sum);
        put(first + t, c, sum);
      }
    }
  });
}

void pack_input_position(const PackPosition& p) {
  const int64_t whole = p.tiles.channels / kWide * kWide;
  for_each_at_position(p, kInputTaps, -1, [&](int64_t tile, int64_t c, FloatVector v) {
    const int64_t width = c < whole ? kWide : kVector;
    const int64_t panel = c < whole ? c / kWide * kWide : c;
    store(Float{}, p.panels + panel * p.stride + tile * width + (c - panel), v);
  });
}

void pack_grad_position(const PackPosition& p) {
  for_each_at_position(p, kGradTaps, 0, [&](int64_t tile, int64_t c, FloatVector v) {
    write_left(p.panels + c * p.stride + tile * kLeft, p.stride * kLeft, v);
  });
}

// Gt u G of `count` columns of 16 positions, to 9 columns.
FB_INLINE void sums_to_weight(const double (*u)[kWide], int64_t count, float (*w)[kWide]) {
  for (int64_t c = 0; c < count; ++c) {
    double half[3][4];
    for (int j = 0; j < 4; ++j) {
      const double u0 = u[j][c], u1 = u[4 + j][c], u2 = u[8 + j][c], u3 = u[12 + j][c];
      half[0][j] = u0 + (u1 + u2) * 0.5;
      half[1][j] = (u1 - u2) * 0.5;
      half[2][j] = (u1 + u2) * 0.5 + u3;
    }
    for (int i = 0; i < 3; ++i) {
      const double *h = half[i], middle = (h[1] + h[2]) * 0.5;
      w[3 * i][c] = static_cast<float>(h[0] + middle);
      w[3 * i + 1][c] = static_cast<float>((h[1] - h[2]) * 0.5);
      w[3 * i + 2][c] = static_cast<float>(middle + h[3]);
    }
  }
}

void transform_sums(const TransformSums& p) {
  double u[kPositions][kWide];
  float w[9][kWide];
  for (int64_t l = p.begin; l < p.end; ++l)
    for_each_panel(p.right_channels, [&](auto vectors, int64_t c) {
      constexpr int width = vectors * kVector;
      const int64_t tile = l / kTileLeft * kTileLeft;
      const double* at = p.sums + tile * p.right_channels + c * kTileLeft + (l - tile) * width;
      for (int position = 0; position < kPositions; ++position)
        for (int i = 0; i < width; ++i) {
          u[position][i] = 0;
          for (int64_t part = 0; part < p.parts; ++part)
            u[position][i] += at[position * p.position_step + part * p.part_step + i];
        }
      sums_to_weight(u, width, w);
      for (int tap = 0; tap < 9; ++tap)
        for (int i = 0; i < width; ++i)
          p.weight[(l * 9 + tap) * p.right_channels + c + i] = w[tap][i];
    });
}

const WinogradKernels winograd_kernels = {transform_input,     transform_weight,
                                          transform_output,    pack_input_position,
                                          pack_grad_position, transform_sums};

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
