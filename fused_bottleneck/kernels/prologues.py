"""What the kernels share: operands computed on load, results reduced before they are stored.

Activations are row-major matrices ``[pixels, channels]``. Row offsets are int64, as
``pixels * channels`` can pass 2^31; channel offsets and pixel indices are int32. A masked-out
element is 0 after every load, and after every prologue that would move it away from 0.
"""

import triton
import triton.language as tl


@triton.jit
def cdiv(a, b):
    """``ceil(a / b)`` for positive scalars."""
    return (a + b - 1) // b


@triton.jit
def channels(ptr, offs, mask):
    """Coefficients of some channels as a row ``[1, BLOCK]``; 0 where masked out."""
    return tl.load(ptr + offs, mask=mask, other=0.0)[None, :]


@triton.jit
def below(offs, size, EVEN: tl.constexpr):
    """``offs < size``; EVEN: it is so, as the blocks divide the sizes, and costs no instruction."""
    if EVEN:
        return tl.full(offs.shape, True, tl.int1)
    else:
        return offs < size


@triton.jit
def tile(ptr, rows, mask_rows, stride, offs, mask):
    """``[BLOCK_ROWS, BLOCK]`` of a matrix with rows of ``stride`` elements; rows int64."""
    where = rows[:, None] * stride + offs[None, :]
    return tl.load(ptr + where, mask=mask_rows[:, None] & mask[None, :], other=0.0)


@triton.jit
def put_tile(ptr, rows, mask_rows, stride, offs, mask, value):
    """Store ``[BLOCK_ROWS, BLOCK]`` into a matrix, rounded to its dtype."""
    where = rows[:, None] * stride + offs[None, :]
    keep = mask_rows[:, None] & mask[None, :]
    tl.store(ptr + where, value.to(ptr.dtype.element_ty), mask=keep)


# Pixels.


@triton.jit
def strided_rows(offs, OH, OW, H, W, SH: tl.constexpr, SW: tl.constexpr):
    """Rows, in a ``[N, H, W]`` image matrix, of output pixels ``[N, OH, OW]`` of a strided 1x1
    convolution."""
    if SH == 1 and SW == 1:
        return offs.to(tl.int64)
    n = offs // (OH * OW)
    h = offs // OW % OH * SH
    w = offs % OW * SW
    return (n.to(tl.int64) * H + h) * W + w


# Operands.


@triton.jit
def relu(z):
    """ReLU that passes NaN, as torch's: one instruction."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normalised(y, mean, scale, beta):
    """``(y - mean) * scale + beta`` in float32."""
    return (y.to(tl.float32) - mean) * scale + beta


@triton.jit
def load_activation(
    y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, rows, mask_rows, C, offs, mask
):
    """A tile of ``relu((y - mean) * scale + beta) - centre``, rounded to y's dtype.

    centre_ptr None: no centre. Masked-out rows are 0 (a zero padding comes after the prologue);
    masked-out channels are 0 as all their coefficients are.
    """
    y = tile(y_ptr, rows, mask_rows, C, offs, mask)
    mean = channels(mean_ptr, offs, mask)
    scale = channels(scale_ptr, offs, mask)
    value = relu(normalised(y, mean, scale, channels(beta_ptr, offs, mask)))
    if centre_ptr is not None:
        value -= channels(centre_ptr, offs, mask)
    return tl.where(mask_rows[:, None], value, 0.0).to(y.dtype)


@triton.jit
def load_centred(x_ptr, centre_ptr, rows, mask_rows, C, offs, mask):
    """A tile of ``x - centre``, rounded to x's dtype."""
    x = tile(x_ptr, rows, mask_rows, C, offs, mask)
    value = x.to(tl.float32) - channels(centre_ptr, offs, mask)
    return tl.where(mask_rows[:, None], value, 0.0).to(x.dtype)


@triton.jit
def load_conv_grad(
    g_ptr, y_ptr, mean_ptr, scale_ptr, k0_ptr, k1_ptr, rows, mask_rows, C, offs, mask
):
    """A tile of ``dy = scale * (g - k0 - (y - mean) * k1)``; k0_ptr None: ``scale * g``;
    scale_ptr None: g is dy already."""
    g = tile(g_ptr, rows, mask_rows, C, offs, mask)
    if scale_ptr is not None:
        dy = g.to(tl.float32)
        if k0_ptr is not None:
            y = tile(y_ptr, rows, mask_rows, C, offs, mask).to(tl.float32)
            mean = channels(mean_ptr, offs, mask)
            dy -= channels(k0_ptr, offs, mask) + (y - mean) * channels(k1_ptr, offs, mask)
        dy *= channels(scale_ptr, offs, mask)
        g = tl.where(mask_rows[:, None], dy, 0.0).to(g.dtype)
    return g


@triton.jit
def load_masked_grad(
    grad_ptr, bits_ptr, rows, mask_rows, W, start, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of ``g = grad_out * bit`` for channels start to start + BLOCK; start % 32 == 0.

    Words of 32 bits, so that the loads are wide enough to be asynchronous copies.
    """
    offs = start + tl.arange(0, BLOCK)
    words = start // 32 + tl.arange(0, BLOCK // 32)
    packed = tile(bits_ptr, rows, mask_rows, W // 32, words, below(words, W // 32, EVEN))
    bits = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    grad = tile(grad_ptr, rows, mask_rows, W, offs, below(offs, W, EVEN))
    return tl.where(tl.reshape(bits, [BLOCK_R, BLOCK]) != 0, grad, 0.0)


# Products.


@triton.jit
def product(a, b, acc, INPUT_PRECISION: tl.constexpr, AWAIT: tl.constexpr):
    """``acc + a b`` for operands that were computed in registers.

    AWAIT: finish it within the step. Hopper's products are asynchronous, and Triton lets one run
    on into the next step of a loop, where the prologue then overwrites the registers that it is
    still reading its left operand from (github.com/triton-lang/triton/issues/9433). An
    accumulator that is used in the step, if only to be moved, makes Triton wait for it there.
    """
    acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    if AWAIT:
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


# Results.


@triton.jit
def pack_bits(live, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """Booleans ``[BLOCK_R, BLOCK]`` as int32 words ``[BLOCK_R, BLOCK // 32]``."""
    bits = tl.reshape(live.to(tl.int32), [BLOCK_R, BLOCK // 32, 32])
    return tl.sum(bits << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def store_moments(partial_ptr, value, mask_rows, count, part, parts, offs, N):
    """Mean and M2 (sum of squared deviations) of a tile's columns: two-pass, in float32.

    value: as stored, so rounded; masked-out rows are 0. ``partial[0 or 1, channel, part]``.
    """
    mask = offs < N
    value = value.to(tl.float32)
    mean = tl.sum(value, 0) / count
    deviation = tl.where(mask_rows[:, None], value - mean[None, :], 0.0)
    m2 = tl.sum(deviation * deviation, 0)
    tl.store(partial_ptr + offs.to(tl.int64) * parts + part, mean, mask=mask)
    tl.store(partial_ptr + (N + offs.to(tl.int64)) * parts + part, m2, mask=mask)


@triton.jit
def store_through_relu(
    out_ptr,
    partial_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    invstd_ptr,
    grad,
    rows,
    mask_rows,
    part,
    parts,
    offs,
    N,
):
    """Store ``g = grad * [a > 0]`` for ``a = relu(BN(y))``, and ``sum(g)``, ``sum(g * xhat)``.

    The sums are of the rounded g. ``partial[0 or 1, channel, part]``.
    """
    mask = offs < N
    y = tile(y_ptr, rows, mask_rows, N, offs, mask).to(tl.float32)
    mean = channels(mean_ptr, offs, mask)
    z = normalised(y, mean, channels(scale_ptr, offs, mask), channels(beta_ptr, offs, mask))
    live = mask_rows[:, None] & mask[None, :] & ~(z <= 0)
    g = tl.where(live, grad, 0.0).to(out_ptr.dtype.element_ty)
    put_tile(out_ptr, rows, mask_rows, N, offs, mask, g)
    g = g.to(tl.float32)
    xhat = (y - mean) * channels(invstd_ptr, offs, mask)
    sum_g, sum_g_xhat = tl.sum(g, 0), tl.sum(g * xhat, 0)
    tl.store(partial_ptr + offs.to(tl.int64) * parts + part, sum_g, mask=mask)
    tl.store(partial_ptr + (N + offs.to(tl.int64)) * parts + part, sum_g_xhat, mask=mask)


@triton.jit
def lane_sums(value, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """Column sums of a tile down to ``[16, BLOCK]``, in float32: adds only what one thread holds.

    Summed over its 16 rows once after a loop, it costs the loop no exchange between threads.
    """
    return tl.sum(tl.reshape(value.to(tl.float32), [BLOCK_R // 16, 16, BLOCK]), 0)
