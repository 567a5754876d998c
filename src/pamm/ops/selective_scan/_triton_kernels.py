"""The selective scan for GPUs: one forward and one backward kernel. `pamm.ops.selective_scan.triton` launches them.

A program is one warp. It owns a tile of BLOCK_N states × BLOCK_D neighbouring channels, holds their states in registers and
walks along an order, UNROLL positions at a time; x, Δ, B and C are read through the order's index, in place. A lane holds a
few states of a few channels, so that the sums over states (y, dx, dΔ) and those over channels (dB, dC) are mostly made
inside a lane; B and C are read once per tile, not once per channel.

Where several programs add to one value, each writes a copy of its own and the caller adds the copies up; a program adds to
what it wrote itself. There is no atomic operation: the same bits every time.

Axes: M = groups × images, K orders, L positions, N states, D channels. All tensors are contiguous. A is (G, [K,] N, D) and
multiplied by log2 e, so that exp(ΔA) is one exp2. Pointers that a function takes point at its program's first channel or
state. Past the sequence's end everything reads as zero: the state stays as it is and nothing is added anywhere.
"""

# ruff: noqa: RUF005 (Triton's language has no starred tuples)

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _within(index, size, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Which of a block's indices exist; a constant where all do, so that no mask is computed."""
    return tl.full([BLOCK], True, tl.int1) if EVEN else index < size


@triton.jit
def _where(mask, low, high):
    """The mask where low < high, else nothing. (Triton 3.9's interpreter takes no mask that was made with a scalar.)"""
    return mask & (tl.full(mask.shape, low, tl.int32) < high)


@triton.jit
def _read(pointer, at, width, mask):
    """One row's entries of this tile, as float32."""
    return tl.load(pointer + at * width, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_group(
    h, sequence, decay, skip, first, index, L, N, channels, in_n, in_d,
    SPLIT: tl.constexpr, EVEN_L: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The state after UNROLL positions of an order, whose outputs are written (or added to those of earlier orders)."""
    x, step, B, C, order, y = sequence
    ahead = ()  # all reads before the recurrence: their latencies overlap
    for u in tl.static_range(UNROLL):
        t = first + u
        here, here_n = (in_d, in_n) if EVEN_L else (_where(in_d, t, L), _where(in_n, t, L))
        at = tl.load(order + t, mask=EVEN_L or t < L, other=0)
        xs, steps = _read(x, at, channels, here), _read(step, at, channels, here)
        Bs, Cs = _read(B, at, N, here_n), _read(C, at, N, here_n)
        ahead = ahead + ((at, xs, steps, Bs, Cs),)
    for u in tl.static_range(UNROLL):
        at, xs, steps, Bs, Cs = ahead[u]
        here = in_d if EVEN_L else _where(in_d, first + u, L)
        h = h * tl.exp2(steps[None, :] * decay) + Bs[:, None] * (steps * xs)[None, :]
        out = tl.sum(h * Cs[:, None], axis=0) + skip * xs
        if not SPLIT:
            out += _read(y, at, channels, _where(here, 0, index))
        tl.store(y + at * channels, out, mask=here)
    return h


@triton.jit
def scan_forward(
    x, step, A, B, C, D, orders, y, kept,
    images, K, L, N, channels, chunks,
    PER_ORDER: tl.constexpr, KEEP: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_L: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (channel tiles, M, K where SPLIT, else 1).

    step: Δ, float32. y (M, K where SPLIT, else 1, L, D) float32, the skip D x in it.
    kept (M, K, chunks, N, D): the state before every CHUNK positions, a multiple of UNROLL.
    """
    m = tl.program_id(1).to(tl.int64)
    part, parts = tl.program_id(2), K if SPLIT else 1
    n = tl.arange(0, BLOCK_N)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_n, in_d = _within(n, N, EVEN_N, BLOCK_N), _within(d, channels, EVEN_D, BLOCK_D)
    tile, in_tile = n[:, None] * channels + d[None, :], in_n[:, None] & in_d[None, :]
    for index in range(1 if SPLIT else K):
        order = part if SPLIT else index
        own = (m * K + order) if PER_ORDER else m
        parameters = (m // images * K + order) if PER_ORDER else m // images
        decay = tl.load(A + parameters * N * channels + tile, mask=in_tile, other=0.0)
        skip = _read(D + d, parameters, channels, in_d)
        sequence = (
            x + m * L * channels + d, step + own * L * channels + d, B + own * L * N + n, C + own * L * N + n,
            orders + order * L, y + (m * parts + part) * L * channels + d,
        )  # fmt: skip
        states = kept + (m * K + order) * chunks * N * channels + tile
        h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for chunk in range(chunks):
            if KEEP:
                tl.store(states + chunk * N * channels, h, mask=in_tile)
            for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, L), UNROLL):
                h = _forward_group(
                    h, sequence, decay, skip, first, index, L, N, channels, in_n, in_d, SPLIT, EVEN_L, UNROLL
                )
        if not SPLIT:
            tl.debug_barrier()  # the next order reads what other lanes wrote


@triton.jit
def _replay(
    h, sequence, decay, first, L, N, channels, in_n, in_d, EVEN_L: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """The states before, between and after UNROLL positions (UNROLL + 1 of them), and the decays exp(ΔA) at each."""
    x, step, B, order = sequence[0], sequence[1], sequence[2], sequence[4]
    ahead = ()
    for u in tl.static_range(UNROLL):
        t = first + u
        here, here_n = (in_d, in_n) if EVEN_L else (_where(in_d, t, L), _where(in_n, t, L))
        at = tl.load(order + t, mask=EVEN_L or t < L, other=0)
        xs, steps, Bs = _read(x, at, channels, here), _read(step, at, channels, here), _read(B, at, N, here_n)
        ahead = ahead + ((xs, steps, Bs),)
    states, decays = (h,), ()
    for u in tl.static_range(UNROLL):
        xs, steps, Bs = ahead[u]
        E = tl.exp2(steps[None, :] * decay)
        h = h * E + Bs[:, None] * (steps * xs)[None, :]
        states, decays = states + (h,), decays + (E,)
    return states, decays


@triton.jit
def _backward_group(
    g, sum_A, h, sequence, gradients, decay, skip, first, add_d, add_step, add_n, L, N, channels, in_n, in_d,
    SPLIT: tl.constexpr, EVEN_L: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Back over UNROLL positions from g, the gradient of the state after them; h is the state before them.

    Returns g before them and the sum of dA; dx, dΔ, dB and dC are written, or added where add_… is positive.
    """
    x, step, B, C, order, dy = sequence
    dx, dstep, dB, dC = gradients
    states, decays = _replay(h, sequence, decay, first, L, N, channels, in_n, in_d, EVEN_L, UNROLL)
    for u in tl.static_range(UNROLL - 1, -1, -1):
        t = first + u
        here, here_n = (in_d, in_n) if EVEN_L else (_where(in_d, t, L), _where(in_n, t, L))
        at = tl.load(order + t, mask=EVEN_L or t < L, other=0)
        xs, steps, dys = _read(x, at, channels, here), _read(step, at, channels, here), _read(dy, at, channels, here)
        Bs, Cs = _read(B, at, N, here_n), _read(C, at, N, here_n)
        g += Cs[:, None] * dys[None, :]
        sum_C = tl.sum(states[u + 1] * dys[None, :], axis=1) + _read(dC, at, N, _where(here_n, 0, add_n))
        sum_B = tl.sum(g * (steps * xs)[None, :], axis=1) + _read(dB, at, N, _where(here_n, 0, add_n))
        du = tl.sum(g * Bs[:, None], axis=0)
        g = g * decays[u]
        exponent = g * states[u]  # the gradient of Δ A
        sum_A += exponent * steps[None, :]
        sum_step = tl.sum(exponent * decay, axis=0) * LN2 + du * xs
        sum_x = du * steps + skip * dys
        if not SPLIT:
            sum_x += _read(dx, at, channels, _where(here, 0, add_d))
            sum_step += _read(dstep, at, channels, _where(here, 0, add_step))
        tl.store(dx + at * channels, sum_x, mask=here)
        tl.store(dstep + at * channels, sum_step, mask=here)
        tl.store(dB + at * N, sum_B, mask=here_n)
        tl.store(dC + at * N, sum_C, mask=here_n)
    return g, sum_A


@triton.jit
def _backward_sequence(
    sequence, gradients, states, scratch, decay, skip, add_d, add_step, add_n,
    L, N, channels, chunks, in_n, in_d, in_tile,
    SPLIT: tl.constexpr, EVEN_L: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dA of one order. From every kept state the chunk is run once to note the state before each of its groups; then the
    groups are run back, each after a replay that stays in registers."""
    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_A = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for back in range(chunks):
        start = (chunks - 1 - back) * CHUNK
        groups = (min(CHUNK, L - start) + UNROLL - 1) // UNROLL
        h = tl.load(states + (chunks - 1 - back) * N * channels, mask=in_tile, other=0.0)
        tl.store(scratch, h)
        for group in range(1, groups):
            replayed, _ = _replay(
                h, sequence, decay, start + (group - 1) * UNROLL, L, N, channels, in_n, in_d, True, UNROLL
            )
            h = replayed[UNROLL]
            tl.store(scratch + group * BLOCK_N * BLOCK_D, h)
        tl.debug_barrier()  # reads may be another lane's writes: those of the states here, of the sums below
        for group_back in range(groups):
            group = groups - 1 - group_back
            h = tl.load(scratch + group * BLOCK_N * BLOCK_D)
            g, sum_A = _backward_group(
                g, sum_A, h, sequence, gradients, decay, skip, start + group * UNROLL, add_d, add_step, add_n,
                L, N, channels, in_n, in_d, SPLIT, EVEN_L, UNROLL,
            )  # fmt: skip
        tl.debug_barrier()
    return sum_A


@triton.jit
def scan_backward(
    dy, x, step, A, B, C, D, orders, kept, scratch, dx, dstep, dA, dB, dC,
    images, K, L, N, channels, chunks, tiles,
    PER_ORDER: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, EVEN_L: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (slices, M, K where SPLIT, else 1); a program computes `tiles` channel tiles one after another.

    dx (M, K where SPLIT, else 1, L, D); dstep (M, K where PER_ORDER or SPLIT, else 1, L, D); dA (M, K, N, D);
    dB, dC (slices, M, as dstep, L, N). All float32. scratch: CHUNK / UNROLL tiles for every program.
    """
    slice_index, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, parts = tl.program_id(2), K if SPLIT else 1
    owners = K if PER_ORDER else parts
    n = tl.arange(0, BLOCK_N)
    in_n = _within(n, N, EVEN_N, BLOCK_N)
    program = (m * parts + part) * tl.num_programs(0) + slice_index
    element = n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    own_scratch = scratch + program * (CHUNK // UNROLL * BLOCK_N * BLOCK_D) + element
    for tile_index in range(tiles):
        d = (slice_index * tiles + tile_index) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d = _within(d, channels, EVEN_D, BLOCK_D)
        tile, in_tile = n[:, None] * channels + d[None, :], in_n[:, None] & in_d[None, :]
        for index in range(1 if SPLIT else K):
            order = part if SPLIT else index
            own = (m * K + order) if PER_ORDER else m
            owner = m * owners + (order if PER_ORDER else part)
            parameters = (m // images * K + order) if PER_ORDER else m // images
            add_step = 0 if PER_ORDER else index
            decay = tl.load(A + parameters * N * channels + tile, mask=in_tile, other=0.0)
            sums = (slice_index * tl.num_programs(1) * owners + owner) * L * N + n
            sequence = (
                x + m * L * channels + d, step + own * L * channels + d, B + own * L * N + n, C + own * L * N + n,
                orders + order * L, dy + m * L * channels + d,
            )  # fmt: skip
            gradients = (
                dx + (m * parts + part) * L * channels + d, dstep + owner * L * channels + d, dB + sums, dC + sums
            )  # fmt: skip
            sum_A = _backward_sequence(
                sequence, gradients, kept + (m * K + order) * chunks * N * channels + tile, own_scratch, decay,
                _read(D + d, parameters, channels, in_d), index, add_step, tile_index + add_step,
                L, N, channels, chunks, in_n, in_d, in_tile, SPLIT, EVEN_L, BLOCK_N, BLOCK_D, CHUNK, UNROLL,
            )  # fmt: skip
            tl.store(dA + (m * K + order) * N * channels + tile, sum_A, mask=in_tile)
