/* The backward pass: jobs of a slice of the channels of one image.
 *
 * Nothing is kept by the forward pass. For one vector of channels and STATES states, every order is run twice: once along its
 * visits, storing the state before every chunk of CHUNK visits, then chunk by chunk from the last, with the states recomputed
 * (they stay in the nearest cache) and the gradient g of the state carried against the visits. The sums over channels that B and
 * C need are taken in registers, those of C as soon as a state is known: loads limit the visits, which would read it again.
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

/* Sums over channels of STATES vectors, two partial sums of each. */
INLINE vec fold_states(const vec *v) {
#if LANES == 16
    return fold_quads(fold_lanes(fold_lanes(v[0], v[1]), fold_lanes(v[2], v[3])),
                      fold_lanes(fold_lanes(v[4], v[5]), fold_lanes(v[6], v[7])));
#elif LANES == 8
    return fold_lanes(fold_lanes(v[0], v[1]), fold_lanes(v[2], v[3]));
#else
    return fold_lanes(v[0], v[1]);
#endif
}

/* For the visits [start, end) the states before each and the partial sums of the gradient of C. */
INLINE void backward_states(const BackwardTile *tile, const int32_t *order, int64_t start, int64_t end, vec *states, vec *dC) {
    vec h[STATES], shares[STATES];
    UNROLLED for (int n = 0; n < STATES; n++) h[n] = tile->starts[start / CHUNK * STATES + n];
    for (int64_t t = start; t < end; t++, states += STATES) {
        int64_t l = order[t];
        vec u = tile->places[l].u, dy = tile->places[l].dy;
        UNROLLED for (int n = 0; n < STATES; n++) {
            states[n] = h[n];
            h[n] = tile->E[l * STATES + n] * h[n] + tile->strip[l * 2 * STATES + n] * u;
            shares[n] = h[n] * dy;
        }
        dC[t - start] = fold_states(shares);
    }
}

/* What one visit reads and gathers. */
typedef struct {
    const float *b, *c;
    const vec *E, *before, *a;
    vec u, dy, delta, du[2], exponent[2];
} Visit;

/* One state of one visit: takes g one step back; returns each channel's share of the gradient of b[n]. */
INLINE vec visit_state(Visit *v, int n, vec *g, vec *dA) {
    vec after = g[n] + v->c[n] * v->dy;
    v->du[n % 2] += v->b[n] * after;
    g[n] = after * v->E[n];
    vec share = g[n] * v->before[n]; /* gradient of Δ A */
    v->exponent[n % 2] += v->a[n] * share;
    dA[n] += v->delta * share;
    return v->u * after;
}

/* Visits [start, end) backwards: carries g, and adds to all gradients. */
INLINE void backward_visits(const BackwardTile *tile, const vec *a, const int32_t *order, int64_t start, int64_t end,
                            const vec *states, const vec *dC, vec *g, vec *dA) {
    enum { S = STATES };
    const vec *E = tile->E;
    Place *restrict places = tile->places;
    const float *strip = tile->strip;
    float *restrict dstrip = tile->dstrip;
    for (int64_t t = end - 1; t >= start; t--) {
        int64_t l = order[t];
        const float *b = strip + l * 2 * S;
        Place *place = places + l;
        vec shares[S], total;
        Visit visit = {b, b + S, E + l * S, states + (t - start) * S, a, place->u, place->dy, place->delta, {{0}}, {{0}}};
        UNROLLED for (int n = 0; n < S; n++) shares[n] = visit_state(&visit, n, g, dA);
        memcpy(&total, dstrip + l * 2 * S, sizeof total);
#if LANES >= 8
        total += fold_quads(fold_states(shares), dC[t - start]);
#else
        total += fold_lanes(fold_states(shares), dC[t - start]);
#endif
        memcpy(dstrip + l * 2 * S, &total, sizeof total);
        place->du += visit.du[0] + visit.du[1];
        place->exponent += visit.exponent[0] + visit.exponent[1];
    }
}

static void backward_order(const BackwardTile *tile, const vec *a, const int32_t *order, int64_t length, int first, vec *gradient) {
    vec g[STATES] = {{0}}, states[CHUNK * STATES], dC[CHUNK], exponent[STATES], dA[STATES];
    UNROLLED for (int n = 0; n < STATES; n++) dA[n] = gradient[n];
    for (int n = 0; n < STATES; n++) exponent[n] = a[n] * LOG2_E;
    if (first)
        backward_starts(tile, exponent, order, length);
    else
        backward_starts(tile, NULL, order, length);
    for (int64_t start = (chunks(length) - 1) * CHUNK; start >= 0; start -= CHUNK) {
        int64_t end = smaller(length, start + CHUNK);
        backward_states(tile, order, start, end, states, dC);
        backward_visits(tile, a, order, start, end, states, dC, g, dA);
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
            float *sums = (float *)&total;
            memcpy(p->dB + (at * L + l) * N + block * STATES, sums, count * sizeof(float));
            memcpy(p->dC + (at * L + l) * N + block * STATES, sums + STATES, count * sizeof(float));
        }
    }
}
