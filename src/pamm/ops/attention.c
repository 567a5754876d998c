/* Softmax attention on a CPU: plain C11 with the vector extensions of GCC and Clang.
 *
 * A job is a range of queries of one head. It copies the head's keys and values into panels of PANEL columns that lie in one
 * piece, and takes BLOCK queries at a time: ROWS of them are multiplied with a panel in registers. Their scores over all keys stay
 * in the cache, so the softmax is the plain one: maximum, exponentials, sum. All sums are float32.
 */
#include "attention.h"
#include "attention_backward.h"

#define BLOCK (4 * ROWS)
#define GAP 16 /* floats between rows of scores, which else may all start at the same place of the cache */

/* One job's copies, and its block's scores (BLOCK, stride). */
typedef struct {
    float *keys, *values, *queries, *scores;
    int64_t stride;
} Tile;

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

/* Values as panels (panel, keys, PANEL): a column is a channel, zero beyond the last. */
static void copy_values(const Attention *p, const Tile *tile, int64_t at) {
    for (int64_t i = 0; i < whole(p->width, PANEL); i += LANES)
        for (int64_t j = 0; j < p->keys; j++) {
            vec value = load_row(p, &p->v, at, j, p->keys, i);
            memcpy(tile->values + i / PANEL * PANEL * p->keys + j * PANEL + i % PANEL, &value, sizeof value);
        }
}

/* Queries (BLOCK, width), scaled so that the exponentials are powers of two; zero from `count` on. */
static void copy_queries(const Attention *p, const Tile *tile, int64_t at, int64_t count) {
    int64_t width = whole(p->width, LANES);
    for (int64_t r = 0; r < BLOCK; r++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec query = load_row(p, &p->q, at, r, count, i) * (p->scale * LOG2_E);
            memcpy(tile->queries + r * width + i, &query, sizeof query);
        }
}

static void score(const Attention *p, const Tile *tile, int64_t count) {
    int64_t width = whole(p->width, LANES);
    for (int64_t j = 0; j < p->keys; j += PANEL)
        for (int64_t first = 0; first < count; first += ROWS) {
            vec sums[ROWS][VECTORS] = {0};
            multiply(tile->queries + first * width, width, 1, tile->keys + j * width, PANEL, width, sums);
            for (int r = 0; r < ROWS; r++) memcpy(tile->scores + (first + r) * tile->stride + j, sums[r], sizeof sums[r]);
        }
}

INLINE vec larger(vec a, vec b) { return select_vec((a > b) | (a != a), a, b); } /* NaN where one of them is */

/* A row of scores → exponentials relative to the largest; tells the largest and one over their sum. */
static void exponentials(float *scores, int64_t keys, float *row) {
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
    row[0] = top, row[1] = 1.0f / total;
}

static void output(const Attention *p, const Tile *tile, int64_t at, int64_t count, const float *rows) {
    for (int64_t i = 0; i < p->width; i += PANEL)
        for (int64_t first = 0; first < count; first += ROWS) {
            vec sums[ROWS][VECTORS] = {0};
            multiply(tile->scores + first * tile->stride, tile->stride, 1, tile->values + i * p->keys, PANEL, p->keys, sums);
            for (int64_t r = 0; r < smaller(ROWS, count - first); r++)
                for (int64_t c = 0; c < VECTORS && i + c * LANES < p->width; c++) {
                    int64_t column = i + c * LANES, place = at + (first + r) * p->y.row + column;
                    store_channels(p->y.data, place, p->width - column, p->half, sums[r][c] * rows[2 * (first + r) + 1]);
                }
        }
}

static void attention_job(const void *problem, int64_t job, float *work) {
    const Attention *p = problem;
    Tile tile = tile_of(p, work);
    int64_t each = steps_of(p->queries, p->ranges), range = job % p->ranges;
    int64_t head = job / p->ranges % p->heads, image = job / p->ranges / p->heads;
    int64_t last = smaller(p->queries, (range + 1) * each);
    copy_columns(p, &p->k, start(&p->k, image, head), p->keys, tile.keys);
    copy_values(p, &tile, start(&p->v, image, head));
    for (int64_t row = range * each; row < last; row += BLOCK) {
        int64_t count = smaller(BLOCK, last - row);
        float *rows = p->rows + 2 * (job / p->ranges * p->queries + row);
        copy_queries(p, &tile, start(&p->q, image, head) + row * p->q.row, count);
        score(p, &tile, count);
        for (int64_t r = 0; r < count; r++) exponentials(tile.scores + r * tile.stride, p->keys, rows + 2 * r);
        output(p, &tile, start(&p->y, image, head) + row * p->y.row, count, rows);
    }
}

/* y = softmax(scale · q kᵀ) v and what its rows were divided by, on at most MOST_THREADS threads. */
void attention_run(const Attention *problem, int threads, Parallel *parallel) {
    int64_t jobs = problem->images * problem->heads * problem->ranges;
    run_jobs((Queue){attention_job, problem, jobs, problem->work, attention_workspace(problem), 0, 0}, threads, parallel);
}
