/* The backward pass: jobs of a slice of the channels of one image.
 *
 * Nothing is kept by the forward pass. For one vector of channels and STATES states, every order is run twice: once along its
 * visits, storing the state before every chunk of CHUNK visits, then chunk by chunk from the last, with the states recomputed
 * (they stay in the nearest cache) and the gradient g of the state carried against the visits. The sums over channels that B and
 * C need are taken in registers.
 */
#pragma once

#include "scan_problem.h"

#define STATES (LANES / 2)
#define CHUNK 16

/* What the visits of a position read, u being Δ x, and the gradients they add to, `exponent` being A times that of Δ A.
 *
 * They lie side by side: separate arrays of a length that is a power of two would compete for the same lines of the cache.
 */
typedef struct {
    vec u, dy, delta, du, exponent;
} Place;

/* Arrays of one job: per position one element and, for E, STATES vectors. */
typedef struct {
    Place *places;
    vec *x, *slope, *dx, *E, *starts;
    float *strip;
    float *dstrip; /* gradients of the strip, summed over the slice */
} BackwardTile;

static int64_t chunks(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

static int64_t backward_workspace(int64_t length) {
    return length * (8 * LANES + STATES * (LANES + 2)) + chunks(length) * STATES * LANES;
}

static int64_t state_blocks(const Problem *p) { return (p->states + STATES - 1) / STATES; }

static void backward_read(const Problem *p, const BackwardTile *tile, int64_t image, int64_t set, int64_t first, int64_t width) {
    int64_t x_at = view_start(p, &p->x, image, 0) + first, dy_at = view_start(p, &p->dy, image, 0) + first;
    int64_t delta_at = view_start(p, &p->delta, image, set) + first, group = image / p->images;
    vec skip = load_skip(p, group, first, width), dD = {0};
    vec bias = load_channels(p->bias, (group * p->sets + set) * p->channels + first, width, 0);
    for (int64_t l = 0; l < p->length; l++) {
        vec delta = load_channels(p->delta.data, delta_at + l * p->delta.row, width, p->half) + bias;
        if (p->softplus) delta = softplus_vec(delta, tile->slope + l);
        vec x = set > 0 ? tile->x[l] : load_channels(p->x.data, x_at + l * p->x.row, width, p->half);
        Place *place = tile->places + l;
        place->delta = delta;
        place->u = delta * x;
        place->du = place->exponent = (vec){0};
        if (set > 0) continue;
        vec dy = load_channels(p->dy.data, dy_at + l * p->dy.row, width, p->half);
        tile->x[l] = x;
        place->dy = dy;
        tile->dx[l] = skip * dy;
        dD += dy * x;
    }
    if (set == 0) store_channels(p->dD, image * p->channels + first, width, 0, dD);
}

/* The states along one order: to `starts` the ones before every chunk.
 *
 * Where `exponent` is given, the decays exp(Δ A) are computed, and stored in E.
 */
INLINE void backward_starts(const BackwardTile *tile, const vec *exponent, const int32_t *order, int64_t length) {
    vec h[STATES] = {{0}};
    for (int64_t t = 0; t < length; t++) {
        int64_t l = order[t];
        vec delta = tile->places[l].delta, u = tile->places[l].u, *E = tile->E + l * STATES;
        if (t % CHUNK == 0)
            UNROLLED for (int n = 0; n < STATES; n++) tile->starts[t / CHUNK * STATES + n] = h[n];
        UNROLLED for (int n = 0; n < STATES; n++) {
            vec decay = exponent ? exp2_vec(delta * exponent[n]) : E[n];
            if (exponent) E[n] = decay;
            h[n] = decay * h[n] + tile->strip[l * 2 * STATES + n] * u;
        }
    }
}

/* The states before each of the visits [start, end) and after the last. */
INLINE void backward_states(const BackwardTile *tile, const int32_t *order, int64_t start, int64_t end, vec *states) {
    vec h[STATES];
    UNROLLED for (int n = 0; n < STATES; n++) states[n] = h[n] = tile->starts[start / CHUNK * STATES + n];
    for (int64_t t = start; t < end; t++) {
        int64_t l = order[t];
        vec u = tile->places[l].u;
        states += STATES;
        UNROLLED for (int n = 0; n < STATES; n++)
            states[n] = h[n] = tile->E[l * STATES + n] * h[n] + tile->strip[l * 2 * STATES + n] * u;
    }
}

#define LINE 64 /* bytes */

/* Ask for what a visit of position l and the states before it read: it comes while other visits keep the arithmetic busy. */
INLINE void prefetch_visit(const BackwardTile *tile, int64_t l) {
    const char *place = (const char *)(tile->places + l), *E = (const char *)(tile->E + l * STATES);
    UNROLLED for (size_t i = 0; i < sizeof(Place); i += LINE) __builtin_prefetch(place + i);
    UNROLLED for (size_t i = 0; i < STATES * sizeof(vec); i += LINE) __builtin_prefetch(E + i);
    __builtin_prefetch(tile->strip + l * 2 * STATES);
}

/* What one visit reads and gathers. */
typedef struct {
    const float *b, *c;
    const vec *E, *before, *after, *a;
    vec dy, delta, even, odd, du[2], exponent[2];
} Visit;

/* One state of one visit: takes g one step back; returns partial sums over channels of the gradients of b[n] and c[n]. */
INLINE vec visit_state(Visit *v, int n, vec *g, vec *dA) {
    vec after = g[n] + v->c[n] * v->dy;
    v->du[n % 2] += v->b[n] * after;
    g[n] = after * v->E[n];
    vec share = g[n] * v->before[n]; /* gradient of Δ A */
    v->exponent[n % 2] += v->a[n] * share;
    dA[n] += v->delta * share;
    vec h = *(const volatile vec *)(v->after + n); /* volatile: one load for both shuffles, loads are what limits the visits */
    return v->even * fold_lanes_even(after, h) + v->odd * fold_lanes_odd(after, h);
}

/* Visits [start, end) backwards: carries g, and adds to all gradients. */
INLINE void backward_visits(const BackwardTile *tile, const vec *a, const int32_t *order, int64_t start, int64_t end,
                            const vec *states, vec *g, vec *dA) {
    enum { S = STATES };
    const vec *E = tile->E;
    Place *restrict places = tile->places;
    const float *strip = tile->strip;
    float *restrict dstrip = tile->dstrip;
    for (int64_t t = end - 1; t >= start; t--) {
        int64_t l = order[t];
        if (start > 0) prefetch_visit(tile, order[t - CHUNK]);
        const float *b = strip + l * 2 * S;
        const vec *before = states + (t - start) * S;
        Place *place = places + l;
        vec u = place->u, dy = place->dy, sums[S / 2], total;
        Visit visit = {b, b + S, E + l * S, before, before + S, a, dy, place->delta, .du = {{0}}, .exponent = {{0}}};
        visit.even = fold_lanes_even(u, dy);
        visit.odd = fold_lanes_odd(u, dy);
        UNROLLED for (int n = 0; n < S; n += 2)
            sums[n / 2] = fold_lanes(visit_state(&visit, n, g, dA), visit_state(&visit, n + 1, g, dA));
#if LANES == 16
        sums[0] = fold_quads(sums[0], sums[1]);
        sums[1] = fold_quads(sums[2], sums[3]);
#endif
#if LANES >= 8
        sums[0] = fold_quads(sums[0], sums[1]);
#endif
        memcpy(&total, dstrip + l * 2 * S, sizeof total);
        total += sums[0];
        memcpy(dstrip + l * 2 * S, &total, sizeof total);
        place->du += visit.du[0] + visit.du[1];
        place->exponent += visit.exponent[0] + visit.exponent[1];
    }
}

static void backward_order(const BackwardTile *tile, const vec *a, const int32_t *order, int64_t length, int first, vec *gradient) {
    vec g[STATES] = {{0}}, states[(CHUNK + 1) * STATES], exponent[STATES], dA[STATES];
    UNROLLED for (int n = 0; n < STATES; n++) dA[n] = gradient[n];
    for (int n = 0; n < STATES; n++) exponent[n] = a[n] * LOG2_E;
    if (first)
        backward_starts(tile, exponent, order, length);
    else
        backward_starts(tile, NULL, order, length);
    for (int64_t start = (chunks(length) - 1) * CHUNK; start >= 0; start -= CHUNK) {
        int64_t end = smaller(length, start + CHUNK);
        backward_states(tile, order, start, end, states);
        backward_visits(tile, a, order, start, end, states, g, dA);
    }
    UNROLLED for (int n = 0; n < STATES; n++) gradient[n] = dA[n];
}

/* One parameter set of one vector of channels, all its states; `dstrips` are the slice's, one per block of states. */
static void backward_set(const Problem *p, BackwardTile *tile, int64_t image, int64_t set, int64_t first, int64_t width,
                         float *dstrips) {
    int64_t L = p->length, D = p->channels, N = p->states, at = image * p->sets + set;
    int64_t k = p->sets > 1 ? set : 0, end = p->sets > 1 ? set + 1 : p->orders_count;
    for (int64_t n = 0; n < N; n += STATES) {
        int count = (int)smaller(N - n, STATES);
        vec a[STATES], dA[STATES] = {{0}};
        load_A(a, p, image, set, first, n, width, count, STATES);
        load_strip(tile->strip, p, image, set, n, count, STATES);
        tile->dstrip = dstrips + n * 2 * L;
        for (int64_t order = k; order < end; order++) backward_order(tile, a, p->orders + order * L, L, order == k, dA);
        for (int64_t c = 0; c < width; c++)
            for (int m = 0; m < count; m++) p->dA[(at * D + first + c) * N + n + m] = dA[m][c];
    }
    vec dbias = {0};
    for (int64_t l = 0; l < L; l++) {
        const Place *place = tile->places + l;
        vec ddelta = place->du * tile->x[l] + place->exponent;
        if (p->softplus) ddelta *= tile->slope[l];
        tile->dx[l] += place->du * place->delta;
        dbias += ddelta;
        store_channels(p->ddelta, (at * L + l) * D + first, width, p->half, ddelta);
    }
    store_channels(p->dbias, at * D + first, width, 0, dbias);
}

/* Floats of the gradients of B and C of one slice of one image. */
static int64_t slice_parts(const Problem *p) { return p->sets * state_blocks(p) * p->length * 2 * STATES; }

static int64_t backward_jobs(const Problem *p) { return p->groups * p->images * p->slices; }

static void backward_job(const void *problem, int64_t job, float *work) {
    const Problem *p = problem;
    int64_t L = p->length, image = job / p->slices, slice = job % p->slices, blocks = channel_blocks(p);
    vec *v = (vec *)(work + L * (int64_t)(sizeof(Place) / sizeof(float))), *E = v + 3 * L, *starts = E + STATES * L;
    float *strip = (float *)(starts + chunks(L) * STATES);
    BackwardTile tile = {(Place *)work, v, v + L, v + 2 * L, E, starts, strip, NULL};
    float *dstrips = p->parts + job * slice_parts(p);
    memset(dstrips, 0, slice_parts(p) * sizeof(float));
    for (int64_t i = blocks * slice / p->slices; i < blocks * (slice + 1) / p->slices; i++) {
        int64_t first = i * LANES, width = smaller(p->channels - first, LANES);
        for (int64_t set = 0; set < p->sets; set++) {
            backward_read(p, &tile, image, set, first, width);
            backward_set(p, &tile, image, set, first, width, dstrips + set * state_blocks(p) * L * 2 * STATES);
        }
        for (int64_t l = 0; l < L; l++) store_channels(p->dx, (image * L + l) * p->channels + first, width, p->half, tile.dx[l]);
    }
}

#define GATHERED 64 /* positions of one gathering job */

static int64_t gather_jobs(const Problem *p) { return p->groups * p->images * p->sets * ((p->length + GATHERED - 1) / GATHERED); }

/* The slices' gradients of B and C, summed in the order of the slices. */
static void gather_job(const void *problem, int64_t job, float *work) {
    const Problem *p = problem;
    (void)work;
    int64_t L = p->length, N = p->states, pieces = (L + GATHERED - 1) / GATHERED;
    int64_t at = job / pieces, image = at / p->sets, set = at % p->sets, start = job % pieces * GATHERED;
    const float *parts = p->parts + image * p->slices * slice_parts(p) + set * state_blocks(p) * L * 2 * STATES;
    for (int64_t block = 0; block < state_blocks(p); block++) {
        int count = (int)smaller(N - block * STATES, STATES);
        for (int64_t l = start; l < smaller(L, start + GATHERED); l++) {
            vec total = {0};
            for (int64_t slice = 0; slice < p->slices; slice++) {
                vec part;
                memcpy(&part, parts + slice * slice_parts(p) + (block * L + l) * 2 * STATES, sizeof part);
                total += part;
            }
            for (int n = 0; n < count; n++) {
                p->dB[(at * L + l) * N + block * STATES + n] = total[2 * n];
                p->dC[(at * L + l) * N + block * STATES + n] = total[2 * n + 1];
            }
        }
    }
}
