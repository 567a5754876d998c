/* Products of float32 matrices, C = A·B with a bias per column, for a batch of them in one call.
 *
 * A job makes a block of C. It takes the sum DEPTH terms at a time, for which a block of B is copied to the second cache, as
 * panels of COLUMNS columns, and A in groups of rows, as panels of ROWS rows: copying absorbs whatever strides the matrices
 * have. A sum's order depends on its length alone: the result has the same bits for any number of threads and jobs.
 */
#include "jobs.h"
#include "vector.h"

#ifndef DEPTH
#define DEPTH 384 /* terms of a sum at a time */
#endif
#ifndef GROUP
#define GROUP 4 /* panels of A that are copied at a time */
#endif
#define VECTORS 2
#define COLUMNS (VECTORS * LANES)
#if LANES == 16
#define ROWS 12 /* of sums that are in registers at once */
#else
#define ROWS 6
#endif
#define GAP 16 /* floats between panels, which else all lie at the same place of the cache */
#define ROW_STEP (DEPTH + GAP)
#define ROW_PANEL (ROWS * ROW_STEP)
#define COLUMN_PANEL (DEPTH * COLUMNS + GAP)

/* (batch, rows, columns) by its strides. */
typedef struct {
    const float *data;
    int64_t batch, row, column;
} Matrix;

typedef struct {
    int64_t batch, rows, columns, depth;
    int64_t block_rows, block_columns; /* of C in a job; the second a multiple of COLUMNS */
    Matrix a, b, c;                    /* columns of C side by side */
    const float *bias;                 /* (batch, columns) or NULL */
    float *work;                       /* threads × matrix_workspace() floats, aligned to 64 bytes */
} Product;

/* Floats that one thread needs, a multiple of 16. */
int64_t matrix_workspace(int64_t block_columns) {
    return GROUP * ROW_PANEL + steps_of(block_columns, COLUMNS) * COLUMN_PANEL;
}

int64_t matrix_columns(void) { return COLUMNS; }

/* LANES rows × LANES columns from (row, column) on, of which `rows` × `columns` exist; the others zero. */
INLINE void load_square(const Matrix *m, const float *data, int64_t rows, int64_t columns, vec *square) {
    if (m->column == 1) {
        for (int64_t i = 0; i < LANES; i++) square[i] = i < rows ? load_channels(data, i * m->row, columns, 0) : (vec){0};
    } else if (m->row == 1) {
        for (int64_t i = 0; i < LANES; i++) square[i] = i < columns ? load_channels(data, i * m->column, rows, 0) : (vec){0};
        transpose(square);
    } else {
        for (int64_t i = 0; i < LANES; i++) {
            square[i] = (vec){0};
            for (int64_t j = 0; j < LANES; j++)
                if (i < rows && j < columns) square[i][j] = data[i * m->row + j * m->column];
        }
    }
}

/* `depth` rows and `columns` columns of B → panels of COLUMNS, zero where there are none. */
static void copy_columns(const Matrix *b, const float *data, int64_t depth, int64_t columns, float *panels) {
    for (int64_t k = 0; k < depth; k += LANES)
        for (int64_t j = 0; j < steps_of(columns, COLUMNS) * COLUMNS; j += LANES) {
            vec square[LANES];
            float *to = panels + j / COLUMNS * COLUMN_PANEL + k * COLUMNS + j % COLUMNS;
            load_square(b, data + k * b->row + j * b->column, depth - k, columns - j, square);
            for (int64_t i = 0; i < smaller(LANES, depth - k); i++) memcpy(to + i * COLUMNS, &square[i], sizeof(vec));
        }
}

/* `rows` rows of A → panels of ROWS: (ROWS, ROW_STEP), or (DEPTH, ROWS) where the rows of A lie side by side. */
static void copy_rows(const Matrix *a, const float *data, int64_t rows, int64_t depth, float *panels) {
    for (int64_t first = 0; first < rows; first += ROWS, panels += ROW_PANEL) {
        int64_t present = smaller(ROWS, rows - first);
        const float *from = data + first * a->row;
        if (a->row == 1 && a->column != 1) {
            if (present < ROWS) memset(panels, 0, ROW_PANEL * sizeof(float));
            if (present == ROWS)
                for (int64_t k = 0; k < depth; k++) memcpy(panels + k * ROWS, from + k * a->column, ROWS * sizeof(float));
            else
                for (int64_t k = 0; k < depth; k++) memcpy(panels + k * ROWS, from + k * a->column, present * sizeof(float));
        } else {
            for (int64_t i = 0; i < ROWS; i++) {
                float *to = panels + i * ROW_STEP;
                if (i >= present) memset(to, 0, depth * sizeof(float));
                else if (a->column == 1) memcpy(to, from + i * a->row, depth * sizeof(float));
                else for (int64_t k = 0; k < depth; k++) to[k] = from[i * a->row + k * a->column];
            }
        }
    }
}

/* sum (ROWS, vectors) = Σ_k rows[i · row + k · step] · columns[k]; strides and vectors are constants where called. */
INLINE void multiply(int vectors, const float *rows, int row, int step, const float *columns, int64_t depth, vec sum[ROWS][VECTORS]) {
    vec s[ROWS][VECTORS];
    UNROLLED for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vectors; v++) s[i][v] = (vec){0};
    for (int64_t k = 0; k < depth; k++) {
        vec column[VECTORS];
        for (int v = 0; v < vectors; v++) memcpy(&column[v], columns + k * COLUMNS + v * LANES, sizeof(vec));
        UNROLLED for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < vectors; v++) s[i][v] += rows[i * row + k * step] * column[v];
    }
    UNROLLED for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = s[i][v];
}

/* A tile of C: set to bias + sum, or sum is added. */
INLINE void write_tile(float *c, int64_t row, int64_t rows, int64_t columns, int added, const float *bias, vec sum[ROWS][VECTORS]) {
    if (rows == ROWS && columns >= COLUMNS) {
        vec start[VECTORS] = {{0}};
        if (bias != NULL) memcpy(start, bias, sizeof start);
        UNROLLED for (int i = 0; i < ROWS; i++) {
            if (added) memcpy(start, c + i * row, sizeof start);
            for (int v = 0; v < VECTORS; v++) start[v] = start[v];
            for (int v = 0; v < VECTORS; v++) {
                vec value = start[v] + sum[i][v];
                memcpy(c + i * row + v * LANES, &value, sizeof value);
            }
        }
        return;
    }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < VECTORS && v * LANES < columns; v++) {
            int64_t present = columns - v * LANES;
            vec start = {0};
            if (added) start = load_channels(c, i * row + v * LANES, present, 0);
            else if (bias != NULL) start = load_channels(bias, v * LANES, present, 0);
            store_channels(c, i * row + v * LANES, present, 0, start + sum[i][v]);
        }
}

static void block_job(const void *problem, int64_t job, float *work) {
    const Product *p = problem;
    int64_t across = steps_of(p->columns, p->block_columns), down = steps_of(p->rows, p->block_rows);
    int64_t batch = job / (across * down), top = job / across % down * p->block_rows, left = job % across * p->block_columns;
    int64_t rows = smaller(p->block_rows, p->rows - top), columns = smaller(p->block_columns, p->columns - left);
    const float *a = p->a.data + batch * p->a.batch + top * p->a.row, *b = p->b.data + batch * p->b.batch + left * p->b.column;
    const float *bias = p->bias == NULL ? NULL : p->bias + batch * p->columns + left;
    float *c = (float *)p->c.data + batch * p->c.batch + top * p->c.row + left;
    float *row_panels = work, *column_panels = work + GROUP * ROW_PANEL;
    int64_t length = steps_of(p->depth, steps_of(p->depth, DEPTH));
    int turned = p->a.row == 1 && p->a.column != 1;
    for (int64_t k = 0; k < p->depth; k += length) {
        int64_t depth = smaller(length, p->depth - k);
        copy_columns(&p->b, b + k * p->b.row, depth, columns, column_panels);
        for (int64_t i = 0; i < rows; i += GROUP * ROWS) {
            int64_t present = smaller(GROUP * ROWS, rows - i);
            copy_rows(&p->a, a + i * p->a.row + k * p->a.column, present, depth, row_panels);
            for (int64_t j = 0; j < columns; j += COLUMNS) {
                const float *panel = column_panels + j / COLUMNS * COLUMN_PANEL;
                for (int64_t g = 0; g < present; g += ROWS) {
                    const float *from = row_panels + g / ROWS * ROW_PANEL;
                    vec sum[ROWS][VECTORS];
                    int narrow = columns - j <= LANES;
                    if (narrow) {
                        if (turned) multiply(1, from, 1, ROWS, panel, depth, sum);
                        else multiply(1, from, ROW_STEP, 1, panel, depth, sum);
                    } else {
                        if (turned) multiply(2, from, 1, ROWS, panel, depth, sum);
                        else multiply(2, from, ROW_STEP, 1, panel, depth, sum);
                    }
                    write_tile(
                        c + (i + g) * p->c.row + j, p->c.row, smaller(ROWS, present - g), columns - j, k > 0,
                        bias == NULL ? NULL : bias + j, sum);
                }
            }
        }
    }
}

/* At most MOST_THREADS. */
void matrix_run(const Product *p, int threads, Parallel *parallel) {
    int64_t jobs = p->batch * steps_of(p->rows, p->block_rows) * steps_of(p->columns, p->block_columns);
    run_jobs((Queue){block_job, p, jobs, p->work, matrix_workspace(p->block_columns), 0, 0}, threads, parallel);
}
