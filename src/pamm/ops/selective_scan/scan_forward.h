/* The forward pass: jobs of one vector of channels of one image. */
#pragma once

#include "scan_problem.h"

#define FORWARD_STATES 8
#define STORED_LIMIT (4 << 20) /* bytes of E beyond which reading it costs more than computing it again */

/* Arrays of one job: per position one vector and, for E, FORWARD_STATES vectors. */
typedef struct {
    vec *delta, *u, *y, *E;
    float *strip;
} ForwardTile;

static int64_t forward_workspace(int64_t length) { return length * (3 * LANES + FORWARD_STATES * (LANES + 2)); }

/* Read Δ of one parameter set and u = Δ x; the first set also puts the skip into y. */
static void forward_read(const Problem *p, const ForwardTile *tile, int64_t image, int64_t set, int64_t first, int64_t width) {
    int64_t x_at = view_start(p, &p->x, image, 0) + first, delta_at = view_start(p, &p->delta, image, set) + first;
    int64_t group = image / p->images;
    vec slope, skip = load_skip(p, group, first, width);
    vec bias = load_channels(p->bias, (group * p->sets + set) * p->channels + first, width, 0);
    for (int64_t l = 0; l < p->length; l++) {
        vec x = load_channels(p->x.data, x_at + l * p->x.row, width, p->half);
        vec delta = load_channels(p->delta.data, delta_at + l * p->delta.row, width, p->half) + bias;
        if (p->softplus) delta = softplus_vec(delta, &slope);
        tile->delta[l] = delta;
        tile->u[l] = delta * x;
        if (set == 0) tile->y[l] = skip * x;
    }
}

/* Where an order's decays exp(Δ A) come from. */
enum Decays { COMPUTED, COMPUTED_AND_STORED, STORED };

/* One order for FORWARD_STATES states; adds to y. */
INLINE void forward_order(const ForwardTile *tile, const vec *a, const int32_t *order, int64_t length, enum Decays decays) {
    enum { S = FORWARD_STATES };
    vec h[S] = {{0}};
    for (int64_t t = 0; t < length; t++) {
        int64_t l = order[t];
        vec *e = tile->E + l * S, u = tile->u[l], delta = tile->delta[l], sums[2] = {tile->y[l], {0}};
        const float *b = tile->strip + l * 2 * S, *c = b + S;
        UNROLLED for (int n = 0; n < S; n++) {
            vec decay = decays == STORED ? e[n] : exp2_vec(delta * a[n]);
            if (decays == COMPUTED_AND_STORED) e[n] = decay;
            h[n] = decay * h[n] + b[n] * u;
            sums[n % 2] += c[n] * h[n];
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

static int64_t channel_blocks(const Problem *p) { return (p->channels + LANES - 1) / LANES; }

static int64_t forward_jobs(const Problem *p) { return p->groups * p->images * channel_blocks(p); }

static void forward_job(const void *problem, int64_t job, float *work) {
    const Problem *p = problem;
    enum { S = FORWARD_STATES };
    int64_t L = p->length, D = p->channels, N = p->states;
    int64_t image = job / channel_blocks(p), first = job % channel_blocks(p) * LANES, width = smaller(D - first, LANES);
    vec *v = (vec *)work, a[S];
    ForwardTile tile = {v, v + L, v + 2 * L, v + 3 * L, (float *)(v + (3 + S) * L)};
    for (int64_t set = 0; set < p->sets; set++) {
        forward_read(p, &tile, image, set, first, width);
        for (int64_t n = 0; n < N; n += S) {
            int count = (int)smaller(N - n, S);
            load_A(a, p, image, set, first, n, width, count, S);
            for (int m = 0; m < S; m++) a[m] *= LOG2_E;
            load_strip(tile.strip, p, image, set, n, count, S);
            if (p->sets > 1)
                forward_only(&tile, a, p->orders + set * L, L);
            else
                forward_orders(&tile, a, p->orders, p->orders_count, L);
        }
    }
    for (int64_t l = 0; l < L; l++) store_channels(p->y, (image * L + l) * D + first, width, p->half, tile.y[l]);
}
