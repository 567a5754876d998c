/* Softmax attention on a CPU, forward: plain C11 with the vector extensions of GCC and Clang.
 *
 * A job is a range of queries of one head. It copies the head's keys and values into panels of PANEL columns that lie in one
 * piece, and takes BLOCK queries at a time: ROWS of them are multiplied with a panel in registers. Their scores over all keys stay
 * in the cache, so the softmax is the plain one: maximum, exponentials, sum. All sums are float32.
 */
#include "jobs.h"
#include "vector.h"

#define ROWS 8
#define VECTORS 2
#define PANEL (VECTORS * LANES)
#define BLOCK (4 * ROWS)
#define GAP 16 /* floats between rows of scores, which else may all start at the same place of the cache */
#define LOG2_E 1.44269504f

/* Where an (images, heads, rows, width) array lies: strides in elements, columns side by side. */
typedef struct {
    void *data;
    int64_t image, head, row;
} Heads;

/* q, k, v and y are bfloat16 where `half`, else float32. */
typedef struct {
    int64_t images, heads, queries, keys, width, ranges, half;
    float scale;
    Heads q, k, v, y;
    float *work; /* threads × attention_workspace() floats, aligned to 64 bytes */
} Attention;

/* One job's copies, and its block's scores (BLOCK, stride). */
typedef struct {
    float *keys, *values, *queries, *scores;
    int64_t stride;
} Tile;

/* The size rounded up to whole steps. */
static int64_t whole(int64_t size, int64_t step) { return steps_of(size, step) * step; }

static Tile tile_of(const Attention *p, float *work) {
    Tile tile = {.stride = whole(p->keys, PANEL) + GAP};
    tile.keys = work;
    tile.values = tile.keys + whole(p->keys, PANEL) * whole(p->width, LANES);
    tile.queries = tile.values + p->keys * whole(p->width, PANEL);
    tile.scores = tile.queries + BLOCK * whole(p->width, LANES);
    return tile;
}

/* Floats that one thread needs, a multiple of 16. */
int64_t attention_workspace(const Attention *p) {
    int64_t copies = (whole(p->keys, PANEL) + BLOCK) * whole(p->width, LANES) + p->keys * whole(p->width, PANEL);
    return whole(copies + BLOCK * (whole(p->keys, PANEL) + GAP), 16);
}

static int64_t start(const Heads *heads, int64_t image, int64_t head) { return image * heads->image + head * heads->head; }

/* Keys as panels (panel, width, PANEL): a column is a key, zero beyond the last. */
static void copy_keys(const Attention *p, const Tile *tile, int64_t at) {
    int64_t width = whole(p->width, LANES);
    for (int64_t j = 0; j < whole(p->keys, PANEL); j++) {
        float *column = tile->keys + j / PANEL * PANEL * width + j % PANEL;
        for (int64_t i = 0; i < width; i += LANES) {
            vec key = {0};
            if (j < p->keys) key = load_channels(p->k.data, at + j * p->k.row + i, p->width - i, p->half);
            for (int lane = 0; lane < LANES; lane++) column[(i + lane) * PANEL] = key[lane];
        }
    }
}

/* Values as panels (panel, keys, PANEL): a column is a channel, zero beyond the last. */
static void copy_values(const Attention *p, const Tile *tile, int64_t at) {
    for (int64_t i = 0; i < whole(p->width, PANEL); i += LANES)
        for (int64_t j = 0; j < p->keys; j++) {
            vec value = {0};
            if (i < p->width) value = load_channels(p->v.data, at + j * p->v.row + i, p->width - i, p->half);
            memcpy(tile->values + i / PANEL * PANEL * p->keys + j * PANEL + i % PANEL, &value, sizeof value);
        }
}

/* Queries (BLOCK, width), scaled so that the exponentials are powers of two; zero from `count` on. */
static void copy_queries(const Attention *p, const Tile *tile, int64_t at, int64_t count) {
    int64_t width = whole(p->width, LANES);
    for (int64_t r = 0; r < BLOCK; r++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec query = {0};
            if (r < count) query = load_channels(p->q.data, at + r * p->q.row + i, p->width - i, p->half);
            query *= p->scale * LOG2_E;
            memcpy(tile->queries + r * width + i, &query, sizeof query);
        }
}

/* ROWS rows of `length` numbers times a panel (length, PANEL). */
INLINE void multiply(const float *rows, int64_t stride, const float *panel, int64_t length, vec sums[ROWS][VECTORS]) {
    for (int64_t i = 0; i < length; i++) {
        vec columns[VECTORS];
        for (int c = 0; c < VECTORS; c++) memcpy(&columns[c], panel + i * PANEL + c * LANES, sizeof(vec));
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int c = 0; c < VECTORS; c++) sums[r][c] += rows[r * stride + i] * columns[c];
    }
}

static void score(const Attention *p, const Tile *tile, int64_t count) {
    int64_t width = whole(p->width, LANES);
    for (int64_t j = 0; j < p->keys; j += PANEL)
        for (int64_t first = 0; first < count; first += ROWS) {
            vec sums[ROWS][VECTORS] = {0};
            multiply(tile->queries + first * width, width, tile->keys + j * width, width, sums);
            for (int r = 0; r < ROWS; r++) memcpy(tile->scores + (first + r) * tile->stride + j, sums[r], sizeof sums[r]);
        }
}

INLINE vec larger(vec a, vec b) { return select_vec((a > b) | (a != a), a, b); } /* NaN where one of them is */

/* A row of scores → exponentials relative to the largest; returns one over their sum. */
static float exponentials(float *scores, int64_t keys) {
    vec most = splat(-__builtin_inff()), sum = {0}, x;
    float top = -__builtin_inff(), total = 0;
    for (int64_t j = keys; j < whole(keys, PANEL); j++) scores[j] = -__builtin_inff();
    for (int64_t j = 0; j < keys; j += LANES) {
        memcpy(&x, scores + j, sizeof x);
        most = larger(x, most);
    }
    for (int lane = 0; lane < LANES; lane++) top = most[lane] > top || most[lane] != most[lane] ? most[lane] : top;
    for (int64_t j = 0; j < keys; j += LANES) {
        memcpy(&x, scores + j, sizeof x);
        x = exp2_vec(x - top);
        sum += x;
        memcpy(scores + j, &x, sizeof x);
    }
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    return 1.0f / total;
}

static void output(const Attention *p, const Tile *tile, int64_t at, int64_t count, const float *inverse) {
    for (int64_t i = 0; i < p->width; i += PANEL)
        for (int64_t first = 0; first < count; first += ROWS) {
            vec sums[ROWS][VECTORS] = {0};
            multiply(tile->scores + first * tile->stride, tile->stride, tile->values + i * p->keys, p->keys, sums);
            for (int64_t r = 0; r < smaller(ROWS, count - first); r++)
                for (int64_t c = 0; c < VECTORS && i + c * LANES < p->width; c++) {
                    int64_t column = i + c * LANES, place = at + (first + r) * p->y.row + column;
                    store_channels(p->y.data, place, p->width - column, p->half, sums[r][c] * inverse[first + r]);
                }
        }
}

static void attention_job(const void *problem, int64_t job, float *work) {
    const Attention *p = problem;
    Tile tile = tile_of(p, work);
    int64_t each = (p->queries + p->ranges - 1) / p->ranges, range = job % p->ranges;
    int64_t head = job / p->ranges % p->heads, image = job / p->ranges / p->heads;
    int64_t last = smaller(p->queries, (range + 1) * each);
    copy_keys(p, &tile, start(&p->k, image, head));
    copy_values(p, &tile, start(&p->v, image, head));
    for (int64_t row = range * each; row < last; row += BLOCK) {
        int64_t count = smaller(BLOCK, last - row);
        float inverse[BLOCK];
        copy_queries(p, &tile, start(&p->q, image, head) + row * p->q.row, count);
        score(p, &tile, count);
        for (int64_t r = 0; r < count; r++) inverse[r] = exponentials(tile.scores + r * tile.stride, p->keys);
        output(p, &tile, start(&p->y, image, head) + row * p->y.row, count, inverse);
    }
}

/* y = softmax(scale · q kᵀ) v on at most MOST_THREADS threads. */
void attention_run(const Attention *problem, int threads, Parallel *parallel) {
    int64_t jobs = problem->images * problem->heads * problem->ranges;
    run_jobs((Queue){attention_job, problem, jobs, problem->work, attention_workspace(problem), 0, 0}, threads, parallel);
}
