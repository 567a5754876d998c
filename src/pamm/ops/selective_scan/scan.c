/* The selective scan on a CPU, forward and backward: plain C11 with the vector extensions of GCC and Clang.
 *
 * LANES neighbouring channels share a vector. States are taken in small blocks that stay in registers. For one block of
 * channels and states, E[l, n] = exp(delta[l] A[n]) is computed once per position and read by every order through the order's
 * index, so nothing is permuted. Nothing is saved by the forward pass; the backward pass recomputes a tile's states.
 *
 * Jobs write to places of their own and the split into jobs depends on the shapes alone: the result has the same bits for any
 * number of threads.
 *
 * Arrays are contiguous float32. V, the number of parameter sets, is 1 where the orders share their parameters, else K.
 *   x, dy, y, dx (GB, L, D) · delta, ddelta (GB, V, L, D) · A (G, V, D, N) · B, C (GB, V, L, N) · orders (K, L)
 *   dA (GB, V, D, N) and dB, dC (slices, GB, V, L, N) are parts that the caller sums over images and slices.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define FORWARD_STATES 8
#define BACKWARD_STATES 4

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

typedef struct {
    int64_t images, groups, orders_count, sets, length, channels, states, slices;
    const float *x, *delta, *A, *B, *C, *dy;
    const int32_t *orders;
    float *y, *dx, *ddelta, *dA, *dB, *dC;
    float *work; /* threads × scan_workspace() floats, aligned to 64 bytes */
} Problem;

static inline vec splat(float value) { return value - (vec){0}; }

static inline vec select_vec(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* 2^x, relative error 2e-7; 0 below 2^-126, infinity from 2^128 on, NaN for NaN. */
static inline vec exp2_vec(vec x) {
    const float magic = 12582912.0f; /* 1.5 · 2^23: adding it rounds to an integer */
    vec limited = select_vec(x > 128.0f, splat(128.0f), x);
    vec shifted = limited + magic;
    vec f = limited - (shifted - magic);
    vec p = splat(1.3202982e-3f);
    p = p * f + 9.6749524e-3f;
    p = p * f + 5.5510472e-2f;
    p = p * f + 0.24022166f;
    p = p * f + 0.69314659f;
    p = p * f + 1.0f;
    vec result = (vec)((ivec)p + ((ivec)shifted << 23));
    return (vec)((ivec)result & ~(x < -126.0f));
}

static inline float sum_lanes(vec value) {
    typedef float quad __attribute__((vector_size(16)));
    union {
        vec whole;
        quad parts[LANES / 4];
    } u = {value};
    quad total = u.parts[0];
    for (int i = 1; i < LANES / 4; i++) total += u.parts[i];
    return (total[0] + total[2]) + (total[1] + total[3]);
}

/* Columns [0, width) of the rows of a (length, stride) array into vectors, the other lanes zero; and back. */
static void pack(vec *to, const float *from, int64_t length, int64_t stride, int64_t width) {
    for (int64_t l = 0; l < length; l++) {
        if (width == LANES) {
            memcpy(to + l, from + l * stride, sizeof(vec));
        } else {
            to[l] = (vec){0};
            memcpy(to + l, from + l * stride, width * sizeof(float));
        }
    }
}

static void unpack(float *to, const vec *from, int64_t length, int64_t stride, int64_t width) {
    for (int64_t l = 0; l < length; l++) {
        if (width == LANES)
            memcpy(to + l * stride, from + l, sizeof(vec));
        else
            memcpy(to + l * stride, from + l, width * sizeof(float));
    }
}

/* A's rows of one block of channels and states: a[n][lane]; states from `count` on are zero. */
static void load_A(vec *a, const float *A, int64_t width, int64_t states, int count, int block) {
    for (int n = 0; n < block; n++) {
        a[n] = (vec){0};
        for (int64_t c = 0; n < count && c < width; c++) a[n][c] = A[c * states + n];
    }
}

/* One block's columns of B and C side by side, (length, 2, block), states from `count` on zero. */
static void load_strip(float *strip, const float *B, const float *C, int64_t length, int64_t states, int count, int block) {
    for (int64_t l = 0; l < length; l++, strip += 2 * block) {
        for (int n = 0; n < block; n++) {
            strip[n] = n < count ? B[l * states + n] : 0.0f;
            strip[block + n] = n < count ? C[l * states + n] : 0.0f;
        }
    }
}

static inline __attribute__((always_inline)) void decays(vec *E, const vec *delta, const vec *a, int64_t length, int block) {
    vec exponent[FORWARD_STATES];
    for (int n = 0; n < block; n++) exponent[n] = a[n] * 1.44269504088896341f;
    for (int64_t l = 0; l < length; l++)
        for (int n = 0; n < block; n++) E[l * block + n] = exp2_vec(delta[l] * exponent[n]);
}

/* One order of one tile of the forward pass; adds to y. */
static void scan_forward(vec *y, const vec *E, const vec *u, const float *strip, const int32_t *order, int64_t length) {
    enum { S = FORWARD_STATES };
    vec h[S] = {{0}};
    for (int64_t t = 0; t < length; t++) {
        int64_t l = order[t];
        const vec *e = E + l * S;
        const float *b = strip + l * 2 * S, *c = b + S;
        vec input = u[l], even = y[l], odd = {0};
        for (int n = 0; n < S; n += 2) {
            h[n] = e[n] * h[n] + b[n] * input;
            h[n + 1] = e[n + 1] * h[n + 1] + b[n + 1] * input;
            even += c[n] * h[n];
            odd += c[n + 1] * h[n + 1];
        }
        y[l] = even + odd;
    }
}

static int64_t channel_blocks(const Problem *p) { return (p->channels + LANES - 1) / LANES; }

static void forward_job(const Problem *p, int64_t job, float *work) {
    enum { S = FORWARD_STATES };
    int64_t L = p->length, D = p->channels, N = p->states;
    int64_t image = job / channel_blocks(p), first = job % channel_blocks(p) * LANES;
    int64_t width = D - first < LANES ? D - first : LANES, group = image / (p->images / p->groups);
    vec *x = (vec *)work, *delta = x + L, *u = delta + L, *y = u + L, *E = y + L, a[S];
    float *strip = (float *)(E + L * S);
    pack(x, p->x + image * L * D + first, L, D, width);
    memset(y, 0, L * sizeof(vec));
    for (int64_t set = 0; set < p->sets; set++) {
        int64_t at = image * p->sets + set;
        pack(delta, p->delta + at * L * D + first, L, D, width);
        for (int64_t l = 0; l < L; l++) u[l] = delta[l] * x[l];
        for (int64_t n = 0; n < N; n += S) {
            int count = N - n < S ? (int)(N - n) : S;
            load_A(a, p->A + ((group * p->sets + set) * D + first) * N + n, width, N, count, S);
            decays(E, delta, a, L, S);
            load_strip(strip, p->B + at * L * N + n, p->C + at * L * N + n, L, N, count, S);
            int64_t k = p->sets > 1 ? set : 0, end = p->sets > 1 ? set + 1 : p->orders_count;
            for (; k < end; k++) scan_forward(y, E, u, strip, p->orders + k * L, L);
        }
    }
    unpack(p->y + image * L * D + first, y, L, D, width);
}

/* What a tile of the backward pass works on: BACKWARD_STATES vectors per position each. */
typedef struct {
    vec *E, *h, *sum_h, *sum_g, *sum_gh;
    float *strip;
} Tile;

/* One order of one tile: adds, per position, its states, their gradients g, and g times the state before. */
static void scan_backward(const Tile *tile, const vec *u, const vec *dy, const int32_t *order, int64_t length) {
    enum { S = BACKWARD_STATES };
    vec h[S] = {{0}}, g[S] = {{0}};
    for (int64_t t = 0; t < length; t++) {
        int64_t l = order[t];
        for (int n = 0; n < S; n++) {
            tile->h[t * S + n] = h[n];
            h[n] = tile->E[l * S + n] * h[n] + tile->strip[l * 2 * S + n] * u[l];
            tile->sum_h[l * S + n] += h[n];
        }
    }
    for (int64_t t = length - 1; t >= 0; t--) {
        int64_t l = order[t];
        for (int n = 0; n < S; n++) {
            g[n] += tile->strip[(l * 2 + 1) * S + n] * dy[l];
            tile->sum_g[l * S + n] += g[n];
            tile->sum_gh[l * S + n] += g[n] * tile->h[t * S + n];
            g[n] *= tile->E[l * S + n];
        }
    }
}

/* From the sums over the orders to this tile's share of the gradients. */
static void gather_gradients(const Tile *tile, const vec *a, const vec *delta, const vec *u, const vec *dy, vec *ddelta, vec *du,
                             vec *dA, float *dB, float *dC, int64_t length, int64_t states, int count) {
    enum { S = BACKWARD_STATES };
    for (int n = 0; n < S; n++) dA[n] = (vec){0};
    for (int64_t l = 0; l < length; l++) {
        for (int n = 0; n < S; n++) {
            vec exponent = tile->sum_gh[l * S + n] * tile->E[l * S + n]; /* gradient of delta[l] A[n] */
            ddelta[l] += a[n] * exponent;
            dA[n] += delta[l] * exponent;
            du[l] += tile->strip[l * 2 * S + n] * tile->sum_g[l * S + n];
        }
        for (int n = 0; n < count; n++) {
            dB[l * states + n] += sum_lanes(tile->sum_g[l * S + n] * u[l]);
            dC[l * states + n] += sum_lanes(tile->sum_h[l * S + n] * dy[l]);
        }
    }
}

static void backward_block(const Problem *p, int64_t slice, int64_t image, int64_t first, float *work) {
    enum { S = BACKWARD_STATES };
    int64_t L = p->length, D = p->channels, N = p->states;
    int64_t width = D - first < LANES ? D - first : LANES, group = image / (p->images / p->groups);
    vec *x = (vec *)work, *delta = x + L, *u = delta + L, *dy = u + L, *dx = dy + L, *ddelta = dx + L, *du = ddelta + L;
    vec *tiles = du + L, a[S], dA[S];
    Tile tile = {tiles, tiles + L * S, tiles + 2 * L * S, tiles + 3 * L * S, tiles + 4 * L * S, (float *)(tiles + 5 * L * S)};
    pack(x, p->x + image * L * D + first, L, D, width);
    pack(dy, p->dy + image * L * D + first, L, D, width);
    memset(dx, 0, L * sizeof(vec));
    for (int64_t set = 0; set < p->sets; set++) {
        int64_t at = image * p->sets + set, part = (slice * p->images * p->sets + at) * L * N;
        pack(delta, p->delta + at * L * D + first, L, D, width);
        for (int64_t l = 0; l < L; l++) u[l] = delta[l] * x[l];
        memset(ddelta, 0, 2 * L * sizeof(vec)); /* and du */
        for (int64_t n = 0; n < N; n += S) {
            int count = N - n < S ? (int)(N - n) : S;
            load_A(a, p->A + ((group * p->sets + set) * D + first) * N + n, width, N, count, S);
            decays(tile.E, delta, a, L, S);
            load_strip(tile.strip, p->B + at * L * N + n, p->C + at * L * N + n, L, N, count, S);
            memset(tile.sum_h, 0, 3 * L * S * sizeof(vec)); /* and sum_g, sum_gh */
            int64_t k = p->sets > 1 ? set : 0, end = p->sets > 1 ? set + 1 : p->orders_count;
            for (; k < end; k++) scan_backward(&tile, u, dy, p->orders + k * L, L);
            gather_gradients(&tile, a, delta, u, dy, ddelta, du, dA, p->dB + part + n, p->dC + part + n, L, N, count);
            for (int64_t c = 0; c < width; c++)
                for (int m = 0; m < count; m++) p->dA[(at * D + first + c) * N + n + m] = dA[m][c];
        }
        for (int64_t l = 0; l < L; l++) {
            ddelta[l] += du[l] * x[l];
            dx[l] += du[l] * delta[l];
        }
        unpack(p->ddelta + at * L * D + first, ddelta, L, D, width);
    }
    unpack(p->dx + image * L * D + first, dx, L, D, width);
}

/* A slice of the channel blocks of one image: its blocks add to one part of dB and dC, one after the other. */
static void backward_job(const Problem *p, int64_t job, float *work) {
    int64_t image = job / p->slices, slice = job % p->slices, blocks = channel_blocks(p);
    for (int64_t i = blocks * slice / p->slices; i < blocks * (slice + 1) / p->slices; i++)
        backward_block(p, slice, image, i * LANES, work);
}

/* Floats that one thread needs, a multiple of 16. */
int64_t scan_workspace(int64_t length) {
    int64_t forward = length * (4 * LANES + FORWARD_STATES * (LANES + 2));
    int64_t backward = length * (7 * LANES + BACKWARD_STATES * (5 * LANES + 2));
    return ((forward > backward ? forward : backward) + 15) / 16 * 16;
}

int scan_lanes(void) { return LANES; }

typedef struct {
    const Problem *problem;
    void (*job)(const Problem *, int64_t, float *);
    int64_t jobs;
    atomic_llong next_job, next_worker;
} Queue;

/* What every thread runs: takes a workspace, then jobs until none is left. */
static void work_off(void *argument) {
    Queue *queue = argument;
    float *work = queue->problem->work + atomic_fetch_add(&queue->next_worker, 1) * scan_workspace(queue->problem->length);
    for (int64_t job; (job = atomic_fetch_add(&queue->next_job, 1)) < queue->jobs;) queue->job(queue->problem, job, work);
}

static void *start_thread(void *argument) {
    work_off(argument);
    return NULL;
}

/* Run the forward (y given) or backward pass on at most 256 threads.
 *
 * `parallel` is GOMP_parallel of the OpenMP runtime that the process already runs, or NULL. Its threads wait for work in a busy
 * loop, and threads beside them would have to share the cores with it. Without one, POSIX threads are started.
 */
void scan_run(const Problem *problem, int threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int backward = problem->y == NULL;
    Queue queue = {problem, backward ? backward_job : forward_job,
                   problem->images * (backward ? problem->slices : channel_blocks(problem)), 0, 0};
    pthread_t handles[256];
    int started = 0;
    if (threads > 256) threads = 256;
    if (parallel != NULL && threads > 1) {
        parallel(work_off, &queue, (unsigned)threads, 0);
        return;
    }
    for (int i = 1; i < threads && i < queue.jobs; i++)
        if (pthread_create(&handles[started], NULL, start_thread, &queue) == 0) started++;
    work_off(&queue);
    for (int i = 0; i < started; i++) pthread_join(handles[i], NULL);
}
