/* The forward pass: jobs of a few neighbouring vectors of channels of one image. */
#pragma once

#include "scan_problem.h"

#define FORWARD_STATES 8
#define FORWARD_BLOCKS (32 / LANES) /* vectors of channels of a job: 128 bytes of a float32 row are read and written at a time */
#define FORWARD_AHEAD 32            /* rows asked for before their turn: each lies in another page, where no prefetcher follows */
#define JOBS_PER_THREAD 4           /* with fewer, jobs of one vector share the work more evenly */
#define STORED_LIMIT (4 << 20)      /* bytes of E beyond which reading it costs more than computing it again */

/* Arrays of one vector of channels: per position one vector and, for E, FORWARD_STATES vectors. The vectors of a job share the
 * strip and take turns with E.
 */
typedef struct {
    vec *delta, *u, *y, *E;
    float *strip;
} ForwardTile;

static int64_t forward_workspace(int64_t length) { return length * (3 * FORWARD_BLOCKS * LANES + FORWARD_STATES * (LANES + 2)); }

static int64_t channel_blocks(const Problem *p) { return steps_of(p->channels, LANES); }

/* How many jobs share the channels of an image. The result's bits do not depend on it. */
static int64_t forward_slices(const Problem *p, int threads) {
    int64_t slices = steps_of(channel_blocks(p), FORWARD_BLOCKS);
    return p->groups * p->images * slices < JOBS_PER_THREAD * threads ? channel_blocks(p) : slices;
}

static int64_t forward_jobs(const Problem *p) { return p->groups * p->images * p->slices; }

/* A job's channels: `blocks` vectors from `first` on, width[i] channels in each. */
typedef struct {
    int64_t image, first, blocks, width[FORWARD_BLOCKS];
} ForwardPart;

static ForwardPart forward_part(const Problem *p, int64_t job) {
    int64_t slice = job % p->slices, all = channel_blocks(p), from = all * slice / p->slices;
    ForwardPart part = {job / p->slices, from * LANES, all * (slice + 1) / p->slices - from, {0}};
    for (int64_t i = 0; i < part.blocks; i++) part.width[i] = smaller(p->channels - part.first - i * LANES, LANES);
    return part;
}

/* Ask for a job's part of a row, `at` counted in elements, that will soon be read or written. */
INLINE void ask_for(const void *data, int64_t at, const ForwardPart *part, int64_t half, int written) {
    int64_t size = half ? sizeof(uint16_t) : sizeof(float);
    const char *start = (const char *)data + at * size;
    for (int64_t byte = 0; byte < part->blocks * LANES * size; byte += 64) {
        if (written)
            __builtin_prefetch(start + byte, 1);
        else
            __builtin_prefetch(start + byte, 0);
    }
}

/* Read Δ of one parameter set and u = Δ x; the first set also puts the skip into y. */
static void forward_read(const Problem *p, const ForwardTile *tiles, const ForwardPart *part, int64_t set) {
    int64_t x_at = view_start(p, &p->x, part->image, 0) + part->first, x_row = p->x.row;
    int64_t delta_at = view_start(p, &p->delta, part->image, set) + part->first, delta_row = p->delta.row;
    int64_t group = part->image / p->images;
    vec slope, skip[FORWARD_BLOCKS], bias[FORWARD_BLOCKS];
    for (int64_t i = 0; i < part->blocks; i++) {
        int64_t first = part->first + i * LANES;
        skip[i] = load_skip(p, group, first, part->width[i]);
        bias[i] = load_channels(p->bias, (group * p->sets + set) * p->channels + first, part->width[i], 0);
    }
    for (int64_t l = 0; l < p->length; l++, x_at += x_row, delta_at += delta_row) {
        if (l + FORWARD_AHEAD < p->length) {
            ask_for(p->x.data, x_at + FORWARD_AHEAD * x_row, part, p->half, 0);
            ask_for(p->delta.data, delta_at + FORWARD_AHEAD * delta_row, part, p->half, 0);
        }
        for (int64_t i = 0; i < part->blocks; i++) {
            vec x = load_channels(p->x.data, x_at + i * LANES, part->width[i], p->half);
            vec delta = load_channels(p->delta.data, delta_at + i * LANES, part->width[i], p->half) + bias[i];
            if (p->softplus) delta = softplus_vec(delta, &slope);
            tiles[i].delta[l] = delta;
            tiles[i].u[l] = delta * x;
            if (set == 0) tiles[i].y[l] = skip[i] * x;
        }
    }
}

static void forward_write(const Problem *p, const ForwardTile *tiles, const ForwardPart *part) {
    int64_t row = p->channels, at = part->image * p->length * row + part->first;
    for (int64_t l = 0; l < p->length; l++, at += row) {
        if (l + FORWARD_AHEAD < p->length) ask_for(p->y, at + FORWARD_AHEAD * row, part, p->half, 1);
        for (int64_t i = 0; i < part->blocks; i++) store_channels(p->y, at + i * LANES, part->width[i], p->half, tiles[i].y[l]);
    }
}

/* Where an order's decays exp(Δ A) come from. */
enum Decays { COMPUTED, COMPUTED_AND_STORED, STORED };

/* numbers[n] in every lane. With AVX-512 four of them come in one load: a pass that reads E has more loads than arithmetic. */
INLINE vec spread(const float *numbers, int n) {
#if LANES == 16
    __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(numbers + n / 4 * 4));
    switch (n % 4) {
        case 0: return (vec)_mm512_permute_ps(four, 0x00);
        case 1: return (vec)_mm512_permute_ps(four, 0x55);
        case 2: return (vec)_mm512_permute_ps(four, 0xaa);
        default: return (vec)_mm512_permute_ps(four, 0xff);
    }
#else
    return splat(numbers[n]);
#endif
}

/* One order for FORWARD_STATES states; adds to y. */
INLINE void forward_order(const ForwardTile *tile, const vec *a, const int32_t *order, int64_t length, enum Decays decays) {
    enum { S = FORWARD_STATES };
    vec h[S] = {{0}};
    for (int64_t t = 0; t < length; t++) {
        int64_t l = order[t];
        vec *e = tile->E + l * S, u = tile->u[l], delta = tile->delta[l], sums[2] = {tile->y[l], {0}};
        const float *b = tile->strip + l * 2 * S, *c = b + S;
        UNROLLED for (int n = 0; n < S; n++) {
            vec decay = decays == STORED ? e[n] : exp2_product(delta, a[n]);
            if (decays == COMPUTED_AND_STORED) e[n] = decay;
            h[n] = decay * h[n] + b[n] * u;
            sums[n % 2] += (decays == STORED ? spread(c, n) : splat(c[n])) * h[n];
        }
        tile->y[l] = sums[0] + sums[1];
    }
}

static void forward_first(const ForwardTile *tile, const vec *a, const int32_t *order, int64_t length) {
    forward_order(tile, a, order, length, COMPUTED_AND_STORED);
}

static void forward_next(const ForwardTile *tile, const int32_t *order, int64_t length) {
    forward_order(tile, NULL, order, length, STORED);
}

static void forward_only(const ForwardTile *tile, const vec *a, const int32_t *order, int64_t length) {
    forward_order(tile, a, order, length, COMPUTED);
}

/* All orders with one parameter set. */
static void forward_orders(const ForwardTile *tile, const vec *a, const int32_t *orders, int64_t count, int64_t length) {
    if (count == 1 || length * FORWARD_STATES * (int64_t)sizeof(vec) > STORED_LIMIT) {
        for (int64_t k = 0; k < count; k++) forward_only(tile, a, orders + k * length, length);
        return;
    }
    forward_first(tile, a, orders, length);
    for (int64_t k = 1; k < count; k++) forward_next(tile, orders + k * length, length);
}

/* All states of a job's channels with one parameter set. */
static void forward_states(const Problem *p, const ForwardTile *tiles, const ForwardPart *part, int64_t set) {
    enum { S = FORWARD_STATES };
    vec a[S];
    for (int64_t n = 0; n < p->states; n += S) {
        int count = (int)smaller(p->states - n, S);
        load_strip(tiles[0].strip, p, part->image, set, n, count, S);
        for (int64_t i = 0; i < part->blocks; i++) {
            load_A(a, p, part->image, set, part->first + i * LANES, n, part->width[i], count, S);
            for (int m = 0; m < S; m++) a[m] *= LOG2_E;
            if (p->sets > 1)
                forward_only(&tiles[i], a, p->orders + set * p->length, p->length);
            else
                forward_orders(&tiles[i], a, p->orders, p->orders_count, p->length);
        }
    }
}

static void forward_job(const void *problem, int64_t job, float *work) {
    const Problem *p = problem;
    int64_t L = p->length;
    ForwardPart part = forward_part(p, job);
    ForwardTile tiles[FORWARD_BLOCKS];
    vec *E = (vec *)work, *own = E + FORWARD_STATES * L;
    float *strip = (float *)(own + 3 * FORWARD_BLOCKS * L);
    for (int64_t i = 0; i < part.blocks; i++, own += 3 * L) tiles[i] = (ForwardTile){own, own + L, own + 2 * L, E, strip};
    for (int64_t set = 0; set < p->sets; set++) {
        forward_read(p, tiles, &part, set);
        forward_states(p, tiles, &part, set);
    }
    forward_write(p, tiles, &part);
}
