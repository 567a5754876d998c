/* The gradients of softmax attention.
 *
 * With the exponentials E of a row's scores relative to the largest, and its output's gradient divided by their sum, dy:
 * dv = Eᵀ dy; dS = E ∘ (dy vᵀ − dy·y); dq = scale · dS k; dk = scale · dSᵀ q. E and dS are made again for KEYS keys and QUERIES queries
 * at a time, a square that stays in the cache.
 *
 * A job is one head; where those are fewer than the threads, a range of one head's keys, for dk and dv, or of its queries, for dq.
 * Either way a sum takes one query, or key, after the other: the result has the same bits.
 */
#pragma once

#include "attention.h"

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
