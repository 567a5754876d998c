/* Softmax attention on a CPU: plain C11 with the vector extensions of GCC and Clang.
 *
 * A job is a range of queries of one head. It copies the head's keys and values into panels of PANEL columns that lie in one
 * piece, and takes BLOCK queries at a time: ROWS of them are multiplied with a panel in registers. Their scores over all keys stay
 * in the cache, so the softmax is the plain one: maximum, exponentials, sum. All sums are float32.
 */
#include "../ops/jobs.h"
#include "../ops/vector.h"

#if LANES == 16
#define ROWS 8 /* of sums that are in registers at once */
#else
#define ROWS 6
#endif
#define VECTORS 2
#define PANEL (VECTORS * LANES)
#define LOG2_E 1.44269504f

/* Where an (images, heads, rows, width) array lies: strides in elements, columns side by side. */
typedef struct {
    void *data;
    int64_t image, head, row;
} Heads;

/* q, k, v, y and the gradients, which the forward pass has none of, are bfloat16 where `half`, else float32. */
typedef struct {
    int64_t images, heads, queries, keys, width, ranges, half;
    float scale;
    Heads q, k, v, y, dy, dq, dk, dv;
    float *rows; /* (images, heads, queries, 2): the largest score, times log2(e), and one over the sum of exponentials */
    float *work; /* threads × the workspace of one, aligned to 64 bytes */
} Attention;

/* The size rounded up to whole steps. */
static inline int64_t whole(int64_t size, int64_t step) { return steps_of(size, step) * step; }

/* LANES columns of one row as a vector; zero for rows and columns beyond the last. */
INLINE vec load_row(const Attention *p, const Heads *heads, int64_t at, int64_t row, int64_t rows, int64_t column) {
    if (row >= rows || column >= p->width) return (vec){0};
    return load_channels(heads->data, at + row * heads->row + column, p->width - column, p->half);
}

static inline int64_t start(const Heads *heads, int64_t image, int64_t head) {
    return image * heads->image + head * heads->head;
}

/* `rows` rows, and zeros up to whole PANELs of them, as panels (panel, width, PANEL) whose columns are the rows. */
static void copy_columns(const Attention *p, const Heads *heads, int64_t at, int64_t rows, float *out) {
    int64_t width = whole(p->width, LANES);
    for (int64_t j = 0; j < whole(rows, PANEL); j += LANES)
        for (int64_t i = 0; i < width; i += LANES) {
            vec square[LANES];
            for (int r = 0; r < LANES; r++) square[r] = load_row(p, heads, at, j + r, rows, i);
            transpose(square);
            float *panel = out + j / PANEL * PANEL * width + i * PANEL + j % PANEL;
            for (int r = 0; r < LANES; r++) memcpy(panel + r * PANEL, &square[r], sizeof(vec));
        }
}

/* sums += ROWS rows of `length` numbers, `row` apart and each of its numbers `step`, times columns (length, PANEL), `next` apart. */
INLINE void multiply(
    const float *rows, int64_t row, int64_t step, const float *columns, int64_t next, int64_t length, vec sums[ROWS][VECTORS]) {
    for (int64_t i = 0; i < length; i++) {
        vec column[VECTORS];
        for (int c = 0; c < VECTORS; c++) memcpy(&column[c], columns + i * next + c * LANES, sizeof(vec));
        UNROLLED for (int r = 0; r < ROWS; r++)
            UNROLLED for (int c = 0; c < VECTORS; c++) sums[r][c] += rows[r * row + i * step] * column[c];
    }
}

/* -- forward ------------------------------------------------------------------------------------------------------------ */

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

/* -- backward -----------------------------------------------------------------------------------------------------------
 *
 * The gradients of softmax attention.
 *
 * With the exponentials E of a row's scores relative to the largest, and its output's gradient divided by their sum, dy:
 * dv = Eᵀ dy; dS = E ∘ (dy vᵀ − dy·y); dq = scale · dS k; dk = scale · dSᵀ q. E and dS are made again for KEYS keys and QUERIES queries
 * at a time, a square that stays in the cache.
 *
 * A job is one head; where those are fewer than the threads, a range of one head's keys, for dk and dv, or of its queries, for dq.
 * Either way a sum takes one query, or key, after the other: the result has the same bits.
 */

#define KEYS 96 /* whole PANELs and whole ROWS */
#define QUERIES 96
#define SQUARE_ROW (KEYS + 16) /* floats between rows, which else may all start at the same place of the cache */

/* Which rows of one head a job takes, and whether for dq, for dk and dv or for all of them. */
typedef struct {
    int64_t image, head, query, queries, key, keys;
    int of_queries, of_keys;
} Part;

/* One job's copies of its queries' rows and of the keys at hand, with zeros up to whole PANELs of columns; E and dS of a square. */
typedef struct {
    int64_t width;
    float *queries, *slopes, *dq;              /* scaled q, dy and the sum so far */
    float *tops, *products;                    /* the largest score of a row, and its dy·y */
    float *keys, *dk, *dv;                     /* rows of k and the sums so far */
    float *key_columns, *value_columns;        /* as of copy_columns() */
    float *weights, *changes;                  /* E and dS, (QUERIES, SQUARE_ROW) */
} Square;

static Square square_of(const Attention *p, float *work) {
    Square square = {.width = whole(p->width, PANEL)};
    int64_t queries = whole(p->queries, ROWS), keys = KEYS * square.width;
    square.queries = work;
    square.slopes = square.queries + queries * square.width;
    square.dq = square.slopes + queries * square.width;
    square.keys = square.dq + queries * square.width;
    square.dk = square.keys + keys;
    square.dv = square.dk + keys;
    square.key_columns = square.dv + keys;
    square.value_columns = square.key_columns + keys;
    square.weights = square.value_columns + keys;
    square.changes = square.weights + QUERIES * SQUARE_ROW;
    square.tops = square.changes + QUERIES * SQUARE_ROW;
    square.products = square.tops + queries;
    return square;
}

/* Floats that one thread needs, a multiple of 16. */
int64_t attention_backward_workspace(const Attention *p) {
    int64_t queries = whole(p->queries, ROWS), width = whole(p->width, PANEL);
    return whole(queries * (3 * width + 2) + 5 * KEYS * width + 2 * QUERIES * SQUARE_ROW, 16);
}

/* Rows of one head times a factor, (rows, width), zeros up to whole ROWS. */
static void copy_rows(
    const Attention *p, const Heads *heads, int64_t at, int64_t rows, int64_t width, float factor, float *out) {
    for (int64_t r = 0; r < whole(rows, ROWS); r++)
        for (int64_t i = 0; i < width; i += LANES) {
            vec value = load_row(p, heads, at, r, rows, i) * factor;
            memcpy(out + r * width + i, &value, sizeof value);
        }
}

/* All that a part needs of its queries. */
static void copy_queries_and_slopes(const Attention *p, const Square *square, const Part *part) {
    const float *row = p->rows + 2 * ((part->image * p->heads + part->head) * p->queries + part->query);
    int64_t dy = start(&p->dy, part->image, part->head) + part->query * p->dy.row;
    int64_t y = start(&p->y, part->image, part->head) + part->query * p->y.row;
    int64_t q = start(&p->q, part->image, part->head) + part->query * p->q.row;
    copy_rows(p, &p->q, q, part->queries, square->width, p->scale * LOG2_E, square->queries);
    for (int64_t r = 0; r < whole(part->queries, ROWS); r++) {
        float inverse = r < part->queries ? row[2 * r + 1] : 0;
        vec sum = {0};
        for (int64_t i = 0; i < square->width; i += LANES) {
            vec slope = load_row(p, &p->dy, dy, r, part->queries, i) * inverse;
            sum += slope * load_row(p, &p->y, y, r, part->queries, i);
            memcpy(square->slopes + r * square->width + i, &slope, sizeof slope);
        }
        square->tops[r] = r < part->queries ? row[2 * r] : 0;
        square->products[r] = 0;
        for (int lane = 0; lane < LANES; lane++) square->products[r] += sum[lane];
    }
    if (part->of_queries) memset(square->dq, 0, whole(part->queries, ROWS) * square->width * sizeof(float));
}

/* E and dS of `queries` queries from `first` on and of the keys at hand. */
static void make_square(const Attention *p, const Square *square, int64_t first, int64_t queries, int64_t keys) {
    int64_t width = whole(p->width, LANES);
    for (int64_t j = 0; j < keys; j += PANEL)
        for (int64_t row = first; row < first + queries; row += ROWS) {
            vec scores[ROWS][VECTORS] = {0}, changes[ROWS][VECTORS] = {0};
            int64_t at = row * square->width, to = (row - first) * SQUARE_ROW + j;
            multiply(square->queries + at, square->width, 1, square->key_columns + j * width, PANEL, p->width, scores);
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < VECTORS; c++) scores[r][c] = exp2_vec(scores[r][c] - square->tops[row + r]);
            for (int r = 0; r < ROWS; r++) memcpy(square->weights + to + r * SQUARE_ROW, scores[r], sizeof scores[r]);
            multiply(square->slopes + at, square->width, 1, square->value_columns + j * width, PANEL, p->width, changes);
            for (int r = 0; r < ROWS; r++) {
                memcpy(scores[r], square->weights + to + r * SQUARE_ROW, sizeof scores[r]);
                for (int c = 0; c < VECTORS; c++) changes[r][c] = scores[r][c] * (changes[r][c] - square->products[row + r]);
                memcpy(square->changes + to + r * SQUARE_ROW, changes[r], sizeof changes[r]);
            }
        }
}

/* out (count, width) += rows times columns (length, width); steps as of multiply(). */
INLINE void add_product(
    int64_t count, const float *rows, int64_t row, int64_t step, const float *columns, int64_t width, int64_t length, float *out) {
    for (int64_t i = 0; i < width; i += PANEL)
        for (int64_t first = 0; first < count; first += ROWS) {
            vec sums[ROWS][VECTORS];
            for (int r = 0; r < ROWS; r++) memcpy(sums[r], out + (first + r) * width + i, sizeof sums[r]);
            multiply(rows + first * row, row, step, columns + i, width, length, sums);
            for (int r = 0; r < ROWS; r++) memcpy(out + (first + r) * width + i, sums[r], sizeof sums[r]);
        }
}

static void store_rows(
    const Attention *p, const Heads *heads, int64_t at, int64_t rows, int64_t width, float factor, const float *sums) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < p->width; i += LANES) {
            vec value;
            memcpy(&value, sums + r * width + i, sizeof value);
            store_channels(heads->data, at + r * heads->row + i, p->width - i, p->half, value * factor);
        }
}

/* Take the part's queries, QUERIES at a time, with `keys` keys from `key` on. */
static void take_keys(const Attention *p, const Square *square, const Part *part, int64_t key, int64_t keys) {
    int64_t k = start(&p->k, part->image, part->head) + key * p->k.row, width = square->width;
    copy_rows(p, &p->k, k, keys, width, 1, square->keys);
    copy_columns(p, &p->k, k, keys, square->key_columns);
    copy_columns(p, &p->v, start(&p->v, part->image, part->head) + key * p->v.row, keys, square->value_columns);
    memset(square->dk, 0, KEYS * width * sizeof(float));
    memset(square->dv, 0, KEYS * width * sizeof(float));
    for (int64_t first = 0; first < part->queries; first += QUERIES) {
        int64_t queries = smaller(QUERIES, part->queries - first);
        make_square(p, square, first, queries, keys);
        if (part->of_keys) {
            add_product(keys, square->weights, 1, SQUARE_ROW, square->slopes + first * width, width, queries, square->dv);
            add_product(keys, square->changes, 1, SQUARE_ROW, square->queries + first * width, width, queries, square->dk);
        }
        if (part->of_queries)
            add_product(queries, square->changes, SQUARE_ROW, 1, square->keys, width, keys, square->dq + first * width);
    }
    if (!part->of_keys) return;
    int64_t dk = start(&p->dk, part->image, part->head) + key * p->dk.row;
    store_rows(p, &p->dk, dk, keys, width, 1 / LOG2_E, square->dk);
    store_rows(p, &p->dv, start(&p->dv, part->image, part->head) + key * p->dv.row, keys, width, 1, square->dv);
}

/* The whole head with one range; else one range of its keys or of its queries. */
static Part part_of(const Attention *p, int64_t job) {
    Part part = {.queries = p->queries, .keys = p->keys, .of_queries = 1, .of_keys = 1};
    int64_t of_head = p->ranges == 1 ? 1 : 2 * p->ranges, range = job % of_head;
    part.head = job / of_head % p->heads, part.image = job / of_head / p->heads;
    if (p->ranges == 1) return part;
    int64_t each = steps_of(range < p->ranges ? p->keys : p->queries, p->ranges), first = range % p->ranges * each;
    if (range < p->ranges)
        part.key = first, part.keys = smaller(each, p->keys - first), part.of_queries = 0;
    else
        part.query = first, part.queries = smaller(each, p->queries - first), part.of_keys = 0;
    return part;
}

static void backward_job(const void *problem, int64_t job, float *work) {
    const Attention *p = problem;
    Square square = square_of(p, work);
    Part part = part_of(p, job);
    if (part.queries <= 0 || part.keys <= 0) return;
    copy_queries_and_slopes(p, &square, &part);
    for (int64_t key = part.key; key < part.key + part.keys; key += KEYS)
        take_keys(p, &square, &part, key, smaller(KEYS, part.key + part.keys - key));
    int64_t dq = start(&p->dq, part.image, part.head) + part.query * p->dq.row;
    if (part.of_queries) store_rows(p, &p->dq, dq, part.queries, square.width, p->scale, square.dq);
}

/* dq, dk and dv on at most MOST_THREADS threads. */
void attention_backward_run(const Attention *problem, int threads, Parallel *parallel) {
    int64_t jobs = problem->images * problem->heads * (problem->ranges == 1 ? 1 : 2 * problem->ranges);
    int64_t each = attention_backward_workspace(problem);
    run_jobs((Queue){backward_job, problem, jobs, problem->work, each, 0, 0}, threads, parallel);
}
