/* What attention and its gradients share: the problem, copies of one head's rows, products in registers. */
#pragma once

#include "jobs.h"
#include "vector.h"

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
